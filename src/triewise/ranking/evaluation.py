"""A recommender and a split to per-user ranks, metrics with intervals, and paired comparisons.

Every row is judged alike: the whole catalogue is ranked, a prediction hits when it lies in the target's group
of equal titles, ties break by item index, a target that is not ranked counts as a miss. ``by_id`` metrics ask
for the very item.

Dimension key: B users (rows of a split), K items kept, G groups.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field

from triewise.errors import UserError, reading
from triewise.files import (
    Hashed,
    Shape,
    atomic_files,
    check_files,
    file_hashes,
    read_json,
    scan,
    write_json,
    write_text,
)
from triewise.progress import progress
from triewise.ranking.metrics import metrics_from_rank, rank_in_list
from triewise.ranking.ranking import (
    SCORES_AT_ONCE,
    Groups,
    Items,
    ItemScorer,
    Ranking,
    Recommender,
    add_counters,
)
from triewise.ranking.target_ranks import Places, count_places

if TYPE_CHECKING:
    from triewise.arrays import Bool, Float32, Float64, Int32, Int64, Ragged
    from triewise.data import Split

CUTS = (1, 5, 10, 20)
SHOWN = ("HR@5", "HR@10", "NDCG@5", "NDCG@10")
RESAMPLES = 2000
METRICS, PREDICTIONS = "metrics.json", "predictions.parquet"
COVERED = 10  # first places that coverage looks at
BUCKETS = ((0, 0), (1, 4), (5, 19), (20, None))  # training interactions of a target's group, from and to


@dataclass(frozen=True)
class Evaluation:
    """One recommender on one split.

    Attributes:
        name: What the row is called.
        metrics: The content of ``metrics.json``.
        rank: (B,) int32, 0-based rank of the target's group, -1 where it was not ranked.
        items: (B, K) int32 best items, -1 padded.
        scores: (B, K) float32.
        certified: (B,) bool.
        target: (B,) int32.
        user_id: (B,) raw ids or None.
    """

    name: str
    metrics: dict[str, Any]
    rank: Int32
    items: Int32
    scores: Float32
    certified: Bool
    target: Int32
    user_id: NDArray[np.object_]

    def per_user(self, metric: str) -> Float64:
        """(B,) values of a metric such as ``NDCG@10``."""
        return metrics_from_rank(self.rank, [int(metric.partition("@")[2])])[metric]

    def save(
        self, folder: Path, *, of: Mapping[str, str] | None = None, beside: Mapping[str, str] | None = None
    ) -> None:
        """Write ``predictions.parquet`` and ``metrics.json``, the latter last: it says that both are whole.

        Args:
            folder: Where to; an earlier evaluation there stays till this one is written.
            of: Files of the recommender in the folder and their hex SHA-256, which `load_evaluation` compares.
            beside: Names of more text files about these metrics, and what is in them.
        """
        frame = pl.DataFrame(
            {
                "row": np.arange(len(self.rank), dtype=np.int32),
                "user_id": pl.Series(self.user_id.tolist(), dtype=pl.String),
                "target": self.target,
                "items": pl.Series(self.items.tolist(), dtype=pl.List(pl.Int32)),
                "scores": pl.Series(self.scores.tolist(), dtype=pl.List(pl.Float32)),
                "rank": self.rank,
                "certified": self.certified,
            }
        )
        with atomic_files(folder, last=METRICS) as place:
            frame.write_parquet(place / PREDICTIONS)
            hashes = file_hashes(place) | dict(of or {})
            for name, text in (beside or {}).items():
                write_text(place / name, text)
            write_json(place / METRICS, self.metrics | {"sha256": hashes}, sealed=True)


def evaluate(
    recommender: Recommender,
    split: Split,
    *,
    name: str,
    split_name: str = "test",
    k: int = 10,
    depth: int | None = None,
    exclude: str = "none",
    allow: Items | None = None,
    facts: dict[str, Any] | None = None,
    train_targets: Int64 | None = None,
    train_interactions: Int64 | None = None,
    seed: int = 0,
    watch: int | None = None,
) -> Evaluation:
    """Rank the whole catalogue for every row of a split.

    Args:
        recommender: Anything that ranks.
        split: Histories and targets.
        name: What the row is called in tables.
        split_name: ``valid`` or ``test``, for the record.
        k: Items kept per user; all of them where there are fewer.
        depth: How many items are asked for per user; None ranks the whole catalogue. A target behind them is not
            ranked, and metrics at cuts above both this and 10 are left out.
        exclude: ``none``, ``history`` (items of the row's history) or ``seen`` (all that the user had before).
        allow: The only items that may be returned, to any user; None for all. A row whose target is not among
            them is a miss.
        facts: Further keys of ``metrics.json`` (support, search, ...).
        train_targets: (I,) how often each item is a training target; splits metrics into warm and cold ones.
        train_interactions: (I,) how often each item occurs in training; splits metrics by popularity of the target.
            Unlike ``train_targets`` it does not depend on a recipe: parts have the same users for every row.
        seed: Seed of the bootstrap.
        watch: Beams of a recommender that searches with them and takes ``watch``, the target of each row:
            ``pruned@watch`` is the share of rows whose target the beams dropped at a step.

    Returns:
        The evaluation; its metrics lie in [0, 1].
    """
    started, k = time.perf_counter(), min(k, recommender.groups.n_groups)
    places, certified, counters, told = _ranked(
        recommender, split, name, max(k, COVERED), depth, exclude, allow, watch is not None
    )
    seconds = time.perf_counter() - started
    totals = [n if n is None else recommender.groups.total(n) for n in (train_targets, train_interactions)]
    metrics: dict[str, Any] = {"name": name, "split": split_name, "n_users": split.n_rows}
    metrics |= _judged(places.rank, depth, {"exclude": exclude}, facts or {}, seed)
    metrics["by_id"] = _shown(np.where(places.itself, places.rank, -1))
    metrics[f"coverage@{COVERED}"] = _coverage(places.items[:, :COVERED], recommender.groups, allow)
    metrics |= _parts(places.rank, *(n if n is None else n[split.target] for n in totals))
    # ``certified_at``: so many of the best titles; None: all of them.
    if watch is not None:
        metrics[f"pruned@{watch}"] = told.pop("pruned") / max(split.n_rows, 1)
    metrics |= {"certified": int(certified.sum()), "certified_at": depth, **told, "counters": counters}
    speed = round(split.n_rows / max(seconds, 1e-9), 2)
    metrics["timing"] = {"seconds": round(seconds, 3), "users_per_second": speed}
    lists = places.items[:, :k], places.scores[:, :k]
    return Evaluation(name, metrics, places.rank, *lists, certified, split.target, split.user_id)


def _ranked(
    recommender: Recommender,
    split: Split,
    name: str,
    k: int,
    depth: int | None,
    exclude: str,
    allow: Items | None,
    watch: bool = False,
) -> tuple[Places, Bool, dict[str, int], dict[str, float]]:
    """Where the targets stand and who stands first, what is certified, and the work done.

    At last, of a recommender with a tolerance, that and the number of rows with tied places, and of beams that
    ``watch`` the targets, how many they dropped.
    """
    excluded, n_rows, of_item = excluded_items(split, exclude), split.n_rows, recommender.groups.of_item
    certified, counters, told = np.ones(n_rows, dtype=bool), dict[str, int](), dict[str, float]()
    with progress(f"ranking {name}", n_rows, "users") as advance:
        if depth is None and isinstance(recommender, ItemScorer):
            history, target = split.history, split.target
            places = count_places(recommender, history, target, k, excluded, allow, advance=advance)
            return places, certified, counters, told
        places = Places.blank(n_rows, k)
        block = int(np.clip(SCORES_AT_ONCE // (depth or recommender.groups.n_groups), 1, 256))
        for start in range(0, n_rows, block):
            rows = slice(start, min(start + block, n_rows))
            n = rows.stop - start
            more: dict[str, Any] = {"watch": split.target[rows]} if watch else {}
            ranking = recommender.recommend(
                list(split.history[start : rows.stop]),
                depth,
                None if excluded is None else list(excluded[start : rows.stop]),
                None if allow is None else [allow] * n,
                **more,
            )
            places.rank[rows], places.itself[rows] = _target_rank(ranking, of_item, split.target[rows])
            width = min(k, ranking.items.shape[1])
            places.items[rows, :width] = ranking.items[:, :width]
            places.scores[rows, :width] = ranking.scores[:, :width]
            certified[rows] = ranking.certified
            if ranking.tied is not None:
                tied = told.get("tied", 0) + int((ranking.tied > 0).sum())
                told |= {"tolerance": ranking.tolerance, "tied": tied}
            if ranking.pruned is not None:
                told["pruned"] = told.get("pruned", 0) + int(ranking.pruned.sum())
            add_counters(counters, ranking.counters)
            advance(n)
    return places, certified, counters, told


def _judged(
    rank: Int32, depth: int | None, asked: dict[str, Any], facts: dict[str, Any], seed: int
) -> dict[str, Any]:
    """Metrics of all rows, what was asked, and intervals."""
    # Metrics at 10 are part of every result; a list that ends before 20 says nothing about 20.
    cuts = [cut for cut in CUTS if depth is None or cut <= max(depth, 10)]
    spread = {m: list(interval(values, seed=seed)) for m, values in metrics_from_rank(rank, cuts).items()}
    asked = asked | {"n_not_ranked": int((rank < 0).sum())} | facts
    return {**summary(rank, cuts), **asked, "intervals": spread}


def _parts(rank: Int32, targets: Float64 | None, interactions: Float64 | None) -> dict[str, Any]:
    """Metrics of rows whose target was trained or not, and by how often it occurs in training."""

    def of(rows: Bool) -> dict[str, Any]:
        return {"n_users": int(rows.sum()), **_shown(rank[rows])}

    parts: dict[str, Any] = {}
    if targets is not None:
        parts = {"warm": of(targets > 0), "cold": of(targets == 0)}
    if interactions is not None:
        parts["by_popularity"] = {
            f"{low}+" if high is None else f"{low}-{high}" if high > low else str(low): of(
                (interactions >= low) & (interactions <= (np.inf if high is None else high))
            )
            for low, high in BUCKETS
        }
    return parts


def summary(rank: Int32, cuts: Sequence[int] = CUTS) -> dict[str, float]:
    """Means over users of HR, NDCG and MRR at the usual cuts."""
    values = metrics_from_rank(rank, cuts)
    return {name: float(value.mean()) if len(rank) else 0.0 for name, value in values.items()}


def interval(values: Float64, *, seed: int = 0, n: int = RESAMPLES) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean over users.

    Args:
        values: (B,) one value per user.
        seed: Seed of the resampling; the same seed gives the same interval.
        n: Number of resamples.
    """
    if not len(values):
        return 0.0, 0.0
    rng = np.random.default_rng(seed)
    # Resampling users only needs how often each distinct value is drawn: a multinomial over a few values.
    distinct, counts = np.unique(values, return_counts=True)
    means = rng.multinomial(len(values), counts / len(values), size=n) @ distinct / len(values)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def paired_interval(a: Float64, b: Float64, *, seed: int = 0, n: int = RESAMPLES) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of ``a - b`` over the same users."""
    return interval(_difference(a, b), seed=seed, n=n)


def gain_interval(a: Float64, b: Float64, *, seed: int = 0, n: int = RESAMPLES) -> tuple[float, float]:
    """95 % bootstrap interval of ``mean(a) / mean(b) - 1`` over the same users; infinite where b may be 0."""
    _difference(a, b)
    distinct, counts = np.unique(np.stack([a, b], 1), axis=0, return_counts=True)
    sums = np.random.default_rng(seed).multinomial(len(a), counts / len(a), size=n) @ distinct
    with np.errstate(divide="ignore"):  # the less of b there is, the more is gained
        gains = np.where(sums[:, 1] > 0, sums[:, 0] / sums[:, 1] - 1, np.inf)
    low, high = np.quantile(gains, (0.025, 0.975), method="closest_observation")
    return float(low), float(high)


def paired_p(a: Float64, b: Float64, *, seed: int = 0, n: int = 10_000) -> float:
    """Two-sided p of the paired randomisation test: how often as large a difference comes from swapping a and b.

    Fisher's test with random signs (Smucker et al., CIKM 2007); the smallest value is ``1 / (n + 1)``.

    Args:
        a: (B,) one value per user.
        b: (B,) the same users.
        seed: Seed of the signs.
        n: Number of random assignments.
    """
    difference = _difference(a, b)
    size, count = np.unique(np.abs(difference), return_counts=True)
    rng = np.random.default_rng(seed)
    # Users with equally large differences need only how many of them keep their sign.
    signed = (2 * rng.binomial(count, 0.5, size=(n, len(count))) - count) @ size
    as_large = np.abs(signed) >= abs(difference.sum()) - 1e-9
    return float((1 + as_large.sum()) / (1 + n))


def _difference(a: Float64, b: Float64) -> Float64:
    if a.shape != b.shape:
        raise ValueError(f"wanted values of the same users, got {a.shape} and {b.shape}")
    return a - b


def excluded_items(split: Split, exclude: str) -> Ragged | None:
    """What each row may not get: ``none``, its ``history``, or everything ``seen``; UserError where that is unknown."""
    if exclude == "none":
        return None
    if exclude == "seen" and split.seen is None:
        raise UserError(
            "exclude = 'seen' needs everything a user had before, which this split does not know; use 'history'"
        )
    return split.seen if exclude == "seen" else split.history


def _target_rank(ranking: Ranking, group_of_item: Int32, target: Int32) -> tuple[Int32, Bool]:
    """Rank of each target's group in a full ranking (-1: absent), and whether the very item stands there."""
    listed = np.where(ranking.items >= 0, group_of_item[ranking.items], -1)
    rank = rank_in_list(listed, group_of_item[target])
    itself = ranking.items[np.arange(len(target)), np.maximum(rank, 0)] == target
    return rank, itself & (rank >= 0)


def _coverage(items: Int32, groups: Groups, allow: Items | None) -> float:
    """Share of the groups that may be returned which are in anybody's list."""
    possible = int((groups.permitted(None, allow) >= 0).sum())
    return len(np.unique(groups.of_item[items[items >= 0]])) / max(possible, 1)


def _shown(rank: Int32) -> dict[str, float]:
    """The metrics that tables show."""
    return {name: value for name, value in summary(rank).items() if name in SHOWN}


_ONE_EACH = {"rank": pl.Int32, "certified": pl.Boolean, "target": pl.Int32}  # columns of single values


class _Shown(Shape):
    hr_5: float = Field(alias="HR@5")
    hr_10: float = Field(alias="HR@10")
    ndcg_5: float = Field(alias="NDCG@5")
    ndcg_10: float = Field(alias="NDCG@10")


class _Bucket(_Shown):
    n_users: int


class _Metrics(_Shown, Hashed):
    """What is read of ``metrics.json``."""

    name: str
    split: str
    n_users: int
    seed: int
    exclude: Literal["none", "history", "seen"]
    search: Literal["beam", "exact", "catalogue", "grounding"]
    support: str
    allow: str | None
    intervals: dict[str, Annotated[list[float], Field(min_length=2, max_length=2)]]
    timing: dict[str, float]
    by_popularity: dict[str, _Bucket] = Field({})
    assistant: str = ""
    assistant_weight: float = 0.0


def load_evaluation(run: Path) -> Evaluation:
    """What ``triewise evaluate`` wrote into a run folder; UserError where a part is missing or another one."""
    if not (run / PREDICTIONS).is_file():
        raise UserError(f"wanted {run}/predictions.parquet, which is missing; run: triewise evaluate {run}")
    metrics = read_json(run / METRICS, _Metrics)
    check_files(run, metrics.pop("sha256", None), f"run: triewise evaluate {run}")
    with reading(run / PREDICTIONS):
        frame = scan(run / PREDICTIONS).collect()
        if len(frame) != metrics["n_users"]:
            raise ValueError(f"{len(frame)} rows, metrics.json is of {metrics['n_users']}")
        items = np.array(frame["items"].to_list(), dtype=np.int32)
        scores = np.array(frame["scores"].to_list(), dtype=np.float32)
        one_each = [frame[name].cast(kind) for name, kind in _ONE_EACH.items()]
        if items.ndim != 2 or items.shape != scores.shape or any(column.has_nulls() for column in one_each):
            raise ValueError("some rows are not whole")
        rank, certified, target = (column.to_numpy() for column in one_each)
        user_id = np.array(frame["user_id"].to_list(), dtype=object)
    return Evaluation(metrics["name"], metrics, rank, items, scores, certified, target, user_id)
