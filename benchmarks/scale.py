"""What do loading, filters and decoding cost from a thousand titles to a million, for 1 to 64 users at once?

    python benchmarks/scale.py [--items N ...] [--batches B ...] [--runs R] [--quick]

Titles are the synthetic ones of `trie_build.py`; the model is a random Qwen2 of two layers, width 64 and 32,768 tokens,
its head scaled so that logits have a standard deviation of about 3; support is the trie. For each size one fresh
process builds and saves the trie and another one loads it and decodes. `*_peak_mb` is the highest resident memory
of that process, `*_base_mb` its memory before there was a catalogue (Python, torch and the model).

* `filter`: `TitleFilter.of` with an allow-list of half the items, an array, for one user.
* `step`: the first round of a beam search (10 beams): prompts through the model, the root expanded for all users,
  the best continuations chosen; all users of a batch in one forward. `step_filtered`: with that allow-list for
  every user, the filters made in it.
* `beam`: a whole `beam_search` with 10 beams; `exact`: `exact_search`; both top 10, engine defaults.

`first_*` are the first call in the process, which also computes what the trie and the engine keep; the others are
medians of later calls. Up to 10,000 titles `exact` is compared with `rank_catalogue`. Prompts are 32 random tokens.
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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from benchmarks._command import parsed, peak_bytes  # noqa: E402
from benchmarks.trie_build import synthetic_titles  # noqa: E402
from triewise.decoding import Counters, TrieEngine, beam_search, exact_search, rank_catalogue  # noqa: E402
from triewise.decoding.beams import Beams  # noqa: E402
from triewise.decoding.filters import TitleFilter  # noqa: E402
from triewise.decoding.growth import Growth  # noqa: E402
from triewise.decoding.scoring import Rule  # noqa: E402
from triewise.progress import note  # noqa: E402
from triewise.tokens import Trie  # noqa: E402

VOCABULARY, PROMPT, BEAMS = 32_768, 32, 10
COMPARED = 10_000  # titles up to which the whole catalogue is ranked as well


def build(path: Path, n_items: int) -> dict[str, float]:
    """Build and save in this process."""
    base = peak_bytes() / 1e6
    titles = synthetic_titles(n_items)
    seconds, trie = timed(partial(Trie.from_sequences, titles))
    saving, _ = timed(partial(trie.save, path))
    return {
        "nodes": trie.n_nodes,
        "branching": int(trie.branching.sum()),
        "root_children": int(trie.n_children[0]),
        "build_seconds": seconds,
        "save_seconds": saving,
        "file_bytes": path.stat().st_size,
        "build_base_mb": base,
        "build_peak_mb": peak_bytes() / 1e6,
    }


def serve(path: Path, batches: list[int], runs: int) -> dict[str, Any]:
    """Load, filter and decode in this process."""
    model = random_model()
    rng, base = np.random.default_rng(0), peak_bytes() / 1e6
    loading, trie = timed(partial(Trie.load, path))
    result: dict[str, Any] = {
        "load_seconds": loading,
        "serve_base_mb": base,
        "load_peak_mb": peak_bytes() / 1e6,
    }
    half = rng.permutation(trie.n_items)[: trie.n_items // 2]
    filtering = partial(TitleFilter.of, trie, None, half)
    result["first_filter_seconds"], own = timed(filtering)
    result["filter_seconds"] = median(filtering, runs)
    result["filter_list_seconds"] = median(partial(TitleFilter.of, trie, None, half.tolist()), runs)
    assert int(own.count(np.zeros(1, np.int64))[0]) == len(half)
    for batch in batches:
        prompts = rng.integers(VOCABULARY, size=(batch, PROMPT)).tolist()
        engine = TrieEngine(model, trie)
        wide = TrieEngine(model, trie, at_once=max(batch, engine.at_once))
        works: dict[str, Callable[[], Any]] = {
            "step": partial(step, wide, prompts, [None] * batch),
            "step_filtered": partial(step, wide, prompts, [half] * batch),
            "beam": partial(beam_search, engine, prompts, BEAMS, BEAMS),
            "exact": partial(exact_search, engine, prompts, BEAMS),
        }
        row: dict[str, Any] = {}
        for name, work in works.items():
            row[f"first_{name}_seconds"], found = timed(work)
            row[f"{name}_seconds"] = median(work, runs)
            if name in ("beam", "exact"):
                row |= {f"{name}_{key}": found.counters[key] for key in ("token_forwards", "rounds")}
        result[f"batch_{batch}"] = row
        if trie.n_items <= COMPARED:
            some = prompts[:4]
            ours, wanted = exact_search(engine, some, BEAMS), rank_catalogue(engine, some, BEAMS)
            assert np.abs(ours.scores - wanted.scores).max() <= 1e-4, "exact search is not exact"
            assert ours.certified.all()
    result["serve_peak_mb"] = peak_bytes() / 1e6
    return result


def random_model() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config).eval().requires_grad_(False)
    model.lm_head.weight.mul_(3 / 8 / config.initializer_range)  # states after the last norm have length 8
    return model


def step(engine: TrieEngine, prompts: list[list[int]], allow: list[Any]) -> Beams:
    """The first round of a beam search."""
    trie = engine.trie
    filters = [TitleFilter.of(trie, None, own) for own in allow]
    rule = Rule.of(trie, len(prompts), 0.0, "node", None, None, 1.0)
    growth, beams = Growth(engine, prompts, Counters()), Beams(trie, rule, filters, BEAMS, 0.0)
    beams.start(growth.admit())
    beams.update(growth.expand(*beams.request()))
    assert len(beams.live.node) + len(beams.done.node) > 0
    return beams


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def median(work: Callable[[], Any], runs: int) -> float:
    return statistics.median(timed(work)[0] for _ in range(runs))


def in_child(path: Path, options: argparse.Namespace, *more: str) -> dict[str, Any]:
    """This script's part for one size, in a process of its own."""
    command = [sys.executable, __file__, "--path", str(path), *more, "--runs", str(options.runs)]
    command += ["--threads", str(options.threads), "--batches", *map(str, options.batches)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, encoding="utf-8")
    return dict(json.loads(done.stdout))


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--build", type=int, help=argparse.SUPPRESS)
    options = parsed(parser, items=[1_000], batches=[1, 4], runs=1, threads=1)
    torch.set_num_threads(options.threads)
    if options.path:
        own = build(options.path, options.build) if options.build else None
        print(json.dumps(own or serve(options.path, options.batches, options.runs)))
        return
    sizes = []
    for n_items in options.items:
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch, "trie.npz")
            row = in_child(path, options, "--build", str(n_items))
            row |= in_child(path, options)
        row = {"items": n_items, **rounded(row)}
        sizes.append(row)
        note(
            f"{n_items} titles, {row['nodes']} nodes: build {row['build_seconds']:.2f} s, load "
            f"{row['load_seconds']:.3f} s, {row['file_bytes'] / 1e6:.1f} MB, peak {row['serve_peak_mb']:.0f} MB, "
            f"allow-list {row['filter_seconds']:.4f} s"
        )
        for batch in options.batches:
            own = row[f"batch_{batch}"]
            times = ", ".join(
                f"{name} {own[f'{name}_seconds']:.3f} s (first {own[f'first_{name}_seconds']:.3f})"
                for name in ("step", "step_filtered", "beam", "exact")
            )
            note(f"  {batch:3} users: {times}")
    print(json.dumps({"sizes": sizes, "runs": options.runs, "threads": options.threads}))


if __name__ == "__main__":
    main()
