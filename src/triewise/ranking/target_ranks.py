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

from triewise.arrays import Bool, Float32, Int32, Int64, Ragged, blank_lists, nth_largest, within
from triewise.ranking.ranking import (
    SCORES_AT_ONCE,
    Groups,
    ItemLists,
    Items,
    ItemScorer,
    check_k,
    check_lists,
    check_numbers,
    checked_items,
    checked_lists,
)

Scores = NDArray[np.floating]
_IN_CACHE = 1 << 18  # scores that are counted together


@dataclass(frozen=True)
class Places:
    """Where targets stand, and who stands first.

    Attributes:
        rank: (B,) int32, 0-based rank of the target's group; -1 where no member of it may be returned.
        itself: (B,) bool, whether the target itself represents its group there.
        items: (B, K) int32 best items, -1 padded.
        scores: (B, K) float32, descending, -inf padded.
    """

    rank: Int32
    itself: Bool
    items: Int32
    scores: Float32

    @classmethod
    def blank(cls, n_users: int, k: int) -> Places:
        """Nothing ranked yet."""
        rank, itself = np.full(n_users, -1, dtype=np.int32), np.zeros(n_users, dtype=bool)
        return cls(rank, itself, *blank_lists(n_users, k))


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
    places = Places.blank(n_users, k)
    block, slab = (max(1, size // scorer.groups.n_items) for size in (at_once, _IN_CACHE))
    for start in range(0, n_users, block):
        users = range(start, min(start + block, n_users))
        scores = columns.of(scorer.item_scores([histories[b] for b in users]))
        check_numbers(np.atleast_1d(scores.min(initial=0.0)))  # NaN where one is
        for low in range(0, len(scores), slab):
            part = scores[low : low + slab]
            rows = slice(start + low, start + low + len(part))
            changed = columns.without(
                [] if exclude is None else [exclude[b] for b in users[low : low + slab]]
            )
            places.rank[rows], stands = columns.rank(part, target[rows], changed)
            places.itself[rows] = stands == target[rows]
            places.items[rows], places.scores[rows] = columns.top(part, k, changed)
        advance(len(scores))
    return places


@dataclass(frozen=True)
class _Changed:
    """Columns that a filter changes for some users (E,): ascending by user, then column."""

    user: Int64
    column: Int64
    item: Int64  # what represents the column then, -1: nothing


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

    def of(self, item_scores: Float32) -> Scores:
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

    def without(self, exclude: Sequence[Items | None]) -> _Changed:
        """What lists of excluded items change, one list a user."""
        gone, user = checked_lists(exclude, self.groups.n_items)
        column = self.of_group[self.groups.of_item[gone]]
        n_columns = max(len(self.item), 1)
        key = np.sort((user * n_columns + column)[column >= 0])
        key = key[np.append(True, key[1:] != key[:-1])] if len(key) else key
        user, column = key // n_columns, key % n_columns
        item = np.full(len(key), -1, dtype=np.int64)
        for i in np.flatnonzero(self.is_shared[column]).tolist() if self.members else ():
            member = self.members[self.place[int(column[i])]]
            left = member[self.allowed[member] & ~np.isin(member, exclude[user[i]])]
            item[i] = left[0] if len(left) else -1
        return _Changed(user, column, item)

    def rank(self, scores: Scores, target: NDArray[np.integer], changed: _Changed) -> tuple[Int64, Int64]:
        """Ranks (B,) of the targets' groups and the items that stand there; -1 where none may be returned."""
        own = self.of_group[self.groups.of_item[target]]
        if not len(self.item):
            return own, own
        stands = np.where(own >= 0, self.item[own], -1).astype(np.int64)
        user, column, item = changed.user, changed.column, changed.item
        is_own = column == own[user]
        stands[user[is_own]] = item[is_own]
        score = np.take_along_axis(scores, np.maximum(own, 0)[:, None], axis=1)
        rank = np.array([np.count_nonzero(row) for row in scores > score], dtype=np.int64)
        tied = np.array([np.count_nonzero(row) for row in scores >= score]) - rank > 1
        before = np.searchsorted(self.item, stands)  # columns whose representative has a lower index
        for b in np.flatnonzero(tied).tolist():
            rank[b] += np.count_nonzero(scores[b, : before[b]] == score[b])
        # A target alone with its score, and one that another item represents now, stands before itself.
        alone = ~tied & (own >= 0) & (own < before)
        rank += alone
        if len(user):
            other, wanted = scores[user, column], score[user, 0]
            above, tie = other > wanted, other == wanted
            rank -= np.bincount(user[above | (tie & (self.item[column] < stands[user]))], minlength=len(rank))
            again = (item >= 0) & (above | (tie & (item < stands[user])))  # under another item
            rank += np.bincount(user[again], minlength=len(rank))
        return np.where(stands >= 0, rank, -1), stands

    def top(self, scores: Scores, k: int, changed: _Changed) -> tuple[Int32, Float32]:
        """The best ``k`` items (B, K) and their scores, padded with -1 and -inf."""
        n_users, n_columns = scores.shape
        items, best = blank_lists(n_users, k)
        if len(changed.user):
            gone = changed.item < 0
            scores = scores.copy()
            scores[changed.user[gone], changed.column[gone]] = -np.inf
        user, column = _at_least(scores, k)
        value, stands = scores[user, column], self.item[column].astype(np.int64)
        if len(changed.user) and (not gone.all() or np.isneginf(value).any()):
            key, wanted = changed.user * n_columns + changed.column, user * n_columns + column
            place = np.minimum(np.searchsorted(key, wanted), len(key) - 1)
            stands = np.where(key[place] == wanted, changed.item[place], stands)
            left = stands >= 0
            user, value, stands = user[left], value[left], stands[left]
        # A table of candidates, one row a user, that numpy sorts row by row.
        count = np.bincount(user, minlength=n_users)
        place = within(count)
        shape = (n_users, int(count.max(initial=0)))
        who, worse = np.full(shape, -1, dtype=np.int64), np.full(shape, np.inf, dtype=scores.dtype)
        who[user, place], worse[user, place] = stands, -value
        # An empty place is -1 and goes behind a score of -inf that belongs to an item.
        order = np.lexsort((np.where(who < 0, len(self.groups.of_item), who), worse))[:, :k]
        width = order.shape[1]
        items[:, :width] = np.take_along_axis(who, order, axis=1)
        best[:, :width] = -np.take_along_axis(worse, order, axis=1)
        return items, best


def _at_least(scores: Scores, n: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows and columns of the ``n`` largest scores of each row and of all that may tie with them; mostly few more."""
    n_users, length = scores.shape
    if n >= length:
        return np.repeat(np.arange(n_users), length), np.tile(np.arange(length), n_users)
    parts = 4 * n
    best = scores
    if length >= 4 * parts:
        # Of disjoint parts, the n-th largest maximum is reached by n scores: no smaller score is among the best n.
        whole = length // parts * parts
        best = scores[:, :whole].reshape(n_users, -1, parts).max(axis=1)
    user, column = np.divmod(np.flatnonzero(scores >= nth_largest(best, n)[:, None]), length)
    return user, column
