"""Soft targets: shares of a teacher below a node, the loss, batches, and runs that are taught."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray

from tests.strategies import catalogues
from tests.token_worlds import Row, cycle_world, make_prompts, make_split
from tests.train_child import small_model
from tests.training.test_losses import CLOSE, gradient, some_logits, tokens
from tests.training.test_trainer import Gradients, config
from triewise.arrays import Ragged
from triewise.errors import UserError
from triewise.models import SlotIds
from triewise.recipe import parse_recipe
from triewise.tokens import Trie
from triewise.training import AdaptiveTemperature, Curriculum, Examples, Objective, SoftTargets, make_windows
from triewise.training.soft_targets import child_shares, soft_parts
from triewise.training.trainer import TrieTrainer


def some_titles(trie: Trie, n: int, seed: int, scale: float = 3.0) -> NDArray[np.float64]:
    """Log-probabilities (n, I) of titles; of items with one title only the first has any."""
    scores = np.random.default_rng(seed).normal(size=(n, trie.n_items)) * scale
    _, first = np.unique(trie.leaf, return_index=True)
    scores[:, np.setdiff1d(np.arange(trie.n_items), first)] = -np.inf
    found: NDArray[np.float64] = scores - np.log(np.exp(scores).sum(1, keepdims=True))
    return found


def shares_by_hand(
    trie: Trie, node: int, log_p: NDArray[np.float64], temperature: float = 1.0
) -> dict[int, float]:
    """Token to share: sums over all items whose path holds the child."""
    p = np.exp(log_p / temperature)
    paths = [{0, *trie.path_to(int(leaf))} for leaf in trie.leaf]
    children = range(int(trie.child_ptr[node]), int(trie.child_ptr[node + 1]))
    mass = {c: sum(p[i] for i in range(trie.n_items) if c in paths[i]) for c in children}
    return {int(trie.token[c]): m / sum(mass.values()) for c, m in mass.items()}


@settings(max_examples=30, deadline=None)
@given(catalogues(), st.integers(0, 99), st.sampled_from([0.5, 1.0, 4.0]))
def test_shares_are_masses_below_the_children(
    sequences: list[list[int]], seed: int, temperature: float
) -> None:
    trie = Trie.from_sequences(sequences)
    node = np.flatnonzero(trie.n_children)
    title = np.arange(len(node)) % 3
    log_p = some_titles(trie, 3, seed)
    found = child_shares(trie, node, title, log_p, temperature)
    slow = [
        share
        for n, s in zip(node.tolist(), title.tolist(), strict=True)
        for share in shares_by_hand(trie, n, log_p[s], temperature).values()
    ]
    np.testing.assert_allclose(found, slow, rtol=1e-6, atol=1e-7)


def test_shares_far_from_the_best_titles_keep_their_digits() -> None:
    """The teacher gives 1e-400 to the titles below token 2, two to one; without any mass shares are equal."""
    trie = Trie.from_sequences([[1, 0], [2, 3], [2, 4]])
    log_p = np.array([[0.0, -920 + np.log(2), -920], [0.0, -np.inf, -np.inf]])
    node = int(np.flatnonzero(trie.depth == 1)[1])
    shares = child_shares(trie, np.array([node, node]), np.array([0, 1]), log_p)
    np.testing.assert_allclose(shares, [2 / 3, 1 / 3, 0.5, 0.5], rtol=1e-6)
    assert child_shares(trie, np.zeros(0, np.int64), np.zeros(0, np.int64), log_p).shape == (0,)


def dense_soft(
    objective: Objective, form: str, alpha: float, logits: Any, target: Any, shares: Any
) -> torch.Tensor:
    """The loss as it is written, token by token, in float64."""
    losses = []
    for z, y, share in zip(logits.double(), target.tolist(), shares, strict=True):
        valid = list(share)
        z = z / objective.tau
        log_p = z[valid].log_softmax(0) if objective.support == "trie" else z.log_softmax(0)[valid]
        wanted = torch.tensor([(1 - alpha) * (v == y) + alpha * share[v] for v in valid], dtype=torch.float64)
        loss = -(wanted * log_p).sum() if form == "cross-entropy" else -(wanted * log_p.exp()).sum().log()
        losses.append(loss * (objective.tau if objective.support == "trie" else 1))
    return torch.stack(losses)


@settings(max_examples=40, deadline=None)
@given(
    catalogues(),
    st.integers(0, 99),
    st.sampled_from([0.1, 0.5, 1.0]),
    st.sampled_from(["cross-entropy", "likelihood"]),
    st.sampled_from(["trie", "vocabulary"]),
    st.sampled_from([1.0, 1.7]),
)
def test_equals_a_loop_in_value_and_gradient(
    sequences: list[list[int]], seed: int, alpha: float, form: str, support: str, tau: float
) -> None:
    trie = Trie.from_sequences(sequences)
    target, node, _ = tokens(trie)
    logits, weight = some_logits(len(target), seed), torch.rand(len(target))
    log_p, objective = some_titles(trie, 2, seed), Objective(support, tau)
    title = np.arange(len(target)) % 2
    soft = torch.from_numpy(child_shares(trie, node.numpy(), title, log_p))
    parts = soft_parts(objective, alpha, form, soft, logits, target, node, trie, weight)
    shares = [shares_by_hand(trie, n, log_p[s]) for n, s in zip(node.tolist(), title.tolist(), strict=True)]
    slow = dense_soft(objective, form, alpha, logits, target, shares).float() * weight
    torch.testing.assert_close(parts.loss, slow, **CLOSE)
    torch.testing.assert_close(gradient(parts.loss.sum(), logits), gradient(slow.sum(), logits), **CLOSE)


@pytest.mark.parametrize("form", ["cross-entropy", "likelihood"])
@pytest.mark.parametrize("objective", [Objective(), Objective("vocabulary"), Objective(temperature=1.3)])
def test_alpha_zero_is_the_objective_bit_for_bit(form: str, objective: Objective) -> None:
    trie = Trie.from_sequences([[1, 2, 3, 0], [1, 4, 0], [5, 0]])
    target, node, _ = tokens(trie)
    logits = some_logits(len(target))
    soft = torch.from_numpy(child_shares(trie, node.numpy(), 0 * node.numpy(), some_titles(trie, 1, 0)))
    plain = objective.parts(logits, target, node, trie)
    ours = soft_parts(objective, 0.0, form, soft, logits, target, node, trie)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    other = soft_parts(objective, 0.5, form, soft, logits, target, node, trie)
    assert not torch.equal(other.loss, plain.loss) and torch.equal(other.nll, plain.nll)


def test_a_teacher_equal_to_the_model_leaves_no_gradient() -> None:
    trie = Trie.from_sequences([[1, 2, 0], [1, 4, 0], [5, 0]])
    target, node, _ = tokens(trie)
    logits = some_logits(len(target))
    own = [logits[m].detach()[list(trie.children(int(n))[0])].softmax(0) for m, n in enumerate(node.tolist())]
    parts = soft_parts(Objective(), 1.0, "cross-entropy", torch.cat(own), logits, target, node, trie)
    assert gradient(parts.loss.sum(), logits).abs().max() < 1e-6
    others = torch.cat([p.flip(0) for p in own])
    wrong = soft_parts(Objective(), 1.0, "cross-entropy", others, logits, target, node, trie)
    assert gradient(wrong.loss.sum(), logits).abs().max() > 0.1


def test_likelihood_of_what_the_teacher_finds_impossible_is_finite() -> None:
    trie, zero = Trie.from_sequences([[0], [1], [2]]), torch.tensor([0])
    logits = torch.tensor([[-300.0, 0.0, 500.0]], requires_grad=True)
    for soft in ([0.0, 1.0, 0.0], [1.0, 0.0, 0.0]):
        parts = soft_parts(Objective(), 1.0, "likelihood", torch.tensor(soft), logits, zero, zero, trie)
        assert parts.loss.item() == pytest.approx(500 if soft[1] else 800)
        assert gradient(parts.loss.sum(), logits).isfinite().all()


# --- batches ----------------------------------------------------------------------------------------------------------


def by_last_item(n_items: int) -> Any:
    """A teacher that looks at the last item: its successor is likely, the one after that half as much."""
    calls: list[int] = []

    def teach(rows: Ragged, n_context: NDArray[np.int64]) -> NDArray[np.float64]:
        calls.append(len(rows))
        found = []
        for row, first in zip(rows, n_context.tolist(), strict=True):
            for place in range(first, len(row)):
                p = np.full(n_items, 0.01)
                p[[(row[place - 1] + 1) % n_items, (row[place - 1] + 2) % n_items]] = 1.0, 0.5
                found.append(np.log(p / p.sum()))
        return np.array(found)

    teach.calls = calls  # type: ignore[attr-defined]
    return teach


def one_step(examples: Examples, learned: Any, out: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """The gradient that the optimiser is given."""
    seen = Gradients()
    trainer = TrieTrainer(
        small_model(), examples, learned, config(steps=1, batch_size=8, max_grad_norm=1e9, **changes), out
    )
    trainer.add_callback(seen)
    trainer.train()
    return seen.steps[0]


@pytest.mark.parametrize("support", ["trie", "vocabulary"])
def test_the_step_is_the_gradient_of_a_plain_recomputation(support: str, tmp_path: Path) -> None:
    """Windows with several targets: each target is taught by what the teacher says of the items before it."""
    examples, teach = cycle_world(), by_last_item(12)
    learned = SoftTargets(Objective(support), teach, 0.6)
    settings = config(steps=1, batch_size=8)
    rows = (
        TrieTrainer(small_model(), examples, learned, settings, tmp_path).get_train_dataloader().dataset.rows
    )
    found = one_step(examples, learned, tmp_path)
    model, losses = small_model(), []
    for row in rows.ravel().tolist():
        batch, items = examples.batch([row]), examples.windows.items[row]
        logits = model(input_ids=torch.from_numpy(batch.input_ids)).logits[0][batch.position]
        n_context = int(examples.windows.n_context[row])
        log_p = teach(Ragged.from_lists([items.tolist()]), np.array([n_context]))
        shares = [
            shares_by_hand(examples.trie, n, log_p[s])
            for n, s in zip(batch.node.tolist(), batch.title.tolist(), strict=True)
        ]
        target = torch.from_numpy(batch.target)
        losses.append(dense_soft(Objective(support), "cross-entropy", 0.6, logits, target, shares))
    torch.cat(losses).mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_blocks_accumulation_and_packing_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = cycle_world()
    rows: list[Row] = [("a", list(range(n)), n) for n in range(2, 12)]
    prompts = make_prompts([plain.prompts.title_tokens[i].tolist() for i in range(12)])
    examples = Examples(
        make_windows(make_split(rows), "last"), prompts, plain.trie, None, np.ones(plain.trie.n_nodes, bool)
    )
    for support, form in (("trie", "likelihood"), ("vocabulary", "cross-entropy")):
        learned = SoftTargets(Objective(support, 1.2), by_last_item(12), 0.6, 1.5, form)
        step = functools.partial(one_step, examples, learned, tmp_path)
        whole, four, packed = step(), step(accumulation=4), step(packing=True)
        with monkeypatch.context() as patch:
            patch.setattr("triewise.training.objective.LOGITS_AT_ONCE", 20 * 5)
            blocks = step()
        for name in whole:
            for other in (four, packed, blocks):
                torch.testing.assert_close(whole[name], other[name], rtol=1e-4, atol=1e-6)


def test_the_teacher_is_asked_once_a_micro_batch_for_whole_windows(tmp_path: Path) -> None:
    teach = by_last_item(12)
    learned = SoftTargets(Objective(temperature=AdaptiveTemperature(scope="token")), teach, 0.6)
    one_step(cycle_world(), learned, tmp_path, accumulation=2)
    assert set(teach.calls) == {4}


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on few cores
def test_a_teacher_is_asked_in_the_process_that_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU batches are built by workers, which are copies of a process and cannot use it."""
    monkeypatch.setattr("triewise.training.trainer.default_workers", lambda device: 2)
    soft = SoftTargets(Objective(), by_last_item(12))
    course = Curriculum(soft, SlotIds(20, 12), n_batches=3, length=2, seed=0)
    for learned, workers in ((Objective(), 2), (soft, 0), (course, 0)):
        trainer = TrieTrainer(small_model(), cycle_world(), learned, config(steps=3), tmp_path)
        assert trainer.get_train_dataloader().num_workers == workers


def test_wrong_settings() -> None:
    teach = by_last_item(12)
    for bad, line in (
        ({"alpha": 1.5}, r"wanted alpha of soft targets in \[0, 1\], got 1.5"),
        ({"temperature": 0.0}, "wanted a temperature of the teacher > 0, got 0"),
        ({"form": "kl"}, "wanted a form of soft targets among cross-entropy, likelihood, got 'kl'"),
    ):
        with pytest.raises(UserError, match=line):
            SoftTargets(Objective(), teach, **bad)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="set expand_negatives = False"):
        SoftTargets(Objective(expand_negatives=True), teach)
    raw = {"name": "x", "data": {"source": "ml-100k"}}
    both = {"soft_targets": "runs/sasrec", "contrast": {"strength": 0.1}}
    with pytest.raises(UserError, match="soft_targets and contrast.strength > 0 are two objectives; use one"):
        parse_recipe(raw | {"objective": both}, "test")
    taught = {"objective": {"soft_targets": "runs/sasrec"}, "training": {"workers": 2}}
    with pytest.raises(UserError, match="asks a model in the process that trains: set training.workers"):
        parse_recipe(raw | taught, "test")
