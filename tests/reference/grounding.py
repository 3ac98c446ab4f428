"""Grounding with loops: one text, one title and one token at a time."""

from __future__ import annotations

from typing import Any

import torch


def greedy(model: Any, prompt: list[int], end: int, max_tokens: int) -> list[int]:
    """The most probable token again and again, without a cache."""
    written: list[int] = []
    with torch.no_grad():
        for _ in range(max_tokens):
            logits = model(input_ids=torch.tensor([prompt + written]), use_cache=False).logits
            token = int(logits[0, -1].argmax())
            if token == end:
                break
            written.append(token)
    return written


def embedding(model: Any, ids: list[int]) -> torch.Tensor:
    """Last entry of the hidden states at the last token."""
    with torch.no_grad():
        out = model(input_ids=torch.tensor([ids]), use_cache=False, output_hidden_states=True)
    return out.hidden_states[-1][0, -1]


def injected(distance: list[float], weight: list[float], gamma: float) -> list[float]:
    """BIGRec's formula, title by title."""
    low, high = min(distance), max(distance)
    return [(d - low) / (high - low) * (1 + w) ** -gamma for d, w in zip(distance, weight, strict=True)]
