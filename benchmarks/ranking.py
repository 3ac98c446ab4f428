"""Full-rank evaluation by counting against sort-and-loop, and its memory when there are ten times as many users.

Sort-and-loop is what evaluation scripts do: sort all scores of a user, look for the target in the list, and add up
metrics in Python. Both sides get the same scores, are asked for the same metrics, and must agree on every user
before a time is taken. Scores are dot products of random vectors (SASRec's form), rounded so that some tie. Times
are processor time of one thread, so that others on the machine do not count: with the scores made beforehand
(ranking alone) and with them made on the way; also with a sort that is faster and breaks ties anyhow. Memory: the
peak that is allocated, less the results, for U and 10 U users.

    python benchmarks/ranking.py [--items N ...] [--users N] [--repeats R] [--quick]

Prints progress on stderr and one JSON object on stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import tracemalloc
from dataclasses import dataclass
from functools import partial
from math import log2
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from benchmarks._command import parsed  # noqa: E402
from triewise.ranking import Groups, ItemLists, Ranking, metrics_from_rank, rank_items  # noqa: E402
from triewise.ranking.target_ranks import Places, count_places  # noqa: E402

CUTS = (1, 5, 10, 20)
K = 20


@dataclass(frozen=True)
class Vectors:
    """A recommender of dot products: the history is the number of the user."""

    groups: Groups
    user: NDArray[np.float32]
    item: NDArray[np.float32]

    def item_scores(self, histories: ItemLists) -> NDArray[np.float32]:
        """(B, I) float32."""
        scores = self.user[[int(history[0]) for history in histories]] @ self.item.T
        return np.round(scores, 2, out=scores)

    def recommend(
        self, histories: ItemLists, k: int | None = 10, exclude: Any = None, allow: Any = None
    ) -> Ranking:
        """By sorting."""
        return rank_items(self, histories, k, exclude, allow)


@dataclass(frozen=True)
class Table(Vectors):
    """The same with scores that are there already."""

    table: NDArray[np.float32]

    def item_scores(self, histories: ItemLists) -> NDArray[np.float32]:
        """(B, I) float32, a view."""
        first = int(histories[0][0])
        return self.table[first : first + len(histories)]


def sort_and_loop(
    scores: NDArray[np.float32],
    target: NDArray[np.int64],
    seen: list[NDArray[np.int64]],
    kind: Literal["stable", "quicksort"] = "stable",
) -> tuple[dict[str, float], list[list[int]]]:
    """Metrics and the best items of some users, a user at a time."""
    total = {f"{name}@{k}": 0.0 for k in CUTS for name in ("HR", "NDCG", "MRR")}
    best = []
    for row, wanted, without in zip(scores, target.tolist(), seen, strict=True):
        row = row.copy()
        row[without] = -np.inf
        order = np.argsort(-row, kind=kind)
        found = np.where(order == wanted)[0]
        rank = int(found[0]) if row[wanted] > -np.inf else len(row)
        for k in CUTS:
            if rank < k:
                total[f"HR@{k}"] += 1
                total[f"NDCG@{k}"] += 1 / log2(rank + 2)
                total[f"MRR@{k}"] += 1 / (rank + 1)
        best.append(order[:K].tolist())
    return total, best


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, nargs="+", default=[3_416, 20_000, 100_000])
    parser.add_argument("--users", type=int, default=400)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--seen", type=int, default=50, help="items of each user that may not be returned")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parsed(parser, items=[500, 2_000], users=40, repeats=1)
    sizes = {str(n): measured(n, options) for n in options.items}
    memory = {str(n): held(n, options) for n in (options.users, 10 * options.users)}
    found = {
        "sizes": sizes,
        "peak_mib_by_users": memory,
        "matrix_mib_of_most_users": round(10 * options.users * max(options.items) * 4 / 2**20),
        "users": options.users,
        "width": options.width,
        "seen": options.seen,
    }
    print(json.dumps(found))


def world(n_users: int, n_items: int, options: argparse.Namespace) -> tuple[Vectors, NDArray[np.int64], Any]:
    """Vectors, targets and what each user has seen."""
    rng = np.random.default_rng(options.seed)
    user = rng.standard_normal((n_users, options.width)).astype(np.float32)
    item = rng.standard_normal((n_items, options.width)).astype(np.float32)
    model = Vectors(Groups.from_labels(np.arange(n_items)), user, item)
    # The best of a hundred random items: rarely the first, mostly among the first hundredth.
    candidates = rng.integers(0, n_items, (n_users, 100))
    target = np.array([c[np.argmax(item[c] @ u)] for c, u in zip(candidates, user, strict=True)])
    seen = rng.integers(0, n_items, (n_users, options.seen))
    seen = [np.setdiff1d(s, t) for s, t in zip(seen, target, strict=True)]
    return model, target, seen


def measured(n_items: int, options: argparse.Namespace) -> dict[str, float]:
    """Times of both ways for one size of the catalogue, best of a few runs in turn, after they agreed."""
    model, target, seen = world(options.users, n_items, options)
    histories = [[u] for u in range(options.users)]
    at_once = max(1, (1 << 24) // n_items)
    parts = [slice(s, min(s + at_once, options.users)) for s in range(0, options.users, at_once)]
    blocks = [model.item_scores(histories[part]) for part in parts]
    scores = np.concatenate(blocks) if len(blocks) > 1 else blocks[0]
    table = Table(model.groups, model.user, model.item, scores)

    def slow(
        fresh: bool, kind: Literal["stable", "quicksort"] = "stable"
    ) -> tuple[dict[str, float], list[list[int]]]:
        total: dict[str, float] = {}
        best: list[list[int]] = []
        for part in parts:
            made = model.item_scores(histories[part]) if fresh else scores[part]
            metrics, top = sort_and_loop(made, target[part], seen[part], kind)
            total = {name: total.get(name, 0.0) + value for name, value in metrics.items()}
            best += top
        return {name: value / options.users for name, value in total.items()}, best

    def fast(fresh: bool) -> tuple[dict[str, float], Places]:
        places = count_places(model if fresh else table, histories, target, K, seen)
        values = metrics_from_rank(places.rank, CUTS)
        return {name: float(value.mean()) for name, value in values.items()}, places

    for fresh in (False, True):
        wanted, lists = slow(fresh)
        found, places = fast(fresh)
        assert set(found) == set(wanted), "other metrics"
        for name, value in wanted.items():
            assert abs(found[name] - value) < 1e-9, f"{name}: {found[name]} by counting, {value} by sorting"
        assert places.items.tolist() == lists, "other items"
    seconds: dict[str, float] = {}
    for _ in range(options.repeats):
        for name, work in (
            ("sorted", slow),
            ("quicksorted", partial(slow, kind="quicksort")),
            ("counted", fast),
        ):
            for fresh in (False, True):
                started = time.process_time()
                work(fresh)
                key = f"{name}_with_scoring" if fresh else name
                seconds[key] = min(seconds.get(key, np.inf), time.process_time() - started)
    result = {f"ms_a_user_{name}": round(1e3 * value / options.users, 4) for name, value in seconds.items()}
    result["ratio"] = round(seconds["sorted"] / seconds["counted"], 2)
    result["ratio_with_scoring"] = round(seconds["sorted_with_scoring"] / seconds["counted_with_scoring"], 2)
    result["ratio_quicksort"] = round(seconds["quicksorted"] / seconds["counted"], 2)
    result["HR@10"] = round(found["HR@10"], 4)
    print(f"{n_items} items: {result}", file=sys.stderr)
    return result


def held(n_users: int, options: argparse.Namespace) -> float:
    """MiB allocated at the peak of a ranking of the largest catalogue, less its results."""
    model, target, seen = world(n_users, max(options.items), options)
    histories = [[u] for u in range(n_users)]
    tracemalloc.start()
    places = count_places(model, histories, target, K, seen)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    results = sum(array.nbytes for array in vars(places).values())
    print(f"{n_users} users: peak {peak / 2**20:.1f} MiB, results {results / 2**20:.1f}", file=sys.stderr)
    return round((peak - results) / 2**20, 1)


if __name__ == "__main__":
    main()
