"""S-DPO: the loss, its rejected titles, the reference, the module, and runs with it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.reference.losses import plain_sdpo
from trierec.preferences import sdpo_loss


def sums(n_rows: int, n: int, seed: int = 0, scale: float = 3.0) -> list[Tensor]:
    """Log-probabilities of chosen and rejected titles under model and reference."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(n_rows,), (n_rows,), (n_rows, n), (n_rows, n)]
    return [(-scale * torch.rand(shape, generator=generator)).requires_grad_() for shape in shapes]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 99), st.sampled_from([0.1, 0.3, 1.0, 4.0]))
def test_equals_a_loop_in_value_and_gradient(n_rows: int, n: int, seed: int, beta: float) -> None:
    values = sums(n_rows, n, seed)
    ours, slow = sdpo_loss(*values, beta), torch.stack(plain_sdpo(*values, beta)).float()
    torch.testing.assert_close(ours, slow)
    found, expected = (torch.autograd.grad(loss.sum(), values) for loss in (ours, slow))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_worked_number() -> None:
    ones, zero = torch.ones(1), torch.zeros(1)
    rejected = torch.tensor([[-1.0, 0.5, 0.2]])
    assert sdpo_loss(ones, zero, rejected, torch.zeros(1, 3), 1.0).item() == pytest.approx(0.7844, abs=5e-5)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_one_rejected_title_is_dpo(beta: float) -> None:
    theta_w, ref_w, theta_d, ref_d = sums(7, 1)
    margin = (theta_w - ref_w) - (theta_d - ref_d)[:, 0]
    dpo = -torch.nn.functional.logsigmoid(beta * margin)
    torch.testing.assert_close(sdpo_loss(theta_w, ref_w, theta_d, ref_d, beta), dpo)


def test_the_reference_itself_costs_log_of_one_more_than_the_rejected() -> None:
    theta_w, _, theta_d, _ = sums(3, 4)
    loss = sdpo_loss(theta_w, theta_w, theta_d, theta_d, 1.0)
    torch.testing.assert_close(loss, torch.full((3,), math.log(5)))


@pytest.mark.parametrize("margin", [-5e3, 5e3])
def test_far_apart_sums_stay_finite(margin: float) -> None:
    """The authors' exp overflows here."""
    zeros, theta = torch.zeros(1, 3), torch.tensor([margin], requires_grad=True)
    loss = sdpo_loss(theta, torch.zeros(1), zeros, zeros, 1.0)
    assert loss.item() == pytest.approx(max(-margin + math.log(3), 0.0))
    (gradient,) = torch.autograd.grad(loss.sum(), theta)
    assert gradient.item() == pytest.approx(-1.0 if margin < 0 else 0.0, abs=1e-4)
