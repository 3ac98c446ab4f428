"""Slow, obviously right losses: a dense mask, a loop over tokens, ATS with Python floats."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trierec.trie import Trie


def dense_trie_nll(logits: Tensor, target: Tensor, node: Tensor, trie: Trie, temperature: float) -> Tensor:
    """Masked softmax with a (M, V) mask, as the authors write it, but with log_softmax."""
    valid = torch.zeros(logits.shape, dtype=torch.bool)
    for row, n in enumerate(node.tolist()):
        tokens, _ = trie.children(n)
        valid[row, tokens.tolist()] = True
    masked = (logits / temperature).masked_fill(~valid, -torch.inf)
    return -masked.log_softmax(-1).gather(1, target[:, None])[:, 0]


def weighted_mean(losses: list[float], weights: list[float], decisions: list[bool], normaliser: str) -> float:
    """Sum of weighted losses over the normaliser, one token at a time."""
    total = divisor = 0.0
    for loss, weight, decision in zip(losses, weights, decisions, strict=True):
        total += loss * weight
        divisor += weight if normaliser == "weights" or decision else 0.0
    return total if normaliser == "sum" else total / divisor


def plain_ats(
    stream: list[tuple[list[float], list[float], int]],
    eta: float,
    initial: float,
    momentum: float,
    clamp: tuple[float, float],
    root: str,
) -> list[float]:
    """Temperatures after each (target logits, valid logits, number of valid tokens)."""
    tau, taus = initial, []
    for positive, valid, m in stream:
        mean = sum(valid) / len(valid)
        variance = sum((v - mean) ** 2 for v in valid) / (len(valid) - 1)
        d = sum(positive) / len(positive) - mean
        c = math.log(m * eta)
        discriminant = max(d**2 - 2 * c * variance, 0.0)
        sign = 1 if root == "plus" else -1
        star = (d + sign * discriminant**0.5) / (2 * c)
        star = clamp[0] if star < clamp[0] else clamp[1] if star > clamp[1] else star
        tau = momentum * tau + (1 - momentum) * star
        taus.append(tau)
    return taus
