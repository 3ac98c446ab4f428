"""Tiny random language models for tests: built in memory, on the CPU, in evaluation mode."""

from __future__ import annotations

from typing import Any

import torch


def tiny_model(kind: str = "qwen2", vocabulary: int = 30, seed: int = 0, **changes: Any) -> Any:
    """A two-layer model of a family, weights scaled up so that its probabilities are far from flat."""
    import transformers as tf

    torch.manual_seed(seed)
    common = {"vocab_size": vocabulary, "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0}
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "gpt2":
        config = tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256, **common, **changes)
    elif kind == "gemma3":
        small = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4}
        config = tf.Gemma3TextConfig(**shape, **(small | changes), **common)
    elif kind == "gemma2":
        config = tf.Gemma2Config(
            **shape, num_key_value_heads=2, head_dim=8, sliding_window=512, **common, **changes
        )
    elif kind == "bert":  # more than a factor and a cap lies between its body and its logits
        config = tf.BertConfig(**shape, is_decoder=True, **common, **changes)
    elif kind == "granite":
        config = tf.GraniteConfig(**shape, **({"logits_scaling": 4.0} | changes), **common)
    elif kind == "llama":
        config = tf.LlamaConfig(**shape, **common, **changes)
    else:
        config = tf.Qwen2Config(**shape, num_key_value_heads=2, **common, **changes)
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model
