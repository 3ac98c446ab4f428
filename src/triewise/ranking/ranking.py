"""What every recommender returns, and the rules all of them share: groups of equal titles, filters, ties.

Dimension key: B users, I items, G groups, K returned items.
"""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from triewise.arrays import blank_lists, nth_largest, ranges
from triewise.errors import Diverged, UserError

if TYPE_CHECKING:
    from triewise.data import Catalog

Items = Sequence[int] | NDArray[np.integer[Any]]
ItemLists = Sequence[Items]
SCORES_AT_ONCE = 1 << 24  # scores of items held at one time


@dataclass(frozen=True)
class Ranking:
    """The best groups of each user, best first.

    Attributes:
        items: (B, K) int32, the representative item of each group; -1 where fewer than K groups are allowed.
        scores: (B, K) float32, descending; -inf where ``items`` is -1. Of language models log-probabilities, nats.
        certified: (B,) bool, whether no group that is missing can belong there. With a tolerance: by more than that.
        counters: Work done, see `Counters`.
        tolerance: How far apart two scores must be before they say which of the two is better; 0 where a group gets
            the same score however it is computed. Language models in half precision measure theirs.
        tied: (B,) int32, so many of the last places may be missing groups' as well, being within the tolerance of the
            last place; None without tolerance.
        pruned: (B,) bool, whether a beam search dropped the title it was told to watch at a step; None where it was
            told none.
    """

    items: NDArray[np.int32]
    scores: NDArray[np.float32]
    certified: NDArray[np.bool_]
    counters: dict[str, int] = field(default_factory=dict)
    tolerance: float = 0.0
    tied: NDArray[np.int32] | None = None
    pruned: NDArray[np.bool_] | None = None

    def titles(self, catalog: Catalog) -> list[list[str]]:
        """The titles of each user's items, best first; only those that are there, so lists may be shorter than K."""
        return [[catalog.title[i] for i in row if i >= 0] for row in self.items.tolist()]


class Recommender(Protocol):
    """Anything that ranks the catalogue for histories."""

    @property
    def groups(self) -> Groups:
        """The units of ranking."""

    def recommend(
        self,
        histories: ItemLists,
        k: int | None = 10,
        exclude: ItemLists | str | None = None,
        allow: ItemLists | None = None,
    ) -> Ranking:
        """The best ``k`` groups for each history. Every recommender's ``recommend`` is this one.

        Args:
            histories: Item indices, oldest first; empty where the recommender knows what to do with nothing.
            k: Number of groups; None for all of them.
            exclude: Per user, items that must not be returned; ``"history"`` stands for the user's own items.
            allow: Per user, the only items that may be returned.

        Returns:
            Certified where nothing that is missing belongs there; what a score is, the recommender's class says.

        Raises:
            UserError: An item outside the catalogue, ``k < 1``, filters for another number of users, or settings of the
                recommender that do not go together.
        """


@runtime_checkable
class ItemScorer(Recommender, Protocol):
    """A recommender that gives every item a score of its own; `target_ranks` ranks its targets unsorted."""

    def item_scores(self, histories: ItemLists) -> NDArray[np.float32]:
        """Scores (B, I) float32 of all items, higher is better; filters are no business of theirs."""


@dataclass(frozen=True)
class Groups:
    """Items that are told apart by nothing a user sees (equal titles) are one unit of ranking.

    Attributes:
        of_item: (I,) int32, the group of each item, in [0, G).
        priority: (I,) int64, training targets of each item: the allowed member with most represents its group.
    """

    of_item: NDArray[np.int32]
    priority: NDArray[np.int64]

    @classmethod
    def from_labels(cls, labels: ArrayLike, priority: ArrayLike | None = None) -> Groups:
        """Groups of items with equal labels; ``priority`` defaults to zeros (the lowest index represents)."""
        _, of_item = np.unique(np.asarray(labels), return_inverse=True)
        counts = np.zeros(len(of_item)) if priority is None else np.asarray(priority)
        return cls(of_item.astype(np.int32), counts.astype(np.int64))

    @property
    def n_items(self) -> int:
        """Number of items I."""
        return len(self.of_item)

    @property
    def n_groups(self) -> int:
        """Number of groups G."""
        return int(self.of_item.max()) + 1

    def permitted(self, exclude: Items | None = None, allow: Items | None = None) -> NDArray[np.int32]:
        """(G,) int32: the item that represents each group under the filters, -1 where no member is allowed."""
        allowed = np.ones(self.n_items, dtype=bool)
        if allow is not None:
            allowed[:] = False
            allowed[checked_items(allow, self.n_items)] = True
        if exclude is not None:
            allowed[checked_items(exclude, self.n_items)] = False
        representative = np.full(self.n_groups, -1, dtype=np.int32)
        items = self.preference[::-1]
        items = items[allowed[items]]
        representative[self.of_item[items]] = items  # the last write wins
        return representative

    @cached_property
    def preference(self) -> NDArray[np.int64]:
        """(I,) items, those first that rather represent their group: most training targets, then lowest index."""
        return np.lexsort((np.arange(self.n_items), -self.priority))

    @cached_property
    def by_group(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Items (I,) group by group, in each by `preference`, and where each group begins (G+1,)."""
        member = self.preference[np.argsort(self.of_item[self.preference], kind="stable")]
        return member, np.searchsorted(self.of_item[member], np.arange(self.n_groups + 1))

    def members(self, items: Items) -> NDArray[np.int64]:
        """All items of the groups of some, ascending; numbers behind the items are of no group."""
        member, start = self.by_group
        listed = np.asarray(items, dtype=np.int64)
        group = np.unique(self.of_item[listed[listed < self.n_items]])
        return np.sort(member[ranges(start[group], start[group + 1] - start[group]).at])

    def total(self, counts: NDArray[np.integer]) -> NDArray[np.float64]:
        """(I,) sum of ``counts`` (I,) over the group of each item."""
        return np.bincount(self.of_item, weights=counts).astype(np.float64)[self.of_item]

    def scores(self, item_scores: NDArray[np.floating]) -> NDArray[np.floating]:
        """(B, G) scores of groups from those of items (B, I): of the best member, whatever is filtered."""
        member, start = self.by_group
        best: NDArray[np.floating] = np.maximum.reduceat(item_scores[:, member], start[:-1], axis=1)
        return best


def checked_items(items: Items, n_items: int) -> NDArray[np.int64]:
    """Item indices as int64 (n,); UserError when they are not a list of integers in [0, n_items)."""
    return _inside(_integers(items), n_items)


def checked_lists(lists: Sequence[Items | None], n_items: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Lists of items, one a user, one behind the other (n,) and the user of each (n,); errors as `checked_items`."""
    filled = [_integers(() if one is None else one) for one in lists]
    user = np.repeat(np.arange(len(filled)), [len(one) for one in filled])
    return _inside(np.concatenate([_integers(()), *filled]), n_items), user


def _integers(items: Items) -> NDArray[np.int64]:
    index = np.asarray(items)
    if index.size and (index.ndim != 1 or index.dtype.kind not in "iu"):
        raise UserError(
            f"wanted a list of item indices for each user, got {items!r}; pass a list of lists of integers"
        )
    return index.astype(np.int64).reshape(-1)


def _inside(index: NDArray[np.int64], n_items: int) -> NDArray[np.int64]:
    if index.size and (index.min() < 0 or index.max() >= n_items):
        wrong = index[(index < 0) | (index >= n_items)][0]
        raise UserError(
            f"wanted item indices in [0, {n_items}), got {wrong}; use the indices of this catalogue"
        )
    return index


def check_lists(n_users: int, **lists: Sized | None) -> None:
    """UserError when a list that has an entry for each user has another length."""
    for name, given in lists.items():
        if given is not None and len(given) != n_users:
            raise UserError(f"wanted {name} lists for {n_users} users, got {len(given)}")


def check_k(k: int | None) -> None:
    """UserError unless k is None or at least 1."""
    if k is not None and k < 1:
        raise UserError(f"wanted k >= 1 or None for the whole catalogue, got {k}")


def check_numbers(scores: NDArray[np.floating]) -> None:
    """Diverged when a score is NaN."""
    if np.isnan(scores).any():
        raise Diverged(
            "scores are not numbers (NaN): the model diverged; train it again with a lower learning rate"
        )


def add_counters(total: dict[str, int], part: dict[str, int]) -> None:
    """Add ``part`` to ``total`` in place; peaks take the larger value."""
    for name, value in part.items():
        old = total.get(name, 0)
        total[name] = max(old, value) if name.endswith("_peak") else old + value


def check_histories(histories: ItemLists, groups: Groups, more: int = 0) -> None:
    """UserError when a history is not a list of items of the catalogue, or of so many ``more`` behind them."""
    for history in histories:
        checked_items(history, groups.n_items + more)


def resolve_filters(
    histories: ItemLists, exclude: Sequence[Items | None] | str | None, allow: Sequence[Items | None] | None
) -> tuple[list[Items | None], list[Items | None]]:
    """One exclude list and one allow list (or None) for each user."""
    if isinstance(exclude, str):
        if exclude != "history":
            raise UserError(f'wanted exclude = "history" or item indices for each user, got {exclude!r}')
        exclude = histories
    check_lists(len(histories), exclude=exclude, allow=allow)
    nothing: list[Items | None] = [None] * len(histories)
    return (nothing if exclude is None else list(exclude), nothing if allow is None else list(allow))


def rank_groups(
    scores: NDArray[np.floating],
    groups: Groups,
    k: int | None,
    exclude: Sequence[Items | None] | None = None,
    allow: Sequence[Items | None] | None = None,
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Order groups by score, ties by the index of the representative item.

    Args:
        scores: (B, G), any float dtype.
        groups: The groups, in the order of the columns.
        k: How many to return, or None for all.
        exclude: Per user, as in `Recommender.recommend`, or None.
        allow: Likewise.

    Returns:
        Items (B, K) int32 padded with -1 and scores (B, K) float32 padded with -inf.

    Raises:
        UserError: ``k < 1``, or a filter with an item outside the catalogue.
    """
    check_k(k)
    check_lists(len(scores), exclude=exclude, allow=allow)
    check_numbers(scores)
    n_users, n_groups = scores.shape
    columns = k or n_groups
    width = min(columns, n_groups)
    items, best = blank_lists(n_users, columns)
    everything = groups.permitted()
    for b in range(n_users):
        without, only = (None if given is None else given[b] for given in (exclude, allow))
        free = without is None and only is None
        representative = everything if free else groups.permitted(without, only)
        column = np.flatnonzero(representative >= 0)
        row = scores[b, column]
        if width < len(column):  # a partial sort; ties with the last place stay in
            keep = row >= nth_largest(row, width)
            column, row = column[keep], row[keep]
        order = np.lexsort((representative[column], -row))[:width]
        items[b, : len(order)] = representative[column[order]]
        best[b, : len(order)] = row[order]
    return items, best


def rank_items(
    scorer: ItemScorer,
    histories: ItemLists,
    k: int | None = 10,
    exclude: ItemLists | str | None = None,
    allow: ItemLists | None = None,
) -> Ranking:
    """``recommend`` of an item scorer, see `Recommender`: its scores, sorted; a group counts as its best member."""
    groups = scorer.groups
    without, only = resolve_filters(histories, exclude, allow)
    check_k(k)
    items, ranked = blank_lists(len(histories), k or groups.n_groups)
    block = max(1, SCORES_AT_ONCE // groups.n_items)
    for start in range(0, len(histories), block):
        part = slice(start, start + block)
        scores = groups.scores(scorer.item_scores(histories[part]))
        items[part], ranked[part] = rank_groups(scores, groups, k, without[part], only[part])
    return Ranking(items, ranked, np.ones(len(histories), dtype=bool), {})
