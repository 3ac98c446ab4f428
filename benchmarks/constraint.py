"""What does the constraint cost in one decoding step, on top of the model's logits?

    python benchmarks/constraint.py [--rows N ...] [--items N] [--runs R] [--decisions] [--quick]

Rows are beams at inner nodes of a catalogue of synthetic titles (those of `trie_build.py`; a node is drawn by the
number of titles under it), with the width and vocabulary of a 135M model and random hidden states. Most inner nodes
have one valid token; `--decisions` draws from the others only, as the searches ask in trie support. A step ends with
the log-probabilities of the valid next tokens, normalised over these, and the best 20 of each row. Four ways:

* `callback`: transformers' `PrefixConstrainedLogitsProcessor` with a Python callback over a trie of dicts, then
  log-softmax and top-k, as the authors of MSL, D3 and IGD decode.
* `mask`: one boolean mask (rows, vocabulary) filled from the flat trie, then masked log-softmax and top-k.
* `gather`: `Children.below` and `TrieEngine.log_softmax`, from the same logits.
* `hidden`: `Children.below` and `TrieEngine.edges`, from hidden states: logits of the vocabulary are never made.
  It is compared with `head_mask`, the whole head and then `mask`.

Before anything is timed all four agree on every valid edge (1e-4) and allow nothing else. Then they alternate in
one process; reported are medians in milliseconds a step. At 4,096 rows the dense ways need 5 GB of memory (`--rows`
takes fewer). The table goes to stderr; the last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from tests.reference.trie import DictTrie  # noqa: E402

from benchmarks._command import parsed  # noqa: E402
from benchmarks.trie_build import as_lists, synthetic_titles  # noqa: E402
from triewise.decoding import Counters, TrieEngine  # noqa: E402
from triewise.decoding.engine import Children  # noqa: E402
from triewise.models import head_weight  # noqa: E402
from triewise.progress import note  # noqa: E402
from triewise.tokens import Trie  # noqa: E402

VOCABULARY, WIDTH = 49_152, 576  # of SmolLM2-135M
PROMPT = 64  # tokens before the title, which a callback is handed with every row
TOP = 20  # twice ten beams
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Step:
    """One decoding step.

    Attributes:
        node: (R,) where the beams are.
        ids: (R, T) prompt and prefix, padded on the left.
        length: tokens of each prefix.
        hidden: (R, D) float32.
        logits: (R, V) float32, the head applied to ``hidden``.
    """

    node: NDArray[np.int64]
    ids: Tensor
    length: list[int]
    hidden: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Bench:
    """The catalogue in both forms, and the model."""

    trie: Trie
    slow: DictTrie
    engine: TrieEngine
    weight: Tensor

    @classmethod
    def of(cls, n_items: int, seed: int) -> Bench:
        """Synthetic titles and a random model."""
        from transformers import Qwen2Config, Qwen2ForCausalLM

        torch.manual_seed(seed)
        shape = {"num_hidden_layers": 1, "num_attention_heads": 9, "num_key_value_heads": 3}
        config = Qwen2Config(vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=WIDTH, **shape)
        model = Qwen2ForCausalLM(config).eval().requires_grad_(False)
        titles = synthetic_titles(n_items, seed)
        trie = Trie.from_sequences(titles)
        return cls(trie, DictTrie(as_lists(*titles)), TrieEngine(model, trie), head_weight(model))

    def step(self, n_rows: int, decisions: bool, rng: np.random.Generator) -> Step:
        """Beams at random nodes."""
        allowed = np.flatnonzero(self.trie.branching if decisions else ~self.trie.is_leaf)[1:]
        below = (self.trie.item_hi - self.trie.item_lo)[allowed]
        node = rng.choice(allowed, size=n_rows, p=below / below.sum())
        prefixes = [self.trie.token[self.trie.path_to(int(n))] for n in node]
        length = self.trie.depth[node]
        ids = torch.zeros(n_rows, PROMPT + int(length.max()), dtype=torch.long)
        for row, prefix in zip(ids, prefixes, strict=True):
            row[len(row) - len(prefix) :] = torch.from_numpy(prefix)
        hidden = 6 * torch.randn(n_rows, WIDTH)  # logits then have a standard deviation of 3
        return Step(node, ids, length.tolist(), hidden, torch.nn.functional.linear(hidden, self.weight))

    def callback(self, step: Step) -> Tensor:
        """(R, V) log-probabilities, -inf where a token is not valid."""
        from transformers import PrefixConstrainedLogitsProcessor

        def allowed(row: int, ids: Tensor) -> list[int]:
            return list(self.slow.node(ids[len(ids) - step.length[row] :].tolist()))

        return PrefixConstrainedLogitsProcessor(allowed, num_beams=1)(step.ids, step.logits).log_softmax(-1)

    def mask(self, step: Step, logits: Tensor | None = None) -> Tensor:
        """The same, without Python in the loop."""
        size = self.trie.n_children[step.node]
        row = np.repeat(np.arange(len(size)), size)
        child = np.arange(len(row)) + np.repeat(
            self.trie.child_ptr[step.node] - (np.cumsum(size) - size), size
        )
        valid = torch.zeros(len(size), VOCABULARY, dtype=torch.bool)
        valid[torch.from_numpy(row), torch.from_numpy(self.trie.token[child].astype(np.int64))] = True
        logits = step.logits if logits is None else logits
        return logits.masked_fill(~valid, -torch.inf).log_softmax(-1)

    def head_mask(self, step: Step) -> Tensor:
        """The same from hidden states, by way of all logits."""
        return self.mask(step, torch.nn.functional.linear(step.hidden, self.weight))

    def gather(self, step: Step) -> tuple[Children, Tensor]:
        """The edges and their log-probabilities (E,)."""
        children = Children.below(self.trie, step.node)
        return children, self.engine.log_softmax(children, step.logits)

    def hidden(self, step: Step) -> tuple[Children, Tensor]:
        """The same from hidden states."""
        children = Children.below(self.trie, step.node)
        return children, self.engine.edges(children, step.hidden[None], Counters())[0]


def best_dense(log_p: Tensor) -> Any:
    return log_p.topk(TOP)


def best_edges(found: tuple[Children, Tensor]) -> Any:
    """The best edges of each row, as the searches choose them."""
    children, log_p = found
    order = np.lexsort((children.node, -log_p.numpy(), children.row))
    row = children.row[order]
    return order[np.arange(len(row)) - np.searchsorted(row, row) < TOP]


def assert_equal(bench: Bench, step: Step) -> int:
    """All ways give the same log-probabilities to the same tokens; the number of edges."""
    children, ours = bench.gather(step)
    _, from_hidden = bench.hidden(step)
    assert (ours - from_hidden).abs().max() <= TOLERANCE, "gather and hidden differ"
    at = torch.from_numpy(children.row), torch.from_numpy(bench.trie.token[children.node].astype(np.int64))
    for name in ("callback", "mask", "head_mask"):
        dense = getattr(bench, name)(step)
        assert int(torch.isfinite(dense).sum()) == len(ours), f"{name} allows other tokens"
        assert (dense[at] - ours).abs().max() <= TOLERANCE, f"{name} gives other log-probabilities"
    return len(ours)


def measure(bench: Bench, step: Step, runs: int) -> dict[str, float]:
    """Median milliseconds of each way."""
    ways: dict[str, tuple[Callable[[Step], Any], Callable[[Any], Any]]] = {
        "callback": (bench.callback, best_dense),
        "mask": (bench.mask, best_dense),
        "gather": (bench.gather, best_edges),
        "head_mask": (bench.head_mask, best_dense),
        "hidden": (bench.hidden, best_edges),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(runs):
        for name, (way, best) in ways.items():
            started = time.perf_counter()
            best(way(step))
            taken[name].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(times) for name, times in taken.items()}


@torch.inference_mode()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10, 64, 256, 1024, 4096])
    parser.add_argument("--items", type=int, default=40_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--decisions", action="store_true", help="only nodes with more than one valid token")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parsed(parser, rows=[4, 16], items=1_000, runs=1, threads=1)
    torch.set_num_threads(options.threads)
    bench, rng = Bench.of(options.items, options.seed), np.random.default_rng(options.seed)
    note(f"{bench.trie}; {VOCABULARY} tokens; milliseconds a step")
    note(f"{'rows':>6}{'edges':>8}{'callback':>11}{'mask':>10}{'gather':>9}{'head_mask':>11}{'hidden':>9}")
    lines = []
    for n_rows in options.rows:
        step = bench.step(n_rows, options.decisions, rng)
        n_edges = assert_equal(bench, step)
        ms = measure(bench, step, options.runs)
        note(
            f"{n_rows:6}{n_edges:8}{ms['callback']:11.2f}{ms['mask']:10.2f}{ms['gather']:9.3f}"
            f"{ms['head_mask']:11.2f}{ms['hidden']:9.3f}"
        )
        lines.append(
            {
                "rows": n_rows,
                "edges": n_edges,
                **{f"{name}_ms": round(value, 3) for name, value in ms.items()},
                "callback_ratio": round(ms["callback"] / ms["gather"], 1),
                "mask_ratio": round(ms["mask"] / ms["gather"], 1),
                "hidden_ratio": round(ms["head_mask"] / ms["hidden"], 1),
            }
        )
    facts = {
        "decisions": options.decisions,
        "items": options.items,
        "nodes": bench.trie.n_nodes,
        "vocabulary": VOCABULARY,
        "width": WIDTH,
    }
    print(
        json.dumps({"equal": True, "steps": lines, **facts, "runs": options.runs, "threads": options.threads})
    )


if __name__ == "__main__":
    main()
