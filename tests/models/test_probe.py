"""The judgement on a fast path: what the config says, and what a measurement says."""

from __future__ import annotations

import pytest
import torch

from tests.tiny_models import tiny_model
from triewise.models import Measured, refusal

PLAIN = torch.tensor([[0.5, -2.0]])


@pytest.mark.parametrize(
    ("dtype", "fast", "leak", "wanted"),
    [
        ("float32", PLAIN, 0.0, None),
        ("float32", PLAIN + 1e-3, 1e-5, None),  # relative to 2
        ("float32", PLAIN + 0.02, 0.0, "numbers are off by 0.01"),
        ("float64", PLAIN + 0.02, 0.0, "numbers are off by 0.01"),
        ("bfloat16", PLAIN + 0.02, 0.0, None),
        ("bfloat16", PLAIN + 0.5, 0.0, "numbers are off by 0.25"),
        ("bfloat16", PLAIN, 0.01, "a branch changes another one by 0.01: its mask is not respected"),
        ("float32", PLAIN * torch.nan, 0.0, "numbers are off by nan"),
    ],
)
def test_a_fast_path_is_judged_by_what_it_gave(
    dtype: str, fast: torch.Tensor, leak: float, wanted: str | None
) -> None:
    model = tiny_model().to(getattr(torch, dtype))
    assert refusal(model, measure=lambda: Measured(PLAIN, fast, leak)) == wanted


def test_a_model_is_measured_in_evaluation_mode_and_left_as_it_was() -> None:
    model = tiny_model().train()

    def measure() -> Measured:
        assert not model.training
        raise RuntimeError("no cache")

    assert refusal(model, measure=measure) == "it does not take our cache or mask (RuntimeError)"
    assert model.training


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
