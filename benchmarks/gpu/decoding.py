"""Part: decoding along the tree of the amazon_books titles, models of 1.5B and 0.5B with random weights.

Milliseconds a user are wall time of a whole call over its users, prompts included; the floor is what the positions
that were run need at the measured rates of the device. Titles have the ids of the tokenizer that was brought (49,152
tokens), in models with heads of 151,936: the tree has its true shape, the weights mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.data import Options, dataset, prompts_of
from benchmarks.gpu.report import Report, Row, ceilings, fast_path, kernels, peak_gb, pieces, timed
from benchmarks.gpu.shapes import Shape, build, shape_of
from triewise.decoding import Counters, TrieEngine, beam_search, exact_search, rank_catalogue
from triewise.decoding.treecache import TreeCache

KINDS: dict[str, Callable[..., Any]] = {
    "exact10": partial(exact_search, k=10),
    "beam10": partial(beam_search, k=10, beams=10),
    "beam50": partial(beam_search, k=50, beams=50),
    "catalogue": partial(rank_catalogue, k=10),
}
FIRST = (("exact10", 256), ("beam10", 256))
THEN = (("exact10", 64), ("exact10", 512), ("catalogue", 64), ("beam50", 256), ("exact10", 8), ("exact10", 1))
LAST = (
    *(("beam10", 512), ("beam10", 64), ("beam10", 8), ("beam10", 1), ("beam50", 64), ("beam50", 8)),
    *(("catalogue", 8), ("catalogue", 1), ("beam50", 1), ("beam50", 512), ("catalogue", 256)),
)
REPEATS, SECONDS = 5, 4.0  # timed calls of a cell, and how long they may take together
USERS = 8  # of the reference


class World:
    """Prompts of test users, the tree, and what was measured of the device."""

    def __init__(self, report: Report, options: Options) -> None:
        self.report, self.options = report, options
        data = dataset(options, "amazon_books")
        prompts, self.trie = prompts_of(options, data, "msl")
        rng = np.random.default_rng(0)
        rows = rng.permutation(data.test.n_rows)[:2048]
        self.texts = [prompts.encode(data.test.history[int(r)]) for r in rows]
        self.vocabulary = len(prompts.tokenizer)
        self.titles = [ids.tolist() for ids in prompts.title_tokens]
        self.rates: Row = {"flops_per_second": 1e12, "bytes_per_second": 1e12}
        lengths = np.array([len(text) for text in self.texts])
        branching = int(self.trie.branching.sum())
        report.value["world"] = {
            "titles": self.trie.n_groups,
            "nodes": self.trie.n_nodes,
            "branching": branching,
            "prompt_tokens_mean": lengths.mean(),
            "prompt_tokens_90": np.quantile(lengths, 0.9),
            "tokenizer": len(prompts.tokenizer),
        }

    def users(self, batch: int, turn: int) -> list[list[int]]:
        """Another ``batch`` users each turn."""
        at = np.arange(turn * batch, (turn + 1) * batch) % len(self.texts)
        return [self.texts[i] for i in at]


def run(report: Report, options: Options) -> None:
    """Most valuable first."""
    world = World(report, options)

    def measure_device(row: Row) -> None:
        world.rates = ceilings(options.device, options.half, 256 if options.tiny else 8192)
        row |= world.rates

    report.run("device", measure_device)
    engines: dict[str, tuple[TrieEngine, Shape]] = {}
    for name in ("1.5B", "0.5B"):
        report.run(f"{name} build", partial(_build, world, name, engines))
    sizes = {256: 4, 512: 6, 64: 3, 8: 2, 1: 1} if options.tiny else {}
    first = ((FIRST, "1.5B"), (THEN[:2], "1.5B"), (FIRST, "0.5B"))
    for cells, name in first[:1] if options.tiny else first:
        _cells(world, engines, name, cells, sizes)
        if name == "1.5B" and cells is FIRST and name in engines:
            report.run("1.5B pieces", partial(_pieces, world, *engines[name], sizes.get(256, 256)))
            report.run("1.5B prompts", partial(_prompts, world, *engines[name], sizes.get(256, 256)))
            report.run("1.5B kernels", partial(_kernels, world, engines[name][0], sizes.get(256, 256)))
    if "1.5B" in engines:
        report.run("1.5B generate", partial(_generate, world, engines["1.5B"][0]), needs_s=12)
        report.run("1.5B agreement", partial(_agreement, world, *engines["1.5B"]), needs_s=6)
    rest = ((THEN[2:], "1.5B"), (THEN, "0.5B"), (LAST, "1.5B"), (LAST, "0.5B"))
    for cells, name in ((THEN[2:4], "1.5B"),) if options.tiny else rest:
        _cells(world, engines, name, cells, sizes)


def _build(world: World, name: str, engines: dict[str, tuple[TrieEngine, Shape]], row: Row) -> None:
    options = world.options
    shape = shape_of(name, options.tiny, world.vocabulary)
    seconds, model = timed(
        lambda: build(shape, options.device, options.half, peaked=True).requires_grad_(False), options.device
    )
    engine = TrieEngine(model, world.trie, "trie")
    fast_path(engine, row, "")
    row |= {"build_seconds": seconds, "parameters": model.num_parameters(), "dtype": str(options.half)}
    row |= {"attention": model.config._attn_implementation, "body_weights": shape.body}
    engines[name] = engine, shape


def _cells(world: World, engines: dict[str, Any], name: str, cells: Any, sizes: dict[int, int]) -> None:
    if name not in engines:
        return
    engine, shape = engines[name]
    for kind, users in cells:
        needs = 8.0 if kind in ("catalogue", "beam50") else 4.0
        work = partial(_cell, world, engine, shape, kind, sizes.get(users, users))
        world.report.run(f"{name} {kind} batch {users}", work, needs_s=1.0 if world.options.tiny else needs)


def _cell(world: World, engine: TrieEngine, shape: Shape, kind: str, batch: int, row: Row) -> None:
    """Milliseconds a user of one search at one batch."""
    device, search = world.options.device, KINDS[kind]
    engine.at_once = batch
    peak_gb(device, reset=True)
    first, _ = timed(partial(search, engine, world.users(batch, 0)), device)
    row["first_ms"] = 1e3 * first
    seconds: list[float] = []
    rankings: list[Any] = []
    # A call slower than the time for all of them is measured once, as the first.
    repeats = 1 if world.options.tiny else REPEATS
    while len(seconds) < repeats and (not seconds or sum(seconds) + seconds[-1] < SECONDS):
        if first > SECONDS and seconds:
            break
        spent, ranking = timed(partial(search, engine, world.users(batch, 1 + len(seconds))), device)
        seconds.append(spent)
        rankings.append(ranking)
    counters = {key: np.mean([r.counters[key] for r in rankings]) for key in rankings[0].counters}
    middle = float(np.median(seconds))
    row |= {
        "batch": batch,
        "ms_a_user": 1e3 * middle / batch,
        "ms_a_call": [1e3 * s for s in seconds],
        "token_forwards_a_user": counters["token_forwards"] / batch,
        "prompt_tokens_a_user": counters["prompt_tokens"] / batch,
        "expansions_a_user": counters["expansions"] / batch,
        "counters": counters,
        "certified": float(np.mean([r.certified.mean() for r in rankings])),
        "peak_gb": peak_gb(device),
    }
    row |= floor(world.rates, shape, counters, float(np.mean([len(t) for t in world.texts])), batch, middle)


def floor(rates: Row, shape: Shape, counters: Row, context: float, batch: int, seconds: float) -> Row:
    """The least time for the positions that were run, at the measured rates, and its share of the time taken."""
    flops = shape.flops(counters["token_forwards"], context)
    forwards = counters["rounds"] + 1
    read = 2.0 * (shape.body + shape.cache_numbers * context * batch) * forwards
    by_flops, by_bytes = flops / rates["flops_per_second"], read / rates["bytes_per_second"]
    return {
        "floor_ms_a_user": 1e3 * max(by_flops, by_bytes) / batch,
        "floor_by": "flops" if by_flops > by_bytes else "bytes",
        "share_of_floor": max(by_flops, by_bytes) / seconds,
        "tflops": flops / seconds / 1e12,
    }


def _pieces(world: World, engine: TrieEngine, shape: Shape, batch: int, row: Row) -> None:
    """Where the time of both searches goes."""
    engine.at_once = batch
    for kind in ("exact10", "beam10"):
        KINDS[kind](engine, world.users(batch, 5))
        with pieces(world.options.device) as found:
            KINDS[kind](engine, world.users(batch, 6))
        row[kind] = found
        row[f"{kind}_total_ms_a_user"] = found["total_ms"] / batch


def _prompts(world: World, engine: TrieEngine, shape: Shape, batch: int, row: Row) -> None:
    """The prompts alone: their rate says how near the searches can come to the floor."""
    device, counters = world.options.device, Counters()
    texts = sorted(world.users(batch, 7), key=len)
    prefix = engine.shared_prefix(texts, counters)

    @torch.inference_mode()
    def work() -> None:
        TreeCache(engine.model, engine.trie, texts, counters, prefix)

    timed(work, device)
    counters.prompt_tokens = counters.padding = 0
    seconds = [timed(work, device)[0] for _ in range(3)]
    tokens = counters.prompt_tokens / 3
    n_shared = 0 if prefix is None else len(prefix.tokens)
    padded = tokens + counters.padding / 3
    flops = shape.flops(tokens, float(np.mean([len(t) for t in texts])))
    row |= {"ms_a_user": 1e3 * float(np.median(seconds)) / batch, "shared_tokens": n_shared}
    row |= {"tokens_a_user": tokens / batch, "padded_over_tokens": padded / tokens}
    row |= {"tflops": flops / float(np.median(seconds)) / 1e12}
    row["share_of_matrix_rate"] = row["tflops"] * 1e12 / world.rates["flops_per_second"]


def _kernels(world: World, engine: TrieEngine, batch: int, row: Row) -> None:
    """Whether the device waits for the CPU."""
    engine.at_once = batch
    users = world.users(batch, 3)
    row |= kernels(partial(KINDS["exact10"], engine, users), world.options.device)


def _generate(world: World, engine: TrieEngine, row: Row) -> None:
    """`transformers.generate` along the same tree, a left-padded batch, a Python callback for each beam."""
    device, texts = world.options.device, world.users(USERS, 9)
    engine.at_once = USERS
    root: dict[int, Any] = {}
    for title in world.titles:
        node = root
        for token in title:
            node = node.setdefault(token, {})
    end = world.titles[0][-1]
    work = partial(generate, engine.model, texts, root, 10, max(map(len, world.titles)), end)
    seconds, found = timed(work, device)
    row |= {"users": USERS, "generate_ms_a_user": 1e3 * seconds / USERS}
    beam_search(engine, texts, k=10, beams=10)
    spent, ours = timed(partial(beam_search, engine, texts, k=10, beams=10), device)
    row |= {"ours_ms_a_user": 1e3 * spent / USERS, "ratio": seconds / spent}
    same = [
        len({tuple(world.titles[i]) for i in items if i >= 0} & theirs)
        for items, theirs in zip(ours.items, found, strict=True)
    ]
    row["same_titles_of_10"] = float(np.mean(same))


@torch.inference_mode()
def generate(
    model: Any, texts: list[list[int]], root: dict[int, Any], beams: int, longest: int, end: int
) -> list[set[tuple[int, ...]]]:
    """The titles that `transformers.generate` finds for each text."""
    device, width = model.device, max(map(len, texts))
    ids = torch.tensor([[end] * (width - len(t)) + t for t in texts], device=device)
    mask = torch.tensor([[0] * (width - len(t)) + [1] * len(t) for t in texts], device=device)

    def allowed(_: int, sent: torch.Tensor) -> list[int]:
        node = root
        for token in sent[width:].tolist():
            node = node.get(token, {})
        return list(node) or [end]

    output = model.generate(
        ids,
        attention_mask=mask,
        num_beams=beams,
        num_return_sequences=beams,
        do_sample=False,
        max_new_tokens=longest + 1,
        length_penalty=0.0,
        early_stopping=False,
        prefix_allowed_tokens_fn=allowed,
        renormalize_logits=True,
        eos_token_id=end,
        pad_token_id=end,
    )
    rows = output[:, width:].tolist()
    titles = [tuple(row[: row.index(end) + 1]) if end in row else () for row in rows]
    return [set(titles[b * beams : (b + 1) * beams]) for b in range(len(texts))]


def _agreement(world: World, engine: TrieEngine, shape: Shape, row: Row) -> None:
    """Exact search against the whole catalogue and against another batch, in this precision."""
    texts = world.users(16, 11)
    engine.at_once = 16
    exact, whole = (KINDS[kind](engine, texts) for kind in ("exact10", "catalogue"))
    engine.at_once = 1
    alone = KINDS["exact10"](engine, texts)
    for name, other in (("catalogue", whole), ("one_by_one", alone)):
        row[f"same_items_{name}"] = float((exact.items == other.items).mean())
        row[f"largest_score_gap_{name}"] = float(np.abs(exact.scores - other.scores).max())
    row["spread_of_scores"] = float((exact.scores[:, 0] - exact.scores[:, -1]).mean())
