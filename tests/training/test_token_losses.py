"""BEAR, APAO and front-greater: values and gradients, limits, batches, runs."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings, strategies as st

from tests.reference.losses import all_prefixes, plain_apao, plain_bear
from tests.strategies import catalogues
from tests.token_worlds import Row, make_prompts, make_split
from tests.train_child import small_model
from tests.training.test_losses import CLOSE, gradient, some_logits, tokens
from tests.training.test_soft_targets import one_step
from tests.training.test_trainer import Gradients, config, weighted_examples
from triewise.errors import UserError
from triewise.recipe import parse_recipe
from triewise.tokens import Trie, front_weights, rarity_weights, zero_gain
from triewise.training import (
    AdaptiveTemperature,
    Apao,
    Bear,
    Examples,
    FrontGreater,
    Objective,
    make_windows,
    target_counts,
)
from triewise.training.objective import MicroBatches
from triewise.training.token_losses import ApaoBatches, FrontBatches
from triewise.training.trainer import TrieTrainer

TITLES = [[2, 6, 0], [2, 7, 4, 0], [2, 7, 5, 0], [3, 6, 0], [3, 8, 9, 0], [4, 0], [4, 5, 0]]


def uneven_world(supervision: str = "every") -> Examples:
    """Titles with one to three decisions; items follow each other."""
    rows: list[Row] = [(str(u), [(u + j) % 7 for j in range(4)], (u + 4) % 7) for u in range(14)]
    prompts, trie = make_prompts(TITLES), Trie.from_sequences(TITLES)
    windows = make_windows(make_split(rows), supervision, prompts)
    return Examples(windows, prompts, trie, None, zero_gain(trie, target_counts(windows, 7)))


# --- BEAR -------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    catalogues(),
    st.integers(0, 99),
    st.sampled_from(["described", "coded"]),
    st.integers(1, 4),
    st.sampled_from([1.0, 1.7]),
)
def test_bear_equals_a_loop_in_value_and_gradient(
    sequences: list[list[int]], seed: int, form: Any, width: int, tau: float
) -> None:
    trie = Trie.from_sequences(sequences)
    target, node, _ = tokens(trie)
    logits, weight = some_logits(len(target), seed), torch.rand(len(target))
    bear = Bear(Objective("trie", tau), form, 0.7, 1.3, width)
    parts = bear.parts(logits, target, node, trie, weight)
    assume(bool((trie.n_children > 1).any()))
    slow = plain_bear(logits, target, node, trie, weight, bear).float()
    torch.testing.assert_close(parts.loss, slow, **CLOSE)
    torch.testing.assert_close(gradient(parts.loss.sum(), logits), gradient(slow.sum(), logits), **CLOSE)


@pytest.mark.parametrize("form", ["described", "coded"])
def test_bear_without_strength_is_the_objective_bit_for_bit(form: Any) -> None:
    trie = Trie.from_sequences(TITLES)
    target, node, _ = tokens(trie)
    logits = some_logits(len(target))
    plain = Objective().parts(logits, target, node, trie)
    ours = Bear(Objective(), form, 0.0).parts(logits, target, node, trie)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    other = Bear(Objective(), form, 0.5, width=2).parts(logits, target, node, trie)
    assert not torch.equal(other.loss, plain.loss) and torch.equal(other.nll, plain.nll)


def test_the_two_forms_of_bear_pull_apart() -> None:
    """Two children and width 1: the text adds more where the target is behind, the code where it is ahead."""
    trie, target, node = Trie.from_sequences([[1], [2]]), torch.tensor([1, 2]), torch.tensor([0, 0])
    logits = torch.zeros(2, 4)
    logits[:, 1] = 3.0  # the first target is ahead, the second behind
    plain = Objective().parts(logits, target, node, trie).loss
    described = Bear(Objective(), "described", 1.0, 1.0, 1).parts(logits, target, node, trie).loss - plain
    assert described.tolist() == pytest.approx([0.5, torch.sigmoid(torch.tensor(3.0)).item()])
    coded = Bear(Objective(), "coded", 1.0, 1.0, 2).parts(logits, target, node, trie).loss / plain
    assert coded[0] > 1 > coded[1] and coded.sum() == pytest.approx(2)


def test_a_title_that_no_beam_can_drop_costs_nothing_more() -> None:
    trie = Trie.from_sequences(TITLES)
    target, node, _ = tokens(trie)
    logits = some_logits(len(target))
    wide = Bear(Objective(), "described", 5.0, width=4).parts(logits, target, node, trie)
    assert torch.equal(wide.loss, Objective().parts(logits, target, node, trie).loss)


# --- APAO -------------------------------------------------------------------------------------------------------------


def titles_of(examples: Examples, rows: list[int], nll: torch.Tensor, support: str) -> Any:
    """Losses of the learned tokens of each target title, and how many tokens each has."""
    batch = examples.batch(rows)
    keep = examples.trie.branching[batch.node] if support == "trie" else np.ones(len(batch.node), bool)
    each: list[list[torch.Tensor]] = [[] for _ in range(int(batch.title.max()) + 1)]
    for title, value, kept in zip(batch.title.tolist(), nll, keep.tolist(), strict=True):
        if kept:
            each[title].append(value.double())
    return each, np.bincount(batch.title, batch.weight).tolist()


@pytest.mark.parametrize(
    ("support", "changes"),
    [
        ("trie", {}),
        ("vocabulary", {"eta": 0.7}),
        ("trie", {"temperature": 1.5, "levels": 1}),
        ("vocabulary", {"levels": 2, "strength": 2.0}),
    ],
)
def test_pointwise_apao_equals_a_loop(support: str, changes: dict[str, Any], tmp_path: Path) -> None:
    examples, apao = uneven_world(), Apao(Objective(support), "pointwise", **{"strength": 0.5, **changes})
    settings = config(steps=1, batch_size=8)
    trainer = TrieTrainer(small_model(), examples, apao, settings, tmp_path)
    rows = trainer.get_train_dataloader().dataset.rows.ravel().tolist()
    found = one_step(examples, apao, tmp_path)
    model, batch = small_model(), examples.batch(rows)
    logits = model(input_ids=torch.from_numpy(batch.input_ids)).logits.flatten(0, 1)[batch.position]
    target, node = torch.from_numpy(batch.target), torch.from_numpy(batch.node)
    parts = apao.objective.parts(logits, target, node, examples.trie)
    each, size = titles_of(examples, rows, parts.nll, support)
    loss = (parts.loss.double().sum() + plain_apao(each, size, apao)) / len(target)
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(catalogues(max_items=8, max_tokens=3), st.integers(0, 99))
def test_pairwise_against_all_beginnings_is_pointwise(sequences: list[list[int]], seed: int) -> None:
    """By enumeration of every beginning of the same depth, value and gradient."""
    trie = Trie.from_sequences(sequences)
    logits = some_logits(trie.n_nodes, seed).double()
    step = lambda n: logits[n][trie.children(n)[0].tolist()].log_softmax(0)  # noqa: E731
    for sequence in sequences:
        path = trie.walk(sequence).tolist()
        decisions = [n for n in path[:-1] if trie.n_children[n] > 1]
        before = torch.zeros((), dtype=torch.float64)
        for depth, n in enumerate(decisions, 1):
            child = path[path.index(n) + 1]
            before = before - step(n)[trie.children(n)[1].tolist().index(child)]
            pairwise = all_prefixes(trie, step, path, depth)
            torch.testing.assert_close(pairwise, before / depth, rtol=1e-9, atol=1e-9)


def test_pairwise_at_the_root_is_a_softmax_over_its_children(tmp_path: Path) -> None:
    """Any support, any temperature; a title of one learned token is left out, as the last token of any is."""
    for objective, tau in ((Objective("vocabulary"), 1.0), (Objective("trie", 1.3), 2.0)):
        examples, apao = uneven_world(), Apao(objective, "pairwise", 0.5, 1, tau)
        assert apao.at_root
        trainer = TrieTrainer(small_model(), examples, apao, config(steps=1, batch_size=8), tmp_path)
        rows = trainer.get_train_dataloader().dataset.rows.ravel().tolist()
        found = one_step(examples, apao, tmp_path)
        model, batch = small_model(), examples.batch(rows)
        logits = model(input_ids=torch.from_numpy(batch.input_ids)).logits.flatten(0, 1)[batch.position]
        target, node = torch.from_numpy(batch.target), torch.from_numpy(batch.node)
        parts = objective.parts(logits, target, node, examples.trie)
        each, size = titles_of(examples, rows, parts.nll, objective.support)
        total = parts.loss.sum()
        valid, first = examples.trie.children(0)[0].tolist(), np.unique(batch.title, return_index=True)[1]
        for title, at in enumerate(first.tolist()):
            if len(each[title]) > 1:
                p = (logits[at][valid] / (objective.tau * tau)).log_softmax(0)
                total = total - 0.5 * size[title] * p[valid.index(int(target[at]))]
        (total / len(target)).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_both_ways_to_depth_one_agree_and_no_strength_is_the_objective(tmp_path: Path) -> None:
    examples = uneven_world()
    step = functools.partial(one_step, examples, out=tmp_path)
    same = [
        (Apao(Objective(), "pairwise", 0.5, 1), Apao(Objective(), "pointwise", 0.5, 1)),
        (Apao(Objective(), "pairwise", 0.5), Apao(Objective(), "pointwise", 0.5)),
        (Apao(Objective(), "pointwise", 0.0), Objective()),
        (Apao(Objective("vocabulary"), "pairwise", 0.0, 1), Objective("vocabulary")),
    ]
    for ours, theirs in same:
        first, second = step(ours), step(theirs)
        for name in first:
            torch.testing.assert_close(first[name], second[name], rtol=1e-6, atol=1e-7)


# --- front-greater ----------------------------------------------------------------------------------------------------


def front_of(examples: Examples, objective: Objective, **changes: Any) -> FrontGreater:
    counts = target_counts(examples.windows, examples.trie.n_items)
    front, late = (made(examples.trie, counts) for made in (front_weights, rarity_weights))
    return FrontGreater(objective, front, late, **changes)


def test_weights_go_from_the_front_to_the_late_ones_also_in_a_resumed_run() -> None:
    examples = uneven_world()
    learned = front_of(examples, Objective("vocabulary"), steps=8, accumulation=2, curriculum=0.5)
    rows = np.arange(16).reshape(16, 1) % len(examples)
    whole, rest = learned.batches(examples, rows, False), learned.batches(examples, rows[6:], False)
    assert isinstance(whole, FrontBatches)
    for number in range(16):
        place, share = examples.batch(rows[number]).place, min(number // 2 / 4, 1)
        wanted = (1 - share) * learned.front[place] + share * learned.late[place]
        np.testing.assert_allclose(whole[number]["weight"], wanted, rtol=1e-6)
        if number >= 6:
            assert torch.equal(rest[number - 6]["weight"], whole[number]["weight"])
    assert whole[0]["contribution"] == pytest.approx(len(examples.batch(rows[0]).target))


def test_an_ended_curriculum_of_equal_weights_is_the_objective(tmp_path: Path) -> None:
    examples = uneven_world()
    ones = np.ones(examples.trie.paths()[1][-1])
    learned = FrontGreater(Objective(), 5 * ones, ones, 1, 1, 0.0)
    ours, plain = (one_step(examples, o, tmp_path) for o in (learned, Objective()))
    assert all(torch.equal(ours[name], plain[name]) for name in ours)
    assert learned.settings()["frontgreater"] == {"steps": 1, "accumulation": 1, "curriculum": 0.0}


# --- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "learned",
    [
        Bear(Objective(normaliser="decisions"), "described", width=2),
        Apao(Objective("vocabulary"), "pairwise", 1.0, 1),
        front_of(uneven_world(), Objective("vocabulary"), steps=3, accumulation=1),
        front_of(uneven_world(), Objective("trie"), steps=3, accumulation=1),
    ],
    ids=lambda learned: type(learned).__name__,
)
def test_accumulation_and_blocks_change_nothing(
    learned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for weights that are found from a micro-batch: coded BEAR, and APAO below the root."""

    def steps(accumulation: int) -> list[dict[str, torch.Tensor]]:
        seen, settings = Gradients(), config(steps=3, batch_size=8, accumulation=accumulation)
        if isinstance(learned, FrontGreater):
            ours: Any = FrontGreater(learned.objective, learned.front, learned.late, 3, accumulation)
        else:
            ours = learned
        trainer = TrieTrainer(small_model(), uneven_world(), ours, settings, tmp_path)
        trainer.add_callback(seen)
        trainer.train()
        return seen.steps

    one, four = steps(1), steps(4)
    monkeypatch.setattr("triewise.training.objective.LOGITS_AT_ONCE", 20 * 5)
    for first, second, third in zip(one, four, steps(1), strict=True):
        for name in first:
            torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(first[name], third[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scope", ["global", "token"])
def test_an_adaptive_temperature_and_packing_go_along(scope: str, tmp_path: Path) -> None:
    examples = uneven_world("last")
    for add in (functools.partial(Bear, form="coded"), functools.partial(Apao, levels=1)):
        found = []
        for packing in (False, True):
            ats = AdaptiveTemperature(0.5, clamp=(0.1, 5.0), scope=scope)  # it moves
            found.append(one_step(examples, add(Objective(temperature=ats)), tmp_path, packing=packing))
            assert ats.value != 1.5
        for name in found[0]:
            torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-4, atol=1e-6)


def test_what_apao_adds_counts_as_the_weights_do() -> None:
    examples = weighted_examples()
    for objective in (Objective(), Objective(normaliser="decisions")):
        made = Apao(objective).batches(examples, np.arange(8).reshape(1, 8), False)
        assert isinstance(made, ApaoBatches)
        item, plain = made[0], MicroBatches(examples, objective, made.rows)[0]
        assert item["contribution"] == plain["contribution"]
        assert item["size"].sum().item() == pytest.approx(plain["contribution"], rel=1e-5)


@pytest.mark.parametrize(
    ("objective", "line"),
    [
        ({"bear": {"strength": 0.2}, "support": "vocabulary"}, "bear.strength > 0 needs support = 'trie'"),
        (
            {"apao": {"strength": 0.2, "form": "pairwise"}, "support": "vocabulary"},
            "apao.form = 'pairwise' below depth 1 needs support = 'trie' and apao.temperature = 1: set apao.levels = 1",
        ),
        (
            {"apao": {"strength": 0.2}, "bear": {"strength": 0.2}},
            "bear.strength > 0 and apao.strength > 0 are two objectives; use one",
        ),
        (
            {"weight": "front-greater", "contrast": {"strength": 0.1}},
            "weight = 'front-greater' and contrast.strength > 0 are two objectives; use one",
        ),
        (
            {"apao": {"strength": 0.2}, "expand_negatives": True},
            "apao.strength > 0 and expand_negatives = true are two objectives; use one",
        ),
    ],
)
def test_wrong_settings(objective: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        parse_recipe({"name": "x", "data": {"source": "ml-100k"}, "objective": objective}, "test")
