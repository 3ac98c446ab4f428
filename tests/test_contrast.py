"""CFT: the loss, the prompts without history, the module, and runs with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference.losses import dense_trie_nll, plain_cft
from tests.strategies import catalogues
from tests.test_losses import CLOSE, gradient, some_logits, tokens
from trierec.contrast import contrast_parts
from trierec.decisiveness import position_weights
from trierec.losses import Objective
from trierec.trie import Trie


@settings(max_examples=25, deadline=None)
@given(catalogues(), st.integers(0, 99), st.sampled_from([0.025, 0.1, 2.0]))
def test_equals_a_loop_in_value_and_both_gradients(
    sequences: list[list[int]], seed: int, strength: float
) -> None:
    trie = Trie.from_sequences(sequences)
    target, node, _ = tokens(trie)
    f, f_0, weight = (
        some_logits(len(target), seed),
        some_logits(len(target), seed + 1),
        torch.rand(len(target)),
    )
    parts = contrast_parts(Objective("vocabulary"), strength, f, f_0, target, node, trie, weight)
    ours = parts.loss.sum() / parts.contribution.sum()
    slow = plain_cft(f, f_0, target, weight.tolist(), strength).float()
    torch.testing.assert_close(ours, slow, **CLOSE)
    for logits in (f, f_0):
        (found,) = torch.autograd.grad(ours, logits, retain_graph=True)
        (expected,) = torch.autograd.grad(slow, logits, retain_graph=True)
        torch.testing.assert_close(found, expected, **CLOSE)
        assert found.abs().sum() > 0


@settings(max_examples=25, deadline=None)
@given(catalogues(), st.integers(0, 99))
def test_in_trie_support_the_effect_is_compared_among_valid_tokens(
    sequences: list[list[int]], seed: int
) -> None:
    trie = Trie.from_sequences(sequences)
    target, node, _ = tokens(trie)
    f, f_0 = some_logits(len(target), seed), some_logits(len(target), seed + 1)
    parts = contrast_parts(Objective("trie"), 0.3, f, f_0, target, node, trie)
    slow = dense_trie_nll(f, target, node, trie, 1.0) + 0.3 * dense_trie_nll(f - f_0, target, node, trie, 1.0)
    torch.testing.assert_close(parts.loss, slow, **CLOSE)
    torch.testing.assert_close(gradient(parts.loss.sum(), f_0), gradient(slow.sum(), f_0), **CLOSE)
    forced = torch.from_numpy(trie.n_children[node.numpy()] == 1)
    assert (parts.loss[forced] == 0).all()


def test_strength_zero_is_pos_and_log_probabilities_do_as_well() -> None:
    trie = Trie.from_sequences([[1, 2, 3, 0], [1, 4, 0]])
    target, node, _ = tokens(trie)
    f, f_0 = some_logits(len(target), 1), some_logits(len(target), 2)
    weight = torch.from_numpy(position_weights(np.array([4, 3]), 0.25))
    objective = Objective("vocabulary")
    none = contrast_parts(objective, 0.0, f, f_0, target, node, trie, weight)
    pos = objective.parts(f, target, node, trie, weight)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(none, pos, strict=True))
    some = contrast_parts(objective, 0.1, f, f_0, target, node, trie, weight)
    logs = contrast_parts(objective, 0.1, f.log_softmax(1), f_0.log_softmax(1), target, node, trie, weight)
    torch.testing.assert_close(logs.loss, some.loss, **CLOSE)
    assert torch.equal(some.contribution, pos.contribution) and torch.equal(some.nll, pos.nll)


def test_by_hand() -> None:
    """One token of two: f = (ln 3, 0), f_0 = (ln 2, 0): -ln 3/4 - 0.5 ln (3/2 / (3/2 + 1))."""
    f, f_0 = torch.tensor([[3.0, 1.0]]).log(), torch.tensor([[2.0, 1.0]]).log()
    trie, zero = Trie.from_sequences([[0], [1]]), torch.tensor([0])
    parts = contrast_parts(Objective("vocabulary"), 0.5, f, f_0, zero, zero, trie)
    assert parts.loss.item() == pytest.approx(-np.log(0.75) - 0.5 * np.log(0.6))


def test_large_logits_stay_finite() -> None:
    f, f_0 = torch.full((1, 5), 1e4), torch.full((1, 5), -1e4)
    trie, zero = Trie.from_sequences([[0], [1]]), torch.tensor([0])
    parts = contrast_parts(Objective("vocabulary"), 0.5, f.bfloat16(), f_0.bfloat16(), zero, zero, trie)
    assert parts.loss.item() == pytest.approx(1.5 * np.log(5), rel=1e-5)
