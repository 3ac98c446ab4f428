"""Ranks by counting equal the places in the sorted ranking, whatever is tied, shared, excluded or allowed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st
from numpy.typing import NDArray

from tests.worlds import split
from triewise.errors import UserError
from triewise.ranking import (
    Groups,
    ItemLists,
    ItemScorer,
    MostPopular,
    Ranking,
    evaluate,
    metrics_from_rank,
    rank_items,
    target_ranks as counting,
)
from triewise.ranking.target_ranks import _at_least, count_places

SCORES = [-np.inf, -1.0, 0.0, 0.5, 2.0]


@dataclass(frozen=True)
class Table:
    """Scores from a table; a user's only history item is its row."""

    groups: Groups
    table: NDArray[np.float32]

    def item_scores(self, histories: ItemLists) -> NDArray[np.float32]:
        return self.table[[int(history[0]) for history in histories]]

    def recommend(
        self, histories: ItemLists, k: int | None = 10, exclude: Any = None, allow: Any = None
    ) -> Ranking:
        return rank_items(self, histories, k, exclude, allow)


@dataclass(frozen=True)
class Sorted:
    """A recommender without item scores: evaluated through its rankings."""

    of: ItemScorer

    @property
    def groups(self) -> Groups:
        return self.of.groups

    def recommend(self, *args: Any) -> Ranking:
        return self.of.recommend(*args)


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Table, list[int], list[list[int]], list[int] | None, int]:
    """Few different scores, groups of several items, filters with repeats: ties and shared titles everywhere."""
    n_items, n_users = draw(st.integers(1, 12)), draw(st.integers(1, 4))
    item = st.integers(0, n_items - 1)
    labels = draw(st.lists(st.integers(0, n_items), min_size=n_items, max_size=n_items))
    priority = draw(st.lists(st.integers(0, 2), min_size=n_items, max_size=n_items))
    row = st.lists(st.sampled_from(SCORES), min_size=n_items, max_size=n_items)
    table = np.array(draw(st.lists(row, min_size=n_items, max_size=n_items)), dtype=np.float32)
    targets = draw(st.lists(item, min_size=n_users, max_size=n_users))
    exclude = draw(st.lists(st.lists(item, max_size=6), min_size=n_users, max_size=n_users))
    allow = draw(st.none() | st.lists(item, max_size=8))
    return (
        Table(Groups.from_labels(labels, priority), table),
        targets,
        exclude,
        allow,
        draw(st.integers(1, 14)),
    )


@settings(max_examples=200, deadline=None)
@given(worlds(), st.integers(1, 40))
def test_counting_equals_the_sorted_ranking(world: tuple[Any, ...], at_once: int) -> None:
    scorer, targets, exclude, allow, k = world
    histories = [[t] for t in targets]
    found = count_places(scorer, histories, np.array(targets), k, exclude, allow, at_once=at_once)
    only = None if allow is None else [allow] * len(targets)
    full = scorer.recommend(histories, None, exclude, only)
    of_item = scorer.groups.of_item
    for b, target in enumerate(targets):
        listed = [int(i) for i in full.items[b] if i >= 0]
        of_listed = [int(of_item[i]) for i in listed]
        place = of_listed.index(of_item[target]) if of_item[target] in of_listed else -1
        assert found.rank[b] == place
        assert found.itself[b] == (place >= 0 and listed[place] == target)
    best = scorer.recommend(histories, k, exclude, only)
    assert found.items.tolist() == best.items.tolist()
    assert found.scores.tolist() == best.scores.tolist()


@pytest.mark.parametrize("exclude", ["none", "history", "seen"])
@pytest.mark.parametrize("allow", [None, list(range(0, 300, 3))])
def test_popularity_is_judged_alike_by_counting_and_by_its_ranking(
    exclude: str, allow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "_IN_CACHE", 3 * 300)  # three users at a time
    rng = np.random.default_rng(0)
    counts = rng.zipf(1.6, size=300).clip(max=40) - 1
    popular = MostPopular(Groups.from_labels(rng.integers(0, 270, 300), counts), counts)
    history = [rng.integers(0, 300, size=rng.integers(0, 6)).tolist() for _ in range(80)]
    seen = [[*h, *rng.integers(0, 300, 20).tolist()] for h in history]
    rows = split(history, rng.integers(0, 300, 80).tolist(), seen)
    both = [
        evaluate(r, rows, name="p", k=5, exclude=exclude, allow=allow, train_targets=counts)
        for r in (popular, Sorted(popular))
    ]
    metrics = [{key: value for key, value in e.metrics.items() if key != "timing"} for e in both]
    assert metrics[0] == metrics[1]
    for name in ("rank", "items", "scores", "certified"):
        assert np.array_equal(getattr(both[0], name), getattr(both[1], name)), name


@pytest.mark.parity
def test_metrics_of_counted_ranks_equal_ir_measures() -> None:
    """The run's scores descend strictly with the rank: ties are broken as ours are."""
    ir_measures = pytest.importorskip("ir_measures")
    rng = np.random.default_rng(5)
    scorer = Table(Groups.from_labels(np.arange(60)), rng.integers(0, 25, (60, 60)).astype(np.float32))
    histories, target = [[u] for u in range(60)], rng.integers(0, 60, 60)
    full = scorer.recommend(histories, k=None).items
    qrels = [ir_measures.Qrel(str(u), str(t), 1) for u, t in enumerate(target)]
    run = [
        ir_measures.ScoredDoc(str(u), str(item), float(-place))
        for u, ranked in enumerate(full)
        for place, item in enumerate(ranked)
    ]
    named = {"HR": ir_measures.Success, "NDCG": ir_measures.nDCG, "MRR": ir_measures.RR}
    measures = {named[name] @ k: f"{name}@{k}" for name in named for k in (1, 5, 10, 20)}
    ours = metrics_from_rank(count_places(scorer, histories, target).rank, (1, 5, 10, 20))
    values = list(ir_measures.iter_calc(list(measures), qrels, run))
    assert len(values) == 12 * 60
    for value in values:
        assert ours[measures[value.measure]][int(value.query_id)] == pytest.approx(value.value, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32), st.integers(1, 40), st.sampled_from([3, 50, 5000, 9001]), st.sampled_from([2, 99])
)
@example(0, 300, 20000, 10**6)
def test_the_top_of_a_long_row_is_all_there(seed: int, n: int, length: int, values: int) -> None:
    rows = np.random.default_rng(seed).integers(0, values, (2, length)).astype(np.float32)
    user, column = _at_least(rows, n)
    for b, row in enumerate(rows):
        found = column[user == b].tolist()
        assert set(np.argsort(-row, kind="stable")[:n].tolist()) <= set(found)
        assert found == sorted(set(found))
    assert (np.diff(user) >= 0).all()


def test_few_scores_are_held_at_a_time() -> None:
    """The bound is on scores; a single user is the least that can be scored."""
    asked: list[int] = []

    class Counts(Table):
        def item_scores(self, histories: ItemLists) -> NDArray[np.float32]:
            asked.append(len(histories))
            return super().item_scores(histories)

    scorer = Counts(Groups.from_labels(np.arange(10)), np.zeros((10, 10), np.float32))
    done: list[int] = []
    for at_once, blocks in ((40, [4, 3]), (1, [1] * 7), (1000, [7])):
        asked.clear()
        done.clear()
        count_places(scorer, [[0]] * 7, np.zeros(7, int), at_once=at_once, advance=done.append)
        assert asked == done == blocks


def test_scores_that_cannot_be_ranked() -> None:
    table = Table(Groups.from_labels(np.arange(3)), np.zeros((3, 3), np.float32))
    broken = replace(table, table=np.array([[0.0, 1.0, np.nan]], dtype=np.float32))
    with pytest.raises(UserError, match="NaN.: the model diverged"):
        count_places(broken, [[0]], np.array([0]))
    with pytest.raises(UserError, match="wanted k >= 1"):
        count_places(table, [[0]], np.array([0]), 0)
    with pytest.raises(UserError, match=r"item indices in \[0, 3\), got 3"):
        count_places(table, [[0]], np.array([0]), exclude=[[3]])
    with pytest.raises(ValueError, match=r"scores of 3 items for each user, got \(1, 2\)"):
        count_places(replace(table, table=np.zeros((1, 2), np.float32)), [[0]], np.array([0]))
