"""What the masked softmax loss costs: head rows of valid tokens, against logits of the whole vocabulary and a mask.

Positions along real titles of amazon_books get random hidden states; the dense side is the usual formulation (all
logits, a boolean mask of the valid tokens, -inf elsewhere, log-softmax, as a mask per position is what the authors'
code stores), ours is `triewise.training.trie_nll` behind the head rows of `Trie.continuations`. Loss and gradients
are compared first, then both alternate in one process. Memory is the largest number of bytes allocated during a forward
and backward pass beyond the inputs; with a trainable head its own gradient is left out on both sides.

    python benchmarks/loss.py [--positions 256] [--vocabulary 151936] [--width 896] [--quick]

The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from benchmarks._command import parsed  # noqa: E402
from benchmarks._data import SHARED, SYNTHETIC, prepared  # noqa: E402
from triewise.models import head_rows, load_tokenizer  # noqa: E402
from triewise.tokens import Trie, build_prompts  # noqa: E402
from triewise.training import trie_nll  # noqa: E402
from triewise.training.losses import Columns  # noqa: E402


def positions(trie: Trie, n: int, n_vocabulary: int, seed: int) -> tuple[Tensor, Tensor, Trie]:
    """Nodes and targets of n decisions along titles drawn at random; tokens are spread over the vocabulary."""
    rng = np.random.default_rng(seed)
    before, offsets = trie.paths()
    nodes: list[int] = []
    targets: list[int] = []
    for item in rng.permutation(trie.n_items):
        path = [*before[offsets[item] : offsets[item + 1]].tolist(), int(trie.leaf[item])]
        for node, child in itertools.pairwise(path):
            if trie.branching[node]:
                nodes.append(node)
                targets.append(int(trie.token[child]))
        if len(nodes) >= n:
            break
    assert int(trie.token.max()) < n_vocabulary
    return torch.tensor(nodes[:n]), torch.tensor(targets[:n]), trie


def dense(hidden: Tensor, weight: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean loss with logits of every token and a mask (M, V)."""
    logits = torch.nn.functional.linear(hidden, weight).masked_fill(~mask, -torch.inf)
    return torch.nn.functional.cross_entropy(logits, target)


def sparse(
    hidden: Tensor, weight: Tensor, target: Tensor, node: Tensor, trie: Trie, tokens: Tensor
) -> Tensor:
    """Mean loss from the head rows of valid tokens."""
    logits = torch.nn.functional.linear(hidden, head_rows(weight, tokens))
    return trie_nll(logits, target, node, trie, columns=Columns(tokens, len(weight))).mean()


class Bytes(TorchDispatchMode):
    """The largest sum of bytes of storages that live at one time, of those made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[Any, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.live or self.live[storage._cdata][0]() is None:
                    self.live[storage._cdata] = (_weak(tensor), storage.nbytes())
        self.live = {key: value for key, value in self.live.items() if value[0]() is not None}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out


def _weak(tensor: Tensor) -> Callable[[], Any]:
    from torch.multiprocessing.reductions import StorageWeakRef

    ref = StorageWeakRef(tensor.untyped_storage())
    return lambda: None if ref.expired() else ref


def step(loss: Callable[[], Tensor], inputs: list[Tensor]) -> tuple[float, list[Tensor]]:
    """Loss and gradients, once."""
    for tensor in inputs:
        tensor.grad = None
    value = loss()
    value.backward()
    return float(value.detach()), [tensor.grad for tensor in inputs if tensor.grad is not None]


def measure(loss: Callable[[], Tensor], inputs: list[Tensor], left_out: int) -> int:
    """Peak bytes of one forward and backward pass beyond what was there before."""
    for tensor in inputs:
        tensor.grad = None
    given = {tensor.untyped_storage()._cdata for tensor in inputs}
    with Bytes() as counted:
        counted.live = {}
        loss().backward()
    del given
    return max(counted.peak - left_out, 1)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default=f"msl:{SHARED / 'amazon_books'}")
    parser.add_argument(
        "--tokenizer", default="smollm2-135m-q4", help="the model whose tokens titles are made of"
    )
    parser.add_argument("--positions", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    small = {"positions": 16, "vocabulary": 4096, "width": 32, "rounds": 1}
    options = parsed(parser, data=SYNTHETIC, tokenizer="tiny", **small)
    torch.set_num_threads(options.threads)
    catalog = prepared(options.data).catalog
    tokenizer = load_tokenizer(options.tokenizer, titles=catalog.title)
    prompts = build_prompts(tokenizer, catalog, "msl", "books", "read", max_history=10)
    whole = Trie.from_sequences((prompts.title_tokens.values, prompts.title_tokens.offsets))
    node, target, trie = positions(whole, options.positions, options.vocabulary, seed=0)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(len(node), options.width, generator=generator).requires_grad_()
    weight = torch.randn(options.vocabulary, options.width, generator=generator) * 0.02
    mask = torch.zeros(len(node), options.vocabulary, dtype=torch.bool)
    for row, n in enumerate(node.tolist()):
        mask[row, torch.from_numpy(trie.children(n)[0].astype(np.int64))] = True
    tokens = torch.from_numpy(trie.continuations(node.numpy()))
    rows: list[dict[str, Any]] = []
    for head in ("frozen", "trainable"):
        weight = weight.detach().requires_grad_(head == "trainable")
        inputs = [hidden, weight]
        sides: dict[str, Callable[[], Tensor]] = {
            "dense": lambda w=weight: dense(hidden, w, target, mask),  # type: ignore[misc]
            "ours": lambda w=weight: sparse(hidden, w, target, node, trie, tokens),  # type: ignore[misc]
        }
        found = {name: step(loss, inputs) for name, loss in sides.items()}
        (loss_a, grads_a), (loss_b, grads_b) = found["dense"], found["ours"]
        gaps = [float((a - b).norm() / a.norm()) for a, b in zip(grads_a, grads_b, strict=True)]
        assert abs(loss_a - loss_b) <= 1e-5 * abs(loss_a) and max(gaps) < 1e-5, (loss_a, loss_b, gaps)
        del found, grads_a, grads_b
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(options.rounds):
            for name, loss in sides.items():
                for _ in range(1 if name == "dense" else 5):
                    begun = time.perf_counter()
                    step(loss, inputs)
                    seconds[name].append(time.perf_counter() - begun)
        left_out = weight.numel() * 4 if head == "trainable" else 0
        peak = {name: measure(loss, inputs, left_out) for name, loss in sides.items()}
        medians = {name: float(np.median(values)) for name, values in seconds.items()}
        rows.append(
            {
                "head": head,
                "same_results": True,
                "time_ratio": round(medians["dense"] / medians["ours"], 1),
                "memory_ratio": round(peak["dense"] / peak["ours"], 1),
                "seconds": {name: round(value, 4) for name, value in medians.items()},
                "peak_bytes": peak,
            }
        )
        print(rows[-1], file=sys.stderr)
    facts = {"vocabulary": options.vocabulary, "width": options.width, "positions": len(node)}
    facts |= {"tokens_of_the_head": len(tokens), "threads": options.threads}
    print(json.dumps({"benchmark": "loss", **rows[0], "rows": rows, **facts}))


if __name__ == "__main__":
    main()
