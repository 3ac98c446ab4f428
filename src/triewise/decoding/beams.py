"""Token-synchronous beams of many users, equal to ``transformers.generate`` along the trie.

Dimension key: B users, W beams.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from triewise.arrays import Bool, Int64, among_best
from triewise.decoding.scoring import (
    Discards,
    Hypotheses,
    Rule,
    best_of_each,
    divided,
    is_permitted,
    place_among,
)

if TYPE_CHECKING:
    from triewise.decoding.filters import TitleFilter
    from triewise.decoding.growth import Edges
    from triewise.tokens import Trie


class Beams:
    """Token-synchronous beam search, see `beam_search`.

    Attributes:
        live: Prefixes that go on, by user.
        done: Finished titles of users who go on, with their final scores.
        results: Those of users who are done.
        discards: What was dropped.
        lost: (B,) whether a user's watched title, or a prefix of it, was not among the best of its step. A title that
            better ones displace once it is finished, or that the search stops before, is not lost.
    """

    def __init__(
        self,
        trie: Trie,
        rule: Rule,
        filters: Sequence[TitleFilter | None],
        beams: int,
        length_penalty: float,
        watch: Int64 | None = None,
    ) -> None:
        self.trie, self.rule, self.filters = trie, rule, filters
        self.beams, self.penalty = beams, length_penalty
        self.live, self.done = Hypotheses.none(), Hypotheses.none()
        self.results: list[Hypotheses] = []
        self.discards = Discards(trie, length_penalty, filters)
        # Place of each user's title in the order of items under nodes; -1: none is watched.
        self.watched = np.full(len(filters), -1) if watch is None else trie.item_lo[watch]
        self.lost = np.zeros(len(filters), dtype=bool)

    def start(self, user: Int64) -> None:
        """Begin with some users: those who may get nothing are done after one round."""
        self.discards.bound[user], self.discards.any[user], self.lost[user] = -np.inf, False, False
        self.live = self.live.then(Hypotheses.roots(user))

    def forget(self, user: Int64) -> None:
        """Drop what there is of some users (n,), whose numbers others may get."""
        self.live, self.done = self.live.without(user), self.done.without(user)

    def request(self) -> tuple[Int64, Int64]:
        """The live prefixes."""
        return self.live.user, self.live.node

    def foreseen(self) -> tuple[Int64, Int64]:
        """What lies below the live prefixes, level by level, as far down as nothing has to be dropped."""
        trie, n_users, user, node = self.trie, len(self.filters), self.live.user, self.live.node
        users, nodes = [user[:0]], [node[:0]]
        n_done = np.bincount(self.done.user, minlength=n_users)
        filtered = np.array([own is not None for own in self.filters])
        while len(node):
            size = trie.n_children[node]
            # Where many edges lead on, only a filter may leave few.
            few = (np.bincount(user, size, n_users)[user] <= self.beams) | filtered[user]
            node, row = trie.below(node[few])
            user = user[few][row]
            permitted = is_permitted(self.filters, user, node)
            user, node = user[permitted], node[permitted]
            few = np.bincount(user, minlength=n_users)[user] <= self.beams
            leaf = trie.is_leaf[node]
            n_done += np.bincount(user[few & leaf], minlength=n_users)
            goes_on = few & ~leaf & (n_done[user] < self.beams)  # with so many titles a user may be done
            user, node = user[goes_on], node[goes_on]
            users.append(user)
            nodes.append(node)
        return np.concatenate(users), np.concatenate(nodes)

    def update(self, edges: Edges) -> Int64:
        """One token for every user."""
        trie, before = self.trie, np.unique(self.live.user)
        longer = self.live.continued(edges, self.rule, self.filters)
        longer, far = longer.parted(among_best(longer.user, longer.total, 2 * self.beams))
        self._drop(far)
        order, rank = best_of_each(longer.user, longer.total, trie.item_lo[longer.node])
        longer, leaf = longer.take(order), trie.is_leaf[longer.node[order]]
        top = rank < 2 * self.beams
        ends = leaf & (rank < self.beams)
        goes_on = top & ~leaf & (place_among(longer.user, top & ~leaf) < self.beams)
        self._drop(longer.take(~(ends | goes_on)))
        self._finish(longer.take(ends))
        self.live = longer.take(goes_on)
        stopped, self.live = self.live.parted(self._stopped()[self.live.user])
        self.discards.add(stopped)
        through = np.setdiff1d(before, self.live.user)
        result, self.done = self.done.parted(np.isin(self.done.user, through))
        self.results.append(result)
        return through

    def _drop(self, dropped: Hypotheses) -> None:
        """What is not among the best of a step."""
        self.discards.add(dropped)
        title, node = self.watched[dropped.user], dropped.node
        hit = (self.trie.item_lo[node] <= title) & (title < self.trie.item_hi[node])
        self.lost[dropped.user[hit]] = True

    def _finish(self, ended: Hypotheses) -> None:
        """Merge titles that ended into the best finished ones."""
        if len(ended.node):
            together = self.done.then(divided(ended, self.trie, self.penalty))
            order, rank = best_of_each(together.user, together.total, self.trie.item_lo[together.node])
            self.done, dropped = together.take(order).parted(rank < self.beams)
            self.discards.add_scores(dropped.user, dropped.total)

    def _stopped(self) -> Bool:
        """(B,) whether a user's beams can improve nothing any more, as ``early_stopping=False`` judges it."""
        n_users = len(self.filters)
        best = np.full(n_users, -np.inf, dtype=np.float32)
        np.maximum.at(best, self.live.user, divided(self.live, self.trie, self.penalty).total)
        worst = np.full(n_users, np.inf, dtype=np.float32)
        np.minimum.at(worst, self.done.user, self.done.total)
        full = np.bincount(self.done.user, minlength=n_users) >= self.beams
        stopped: Bool = full & (best <= worst)
        return stopped
