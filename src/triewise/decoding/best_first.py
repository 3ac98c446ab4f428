r"""Which nodes to expand and how paths are scored. No language model lives here: the engine gives edge scores.

Every search scores a title alike,

.. math:: S(i) = L_i^{-\lambda} \sum_t \big(a\, w(n_t) \log p(y_t \mid n_{t-1}) + (1 - a) \log r(n_t)\big)

with the length penalty lambda, IGD's weights w of the edges, and D3's assistant r: the share of a parent's mass
that lies under the child. No term is above zero, so a prefix bounds all titles below it.

Dimension key: B users, N trie nodes, G groups (leaves), I items, K returned items, W beams, E candidate edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from triewise.decisiveness import decoding_weights, scale_within
from triewise.engine import TrieEngine, edge_log_probabilities
from triewise.errors import UserError
from triewise.filters import TitleFilter
from triewise.growth import Edges, Growth, children, edges_on_paths, forced_runs
from triewise.ranking import (
    Groups,
    ItemLists,
    Items,
    Ranking,
    check_k,
    check_lists,
    check_numbers,
    checked_items,
    rank_groups,
)
from triewise.treecache import Counters, TokenLists
from triewise.trie import Trie

# Times k: prefixes of a user in one round. No expansion was wasted up to 3, and a round less costs more.
WIDTH = 2
MAX_EXPANSIONS = 2000  # prefixes of a user, in vocabulary support

Scope = Literal["node", "step"]
Filters = Sequence[Items | None] | None
Gain = NDArray[np.float64]
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


def rank_catalogue(
    engine: TrieEngine,
    prompts: TokenLists,
    k: int | None = None,
    length_penalty: float = 0.0,
    alpha: float = 0.0,
    gain: Gain | None = None,
    exclude: Filters = None,
    allow: Filters = None,
    assistant: NDArray[np.floating] | None = None,
    assistant_weight: float = 1.0,
    counts: NDArray[np.int64] | None = None,
) -> Ranking:
    """Score every title of the catalogue and order them: exact, whatever the model.

    In trie support only decisions and their ancestors are run (forced tokens score 0); in vocabulary support every
    inner node is. Filters take items out of the ranking and change no score.

    Args:
        engine: Model, trie and support.
        prompts: Token ids of each user.
        k: Number of groups to return, None for all.
        length_penalty: Exponent of the number of title tokens with terminator (BIGRec 1, D3 0).
        alpha: IGD-decoding: edges are weighed with ``decoding_weights(trie, gain, alpha)``; 0 switches it off.
        gain: (N,) information gain in nats, needed when ``alpha > 0``.
        exclude: Per user, items that are not returned.
        allow: Per user, the only items that are returned.
        assistant: (B, I) log-probabilities of items by another recommender (D3).
        assistant_weight: Weight a of the language model, in [0, 1]; 1 switches the assistant off.
        counts: (I,) training targets; the allowed member with most represents a group. Default: the lowest index.

    Returns:
        A :class:`~triewise.ranking.Ranking` with ``certified`` true everywhere; scores in nats.

    Raises:
        UserError: ``alpha`` or ``assistant_weight`` outside [0, 1], ``alpha > 0`` without ``gain``, a weight below 1
            without an assistant, ``k < 1``, unknown items in a filter.

    Source: the full ranking by the product of P_valid is what MSL's Lemma 1 speaks of; the weights are IGD-decoding
    with the gain scaled per node, as in its authors' code. Differs from both: the authors look at ten beams only.
    """
    check_k(k)
    check_lists(len(prompts), exclude=exclude, allow=allow)
    _check_penalty(length_penalty)
    rule = Rule.of(engine.trie, len(prompts), alpha, "node", gain, assistant, assistant_weight)
    trie, counters, n_users = engine.trie, Counters(), len(prompts)
    groups, leaves = Groups.from_labels(trie.leaf, counts), np.unique(trie.leaf)
    width = k or groups.n_groups
    items, best = np.full((n_users, width), -1, np.int32), np.full((n_users, width), -np.inf, np.float32)
    prefix = engine.shared_prefix(prompts, counters) if n_users and engine.fits_tree(prompts) else None
    # Users of similar prompt length share a forward, so little is padded.
    order = np.argsort([len(prompt) for prompt in prompts], kind="stable")
    for start in range(0, n_users, engine.at_once):
        users = order[start : start + engine.at_once]
        edges = edge_log_probabilities(engine, [prompts[b] for b in users], counters, prefix)
        scores = path_sums(trie, rule.whole(edges, users))[:, leaves]
        if length_penalty:
            scores = scores / trie.depth[leaves].astype(np.float32) ** length_penalty
        own = [None if given is None else [given[b] for b in users] for given in (exclude, allow)]
        items[users], best[users] = rank_groups(scores, groups, k, *own)
    return Ranking(items, best, np.ones(n_users, dtype=bool), counters.as_dict())


def beam_search(
    engine: TrieEngine,
    prompts: TokenLists,
    k: int = 10,
    beams: int = 10,
    length_penalty: float = 0.0,
    alpha: float = 0.0,
    scope: Scope = "node",
    gain: Gain | None = None,
    exclude: Filters = None,
    allow: Filters = None,
    assistant: NDArray[np.floating] | None = None,
    assistant_weight: float = 1.0,
    counts: NDArray[np.int64] | None = None,
) -> Ranking:
    """The token-synchronous beam search of ``transformers.generate`` along the trie.

    At a step the best ``2 * beams`` continuations of a user's beams are taken. A title finishes only if its rank is
    below ``beams``; the best ``beams`` of the others go on. A title whose tail is forced keeps its beam until its
    terminator. A user is done when no beam is left, or when ``beams`` titles are finished and the best beam, divided
    by its length to the power of the penalty, is not above the worst of them (``early_stopping=False``).

    Args:
        engine: Model, trie and support.
        prompts: Token ids of each user.
        k: Number of groups to return.
        beams: Beams W, at least ``k``.
        length_penalty: As in `rank_catalogue`.
        alpha: As in `rank_catalogue`.
        scope: What the gain is scaled over: the children of a ``node`` (IGD's code), or all continuations of a user's
            beams at a ``step``, before any is dropped (IGD's text).
        gain: As in `rank_catalogue`.
        exclude: As in `rank_catalogue`; a prefix without a permitted title is no continuation.
        allow: As ``exclude``.
        assistant: As in `rank_catalogue`.
        assistant_weight: As in `rank_catalogue`.
        counts: As in `rank_catalogue`.

    Returns:
        A :class:`~triewise.ranking.Ranking`; ``certified`` where no dropped prefix or title can belong to the best
        ``k``, never with ``scope="step"``.

    Raises:
        UserError: As `rank_catalogue`, and ``beams < k``.

    Source: MSL and IGD decode so. In vocabulary support equal to ``generate`` with ``prefix_allowed_tokens_fn``, in
    trie support with ``renormalize_logits=True`` as well. Differs from it: never returns a title that does not exist
    or the same one twice, which ``generate`` does where there are fewer titles than beams.
    """
    check_k(k)
    if beams < k:
        raise UserError(f"wanted beams >= k, got {beams} beams for k = {k}; raise beams or lower k")
    check_lists(len(prompts), exclude=exclude, allow=allow)
    _check_penalty(length_penalty)
    rule = Rule.of(engine.trie, len(prompts), alpha, scope, gain, assistant, assistant_weight)
    filters = _filters(engine.trie, len(prompts), exclude, allow)
    counters = Counters()
    search = Beams(engine.trie, rule, filters, beams, length_penalty)
    _drive(Growth(engine, prompts, counters), search)
    items, scores = _returned(engine.trie, search.results, k, filters, counts)
    certified = search.discards.certify(scores[:, k - 1])
    if scope == "step":
        certified[:] = False  # a title's score depends on the beams beside it
    return Ranking(items, scores, certified, counters.as_dict())


def exact_search(
    engine: TrieEngine,
    prompts: TokenLists,
    k: int = 10,
    length_penalty: float = 0.0,
    alpha: float = 0.0,
    gain: Gain | None = None,
    exclude: Filters = None,
    allow: Filters = None,
    assistant: NDArray[np.floating] | None = None,
    assistant_weight: float = 1.0,
    max_expansions: int | None = None,
    scope: Scope = "node",
    counts: NDArray[np.int64] | None = None,
) -> Ranking:
    """The same best ``k`` titles as `rank_catalogue`, by best-first search: it stops with a proof.

    No edge scores above zero, so a prefix bounds every title below it. In a round each user's open prefixes that are
    among his best ``k`` bounds and finished titles are expanded, those of all users in one forward; what is below
    the K-th finished title is dropped. In vocabulary support, where bounds are looser, a beam search comes first:
    its K-th score is a threshold from the beginning, and what it ran need not be run again.

    Args:
        engine: Model, trie and support.
        prompts: Token ids of each user.
        k: Number of groups to return.
        length_penalty: As in `rank_catalogue`.
        alpha: As in `rank_catalogue`.
        gain: As in `rank_catalogue`.
        exclude: As in `rank_catalogue`.
        allow: As in `rank_catalogue`.
        assistant: As in `rank_catalogue`.
        assistant_weight: As in `rank_catalogue`.
        max_expansions: Prefixes of a user that may be expanded; None: no limit in trie support, 2,000 in vocabulary
            support. Users who use them up may get fewer than ``k`` titles.
        scope: Only ``node``: with gains scaled per step a title's score depends on the other beams.
        counts: As in `rank_catalogue`.

    Returns:
        A :class:`~triewise.ranking.Ranking`; ``certified`` is false for users who used up ``max_expansions``.

    Raises:
        UserError: As `rank_catalogue`, ``scope="step"``, or ``max_expansions < 1``.

    Source: best-first search with an admissible bound (Meister et al. 2020 for decoding); neither paper has it.
    """
    check_k(k)
    if scope != "node":
        raise UserError(
            f"exact_search wants scope = 'node', got {scope!r}: a step depends on beams, which it has not"
        )
    if max_expansions is not None and max_expansions < 1:
        raise UserError(f"wanted max_expansions of at least 1 or None, got {max_expansions}")
    check_lists(len(prompts), exclude=exclude, allow=allow)
    _check_penalty(length_penalty)
    trie, n_users, counters = engine.trie, len(prompts), Counters()
    rule = Rule.of(trie, n_users, alpha, scope, gain, assistant, assistant_weight)
    filters = _filters(trie, n_users, exclude, allow)
    growth = Growth(engine, prompts, counters)
    first = None
    if engine.support == "vocabulary":
        max_expansions = max_expansions or MAX_EXPANSIONS
        first = Beams(trie, rule, filters, k, length_penalty)
    search = BestFirst(growth, rule, filters, k, length_penalty, max_expansions, first)
    _drive(growth, search)
    items, scores = _returned(trie, search.results, k, filters, counts)
    return Ranking(items, scores, search.proven, counters.as_dict())


def score(engine: TrieEngine, prompts: TokenLists, candidates: ItemLists) -> Floats:
    """Log-probabilities of given items: the tree of a user's candidates goes through the model in one forward.

    Args:
        engine: Model, trie and support.
        prompts: Token ids of each user.
        candidates: Per user, item indices; lists may differ in length, items may repeat.

    Returns:
        float32 (B, C), nats, in the order given; C is the length of the longest list, shorter ones end in -inf.

    Raises:
        UserError: Not one list per user, unknown items.
    """
    check_lists(len(prompts), candidates=candidates)
    trie = engine.trie
    lists = [checked_items(items, trie.n_items) for items in candidates]
    size = np.array([len(items) for items in lists], dtype=np.int64)
    result = np.full((len(prompts), int(size.max(initial=0))), -np.inf, dtype=np.float32)
    if not size.any():
        return result
    user = np.repeat(np.arange(len(prompts)), size)
    leaf = trie.leaf[np.concatenate(lists)].astype(np.int64)
    key, log_p = edges_on_paths(engine, prompts, user, leaf, Counters())
    total, node = np.zeros(len(leaf), dtype=np.float32), leaf
    for _ in range(int(trie.depth[leaf].max())):
        on_path = node > 0
        total[on_path] += log_p[np.searchsorted(key, (user * trie.n_nodes + node)[on_path])]
        node = np.where(on_path, trie.parent[node], 0).astype(np.int64)
    result[user, np.arange(len(user)) - np.repeat(np.cumsum(size) - size, size)] = total
    return result


# --- scoring ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """What an edge is worth: IGD's weights and D3's assistant applied to its log-probability.

    Attributes:
        trie: The catalogue.
        weight: (N,) weight of the edge into each node, or None for 1.
        alpha: Strength of the gain scaled per step; 0 where it is scaled per node, in ``weight``.
        gain: (N,) information gain, for the scaling per step.
        share: (B, N) log of the share of the parent's mass under each node, or None without assistant.
        a: Weight of the language model.
    """

    trie: Trie
    weight: NDArray[np.float32] | None
    alpha: float
    gain: Gain | None
    share: NDArray[np.float32] | None
    a: float

    @classmethod
    def of(
        cls,
        trie: Trie,
        n_users: int,
        alpha: float,
        scope: str,
        gain: Gain | None,
        assistant: NDArray[np.floating] | None,
        a: float,
    ) -> Rule:
        """Check and precompute."""
        if scope not in ("node", "step"):
            raise UserError(f"wanted scope 'node' or 'step', got {scope!r}")
        if not 0 <= alpha <= 1:
            raise UserError(f"wanted alpha in [0, 1], got {alpha}")
        if not 0 <= a <= 1:
            raise UserError(f"wanted assistant_weight in [0, 1], got {a}")
        if alpha and gain is None:
            raise UserError("alpha > 0 needs gain: give information_gain(trie, counts)")
        if a < 1 and assistant is None:
            raise UserError("assistant_weight < 1 needs assistant: give log-probabilities (users, items)")
        weight = None
        if alpha and gain is not None:  # also checks the gain for scope "step"
            weight = decoding_weights(trie, gain, alpha).astype(np.float32)
        share = None
        if assistant is not None and a < 1:
            share = _mass_shares(trie, np.asarray(assistant), n_users)
        by_step = alpha if scope == "step" else 0.0
        return cls(trie, None if by_step else weight, by_step, gain, share, a)

    def whole(self, edges: Floats, user: Ints) -> Floats:
        """(n, N) edge scores from the log-probabilities of all edges; ``user`` (n,) is whose they are."""
        if self.weight is not None:
            edges = edges * self.weight
        if self.share is not None:
            edges = np.float32(self.a) * edges + np.float32(1 - self.a) * self.share[user]
        return edges

    def some(self, user: Ints, edges: Edges) -> Floats:
        """(E,) edge scores of one step; ``user`` (E,) is whose edge it is."""
        step = edges.log_p
        if self.weight is not None:
            step = step * self.weight[edges.node]
        elif self.alpha and self.gain is not None:
            start = np.flatnonzero(np.diff(user, prepend=-1))
            step = step * (1 - self.alpha * scale_within(self.gain[edges.node], start)).astype(np.float32)
        if self.share is not None:
            step = np.float32(self.a) * step + np.float32(1 - self.a) * self.share[user, edges.node]
        return step


def path_sums(trie: Trie, edges: Floats) -> Floats:
    """(B, N) sums of edge scores from the root to each node, level by level."""
    total = edges.copy()
    for depth in range(1, len(trie.level_ptr) - 1):
        level = slice(int(trie.level_ptr[depth]), int(trie.level_ptr[depth + 1]))
        total[:, level] += total[:, trie.parent[level]]
    return total


def _mass_shares(trie: Trie, assistant: NDArray[np.floating], n_users: int) -> Floats:
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


# --- beams --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Hypotheses:
    """Prefixes or titles of several users.

    Attributes:
        user: int64 (H,).
        node: int64 (H,).
        total: float32 (H,); sum of edge scores, or final score of finished titles.
    """

    user: Ints
    node: Ints
    total: Floats

    @classmethod
    def none(cls) -> _Hypotheses:
        """Nothing."""
        return cls(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))

    @classmethod
    def roots(cls, user: Ints) -> _Hypotheses:
        """The root for each of some users."""
        return cls(user, np.zeros(len(user), np.int64), np.zeros(len(user), np.float32))

    def take(self, chosen: NDArray[np.bool_] | Ints) -> _Hypotheses:
        """Those of a mask or an index."""
        return _Hypotheses(self.user[chosen], self.node[chosen], self.total[chosen])

    @classmethod
    def joined(cls, parts: Sequence[_Hypotheses]) -> _Hypotheses:
        """Several, one after the other."""
        user, node = (np.concatenate([getattr(p, name) for p in parts]) for name in ("user", "node"))
        return cls(user, node, np.concatenate([p.total for p in parts]))

    def then(self, other: _Hypotheses) -> _Hypotheses:
        """These and those."""
        return self.joined([self, other])

    def continued(self, edges: Edges, rule: Rule, filters: Sequence[TitleFilter | None]) -> _Hypotheses:
        """All continuations that lead to a permitted title."""
        user = self.user[edges.row]
        total = self.total[edges.row] + rule.some(user, edges)
        check_numbers(total)
        return _Hypotheses(user, edges.node, total).take(_permitted(filters, user, edges.node))


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

    def add(self, dropped: _Hypotheses) -> None:
        """Prefixes or titles with their sums."""
        bound = _bounds(dropped.total, dropped.node, self.trie, self.penalty)
        if self.penalty and any(self.filters[b] is not None for b in np.unique(dropped.user)):
            bound = self._refined(dropped, bound)
        self.add_scores(dropped.user, bound)

    def _refined(self, dropped: _Hypotheses, bound: Floats) -> Floats:
        """Bounds by the longest permitted title; those that a refined one of their user covers become -inf."""
        bound = bound.copy()
        best = self.bound.copy()
        order, _ = _best_of_each(dropped.user, bound, dropped.node)
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

    def add_scores(self, user: Ints, score: NDArray[np.floating]) -> None:
        """Titles with their final scores."""
        np.maximum.at(self.bound, user, score)
        self.any[user] = True

    def certify(self, last: Floats) -> NDArray[np.bool_]:
        """(B,) whether everything dropped is strictly below the K-th returned score, or nothing was dropped."""
        below: NDArray[np.bool_] = self.bound < last
        return below | ~self.any


class Search(Protocol):
    """A way to search the trees of several users, round by round."""

    def start(self, user: Ints) -> None:
        """Begin with some users (n,)."""

    def request(self) -> tuple[Ints, Ints]:
        """Users and nodes (R,) whose edges the next round needs, users together."""

    def foreseen(self) -> tuple[Ints, Ints]:
        """Users and nodes that are asked for in later rounds whatever scores the edges get."""

    def update(self, edges: Edges) -> Ints:
        """Go on with what was asked for; the users (n,) who are done."""


def _drive(growth: Growth, search: Search) -> None:
    """Let users in, grow their trees as the search asks, and let them go when they are done."""
    while True:
        fresh = growth.admit()
        if len(fresh):
            search.start(fresh)
        user, node = search.request()
        if not len(user):
            return
        growth.release(search.update(growth.expand(user, node, search.foreseen)))


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
        self.live, self.done = _Hypotheses.none(), _Hypotheses.none()
        self.results: list[_Hypotheses] = []
        self.discards = Discards(trie, length_penalty, filters)

    def start(self, user: Ints) -> None:
        """Begin with some users: those who may get nothing are done after one round."""
        self.live = self.live.then(_Hypotheses.roots(user))

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
            permitted = _permitted(self.filters, user, node)
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
        near = _among_best(found.user, found.total, 2 * self.beams)
        self.discards.add(found.take(~near))
        found = found.take(near)
        order, rank = _best_of_each(found.user, found.total, trie.item_lo[found.node])
        found, leaf = found.take(order), trie.is_leaf[found.node[order]]
        top = rank < 2 * self.beams
        ends = leaf & (rank < self.beams)
        goes_on = top & ~leaf & (_place_among(found.user, top & ~leaf) < self.beams)
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

    def _finish(self, ended: _Hypotheses) -> None:
        """Merge titles that ended into the best finished ones."""
        if len(ended.node):
            together = self.done.then(_divided(ended, self.trie, self.penalty))
            order, rank = _best_of_each(together.user, together.total, self.trie.item_lo[together.node])
            together = together.take(order)
            dropped = together.take(rank >= self.beams)
            self.discards.add_scores(dropped.user, dropped.total)
            self.done = together.take(rank < self.beams)

    def _stopped(self) -> NDArray[np.bool_]:
        """(B,) whether a user's beams can improve nothing any more, as ``early_stopping=False`` judges it."""
        n_users = len(self.filters)
        best = np.full(n_users, -np.inf, dtype=np.float32)
        np.maximum.at(best, self.live.user, _divided(self.live, self.trie, self.penalty).total)
        worst = np.full(n_users, np.inf, dtype=np.float32)
        np.minimum.at(worst, self.done.user, self.done.total)
        full = np.bincount(self.done.user, minlength=n_users) >= self.beams
        stopped: NDArray[np.bool_] = full & (best <= worst)
        return stopped


class BestFirst:
    """Best-first search with a proof, see `exact_search`.

    Attributes:
        open: Prefixes that were not expanded, with the sums of their edge scores.
        done: The best finished titles of users who go on, with their final scores.
        results: Those of users who are done.
        proven: (B,) whether nothing that was left open can matter.
    """

    def __init__(
        self,
        growth: Growth,
        rule: Rule,
        filters: Sequence[TitleFilter | None],
        k: int,
        length_penalty: float,
        max_expansions: int | None,
        first: Beams | None,
    ) -> None:
        self.growth, self.trie, self.rule, self.filters = growth, growth.trie, rule, filters
        self.k, self.penalty, self.limit, self.first = k, length_penalty, max_expansions, first
        self.open, self.done = _Hypotheses.none(), _Hypotheses.none()
        self.results: list[_Hypotheses] = []
        self.proven = np.ones(len(filters), dtype=bool)
        self.threshold = np.full(len(filters), -np.inf, dtype=np.float32)
        self.expanded = np.zeros(len(filters), dtype=np.int64)
        self.beams = _Hypotheses.none()  # titles that the beam search of users who go on had found
        self._asked = _Hypotheses.none()

    def start(self, user: Ints) -> None:
        """Begin with some users, in vocabulary support with a beam search."""
        if self.first is None:
            self.open = self.open.then(_Hypotheses.roots(user))
        else:
            self.first.start(user)

    def request(self) -> tuple[Ints, Ints]:
        """The open prefixes whose bounds are among the best 2 k of open prefixes and finished titles; at least one."""
        bound = _bounds(self.open.total, self.open.node, self.trie, self.penalty)
        everything = np.concatenate([bound, self.done.total])
        user = np.concatenate([self.open.user, self.done.user])
        order, rank = _best_of_each(user, everything, np.arange(len(user)))
        is_open = order < len(bound)
        # Ranks among the open alone say which is a user's best; it is asked for whatever lies above it.
        width = np.full(len(order), WIDTH * self.k)
        if self.limit is not None:
            width = np.minimum(width, (self.limit - self.expanded)[user[order]])
        chosen = is_open & ((rank < width) | (_place_among(user[order], is_open) == 0))
        asked = np.zeros(len(bound), dtype=bool)
        asked[order[chosen]] = True
        place = np.argsort(self.open.user[asked], kind="stable")
        self._asked, self.open = self.open.take(asked).take(place), self.open.take(~asked)
        if self.first is None:
            return self._asked.user, self._asked.node
        user, node = self.first.request()
        return np.concatenate([user, self._asked.user]), np.concatenate([node, self._asked.node])

    def foreseen(self) -> tuple[Ints, Ints]:
        """What the beam search that comes first foresees, and forced tokens below what is asked for."""
        if self.first is None:
            return self._asked.user[:0], self._asked.node[:0]
        below = forced_runs(self.trie, self._asked.user, self._asked.node)
        user, node = (np.concatenate(pair) for pair in zip(self.first.foreseen(), below, strict=True))
        return user, node

    def update(self, edges: Edges) -> Ints:
        """One round: expand, follow forced tokens, drop what cannot matter."""
        n_first = 0 if self.first is None else len(self.first.request()[0])
        mine = edges.row >= n_first
        asked = self._asked
        self.expanded += np.bincount(asked.user, minlength=len(self.filters))
        touched = np.unique(asked.user)
        self._take_in(asked.continued(edges.take(mine, n_first), self.rule, self.filters))
        if self.first is not None and n_first:
            through = self.first.update(edges.take(~mine, 0))
            found = self.first.results.pop()
            self.threshold[through] = _kth(found, self.k, len(self.filters))[through]
            self.beams = self.beams.then(found)
            self.open = self.open.then(_Hypotheses.roots(through))
            touched = np.union1d(touched, through)
        kth = np.maximum(_kth(self.done, self.k, len(self.filters)), self.threshold)
        bound = _bounds(self.open.total, self.open.node, self.trie, self.penalty)
        self.open = self.open.take(bound >= kth[self.open.user])
        if self.limit is not None:
            over = self.expanded[self.open.user] >= self.limit
            cut = np.unique(self.open.user[over])
            self.proven[cut] = False
            self.open = self.open.take(~over)
            # What the beams had found is better than nothing; a title that both found is the same one.
            both = self.done.then(self.beams.take(np.isin(self.beams.user, cut)))
            key = both.user * self.trie.n_nodes + both.node
            self.done = both.take(np.unique(key, return_index=True)[1])
        through = np.setdiff1d(touched, self.open.user)
        self.beams = self.beams.take(~np.isin(self.beams.user, through))
        ours = np.isin(self.done.user, through)
        self.results.append(self.done.take(ours))
        self.done = self.done.take(~ours)
        return through

    def _take_in(self, found: _Hypotheses) -> None:
        """Sort new prefixes into finished titles and open ones; those whose edges are known go on at once."""
        while len(found.node):
            if self.growth.engine.support == "trie":  # forced tokens cost nothing and score nothing
                found = replace(found, node=self.trie.next_decision[found.node].astype(np.int64))
            leaf = self.trie.is_leaf[found.node]
            together = self.done.then(_divided(found.take(leaf), self.trie, self.penalty))
            # Ties at the last place stay in: which of them is returned is decided by item index, at the end.
            kth = _kth(together, self.k, len(self.filters))
            self.done = together.take(together.total >= kth[together.user])
            found = found.take(~leaf)
            known = self.trie.n_children[found.node] == 1
            known[known] = self.growth.known(found.user[known], found.node[known])
            self.open = self.open.then(found.take(~known))
            found = found.take(known)
            found = found.continued(self.growth.expand(found.user, found.node), self.rule, self.filters)


def _bounds(total: Floats, node: Ints, trie: Trie, length_penalty: float) -> Floats:
    """The best score that any title under prefixes can have."""
    if not length_penalty:
        return total
    length = (trie.longest if length_penalty > 0 else trie.shortest)[node].astype(np.float32)
    return total / length ** np.float32(length_penalty)


def _kth(done: _Hypotheses, k: int, n_users: int) -> Floats:
    """(B,) the K-th best score of each user, -inf where there are fewer."""
    order, rank = _best_of_each(done.user, done.total, done.node)
    last = order[rank == k - 1]
    kth = np.full(n_users, -np.inf, dtype=np.float32)
    kth[done.user[last]] = done.total[last]
    return kth


def _divided(found: _Hypotheses, trie: Trie, length_penalty: float) -> _Hypotheses:
    """Sums divided by the number of tokens to the power of the penalty."""
    if not length_penalty:
        return found
    length = trie.depth[found.node].astype(np.float32)
    return _Hypotheses(found.user, found.node, found.total / length ** np.float32(length_penalty))


def _returned(
    trie: Trie,
    results: Sequence[_Hypotheses],
    k: int,
    filters: Sequence[TitleFilter | None],
    counts: NDArray[np.int64] | None,
) -> tuple[NDArray[np.int32], Floats]:
    """Items (B, K) and scores (B, K): each leaf's representative, best first, ties by item index."""
    done = _Hypotheses.joined([_Hypotheses.none(), *results])
    items = np.full((len(filters), k), -1, dtype=np.int32)
    scores = np.full((len(filters), k), -np.inf, dtype=np.float32)
    item = np.array(
        [_representative(trie, filters[u], n, counts) for u, n in zip(done.user, done.node, strict=True)],
        dtype=np.int32,
    )
    order, rank = _best_of_each(done.user, done.total, item)
    order, rank = order[rank < k], rank[rank < k]
    items[done.user[order], rank], scores[done.user[order], rank] = item[order], done.total[order]
    return items, scores


def _representative(trie: Trie, own: TitleFilter | None, leaf: int, counts: NDArray[np.int64] | None) -> int:
    """The permitted item of a leaf with most training targets, ties by lower index."""
    members = (
        trie.item_order[trie.item_lo[leaf] : trie.item_hi[leaf]] if own is None else own.items(int(leaf))
    )
    members = np.sort(members)
    return int(members[0] if counts is None else members[np.argmax(counts[members])])


def _best_of_each(user: Ints, total: NDArray[np.floating], tie: NDArray[np.integer]) -> tuple[Ints, Ints]:
    """An order by user and falling score, ties by ``tie``; and the rank within the user, in that order."""
    order = np.lexsort((tie, -total, user))
    ordered = user[order]
    return order, np.arange(len(order)) - np.searchsorted(ordered, ordered)


def _among_best(user: Ints, total: Floats, n: int) -> NDArray[np.bool_]:
    """Which entries (those of a user together) are not below the n-th best of their user: cheaper than an order."""
    near = np.ones(len(user), dtype=bool)
    bound = np.flatnonzero(np.diff(user, prepend=-1, append=-1))
    for low, high in pairwise(bound.tolist()):
        if high - low > n:
            near[low:high] = total[low:high] >= np.partition(total[low:high], high - low - n)[high - low - n]
    return near


def _place_among(user: Ints, chosen: NDArray[np.bool_]) -> Ints:
    """For each entry (sorted by user) how many chosen ones of its user come before it."""
    before: Ints = np.cumsum(chosen) - chosen
    return before - before[np.searchsorted(user, user)]


def _check_penalty(length_penalty: float) -> None:
    if not np.isfinite(length_penalty):
        raise UserError(f"wanted a finite length_penalty, got {length_penalty}; 0 switches it off")


def _filters(trie: Trie, n_users: int, exclude: Filters, allow: Filters) -> list[TitleFilter | None]:
    nothing: list[Items | None] = [None] * n_users
    without = nothing if exclude is None else exclude
    only = nothing if allow is None else allow
    known: dict[tuple[int, int], TitleFilter | None] = {}  # a list that is given for many users is read once
    pairs = list(zip(without, only, strict=True))  # kept, so that no id is used twice
    for a, b in pairs:
        if (id(a), id(b)) not in known:
            known[id(a), id(b)] = TitleFilter.of(trie, a, b)
    return [known[id(a), id(b)] for a, b in pairs]


def _permitted(filters: Sequence[TitleFilter | None], user: Ints, node: Ints) -> NDArray[np.bool_]:
    """(E,) whether a permitted title lies under each node; entries of a user lie together."""
    permitted = np.ones(len(user), dtype=bool)
    bound = np.flatnonzero(np.diff(user, prepend=-1, append=-1))
    for low, high in pairwise(bound.tolist()):
        own = filters[int(user[low])]
        if own is not None:
            permitted[low:high] = own.count(node[low:high]) > 0
    return permitted
