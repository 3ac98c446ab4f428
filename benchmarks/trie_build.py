"""How long does the trie of a million titles take, and how much memory, against a trie of nested dicts?

    python benchmarks/trie_build.py [--items N] [--dict-items N] [--runs R] [--quick]

Titles are synthetic: 8-15 tokens with the terminator; tokens and the opening words of series are
Zipf-distributed. Each build runs in a fresh process, whose peak memory includes its input; `seconds` is from
lists of ints, the slower of the two accepted forms. Before anything is timed the trie is compared with the
dict trie, node by node, at the smaller size, where `dict_ratio` (time) and `dict_memory_ratio` are measured.
The table goes to stderr; the last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from tests.reference.trie import DictTrie  # noqa: E402

from benchmarks._command import parsed, peak_bytes  # noqa: E402
from triewise.progress import note  # noqa: E402
from triewise.tokens import Trie  # noqa: E402

VOCABULARY, TERMINATOR = 32_000, 32_000


def synthetic_titles(n_items: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Titles as ``(tokens int32, offsets int64)``; three of ten open with the words of one of many series."""
    rng = np.random.default_rng(seed)
    offsets = np.concatenate(([0], np.cumsum(rng.integers(8, 16, n_items))))
    tokens = _zipf(rng, VOCABULARY, offsets[-1])
    series = _zipf(rng, max(n_items // 20, 1), n_items)
    words = _zipf(rng, VOCABULARY, (max(n_items // 20, 1), 6))
    opening = np.where(rng.random(n_items) < 0.3, rng.integers(1, 7, n_items), 0)
    for place in range(6):
        rows = np.flatnonzero(opening > place)
        tokens[offsets[rows] + place] = words[series[rows], place]
    tokens[offsets[1:] - 1] = TERMINATOR
    return tokens, offsets


def _zipf(rng: np.random.Generator, n: int, size: int | tuple[int, int]) -> np.ndarray:
    """Numbers in [0, n) whose frequency falls as 1 / (rank + 1)."""
    return np.minimum((n + 1.0) ** rng.random(size) - 1, n - 1).astype(np.int32)


def as_lists(tokens: np.ndarray, offsets: np.ndarray) -> list[list[int]]:
    flat, bounds = tokens.tolist(), offsets.tolist()
    return [flat[low:high] for low, high in pairwise(bounds)]


def assert_equal(trie: Trie, reference: DictTrie) -> None:
    """The same nodes in the same order with the same children, and each title at its leaf."""
    level, node = [reference.root], 0
    while level:
        following = []
        for children in level:
            assert trie.children(node)[0].tolist() == sorted(children), f"other children at node {node}"
            following += [children[token] for token in sorted(children)]
            node += 1
        level = following
    assert node == trie.n_nodes
    for item, sequence in enumerate(reference.sequences):
        assert trie.walk(sequence)[-1] == trie.leaf[item], f"item {item} is not at its leaf"


def measure(path: Path, form: str) -> dict[str, float]:
    """Build once in this process: seconds, peak memory in MB, seconds to save and to load."""
    with np.load(path) as file:
        tokens, offsets = file["tokens"], file["offsets"]
    sequences = (tokens, offsets) if form == "arrays" else as_lists(tokens, offsets)
    started = time.perf_counter()
    trie = Trie.from_sequences(sequences)
    built = time.perf_counter()
    peak_mb = peak_bytes() / 1e6
    trie.save(path.with_suffix(".trie.npz"))
    saved = time.perf_counter()
    Trie.load(path.with_suffix(".trie.npz"))
    loaded = time.perf_counter()
    return {
        "seconds": built - started,
        "peak_mb": peak_mb,
        "save_seconds": saved - built,
        "load_seconds": loaded - saved,
        "n_nodes": trie.n_nodes,
    }


def measure_fresh(path: Path, form: str, runs: int) -> dict[str, list[float]]:
    command = [sys.executable, __file__, "--measure", str(path), "--form", form]
    rows = []
    for _ in range(runs):
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, encoding="utf-8")
        rows.append(json.loads(done.stdout))
    return {key: [row[key] for row in rows] for key in rows[0]}


def against_dicts(n_items: int, runs: int) -> tuple[float, float, float]:
    """Median seconds of the dict trie and of ours for the same titles; how many times more bytes it takes."""
    titles = as_lists(*synthetic_titles(n_items, seed=1))
    tracemalloc.start()
    reference = DictTrie(titles)
    dict_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    trie = Trie.from_sequences(titles)
    assert_equal(trie, reference)
    our_bytes = sum(array.nbytes for array in vars(trie).values() if isinstance(array, np.ndarray))
    seconds: tuple[list[float], list[float]] = [], []
    for _ in range(runs):
        for build, taken in zip((DictTrie, Trie.from_sequences), seconds, strict=True):
            started = time.perf_counter()
            build(titles)
            taken.append(time.perf_counter() - started)
    return statistics.median(seconds[0]), statistics.median(seconds[1]), dict_bytes / our_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--dict-items", type=int, default=40_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--form", choices=("lists", "arrays"), help=argparse.SUPPRESS)
    settings = parsed(parser, items=5_000, dict_items=2_000, runs=1)
    if settings.measure:
        print(json.dumps(measure(settings.measure, settings.form)))
        return
    note(f"comparing with the dict trie at {settings.dict_items} titles")
    dict_seconds, our_seconds, memory_ratio = against_dicts(settings.dict_items, settings.runs)
    note(f"equal; dict trie {dict_seconds:.3f} s, ours {our_seconds:.3f} s, {memory_ratio:.0f}x less memory")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "titles.npz"
        tokens, offsets = synthetic_titles(settings.items)
        np.savez(path, tokens=tokens, offsets=offsets)
        results = {form: measure_fresh(path, form, settings.runs) for form in ("lists", "arrays")}
    median = {form: {key: statistics.median(v) for key, v in rows.items()} for form, rows in results.items()}
    for form, rows in results.items():
        low, high = min(rows["seconds"]), max(rows["seconds"])
        note(
            f"{settings.items} titles from {form}: {median[form]['seconds']:.2f} s ({low:.2f}-{high:.2f}), "
            f"peak {median[form]['peak_mb']:.0f} MB, {median[form]['n_nodes']:.0f} nodes"
        )
    lists, arrays = median["lists"], median["arrays"]
    report = {
        "n_items": settings.items,
        "seconds": round(lists["seconds"], 3),
        "peak_mb": round(max(results["lists"]["peak_mb"])),
        "tokens_per_second": round(len(tokens) / lists["seconds"]),
        "dict_ratio": round(dict_seconds / our_seconds, 1),
        "dict_memory_ratio": round(memory_ratio, 1),
        "load_seconds": round(lists["load_seconds"], 3),
        "save_seconds": round(lists["save_seconds"], 3),
        "seconds_from_arrays": round(arrays["seconds"], 3),
        "peak_mb_from_arrays": round(max(results["arrays"]["peak_mb"])),
        "tokens_per_second_from_arrays": round(len(tokens) / arrays["seconds"]),
        "n_tokens": len(tokens),
        "n_nodes": int(lists["n_nodes"]),
        "dict_items": settings.dict_items,
        "runs": settings.runs,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
