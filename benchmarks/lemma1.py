"""Does MSL's Lemma 1 hold for every test user of a trained run?

For each user: -ln NDCG of the full ranking by P_valid <= MSL loss of the target title <= LML loss of it. The last line
of stdout is one JSON object.

    python benchmarks/lemma1.py RUN | --quick
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from benchmarks._command import parsed  # noqa: E402
from benchmarks._data import quick_run  # noqa: E402
from triewise import load  # noqa: E402
from triewise.app import open_run  # noqa: E402
from triewise.data import load_dataset  # noqa: E402
from triewise.decoding import TrieEngine, rank_catalogue  # noqa: E402

SLACK = 1e-3  # nats; float32 sums over a title


def check(run: Path) -> None:
    """Print the largest violation of each half of the lemma."""
    _, facts = open_run(run)
    recommender = load(run)
    test = load_dataset(Path(facts["data"]["folder"])).test
    engines = {s: TrieEngine(recommender.backbone.model, recommender.trie, s) for s in ("trie", "vocabulary")}
    group = recommender.groups.of_item
    first, second = [], []
    for start in range(0, test.n_rows, 16):
        rows = range(start, min(start + 16, test.n_rows))
        prompts = [recommender.prompts.encode(test.history[r]) for r in rows]
        target = group[test.target[rows.start : rows.stop]][:, None]
        found = {name: rank_catalogue(engine, prompts) for name, engine in engines.items()}
        match = {name: group[ranking.items] == target for name, ranking in found.items()}
        loss = {name: -found[name].scores[match[name]] for name in found}
        log_ndcg = np.log(np.log2(match["trie"].argmax(1) + 2))
        first.append(log_ndcg - loss["trie"])
        second.append(loss["trie"] - loss["vocabulary"])
    worst = [float(np.concatenate(part).max()) for part in (first, second)]
    result = {
        "run": str(run),
        "users": test.n_rows,
        "max_ndcg_minus_msl": round(worst[0], 6),
        "max_msl_minus_lml": round(worst[1], 6),
        "holds": max(worst) <= SLACK,
    }
    print(json.dumps(result))


def main() -> None:
    """Check the run of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, nargs="?", help="a trained run such as runs/demo/msl")
    options = parsed(parser)
    if (options.run is None) != options.quick:
        parser.error("wanted either a run or --quick")
    with tempfile.TemporaryDirectory() as scratch:
        check(options.run or quick_run(Path(scratch)))


if __name__ == "__main__":
    main()
