"""Ranks, metrics, intervals: hand cases, and agreement with plain loops."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tests.worlds import catalog, split
from triewise.errors import UserError
from triewise.files import read_json
from triewise.ranking import (
    Groups,
    MostPopular,
    Ranking,
    evaluate,
    gain_interval,
    interval,
    load_evaluation,
    paired_interval,
    paired_p,
)

COUNTS = np.array([9, 8, 7, 2, 6, 5, 4, 3, 0])  # items 3 and 4 have equal titles
POPULAR = MostPopular(Groups.from_labels(catalog().group, COUNTS), COUNTS)


def test_ranks_by_hand() -> None:
    """Popularity orders the groups 0, 1, 2, {4, 3}, 5, 6, 7, 8."""
    rows = split([[0], [1], [2], [0, 1], [8]], [1, 3, 8, 0, 4])
    result = evaluate(POPULAR, rows, name="p", k=3, train_targets=COUNTS)
    assert result.rank.tolist() == [1, 3, 7, 0, 3]
    assert result.items[0].tolist() == [0, 1, 2]
    assert result.metrics["HR@1"] == pytest.approx(1 / 5)
    assert result.metrics["HR@5"] == pytest.approx(4 / 5)
    assert result.metrics["NDCG@5"] == pytest.approx(
        (1 / np.log2(3) + 1 / np.log2(5) + 1 + 1 / np.log2(5)) / 5
    )
    assert result.metrics["by_id"]["HR@5"] == pytest.approx(3 / 5)  # item 4 stands for the group of 3
    assert result.metrics["cold"]["n_users"] == 1
    assert result.metrics["warm"]["HR@5"] == 1.0


def test_coverage_and_popularity_by_hand() -> None:
    """Everybody's first three are 0, 1, 2 but for what is excluded; coverage looks at ten places whatever is kept."""
    rows = split([[0], [1], [2], [0]], [1, 3, 8, 0])
    result = evaluate(POPULAR, rows, name="p", k=3, train_interactions=np.array([9, 20, 4, 1, 3, 0, 0, 0, 0]))
    assert result.metrics["coverage@10"] == 1.0
    assert result.metrics["by_popularity"] == {
        "0": {"n_users": 1, "HR@5": 0.0, "NDCG@5": 0.0, "HR@10": 1.0, "NDCG@10": 1 / np.log2(9)},
        "1-4": {  # item 3 and its equal title have four together
            "n_users": 1,
            "HR@5": 1.0,
            "NDCG@5": pytest.approx(1 / np.log2(5)),
            "HR@10": 1.0,
            "NDCG@10": pytest.approx(1 / np.log2(5)),
        },
        "5-19": {"n_users": 1, "HR@5": 1.0, "NDCG@5": 1.0, "HR@10": 1.0, "NDCG@10": 1.0},
        "20+": {
            "n_users": 1,
            "HR@5": 1.0,
            "NDCG@5": pytest.approx(1 / np.log2(3)),
            "HR@10": 1.0,
            "NDCG@10": pytest.approx(1 / np.log2(3)),
        },
    }
    assert evaluate(POPULAR, rows, name="p", depth=2).metrics["coverage@10"] == 2 / 8
    assert evaluate(POPULAR, rows, name="p", allow=[3, 4, 7]).metrics["coverage@10"] == 1.0


def test_every_metric_has_an_interval_around_it() -> None:
    rng = np.random.default_rng(0)
    rows = split([[0]] * 60, rng.integers(0, 9, 60).tolist())
    metrics = evaluate(POPULAR, rows, name="p").metrics
    names = [f"{m}@{k}" for k in (1, 5, 10, 20) for m in ("HR", "NDCG", "MRR")]
    assert list(metrics["intervals"]) == names
    assert all(metrics["intervals"][n][0] <= metrics[n] <= metrics["intervals"][n][1] for n in names)


def test_excluded_items_leave_the_ranking_and_an_excluded_target_is_a_miss() -> None:
    rows = split([[1], [0]], [2, 0], seen=[[0, 1], [0]])
    assert evaluate(POPULAR, rows, name="p", exclude="none").rank.tolist() == [2, 0]
    assert evaluate(POPULAR, rows, name="p", exclude="history").rank.tolist() == [1, -1]
    result = evaluate(POPULAR, rows, name="p", exclude="seen")
    assert result.rank.tolist() == [0, -1]
    assert result.metrics["n_not_ranked"] == 1
    assert result.metrics["HR@10"] == 0.5


def test_only_allowed_items_are_ranked_and_other_targets_are_misses() -> None:
    rows = split([[0], [0], [0]], [4, 5, 2])
    result = evaluate(POPULAR, rows, name="p", allow=[2, 3, 8])
    assert result.rank.tolist() == [1, -1, 0]  # item 3 stands for the group of 4
    assert result.items[0, :4].tolist() == [2, 3, 8, -1]


def test_a_ranking_of_limited_depth_misses_what_lies_behind() -> None:
    rows = split([[0], [0]], [1, 5])
    result = evaluate(POPULAR, rows, name="p", k=3, depth=3)
    assert result.rank.tolist() == [1, -1]
    assert result.metrics["n_not_ranked"] == 1
    assert "HR@20" not in result.metrics  # a list of three says nothing about it
    assert result.metrics["HR@10"] == 0.5


def test_a_tolerance_is_told_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = split([[0], [1], [2]], [1, 8, 4])
    assert not {"tolerance", "tied"} & evaluate(POPULAR, rows, name="p", depth=3).metrics.keys()
    recommend = type(POPULAR).recommend

    def rounded(*given: Any) -> Ranking:
        tied = np.array([0, 2, 1], dtype=np.int32)
        return replace(recommend(*given), tolerance=0.5, tied=tied)

    monkeypatch.setattr(type(POPULAR), "recommend", rounded)
    metrics = evaluate(POPULAR, rows, name="p", depth=3).metrics
    assert (metrics["tolerance"], metrics["tied"], metrics["certified"]) == (0.5, 2, 3)


def test_files_are_as_promised(tmp_path: Path) -> None:
    result = evaluate(POPULAR, split([[0], [1]], [1, 8]), name="p", k=12)
    result.save(tmp_path)
    frame = pl.read_parquet(tmp_path / "predictions.parquet")
    assert dict(frame.schema) == {
        "row": pl.Int32,
        "user_id": pl.String,
        "target": pl.Int32,
        "items": pl.List(pl.Int32),
        "scores": pl.List(pl.Float32),
        "rank": pl.Int32,
        "certified": pl.Boolean,
    }
    assert len(frame["items"][0]) == POPULAR.groups.n_groups  # no columns beyond the catalogue
    metrics = read_json(tmp_path / "metrics.json")
    for key in ("split", "n_users", "HR@5", "HR@10", "NDCG@5", "NDCG@10", "MRR@10", "counters", "timing"):
        assert key in metrics
    first = (tmp_path / "predictions.parquet").read_bytes()
    evaluate(POPULAR, split([[0], [1]], [1, 8]), name="p", k=12).save(tmp_path)
    assert (tmp_path / "predictions.parquet").read_bytes() == first


FACTS = {"seed": 0, "search": "catalogue", "support": "none", "allow": None}


def test_an_evaluation_that_cannot_be_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(POPULAR, split([[0]], [1]), name="before", facts=FACTS).save(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(
            "triewise.ranking.evaluation.write_json", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            evaluate(POPULAR, split([[0]], [2]), name="after", facts=FACTS).save(tmp_path)
    assert load_evaluation(tmp_path).name == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.json", "predictions.parquet"]


def test_metrics_and_predictions_of_two_evaluations_are_none(tmp_path: Path) -> None:
    for name, target in (("a", 1), ("b", 2)):
        evaluate(POPULAR, split([[0]], [target]), name=name, facts=FACTS).save(tmp_path / name)
    shutil.copy(tmp_path / "a" / "metrics.json", tmp_path / "b" / "metrics.json")
    with pytest.raises(
        UserError, match=r"predictions.parquet is not the file that was written .*; run: triewise"
    ):
        load_evaluation(tmp_path / "b")


def test_interval_covers_the_mean_as_often_as_it_says() -> None:
    """Of 300 samples from a known coin, about 95 % of intervals hold its mean."""
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(300):
        low, high = interval((rng.random(200) < 0.3).astype(float), seed=seed, n=500)
        held += low <= 0.3 <= high
    assert 0.91 <= held / 300 <= 0.98


def test_interval_equals_the_plain_bootstrap_in_distribution() -> None:
    values = np.random.default_rng(1).random(80)
    plain = [values[np.random.default_rng([2, i]).integers(0, 80, 80)].mean() for i in range(4000)]
    assert interval(values, n=4000) == pytest.approx(tuple(np.quantile(plain, (0.025, 0.975))), abs=0.01)


def test_paired_intervals_are_of_the_difference() -> None:
    rng = np.random.default_rng(0)
    b = rng.random(300)
    low, high = paired_interval(b + 0.01, b)
    assert (low, high) == pytest.approx((0.01, 0.01))
    assert interval(np.zeros(0)) == (0.0, 0.0)
    with pytest.raises(ValueError, match="the same users"):
        paired_interval(b, b[:2])


def test_the_randomisation_test_equals_all_assignments_of_signs() -> None:
    """Twelve users: each of the 4,096 ways to swap a and b is one case."""
    rng = np.random.default_rng(4)
    a, b = rng.integers(0, 4, 12) / 2, rng.integers(0, 3, 12) / 2
    signs = 1 - 2 * ((np.arange(2**12)[:, None] >> np.arange(12)) & 1)
    exact = (np.abs(signs @ (a - b)) >= abs((a - b).sum()) - 1e-9).mean()
    assert paired_p(a, b, n=40_000) == pytest.approx(exact, abs=0.01)
    assert paired_p(b, a) == paired_p(a, b)
    assert paired_p(a, a) == 1.0
    assert paired_p(np.ones(100), np.zeros(100)) == pytest.approx(1 / 10_001)
    with pytest.raises(ValueError, match="the same users"):
        paired_p(a, a[:2])


def test_p_is_uniform_where_there_is_no_difference() -> None:
    rng = np.random.default_rng(0)
    p = [paired_p(rng.random(60), rng.random(60), seed=i, n=500) for i in range(300)]
    assert 0.02 <= np.mean(np.array(p) <= 0.05) <= 0.085
    assert 0.42 <= np.mean(np.array(p) <= 0.5) <= 0.58


def test_the_interval_of_a_gain_covers_the_true_one() -> None:
    """One row hits twice as often as another, of 340 users: 100 % more.

    The control is the interval of the difference over the other row's mean, as if that were known: it misses one time
    in five where it should one time in twenty.
    """
    rng, missed, control = np.random.default_rng(0), 0, 0
    for _ in range(150):
        b = (rng.random(340) < 0.1).astype(float)
        a = np.where(rng.random(340) < 0.5, b, 0) + (rng.random(340) < 0.15)
        low, high = gain_interval(a, b, n=500)
        assert low <= a.mean() / b.mean() - 1 <= high
        missed += not low <= 1 <= high
        low, high = paired_interval(a, b, n=500)
        control += not low <= b.mean() <= high
    assert missed <= 15 and control >= 22, (missed, control)
    half = np.array([0.0, 0.5, 1.0] * 20)
    assert gain_interval(1.5 * half, half) == pytest.approx((0.5, 0.5))
    assert gain_interval(np.ones(40), np.eye(1, 40)[0])[1] == np.inf
