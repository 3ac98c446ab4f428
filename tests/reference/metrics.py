"""Metrics of next-item prediction as loops over one list: slow and obviously right."""

from __future__ import annotations

from collections.abc import Sequence
from math import log2


def rank_in_list(items: Sequence[int], target: int) -> int:
    for rank, item in enumerate(items):
        if item == target and item != -1:
            return rank
    return -1


def hit_rate(items: Sequence[int], target: int, k: int) -> float:
    return 1.0 if 0 <= rank_in_list(items, target) < k else 0.0


def ndcg(items: Sequence[int], target: int, k: int) -> float:
    """Discounted gain over the best possible one, which is that of rank 0."""
    rank = rank_in_list(items, target)
    return sum((1.0 if r == rank else 0.0) / log2(r + 2) for r in range(k)) / (1.0 / log2(2))


def mrr(items: Sequence[int], target: int, k: int) -> float:
    rank = rank_in_list(items, target)
    return 1.0 / (rank + 1) if 0 <= rank < k else 0.0


def rank_of_target(scores: Sequence[float], target: int) -> int:
    """Sort all items by score, then index, and look the target up; -1 for an excluded one."""
    if scores[target] == float("-inf"):
        return -1
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i)).index(target)
