"""Beam search as loops over lists, and the same through `transformers.generate`: slow and obviously right.

Both take one user. The loop also gives its margin: the smallest difference between a score that was kept and
one that was dropped at the same cut. Where it is tiny, rounding may decide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tests.reference.trie import DictTrie

Title = tuple[int, ...]
LogP = Callable[[Title], dict[int, float]]  # prefix -> log-probability of each valid token


def model_log_p(model: Any, prompt: Sequence[int], trie: DictTrie, support: str) -> LogP:
    """Log-probabilities from one plain forward per prefix, in float64."""
    known: dict[Title, dict[int, float]] = {}

    def log_p(prefix: Title) -> dict[int, float]:
        if prefix not in known:
            with torch.no_grad():
                row = (
                    model(input_ids=torch.tensor([[*prompt, *prefix]]), use_cache=False)
                    .logits[0, -1]
                    .double()
                )
            valid = sorted(trie.node(prefix))
            over = row[valid] if support == "trie" else row
            known[prefix] = {token: float(row[token] - over.logsumexp(0)) for token in valid}
        return known[prefix]

    return log_p


def beam(
    log_p: LogP,
    trie: DictTrie,
    beams: int,
    length_penalty: float = 0.0,
    weigh: Callable[[list[Title]], list[float]] | None = None,
    permitted: Callable[[Title], bool] = lambda prefix: True,
    dropped: list[Title] | None = None,
) -> tuple[dict[Title, float], float]:
    """Finished titles with their scores, and the margin.

    Args:
        log_p: Log-probabilities of the valid tokens after a prefix.
        trie: The catalogue.
        beams: W.
        length_penalty: Exponent of the number of tokens.
        weigh: Weights of all continuations of one step.
        permitted: Whether a permitted title starts with this prefix.
        dropped: Gets what was not among the best of a step.
    """
    running: list[tuple[float, Title]] = [(0.0, ())] if permitted(()) else []
    finished: list[tuple[float, Title]] = []
    margin = math.inf
    length = 0
    while running:
        length += 1
        steps = [
            (total, (*prefix, token), p) for total, prefix in running for token, p in log_p(prefix).items()
        ]
        weights = [1.0] * len(steps) if weigh is None else weigh([title for _, title, _ in steps])
        scored = [(total + w * p, title) for (total, title, p), w in zip(steps, weights, strict=True)]
        scored = sorted((s for s in scored if permitted(s[1])), key=lambda s: -s[0])
        margin = min(margin, _gap(scored, 2 * beams), _gap(scored, beams))
        top = scored[: 2 * beams]
        ends = [(s / length**length_penalty, t) for s, t in top[:beams] if not trie.node(t)]
        goes_on = [(s, t) for s, t in top if trie.node(t)]
        margin = min(margin, _gap(goes_on, beams))
        running = goes_on[:beams]
        if dropped is not None:
            kept = {t for _, t in running} | {t for _, t in ends}
            dropped.extend(t for _, t in scored if t not in kept)
        together = sorted(finished + ends, key=lambda s: -s[0])
        margin = min(margin, _gap(together, beams))
        finished = together[:beams]
        if running and len(finished) == beams:
            best, worst = running[0][0] / length**length_penalty, finished[-1][0]
            margin = min(margin, abs(best - worst))
            if best <= worst:
                break
    return {title: s for s, title in finished}, margin


def _gap(scored: list[tuple[float, Title]], cut: int) -> float:
    return scored[cut - 1][0] - scored[cut][0] if len(scored) > cut else math.inf


def generate(
    model: Any,
    prompt: Sequence[int],
    trie: DictTrie,
    beams: int,
    length_penalty: float,
    support: str,
    end: int,
) -> dict[Title, float]:
    """The same titles and scores from ``model.generate`` with a Python callback; rows that are no titles left out."""
    longest = max(map(len, trie.sequences))

    def allowed(_: int, ids: torch.Tensor) -> list[int]:
        node: Any = trie.root
        for token in ids[len(prompt) :].tolist():
            node = node.get(token, {})
        return list(node) or [end]

    output = model.generate(
        torch.tensor([list(prompt)]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        num_beams=beams,
        num_return_sequences=beams,
        do_sample=False,
        max_new_tokens=longest + 1,
        length_penalty=length_penalty,
        early_stopping=False,
        prefix_allowed_tokens_fn=allowed,
        renormalize_logits=support == "trie",
        eos_token_id=end,
        pad_token_id=end,
        return_dict_in_generate=True,
        output_scores=True,
    )
    titles = {tuple(sequence) for sequence in trie.sequences}
    found: dict[Title, float] = {}
    for row, score in zip(
        output.sequences[:, len(prompt) :].tolist(), output.sequences_scores.tolist(), strict=True
    ):
        title = tuple(row[: row.index(end) + 1]) if end in row else ()
        if title in titles and score > -1e8:
            found.setdefault(title, score)
    return found
