"""Does exact search give the full ranking's best titles, for how much work, and how often do beams miss one?

    python benchmarks/exact.py RUN [--users N] [--k K] [--seed S]
    python benchmarks/exact.py --quick
    python benchmarks/exact.py RUN --union SOURCE SOURCE ... [--change KEY=VALUE ...]

RUN is a trained run. For every test user (or N of them, drawn with the seed) `exact_search` is compared with
`rank_catalogue` score for score (1e-4) in the run's support; then come beams of 10 and 20: how many users they serve
with all true best K, and which share of the titles they miss. `expansion_share` is the mean number of expanded
prefixes over the nodes with a decision.

With `--union` the catalogues and rows of several sources (`msl:DIR`, `d3:DIR`, ...) become one data set beside RUN, and
where RUN is no run yet, `office/msl` is trained on it first, with these changes. The last line of stdout is one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from benchmarks._command import parsed  # noqa: E402
from benchmarks._data import quick_run  # noqa: E402
from triewise.app import open_run, train_run  # noqa: E402
from triewise.data import Split, load_dataset, prepare  # noqa: E402
from triewise.data.splits import NAMES  # noqa: E402
from triewise.decoding import beam_search, exact_search, rank_catalogue  # noqa: E402
from triewise.progress import progress  # noqa: E402
from triewise.ranking.ranking import add_counters  # noqa: E402
from triewise.recipe import load_recipe  # noqa: E402
from triewise.recommenders import GenerativeRecommender  # noqa: E402

BLOCK = 64
MAX_HISTORY = 10


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--users", type=int, default=1 << 30)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--union", nargs="+", metavar="SOURCE", default=[])
    parser.add_argument("--change", action="append", default=[], help="of the recipe that is trained")
    options = parsed(parser, users=8)
    if (options.run is None) != options.quick:
        parser.error("wanted either a run or --quick")
    with tempfile.TemporaryDirectory() as scratch:
        options.run = options.run or quick_run(Path(scratch))
        if options.union and not (options.run / "recommender.json").is_file():
            _train_union(options.union, options.run, options.change)
        compare(options)


def compare(options: argparse.Namespace) -> None:
    """The searches on the run, user by user."""
    _, facts = open_run(options.run)
    recommender = GenerativeRecommender.from_pretrained(options.run)
    test, k = load_dataset(Path(facts["data"]["folder"])).test, options.k
    engine, n_users = recommender.engine, min(options.users, test.n_rows)
    drawn = np.sort(np.random.default_rng(options.seed).permutation(test.n_rows)[:n_users])
    searches: dict[str, Any] = {
        "catalogue": lambda texts: rank_catalogue(engine, texts, k),
        "exact": lambda texts: exact_search(engine, texts, k),
        "beam_10": lambda texts: beam_search(engine, texts, k, max(10, k)),
        "beam_20": lambda texts: beam_search(engine, texts, k, max(20, k)),
    }
    counters: dict[str, dict[str, int]] = {name: {} for name in searches}
    seconds = dict.fromkeys(searches, 0.0)
    sums: dict[str, list[float]] = {"all": [], "missed": [], "certified": []}
    tallies = {name: {key: list(value) for key, value in sums.items()} for name in ("beam_10", "beam_20")}
    gap, unequal, uncertified = 0.0, 0, 0
    with progress("exact search", n_users, "users") as advance:
        for start in range(0, n_users, BLOCK):
            rows = drawn[start : start + BLOCK].tolist()
            texts = [recommender.prompts.encode(test.history[r]) for r in rows]
            found = {}
            for name, search in searches.items():
                begun = time.perf_counter()
                found[name] = search(texts)
                seconds[name] += time.perf_counter() - begun
                add_counters(counters[name], found[name].counters)
            difference = np.abs(found["exact"].scores - found["catalogue"].scores).max(1)
            gap, unequal = max(gap, float(difference.max())), unequal + int((difference > 1e-4).sum())
            uncertified += int((~found["exact"].certified).sum())
            true = found["catalogue"].items
            for name, tally in tallies.items():
                missed = (true[:, :, None] != found[name].items[:, None, :]).all(2)
                tally["all"] += (~missed.any(1)).tolist()
                tally["missed"] += missed.mean(1).tolist()
                tally["certified"] += found[name].certified.tolist()
            advance(len(rows))
    n_branching = int(recommender.trie.branching.sum())
    expansions = counters["exact"]["expansions"] / n_users
    result = {
        "run": options.run.name,
        "source": " + ".join(_named(source) for source in options.union or [facts["data"]["source"]]),
        "support": recommender.support,
        "users": n_users,
        "equal": unequal == 0,
        "largest_gap": gap,
        "uncertified": uncertified,
        "titles": recommender.trie.n_groups,
        "branching": n_branching,
        "expansions": round(expansions, 2),
        "expansion_share": round(expansions / n_branching, 4),
        "token_forwards": {name: round(c["token_forwards"] / n_users, 1) for name, c in counters.items()},
        "tree_tokens": {name: round(c["tree_tokens"] / n_users, 1) for name, c in counters.items()},
        "seconds_per_user": {name: round(s / n_users, 5) for name, s in seconds.items()},
        **{
            name: {
                "users_with_all": round(float(np.mean(tally["all"])), 4),
                "missed_share": round(float(np.mean(tally["missed"])), 4),
                "certified": round(float(np.mean(tally["certified"])), 4),
            }
            for name, tally in tallies.items()
        },
    }
    print(f"equal: {result['equal']}, largest gap {gap:.2g}", file=sys.stderr)
    print(json.dumps(result))


def _train_union(sources: list[str], run: Path, changes: list[str]) -> None:
    """Train on all sources as one data set: written in the layout of MSL, items and users renumbered."""
    data, n_items = run.with_name(f"{run.name}-data"), 0
    titles: dict[str, str] = {}
    rows: dict[str, list[pl.DataFrame]] = {name: [] for name in NAMES}
    with tempfile.TemporaryDirectory() as scratch:
        for number, source in enumerate(sources):
            part = prepare(source, Path(scratch, str(number)), max_history=MAX_HISTORY)
            titles |= {str(n_items + item): title for item, title in enumerate(part.catalog.title)}
            for name in NAMES:
                rows[name].append(_msl_frame(getattr(part, name), n_items, f"{number}-"))
            n_items += part.catalog.n_items
        folder = Path(scratch, "union")
        folder.mkdir()
        (folder / "id2name4Rec.json").write_text(json.dumps(titles), encoding="utf-8")
        for name in NAMES:
            pl.concat(rows[name]).write_csv(folder / f"{name}.csv")
        source = f"msl:{folder}"
        prepare(source, data, max_history=MAX_HISTORY)
        fixed = [f"data.source={source}", f"data.folder={data}", f"data.max_history={MAX_HISTORY}"]
        train_run(load_recipe("office/msl", [*fixed, *changes]), run)


def _named(source: str) -> str:
    """A source without the place of its folder."""
    kind, _, folder = source.partition(":")
    return f"{kind}:{Path(folder).name}" if folder else kind


def _msl_frame(split: Split, first: int, user: str) -> pl.DataFrame:
    """Rows as MSL writes them, items counted from ``first``; rows without a user get one of their own."""
    return pl.DataFrame(
        {
            "user_id": [f"{user}{r if u is None else u}" for r, u in enumerate(split.user_id)],
            "item_ids": [
                str([first + int(i) for i in (*split.history[r], split.target[r])])
                for r in range(split.n_rows)
            ],
            "timestamp": split.timestamp,
        }
    )


if __name__ == "__main__":
    main()
