"""Every benchmark runs from beginning to end with ``--quick``, and its last line is the JSON object it promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("[!_]*.py"))

# What each one is asked for, and where it says itself that results were equal.
PROMISED: dict[str, set[str]] = {
    "catalogue": {"largest_gap", "titles", "work_ratio_naive_trie", "wall_ratio_kept_vocabulary"},
    "constraint": {"equal", "steps", "nodes", "vocabulary", "width"},
    "decode": {
        "same_results",
        "work_ratio_trie",
        "wall_ratio_vocabulary",
        "work_ratio_exact",
        "certified_trie",
    },
    "exact": {"equal", "largest_gap", "expansion_share", "token_forwards", "beam_10", "beam_20"},
    "families": {"families", "cells", "known", "new", "gone"},
    "lemma1": {"holds", "users", "max_ndcg_minus_msl", "max_msl_minus_lml"},
    "live": {"equal", "items", "change_seconds", "change_cpu_seconds", "longest_request_seconds", "http"},
    "loss": {"same_results", "time_ratio", "memory_ratio", "rows"},
    "prepare": {"n", "seconds", "peak_gb", "users", "items", "train_rows"},
    "ranking": {"sizes", "peak_mib_by_users", "matrix_mib_of_most_users"},
    "scale": {"sizes", "runs", "threads"},
    "sequential": {"same_targets", "ratio", "shifted_seconds", "prefix_seconds", "targets"},
    "serve": {"requests", "alone_ms", "http_ms", "overhead", "times", "overload", "afterwards"},
    "train_step": {"same_gradients", "gradient_gap", "speedup", "rows_per_second", "packing"},
    "trie_build": {"n_items", "seconds", "peak_mb", "dict_ratio", "dict_memory_ratio", "load_seconds"},
}
pytestmark = pytest.mark.skipif(not SCRIPTS, reason="a source distribution has no benchmarks")
SAYS_EQUAL = ("equal", "holds", "same_results", "same_targets", "same_gradients")


def test_every_benchmark_has_its_promise() -> None:
    assert set(PROMISED) == set(SCRIPTS)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_benchmark_runs(name: str, tmp_path: Path) -> None:
    """From a folder of its own: it leaves nothing behind, and needs neither the network nor real data."""
    done = subprocess.run(
        [sys.executable, FOLDER / f"{name}.py", "--quick"],
        cwd=tmp_path,
        env=os.environ | {"TRIEWISE_OFFLINE": "1", "TRIEWISE_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        encoding="utf-8",
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) >= PROMISED[name]
    assert all(found[key] is True for key in SAYS_EQUAL if key in found)
    assert not list(tmp_path.iterdir())
