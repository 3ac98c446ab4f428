"""Soft targets over the tree: which decisions, the divergence over the catalogue, batches, and packed rows."""

from __future__ import annotations

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
from tests.training.test_losses import V, gradient, tokens
from tests.training.test_soft_targets import by_last_item, one_step, shares_by_hand, some_titles
from tests.training.test_trainer import config
from triewise.errors import UserError
from triewise.recipe import parse_recipe
from triewise.tokens import Trie
from triewise.training import AdaptiveTemperature, Examples, Objective, SoftTargets, TreeTargets, make_windows
from triewise.training.soft_targets import child_shares
from triewise.training.soft_trees import heavy_decisions, tree_parts
from triewise.training.trainer import TrieTrainer, packs

EXACT = {"rtol": 1e-6, "atol": 1e-6}


def divergence_by_hand(
    trie: Trie, log_q: NDArray[np.float64], z_NV: torch.Tensor, tau: float
) -> torch.Tensor:
    """KL(Q || P) as a sum over titles, each with the product of its probabilities; float64."""
    total = torch.zeros((), dtype=torch.float64)
    for item, leaf in enumerate(trie.leaf.tolist()):
        if not np.isfinite(log_q[item]):
            continue
        log_p, node = torch.zeros((), dtype=torch.float64), 0
        for step in trie.path_to(leaf):
            valid = trie.token[trie.child_ptr[node] : trie.child_ptr[node + 1]].tolist()
            at = valid.index(int(trie.token[step]))
            log_p, node = log_p + (z_NV[node, valid] / tau).log_softmax(0)[at], step
        total = total + np.exp(log_q[item]) * (log_q[item] - log_p)
    return total


def some_table(trie: Trie, seed: int) -> torch.Tensor:
    """Logits (N, V) of every node, float64 with a gradient."""
    made = torch.randn(trie.n_nodes, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.requires_grad_()


def over_the_tree(
    objective: Objective,
    alpha: float,
    trie: Trie,
    z_NV: torch.Tensor,
    log_q: NDArray[np.float64],
    share: float,
) -> Any:
    """`tree_parts` of all tokens of all titles, taught by one distribution, and how many tokens those are."""
    title, tree, mass = heavy_decisions(trie, log_q[None], share)
    target, node, _ = tokens(trie)
    soft = torch.from_numpy(child_shares(trie, tree, title, log_q[None]))
    both = torch.cat([node, torch.from_numpy(tree)])
    first = torch.from_numpy(trie.token[trie.child_ptr[tree]].astype(np.int64))
    masses, weight = torch.from_numpy(mass.astype(np.float32)), torch.ones(len(both))
    n_edges = int(trie.n_children[both.numpy()].sum())
    parts = tree_parts(
        objective, alpha, soft, masses, z_NV[both], torch.cat([target, first]), both, trie, weight, n_edges
    )
    return parts, len(target)


@settings(max_examples=40, deadline=None)
@given(catalogues(), st.integers(0, 99), st.sampled_from([1.0, 1.7]))
def test_all_decisions_are_the_divergence_over_the_catalogue(
    sequences: list[list[int]], seed: int, tau: float
) -> None:
    trie = Trie.from_sequences(sequences)
    z_NV, log_q = some_table(trie, seed), some_titles(trie, 1, seed, 1.0)[0]
    parts, n = over_the_tree(Objective(temperature=tau), 1.0, trie, z_NV, log_q, 1.0)
    assert not parts.loss[:n].any()
    slow = tau * divergence_by_hand(trie, log_q, z_NV, tau)
    torch.testing.assert_close(parts.loss.sum(), slow.float(), **EXACT)
    torch.testing.assert_close(gradient(parts.loss.sum(), z_NV), gradient(slow, z_NV), **EXACT)


@settings(max_examples=30, deadline=None)
@given(catalogues(), st.integers(0, 99))
def test_a_teacher_equal_to_the_model_has_no_divergence_and_no_gradient(
    sequences: list[list[int]], seed: int
) -> None:
    trie = Trie.from_sequences(sequences)
    z_NV, log_q = some_table(trie, seed), np.full(trie.n_items, -np.inf)
    for item, leaf in enumerate(trie.leaf.tolist()):
        if leaf in trie.leaf[:item]:  # equal titles count once
            continue
        log_q[item], node = 0.0, 0
        for step in trie.path_to(leaf):
            valid = trie.token[trie.child_ptr[node] : trie.child_ptr[node + 1]].tolist()
            at = valid.index(int(trie.token[step]))
            log_q[item] += float(z_NV.detach()[node, valid].log_softmax(0)[at])
            node = step
    parts, _ = over_the_tree(Objective(), 1.0, trie, z_NV, log_q, 1.0)
    assert parts.loss.abs().max() < 1e-6
    assert gradient(parts.loss.sum(), z_NV).abs().max() < 1e-6


@settings(max_examples=40, deadline=None)
@given(catalogues(), st.integers(0, 99), st.sampled_from([0.3, 0.8, 1.0]), st.sampled_from([1.0, 4.0]))
def test_the_fewest_decisions_hold_the_share(
    sequences: list[list[int]], seed: int, share: float, temperature: float
) -> None:
    trie = Trie.from_sequences(sequences)
    log_q = some_titles(trie, 2, seed)
    title, node, mass = heavy_decisions(trie, log_q, share, temperature)
    for s in range(2):
        q = np.exp(log_q[s] / temperature)
        q /= q.sum()
        on_path = [{0, *trie.path_to(int(leaf))} for leaf in trie.leaf]
        all_of_them = {
            n: sum(q[i] for i in range(trie.n_items) if n in on_path[i])
            for n in np.flatnonzero(trie.branching)
        }
        ours, total = node[title == s], sum(all_of_them.values())
        np.testing.assert_allclose(mass[title == s], [all_of_them[n] for n in ours], atol=1e-12)
        fewest = np.sort(list(all_of_them.values()))[::-1].cumsum()
        wanted = int(np.searchsorted(fewest, share * total - 1e-12)) + 1 if len(fewest) else 0
        assert len(ours) == min(wanted, len(fewest))
        for n in ours.tolist():  # decisions above one are there too
            assert {m for m in (0, *trie.path_to(n)) if trie.branching[m]} <= set(ours.tolist())


def test_true_tokens_and_the_tree_are_weighed_by_alpha() -> None:
    trie = Trie.from_sequences([[1, 2, 0], [1, 4, 0], [5, 0]])
    z_NV, log_q = some_table(trie, 3), some_titles(trie, 1, 0)[0]
    whole, n = over_the_tree(Objective(), 1.0, trie, z_NV, log_q, 1.0)
    half, _ = over_the_tree(Objective(), 0.25, trie, z_NV, log_q, 1.0)
    plain = Objective().parts(z_NV[tokens(trie)[1]], *tokens(trie)[:2], trie)
    torch.testing.assert_close(half.loss[:n], 0.75 * plain.loss)
    torch.testing.assert_close(half.loss[n:], 0.25 * whole.loss[n:])
    assert torch.equal(half.nll, plain.nll)


# --- batches ----------------------------------------------------------------------------------------------------------


def test_alpha_zero_is_the_objective_bit_for_bit(tmp_path: Path) -> None:
    examples = cycle_world()
    plain = one_step(examples, Objective(), tmp_path)
    ours = one_step(examples, TreeTargets(Objective(), by_last_item(12), 0.0), tmp_path)
    assert all(torch.equal(plain[name], ours[name]) for name in plain)


@pytest.mark.parametrize("share", [0.4, 1.0])
def test_the_step_is_the_gradient_of_separate_forwards(share: float, tmp_path: Path) -> None:
    """One forward for every decision of every target's tree, and one for the true titles."""
    examples, teach = cycle_world(), by_last_item(12)
    learned = TreeTargets(Objective(), teach, 0.6, share=share)
    settings = config(steps=1, batch_size=8, packing=True)
    trainer = TrieTrainer(small_model(), examples, learned, settings, tmp_path)
    rows = trainer.get_train_dataloader().dataset.rows
    packed = one_step(examples, learned, tmp_path, packing=True)
    apart = one_step(examples, learned, tmp_path, packing=False)
    model, losses, n_tokens, trie = small_model(), [], 0, examples.trie
    for row in rows.ravel().tolist():
        batch, items = examples.batch([row]), examples.windows.items.take(np.array([row]))
        log_p = teach(items, examples.windows.n_context[[row]].astype(np.int64))
        logits = model(input_ids=torch.from_numpy(batch.input_ids)).logits[0][batch.position]
        plain = Objective().parts(logits, *(torch.from_numpy(a) for a in (batch.target, batch.node)), trie)
        losses.append(0.4 * plain.loss.sum())
        n_tokens += len(batch.target)
        roots = batch.position[batch.node == 0]
        decisions = list(zip(*(a.tolist() for a in heavy_decisions(trie, log_p, share)), strict=True))
        heavy = {pair[:2] for pair in decisions}
        for one in zip(batch.title.tolist(), batch.node.tolist(), strict=True):
            if share < 1 and trie.branching[one[1]] and one not in heavy:  # it stands for all that are light
                decisions.append((*one, 1.0))
        for title, node, mass in decisions:
            path = [int(trie.token[step]) for step in trie.path_to(int(node))]
            ids = [*batch.input_ids[0, : roots[title] + 1].tolist(), *path]
            z = model(input_ids=torch.tensor([ids])).logits[0, -1]
            wanted = shares_by_hand(trie, int(node), log_p[title])
            q = torch.tensor(list(wanted.values()), dtype=torch.float32)
            losses.append(0.6 * mass * (q * (q.log() - z[list(wanted)].log_softmax(0))).sum())
    (torch.stack(losses).sum() / n_tokens).backward()
    for name, parameter in model.named_parameters():
        for found in (packed, apart):
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("supervision", ["last", "every"])
def test_packing_and_accumulation_change_nothing(supervision: str, tmp_path: Path) -> None:
    plain = cycle_world()
    rows: list[Row] = [("a", list(range(n)), n) for n in range(2, 12)]
    prompts = make_prompts([plain.prompts.title_tokens[i].tolist() for i in range(12)])
    windows = make_windows(make_split(rows), supervision)
    examples = Examples(windows, prompts, plain.trie, None, np.ones(plain.trie.n_nodes, bool))
    assert packs(small_model(), examples, many_rows=True)

    def step(adaptive: bool, **changes: Any) -> dict[str, torch.Tensor]:
        ats = AdaptiveTemperature(clamp=(1.2, 1.4), eta=0.4)
        objective = Objective(temperature=ats, normaliser="decisions") if adaptive else Objective()
        learned = TreeTargets(objective, by_last_item(12), 0.6, 1.5, share=0.7)
        return one_step(examples, learned, tmp_path, **changes)

    for adaptive in (False, True):
        whole = step(adaptive, packing=False)
        others = [step(adaptive, packing=True)] + [step(adaptive, accumulation=4)] * (not adaptive)
        for other in others:
            for name in whole:
                torch.testing.assert_close(whole[name], other[name], rtol=1e-4, atol=1e-6)


def test_hardly_any_share_is_the_loss_along_the_path(tmp_path: Path) -> None:
    examples, teach = cycle_world(), by_last_item(12)
    path = one_step(examples, SoftTargets(Objective(), teach, 0.6), tmp_path)
    root = TreeTargets(Objective(), teach, 0.6, share=1e-9)
    tree = one_step(examples, root, tmp_path, packing=True)
    for name in path:
        torch.testing.assert_close(tree[name], path[name], rtol=1e-4, atol=1e-6)


def test_a_window_runs_once_with_its_trees(tmp_path: Path) -> None:
    """Packed, what is run are the tokens of the window and of the paths that leave it, not a row a path."""
    examples, learned = cycle_world(), TreeTargets(Objective(), by_last_item(12), share=1.0)
    rows = np.arange(4)[None]
    apart, packed = (learned.batches(examples, rows, packing)[0] for packing in (False, True))
    assert packed["input_ids"].numel() < apart["input_ids"].numel() / 4
    assert packed["counts"]["tokens"] == examples.batch(rows[0]).n_tokens
    n_true = len(packed["decision"])
    assert len(packed["node"]) == n_true + len(packed["mass"])
    assert packed["contribution"] == Objective().batches(examples, rows, False)[0]["contribution"]


def test_what_is_no_divergence_is_refused() -> None:
    teach = by_last_item(12)
    with pytest.raises(UserError, match=r"wanted a share of the teacher's mass in \(0, 1\], got 0"):
        TreeTargets(Objective(), teach, share=0.0)
    ats = Objective(temperature=AdaptiveTemperature(scope="token"))
    for objective, form in (
        (Objective("vocabulary"), "cross-entropy"),
        (Objective(), "likelihood"),
        (ats, "cross-entropy"),
    ):
        with pytest.raises(
            UserError, match="soft targets over the tree are a divergence over the catalogue: wanted"
        ):
            TreeTargets(objective, teach, form=form)
    for more in ({"support": "vocabulary"}, {"soft_form": "likelihood"}):
        raw = {"name": "x", "data": {"source": "ml-100k"}, "objective": {"soft_scope": "tree"} | more}
        with pytest.raises(UserError, match="soft_scope = 'tree' is a divergence over the catalogue"):
            parse_recipe(raw, "test")
