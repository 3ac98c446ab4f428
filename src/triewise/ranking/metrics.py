"""How good a ranking is: metrics of next-item prediction, one value per user, from integer arrays.

Every row has one relevant item, its target. All metrics follow from the target's rank r (0-based; -1: not
ranked): HR@K is 1 if r < K, NDCG@K is 1 / log2(r + 2) if r < K, MRR@K is 1 / (r + 1) if r < K, else 0.
Averages, intervals and tests belong to the caller, who needs the values per user for them.

A list shorter than K says that the places after its end are misses, as in trec_eval. So HR@20 of ten
recommendations is their HR@10. Whoever reports a metric passes ``depth`` to `metrics_from_rank`, which
refuses a K beyond it.

Shape key: B rows, K places, I items.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from triewise.errors import Diverged, UserError


def hit_rate(items: ArrayLike, target: ArrayLike, k: int) -> NDArray[np.float64]:
    """HR@k: 1 where the target is among the first k items, else 0.

    Args:
        items: Integers (B, K), best first, -1 padded; the first occurrence of the target counts.
        target: Integers (B,).
        k: How many places count, >= 1; may exceed K (places beyond the list are misses).

    Returns:
        float64 (B,), 0 or 1.

    Raises:
        UserError: ``k`` < 1 or shapes that do not fit.

    >>> hit_rate([[5, 7, 9], [5, 7, 9]], [7, 9], k=2).tolist()
    [1.0, 0.0]
    """
    return _metric("HR", rank_in_list(items, target), k)


def ndcg(items: ArrayLike, target: ArrayLike, k: int) -> NDArray[np.float64]:
    """NDCG@k with one relevant item: 1 / log2(r + 2) where the target has the 0-based rank r < k, else 0.

    Args and errors as `hit_rate`; returns float64 (B,) in [0, 1].

    >>> ndcg([[5, 7, 9]], [5], k=3).tolist()
    [1.0]
    """
    return _metric("NDCG", rank_in_list(items, target), k)


def mrr(items: ArrayLike, target: ArrayLike, k: int) -> NDArray[np.float64]:
    """MRR@k: 1 / (r + 1) where the target has the 0-based rank r < k, else 0.

    Args and errors as `hit_rate`; returns float64 (B,) in [0, 1].

    >>> mrr([[5, 7, 9]], [7], k=3).tolist()
    [0.5]
    """
    return _metric("MRR", rank_in_list(items, target), k)


def metrics_from_rank(
    rank: ArrayLike, ks: Sequence[int] = (5, 10), *, depth: int | None = None
) -> dict[str, NDArray[np.float64]]:
    """All metrics of ranked rows.

    Args:
        rank: Integers (B,), 0-based rank of the target, -1 where it was not ranked.
        ks: Cut-offs, each >= 1.
        depth: Number of places that were ranked where the lists are cut; None: every item was ranked.

    Returns:
        ``{"HR@5": (B,), "NDCG@5": (B,), "MRR@5": (B,), "HR@10": ...}``, float64.

    Raises:
        UserError: A cut-off < 1 or > ``depth``, or ranks that are not one integer per row.

    >>> metrics_from_rank([1, -1], ks=[5])["MRR@5"].tolist()
    [0.5, 0.0]
    """
    rank_B = _integers("rank", rank, 1)
    if depth is not None and max(ks, default=0) > depth:
        raise UserError(
            f"wanted metrics at {max(ks)}, got lists of {depth} places; recommend at least {max(ks)} items"
        )
    return {f"{name}@{k}": _metric(name, rank_B, k) for k in ks for name in ("HR", "NDCG", "MRR")}


def rank_in_list(items: ArrayLike, target: ArrayLike) -> NDArray[np.int32]:
    """Rank of each row's target in its list.

    Args:
        items: Integers (B, K), best first, -1 padded; repeats after the first occurrence are ignored.
        target: Integers (B,).

    Returns:
        int32 (B,), 0-based, -1 where the target is not in the list.

    Raises:
        UserError: Shapes or types that do not fit.
    """
    items_BK, target_B = _integers("items", items, 2), _integers("target", target, 1)
    if len(items_BK) != len(target_B):
        raise UserError(
            f"wanted one target per list, got {len(items_BK)} lists and {len(target_B)} targets; align them"
        )
    if not items_BK.shape[1]:
        return np.full(len(items_BK), -1, dtype=np.int32)
    match_BK = (items_BK == target_B[:, None]) & (items_BK >= 0)
    return np.where(match_BK.any(axis=1), match_BK.argmax(axis=1), -1).astype(np.int32)


def rank_of_target(scores: ArrayLike, target: ArrayLike) -> NDArray[np.int32]:
    """Rank of each row's target among all items, by counting instead of sorting; ties by item index.

    ``rank = count(s > s_t) + count(s == s_t and index < t)``.

    Args:
        scores: Numbers (B, I), higher is better; -inf marks items that may not be recommended.
        target: Integers (B,) in [0, I).

    Returns:
        int32 (B,), 0-based; -1 where the target's own score is -inf: an excluded item has no rank.

    Raises:
        UserError: Shapes that do not fit, a target outside [0, I), or a score that is NaN.

    >>> rank_of_target([[0.5, 2.0, 0.5, 1.0]], [2]).tolist()
    [3]
    """
    score_BI, target_B = np.asarray(scores), _integers("target", target, 1)
    if score_BI.ndim != 2 or len(score_BI) != len(target_B):
        raise UserError(
            f"wanted scores (B, I) for {len(target_B)} targets, got shape {score_BI.shape}; align them"
        )
    n_items = score_BI.shape[1]
    if len(target_B) and (target_B.min() < 0 or target_B.max() >= n_items):
        raise UserError(
            f"wanted targets in [0, {n_items}), got {target_B.min()} to {target_B.max()}; check the catalogue"
        )
    if np.isnan(score_BI).any():
        row = int(np.isnan(score_BI).any(axis=1).argmax())
        raise Diverged(
            f"wanted scores that are numbers, got NaN in row {row}; the model diverged, train it again"
        )
    own_B1 = np.take_along_axis(score_BI, target_B[:, None].astype(np.int64), axis=1)
    above_B = (score_BI > own_B1).sum(axis=1)
    before_B = ((score_BI == own_B1) & (np.arange(n_items) < target_B[:, None])).sum(axis=1)
    return np.where(own_B1[:, 0] == -np.inf, -1, above_B + before_B).astype(np.int32)


def _metric(name: str, rank_B: NDArray[np.integer], k: int) -> NDArray[np.float64]:
    if k < 1:
        raise UserError(f"wanted a cut-off k >= 1, got {k}; use 5 or 10")
    hit_B = (rank_B >= 0) & (rank_B < k)
    place_B = np.where(hit_B, rank_B, 0).astype(np.float64)
    value_B = {"HR": place_B**0, "NDCG": 1.0 / np.log2(place_B + 2.0), "MRR": 1.0 / (place_B + 1.0)}[name]
    return np.where(hit_B, value_B, 0.0)


def _integers(name: str, values: ArrayLike, ndim: int) -> NDArray[np.integer]:
    array = np.asarray(values)
    if array.size == 0 and array.dtype.kind == "f":  # an empty list carries no type
        array = array.astype(np.int32)
    if array.ndim != ndim or array.dtype.kind not in "iu":
        wanted = f"{name} of {ndim} dimension{'s' if ndim > 1 else ''}"
        raise UserError(
            f"wanted integer {wanted}, got {array.dtype} of shape {array.shape}; pass item indices"
        )
    return array
