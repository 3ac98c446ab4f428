r"""How paths are scored, and what is known of the paths that were dropped.

Every search scores a title alike,

.. math:: S(i) = L_i^{-\lambda} \sum_t \big(a\, w(n_t) \log p(y_t \mid n_{t-1}) + (1 - a) \log r(n_t)\big)

with the length penalty lambda, IGD's weights w of the edges, and D3's assistant r: the share of a parent's mass
that lies under the child. No term is above zero, so a prefix bounds all titles below it.

Dimension key: B users, N trie nodes, E candidate edges, H prefixes or titles of several users.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from triewise.arrays import Bool, Float32, Float64, Int32, Int64, place_in_run, runs
from triewise.errors import UserError
from triewise.ranking import check_numbers
from triewise.tokens import Trie, decoding_weights, is_trained, scale_within

if TYPE_CHECKING:
    from triewise.decoding.filters import TitleFilter
    from triewise.decoding.growth import Edges


@dataclass(frozen=True)
class Rule:
    """What an edge is worth: IGD's weights and D3's assistant applied to its log-probability.

    Attributes:
        trie: The catalogue.
        edge_weight: (N,) weight of the edge into each node, or None for 1.
        alpha: Strength of the gain scaled per step; 0 where it is scaled per node, in ``edge_weight``.
        gain: (N,) information gain, for the scaling per step.
        trained: (N,); the nodes that the scaling per step looks at, or None for all.
        share: (B, N) log of the share of the parent's mass under each node, or None without assistant.
        weight: Of the language model beside the assistant.
    """

    trie: Trie
    edge_weight: Float32 | None
    alpha: float
    gain: Float64 | None
    trained: Bool | None
    share: Float32 | None
    weight: float

    @classmethod
    def of(
        cls,
        trie: Trie,
        n_users: int,
        alpha: float,
        scope: str,
        gain: Float64 | None,
        assistant: NDArray[np.floating] | None,
        weight: float,
        counts: Int64 | None = None,
    ) -> Rule:
        """Check and precompute; with ``counts`` (I,) the gain is scaled over what has training targets."""
        if scope not in ("node", "step"):
            raise UserError(f"wanted scope 'node' or 'step', got {scope!r}")
        if not 0 <= alpha <= 1:
            raise UserError(f"wanted alpha in [0, 1], got {alpha}")
        if not 0 <= weight <= 1:
            raise UserError(f"wanted assistant_weight in [0, 1], got {weight}")
        if alpha and gain is None:
            raise UserError("alpha > 0 needs gain: give information_gain(trie, counts)")
        if weight < 1 and assistant is None:
            raise UserError("assistant_weight < 1 needs assistant: give log-probabilities (users, items)")
        edge_weight = share = None
        if alpha and gain is not None:  # also checks the gain for scope "step"
            edge_weight = decoding_weights(trie, gain, alpha, counts).astype(np.float32)
        if assistant is not None and weight < 1:
            share = mass_shares(trie, np.asarray(assistant), n_users)
        by_step = alpha if scope == "step" else 0.0
        trained = is_trained(trie, counts) if by_step and counts is not None else None
        return cls(trie, None if by_step else edge_weight, by_step, gain, trained, share, weight)

    def on_all_edges(self, log_p: Float32, user: Int64) -> Float32:
        """(n, N) edge scores from the log-probabilities of all edges; ``user`` (n,) is whose they are."""
        if self.edge_weight is not None:
            log_p = log_p * self.edge_weight
        return self._assisted(log_p, user)

    def on_edges(self, user: Int64, edges: Edges) -> Float32:
        """(E,) edge scores of one step; ``user`` (E,) is whose edge it is."""
        log_p = edges.log_p
        if self.edge_weight is not None:
            log_p = log_p * self.edge_weight[edges.node]
        elif self.alpha and self.gain is not None:
            among = None if self.trained is None else self.trained[edges.node]
            scaled = scale_within(self.gain[edges.node], runs(user)[:-1], among)
            log_p = log_p * (1 - self.alpha * scaled).astype(np.float32)
        return self._assisted(log_p, (user, edges.node))

    def _assisted(self, log_p: Float32, place: Any) -> Float32:
        """Scores mixed with the assistant's, which stand at a place of ``share``."""
        if self.share is None:
            return log_p
        mixed: Float32 = np.float32(self.weight) * log_p + np.float32(1 - self.weight) * self.share[place]
        return mixed


def path_sums(trie: Trie, edges: Float32) -> Float32:
    """(B, N) sums of edge scores from the root to each node, level by level."""
    total = edges.copy()
    for depth in range(1, len(trie.level_ptr) - 1):
        level = slice(int(trie.level_ptr[depth]), int(trie.level_ptr[depth + 1]))
        total[:, level] += total[:, trie.parent[level]]
    return total


def mass_shares(trie: Trie, assistant: NDArray[np.floating], n_users: int) -> Float32:
    """(B, N) log of mass under a node over mass under its parent, <= 0; -inf where the node has none."""
    if assistant.shape != (n_users, trie.n_items):
        raise UserError(
            f"wanted assistant log-probabilities for {n_users} users and {trie.n_items} items, got shape "
            f"{assistant.shape}; give one row per user"
        )
    if np.isnan(assistant).any() or not np.isfinite(assistant.max(1, initial=-np.inf)).all():
        raise UserError(
            "wanted assistant log-probabilities below infinity, one above -inf per user; check its scores"
        )
    share = np.zeros((n_users, trie.n_nodes), dtype=np.float32)
    for b, row in enumerate(assistant.astype(np.float64)):
        mass = trie.subtree_sum(np.exp(row - row.max()))
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.log(mass[1:]) - np.log(mass[trie.parent[1:]])
        share[b, 1:] = np.minimum(np.nan_to_num(ratio, nan=-np.inf, neginf=-np.inf), 0)
    return share


@dataclass(frozen=True)
class Hypotheses:
    """Prefixes or titles of several users.

    Attributes:
        user: int64 (H,).
        node: int64 (H,).
        total: float32 (H,); sum of edge scores, or final score of finished titles.
    """

    user: Int64
    node: Int64
    total: Float32

    @classmethod
    def none(cls) -> Hypotheses:
        """Nothing."""
        return cls(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))

    @classmethod
    def roots(cls, user: Int64) -> Hypotheses:
        """The root for each of some users."""
        return cls(user, np.zeros(len(user), np.int64), np.zeros(len(user), np.float32))

    def take(self, chosen: Bool | Int64) -> Hypotheses:
        """Those of a mask or an index."""
        return Hypotheses(self.user[chosen], self.node[chosen], self.total[chosen])

    def parted(self, chosen: Bool) -> tuple[Hypotheses, Hypotheses]:
        """Those of a mask, and the others."""
        return self.take(chosen), self.take(~chosen)

    def without(self, user: Int64) -> Hypotheses:
        """Those of other users."""
        return self.take(~np.isin(self.user, user))

    @classmethod
    def joined(cls, parts: Sequence[Hypotheses]) -> Hypotheses:
        """Several, one after the other."""
        return cls(*(np.concatenate([getattr(p, name) for p in parts]) for name in vars(parts[0])))

    def then(self, other: Hypotheses) -> Hypotheses:
        """These and those."""
        return self.joined([self, other])

    def continued(self, edges: Edges, rule: Rule, filters: Sequence[TitleFilter | None]) -> Hypotheses:
        """All continuations that lead to a permitted title."""
        user = self.user[edges.row]
        total = self.total[edges.row] + rule.on_edges(user, edges)
        check_numbers(total)
        return Hypotheses(user, edges.node, total).take(is_permitted(filters, user, edges.node))


class Discards:
    """The best that any dropped prefix or title of a user could have become.

    Args:
        trie: The catalogue.
        length_penalty: Exponent of the title's length.
        filters: Per user, what may be returned.
    """

    def __init__(self, trie: Trie, length_penalty: float, filters: Sequence[TitleFilter | None]) -> None:
        self.trie, self.penalty, self.filters = trie, length_penalty, filters
        self.bound = np.full(len(filters), -np.inf, dtype=np.float32)
        self.any = np.zeros(len(filters), dtype=bool)

    def add(self, dropped: Hypotheses) -> None:
        """Prefixes or titles with their sums."""
        bound = bounds(dropped.total, dropped.node, self.trie, self.penalty)
        if self.penalty and any(self.filters[b] is not None for b in np.unique(dropped.user)):
            bound = self._refined(dropped, bound)
        self.add_scores(dropped.user, bound)

    def _refined(self, dropped: Hypotheses, bound: Float32) -> Float32:
        """Bounds by the longest permitted title; those that a refined one of their user covers become -inf."""
        bound = bound.copy()
        best = self.bound.copy()
        order, _ = best_of_each(dropped.user, bound, dropped.node)
        for i in order.tolist():
            b, own = int(dropped.user[i]), self.filters[int(dropped.user[i])]
            if own is not None and bound[i] <= best[b]:
                bound[i] = -np.inf
            elif own is not None:
                tokens = self.trie.depth[self.trie.leaf[own.items(int(dropped.node[i]))]]
                extreme = np.float32(tokens.max() if self.penalty > 0 else tokens.min())
                bound[i] = dropped.total[i] / extreme ** np.float32(self.penalty)
                best[b] = max(best[b], bound[i])
        return bound

    def add_scores(self, user: Int64, score: NDArray[np.floating]) -> None:
        """Titles with their final scores."""
        np.maximum.at(self.bound, user, score)
        self.any[user] = True

    def certify(self, last: Float32) -> Bool:
        """(B,) whether everything dropped is strictly below the K-th returned score, or nothing was dropped."""
        below: Bool = self.bound < last
        return below | ~self.any


def tied_places(scores: Float32, missing: Float32, tolerance: float) -> Int32:
    """(B,) how many of the last places other titles may hold as well, as far as scores can be told apart.

    Args:
        scores: (B, K), descending, -inf where no title is.
        missing: (B,) no title that is not there scores above it.
        tolerance: Gaps up to it say nothing.
    """
    last = scores[:, -1:]
    tied = (scores <= last + tolerance) & (missing[:, None] >= last - tolerance) & np.isfinite(scores)
    count: Int32 = tied.sum(1, dtype=np.int32)
    return count


def bounds(total: Float32, node: Int64, trie: Trie, length_penalty: float) -> Float32:
    """The best score that any title under prefixes can have."""
    if not length_penalty:
        return total
    length = (trie.longest if length_penalty > 0 else trie.shortest)[node].astype(np.float32)
    return total / length ** np.float32(length_penalty)


def kth_score(done: Hypotheses, k: int, n_users: int) -> Float32:
    """(B,) the K-th best score of each user, -inf where there are fewer."""
    order, rank = best_of_each(done.user, done.total, done.node)
    last = order[rank == k - 1]
    kth = np.full(n_users, -np.inf, dtype=np.float32)
    kth[done.user[last]] = done.total[last]
    return kth


def divided(sums: Hypotheses, trie: Trie, length_penalty: float) -> Hypotheses:
    """Sums divided by the number of tokens to the power of the penalty."""
    if not length_penalty:
        return sums
    length = trie.depth[sums.node].astype(np.float32)
    return Hypotheses(sums.user, sums.node, sums.total / length ** np.float32(length_penalty))


def best_of_each(user: Int64, total: NDArray[np.floating], tie: NDArray[np.integer]) -> tuple[Int64, Int64]:
    """An order by user and falling score, ties by ``tie``; and the rank within the user, in that order."""
    order = np.lexsort((tie, -total, user))
    return order, place_in_run(user[order])


def place_among(user: Int64, chosen: Bool) -> Int64:
    """For each entry (sorted by user) how many chosen ones of its user come before it."""
    before: Int64 = np.cumsum(chosen) - chosen
    return before - before[np.searchsorted(user, user)]


def is_permitted(filters: Sequence[TitleFilter | None], user: Int64, node: Int64) -> Bool:
    """(E,) whether a permitted title lies under each node; entries of a user lie together."""
    permitted = np.ones(len(user), dtype=bool)
    for low, high in pairwise(runs(user).tolist()):
        own = filters[int(user[low])]
        if own is not None:
            permitted[low:high] = own.count(node[low:high]) > 0
    return permitted
