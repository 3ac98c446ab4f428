"""The judgement on a fast path: what the config says, and what a measurement says in each precision."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.model_families import build, quiet
from tests.tiny_models import tiny_model
from triewise.decoding import TrieEngine
from triewise.models import Measured, own_mask, place_limit, refusal, shortest_window
from triewise.models.lengths import unknown_window
from triewise.models.probe import FAULTS, faulty_forwards
from triewise.tokens import Trie
from triewise.training.packing import packing_works

STATES = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
TITLES = [[2 + i % 5, 7 + i % 7, 14 + i % 9, 3 + i % 11, 0] for i in range(40)]
TOKENS = np.arange(3, 28)


def measured(
    dtype: str, fast: Tensor, rounding: float = 0.0, faulty: float = 10.0, seen: int = 4
) -> Measured:
    """States of a fast path, with so much rounding and faults so far off, of which some are seen."""
    kind = getattr(torch, dtype)
    spoilt = {
        name: (STATES * (1 + faulty * (place < seen))).to(kind) for place, name in enumerate(sorted(FAULTS))
    }
    return Measured(STATES.to(kind), (STATES * (1 + rounding)).to(kind), fast.to(kind), spoilt)


@pytest.mark.parametrize(
    ("dtype", "off", "rounding", "wanted"),
    [
        ("float32", 0.0, 0.0, None),
        ("float32", 1e-6, 1e-6, None),
        ("float32", 1e-3, 1e-6, "states are off by"),
        ("float64", 1e-3, 1e-6, "states are off by"),
        ("bfloat16", 0.0, 0.0, None),
        ("bfloat16", 0.05, 0.03, None),
        ("bfloat16", 0.5, 0.03, "states are off by"),
        ("float32", np.nan, 1e-6, "states are off by nan"),
        ("float32", 0.0, np.nan, "states are off by 0 nats, rounding by nan"),
    ],
)
def test_a_fast_path_is_judged_by_the_rounding_of_plain_forwards(
    dtype: str, off: float, rounding: float, wanted: str | None
) -> None:
    found = measured(dtype, STATES * (1 + off), rounding)
    said = refusal(tiny_model().to(getattr(torch, dtype)), measure=lambda seed: found)
    assert (said is None) if wanted is None else (said is not None and said.startswith(wanted)), said


def test_one_state_in_three_may_have_another_expert() -> None:
    """In half precision a router near a tie decides otherwise: a few states are far off, on either side."""
    flipped = STATES.clone()
    flipped[:, ::3] *= 3
    found = measured("bfloat16", flipped, rounding=0.01)
    assert refusal(tiny_model().bfloat16(), measure=lambda seed: found) is None


def test_a_measurement_that_cannot_see_faults_counts_for_nothing() -> None:
    blind = measured("bfloat16", STATES, rounding=0.5, faulty=0.6)
    said = refusal(tiny_model().bfloat16(), measure=lambda seed: blind)
    assert said is not None and said.startswith("faults made on purpose cannot be told from its rounding of")
    # What a model is deaf to, such as positions where it has none, it may be deaf to.
    assert refusal(tiny_model(), measure=lambda seed: measured("float32", STATES, 1e-6, seen=2)) is None
    assert refusal(tiny_model(), measure=lambda seed: measured("float32", STATES, 1e-6, seen=1)) is not None


def test_another_text_may_show_what_the_first_does_not() -> None:
    tried = []

    def measure(seed: int) -> Measured:
        tried.append(seed)
        return measured("float32", STATES, 1e-6, seen=4 if seed == 1 else 0)

    assert refusal(tiny_model(), measure=measure) is None
    assert tried == [0, 1]


def test_a_model_is_measured_in_evaluation_mode_and_left_as_it_was() -> None:
    model = tiny_model().train()

    def measure(seed: int) -> Measured:
        assert not model.training
        raise RuntimeError("no cache")

    assert refusal(model, measure=measure) == "it does not take our cache or mask (RuntimeError)"
    assert model.training


# --- models that do not do as they are told --------------------------------------------------------------------------


def _without_mask(model: Any, given: dict[str, Any], sees: Tensor) -> None:
    del given["attention_mask"]


def _one_further(model: Any, given: dict[str, Any], sees: Tensor) -> None:
    given["position_ids"] = given["position_ids"] + 1


def _last_twelve(model: Any, given: dict[str, Any], sees: Tensor) -> None:
    """A window that counts places, as GPT-Neo's."""
    n_queries, n_keys = sees.shape[2:]
    far = torch.ones(n_queries, n_keys, dtype=torch.bool).tril(n_keys - n_queries - 12)
    given["attention_mask"] = own_mask(model, sees & ~far)


def _a_sibling(model: Any, given: dict[str, Any], sees: Tensor) -> None:
    """Each token sees the four newest before it that are none of its own."""
    sees, offset = sees.clone(), sees.shape[3] - sees.shape[2]
    for b, q in np.ndindex(len(sees), sees.shape[2]):
        hidden = np.flatnonzero(~sees[b, 0, q, : offset + q].numpy())
        sees[b, 0, q, hidden[-4:]] = True
    given["attention_mask"] = own_mask(model, sees)


Spoil = Callable[[Any, dict[str, Any], Tensor], None]


def sabotaged(model: Any, spoil: Spoil, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model, which in forwards with a mask of our own does something else than it is told."""
    inner = model.base_model.forward

    def forward(*ids: Any, **given: Any) -> Any:
        mask = given.get("attention_mask")
        if mask is not None and mask.dim() == 4:
            spoil(model, given, mask if mask.dtype == torch.bool else mask == 0)
        return inner(*ids, **given)

    monkeypatch.setattr(model.base_model, "forward", forward)
    return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spoil", [_without_mask, _one_further, _last_twelve, _a_sibling])
@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_a_model_that_does_something_else_is_noticed(
    kind: str, spoil: Spoil, dtype: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, trie = tiny_model(kind).to(getattr(torch, dtype)), Trie.from_sequences(TITLES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert TrieEngine(model, trie).tree_cache_works
    assert packing_works(model, TOKENS, 60) and not capsys.readouterr().err
    sabotaged(model, spoil, monkeypatch)
    with pytest.warns(
        UserWarning, match="hidden states through the tree mask are off by .* nats, rounding by"
    ):
        assert not TrieEngine(model, trie).tree_cache_works
    assert not packing_works(model, TOKENS, 60)
    assert "hidden states of packed rows are off by" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3_moe", "deepseek_v2"])
def test_rounding_that_depends_on_who_else_is_in_a_forward_is_no_leak(name: str, dtype: str) -> None:
    """As of experts on a GPU, whose matrix products round by how many tokens come together."""
    with quiet():
        model = build(name).to(getattr(torch, dtype))
    eps = torch.finfo(getattr(torch, dtype)).eps

    def otherwise(module: Any, given: tuple[Tensor, ...], made: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(int(given[0].double().abs().sum() * 1e6) % 2**31)
        noise = torch.randn(made.shape, generator=generator) * eps / 2
        return (made.float() * (1 + noise)).to(made.dtype)

    for layer in model.model.layers:
        layer.mlp.register_forward_hook(otherwise)
    assert TrieEngine(model, Trie.from_sequences(TITLES)).tree_cache_works
    assert packing_works(model, TOKENS, 60)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_only_long_prompts_show_is_noticed_where_prompts_are_long(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each power of two is tried once; what holds for short prompts is not undone."""

    def far(model: Any, given: dict[str, Any], sees: Tensor) -> None:
        nth = sees.cumsum(-1)  # the last 80 tokens of a path are seen
        given["attention_mask"] = own_mask(model, sees & (nth > nth[..., -1:] - 80))

    model = sabotaged(tiny_model().to(getattr(torch, dtype)), far, monkeypatch)
    engine = TrieEngine(model, Trie.from_sequences(TITLES))
    short, long = [[5, 6, 7]], [(list(range(2, 27)) * 9)[:200]]
    assert engine.fits_tree(short)
    with pytest.warns(UserWarning, match="through the tree mask are off by"):
        assert not engine.fits_tree(long)
    tried = []
    monkeypatch.setattr("triewise.decoding.engine.measured", lambda *size: tried.append(size))
    assert engine.fits_tree(short) and not engine.fits_tree([long[0] + long[0][:50]])
    assert not tried


def test_a_fault_is_made_in_one_thread_only() -> None:
    model, ids = tiny_model(), torch.tensor([[3, 4, 5]])
    mask = own_mask(model, torch.ones(3, 3, dtype=torch.bool).tril()[None, None])
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": torch.arange(3)[None]}
    seen: list[Tensor] = []

    @torch.inference_mode()
    def run() -> None:
        seen.append(model.base_model(**given, use_cache=False).last_hidden_state)

    run()
    with faulty_forwards(model, "the older half of a path out of sight"):
        run()
        other = threading.Thread(target=run)
        other.start()
        other.join()
    run()
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[0], seen[3])
    assert not torch.equal(seen[0], seen[1])


# --- what the config says --------------------------------------------------------------------------------------------


def test_what_the_config_says() -> None:
    model = tiny_model("gemma3", sliding_window=16)
    assert refusal(model, longest=16) is None
    assert refusal(model, longest=17) == (
        "its attention window of 16 tokens is shorter than the longest path of 17"
    )
    model.config.layer_types[0] = "linear_attention"
    assert refusal(model) == "it has layers that are not attention"
    model.config._attn_implementation = "flash_attention_2"
    assert refusal(model) == "its attention implementation takes no mask of our own"


@pytest.mark.parametrize("name", ["bloom", "mpt", "falcon_alibi"])
def test_alibi_is_read(name: str) -> None:
    with quiet():
        model = build(name)
    assert refusal(model) == "its attention is biased by distance in places (ALiBi)"
    with quiet():
        assert refusal(build("falcon_new")) is None


def test_a_window_of_another_name_is_trusted_up_to_its_length() -> None:
    model = tiny_model("llama")
    assert shortest_window(model) is None
    model.config.attention_window_size = [64, 48]
    model.config.num_local_experts = model.config.max_window_layers = 4
    assert shortest_window(model) == unknown_window(model) == 48
    assert place_limit(model) is None  # it does not count places: nothing is cut
    assert refusal(model, longest=48, places=10_000, room=place_limit(model)) is None
    assert "attention window of 48 tokens is shorter" in str(refusal(model, longest=49))
    model.config.layer_types = ["full_attention"] * 2
    assert shortest_window(model) is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_counts_places_is_tried(dtype: str) -> None:
    """GPT-Neo's window counts them, and its mask ends; GPT-BigCode keeps a mask that it does not use."""

    def made(name: str, **shape: Any) -> Any:
        with quiet():
            model = build(name)
            model = type(model)(type(model.config)(**{**model.config.to_dict(), **shape})) if shape else model
            return model.to(getattr(torch, dtype)).eval()

    neo = made("gpt_neo")
    assert place_limit(neo) == 96
    assert refusal(neo, longest=60, places=97, room=96) == (
        "its attention counts places up to 96, of which there may be 97"
    )
    everywhere = {"attention_types": [[["global"], 2]], "attention_layers": ["global"] * 2}
    assert place_limit(made("gpt_neo", **everywhere)) == 1024
    assert place_limit(made("gpt_bigcode")) is None
    assert place_limit(made("doge")) is None
    assert place_limit(tiny_model()) is None
