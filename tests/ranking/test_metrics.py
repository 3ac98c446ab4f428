"""Metrics against hand cases, loops and ir-measures."""

from __future__ import annotations

from math import log2

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from tests.reference import metrics as reference
from triewise.errors import UserError
from triewise.ranking import hit_rate, metrics_from_rank, mrr, ndcg, rank_of_target
from triewise.ranking.metrics import rank_in_list

FUNCTIONS = {"HR": hit_rate, "NDCG": ndcg, "MRR": mrr}
quick = settings(max_examples=60, deadline=None)


@st.composite
def rankings(draw: st.DrawFn) -> tuple[list[list[int]], list[int], int]:
    """Lists of equal length with repeats and -1 padding, targets that may be absent, and a cut-off."""
    width = draw(st.integers(0, 8))
    row = st.lists(st.integers(-1, 9), min_size=width, max_size=width)
    lists = draw(st.lists(row, min_size=1, max_size=5))
    return lists, [draw(st.integers(-1, 9)) for _ in lists], draw(st.integers(1, 10))


def test_by_eye() -> None:
    """The target 7 is second, third and absent."""
    items, target = [[5, 7, 9], [9, 5, 7], [1, 2, 3]], [7, 7, 7]
    assert hit_rate(items, target, k=3).tolist() == [1, 1, 0]
    assert hit_rate(items, target, k=2).tolist() == [1, 0, 0]
    assert ndcg(items, target, k=3).tolist() == pytest.approx([1 / log2(3), 1 / 2, 0])
    assert mrr(items, target, k=3).tolist() == pytest.approx([1 / 2, 1 / 3, 0])
    assert rank_in_list(items, target).tolist() == [1, 2, -1]


def test_padding_is_no_item_and_the_first_repeat_counts() -> None:
    assert hit_rate([[3, -1, -1]], [-1], k=3).tolist() == [0]
    assert rank_in_list([[4, 7, 7, 7]], [7]).tolist() == [1]
    assert hit_rate(np.empty((2, 0), dtype=np.int32), [1, 2], k=5).tolist() == [0, 0]
    assert hit_rate(np.empty((0, 3), dtype=np.int32), np.empty(0, dtype=np.int32), k=5).tolist() == []


def test_places_beyond_a_list_are_misses() -> None:
    assert hit_rate([[5, 7]], [7], k=20).tolist() == [1]
    assert hit_rate([[5, 7]], [3], k=20).tolist() == [0]


def test_types_of_the_results() -> None:
    items, target = np.array([[1, 2]], dtype=np.int32), np.array([2], dtype=np.int64)
    assert all(function(items, target, 2).dtype == np.float64 for function in FUNCTIONS.values())
    assert rank_in_list(items, target).dtype == np.int32
    assert rank_of_target(np.zeros((1, 3), dtype=np.float32), target).dtype == np.int32


@quick
@given(rankings())
def test_equal_the_loops(case: tuple[list[list[int]], list[int], int]) -> None:
    lists, targets, k = case
    items = np.array(lists, dtype=np.int32).reshape(len(lists), -1)
    for name, function in FUNCTIONS.items():
        slow = getattr(reference, function.__name__)
        expected = [slow(row, target, k) for row, target in zip(lists, targets, strict=True)]
        assert function(items, targets, k).tolist() == pytest.approx(expected, abs=1e-12), name
    rank = rank_in_list(items, targets)
    from_rank = metrics_from_rank(rank, ks=(1, k))
    assert all(
        np.array_equal(from_rank[f"{name}@{cut}"], function(items, targets, cut))
        for name, function in FUNCTIONS.items()
        for cut in (1, k)
    )


@quick
@given(rankings())
def test_bounds_monotonicity_and_what_comes_after_the_hit(
    case: tuple[list[list[int]], list[int], int],
) -> None:
    lists, targets, k = case
    items = np.array(lists, dtype=np.int32).reshape(len(lists), -1)
    rank = rank_in_list(items, targets)
    after_hit = (np.arange(items.shape[1]) > rank[:, None]) & (rank >= 0)[:, None]
    for function in FUNCTIONS.values():
        value, wider = function(items, targets, k), function(items, targets, k + 1)
        assert ((value >= 0) & (value <= wider) & (wider <= 1)).all()
        assert np.array_equal(value, function(np.where(after_hit, 8, items), targets, k))
    assert (mrr(items, targets, k) <= ndcg(items, targets, k)).all()
    assert (ndcg(items, targets, k) <= hit_rate(items, targets, k)).all()


@quick
@given(st.data(), st.integers(1, 8), st.integers(1, 4))
def test_counting_equals_sorting(data: st.DataObject, n_items: int, n_rows: int) -> None:
    score = st.sampled_from([-np.inf, -1.0, 0.0, 0.5, 2.0])
    rows = data.draw(
        st.lists(st.lists(score, min_size=n_items, max_size=n_items), min_size=n_rows, max_size=n_rows)
    )
    targets = data.draw(st.lists(st.integers(0, n_items - 1), min_size=n_rows, max_size=n_rows))
    expected = [reference.rank_of_target(row, target) for row, target in zip(rows, targets, strict=True)]
    assert rank_of_target(np.array(rows), targets).tolist() == expected


def test_ties_break_by_index_and_excluded_targets_have_no_rank() -> None:
    scores = [[1.0, 1.0, 1.0], [2.0, -np.inf, 1.0]]
    assert [rank_of_target(scores, [t, t]).tolist() for t in range(3)] == [[0, 0], [1, -1], [2, 1]]


def test_metrics_from_rank_by_eye() -> None:
    values = metrics_from_rank([0, 4, 5, -1], ks=(5, 10))
    assert list(values) == ["HR@5", "NDCG@5", "MRR@5", "HR@10", "NDCG@10", "MRR@10"]
    assert values["HR@5"].tolist() == [1, 1, 0, 0]
    assert values["HR@10"].tolist() == [1, 1, 1, 0]
    assert values["NDCG@10"].tolist() == pytest.approx([1, 1 / log2(6), 1 / log2(7), 0])
    assert values["MRR@10"].tolist() == pytest.approx([1, 1 / 5, 1 / 6, 0])


@pytest.mark.parity
def test_equal_ir_measures_on_random_rankings() -> None:
    """Scores of the run descend strictly with the rank, so that no tie is broken in another way."""
    ir_measures = pytest.importorskip("ir_measures")
    rng = np.random.default_rng(3)
    items = np.array([rng.permutation(40)[:30] for _ in range(200)])
    target = rng.integers(0, 40, size=200)
    qrels = [ir_measures.Qrel(str(row), str(item), 1) for row, item in enumerate(target)]
    run = [
        ir_measures.ScoredDoc(str(row), str(item), float(-place))
        for row, ranked in enumerate(items)
        for place, item in enumerate(ranked)
    ]
    named = {"HR": ir_measures.Success, "NDCG": ir_measures.nDCG, "MRR": ir_measures.RR}
    measures = {named[name] @ k: (name, k) for name in named for k in (1, 5, 10, 20, 40)}
    values = list(ir_measures.iter_calc(list(measures), qrels, run))
    assert len(values) == len(measures) * len(target)
    ours = {key: FUNCTIONS[key[0]](items, target, key[1]) for key in measures.values()}
    for value in values:
        assert ours[measures[value.measure]][int(value.query_id)] == pytest.approx(value.value, abs=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hit_rate([[1, 2]], [1], k=0), "wanted a cut-off k >= 1, got 0"),
        (lambda: ndcg([[1, 2]], [1, 2], k=2), "got 1 lists and 2 targets"),
        (lambda: mrr([[1.0, 2.0]], [1], k=2), "wanted integer items of 2 dimensions, got float64"),
        (lambda: mrr([1, 2], [1], k=2), r"items of 2 dimensions, got int64 of shape \(2,\)"),
        (lambda: metrics_from_rank([[1]], ks=[5]), "wanted integer rank of 1 dimension, got"),
        (
            lambda: metrics_from_rank([1], ks=[5, 20], depth=10),
            "wanted metrics at 20, got lists of 10 places",
        ),
        (lambda: metrics_from_rank([1], ks=[0]), "wanted a cut-off k >= 1"),
        (lambda: rank_of_target([0.5, 1.0], [1]), r"wanted scores \(B, I\) for 1 targets, got shape \(2,\)"),
        (lambda: rank_of_target([[0.5, 1.0]], [2]), r"wanted targets in \[0, 2\), got 2 to 2"),
        (lambda: rank_of_target([[0.5, 1.0]], [-1]), r"wanted targets in \[0, 2\), got -1 to -1"),
        (lambda: rank_of_target([[0.5, 1.0], [np.nan, 1.0]], [0, 1]), "got NaN in row 1"),
    ],
)
def test_arguments_that_are_refused(call, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()
