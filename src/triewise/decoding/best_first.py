"""Best-first search that stops with a proof: a prefix bounds every title below it.

Dimension key: B users.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from triewise.decoding.growth import Edges, Growth, forced_runs
from triewise.decoding.scoring import Hypotheses, Rule, best_of_each, bounds, divided, kth_score, place_among

if TYPE_CHECKING:
    from triewise.arrays import Int64
    from triewise.decoding.beams import Beams
    from triewise.decoding.filters import TitleFilter

# Times k: prefixes of a user in one round. No expansion was wasted up to 3, and a round less costs more.
WIDTH = 2


class BestFirst:
    """Best-first search with a proof, see `exact_search`.

    Attributes:
        open: Prefixes that were not expanded, with the sums of their edge scores.
        done: The best finished titles of users who go on, with their final scores.
        results: Those of users who are done.
        proven: (B,) whether nothing that was left open can matter.
        dropped: (B,) the best that any dropped prefix or title could have become.
    """

    def __init__(
        self,
        growth: Growth,
        rule: Rule,
        filters: Sequence[TitleFilter | None],
        k: int,
        length_penalty: float,
        max_expansions: int | None,
        first: Beams,
    ) -> None:
        self.growth, self.trie, self.rule, self.filters = growth, growth.trie, rule, filters
        self.k, self.penalty, self.limit, self.first = k, length_penalty, max_expansions, first
        self.open, self.done = Hypotheses.none(), Hypotheses.none()
        self.results: list[Hypotheses] = []
        self.proven = np.ones(len(filters), dtype=bool)
        self.dropped = np.full(len(filters), -np.inf, dtype=np.float32)
        self.threshold = np.full(len(filters), -np.inf, dtype=np.float32)
        self.expanded = np.zeros(len(filters), dtype=np.int64)
        self.beams = Hypotheses.none()  # titles that the beam search of users who go on had found
        self._asked = Hypotheses.none()

    def start(self, user: Int64) -> None:
        """Begin with some users, in vocabulary support with a beam search."""
        self.proven[user], self.expanded[user] = True, 0
        self.dropped[user] = self.threshold[user] = -np.inf
        if self.growth.engine.support == "vocabulary":
            self.first.start(user)
        else:
            self.open = self.open.then(Hypotheses.roots(user))

    def forget(self, user: Int64) -> None:
        """Drop what there is of some users (n,), whose numbers others may get."""
        self.first.forget(user)
        self.open, self.done, self.beams = (part.without(user) for part in (self.open, self.done, self.beams))

    def request(self) -> tuple[Int64, Int64]:
        """The open prefixes whose bounds are among the best 2 k of open prefixes and finished titles; at least one."""
        bound = bounds(self.open.total, self.open.node, self.trie, self.penalty)
        everything = np.concatenate([bound, self.done.total])
        user = np.concatenate([self.open.user, self.done.user])
        order, rank = best_of_each(user, everything, np.arange(len(user)))
        is_open = order < len(bound)
        # Ranks among the open alone say which is a user's best; it is asked for whatever lies above it.
        width = np.full(len(order), WIDTH * self.k)
        if self.limit is not None:
            width = np.minimum(width, (self.limit - self.expanded)[user[order]])
        chosen = is_open & ((rank < width) | (place_among(user[order], is_open) == 0))
        asked = np.zeros(len(bound), dtype=bool)
        asked[order[chosen]] = True
        mine, self.open = self.open.parted(asked)
        self._asked = mine.take(np.argsort(mine.user, kind="stable"))
        user, node = self.first.request()
        return np.concatenate([user, self._asked.user]), np.concatenate([node, self._asked.node])

    def foreseen(self) -> tuple[Int64, Int64]:
        """What the beam search that comes first foresees, and forced tokens below what is asked for."""
        below = forced_runs(self.trie, self._asked.user, self._asked.node)
        user, node = (np.concatenate(pair) for pair in zip(self.first.foreseen(), below, strict=True))
        return user, node

    def update(self, edges: Edges) -> Int64:
        """One round: expand, follow forced tokens, drop what cannot matter."""
        n_first = len(self.first.request()[0])
        mine = edges.row >= n_first
        asked = self._asked
        self.expanded += np.bincount(asked.user, minlength=len(self.filters))
        touched = np.unique(asked.user)
        self._take_in(asked.continued(edges.take(mine, n_first), self.rule, self.filters))
        if n_first:
            through = self.first.update(edges.take(~mine, 0))
            titles = self.first.results.pop()
            self.threshold[through] = kth_score(titles, self.k, len(self.filters))[through]
            self.beams = self.beams.then(titles)
            self.open = self.open.then(Hypotheses.roots(through))
            touched = np.union1d(touched, through)
        kth = np.maximum(kth_score(self.done, self.k, len(self.filters)), self.threshold)
        bound = bounds(self.open.total, self.open.node, self.trie, self.penalty)
        near = bound >= kth[self.open.user]
        np.maximum.at(self.dropped, self.open.user[~near], bound[~near])
        self.open, bound = self.open.take(near), bound[near]
        if self.limit is not None:
            over = self.expanded[self.open.user] >= self.limit
            np.maximum.at(self.dropped, self.open.user[over], bound[over])
            cut = np.unique(self.open.user[over])
            self.proven[cut] = False
            self.open = self.open.take(~over)
            # What the beams had found is better than nothing; a title that both found is the same one.
            both = self.done.then(self.beams.take(np.isin(self.beams.user, cut)))
            key = both.user * self.trie.n_nodes + both.node
            self.done = both.take(np.unique(key, return_index=True)[1])
        through = np.setdiff1d(touched, self.open.user)
        self.beams = self.beams.take(~np.isin(self.beams.user, through))
        result, self.done = self.done.parted(np.isin(self.done.user, through))
        self.results.append(result)
        return through

    def _take_in(self, longer: Hypotheses) -> None:
        """Sort new prefixes into finished titles and open ones; those whose edges are known go on at once."""
        while len(longer.node):
            if self.growth.engine.support == "trie":  # forced tokens cost nothing and score nothing
                longer = replace(longer, node=self.trie.next_decision[longer.node].astype(np.int64))
            titles, longer = longer.parted(self.trie.is_leaf[longer.node])
            together = self.done.then(divided(titles, self.trie, self.penalty))
            # Ties at the last place stay in: which of them is returned is decided by item index, at the end.
            kth = kth_score(together, self.k, len(self.filters))
            self.done, below = together.parted(together.total >= kth[together.user])
            np.maximum.at(self.dropped, below.user, below.total)
            known = self.trie.n_children[longer.node] == 1
            known[known] = self.growth.known(longer.user[known], longer.node[known])
            longer, open_ones = longer.parted(known)
            self.open = self.open.then(open_ones)
            longer = longer.continued(self.growth.expand(longer.user, longer.node), self.rule, self.filters)
