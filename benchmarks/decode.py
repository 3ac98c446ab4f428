"""How much less work and time does a beam search along the trie need than `transformers.generate`?

    python benchmarks/decode.py [--data msl:DIR | ml-100k] [--model NAME | RUN] [--users N] [--beams W]
        [--supports vocabulary trie] [--quick]

The reference is real `model.generate` with `prefix_allowed_tokens_fn` over a trie of dicts (trie support: with
`renormalize_logits=True`), one user at a time, so that nothing of it is padding; reference and ours alternate
user by user in one process. Before a ratio is printed the results are compared: the same titles, sums equal to 1e-3.
A user whose pruning margin is below 1e-4 is counted in `excused`, any other difference makes `same_results` false.

`work` is token-forwards: positions pushed through the transformer's body, counted by a hook in the reference and by
the engine in ours. `padded` adds what the reference pushes in left-padded batches of eight users who wait for each
other, from the measured lengths. `exact` is `exact_search` in trie support against the same reference (that its titles
are the best ones is the question of benchmarks/exact.py). Ratios are
sums over users, with 95 % bootstrap intervals. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from tests.reference import beam as reference  # noqa: E402
from tests.reference.trie import DictTrie  # noqa: E402

from benchmarks._command import parsed  # noqa: E402
from benchmarks._data import SYNTHETIC, prepared  # noqa: E402
from triewise.decoding import Counters, TrieEngine, beam_search, exact_search  # noqa: E402
from triewise.decoding.growth import Growth  # noqa: E402
from triewise.models import body, load_backbone  # noqa: E402
from triewise.ranking import Ranking  # noqa: E402
from triewise.recommenders import GenerativeRecommender  # noqa: E402
from triewise.tokens import Trie, build_prompts  # noqa: E402

MARGIN, SUM = 1e-4, 1e-3
SUPPORTS = ("vocabulary", "trie")
BATCH = 8  # of the padded reference


class Hook:
    """Positions and forwards that go through a body."""

    def __init__(self, model: Any) -> None:
        self.shapes: list[tuple[int, int]] = []
        self.handle = body(model).register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module: Any, args: Any, kwargs: Any) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        self.shapes.append(tuple(ids.shape))

    def take(self) -> list[tuple[int, int]]:
        """The shapes since the last call."""
        seen, self.shapes = self.shapes, []
        return seen


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="ml-100k")
    parser.add_argument(
        "--folder", type=Path, help="prepared folder, made where it is not; default: a temporary one"
    )
    parser.add_argument("--model", default="smollm2-135m-q4")
    parser.add_argument("--template", default="d3", help="for models that are no trained run")
    parser.add_argument("--users", type=int, default=4)
    parser.add_argument("--beams", type=int, default=10)
    parser.add_argument("--supports", nargs="+", choices=SUPPORTS, default=SUPPORTS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parsed(parser, data=SYNTHETIC, model="tiny", template="plain", users=2, threads=1)
    torch.set_num_threads(options.threads)
    dataset = prepared(options.data, options.folder)
    if Path(options.model, "recommender.json").is_file():
        trained = GenerativeRecommender.from_pretrained(options.model)
        model, prompts, tokenizer = trained.backbone.model, trained.prompts, trained.backbone.tokenizer
    else:
        backbone = load_backbone(options.model, titles=dataset.catalog.title, device="cpu", dtype="float32")
        model, tokenizer = backbone.model.requires_grad_(False), backbone.tokenizer
        noun, verb = dataset.info["noun"], dataset.info["verb"]
        prompts = build_prompts(tokenizer, dataset.catalog, options.template, noun, verb, max_history=10)
    titles = [ids.tolist() for ids in prompts.title_tokens]
    slow, trie = DictTrie(titles), Trie.from_sequences(titles)
    rng = np.random.default_rng(options.seed)
    rows = rng.choice(dataset.test.n_rows, size=min(options.users, dataset.test.n_rows), replace=False)
    texts = [prompts.encode(dataset.test.history[int(r)]) for r in rows]
    end, w = int(tokenizer.eos_token_id), options.beams
    found: dict[str, Any] = {}
    for support in options.supports:
        engine = TrieEngine(model, trie, support)
        ours: dict[str, Callable[[Sequence[Sequence[int]]], Ranking]] = {
            support: partial(beam_search, engine, k=w, beams=w)
        }
        if support == "trie":
            ours["exact"] = partial(exact_search, engine, k=w)
        for search in ours.values():
            search(texts[:2])  # warm-up; the engine now has the shared instruction
        hook = Hook(model)
        results, table = {name: [] for name in ours}, []
        for b, text in enumerate(texts):
            hook.take()
            seconds, wanted = _timed(partial(reference.generate, model, text, slow, w, 0.0, support, end))
            shapes = hook.take()
            line = {"reference": (sum(n * m for n, m in shapes), seconds), "steps": len(shapes)}
            for name, search in ours.items():
                seconds, ranking = _timed(partial(search, [text]))
                line[name] = (ranking.counters["token_forwards"], seconds)
                results[name].append(ranking)
            line["differs"] = _differs(wanted, results[support][b], titles)
            line["margin"] = _margin(engine, text, slow, w) if line["differs"] else np.inf
            table.append(line)
            print(f"{support} user {b}: {line}", file=sys.stderr)
        hook.handle.remove()
        found |= _summary(support, table, texts, w, list(ours), rng)
        found |= _batched(support, ours, texts, table)
    found["same_results"] = sum(found.pop(f"wrong_{support}") for support in options.supports) == 0
    facts = {
        "model": options.model,
        "data": options.data,
        "users": len(texts),
        "beams": w,
        "titles": trie.n_groups,
    }
    print(json.dumps({**found, **facts, "threads": options.threads}))


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def _differs(wanted: dict[tuple[int, ...], float], ranking: Ranking, titles: list[list[int]]) -> bool:
    found = {tuple(titles[i]): s for i, s in zip(ranking.items[0], ranking.scores[0], strict=True) if i >= 0}
    return set(found) != set(wanted) or any(abs(found[t] - wanted[t]) > SUM for t in found)


def _margin(engine: TrieEngine, text: Sequence[int], slow: DictTrie, beams: int) -> float:
    """The smallest difference that decided, by the reference loop on the engine's own log-probabilities."""
    growth = Growth(engine, [text], Counters())
    growth.admit()

    def log_p(prefix: tuple[int, ...]) -> dict[int, float]:
        node = engine.trie.walk(prefix)[-1:].astype(np.int64)
        edges = growth.expand(np.zeros(1, np.int64), node)
        return dict(zip(engine.trie.token[edges.node].tolist(), edges.log_p.tolist(), strict=True))

    return reference.beam(log_p, slow, beams)[1]


def _summary(
    support: str, table: list[dict[str, Any]], texts: list[list[int]], w: int, names: list[str], rng: Any
) -> dict[str, Any]:
    different = [line for line in table if line["differs"]]
    result: dict[str, Any] = {
        f"wrong_{support}": sum(line["margin"] > MARGIN for line in different),
        f"excused_{support}": sum(line["margin"] <= MARGIN for line in different),
    }
    work, wall = (np.array([line["reference"][i] for line in table]) for i in (0, 1))
    # In a left-padded batch all rows have the longest prompt, and all go on until the last is done.
    padded = sum(
        len(part) * w * (max(len(texts[b]) for b in part) + max(table[b]["steps"] for b in part) - 1)
        for part in (range(s, min(s + BATCH, len(table))) for s in range(0, len(table), BATCH))
    )
    result[f"reference_tokens_{support}"] = round(float(work.mean()), 1)
    result[f"reference_seconds_{support}"] = round(float(wall.mean()), 3)
    for name in names:
        ours, seconds = (np.array([line[name][i] for line in table]) for i in (0, 1))
        result[f"work_ratio_{name}"] = round(float(work.sum() / ours.sum()), 2)
        result[f"padded_work_ratio_{name}"] = round(float(padded / ours.sum()), 2)
        result[f"wall_ratio_{name}"] = round(float(wall.sum() / seconds.sum()), 2)
        draws = rng.integers(len(table), size=(2000, len(table)))
        for kind, a, b in (("work", work, ours), ("wall", wall, seconds)):
            low, high = np.quantile(a[draws].sum(1) / b[draws].sum(1), (0.025, 0.975))
            result[f"{kind}_interval_{name}"] = [round(float(low), 2), round(float(high), 2)]
        result[f"tokens_{name}"] = round(float(ours.mean()), 1)
        result[f"seconds_{name}"] = round(float(seconds.mean()), 4)
    return result


def _batched(
    support: str, ours: dict[str, Callable[..., Ranking]], texts: list[list[int]], table: list[dict[str, Any]]
) -> dict[str, Any]:
    """All users in one call of ours, against the reference's one by one."""
    result = {}
    for name, search in ours.items():
        seconds, ranking = _timed(partial(search, texts))
        wall = sum(line["reference"][1] for line in table)
        result[f"wall_ratio_batched_{name}"] = round(wall / seconds, 2)
        result[f"certified_{name}"] = int(ranking.certified.sum())
    return result


if __name__ == "__main__":
    main()
