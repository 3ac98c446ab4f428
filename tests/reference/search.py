"""Slow and obviously right: one plain forward per title, one softmax per token."""

from __future__ import annotations

from typing import Any

import torch

from tests.reference.trie import DictTrie


def title_log_probability(
    model: Any, prompt: list[int], title: list[int], valid: list[set[int]] | None
) -> float:
    """Sum over the title's tokens of log p; over the vocabulary, or over ``valid[t]`` at token t."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + title]), use_cache=False).logits[0].double()
    total = 0.0
    for t, token in enumerate(title):
        row = logits[len(prompt) - 1 + t]
        over = row if valid is None else row[sorted(valid[t])]
        total += float(row[token] - torch.logsumexp(over, 0))
    return total


def catalogue(model: Any, prompt: list[int], titles: list[list[int]], support: str) -> list[float]:
    """Log-probability of every title."""
    trie = DictTrie(titles)
    valid = [[set(trie.node(title[:t])) for t in range(len(title))] for title in titles]
    return [
        title_log_probability(model, prompt, title, valid[i] if support == "trie" else None)
        for i, title in enumerate(titles)
    ]
