"""The rank of a target without sorting: how many groups score higher, plus the ties in front of it.

An evaluation asks for one place of each ranking and its top. Both take two passes over the scores of a user and
no sort. Scores of a few users are held at a time, so that memory does not grow with the number of users; a filter
changes few places of a ranking, so its places are looked at one by one and no mask of all items is made.

Equal to ranks and items of ``recommend(k=None)``: a group scores as its best member whatever is filtered, ties
break by the item that represents the group under the filters of the user.

Dimension key: B users, I items, C groups that may be returned ("columns"), K places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trierec.ranking import (
    SCORES_AT_ONCE,
    Groups,
    ItemLists,
    Items,
    ItemScorer,
    check_k,
    check_lists,
    check_numbers,
    checked_items,
)
from trierec.splits import Ragged

Scores = NDArray[np.floating]
_NONE = np.zeros(0, dtype=np.int64)
_PARTS = 1024  # parts of a row whose maxima bound its top; see _at_least


@dataclass(frozen=True)
class Places:
    """Where targets stand, and who stands first.

    Attributes:
        rank: (B,) int32, 0-based rank of the target's group; -1 where no member of it may be returned.
        itself: (B,) bool, whether the target itself represents its group there.
        items: (B, K) int32 best items, -1 padded.
        scores: (B, K) float32, descending, -inf padded.
    """

    rank: NDArray[np.int32]
    itself: NDArray[np.bool_]
    items: NDArray[np.int32]
    scores: NDArray[np.float32]


def count_places(
    scorer: ItemScorer,
    histories: ItemLists | Ragged,
    target: NDArray[np.integer],
    k: int = 10,
    exclude: Sequence[Items | None] | Ragged | None = None,
    allow: Items | None = None,
    *,
    at_once: int = SCORES_AT_ONCE,
    advance: Callable[[int], None] = lambda n: None,
) -> Places:
    """Rank targets by counting.

    Args:
        scorer: Gives every item a score.
        histories: Item indices of each user, oldest first.
        target: (B,) item of each user.
        k: Best items to return.
        exclude: Per user, items that may not be returned.
        allow: The only items that may be returned, to any user; None for all.
        at_once: Scores held at a time, 4 bytes each; of one user at least.
        advance: Called with the number of users done.

    Returns:
        Exactly the ranks and the first ``k`` of the full ranking of ``scorer.recommend``.

    Raises:
        UserError: ``k < 1``, a filter with an item outside the catalogue, or scores that are NaN.
    """
    check_k(k)
    columns, n_users = _Columns(scorer.groups, allow), len(target)
    check_lists(n_users, history=histories, exclude=exclude)
    found = Places(
        np.full(n_users, -1, np.int32),
        np.zeros(n_users, bool),
        np.full((n_users, k), -1, np.int32),
        np.full((n_users, k), -np.inf, np.float32),
    )
    block = max(1, at_once // scorer.groups.n_items)
    for start in range(0, n_users, block):
        rows = range(start, min(start + block, n_users))
        scores = columns.of(scorer.item_scores([histories[b] for b in rows]))
        check_numbers(np.atleast_1d(scores.min(initial=0.0)))  # NaN where one is
        for b in rows:
            changed, item = columns.without(None if exclude is None else exclude[b])
            row = scores[b - start]
            found.rank[b], stands = columns.rank(row, int(target[b]), changed, item)
            found.itself[b] = stands == target[b]
            best, value = columns.top(row, k, changed, item)
            found.items[b, : len(best)], found.scores[b, : len(best)] = best, value
        advance(len(rows))
    return found


class _Columns:
    """The groups that may be returned to everybody, in the order in which ties break: by representative."""

    def __init__(self, groups: Groups, allow: Items | None) -> None:
        self.groups = groups
        self.allowed = np.full(groups.n_items, allow is None)
        self.allowed[checked_items([] if allow is None else allow, groups.n_items)] = True
        representative = groups.permitted(None, allow)
        self.item = np.sort(representative[representative >= 0])  # (C,)
        group = groups.of_item[self.item]
        self.of_group = np.full(groups.n_groups, -1, dtype=np.int64)
        self.of_group[group] = np.arange(len(self.item))
        member, start = groups.by_group
        self.is_shared = np.diff(start)[group] > 1  # columns of groups with several items
        self.shared = np.flatnonzero(self.is_shared)
        self.members = [member[start[g] : start[g + 1]] for g in group[self.shared]]
        self.place = {int(c): i for i, c in enumerate(self.shared)}

    def of(self, item_scores: NDArray[np.float32]) -> Scores:
        """(B, C) scores of the columns from those of all items."""
        if item_scores.shape[1:] != (self.groups.n_items,):
            raise ValueError(
                f"wanted scores of {self.groups.n_items} items for each user, got {item_scores.shape}"
            )
        if len(self.item) == self.groups.n_items:
            return item_scores
        scores: Scores = item_scores[:, self.item]
        if self.members:
            flat, size = np.concatenate(self.members), [len(m) for m in self.members]
            start = np.cumsum([0, *size[:-1]])
            scores[:, self.shared] = np.maximum.reduceat(item_scores[:, flat], start, axis=1)
        return scores

    def without(self, exclude: Items | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Columns that excluded items change, and what represents them then (-1: nothing)."""
        if exclude is None or not len(exclude):
            return _NONE, _NONE
        gone = checked_items(exclude, self.groups.n_items)
        column = np.sort(self.of_group[self.groups.of_item[gone]])
        column = column[(column >= 0) & np.append(True, column[1:] != column[:-1])]
        item = np.full(len(column), -1, dtype=np.int64)
        for i in np.flatnonzero(self.is_shared[column]):
            member = self.members[self.place[int(column[i])]]
            left = member[self.allowed[member] & (member[:, None] != gone).all(axis=1)]
            item[i] = left[0] if len(left) else -1
        return column, item

    def rank(
        self, row: Scores, target: int, changed: NDArray[np.int64], item: NDArray[np.int64]
    ) -> tuple[int, int]:
        """Rank of the target's group and the item that stands there; (-1, -1) where it may not be returned."""
        own = int(self.of_group[self.groups.of_item[target]])
        if own < 0:
            return -1, -1
        place = int(np.searchsorted(changed, own))
        is_changed = place < len(changed) and changed[place] == own
        stands = int(item[place] if is_changed else self.item[own])
        if stands < 0:
            return -1, -1
        score = row[own]
        before = np.searchsorted(self.item, stands)  # columns whose representative has a lower index
        rank = np.count_nonzero(row > score) + np.count_nonzero(row[:before] == score)
        if len(changed):
            other = row[changed]
            tie = other == score
            rank -= np.count_nonzero((other > score) | (tie & (self.item[changed] < stands)))
            # The own group has its own representative, which does not stand before itself.
            rank += np.count_nonzero((item >= 0) & ((other > score) | (tie & (item < stands))))
        return int(rank), stands

    def top(
        self, row: Scores, k: int, changed: NDArray[np.int64], item: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], Scores]:
        """The best ``k`` items and their scores."""
        column = _at_least(row, k + len(changed))
        stands = self.item[column].astype(np.int64)
        if len(changed):
            place = np.minimum(np.searchsorted(changed, column), len(changed) - 1)
            stands = np.where(changed[place] == column, item[place], stands)
            column, stands = column[stands >= 0], stands[stands >= 0]
        order = np.lexsort((stands, -row[column]))[:k]
        return stands[order], row[column[order]]


def _at_least(row: Scores, n: int) -> NDArray[np.intp]:
    """Places of the ``n`` largest scores of a row and of all that may tie with them, ascending; mostly few more."""
    if n >= len(row):
        return np.arange(len(row))
    parts = _PARTS
    while parts < 4 * n:
        parts *= 2
    if len(row) < 4 * parts:
        return np.flatnonzero(row >= np.partition(row, len(row) - n)[len(row) - n])
    # Of disjoint parts, the n-th largest maximum is reached by n scores: no smaller score is among the best n.
    whole = len(row) // parts * parts
    best = row[:whole].reshape(-1, parts).max(axis=0)
    return np.flatnonzero(row >= np.partition(best, parts - n)[parts - n])
