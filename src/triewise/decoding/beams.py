"""Token-synchronous beams of many users, equal to ``transformers.generate`` along the trie.

Dimension key: B users, W beams.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from triewise.decoding.filters import TitleFilter
from triewise.decoding.growth import Edges, children
from triewise.decoding.scoring import (
    Discards,
    Hypotheses,
    Rule,
    among_best,
    best_of_each,
    divided,
    is_permitted,
    place_among,
)
from triewise.tokens import Trie

Ints = NDArray[np.int64]


class Beams:
    """Token-synchronous beam search, see `beam_search`.

    Attributes:
        live: Prefixes that go on, by user.
        done: Finished titles of users who go on, with their final scores.
        results: Those of users who are done.
        discards: What was dropped.
    """

    def __init__(
        self, trie: Trie, rule: Rule, filters: Sequence[TitleFilter | None], beams: int, length_penalty: float
    ) -> None:
        self.trie, self.rule, self.filters = trie, rule, filters
        self.beams, self.penalty = beams, length_penalty
        self.live, self.done = Hypotheses.none(), Hypotheses.none()
        self.results: list[Hypotheses] = []
        self.discards = Discards(trie, length_penalty, filters)

    def start(self, user: Ints) -> None:
        """Begin with some users: those who may get nothing are done after one round."""
        self.live = self.live.then(Hypotheses.roots(user))

    def request(self) -> tuple[Ints, Ints]:
        """The live prefixes."""
        return self.live.user, self.live.node

    def foreseen(self) -> tuple[Ints, Ints]:
        """What lies below the live prefixes, level by level, as far down as nothing has to be dropped."""
        trie, n_users, user, node = self.trie, len(self.filters), self.live.user, self.live.node
        users, nodes = [user[:0]], [node[:0]]
        n_done = np.bincount(self.done.user, minlength=n_users)
        filtered = np.array([own is not None for own in self.filters])
        while len(node):
            size = trie.n_children[node]
            # Where many edges lead on, only a filter may leave few.
            few = (np.bincount(user, size, n_users)[user] <= self.beams) | filtered[user]
            row, node = children(trie, node[few])
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

    def update(self, edges: Edges) -> Ints:
        """One token for every user."""
        trie, before = self.trie, np.unique(self.live.user)
        found = self.live.continued(edges, self.rule, self.filters)
        near = among_best(found.user, found.total, 2 * self.beams)
        self.discards.add(found.take(~near))
        found = found.take(near)
        order, rank = best_of_each(found.user, found.total, trie.item_lo[found.node])
        found, leaf = found.take(order), trie.is_leaf[found.node[order]]
        top = rank < 2 * self.beams
        ends = leaf & (rank < self.beams)
        goes_on = top & ~leaf & (place_among(found.user, top & ~leaf) < self.beams)
        self.discards.add(found.take(~(ends | goes_on)))
        self._finish(found.take(ends))
        self.live = found.take(goes_on)
        stopped = self._stopped()[self.live.user]
        self.discards.add(self.live.take(stopped))
        self.live = self.live.take(~stopped)
        through = np.setdiff1d(before, self.live.user)
        ours = np.isin(self.done.user, through)
        self.results.append(self.done.take(ours))
        self.done = self.done.take(~ours)
        return through

    def _finish(self, ended: Hypotheses) -> None:
        """Merge titles that ended into the best finished ones."""
        if len(ended.node):
            together = self.done.then(divided(ended, self.trie, self.penalty))
            order, rank = best_of_each(together.user, together.total, self.trie.item_lo[together.node])
            together = together.take(order)
            dropped = together.take(rank >= self.beams)
            self.discards.add_scores(dropped.user, dropped.total)
            self.done = together.take(rank < self.beams)

    def _stopped(self) -> NDArray[np.bool_]:
        """(B,) whether a user's beams can improve nothing any more, as ``early_stopping=False`` judges it."""
        n_users = len(self.filters)
        best = np.full(n_users, -np.inf, dtype=np.float32)
        np.maximum.at(best, self.live.user, divided(self.live, self.trie, self.penalty).total)
        worst = np.full(n_users, np.inf, dtype=np.float32)
        np.minimum.at(worst, self.done.user, self.done.total)
        full = np.bincount(self.done.user, minlength=n_users) >= self.beams
        stopped: NDArray[np.bool_] = full & (best <= worst)
        return stopped
