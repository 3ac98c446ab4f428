"""Part: a 1.7B Qwen3 on item codes of three tokens, contexts of 1,000, 256 beams with constraints.

NVIDIA reports 17.6 ms (batch 1) and 93.2 ms (batch 8) for this shape on an H100 (recsys-examples, sid-gr-inference,
three steps of 256 beams, without item constraints; with theirs a request took 22 times as long). Here every beam is an
item: 8,192 first codes, 32 second codes below each, 4 third codes below those, about a million items.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.data import Options
from benchmarks.gpu.decoding import floor
from benchmarks.gpu.report import Report, Row, ceilings, fast_path, kernels, peak_gb, pieces, timed
from benchmarks.gpu.shapes import build, shape_of
from triewise.decoding import TrieEngine, beam_search, exact_search
from triewise.tokens import Trie

THEIRS = {1: 17.6, 8: 93.2}  # milliseconds a call
FIRST_CODE = 100_000  # where the ids of codes begin


def items(codes: int, second: int, third: int, first_id: int, seed: int = 0) -> Trie:
    """The tree of some random items of three codes, each level with ids of its own."""
    rng = np.random.default_rng(seed)
    a = np.repeat(np.arange(codes), second)
    pair = np.unique(a * codes + rng.integers(codes, size=len(a)))
    full = np.repeat(pair, third)
    triple = np.unique(full * codes + rng.integers(codes, size=len(full)))
    levels = (triple // codes**2, triple // codes % codes, triple % codes)
    tokens = np.stack([level + i * codes + first_id for i, level in enumerate(levels)], axis=1)
    offsets = np.arange(0, 3 * len(tokens) + 1, 3)
    return Trie.from_sequences((tokens.reshape(-1).astype(np.int64), offsets.astype(np.int64)))


def run(report: Report, options: Options) -> None:
    """Most valuable first."""
    sizes = (8, 3, 2, 10) if options.tiny else (8192, 32, 4, FIRST_CODE)
    beams, context = (4, 12) if options.tiny else (256, 1000)
    device = options.device
    shape = shape_of("1.7B", options.tiny, 64)
    engines: dict[str, TrieEngine] = {}
    rates: Row = {}
    rng = np.random.default_rng(1)

    def texts(batch: int) -> list[list[int]]:
        return [row.tolist() for row in rng.integers(1, shape.vocabulary, size=(batch, context))]

    def prepare(row: Row) -> None:
        rates.update(ceilings(device, options.half, 256 if options.tiny else 8192))
        seconds, trie = timed(lambda: items(*sizes), device)
        row |= {"items": trie.n_items, "nodes": trie.n_nodes, "trie_seconds": seconds, **rates}
        model = build(shape, device, options.half, peaked=True).requires_grad_(False)
        row["parameters"] = model.num_parameters()
        for support in ("vocabulary", "trie"):
            engines[support] = TrieEngine(model, trie, support, chunk=max(256, beams))
            fast_path(engines[support], row, f"_{support}")

    def cell(support: str, kind: str, batch: int, row: Row) -> None:
        engine = engines[support]
        engine.at_once = batch
        work: Any = partial(beam_search, engine, k=beams, beams=beams)
        if kind == "exact":
            work = partial(exact_search, engine, k=beams)
        peak_gb(device, reset=True)
        timed(partial(work, texts(batch)), device)
        seconds, rankings = [], []
        while len(seconds) < (1 if options.tiny else 7) and sum(seconds) < 2.5:
            spent, ranking = timed(partial(work, texts(batch)), device)
            seconds.append(spent)
            rankings.append(ranking)
        middle, counters = float(np.median(seconds)), rankings[-1].counters
        row |= {"ms_a_call": 1e3 * middle, "ms_of_each": [1e3 * s for s in seconds], "batch": batch}
        row |= {"counters": counters, "certified": float(rankings[-1].certified.mean())}
        row |= {"peak_gb": peak_gb(device), "beams": beams, "context": context}
        row |= floor(rates, shape, counters, context, batch, middle)
        if batch in THEIRS and not options.tiny:
            row |= {"nvidia_ms": THEIRS[batch], "over_nvidia": 1e3 * middle / THEIRS[batch]}

    def taken_apart(support: str, batch: int, row: Row) -> None:
        engine = engines[support]
        engine.at_once = batch
        beam_search(engine, texts(batch), k=beams, beams=beams)
        with pieces(device) as found:
            beam_search(engine, texts(batch), k=beams, beams=beams)
        row |= found
        # A step without constraint has the body and a whole head; what the tree adds is the lookup of children.
        row["constraint_share_of_step"] = found.get("constraint_ms", 0.0) / max(
            found["total_ms"] - found.get("prompt_ms", 0.0), 1e-9
        )

    def plain_step(batch: int, row: Row) -> None:
        """Top tokens of the whole vocabulary for every beam: what a step without constraint does after the body."""
        model = engines["vocabulary"].model
        weight = model.get_output_embeddings().weight
        hidden = torch.randn(batch * beams, shape.width, device=device).to(weight.dtype)

        @torch.inference_mode()
        def work() -> Any:
            log_p = torch.log_softmax(torch.nn.functional.linear(hidden, weight).float(), dim=1)
            return log_p.view(batch, -1).topk(beams)

        timed(work, device)
        row["ms"] = 1e3 * float(np.median([timed(work, device)[0] for _ in range(5)]))

    report.run("build", prepare)
    if not engines:
        return
    report.run("beams batch 1", partial(cell, "vocabulary", "beam", 1))
    report.run("beams batch 8", partial(cell, "vocabulary", "beam", 8))
    report.run("pieces batch 8", partial(taken_apart, "vocabulary", 8))
    report.run("pieces batch 1", partial(taken_apart, "vocabulary", 1))
    report.run("exact batch 1", partial(cell, "trie", "exact", 1))
    report.run("exact batch 8", partial(cell, "trie", "exact", 8))
    report.run("beams in trie support batch 1", partial(cell, "trie", "beam", 1))
    report.run("beams in trie support batch 8", partial(cell, "trie", "beam", 8))
    report.run("plain step batch 8", partial(plain_step, 8))
    report.run("plain step batch 1", partial(plain_step, 1))

    def busy(row: Row) -> None:
        given = texts(8)
        row |= kernels(partial(beam_search, engines["vocabulary"], given, k=beams, beams=beams), device)

    report.run("kernels batch 8", busy)
