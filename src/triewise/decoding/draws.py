"""Titles drawn along the trie, one path for each user.

Dimension key: B users, D tokens of the longest title.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from triewise.arrays import Float64, Int64
    from triewise.decoding.growth import Edges
    from triewise.tokens import Trie


class Draws:
    """One path for each user, see `search.sample`; a `growth.Strategy`.

    Attributes:
        node: int64 (B,), the decision that each path has come to, or its leaf.
        live: int64, users whose paths go on, ascending.
    """

    def __init__(self, trie: Trie, uniform: Float64) -> None:
        self.trie, self.uniform = trie, uniform
        self.node = np.full(len(uniform), trie.next_decision[0], dtype=np.int64)
        self.live = np.zeros(0, dtype=np.int64)

    def start(self, user: Int64) -> None:
        """Begin with some users."""
        self.live = np.union1d(self.live, user[~self.trie.is_leaf[self.node[user]]])

    def request(self) -> tuple[Int64, Int64]:
        """The decisions that paths have come to."""
        return self.live, self.node[self.live]

    def foreseen(self) -> tuple[Int64, Int64]:
        """Nothing: the next decision depends on this one."""
        return self.live[:0], self.node[:0]

    def update(self, edges: Edges) -> Int64:
        """Draw a child of each node, and follow what is forced behind it."""
        end = np.append(np.flatnonzero(np.diff(edges.row)), len(edges.row) - 1)
        begin = np.append(0, end[:-1] + 1)
        # Log-probabilities of vocabulary support do not sum to 1.
        mass = np.cumsum(np.exp(edges.log_p.astype(np.float64)))
        below = mass[begin] - np.exp(edges.log_p[begin].astype(np.float64))
        drawn = self.uniform[self.live, self.trie.depth[self.node[self.live]]]
        place = np.searchsorted(mass, below + drawn * (mass[end] - below), side="right")
        self.node[self.live] = self.trie.next_decision[edges.node[np.clip(place, begin, end)]]
        through = self.trie.is_leaf[self.node[self.live]]
        done, self.live = self.live[through], self.live[~through]
        return done
