from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from tests.reference.losses import (
    dense_lml_parts,
    dense_trie_nll,
    expanded_nll,
    mean_probability,
    plain_ats,
    plain_exact_ats,
    plain_token_ats,
    weighted_mean,
)
from tests.strategies import catalogues
from triewise.errors import UserError
from triewise.models import head_rows
from triewise.tokens import Trie, binary_weights, linear_weights, position_weights
from triewise.training import AdaptiveTemperature, Objective, trie_nll, vocabulary_nll
from triewise.training.losses import gradient_weight, lml_parts, widest_node

V = 12
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def tokens(trie: Trie) -> tuple[Tensor, Tensor, np.ndarray[Any, Any]]:
    """Every token of every title: target, node before it, node after it."""
    before, offsets = trie.paths()
    after = np.append(before[1:], 0)
    after[offsets[1:] - 1] = trie.leaf
    target, node = trie.token[after].astype(np.int64), before.astype(np.int64)
    return torch.from_numpy(target), torch.from_numpy(node), after


def some_logits(n: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return (torch.randn(n, V, generator=torch.Generator().manual_seed(seed)) * scale).requires_grad_()


def gradient(loss: Tensor, logits: Tensor) -> Tensor:
    (result,) = torch.autograd.grad(loss, logits)
    return result


@settings(max_examples=40, deadline=None)
@given(catalogues(), st.floats(0.2, 6), st.integers(0, 99), st.sampled_from([0.1, 3.0, 90.0]))
def test_sparse_equals_dense_in_value_and_gradient(
    sequences: list[list[int]], tau: float, seed: int, scale: float
) -> None:
    trie = Trie.from_sequences(sequences)
    target, node, _ = tokens(trie)
    logits, weight = some_logits(len(target), seed, scale), torch.rand(len(target))
    sparse = trie_nll(logits, target, node, trie, tau)
    dense = dense_trie_nll(logits, target, node, trie, tau)
    torch.testing.assert_close(sparse, dense, **CLOSE)
    sparse_gradient = gradient((sparse * weight).sum(), logits)
    torch.testing.assert_close(sparse_gradient, gradient((dense * weight).sum(), logits), **CLOSE)
    known = int(trie.n_children[node.numpy()].sum())
    assert torch.equal(trie_nll(logits, target, node, trie.to("cpu"), tau, known), sparse)


@settings(max_examples=25, deadline=None)
@given(catalogues(), st.integers(0, 99), st.booleans(), st.booleans())
def test_forced_tokens_have_no_loss_and_no_gradient(
    sequences: list[list[int]], seed: int, expand: bool, own: bool
) -> None:
    trie = Trie.from_sequences(sequences)
    target, node, _ = tokens(trie)
    logits = some_logits(len(target), seed, 50.0)
    tau = torch.rand(len(target)) + 0.1 if own else 0.7
    nll = trie_nll(logits, target, node, trie, tau, expand_negatives=expand)
    forced = torch.from_numpy(trie.n_children[node.numpy()] == 1)
    assert (nll[forced] == 0).all()
    assert (gradient(nll.sum(), logits)[forced] == 0).all()
    assert (nll >= 0).all()


@settings(max_examples=25, deadline=None)
@given(catalogues(), st.integers(0, 99))
def test_masked_loss_plus_mass_outside_is_the_language_modelling_loss(
    sequences: list[list[int]], seed: int
) -> None:
    trie = Trie.from_sequences(sequences)
    target, node, _ = tokens(trie)
    logits = some_logits(len(target), seed).detach()
    masked, full = trie_nll(logits, target, node, trie), vocabulary_nll(logits, target)
    outside = [
        -math.log(logits[row].softmax(0)[trie.children(n)[0].tolist()].sum())
        for row, n in enumerate(node.tolist())
    ]
    torch.testing.assert_close(masked + torch.tensor(outside), full, **CLOSE)
    assert (masked <= full + 1e-5).all()


@settings(max_examples=25, deadline=None)
@given(catalogues(), st.integers(0, 99))
def test_both_parts_of_the_language_modelling_loss(sequences: list[list[int]], seed: int) -> None:
    """Their sum is the loss on every token; the second one is MSL at temperature 1."""
    trie = Trie.from_sequences(sequences)
    target, node, _ = tokens(trie)
    logits = some_logits(len(target), seed)
    parts = lml_parts(logits, target, node, trie)
    for i, slow in enumerate(dense_lml_parts(logits, target, node, trie)):
        torch.testing.assert_close(parts[i], slow.float(), **CLOSE)
        ours = gradient(lml_parts(logits, target, node, trie)[i].sum(), logits)
        theirs = gradient(dense_lml_parts(logits, target, node, trie)[i].sum(), logits)
        torch.testing.assert_close(ours, theirs, **CLOSE)
    torch.testing.assert_close(sum(parts), vocabulary_nll(logits, target), **CLOSE)
    assert torch.equal(parts.choice, trie_nll(logits, target, node, trie))
    assert (parts.invalid >= -1e-5).all()


@settings(max_examples=25, deadline=None)
@given(catalogues(), st.floats(0.5, 6), st.integers(0, 99))
def test_expanded_negatives_equal_a_loop_in_value_and_gradient(
    sequences: list[list[int]], tau: float, seed: int
) -> None:
    trie = Trie.from_sequences(sequences)
    target, node, _ = tokens(trie)
    logits, weight = some_logits(len(target), seed), torch.rand(len(target))
    ours = trie_nll(logits, target, node, trie, tau, expand_negatives=True)
    slow = expanded_nll(logits, target, node, trie, tau)
    torch.testing.assert_close(ours, slow.float(), **CLOSE)
    expected = gradient((slow * weight).sum(), logits)
    torch.testing.assert_close(gradient((ours * weight).sum(), logits), expected, **CLOSE)


def test_expanded_negatives_stay_finite_for_large_logits() -> None:
    trie, logits = Trie.from_sequences([[7, 2], [9, 2]]), torch.zeros(2, 10)
    logits[:, 7] = 1e4
    nll = trie_nll(logits, torch.tensor([7, 9]), torch.tensor([0, 0]), trie, expand_negatives=True)
    assert nll[0] == 0
    assert nll[1].item() == pytest.approx(1e4 + math.log(10 / 2), rel=1e-6)


@pytest.mark.parametrize("expand", [False, True])
@pytest.mark.parametrize("tau", [1.0, 2.5])
def test_with_every_token_valid_it_is_cross_entropy(tau: float, expand: bool) -> None:
    trie = Trie.from_sequences([[token, 0] for token in range(V)])
    target, node = torch.arange(V).repeat(3), torch.zeros(3 * V, dtype=torch.int64)
    logits = some_logits(3 * V)
    ours = trie_nll(logits, target, node, trie, tau, expand_negatives=expand)
    theirs = vocabulary_nll(logits, target, tau)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    torch.testing.assert_close(
        theirs, torch.nn.functional.cross_entropy(logits / tau, target, reduction="none")
    )
    torch.testing.assert_close(gradient(ours.sum(), logits), gradient(theirs.sum(), logits), **CLOSE)


def test_large_logits_and_half_precision_stay_finite() -> None:
    trie = Trie.from_sequences([[7, 2], [9, 2]])
    logits = torch.zeros(2, 10, dtype=torch.bfloat16)
    logits[0, 7], logits[1, 9] = 1e4, -1e4
    nll = trie_nll(logits, torch.tensor([7, 9]), torch.tensor([0, 0]), trie)
    assert nll.dtype == torch.float32
    assert nll[0] == 0
    assert nll[1] == pytest.approx(1e4, rel=1e-2)


def test_no_positions_give_an_empty_loss_with_a_gradient() -> None:
    logits, none = torch.zeros(0, V, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    nll = trie_nll(logits, none, none, Trie.from_sequences([[1, 0], [2, 0]]))
    assert gradient(nll.sum(), logits).shape == (0, V)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_the_head_are_those_of_index_select_in_value_and_gradient(dtype: torch.dtype) -> None:
    tokens, scale = torch.tensor([0, 3, 4, 8]), torch.randn(4, 5)
    found = []
    ours = head_rows(torch.ones(10, 5, requires_grad=True), tokens)
    assert "HeadRows" in type(ours.grad_fn).__name__, "else this compares index_select with itself"
    for rows in (head_rows, lambda weight, tokens: weight.index_select(0, tokens)):
        weight = torch.linspace(-1, 1, 50).view(10, 5).to(dtype).requires_grad_()
        used_twice = weight * 2  # a tied head is an embedding, too
        loss = (rows(weight, tokens) * scale).sum() + used_twice.sum()
        loss.backward()
        found.append((loss.detach(), weight.grad))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][1].dtype == dtype


def test_gradient_weight_is_one_minus_the_probability() -> None:
    trie = Trie.from_sequences([[1, 0], [2, 0], [3, 0]])
    logits = some_logits(1)
    nll = trie_nll(logits, torch.tensor([2]), torch.tensor([0]), trie)
    assert gradient(nll.sum(), logits)[0, 2].item() == pytest.approx(-gradient_weight(nll).item(), rel=1e-5)


# --- adaptive temperature ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gap", "variance", "root", "expected"),
    [(8, 6, "plus", 0.9947), (8, 6, "minus", 0.6019), (5, 9, "plus", 0.4989), (5, 9, "minus", 0.4989)],
)
def test_roots_worked_by_hand(gap: float, variance: float, root: str, expected: float) -> None:
    ats = AdaptiveTemperature(eta=0.25, root=root)  # m = 600: C = ln 150 = 5.0106
    assert ats.solve(gap, variance, 600) == pytest.approx(expected, abs=5e-5)


def test_first_step_by_hand() -> None:
    # Valid logits -1, 1 (mean 0, variance 2), target 1, m = 40: C = ln 10, root (1 + 0) / (2 ln 10), below the clamp.
    ats = AdaptiveTemperature(initial=3.0, momentum=0.9)
    assert ats.update(torch.tensor([1.0]), torch.tensor([-1.0, 1.0]), 40) == pytest.approx(
        0.9 * 3 + 0.1 * 1.5
    )
    loose = AdaptiveTemperature(initial=3.0, momentum=0.0, clamp=(1e-3, 10.0))
    assert loose.update(torch.tensor([1.0]), torch.tensor([-1.0, 1.0]), 40) == pytest.approx(
        1 / (2 * math.log(10))
    )


@pytest.mark.parametrize("root", ["plus", "minus"])
@pytest.mark.parametrize("clamp", [(1.5, 5.0), (0.01, 100.0)])
def test_equals_a_plain_recomputation_step_by_step(root: str, clamp: tuple[float, float]) -> None:
    rng = np.random.default_rng(1)
    stream = []
    for _ in range(40):
        m, rows = int(rng.integers(5, 30)), int(rng.integers(1, 6))
        valid = rng.normal(0, rng.uniform(0.1, 4), rows * m)
        stream.append(((rng.choice(valid, rows) + rng.uniform(0, 12)).tolist(), valid.tolist(), m))
    ats = AdaptiveTemperature(clamp=clamp, root=root)
    ours = [ats.update(torch.tensor(p), torch.tensor(v), m) for p, v, m in stream]
    np.testing.assert_allclose(ours, plain_ats(stream, 0.25, 1.5, 0.95, clamp, root), rtol=1e-5)
    assert len(set(np.round(ours, 6))) > 1


def test_nothing_to_estimate_leaves_the_temperature() -> None:
    ats = AdaptiveTemperature(initial=2.0)
    assert ats.update(torch.zeros(0), torch.zeros(0), 40) == 2.0
    assert ats.update(torch.zeros(1), torch.zeros(1), 40) == 2.0


def test_adaptive_temperature_takes_no_gradient_and_keeps_its_state() -> None:
    ats = AdaptiveTemperature()
    ats.update(torch.tensor([20.0], requires_grad=True), torch.randn(40).requires_grad_(), 40)
    other = AdaptiveTemperature()
    other.load_state_dict(ats.state_dict())
    assert other.value == ats.value != 1.5
    assert "value=" in repr(ats)


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"root": "both"}, "wanted root among plus, minus, exact, got 'both'"),
        ({"rows": "some"}, "wanted rows among widest, root, all, got 'some'"),
        ({"scope": "title"}, "wanted scope among global, token, got 'title'"),
        ({"eta": 0}, "wanted eta > 0"),
        ({"clamp": (2, 1)}, "wanted eta > 0"),
    ],
)
def test_wrong_settings_of_the_adaptive_temperature(wrong: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        AdaptiveTemperature(**wrong)


@pytest.mark.parametrize("root", ["plus", "minus", "exact"])
def test_too_few_valid_tokens_for_eta(root: str) -> None:
    with pytest.raises(UserError, match=r"wants m \* eta > 1, got m = 4 valid tokens and eta = 0.25"):
        AdaptiveTemperature(root=root).update(torch.zeros(1), torch.zeros(4), 4)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=6),
    st.integers(0, 99),
    st.sampled_from([0.21, 0.55, 0.81]),
    st.sampled_from([(1.5, 5.0), (0.05, 50.0)]),
)
def test_the_exact_root_equals_a_plain_bisection(
    sizes: list[int], seed: int, eta: float, clamp: tuple[float, float]
) -> None:
    """Rows of unequal length, so ``row`` is needed; no eta is a share of rows, where rounding would decide."""
    rng = np.random.default_rng(seed)
    rows = [((valid := rng.normal(0, 3, n).tolist())[0] + 3, [valid[0] + 3, *valid[1:]]) for n in sizes]
    positive = torch.tensor([p for p, _ in rows])
    valid = torch.tensor([v for _, values in rows for v in values])
    row = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    ats = AdaptiveTemperature(eta, momentum=0.0, clamp=clamp, root="exact")
    if len(valid) > 1:
        tau = ats.update(positive, valid, 100, row)
        assert tau == pytest.approx(plain_exact_ats(rows, eta, clamp), rel=1e-3)
        if clamp[0] + 1e-3 < tau < clamp[1] - 1e-3:
            assert mean_probability(rows, tau) == pytest.approx(eta, abs=1e-3)
    own = AdaptiveTemperature(eta, clamp=clamp, root="exact", scope="token").per_token(positive, valid, row)
    expected = [plain_exact_ats([one], eta, clamp) for one in rows]
    np.testing.assert_allclose(own.numpy(), expected, rtol=1e-3)


def test_an_exact_root_outside_the_clamp_is_its_nearer_end() -> None:
    valid = torch.tensor([3.0, 0, 0, 0, 0])  # P = eta = 1/4 where e^(3 / tau) = 4 / 3, at tau = 10.4
    settings = {"momentum": 0.0, "root": "exact"}
    found = [
        AdaptiveTemperature(clamp=clamp, **settings).update(valid[:1], valid, 5)
        for clamp in ((1.5, 5.0), (1.0, 20.0), (15.0, 20.0))
    ]
    assert found == pytest.approx([5.0, 3 / math.log(4 / 3), 15.0], rel=1e-5)


def test_rows_of_unequal_length_have_to_be_told() -> None:
    with pytest.raises(UserError, match="wanted the row of each valid logit, got 5 logits for 2 targets"):
        AdaptiveTemperature(root="exact").update(torch.zeros(2), torch.zeros(5), 5)
    told = AdaptiveTemperature(root="exact", eta=0.5).update(torch.zeros(2), torch.zeros(6), 3)
    assert told == pytest.approx(1.5), "P is 1/3 at any temperature: the lower end"


@settings(max_examples=25, deadline=None)
@given(
    catalogues(),
    st.integers(0, 99),
    st.sampled_from([0.1, 0.25, 0.5, 0.7]),
    st.sampled_from([(1.5, 5.0), (0.05, 50.0)]),
    st.sampled_from(["plus", "minus", "exact"]),
)
def test_a_temperature_for_each_token_equals_a_loop_in_value_and_gradient(
    sequences: list[list[int]], seed: int, eta: float, clamp: tuple[float, float], root: str
) -> None:
    trie = Trie.from_sequences(sequences)
    target, node, _ = tokens(trie)
    logits, weight = some_logits(len(target), seed), torch.rand(len(target))
    ats = AdaptiveTemperature(eta, clamp=clamp, root=root, scope="token")
    taus, losses = [], []
    for z, y, n in zip(logits, target.tolist(), node.tolist(), strict=True):
        valid = z[trie.children(n)[0].tolist()]
        p, values = z[y].item(), valid.tolist()
        one = plain_exact_ats([(p, values)], eta, clamp) if root == "exact" else None
        taus.append(one or plain_token_ats(p, values, eta, clamp, root))
        losses.append(taus[-1] * (torch.logsumexp(valid / taus[-1], 0) - z[y] / taus[-1]))
    slow = (torch.stack(losses) * weight).sum()
    objective = Objective(temperature=ats, normaliser="sum")
    ours = objective(logits, target, node, trie, weight)
    close = {"rtol": 5e-3, "atol": 5e-3}
    torch.testing.assert_close(ours, slow, **close)
    torch.testing.assert_close(gradient(ours, logits), gradient(slow, logits), **close)
    decision = (trie.n_children[node.numpy()] > 1).tolist()
    before = objective.tau
    objective.observe(logits, target, node, trie)
    seen = [tau for tau, d in zip(taus, decision, strict=True) if d]
    assert objective.tau == pytest.approx(np.mean(seen) if seen else before, rel=5e-3)


@pytest.mark.parametrize(
    ("gap", "n", "plus", "minus", "exact"),
    [
        (1.0, 2, 5.0, 1.0, 5.0),  # C < 0: P > 1/2 > eta at any temperature; minus: variance 2, 2 / (2 * 1)
        (-1.0, 2, 0.1, 0.1, 2 / math.log(3)),  # e^(-2 / tau) = 1/3 where P = 1/4
        (1.0, 4, 5.0, 0.5 * 4 / 3, 5.0),  # C = 0: variance 4/3
    ],
)
def test_few_valid_tokens_have_the_limit_of_the_root(
    gap: float, n: int, plus: float, minus: float, exact: float
) -> None:
    """Half of the tokens have logit -1, half of them 1."""
    valid = torch.tensor([gap, -gap] * (n // 2))
    for root, expected in (("plus", plus), ("minus", minus), ("exact", exact)):
        ats = AdaptiveTemperature(clamp=(0.1, 5.0), root=root, scope="token")
        assert ats.update(valid[:1], valid, n) == pytest.approx(expected, rel=1e-5)
        assert len(ats.per_token(torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.int64))) == 0


# --- objectives -------------------------------------------------------------------------------------------------------

# root ─ 1 ─ 2 ─ 0      item 0          node 0 has three children, node 1 (token 1) two, the others one
#      │   └ 3 ─ 0      item 1
#      ├ 4 ─ 5 ─ 0      item 2
#      └ 6 ─ 0          item 3
FOUR = [[1, 2, 0], [1, 3, 0], [4, 5, 0], [6, 0]]


@pytest.mark.parametrize("normaliser", ["weights", "decisions", "sum"])
@pytest.mark.parametrize(("support", "tau"), [("trie", 1.0), ("trie", 2.0), ("vocabulary", 2.0)])
def test_objective_equals_a_loop(support: str, tau: float, normaliser: str) -> None:
    trie = Trie.from_sequences(FOUR)
    target, node, _ = tokens(trie)
    logits, weight = some_logits(len(target)).detach(), torch.rand(len(target))
    if support == "trie":
        losses = [tau * loss for loss in dense_trie_nll(logits, target, node, trie, tau).tolist()]
    else:
        losses = vocabulary_nll(logits, target, tau).tolist()
    decisions = (trie.n_children[node.numpy()] > 1).tolist()
    loss = Objective(support, tau, normaliser)(logits, target, node, trie, weight)
    assert loss.item() == pytest.approx(
        weighted_mean(losses, weight.tolist(), decisions, normaliser), rel=1e-5
    )


def test_igd_with_beta_one_is_the_mean_and_with_zero_the_mean_over_decisions() -> None:
    trie, counts = Trie.from_sequences(FOUR), [3, 1, 2, 5]
    target, node, after = tokens(trie)
    logits = some_logits(len(target)).detach()
    nll = vocabulary_nll(logits, target)
    decision = torch.from_numpy(trie.n_children[node.numpy()] > 1)
    for beta, expected in ((1.0, nll.mean()), (0.0, nll[decision].mean())):
        weight = torch.from_numpy(binary_weights(trie, counts, beta)[after])
        loss = Objective("vocabulary")(logits, target, node, trie, weight)
        torch.testing.assert_close(loss, expected, **CLOSE)


@pytest.mark.parametrize("support", ["trie", "vocabulary"])
def test_weights_of_beta_one_are_none(support: str) -> None:
    """IGD, its linear form and Pos with beta 1 are the mean over all tokens: LML in vocabulary support."""
    trie, counts = Trie.from_sequences(FOUR), [3, 1, 2, 5]
    target, node, after = tokens(trie)
    logits = some_logits(len(target)).detach()
    plain = Objective(support)(logits, target, node, trie)
    if support == "vocabulary":
        torch.testing.assert_close(plain, torch.nn.functional.cross_entropy(logits, target), **CLOSE)
    for weight in (
        binary_weights(trie, counts, 1.0)[after],
        linear_weights(trie, counts, 1.0)[after],
        position_weights([len(title) for title in FOUR], 1.0),
    ):
        assert torch.equal(Objective(support)(logits, target, node, trie, torch.from_numpy(weight)), plain)


def test_pos_by_hand() -> None:
    """Titles of 3, 3, 3 and 2 tokens; weights 1, .6, .2 and 1, .2."""
    trie, weight = Trie.from_sequences(FOUR), position_weights([3, 3, 3, 2], 0.2)
    target, node, _ = tokens(trie)
    logits = some_logits(len(target)).detach()
    loss = Objective("vocabulary")(logits, target, node, trie, torch.from_numpy(weight))
    by_hand = [1, 0.6, 0.2, 1, 0.6, 0.2, 1, 0.6, 0.2, 1, 0.2]
    nll = vocabulary_nll(logits, target).tolist()
    assert loss.item() == pytest.approx(
        sum(w * one for w, one in zip(by_hand, nll, strict=True)) / 6.6, rel=1e-5
    )


def test_expanded_negatives_in_an_objective() -> None:
    trie = Trie.from_sequences(FOUR)
    target, node, _ = tokens(trie)
    logits = some_logits(len(target)).detach()
    loss = Objective("trie", 2.0, "decisions", expand_negatives=True)(logits, target, node, trie)
    decision = torch.from_numpy(trie.n_children[node.numpy()] > 1)
    assert loss.item() == pytest.approx(
        2 * expanded_nll(logits, target, node, trie, 2.0)[decision].mean().item(), rel=1e-5
    )


def test_trie_support_multiplies_by_the_temperature() -> None:
    trie = Trie.from_sequences(FOUR)
    target, node, _ = tokens(trie)
    logits = some_logits(len(target)).detach()
    plain = trie_nll(logits, target, node, trie, 3.0)
    assert Objective("trie", 3.0, "sum")(logits, target, node, trie).item() == pytest.approx(
        3 * plain.sum().item(), rel=1e-6
    )


def test_the_temperature_sees_the_rows_of_the_widest_node() -> None:
    trie = Trie.from_sequences(FOUR)
    assert widest_node(trie) == (0, 3)
    target, node, _ = tokens(trie)
    logits = some_logits(len(target), scale=1.0)
    settings = {"eta": 0.5, "clamp": (0.01, 100.0)}
    objective = Objective(temperature=AdaptiveTemperature(**settings), normaliser="decisions")
    expected = AdaptiveTemperature(**settings)
    rows = (node == 0).nonzero()[:, 0]
    expected.update(logits[rows, target[rows]], logits[rows][:, [1, 4, 6]], 3)
    before = objective.tau
    loss = objective(logits, target, node, trie)
    assert objective.tau == before, "calling an objective changes nothing"
    objective.observe(logits, target, node, trie)
    assert objective.tau == expected.value != before
    assert objective(logits, target, node, trie).item() != loss.item()


@pytest.mark.parametrize("root", ["plus", "exact"])
def test_the_temperature_sees_the_rows_it_is_told_to(root: str) -> None:
    """All decisions (ragged rows), the root's, or those of the widest node, which is not the root here."""
    titles = [[8, *title] for title in FOUR] + [[9, 0]]
    trie = Trie.from_sequences(titles)
    target, node, _ = tokens(trie)
    logits = some_logits(len(target), scale=2.0).detach()
    logits[torch.arange(len(target)), target] += 4
    assert widest_node(trie) == (1, 3)
    settings = {"eta": 0.6, "clamp": (0.01, 100.0), "root": root}
    n_children = trie.n_children[node.numpy()]
    chosen = {"widest": node == 1, "root": node == 0, "all": torch.from_numpy(n_children > 1)}
    values = set()
    for rows, look in chosen.items():
        at = look.nonzero()[:, 0].tolist()
        valid = [logits[r, trie.children(int(node[r]))[0].tolist()] for r in at]
        row = torch.repeat_interleave(torch.arange(len(at)), torch.tensor([len(v) for v in valid]))
        expected = AdaptiveTemperature(**settings)
        expected.update(logits[at, target[at]], torch.cat(valid), len(row) / len(at), row)
        objective = Objective(temperature=AdaptiveTemperature(**settings, rows=rows))
        objective.observe(logits, target, node, trie)
        assert objective.tau == pytest.approx(expected.value, rel=1e-6)
        values.add(objective.tau)
        forced = (node == int(trie.walk([8, 4, 5, 0])[2])).nonzero()[:, 0]
        objective.observe(logits[forced], target[forced], node[forced], trie)
        assert objective.tau == pytest.approx(expected.value, rel=1e-6), "no row to look at: it stays"
    assert len(values) == 3


def test_the_released_rows_under_a_root_with_few_children() -> None:
    trie = Trie.from_sequences([[8, *title] for title in FOUR])
    target, node, _ = tokens(trie)
    objective = Objective(temperature=AdaptiveTemperature(eta=0.5, rows="root"))
    with pytest.raises(UserError, match=r"wants m \* eta > 1, got m = 1 valid tokens and eta = 0.5"):
        objective.observe(some_logits(len(target)), target, node, trie)


def test_a_root_with_one_child_does_not_stop_the_temperature() -> None:
    """A tokenizer that makes the opening quote a token of its own; the released rule has no reference row then."""
    trie = Trie.from_sequences([[8, *title] for title in FOUR])
    assert trie.n_children[0] == 1
    assert widest_node(trie) == (1, 3)
    target, node, _ = tokens(trie)
    objective = Objective(temperature=AdaptiveTemperature(eta=0.5, clamp=(0.01, 100.0)))
    before = objective.tau
    objective.observe(some_logits(len(target), scale=1.0), target, node, trie)
    assert objective.tau != before
    assert math.isfinite(objective.tau)


def test_nothing_that_counts_gives_zero_and_not_nan() -> None:
    trie = Trie.from_sequences([[5, 6, 0]])
    target, node, _ = tokens(trie)
    logits = some_logits(len(target))
    loss = Objective("trie", 1.0, "decisions")(logits, target, node, trie)
    assert loss.item() == 0
    assert (gradient(loss, logits) == 0).all()


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"support": "items"}, "wanted support among trie, vocabulary, got 'items'"),
        ({"normaliser": "mean"}, "wanted normaliser among weights, decisions, sum, got 'mean'"),
        ({"temperature": 0.0}, "wanted a temperature > 0, got 0.0"),
        (
            {"support": "vocabulary", "temperature": AdaptiveTemperature()},
            "adaptive temperature needs trie support",
        ),
        (
            {"support": "vocabulary", "expand_negatives": True},
            "expand_negatives needs trie support, got 'vocabulary'; set it to False",
        ),
    ],
)
def test_wrong_objectives(wrong: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        Objective(**wrong)


@pytest.mark.parametrize("loss", [trie_nll, vocabulary_nll])
def test_wrong_temperature(loss: Any) -> None:
    extra = (torch.tensor([0]), Trie.from_sequences(FOUR)) if loss is trie_nll else ()
    with pytest.raises(ValueError, match="wanted a temperature > 0, got -1"):
        loss(torch.zeros(1, V), torch.tensor([1]), *extra, temperature=-1)
