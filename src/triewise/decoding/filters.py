"""Which titles may be returned to a user, as places in the trie's item order: no array of nodes per user.

A filter restricts what is returned and never changes a probability. The permitted items under a node are a
count over the range ``item_lo[n]:item_hi[n]``: a running sum over ``item_order`` where an allow-list is long, a
search in the listed places where a list is short.

Shape key: N nodes, I items, E nodes asked about.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from triewise.ranking import Items, checked_items

if TYPE_CHECKING:
    from triewise.tokens import Trie

LONG = 32  # an allow-list of more than one item in so many is long


@dataclass(frozen=True)
class TitleFilter:
    """The items that may be returned to one user.

    Attributes:
        trie: The catalogue.
        places: int64, ascending; places in ``trie.item_order``.
        only: Whether these places are the permitted ones; else all others are.
        before: int32 (I+1,), permitted items in front of each place, for a long allow-list; then ``places`` is empty.
    """

    trie: Trie
    places: NDArray[np.int64]
    only: bool
    before: NDArray[np.int32] | None = None

    @classmethod
    def of(cls, trie: Trie, exclude: Items | None, allow: Items | None) -> TitleFilter | None:
        """The filter of one user, None where everything may be returned.

        Lists are those of `Recommender.recommend`, errors those of `checked_items`.
        """
        nothing = np.zeros(0, dtype=np.int64)
        without = nothing if exclude is None else checked_items(exclude, trie.n_items)
        if allow is None:
            return cls(trie, np.unique(trie.place[without]), False) if len(without) else None
        listed = checked_items(allow, trie.n_items)
        if LONG * len(listed) <= trie.n_items:
            return cls(trie, np.setdiff1d(trie.place[listed], trie.place[without]), True)
        permitted = np.zeros(trie.n_items, dtype=bool)
        permitted[listed] = True
        permitted[without] = False
        before = np.zeros(trie.n_items + 1, dtype=np.int32)
        np.cumsum(permitted[trie.item_order], out=before[1:])
        return cls(trie, nothing, True, before)

    def count(self, node: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of permitted items under nodes (E,)."""
        low, high = self.trie.item_lo[node].astype(np.int64), self.trie.item_hi[node].astype(np.int64)
        if self.before is not None:
            return (self.before[high] - self.before[low]).astype(np.int64)
        listed = np.searchsorted(self.places, high) - np.searchsorted(self.places, low)
        return listed if self.only else high - low - listed

    def items(self, node: int) -> NDArray[np.int32]:
        """The permitted items under one node."""
        low, high = int(self.trie.item_lo[node]), int(self.trie.item_hi[node])
        if self.before is not None:
            return self.trie.item_order[low + np.flatnonzero(np.diff(self.before[low : high + 1]))]
        first, last = np.searchsorted(self.places, (low, high))
        listed = self.places[first:last]
        place = listed if self.only else np.setdiff1d(np.arange(low, high), listed, assume_unique=True)
        return self.trie.item_order[place]
