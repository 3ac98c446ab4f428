"""What does ranking the whole catalogue cost, against one sequence per title?

    python benchmarks/catalogue.py [--data msl:DIR | ml-100k] [--folder DIR] [--model NAME] [--support S ...]
                                   [--users N] [--sample N] [--quick]

`naive` runs prompt and title together through the plain model, once per title. `kept` runs the prompt once and each
title behind its keys and values. Both in batches, right-padded, titles sorted by length, logits at title positions
only. Ours is `rank_catalogue`. They alternate user by user in one process, in both supports. Before a ratio is
printed the scores of all titles are compared: differences of at most 1e-4 (`tiny`) or 1e-3 nats, or that for each 100
nats. The reference's normalisation over a trie of dicts, for the trie support, is outside its time.

`tokens` are token-forwards a user: positions pushed through the transformer's body, counted by a hook in the
references and by the engine in ours. `tree_tokens` are ours without the prompt. With `--sample` the references run
so many random titles, and their tokens and seconds are scaled to the catalogue. The default model is untrained:
work and equality do not depend on what it has learned. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from tests.reference.trie import DictTrie  # noqa: E402

from benchmarks._command import parsed  # noqa: E402
from benchmarks._data import SYNTHETIC, prepared  # noqa: E402
from benchmarks.decode import Hook  # noqa: E402
from triewise.decoding import TrieEngine, rank_catalogue  # noqa: E402
from triewise.models import load_backbone  # noqa: E402
from triewise.progress import note, progress  # noqa: E402
from triewise.tokens import Trie, build_prompts  # noqa: E402

SUPPORTS = ("trie", "vocabulary")
BATCH = 32


class OneByOne:
    """Scores of titles by one sequence per title; ``kept``: the prompt runs once.

    Attributes:
        seconds: Time in the model and its log-softmax so far.
        tokens: Positions pushed through the body so far.
    """

    def __init__(self, model: Any, slow: DictTrie, kept: bool) -> None:
        self.model, self.slow, self.kept = model, slow, kept
        self.hook, self.seconds, self.tokens = Hook(model), 0.0, 0

    @torch.inference_mode()
    def score(self, prompt: Sequence[int], chosen: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        """In each support the log-probabilities of the titles (n,)."""
        titles = [self.slow.sequences[i] for i in chosen]
        order = np.argsort([len(title) for title in titles], kind="stable")
        scores = {support: np.zeros(len(titles)) for support in SUPPORTS}
        self.hook.take()
        started = time.perf_counter()
        first = self._prompt(prompt) if self.kept else None
        self.seconds += time.perf_counter() - started
        with progress("prompt kept" if self.kept else "naive", len(titles), "titles") as advance:
            for start in range(0, len(titles), BATCH):
                some = order[start : start + BATCH]
                started = time.perf_counter()
                logits = self._logits(prompt, [titles[i] for i in some], first)
                log_p = logits.log_softmax(-1)
                self.seconds += time.perf_counter() - started
                for i, row in zip(some, log_p, strict=True):
                    for support in SUPPORTS:
                        scores[support][i] = self._sum(row, titles[i], support)
                advance(len(some))
        self.tokens += sum(n * m for n, m in self.hook.take())
        return scores

    def _prompt(self, prompt: Sequence[int]) -> tuple[Any, Any]:
        """Logits (1, 1, V) after the prompt, and its keys and values."""
        output = self.model(input_ids=torch.tensor([list(prompt)]), use_cache=True, logits_to_keep=1)
        return output.logits, [(layer.keys, layer.values) for layer in output.past_key_values.layers]

    def _logits(self, prompt: Sequence[int], titles: list[list[int]], first: Any) -> Any:
        """Logits (n, L, V) float32 before each token of the titles, L the length of the longest."""
        from transformers import DynamicCache

        longest = max(map(len, titles))
        padded = torch.tensor([title + [0] * (longest - len(title)) for title in titles])
        if first is None:
            ids = torch.cat([torch.tensor([list(prompt)]).expand(len(titles), -1), padded], 1)
            return (
                self.model(input_ids=ids, use_cache=False, logits_to_keep=longest + 1).logits[:, :-1].float()
            )
        before, layers = first
        cache = DynamicCache([tuple(x.expand(len(titles), -1, -1, -1) for x in layer) for layer in layers])
        behind = self.model(input_ids=padded, past_key_values=cache, use_cache=True).logits
        return torch.cat([before.expand(len(titles), -1, -1), behind[:, :-1]], 1).float()

    def _sum(self, row: Any, title: list[int], support: str) -> float:
        steps = row[torch.arange(len(title)), title].double()
        if support == "vocabulary":
            return float(steps.sum())
        node, total = self.slow.root, steps.sum()
        for place, token in enumerate(title):
            total -= row[place, list(node)].double().logsumexp(0)
            node = node[token]
        return float(total)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="ml-100k")
    parser.add_argument(
        "--folder", type=Path, help="prepared folder, made where it is not; default: a temporary one"
    )
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--template", default="plain")
    parser.add_argument("--support", nargs="+", default=list(SUPPORTS), choices=SUPPORTS)
    parser.add_argument("--users", type=int, default=2)
    parser.add_argument("--sample", type=int, help="titles that the references run; default: all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parsed(parser, data=SYNTHETIC, model="tiny", threads=1)
    torch.set_num_threads(options.threads)
    dataset = prepared(options.data, options.folder)
    test, catalog, info = dataset.test, dataset.catalog, dataset.info
    backbone = load_backbone(options.model, titles=catalog.title, device="cpu", dtype="float32")
    model = backbone.model.requires_grad_(False)
    prompts = build_prompts(
        backbone.tokenizer, catalog, options.template, info["noun"], info["verb"], max_history=10
    )
    titles = [ids.tolist() for ids in prompts.title_tokens]
    slow, trie = DictTrie(titles), Trie.from_sequences(titles)
    rng = np.random.default_rng(options.seed)
    users = rng.choice(test.n_rows, size=min(options.users, test.n_rows), replace=False)
    texts = [prompts.encode(test.history[int(r)]) for r in users]
    groups = np.unique(trie.leaf, return_index=True)[1]  # one item of each title
    sample = rng.permutation(groups)[: options.sample]
    engines = {support: TrieEngine(model, trie, support) for support in options.support}  # type: ignore[arg-type]
    references = {"naive": OneByOne(model, slow, False), "kept": OneByOne(model, slow, True)}
    ours: dict[str, dict[str, float]] = {s: {"seconds": 0.0, "tokens": 0, "tree": 0} for s in engines}
    for engine in engines.values():
        rank_catalogue(engine, [texts[0][-2:]])  # warm-up: plan of the sweep, probe of the model
    gap = 0.0
    for text in texts:
        wanted = [reference.score(text, sample) for reference in references.values()]
        for support, engine in engines.items():
            started = time.perf_counter()
            ranking = rank_catalogue(engine, [text])
            ours[support]["seconds"] += time.perf_counter() - started
            ours[support]["tokens"] += ranking.counters["token_forwards"]
            ours[support]["tree"] += ranking.counters["tree_tokens"]
            found = np.full(trie.n_items, np.nan)
            found[ranking.items[0]] = ranking.scores[0]
            for scores in wanted:
                difference = np.abs(found[_lowest(trie)[sample]] - scores[support])
                gap = max(gap, float((difference / np.maximum(1, -scores[support] / 100)).max()))
    allowed = 1e-4 if options.model == "tiny" else 1e-3
    assert gap <= allowed, f"scores differ by {gap:.2g}"
    print(json.dumps(_report(references, ours, len(texts), len(groups) / len(sample), texts, trie) | {
        "largest_gap": gap, "model": options.model, "template": options.template, "data": options.data,
        "users": len(texts), "sample": len(sample), "threads": options.threads,
    }))  # fmt: skip


def _lowest(trie: Trie) -> NDArray[np.int32]:
    """The lowest item with the same title, (I,): the one a ranking returns."""
    _, first, group = np.unique(trie.leaf, return_index=True, return_inverse=True)
    return first[group]


def _report(
    references: dict[str, OneByOne],
    ours: dict[str, dict[str, float]],
    n_users: int,
    scale: float,
    texts: list[list[int]],
    trie: Trie,
) -> dict[str, Any]:
    result: dict[str, Any] = {
        "titles": trie.n_groups,
        "nodes": trie.n_nodes,
        "branching": int(trie.branching.sum()),
    }
    result["prompt_tokens"] = round(float(np.mean([len(text) for text in texts])), 1)
    for name, reference in references.items():
        once = result["prompt_tokens"] if reference.kept else 0  # the prompt does not grow with the catalogue
        tokens = (reference.tokens / n_users - once) * scale + once
        result[f"{name}_tokens"] = round(tokens, 1)
        result[f"{name}_seconds"] = round(reference.seconds / n_users * scale, 3)
        note(f"{name:20}{tokens:12.0f} tokens{result[f'{name}_seconds']:10.2f} s a user")
    for support, sums in ours.items():
        tokens, seconds = sums["tokens"] / n_users, sums["seconds"] / n_users
        result |= {
            f"tokens_{support}": round(tokens, 1),
            f"tree_tokens_{support}": round(sums["tree"] / n_users, 1),
        }
        result[f"seconds_{support}"] = round(seconds, 4)
        for name in references:
            result[f"work_ratio_{name}_{support}"] = round(result[f"{name}_tokens"] / tokens, 1)
            result[f"wall_ratio_{name}_{support}"] = round(result[f"{name}_seconds"] / seconds, 1)
        note(f"{'ours, ' + support:20}{tokens:12.0f} tokens{seconds:10.2f} s a user")
    return result


if __name__ == "__main__":
    main()
