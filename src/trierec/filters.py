"""Which titles may be returned to a user, as places in the trie's item order: no array of nodes per user.

A filter restricts what is returned and never changes a probability. The permitted items under a node are a
count over the range ``item_lo[n]:item_hi[n]``.

Shape key: N nodes, I items, E nodes asked about.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trierec.ranking import Items, checked_items
from trierec.trie import Trie


@dataclass(frozen=True)
class TitleFilter:
    """The items that may be returned to one user.

    Attributes:
        trie: The catalogue.
        places: int64, ascending; places in ``trie.item_order``.
        only: Whether these places are the permitted ones; else all others are.
    """

    trie: Trie
    places: NDArray[np.int64]
    only: bool

    @classmethod
    def of(cls, trie: Trie, exclude: Items | None, allow: Items | None) -> TitleFilter | None:
        """The filter of one user, None where everything may be returned.

        Args:
            trie: The catalogue.
            exclude: Items that may not be returned.
            allow: The only items that may be.

        Raises:
            UserError: Not item indices of this catalogue.
        """
        without = (
            np.zeros(0, dtype=np.int64)
            if exclude is None
            else trie.place[checked_items(exclude, trie.n_items)]
        )
        if allow is None:
            return cls(trie, np.unique(without), False) if len(without) else None
        permitted = np.zeros(trie.n_items, dtype=bool)
        permitted[trie.place[checked_items(allow, trie.n_items)]] = True
        permitted[without] = False
        return cls(trie, np.flatnonzero(permitted), True)

    def count(self, node: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of permitted items under nodes (E,)."""
        low, high = self.trie.item_lo[node].astype(np.int64), self.trie.item_hi[node].astype(np.int64)
        listed = np.searchsorted(self.places, high) - np.searchsorted(self.places, low)
        return listed if self.only else high - low - listed

    def items(self, node: int) -> NDArray[np.int32]:
        """The permitted items under one node."""
        low, high = int(self.trie.item_lo[node]), int(self.trie.item_hi[node])
        first, last = np.searchsorted(self.places, (low, high))
        listed = self.places[first:last]
        place = listed if self.only else np.setdiff1d(np.arange(low, high), listed, assume_unique=True)
        return self.trie.item_order[place]
