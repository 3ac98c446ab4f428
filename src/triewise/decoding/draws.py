"""Titles drawn from a model along the trie: each with the product of its probabilities among valid tokens.

Dimension key: B users, D tokens of the longest title, E edges of one round.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from triewise.decoding.growth import Growth
from triewise.decoding.search import drive
from triewise.decoding.treecache import Counters

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from triewise.arrays import Float64, Int32, Int64
    from triewise.decoding.engine import TrieEngine
    from triewise.decoding.growth import Edges
    from triewise.decoding.treecache import TokenLists
    from triewise.tokens import Trie


def sample(engine: TrieEngine, prompts: TokenLists, uniform: Float64) -> Int32:
    """One title for each user, drawn token by token among the children, at temperature 1.

    Decisions alone cost a forward, a token each; what users draw does not depend on who is drawn for beside them, but
    for rounding.

    Args:
        engine: Model, trie and support; in trie support nothing is run that a draw does not need.
        prompts: Token ids of each user.
        uniform: (B, D), numbers in [0, 1) that decide.

    Returns:
        Item indices (B,); of equal titles the lowest.
    """
    draws = Draws(engine.trie, uniform)
    drive(Growth(engine, prompts, Counters()), draws)
    item: Int32 = engine.trie.item_order[engine.trie.item_lo[draws.node]]
    return item


class Draws:
    """One path for each user, see `sample`; a `search.Strategy`.

    Attributes:
        node: int64 (B,), the decision that each path has come to, or its leaf.
        live: int64, users whose paths go on, ascending.
    """

    def __init__(self, trie: Trie, uniform: NDArray[np.float64]) -> None:
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
