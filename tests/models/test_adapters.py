"""Adapters and quantised bases: nothing changes at the start, one step does, saved is loaded, merged is unmerged."""

from __future__ import annotations

import builtins
import json
import math
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import triewise
from tests import worlds
from tests.models.test_checks import built
from tests.sealing import sealed_again
from tests.tiny_models import tiny_model
from tests.worlds import HISTORIES
from triewise import load
from triewise.app import evaluate_run, train_run
from triewise.cache import cache_folder
from triewise.errors import UserError
from triewise.files import read_json
from triewise.models import Backbone, hand_head, load_backbone
from triewise.models.adapters import add_lora, describe_lora, freeze_unused
from triewise.models.merging import is_quantised, merged, without_adapter
from triewise.recipe import load_recipe, parse_recipe
from triewise.recommenders import GenerativeRecommender
from triewise.settings import LoraSettings, TrainingSettings
from triewise.testing import RecommenderContract
from triewise.tokens import Trie, build_prompts, zero_gain
from triewise.training import Examples, Objective, make_windows, target_counts, train

LORA = LoraSettings(rank=4, alpha=8, dropout=0.0)
KINDS = ("qwen2", "llama", "gpt2")


def recommender(backbone: Backbone, **settings: Any) -> GenerativeRecommender:
    catalog = worlds.catalog()
    prompts = build_prompts(backbone.tokenizer, catalog, max_history=5)
    trie = Trie.from_sequences((prompts.title_tokens.values, prompts.title_tokens.offsets))
    return GenerativeRecommender(backbone, catalog, prompts, trie, np.arange(9), **settings)


def scores(backbone: Backbone, **settings: Any) -> np.ndarray:
    """Log-probabilities of all nine titles for four users, in the order of the catalogue."""
    ranking = recommender(backbone, **settings).recommend(HISTORIES, k=None)
    order = np.argsort(ranking.items, axis=1)
    return np.take_along_axis(ranking.scores, order, axis=1)


def one_step(backbone: Backbone, out: Path, steps: int = 1, **changes: Any) -> dict[str, Tensor]:
    """Train for a step; the parameters before it."""
    before = {name: p.detach().clone() for name, p in backbone.model.named_parameters()}
    made = recommender(backbone)
    rows = worlds.split([[0, 1], [2], [3]], [2, 5, 7])
    windows = make_windows(rows, "every", made.prompts)
    gain = zero_gain(made.trie, target_counts(windows, 9))
    examples = Examples(windows, made.prompts, made.trie, None, gain)
    config = TrainingSettings(
        **({"steps": steps, "learning_rate": 0.01, "batch_size": 4, "warmup_steps": 0} | changes)
    )
    train(backbone.model, examples, Objective(), config, out)
    return before


def by_hand(kind: str) -> Backbone:
    """A model of some architecture that was loaded from nowhere."""
    tokenizer = worlds.backbone().tokenizer
    return Backbone(tiny_model(kind, vocabulary=len(tokenizer)), tokenizer, "by hand", {"name": "by hand"})


def adapted(kind: str) -> tuple[Backbone, np.ndarray]:
    base = by_hand(kind)
    plain = scores(base)
    return Backbone(add_lora(base.model, LORA, 0), base.tokenizer, base.name, base.origin), plain


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of three architectures in folders."""
    out = tmp_path_factory.mktemp("bases")
    for kind in KINDS:
        by_hand(kind).save(out / kind)
    return {kind: out / kind for kind in KINDS}


def needs_bitsandbytes() -> None:
    pytest.importorskip(
        "bitsandbytes", reason="bitsandbytes is not installed (pip install 'triewise[quant]')"
    )


# --- adapters over plain bases ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_begins_as_its_base_learns_and_survives_saving_and_merging(
    kind: str, tmp_path: Path
) -> None:
    backbone, plain = adapted(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the engine warns where it has to leave its fast path
        assert np.array_equal(scores(backbone), plain)
    assert hand_head(backbone.model) is not None
    before = one_step(backbone, tmp_path / "run")
    after = dict(backbone.model.named_parameters())
    changed = {name for name, old in before.items() if not old.equal(after[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    assert all(after[name].dtype == torch.float32 for name in changed)
    trained = scores(backbone)
    assert np.abs(trained - plain).max() > 1e-3
    backbone.save(tmp_path / "saved")
    loaded = load_backbone(str(tmp_path / "saved"), device="cpu")
    assert loaded.adapted
    assert scores(loaded) == pytest.approx(trained, abs=1e-5)
    together = backbone.merged()
    assert not together.adapted
    assert scores(together) == pytest.approx(trained, abs=1e-4)
    assert np.array_equal(scores(backbone), trained), "merging leaves the adapter as it was"
    together.save(tmp_path / "merged")
    assert scores(load_backbone(str(tmp_path / "merged"), device="cpu")) == pytest.approx(trained, abs=1e-4)


def test_neither_head_nor_embeddings_are_adapted_and_targets_are_honoured() -> None:
    everywhere = add_lora(tiny_model("llama"), LORA, 0)
    names = {
        name.split(".lora_A")[0].split(".")[-1]
        for name, _ in everywhere.named_parameters()
        if "lora_A" in name
    }
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    two = add_lora(tiny_model("llama"), LORA.model_copy(update={"targets": ("q_proj", "v_proj")}), 0)
    assert sum("lora_A" in name for name, _ in two.named_parameters()) == 2 * 2  # two layers
    for target in ("lm_head", "embed_tokens", "c_attn"):
        with pytest.raises(UserError, match=f"wanted ends of names of .*down_proj.*, got '{target}'"):
            add_lora(tiny_model("llama"), LORA.model_copy(update={"targets": (target,)}), 0)
    with pytest.raises(UserError, match="wanted a base model without adapter"):
        add_lora(everywhere, LORA, 0)


def test_a_new_adapter_is_what_the_seed_says_and_leaves_other_random_numbers_alone() -> None:
    state = torch.get_rng_state()
    a, b, c = (
        {n: p for n, p in add_lora(tiny_model(), LORA, seed).named_parameters() if "lora_A" in n}
        for seed in (1, 1, 2)
    )
    assert all(a[name].equal(b[name]) for name in a)
    assert not any(a[name].equal(c[name]) for name in a)
    torch.set_rng_state(state)
    expected = torch.rand(3)
    torch.set_rng_state(state)
    model = tiny_model(seed=5)
    torch.set_rng_state(state)
    add_lora(model, LORA, 7)
    assert torch.rand(3).equal(expected)


def test_the_base_comes_back_without_copying_its_weights() -> None:
    model = tiny_model("llama")
    weights = {name: p for name, p in model.named_parameters()}
    base = without_adapter(add_lora(model, LORA, 0))
    assert all(p is weights[name] for name, p in base.named_parameters())


def test_a_bfloat16_base_keeps_a_float32_adapter(bases: dict[str, Path]) -> None:
    backbone = load_backbone(str(bases["llama"]), device="cpu", dtype="bfloat16", lora=LORA)
    kinds = {("lora_" in name): p.dtype for name, p in backbone.model.named_parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}


# --- what is adapted --------------------------------------------------------------------------------------------------

MOE = {"num_key_value_heads": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LEFT_OUT = {  # kind -> its config, and ends of linear layers that no adapter may have
    "DeepseekV3": (
        TEXT
        | MOE
        | LATENT
        | {
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
        },
        ("experts", "mlp.gate"),
    ),
    "Mixtral": (TEXT | MOE | {"num_local_experts": 4, "sliding_window": None}, ("experts", "gate")),
    "Phimoe": (TEXT | MOE | {"num_local_experts": 4, "sliding_window": None}, ("router",)),
    "JetMoe": (TEXT | MOE | {"kv_channels": 8, "num_local_experts": 4}, ("router.layer",)),
    "Mamba": (
        {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2},
        ("x_proj", "dt_proj", "out_proj"),
    ),
    "CTRL": ({"n_embd": 32, "dff": 64, "n_layer": 2, "n_head": 4}, ("h.0", "h.1")),
    "Bart": ({"d_model": 32, "decoder_layers": 2, "decoder_ffn_dim": 64}, ("encoder_attn.q_proj",)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LEFT_OUT)
def test_only_layers_that_a_text_runs_through_are_adapted(kind: str, dtype: torch.dtype) -> None:
    shape, left_out = LEFT_OUT[kind]
    model = built(kind, "BartForCausalLM" if kind == "Bart" else "AutoModelForCausalLM", **shape).to(dtype)
    ids = torch.arange(5, 17)[None]
    state = torch.get_rng_state()
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
        model = add_lora(model, LoraSettings(rank=4), 0)  # with dropout, as the default is
        assert model(input_ids=ids, use_cache=False).logits.equal(before)
    assert torch.get_rng_state().equal(state)
    adapted_ends = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A." in name}
    assert adapted_ends
    assert not [name for name in adapted_ends if name.endswith(left_out)]
    model.train()(input_ids=ids, use_cache=False).logits.float().sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name and p.grad is not None for name, p in trained.items())
    with torch.no_grad():
        for name, p in trained.items():
            if "lora_B" in name:
                p.normal_(std=0.1)
        model.eval()
        changed = model(input_ids=ids, use_cache=False).logits.float()
        whole = merged(model)(input_ids=ids, use_cache=False).logits.float()
    assert (changed - before.float()).abs().max() > 0.1
    if dtype == torch.float32:
        assert torch.allclose(whole, changed, atol=1e-3)


def test_the_share_is_said_and_experts_are_adapted_where_asked_for(tmp_path: Path) -> None:
    shape, _ = LEFT_OUT["Mixtral"]
    lora = LoraSettings(rank=4, dropout=0.0, experts=True)
    few = add_lora(built("Mixtral", **shape), LoraSettings(rank=4), 0)
    assert re.fullmatch(
        "LoRA adapts 1[0-9.]+ % of the matrix weights of the text body; not among the adapted: "
        "mlp.experts.gate_up_proj, mlp.experts.down_proj, mlp.gate",
        describe_lora(few),
    )
    assert describe_lora(add_lora(tiny_model("llama"), LORA, 0)).endswith(
        "100 % of the matrix weights of the text body"
    )
    base = built("Mixtral", **shape)
    worlds.backbone().tokenizer.save_pretrained(tmp_path / "base")
    base.save_pretrained(tmp_path / "base")
    backbone = load_backbone(str(tmp_path / "base"), device="cpu", dtype="float32", lora=lora)
    assert describe_lora(backbone.model).endswith(
        "99.5 % of the matrix weights of the text body; not among the adapted: mlp.gate"
    )
    with torch.no_grad():
        for name, p in backbone.model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    found = scores(backbone)
    assert scores(backbone.merged()) == pytest.approx(found, abs=1e-4)
    backbone.save(tmp_path / "saved")
    assert np.array_equal(scores(load_backbone(str(tmp_path / "saved"), device="cpu")), found)
    with pytest.raises(UserError, match="experts = true needs lora.dropout = 0, got 0.05; set it to false"):
        add_lora(built("Mixtral", **shape), LoraSettings(rank=4, experts=True), 0)
    with pytest.raises(UserError, match="experts = true needs a model with fused experts; set it to false"):
        add_lora(tiny_model("llama"), lora, 0)


def test_what_peft_refuses_and_what_does_not_fold_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Twice(torch.nn.Linear):
        """A layer whose output is not linear in its weight."""

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.linear(x, self.weight**2)

    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj = Twice(32, 64, bias=False)
    with pytest.raises(
        UserError, match=r"adapter of model.layers.\*.mlp.up_proj is another one once it is fol"
    ):
        add_lora(model, LORA, 0)

    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("no such luck\nand more")

    monkeypatch.setattr("peft.get_peft_model", refuse)
    with pytest.raises(
        UserError, match=r"PEFT cannot adapt this Llama\w+ \(ValueError: no such luck\); name"
    ):
        add_lora(tiny_model("llama"), LORA, 0)


def test_weights_that_a_text_does_not_reach_are_frozen() -> None:
    from transformers import AutoModelForCausalLM, Gemma3Config

    common = {"vocab_size": 320, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    text = TEXT | common | {"num_key_value_heads": 2, "head_dim": 8}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision |= {"image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    both = AutoModelForCausalLM.from_config(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=319)
    )
    bart = built("Bart", "BartForCausalLM", **LEFT_OUT["Bart"][0])
    for model, unused in (
        (both, ("vision", "multi_modal")),
        (bart, ("encoder_attn",)),
        (tiny_model("gpt2"), ()),
    ):
        names = {name for name, p in model.named_parameters() if p.requires_grad}
        freeze_unused(model)
        left = {name for name, p in model.named_parameters() if p.requires_grad}
        assert names - left == {name for name in names if any(part in name for part in unused)}
        model.train()(input_ids=torch.arange(5, 17)[None] % 30, use_cache=False).logits.sum().backward()
        assert all(p.grad is not None for name, p in model.named_parameters() if name in left)
    adapted_both = {n for n, _ in add_lora(both.eval(), LORA, 0).named_parameters() if "lora_A" in n}
    assert len(adapted_both) == 2 * 7
    assert not any("vision" in name for name in adapted_both)


# --- adapters of PEFT -------------------------------------------------------------------------------------------------

PLAIN: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
FOREIGN: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "saved head": {"modules_to_save": ["lm_head"]},
    "saved both": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "tokens": {"trainable_token_indices": [5, 6, 7]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
}


def foreign(base: Path, changes: dict[str, Any], out: Path) -> tuple[Any, Tensor]:
    """A folder that PEFT wrote, over a checkpoint; PEFT's model and its logits."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = get_peft_model(model, LoraConfig(**(PLAIN | changes))).eval()
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn(p.shape))
        model.save_pretrained(out)
    return model, logits(model)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=torch.arange(5, 17)[None], use_cache=False).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_folder_of_peft_is_loaded_and_merged_by_peft(kind: str, tied: bool, tmp_path: Path) -> None:
    tokenizer = worlds.backbone().tokenizer
    base = Backbone(
        tiny_model("llama", vocabulary=len(tokenizer), tie_word_embeddings=tied), tokenizer, "b", {}
    )
    base.save(tmp_path / "base")
    model, wanted = foreign(tmp_path / "base", FOREIGN[kind], tmp_path / "peft")
    backbone = load_backbone(str(tmp_path / "peft"), device="cpu", dtype="float32")
    assert backbone.adapted
    assert logits(backbone.model).equal(wanted)
    found = scores(backbone)
    assert np.abs(found - scores(base)).max() > 1e-2
    assert scores(Backbone(model, tokenizer, "by hand", {})) == pytest.approx(found, abs=1e-5)
    together = backbone.merged()
    assert logits(backbone.model).equal(wanted), "merging leaves the adapter as it was"
    assert scores(together) == pytest.approx(found, abs=1e-4)
    together.save(tmp_path / "merged")
    assert scores(load_backbone(str(tmp_path / "merged"), device="cpu")) == pytest.approx(found, abs=1e-4)
    backbone.save(tmp_path / "saved")
    again = load_backbone(str(tmp_path / "saved"), device="cpu", dtype="float32")
    assert logits(again.model).equal(wanted)
    moved = tmp_path / "elsewhere"
    (tmp_path / "base").rename(moved)
    found_again = load_backbone(str(tmp_path / "peft"), device="cpu", dtype="float32", base=moved)
    assert logits(found_again.model).equal(wanted)


@pytest.mark.parametrize("with_config", [True, False])
def test_an_adapter_of_the_hub_is_known_by_its_files(
    with_config: bool, bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repository in the cache; some hold the config of the base beside the adapter."""
    repository = tmp_path / "models--someone--adapter"
    snapshot = repository / "snapshots" / ("0" * 40)
    _, wanted = foreign(bases["llama"], {"use_dora": True}, snapshot)
    if with_config:
        shutil.copy(bases["llama"] / "config.json", snapshot)
        worlds.backbone().tokenizer.save_pretrained(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    backbone = load_backbone("someone/adapter", device="cpu", dtype="float32")
    assert backbone.adapted
    assert logits(backbone.model).equal(wanted)
    with pytest.raises(UserError, match="wanted the language model 'someone/nothing'"):
        load_backbone("someone/nothing", device="cpu")


def test_adapters_that_are_not_understood_are_one_line(bases: dict[str, Path], tmp_path: Path) -> None:
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    heads = {"target_modules": ["q_proj", "lm_head"]}
    foreign(bases["llama"], heads, tmp_path / "head")
    with pytest.raises(UserError, match="wanted an adapter of the body, got one on the output head"):
        load_backbone(str(tmp_path / "head"), device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        soft = get_peft_model(by_hand("llama").model, prompt)
        two = get_peft_model(by_hand("llama").model, LoraConfig(**PLAIN))
        two.add_adapter("other", LoraConfig(**PLAIN))
    with pytest.raises(UserError, match="such as LoRA, got PROMPT_TUNING, which changes the prompt"):
        recommender(Backbone(soft, *by_hand_parts())).recommend(HISTORIES)
    with pytest.raises(UserError, match="with one adapter named 'default', got default, other; merge"):
        recommender(Backbone(two, *by_hand_parts())).recommend(HISTORIES)
    inside = by_hand("llama").model
    inside.add_adapter(LoraConfig(**PLAIN))
    with pytest.raises(UserError, match="wanted PEFT's model around a base, got a Llama.* holds an adapter"):
        recommender(Backbone(inside, *by_hand_parts())).recommend(HISTORIES)
    broken, _ = adapted("llama")

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("not this one")

    layer = broken.model.get_base_model().model.layers[0].self_attn.q_proj
    layer.__class__ = type("Odd", (type(layer),), {"merge": fail})
    with pytest.raises(UserError, match=r"cannot be folded into its base \(ValueError: not this one\); eval"):
        broken.merged()


def by_hand_parts() -> tuple[Any, str, dict[str, Any]]:
    return worlds.backbone().tokenizer, "by hand", {}


# --- quantised bases --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_four_bits_one_step_saved_loaded_merged(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    needs_bitsandbytes()
    load = {"device": "cpu", "dtype": "float32", "quantisation": "4bit"}
    base = load_backbone(str(bases[kind]), **load)
    assert base.quantised
    assert hand_head(base.model) is not None
    plain = scores(base)
    assert np.abs(plain - scores(load_backbone(str(bases[kind]), device="cpu"))).max() > 1e-2
    backbone = load_backbone(str(bases[kind]), **load, lora=LORA)
    assert np.array_equal(scores(backbone), plain)
    before = one_step(backbone, tmp_path / "run")
    after = dict(backbone.model.named_parameters())
    assert {"lora_" in name for name, old in before.items() if not old.equal(after[name])} == {True}
    trained = scores(backbone)
    assert np.abs(trained - plain).max() > 1e-3
    backbone.save(tmp_path / "saved")
    assert not (tmp_path / "saved" / "base").exists(), "the base has a place of its own"
    loaded = load_backbone(str(tmp_path / "saved"), device="cpu", dtype="float32")
    assert loaded.quantised
    assert scores(loaded) == pytest.approx(trained, abs=1e-5)
    whole = loaded.merged()
    assert not is_quantised(whole.model)
    assert scores(whole) == pytest.approx(trained, abs=1e-4)
    whole.save(tmp_path / "merged")
    again = load_backbone(str(tmp_path / "merged"), device="cpu")
    assert not again.quantised
    assert scores(again) == pytest.approx(trained, abs=1e-4)


def test_eight_bits_round_their_inputs_so_merging_is_close_but_not_equal(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    needs_bitsandbytes()
    load = {"device": "cpu", "dtype": "float32", "quantisation": "8bit"}
    backbone = load_backbone(str(bases["llama"]), **load, lora=LORA)
    one_step(backbone, tmp_path / "run")
    trained = scores(backbone)
    backbone.save(tmp_path / "saved")
    loaded = load_backbone(str(tmp_path / "saved"), device="cpu", dtype="float32")
    assert scores(loaded) == pytest.approx(trained, abs=1e-5)
    assert scores(loaded.merged()) == pytest.approx(trained, abs=0.5)


def test_a_quantised_model_without_adapter_is_saved_and_loaded(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    needs_bitsandbytes()
    base = load_backbone(str(bases["llama"]), device="cpu", dtype="float32", quantisation="4bit")
    base.save(tmp_path / "packed")
    loaded = load_backbone(str(tmp_path / "packed"), device="cpu", dtype="float32")
    assert loaded.quantised
    assert np.array_equal(scores(loaded), scores(base))
    packed = scores(base)
    assert scores(base.merged()) == pytest.approx(packed, abs=1e-4)
    assert base.quantised
    assert np.array_equal(scores(base), packed)


def test_whole_modules_are_merged_over_a_quantised_base_and_dora_is_refused(bases: dict[str, Path]) -> None:
    needs_bitsandbytes()
    from peft import LoraConfig, get_peft_model

    for changes in ({"modules_to_save": ["lm_head"]}, {"use_dora": True}):
        base = load_backbone(str(bases["llama"]), device="cpu", dtype="float32", quantisation="4bit")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(base.model, LoraConfig(**(PLAIN | changes))).eval()
        torch.manual_seed(0)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn(p.shape))
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        backbone = Backbone(model, base.tokenizer, "x", base.origin)
        if "use_dora" in changes:
            with pytest.raises(UserError, match="NotImplementedError: only plain LoRA is folded into a quan"):
                backbone.merged()
            continue
        assert scores(backbone.merged()) == pytest.approx(scores(backbone), abs=1e-4)
        assert trained == {name for name, p in model.named_parameters() if p.requires_grad}


def test_evaluation_leaves_a_quantised_base_as_it_is(bases: dict[str, Path]) -> None:
    """bitsandbytes repacks 4-bit layers in bfloat16 at a forward in evaluation mode, on some CPUs."""
    needs_bitsandbytes()
    backbone = load_backbone(str(bases["llama"]), device="cpu", dtype="float32", quantisation="4bit")
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    scores(backbone)
    after = backbone.model.state_dict()
    assert all(tensor.equal(after[name]) for name, tensor in before.items())


def test_missing_bitsandbytes_is_one_line(bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "bitsandbytes":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        UserError, match=r"'4bit' needs the bitsandbytes package; run: pip install 'triewise\[quant\]'"
    ):
        load_backbone(str(bases["llama"]), device="cpu", quantisation="4bit")
    with pytest.raises(UserError, match="wanted quantisation none, 8bit or 4bit, got '2bit'"):
        load_backbone(str(bases["llama"]), device="cpu", quantisation="2bit")


# --- training ---------------------------------------------------------------------------------------------------------


def test_a_resumed_adapter_ends_with_the_weights_of_an_uninterrupted_one(tmp_path: Path) -> None:
    from safetensors import safe_open

    def run(out: Path, resume: bool = False, **changes: Any) -> dict[str, Tensor]:
        base = by_hand("llama")
        lora = LORA.model_copy(update={"dropout": 0.2})
        made = recommender(Backbone(add_lora(base.model, lora, 0), base.tokenizer, "x", {}))
        windows = make_windows(worlds.split([[0, 1], [2], [3]], [2, 5, 7]), "every", made.prompts)
        gain = zero_gain(made.trie, target_counts(windows, 9))
        examples = Examples(windows, made.prompts, made.trie, None, gain)
        config = TrainingSettings(steps=4, learning_rate=0.01, batch_size=4, warmup_steps=1, **changes)
        train(made.backbone.model, examples, Objective(), config, out, resume=resume)
        return {name: p.detach() for name, p in made.backbone.model.named_parameters() if p.requires_grad}

    whole = run(tmp_path / "whole")
    run(tmp_path / "halves", time_limit_s=1e-9)
    with safe_open(tmp_path / "halves" / "checkpoint-1" / "weights.safetensors", "pt") as file:
        assert set(file.keys()) == set(whole), "a checkpoint holds the adapter only"
    halves = run(tmp_path / "halves", resume=True)
    assert all(weight.equal(halves[name]) for name, weight in whole.items())


# --- recommenders -----------------------------------------------------------------------------------------------------


class TestARecommenderWithAnAdapter(RecommenderContract):
    @staticmethod
    def make() -> GenerativeRecommender:
        backbone, _ = adapted("llama")
        with torch.no_grad():
            for name, parameter in backbone.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        return recommender(backbone, batch_users=3)


@pytest.fixture(scope="module")
def saved(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two trained recommenders with an adapter: over a base that only exists here, and over a folder."""
    out = tmp_path_factory.mktemp("recommenders")
    backbones = {
        "own": adapted("qwen2")[0],
        "folder": load_backbone(str(bases["llama"]), device="cpu", dtype="float32", lora=LORA),
    }
    made = {}
    for name, backbone in backbones.items():
        one_step(backbone, out / f"{name}-training")
        made[name] = recommender(backbone)
        made[name].save_pretrained(out / name)
    return {"out": out, **made}


def test_moved_and_loaded_in_a_fresh_process_they_rank_the_same(
    saved: dict[str, Any], tmp_path: Path
) -> None:
    shutil.copytree(saved["out"], tmp_path / "elsewhere")
    code = (
        "import json, torch, triewise; torch.set_num_threads(1)\n"
        f"found = [triewise.load(name).recommend({HISTORIES}, k=5) for name in ('own', 'folder')]\n"
        "print(json.dumps([[r.items.tolist(), r.scores.tolist()] for r in found]))"
    )
    call = [sys.executable, "-c", code]
    done = subprocess.run(call, capture_output=True, text=True, check=True, cwd=tmp_path / "elsewhere")
    assert done.stderr == "", "the libraries below have nothing to say to a user"
    for name, (items, found) in zip(("own", "folder"), json.loads(done.stdout), strict=True):
        wanted = saved[name].recommend(HISTORIES, k=5)
        assert items == wanted.items.tolist()
        assert np.array(found) == pytest.approx(wanted.scores, abs=1e-6)


def test_an_adapter_folder_is_an_ordinary_one_that_names_its_base(
    saved: dict[str, Any], bases: dict[str, Path]
) -> None:
    model = saved["out"] / "folder" / "model"
    config = read_json(model / "adapter_config.json")
    assert config["base_model_name_or_path"] == str(bases["llama"])
    assert config["target_modules"] == sorted(config["target_modules"])
    assert not (model / "base").exists()
    origin = read_json(saved["out"] / "folder" / "recommender.json")["origin"]
    assert origin["place"] == str(bases["llama"].resolve())
    assert set(origin["sha256"]) == {"model.safetensors"}
    assert origin["lora"]["rank"] == 4
    assert (saved["out"] / "own" / "model" / "base" / "model.safetensors").is_file()


def test_saved_again_it_is_the_same(saved: dict[str, Any], tmp_path: Path) -> None:
    for name in ("own", "folder"):
        loaded = triewise.load(saved["out"] / name, device="cpu")
        loaded.save_pretrained(tmp_path / name)
        again = triewise.load(tmp_path / name, device="cpu")
        wanted = saved[name].recommend(HISTORIES, k=9).scores
        assert again.recommend(HISTORIES, k=9).scores == pytest.approx(wanted, abs=1e-6)
        merged = loaded.merged()
        merged.save_pretrained(tmp_path / f"{name}-merged")
        whole = triewise.load(tmp_path / f"{name}-merged", device="cpu")
        assert not whole.backbone.adapted
        assert whole.recommend(HISTORIES, k=9).scores == pytest.approx(wanted, abs=1e-4)


def test_a_base_that_moved_is_given_and_another_one_is_refused(
    bases: dict[str, Path], saved: dict[str, Any], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(bases["llama"], base)
    backbone = load_backbone(str(base), device="cpu", dtype="float32", lora=LORA)
    recommender(backbone).save_pretrained(tmp_path / "run")
    wanted = recommender(backbone).recommend([[0]], k=9).scores
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(
        UserError, match="wanted '.*base', the base model of the adapter in .*; give its folder as base"
    ):
        triewise.load(tmp_path / "run")
    found = triewise.load(tmp_path / "run", device="cpu", base=tmp_path / "elsewhere")
    assert np.array_equal(found.recommend([[0]], k=9).scores, wanted)
    with pytest.raises(UserError, match="is not the one it was trained on .* has another sha256"):
        triewise.load(tmp_path / "run", device="cpu", base=bases["gpt2"])
    own = tmp_path / "own"
    shutil.copytree(saved["out"] / "own", own)
    other = by_hand("qwen2")
    with torch.no_grad():
        next(other.model.parameters()).add_(1)
    other.model.save_pretrained(own / "model" / "base")
    sealed_again(own)
    with pytest.raises(UserError, match="is not the one it was trained on .* has another sha256"):
        triewise.load(own, device="cpu")


def test_an_adapter_that_does_not_fit_or_is_not_whole_is_one_line(
    saved: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(saved["out"] / "folder", folder)
    facts = read_json(folder / "model" / "base.json")
    facts["origin"]["sha256"] = {}
    (folder / "model" / "base.json").write_text(json.dumps(facts), encoding="utf-8")
    sealed_again(folder)
    wide = tmp_path / "wide"
    Backbone(
        tiny_model("llama", vocabulary=300, num_key_value_heads=2), by_hand("llama").tokenizer, "w", {}
    ).save(wide)
    with pytest.raises(UserError, match="does not fit its base model .*; give the one it was trained on"):
        triewise.load(folder, device="cpu", base=wide)
    (folder / "model" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="wanted .*adapter_model.safetensors, which is missing"):
        triewise.load(folder, device="cpu")
    sealed_again(folder)
    with pytest.raises(UserError, match="wanted adapter_model.safetensors in .*, which is missing"):
        triewise.load(folder, device="cpu")
    with pytest.raises(UserError, match="wanted quantisation 'none', which the adapter in .* got '4bit'"):
        load_backbone(str(saved["out"] / "own" / "model"), device="cpu", quantisation="4bit")


def test_another_tokenizer_or_trie_version_is_one_line(saved: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(saved["out"] / "own", folder)
    worlds.backbone(worlds.TITLES[:3]).tokenizer.save_pretrained(folder / "model")
    sealed_again(folder)
    with pytest.raises(UserError, match="the prompt of .* is not the one this model was trained with"):
        triewise.load(folder, device="cpu")
    folder = tmp_path / "trie"
    shutil.copytree(saved["out"] / "own", folder)
    with np.load(folder / "trie.npz") as arrays:
        parts = dict(arrays)
    name = next(key for key in parts if "format" in key or "version" in key)
    np.savez(folder / "trie.npz", **(parts | {name: parts[name] + 1}))
    sealed_again(folder)
    with pytest.raises(UserError, match=r"wanted a trie of format 1 in .*, got format 2; build it again"):
        triewise.load(folder, device="cpu")


# --- recipes ----------------------------------------------------------------------------------------------------------


def recipe(raw: Path, name: str, **sections: dict) -> Any:
    tiny = {"vocabulary": 300, "width": 64, "layers": 2, "heads": 2, "feed_forward": 64}
    values = {
        "name": name,
        "data": {"source": f"msl:{raw}", "folder": str(raw.parent / "prepared"), "max_history": 4},
        "backbone": {"tiny": tiny, "dtype": "float32", "lora": {"rank": 4}},
        "training": {
            "supervision": "every",
            "steps": 3,
            "batch_size": 4,
            "learning_rate": 1e-2,
            "evaluate_every": 2,
        },
        "evaluation": {"users": 5},
    }
    for section, changes in sections.items():
        values[section] = values.get(section, {}) | changes
    return parse_recipe(values, "test")


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return worlds.write_msl_folder(tmp_path_factory.mktemp("raw") / "office", n_users=6)


@pytest.mark.parametrize("quantisation", ["none", "4bit"])
def test_a_recipe_trains_saves_and_evaluates_an_adapter(quantisation: str, raw: Path, tmp_path: Path) -> None:
    if quantisation != "none":
        needs_bitsandbytes()
    backbone = recipe(raw, "x").backbone.model_dump() | {"quantisation": quantisation}
    made, run = recipe(raw, "lora", backbone=backbone), tmp_path / "run"
    train_run(made, run)
    facts = read_json(run / "run.json")
    assert 0 < facts["trained_parameters"] < facts["parameters"] / 4
    assert facts["origin"]["lora"]["rank"] == 4
    assert facts["origin"].get("quantisation", "none") == quantisation
    metrics = {}
    for merge in (None, True, False):
        settings = made.evaluation.model_copy(update={"merge_adapter": merge})
        evaluation = evaluate_run(run, settings)
        metrics[merge] = evaluation.metrics["adapter"]
        if merge is None:
            first = evaluation.scores
        assert evaluation.scores == pytest.approx(first, abs=1e-4)
    default = "merged" if quantisation == "none" else "separate"
    assert metrics == {None: default, True: "merged", False: "separate"}
    assert load(run).backbone.adapted == (quantisation == "4bit")


@pytest.mark.parametrize("name", ["msl-llama3-8b", "msl-llama3-8b-lml", "igd-llama3-8b", "igd-qwen2.5-1.5b"])
def test_recipes_of_the_papers_run_with_a_small_model(
    name: str, raw: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    paper = load_recipe(f"papers/{name}")
    if paper.backbone.quantisation != "none":
        needs_bitsandbytes()
    rows = paper.training.sample or 49_133
    epochs = 10 if name.startswith("msl") else 3
    assert paper.training.steps == math.ceil(rows * epochs / paper.training.batch_size)
    changes = {
        "data": {"source": f"msl:{raw}", "folder": raw.parent / "prepared", "max_history": 4},
        "backbone": {"name": bases["llama"], "dtype": "float32", "max_tokens": 1500},
        "training": {"steps": 1, "batch_size": 2, "accumulation": 1, "evaluate_every": 0, "patience": 0},
        "evaluation": {"users": 2},
    }
    if (
        paper.objective.adaptive.rows == "root"
    ):  # the small tokenizer keeps the quote apart: its root has one child
        changes["objective"] = {"adaptive.rows": "widest"}
    text = [f"{section}.{key}={value}" for section, keys in changes.items() for key, value in keys.items()]
    small = load_recipe(f"papers/{name}", text)
    train_run(small, tmp_path / "run")
    origin = read_json(tmp_path / "run" / "recommender.json")["origin"]
    assert origin.get("quantisation", "none") == paper.backbone.quantisation
    assert ("lora" in origin) == (paper.backbone.lora.rank > 0)
    assert evaluate_run(tmp_path / "run").metrics["n_users"] == 2


def test_what_a_recipe_may_not_ask_for(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="a quantised base is frozen: wanted lora.rank > 0 to train, got 0"
    ) as error:
        recipe(raw, "x", backbone={"quantisation": "8bit", "lora": {"rank": 0}})
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="did you mean 'backbone.quantisation'"):
        recipe(raw, "x", backbone={"quantization": "8bit"})
    with pytest.raises(UserError, match="backbone.lora.targets"):
        recipe(raw, "x", backbone={"lora": {"rank": 4, "targets": "q_proj"}})
    backbone, _ = adapted("qwen2")
    backbone.save(tmp_path / "adapter")
    frozen = {"name": str(tmp_path / "adapter"), "template": "plain", "lora": {"rank": 0}}
    with pytest.raises(
        UserError, match="wanted a model with something to train, got .*adapter', which is frozen"
    ):
        train_run(recipe(raw, "x", backbone=frozen), tmp_path / "run")


# --- a pre-trained model ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("quantisation", ["none", "4bit"])
def test_one_step_of_smollm2_saved_loaded_merged(quantisation: str, tmp_path: Path) -> None:
    if quantisation != "none":
        needs_bitsandbytes()
    if not (cache_folder() / "models" / "smollm2-135m-q4").is_dir():
        pytest.skip("the weights of smollm2-135m-q4 are not in the cache; load that backbone once")
    lora = LoraSettings(rank=8, alpha=16, dropout=0.05, targets=("q_proj", "v_proj"))  # MSL's
    load = {"device": "cpu", "dtype": "float32", "quantisation": quantisation}
    backbone = load_backbone("smollm2-135m-q4", **load, lora=lora)
    plain = scores(backbone)
    one_step(backbone, tmp_path / "training", batch_size=2, learning_rate=1e-3)
    trained = scores(backbone)
    assert np.abs(trained - plain).max() > 1e-2
    recommender(backbone).save_pretrained(tmp_path / "run")
    assert not (tmp_path / "run" / "model" / "base").exists()
    loaded = triewise.load(tmp_path / "run", device="cpu", dtype="float32")
    assert loaded.backbone.quantised == (quantisation == "4bit")
    assert scores(loaded.backbone) == pytest.approx(trained, abs=1e-4)
    assert scores(loaded.merged().backbone) == pytest.approx(trained, abs=1e-4)
