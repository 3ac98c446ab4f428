"""Tiny random models of many families, each with a small tokenizer of its kind, as folders that transformers loads.

Width 32, two layers, a vocabulary of 384: a model has some 50,000 parameters. Where the real family has a number that
decides when something goes wrong (a window, a table of positions, the length at which RoPE changes), the number here
is small enough that the prompts of `TITLES` cross it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 384
PAD, START, END, UNKNOWN = "<pad>", "<start>", "<end>", "<unk>"  # ids 0, 1, 2, 3
SPECIAL = {"pad_token": PAD, "bos_token": START, "eos_token": END, "unk_token": UNKNOWN}
_FIRST = "Silver Crimson Northern Hidden Last Winter".split()  # noqa: SIM905
_LAST = "River Harbour Kingdom Station".split()  # noqa: SIM905
TITLES = (
    *(f"{a} {b}" for a, b in itertools.product(_FIRST, _LAST)),
    *("Silver River (1987)", "Winter", "The Clock and the Tide", "Alien 3"),
)


@dataclass(frozen=True)
class Family:
    """How a tiny model of a family is made.

    Attributes:
        config: Name of its config class in transformers.
        shape: Arguments of that class.
        kind: What is special about the family, as the table groups them.
        tokenizer: A name of `tokenizer`.
        model: Auto class or class that builds it.
        loud: Factor on the head's weights, so that what is done to logits (caps, scales) is large.
    """

    config: str
    shape: dict[str, Any]
    kind: str = "attention"
    tokenizer: str = "bytes"
    model: str = "AutoModelForCausalLM"
    loud: float = field(default=1.0)


_IDS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_ALL_HEADS = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
}
_GROUPED = {**_ALL_HEADS, "num_key_value_heads": 2}
_HEAD_8 = {**_GROUPED, "head_dim": 8}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 1024}
_BLOOM = {"hidden_size": 32, "n_layer": 2, "n_head": 4}
_FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_OPT = {
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_LATENT = {
    **_ALL_HEADS,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
}
_ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "topk_group": 1,
}
_MAMBA = {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2}
_MAMBA_2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_ENCODER_DECODER = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 1024,
}


def _sliding(window: int, name: str = "sliding_window") -> dict[str, Any]:
    return {name: window, "layer_types": ["sliding_attention", "full_attention"]}


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


_WIDE, _NARROW = 512, 32  # windows that are longer, and shorter, than prompts here

FAMILIES = {
    # Attention over everything, RoPE.
    "llama": Family("LlamaConfig", _GROUPED),
    "llama_biased": Family(
        "LlamaConfig", {**_GROUPED, "attention_bias": True, "mlp_bias": True}, tokenizer="pieces"
    ),
    "mistral": Family("MistralConfig", {**_GROUPED, "sliding_window": None}, tokenizer="pieces"),
    "ministral3": Family("Ministral3Config", _HEAD_8),
    "qwen2": Family("Qwen2Config", {**_GROUPED, "tie_word_embeddings": True}, tokenizer="qwen2"),
    "qwen3": Family("Qwen3Config", {**_HEAD_8, "tie_word_embeddings": True}, tokenizer="qwen2"),
    "gemma": Family("GemmaConfig", _HEAD_8, tokenizer="pieces"),
    "phi": Family("PhiConfig", _GROUPED),
    "phi3": Family("Phi3Config", {**_GROUPED, "sliding_window": None}, tokenizer="pieces"),
    "gptj": Family("GPTJConfig", {**_GPT, "rotary_dim": 4}),
    "gpt_neox": Family("GPTNeoXConfig", {**_ALL_HEADS, "rotary_pct": 0.5}, tokenizer="neox"),
    "codegen": Family("CodeGenConfig", {**_GPT, "n_ctx": 1024, "rotary_dim": 4}),
    "falcon_mqa": Family(
        "FalconConfig",
        {**_FALCON, "multi_query": True, "parallel_attn": True, "new_decoder_architecture": False},
    ),
    "falcon_new": Family("FalconConfig", {**_FALCON, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "nanochat": Family("NanoChatConfig", _GROUPED),
    "smollm3": Family("SmolLM3Config", {**_GROUPED, "no_rope_layers": [1, 0]}),
    "glm": Family("GlmConfig", {**_HEAD_8, "partial_rotary_factor": 0.5}, tokenizer="prefixed"),
    "glm4": Family("Glm4Config", _HEAD_8, tokenizer="prefixed"),
    "olmo": Family("OlmoConfig", _GROUPED, tokenizer="neox"),
    "olmo2": Family("Olmo2Config", _GROUPED),
    "stablelm": Family("StableLmConfig", {**_GROUPED, "partial_rotary_factor": 0.5}),
    "starcoder2": Family("Starcoder2Config", {**_GROUPED, "sliding_window": None}),
    "persimmon": Family("PersimmonConfig", _ALL_HEADS, tokenizer="pieces"),
    "nemotron": Family("NemotronConfig", _GROUPED),
    "ernie4_5": Family("Ernie4_5Config", _GROUPED, tokenizer="pieces"),
    "apertus": Family("ApertusConfig", _GROUPED),
    "arcee": Family("ArceeConfig", _GROUPED),
    "seed_oss": Family("SeedOssConfig", _HEAD_8),
    "helium": Family("HeliumConfig", _HEAD_8, tokenizer="pieces"),
    "diffllama": Family("DiffLlamaConfig", _GROUPED),
    "doge": Family("DogeConfig", _GROUPED),
    "hunyuan": Family("HunYuanDenseV1Config", _HEAD_8),
    "youtu": Family("YoutuConfig", _LATENT),
    # Attention over everything, tables of positions.
    "gpt2": Family("GPT2Config", _GPT, "positions"),
    "gpt_bigcode": Family("GPTBigCodeConfig", {**_GPT, "multi_query": True}, "positions"),
    "opt": Family("OPTConfig", {**_OPT, "word_embed_proj_dim": 32}, "positions"),
    "opt_350m": Family(
        "OPTConfig", {**_OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}, "positions"
    ),
    "biogpt": Family("BioGptConfig", _ALL_HEADS, "positions"),
    "xglm": Family(
        "XGLMConfig",
        {
            "d_model": 32,
            "ffn_dim": 64,
            "num_layers": 2,
            "attention_heads": 4,
            "max_position_embeddings": 1024,
        },
        "positions",
        "unigram",
    ),
    "openai_gpt": Family("OpenAIGPTConfig", _GPT, "positions"),
    "ctrl": Family("CTRLConfig", {**_GPT, "dff": 64}, "positions"),
    "bert_decoder": Family("BertConfig", {**_ALL_HEADS, "is_decoder": True}, "positions", "words"),
    # Experts.
    "mixtral": Family(
        "MixtralConfig", {**_GROUPED, **_LOCAL_EXPERTS, "sliding_window": None}, "experts", "pieces"
    ),
    "qwen2_moe": Family(
        "Qwen2MoeConfig", {**_GROUPED, **_EXPERTS, "shared_expert_intermediate_size": 32}, "experts", "qwen2"
    ),
    "qwen3_moe": Family("Qwen3MoeConfig", {**_HEAD_8, **_EXPERTS}, "experts", "qwen2"),
    "olmoe": Family(
        "OlmoeConfig", {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2}, "experts", "neox"
    ),
    "jetmoe": Family(
        "JetMoeConfig",
        {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "kv_channels": 8,
            "max_position_embeddings": 1024,
            **_LOCAL_EXPERTS,
        },
        "experts",
    ),
    "phimoe": Family(
        "PhimoeConfig", {**_GROUPED, **_LOCAL_EXPERTS, "sliding_window": None}, "experts", "pieces"
    ),
    "glm4_moe": Family("Glm4MoeConfig", {**_HEAD_8, **_ROUTED, "n_group": 1}, "experts", "prefixed"),
    "deepseek_v2": Family(
        "DeepseekV2Config", {**_LATENT, **_ROUTED, "n_shared_experts": 1, "n_group": 1}, "experts"
    ),
    "deepseek_v3": Family(
        "DeepseekV3Config", {**_LATENT, **_ROUTED, "n_shared_experts": 1, "n_group": 2}, "experts"
    ),
    "longcat": Family(
        "LongcatFlashConfig",
        {
            **{
                key: value
                for key, value in _LATENT.items()
                if key not in ("num_hidden_layers", "num_key_value_heads")
            },
            "v_head_dim": 8,
            "head_dim": 8,
            "num_layers": 1,
            "ffn_hidden_size": 64,
            "expert_ffn_hidden_size": 32,
            "moe_topk": 2,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
        },
        "experts",
    ),
    "dbrx": Family(
        "DbrxConfig",
        {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 1024,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 32, "hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        },
        "experts",
        "neox",
    ),
    # Few of many index heads, and scores are zero together: of equal ones the first are chosen, padding or not.
    "deepseek_v32": Family(
        "DeepseekV32Config",
        {
            **_LATENT,
            "v_head_dim": 8,
            **_ROUTED,
            "n_shared_experts": 1,
            "n_group": 1,
            "head_dim": 8,
            "index_n_heads": 16,
            "index_head_dim": 16,
            "index_topk": 24,
        },
        "experts",
    ),
    "deepseek_v4": Family(
        "DeepseekV4Config",
        {
            **_HEAD_8,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "moe_intermediate_size": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
            "mlp_layer_types": ["hash_moe", "moe"],
            "sliding_window": _WIDE,
            "index_n_heads": 16,
            "index_head_dim": 16,
            "index_topk": 24,
            "num_nextn_predict_layers": 0,
        },
        "experts",
    ),
    # Windows.
    "mistral_window": Family("MistralConfig", {**_GROUPED, "sliding_window": _NARROW}, "window", "pieces"),
    "phi3_window": Family("Phi3Config", {**_GROUPED, "sliding_window": _NARROW}, "window", "pieces"),
    "gemma3_text": Family("Gemma3TextConfig", {**_HEAD_8, **_sliding(_WIDE)}, "window", "pieces"),
    "gemma3_window": Family("Gemma3TextConfig", {**_HEAD_8, **_sliding(_NARROW)}, "window", "pieces"),
    "gemma3": Family(
        "Gemma3Config",
        {
            "text_config": {**_HEAD_8, **_sliding(_WIDE), **_IDS},
            "vision_config": {
                **{
                    key: _ALL_HEADS[key]
                    for key in ("hidden_size", "intermediate_size", "num_attention_heads")
                },
                "num_hidden_layers": 1,
                "image_size": 28,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
            "image_token_index": VOCABULARY - 1,
            "boi_token_index": VOCABULARY - 2,
            "eoi_token_index": VOCABULARY - 3,
        },
        "window",
        "pieces",
    ),
    "gemma4_text": Family(
        "Gemma4TextConfig",
        {
            **_HEAD_8,
            **_sliding(_WIDE),
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
        },
        "window",
        "pieces",
    ),
    "olmo3": Family("Olmo3Config", {**_GROUPED, **_sliding(_WIDE)}, "window"),
    "exaone4": Family("Exaone4Config", {**_GROUPED, **_sliding(_WIDE)}, "window"),
    "gpt_oss": Family("GptOssConfig", {**_HEAD_8, **_LOCAL_EXPERTS, **_sliding(_WIDE)}, "window"),
    "llama4_text": Family(
        "Llama4TextConfig",
        {
            **_HEAD_8,
            "intermediate_size_mlp": 64,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": _WIDE,
            "no_rope_layers": [1, 0],
        },
        "window",
    ),
    "modernbert_decoder": Family(
        "ModernBertDecoderConfig",
        {**_ALL_HEADS, "local_attention": _WIDE, "global_attn_every_n_layers": 2},
        "window",
    ),
    "gpt_neo": Family(
        "GPTNeoConfig",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 96,
            "max_position_embeddings": 1024,
        },
        "window",
    ),
    # Something is done to the logits.
    "gemma2": Family(
        "Gemma2Config",
        {**_HEAD_8, "sliding_window": _WIDE, "final_logit_softcapping": 5.0},
        "logits",
        "pieces",
        loud=3.0,
    ),
    "gemma3n_text": Family(
        "Gemma3nTextConfig",
        {
            **_HEAD_8,
            **_sliding(_WIDE),
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 0,
            "laurel_rank": 4,
            "activation_sparsity_pattern": [0.0, 0.0],
            "altup_num_inputs": 2,
            "final_logit_softcapping": 5.0,
        },
        "logits",
        "pieces",
        loud=3.0,
    ),
    "cohere": Family("CohereConfig", {**_GROUPED, "logit_scale": 0.25}, "logits", loud=3.0),
    "cohere2": Family(
        "Cohere2Config", {**_HEAD_8, **_sliding(_WIDE), "logit_scale": 0.25}, "logits", loud=3.0
    ),
    "granite": Family(
        "GraniteConfig",
        {
            **_GROUPED,
            "logits_scaling": 4.0,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.1,
        },
        "logits",
        loud=3.0,
    ),
    "granitemoe": Family(
        "GraniteMoeConfig", {**_GROUPED, **_LOCAL_EXPERTS, "logits_scaling": 4.0}, "logits", loud=3.0
    ),
    "minicpm3": Family("MiniCPM3Config", {**_LATENT, "v_head_dim": 8}, "logits", "pieces"),
    # ALiBi.
    "bloom": Family("BloomConfig", _BLOOM, "alibi"),
    "mpt": Family(
        "MptConfig", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 1024}, "alibi", "neox"
    ),
    "falcon_alibi": Family(
        "FalconConfig", {**_FALCON, "alibi": True, "multi_query": False, "parallel_attn": False}, "alibi"
    ),
    # Recurrent layers, alone or beside attention.
    "mamba": Family("MambaConfig", _MAMBA, "recurrent", "neox"),
    "mamba2": Family(
        "Mamba2Config",
        {**_MAMBA, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16},
        "recurrent",
        "neox",
    ),
    "falcon_mamba": Family("FalconMambaConfig", _MAMBA, "recurrent", "neox"),
    "rwkv": Family(
        "RwkvConfig",
        {
            "hidden_size": 32,
            "attention_hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "context_length": 1024,
        },
        "recurrent",
        "neox",
    ),
    "recurrent_gemma": Family(
        "RecurrentGemmaConfig",
        {
            "hidden_size": 32,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "lru_width": 32,
            "attention_window_size": _WIDE,
            "logits_soft_cap": 5.0,
        },
        "recurrent",
        "pieces",
    ),
    "lfm2": Family("Lfm2Config", {**_GROUPED, "layer_types": ["conv", "full_attention"]}, "recurrent"),
    "bamba": Family("BambaConfig", {**_GROUPED, **_MAMBA_2, "attn_layer_indices": [1]}, "recurrent"),
    "jamba": Family(
        "JambaConfig",
        {
            **_GROUPED,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "use_mamba_kernels": False,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
        "recurrent",
        "pieces",
    ),
    "granitemoehybrid": Family(
        "GraniteMoeHybridConfig",
        {
            **_GROUPED,
            **_MAMBA_2,
            **_LOCAL_EXPERTS,
            "shared_intermediate_size": 32,
            "layer_types": ["mamba", "attention"],
        },
        "recurrent",
    ),
    "falcon_h1": Family(
        "FalconH1Config", {**_HEAD_8, **_MAMBA_2, "mamba_n_heads": 4, "mamba_d_ssm": 32}, "recurrent"
    ),
    "nemotron_h": Family(
        "NemotronHConfig",
        {
            **{key: value for key, value in _HEAD_8.items() if key != "num_hidden_layers"},
            "layers_block_type": ["mamba", "attention", "moe"],
            "ssm_state_size": 8,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "n_groups": 1,
            "chunk_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 32,
            "n_group": 1,
            "topk_group": 1,
        },
        "recurrent",
    ),
    "zamba": Family(
        "ZambaConfig",
        {
            **_ALL_HEADS,
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "attention_hidden_size": 64,
            "num_key_value_heads": 4,
            "attention_head_dim": 16,
            "n_mamba_heads": 2,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
        "recurrent",
        "pieces",
    ),
    "zamba2": Family(
        "Zamba2Config",
        {
            **_ALL_HEADS,
            "num_hidden_layers": 3,
            "layers_block_type": ["mamba", "hybrid", "mamba"],
            "num_key_value_heads": 4,
            "mamba_d_state": 8,
            "mamba_ngroups": 1,
            "n_mamba_heads": 4,
            "mamba_headdim": 16,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
            "chunk_size": 16,
            "num_mem_blocks": 1,
            "adapter_rank": 4,
        },
        "recurrent",
        "pieces",
    ),
    "qwen3_5_text": Family("Qwen3_5TextConfig", {**_HEAD_8, **_DELTA}, "recurrent", "qwen3.5"),
    "qwen3_next": Family(
        "Qwen3NextConfig",
        {**_HEAD_8, **_DELTA, **_EXPERTS, "shared_expert_intermediate_size": 32},
        "recurrent",
        "qwen2",
    ),
    "minimax": Family(
        "MiniMaxConfig",
        {
            **_HEAD_8,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "layer_types": ["linear_attention", "full_attention"],
            "block_size": 16,
            "sliding_window": None,
        },
        "recurrent",
    ),
    # RoPE that depends on the longest position of a batch; prompts cross the limit.
    "llama_dynamic": Family(
        "LlamaConfig", {**_GROUPED, "max_position_embeddings": 64, **_rope("dynamic", factor=4.0)}, "length"
    ),
    "phi3_longrope": Family(
        "Phi3Config",
        {
            **_GROUPED,
            "sliding_window": None,
            "original_max_position_embeddings": 64,
            **_rope(
                "longrope",
                original_max_position_embeddings=64,
                short_factor=[1.0] * 4,
                long_factor=[4.0] * 4,
            ),
        },
        "length",
        "pieces",
    ),
}

# Models that must be refused in one line, whatever AutoModelForCausalLM makes of them.
REFUSED = {
    "bert": Family("BertConfig", _ALL_HEADS, "sees the future", "words"),
    "roberta": Family("RobertaConfig", _ALL_HEADS, "sees the future"),
    "bart": Family("BartConfig", _ENCODER_DECODER, "encoder-decoder", model="BartForConditionalGeneration"),
    "t5": Family(
        "T5Config",
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
        "encoder-decoder",
        "unigram",
        "T5ForConditionalGeneration",
    ),
    "qwen2_vl": Family(
        "Qwen2VLConfig",
        {
            "text_config": {**_GROUPED, **_rope("default", mrope_section=[1, 1, 2]), **_IDS},
            "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4},
        },
        "not a causal LM",
        "qwen2",
        "Qwen2VLForConditionalGeneration",
    ),
    "reformer": Family(
        "ReformerConfig",
        {
            "is_decoder": True,
            "attention_head_size": 8,
            "num_attention_heads": 4,
            "attn_layers": ["local", "lsh"],
            "axial_pos_shape": [32, 32],
            "axial_pos_embds_dim": [16, 16],
            "hidden_size": 32,
            "feed_forward_size": 64,
            "max_position_embeddings": 1024,
        },
        "trains on one length",
    ),
    "llama_without_head": Family("LlamaConfig", _GROUPED, "no head", model="AutoModel"),
    "gpt2_short": Family("GPT2Config", {**_GPT, "n_positions": 64}, "positions end"),
    "llama_small_embedding": Family("LlamaConfig", {**_GROUPED, "vocab_size": 280}, "ids end"),
    "llama_slow_tokenizer": Family("LlamaConfig", _GROUPED, "slow tokenizer", "slow"),
}


@cache
def tokenizer(kind: str) -> Any:
    """A tokenizer of `TITLES` with at most 384 ids.

    Args:
        kind: ``bytes`` (byte-level BPE that puts the start token in front, as Llama 3), ``prefixed`` (the same with
            two tokens in front, as GLM), ``neox``, ``qwen2`` and ``qwen3.5`` (byte-level BPE without start token, with
            the rules of those classes), ``pieces`` (BPE of words that begin with a space mark, as Llama 2),
            ``unigram`` (as XGLM), ``words`` (lower-case word pieces, as BERT), or ``slow`` (bytes, no fast backend).
    """
    import transformers as tf
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    if kind == "slow":
        return tf.ByT5Tokenizer()
    classes = {"neox": "GPTNeoXTokenizer", "qwen2": "Qwen2Tokenizer", "qwen3.5": "Qwen3_5Tokenizer"}
    bytewise = kind in ("bytes", "prefixed", *classes)
    # Few merges: a title has about six tokens. Vocabularies of the other kinds are spelt out, because training them
    # gives others from run to run.
    special, words, trainer = [PAD, START, END, UNKNOWN], " ".join(TITLES).split(), None
    options = {
        "special_tokens": special,
        "vocab_size": 300 if bytewise else 80,
        "show_progress": False,
    }
    if bytewise:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        if kind in classes:
            rules = getattr(tf, classes[kind])().backend_tokenizer
            backend.normalizer, backend.pre_tokenizer = rules.normalizer, rules.pre_tokenizer
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options)
    elif kind == "pieces":
        backend = Tokenizer(models.BPE(unk_token=UNKNOWN, byte_fallback=True, fuse_unk=True))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        backend.decoder = decoders.Metaspace(prepend_scheme="first")
        trainer = trainers.BpeTrainer(**options)
    elif kind == "unigram":
        pieces = [*(("\u2581" + w)[:4] for w in words), *(w[-3:] for w in words), *"".join(words), "\u2581"]
        scored = [(piece, -5.0 - (len(piece) > 1)) for piece in sorted(set(pieces))]
        backend = Tokenizer(models.Unigram([*((piece, 0.0) for piece in special), *scored], unk_id=3))
        backend.normalizer, backend.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
        backend.decoder = decoders.Metaspace()
    else:
        lower = [word.lower() for word in words]
        pieces = [*(w[:3] for w in lower), *(w[0] for w in lower), *(f"##{c}" for c in "".join(lower))]
        pieces += [*(f"##{w[-2:]}" for w in lower if len(w) > 2), *"()"]
        known = {piece: i for i, piece in enumerate([*special, *sorted(set(pieces))])}
        backend = Tokenizer(models.WordPiece(known, unk_token=UNKNOWN))
        backend.normalizer, backend.pre_tokenizer = (
            normalizers.BertNormalizer(),
            pre_tokenizers.BertPreTokenizer(),
        )
        backend.decoder = decoders.WordPiece()
    if trainer is not None:
        backend.train_from_iterator(TITLES, trainer)
    if kind in classes:
        model = json.loads(backend.to_str())["model"]
        merges = [tuple(merge) for merge in model["merges"]]
        return getattr(tf, classes[kind])(vocab=model["vocab"], merges=merges, **SPECIAL)
    front = {"bytes": [START], "prefixed": ["[gMASK]", "<sop>"], "pieces": [START], "unigram": [END]}.get(
        kind, []
    )
    if kind == "prefixed":
        backend.add_special_tokens(front)
    if front:
        backend.post_processor = processors.TemplateProcessing(
            single=" ".join([*front, "$A"]), special_tokens=[(t, backend.token_to_id(t)) for t in front]
        )
    return tf.PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)


# What is known to be wrong today, by family, dtype and column: the code of docs/models.md. Tests of these cells have to
# fail; who mends a fault takes it out.
KNOWN_FAULTS: dict[tuple[str, str, str], str] = {}


def family(name: str) -> Family:
    """A family of `FAMILIES` or `REFUSED`."""
    return (FAMILIES | REFUSED)[name]


def build(name: str, seed: int = 0) -> Any:
    """A model of a family in evaluation mode, float32, its weights scaled up so that its probabilities are not flat."""
    import transformers as tf

    made = family(name)
    ids = {key: value for key, value in _IDS.items() if key not in made.shape}
    if "text_config" in made.shape:
        ids.pop("vocab_size")
    config = getattr(tf, made.config)(**made.shape, **ids)
    torch.manual_seed(seed)
    cls = getattr(tf, made.model)
    model = (cls.from_config(config) if made.model.startswith("Auto") else cls(config)).eval()
    head = model.get_output_embeddings()
    generator = torch.Generator().manual_seed(seed)
    kernels = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.modules.conv._ConvNd)}
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() < 2 or "A_log" in key or id(parameter) in kernels:
                continue
            if parameter.abs().max() == 0:
                parameter.normal_(std=0.02, generator=generator)
            parameter.mul_(made.loud * 6 if head is not None and parameter is head.weight else 6)
    return model


def save(name: str, folder: Path, seed: int = 0) -> Path:
    """Write a model of a family with its tokenizer as an ordinary checkpoint; returns ``folder``."""
    with quiet():
        build(name, seed).save_pretrained(folder)
        tokenizer(family(name).tokenizer).save_pretrained(folder)
    return folder


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What transformers says about kernels that are not installed and heads that are new is not shown."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)
