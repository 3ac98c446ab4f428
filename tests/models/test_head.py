"""The head by hand: what the config says and the model does, in float32 and half precision, in value and gradient."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.model_families import build
from tests.tiny_models import tiny_model
from triewise.models import Head, body, hand_head, head, head_weight

IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 1]])
DTYPES = ["float32", "bfloat16", "float16"]


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize(
    ("family", "wanted"),
    [
        ("llama", Head()),
        ("opt", Head()),  # its forward leaves the body out and calls what is inside
        ("llama4_text", Head()),  # its body has another name than it says
        ("gemma2", Head(cap=5.0)),
        ("recurrent_gemma", Head(cap=5.0)),
        ("cohere", Head(factor=0.25)),
        ("granite", Head(factor=0.25)),
        ("minicpm3", Head(factor=8.0)),
        ("bert_decoder", None),
    ],
)
def test_heads_of_families(family: str, wanted: Head | None, dtype: str) -> None:
    model = build(family).to(getattr(torch, dtype))
    assert hand_head(model) == wanted
    assert not any(m._forward_pre_hooks for m in model.modules())


class Changed(nn.Module):
    """A head that does something to its logits of which no config speaks."""

    def __init__(self, linear: nn.Linear, change: Any) -> None:
        super().__init__()
        self.weight, self.change = linear.weight, change

    def forward(self, hidden: Tensor) -> Tensor:
        return self.change(hidden @ self.weight.T)  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "change",
    [
        lambda z: z * 1.05,
        lambda z: z + 0.2 * torch.arange(z.shape[-1]).cos().to(z.dtype),
        lambda z: 100 * (z / 100).tanh(),  # the text of a probe reaches 10
        lambda z: z.roll(1, -1),
    ],
    ids=["factor", "bias", "cap", "moved"],
)
def test_what_no_config_says_is_measured(change: Any, dtype: str) -> None:
    model = tiny_model().to(getattr(torch, dtype))
    assert hand_head(model) == Head()
    model.lm_head = Changed(model.lm_head, change)
    assert hand_head(model) is None


def test_a_factor_may_be_meant_either_way_and_a_number_that_is_not_used_is_not() -> None:
    model = tiny_model("granite")
    model.config.logit_scale = 3.0
    assert hand_head(model) == Head(factor=0.25)
    model.lm_head = Changed(model.lm_head, lambda z: z * 16)  # 4 times, where the config says 4
    assert hand_head(model) == Head(factor=4.0)


@pytest.mark.parametrize("tokens", [None, torch.tensor([2, 5, 11, 29])])
@pytest.mark.parametrize("kind", ["qwen2", "gemma2", "granite"])
def test_logits_and_gradients_are_the_models_own(kind: str, tokens: Tensor | None) -> None:
    model = tiny_model(kind, **({"final_logit_softcapping": 2.0} if kind == "gemma2" else {}))
    made = hand_head(model)
    assert made is not None
    found = []
    for logits in (
        made.logits(model, body(model)(input_ids=IDS).last_hidden_state, tokens),
        model(input_ids=IDS).logits[..., slice(None) if tokens is None else tokens],
    ):
        gradients = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        found.append([logits.detach(), *gradients])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("form", [Head(), Head(0.25, 20.0)])
def test_scores_of_half_precision_are_those_of_float64(
    form: Head, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of the rounded numbers, unrounded themselves; sums over the vocabulary in blocks as in one."""
    model = tiny_model("gpt2", vocabulary=300).to(getattr(torch, dtype))
    model.lm_head.bias = nn.Parameter(torch.randn(300).to(model.dtype))
    hidden = torch.randn(7, 32).to(model.dtype)
    with torch.inference_mode():
        exact = hidden.double() @ head_weight(model).double().T + model.lm_head.bias.double()
        exact *= form.factor
        if form.cap is not None:
            exact = (exact / form.cap).tanh() * form.cap
        tokens = torch.tensor([3, 250, 9])
        scores = form.scores(model, hidden, tokens)
        assert scores.dtype == torch.float32
        assert (
            (scores - exact[:, tokens]).abs().max() < 1e-5 < (form.logits(model, hidden) - exact).abs().max()
        )
        for block in (1 << 21, 1000):
            monkeypatch.setattr(head, "CAST_BLOCK", block)
            assert (form.log_totals(model, hidden) - exact.logsumexp(1)).abs().max() < 1e-5


def test_float32_is_one_product_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, hidden = tiny_model(vocabulary=300), torch.randn(7, 32)
    whole = nn.functional.linear(hidden, head_weight(model))
    assert Head().scores(model, hidden).equal(whole)
    assert Head().log_totals(model, hidden).equal(whole.logsumexp(1))
    monkeypatch.setattr(head, "LOGIT_BLOCK", 700)
    torch.testing.assert_close(Head().log_totals(model, hidden), whole.logsumexp(1))


def test_a_body_that_gives_float32_whatever_it_is_in() -> None:
    model = build("mamba").bfloat16()
    made, hidden = hand_head(model), body(model)(input_ids=IDS, use_cache=False).last_hidden_state
    assert made is not None and hidden.dtype == torch.float32
    logits = made.logits(model, hidden)
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - model(input_ids=IDS).logits).abs().max() < 1e-6


def test_another_thread_that_uses_the_model_sees_nothing_of_the_measurement() -> None:
    model, here, found = tiny_model("gpt2"), threading.get_ident(), []
    with torch.no_grad():
        wanted = model(IDS).logits

    def use_it_elsewhere(*_: Any) -> None:
        if threading.get_ident() == here:
            thread = threading.Thread(target=lambda: found.append(model(IDS).logits.detach()))
            thread.start()
            thread.join()

    model.get_output_embeddings().register_forward_pre_hook(use_it_elsewhere)
    assert hand_head(model) == Head()
    assert len(found) == 2  # as it is, and loud
    assert all(torch.equal(logits, wanted) for logits in found)
