"""The doors of the search: titles ranked, all or by beams or with a proof, scored where given, or drawn.

No language model lives here: the engine gives edge scores, `scoring` says what a path is worth. In half precision a
score depends on what shares the forward, by hundredths of a nat up to one: how much is measured here, and told with
each ranking.

Dimension key: B users, N trie nodes, G groups (leaves), I items, K returned items, W beams.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from triewise.arrays import Bool, Float32, Float64, Int32, Int64, blank_lists, within
from triewise.decoding.beams import Beams
from triewise.decoding.best_first import BestFirst
from triewise.decoding.draws import Draws
from triewise.decoding.engine import TrieEngine, edge_log_probabilities
from triewise.decoding.filters import TitleFilter
from triewise.decoding.growth import Growth, OpenGrowth, drive, edges_on_paths
from triewise.decoding.scoring import (
    Hypotheses,
    Rule,
    best_of_each,
    mass_shares,
    path_sums,
    tied_places,
)
from triewise.decoding.treecache import Counters, Prefix, TokenLists
from triewise.errors import UserError
from triewise.models import is_precise, max_positions
from triewise.ranking import (
    Groups,
    ItemLists,
    Items,
    Ranking,
    check_k,
    check_lists,
    checked_items,
    rank_groups,
    resolve_filters,
)

if TYPE_CHECKING:
    from triewise.tokens import Trie

MAX_EXPANSIONS = 2000  # prefixes of a user, in vocabulary support
# What the tolerance is measured on: prompts of other titles' tokens, so many at most, and titles behind them.
PROMPTS, PROMPT_TOKENS, TITLES = 4, 48, 8
# Times the change of a title's score: 5.7 standard deviations of the gap between two titles.
TIMES = 8.0
Scope = Literal["node", "step"]
GainOver = Literal["trained", "all"]
Filters = Sequence[Items | None] | None


def rank_catalogue(
    engine: TrieEngine,
    prompts: TokenLists,
    k: int | None = None,
    length_penalty: float = 0.0,
    alpha: float = 0.0,
    gain: Float64 | None = None,
    exclude: Filters = None,
    allow: Filters = None,
    assistant: NDArray[np.floating] | None = None,
    assistant_weight: float = 1.0,
    counts: Int64 | None = None,
    gain_over: GainOver = "trained",
) -> Ranking:
    """Score every title of the catalogue and order them: exact, whatever the model.

    In trie support only decisions and their ancestors are run (forced tokens score 0); in vocabulary support every
    inner node is. Filters take items out of the ranking and change no score.

    Args:
        engine: Model, trie and support.
        prompts: Token ids of each user.
        k: Number of groups to return, None for all.
        length_penalty: Exponent of the number of title tokens with terminator (BIGRec 1, D3 0).
        alpha: IGD-decoding: edges are weighed with `decoding_weights`; 0 switches it off.
        gain: (N,) information gain in nats, needed when ``alpha > 0``.
        exclude: Per user, items that are not returned.
        allow: Per user, the only items that are returned.
        assistant: (B, I) log-probabilities of items by another recommender (D3).
        assistant_weight: Weight a of the language model, in [0, 1]; 1 switches the assistant off.
        counts: (I,) training targets; the allowed member with most represents a group. Default: the lowest index.
        gain_over: What the gain is scaled over: siblings with training targets (``trained``, as the authors; all
            where ``counts`` are not given), or ``all``; see `decoding_weights`.

    Returns:
        A `Ranking` with ``certified`` true everywhere; scores in nats. In half precision with its tolerance.

    Raises:
        UserError: ``alpha`` or ``assistant_weight`` outside [0, 1], ``alpha > 0`` without ``gain``, a weight below 1
            without an assistant, ``k < 1``, unknown items in a filter.

    Source: MSL's Lemma 1 ranks by the product of P_valid; IGD's code weighs so. Both look at ten beams only.
    """
    _check(prompts, k, length_penalty, exclude, allow)
    trie, counters, n_users = engine.trie, Counters(), len(prompts)
    rule = Rule.of(trie, n_users, alpha, "node", gain, assistant, assistant_weight, _among(counts, gain_over))
    groups, leaves = Groups.from_labels(trie.leaf, counts), np.unique(trie.leaf)
    tolerance = _tolerance(engine, length_penalty, rule)
    asked = k and k + bool(tolerance)  # the first that is missing is looked at
    items, best = blank_lists(n_users, asked or groups.n_groups)
    for users, prefix in _blocks(engine, prompts, counters):
        edges = edge_log_probabilities(engine, [prompts[b] for b in users], counters, prefix)
        scores = path_sums(trie, rule.on_all_edges(edges, users))[:, leaves]
        if length_penalty:
            scores = scores / trie.depth[leaves].astype(np.float32) ** length_penalty
        own = [None if given is None else [given[b] for b in users] for given in (exclude, allow)]
        items[users], best[users] = rank_groups(scores, groups, asked, *own)
    return _ranking(items, best, k, np.ones(n_users, dtype=bool), counters, tolerance)


def beam_search(
    engine: TrieEngine,
    prompts: TokenLists,
    k: int = 10,
    beams: int = 10,
    length_penalty: float = 0.0,
    alpha: float = 0.0,
    scope: Scope = "node",
    gain: Float64 | None = None,
    exclude: Filters = None,
    allow: Filters = None,
    assistant: NDArray[np.floating] | None = None,
    assistant_weight: float = 1.0,
    counts: Int64 | None = None,
    gain_over: GainOver = "trained",
    watch: NDArray[np.integer] | None = None,
) -> Ranking:
    """The token-synchronous beam search of ``transformers.generate`` along the trie.

    At a step the best ``2 * beams`` continuations of a user's beams are taken. A title finishes only if its rank is
    below ``beams``; the best ``beams`` of the others go on. A title whose tail is forced keeps its beam until its
    terminator. A user is done when no beam is left, or when ``beams`` titles are finished and the best beam, divided
    by its length to the power of the penalty, is not above the worst of them (``early_stopping=False``).

    Arguments are those of `rank_catalogue`, where a prefix without a permitted title is no continuation, and:

    * ``beams``: Beams W, at least ``k``.
    * ``scope``: Where the gain is scaled: among the children of a ``node`` (IGD's code), or among all continuations
      of a user's beams at a ``step``, before any is dropped (IGD's text).
    * ``watch``: (B,) an item of each user; ``pruned`` of the ranking says whose title the beams dropped.

    Returns:
        A `Ranking`; ``certified`` where nothing dropped can be among the best ``k``, never with ``scope="step"``.

    Raises:
        UserError: As `rank_catalogue`, and ``beams < k``.

    Source: MSL and IGD decode so. In vocabulary support equal to ``generate`` with ``prefix_allowed_tokens_fn``, in
    trie support with ``renormalize_logits=True`` as well. Differs from it: never returns a title that does not exist
    or the same one twice, which ``generate`` does where there are fewer titles than beams.
    """
    _check(prompts, k, length_penalty, exclude, allow)
    if beams < k:
        raise UserError(f"wanted beams >= k, got {beams} beams for k = {k}; raise beams or lower k")
    among = _among(counts, gain_over)
    rule = Rule.of(engine.trie, len(prompts), alpha, scope, gain, assistant, assistant_weight, among)
    filters, counters = _filters(engine.trie, prompts, exclude, allow), Counters()
    leaf = None if watch is None else engine.trie.leaf[watch].astype(np.int64)
    search = Beams(engine.trie, rule, filters, beams, length_penalty, leaf)
    drive(Growth(engine, prompts, counters), search)
    tolerance = _tolerance(engine, length_penalty, rule)
    items, scores = _returned(engine.trie, search.results, k + bool(tolerance), filters, counts)
    certified = search.discards.certify(scores[:, k - 1])
    if scope == "step":
        certified[:] = False  # a title's score depends on the beams beside it
    ranking = _ranking(items, scores, k, certified, counters, tolerance, search.discards.bound)
    return ranking if watch is None else replace(ranking, pruned=search.lost)


def exact_search(
    engine: TrieEngine,
    prompts: TokenLists,
    k: int = 10,
    length_penalty: float = 0.0,
    alpha: float = 0.0,
    gain: Float64 | None = None,
    exclude: Filters = None,
    allow: Filters = None,
    assistant: NDArray[np.floating] | None = None,
    assistant_weight: float = 1.0,
    max_expansions: int | None = None,
    scope: Scope = "node",
    counts: Int64 | None = None,
    gain_over: GainOver = "trained",
) -> Ranking:
    """The same best ``k`` titles as `rank_catalogue`, by best-first search: it stops with a proof.

    No edge scores above zero, so a prefix bounds every title below it. In a round each user's open prefixes that are
    among his best ``k`` bounds and finished titles are expanded, those of all users in one forward; what is below
    the K-th finished title is dropped. In vocabulary support, where bounds are looser, a beam search comes first:
    its K-th score is a threshold from the beginning, and what it ran need not be run again.

    Arguments are those of `rank_catalogue`, and:

    * ``max_expansions``: Prefixes of a user that may be expanded; None: no limit in trie support, 2,000 in vocabulary
      support. Users who use them up may get fewer than ``k`` titles.
    * ``scope``: Only ``node``: with gains scaled per step a title's score depends on the other beams.

    Returns:
        A `Ranking`; ``certified`` is false for users who used up ``max_expansions``.

    Raises:
        UserError: As `rank_catalogue`, ``scope="step"``, or ``max_expansions < 1``.

    Source: best-first search with an admissible bound (Meister et al. 2020 for decoding); neither paper has it.
    """
    _check(prompts, k, length_penalty, exclude, allow)
    if scope != "node":
        raise UserError(
            f"exact_search wants scope = 'node', got {scope!r}: a step depends on beams, which it has not"
        )
    if max_expansions is not None and max_expansions < 1:
        raise UserError(f"wanted max_expansions of at least 1 or None, got {max_expansions}")
    trie, counters = engine.trie, Counters()
    among = _among(counts, gain_over)
    rule = Rule.of(trie, len(prompts), alpha, scope, gain, assistant, assistant_weight, among)
    filters = _filters(trie, prompts, exclude, allow)
    growth, first = Growth(engine, prompts, counters), Beams(trie, rule, filters, k, length_penalty)
    if engine.support == "vocabulary":
        max_expansions = max_expansions or MAX_EXPANSIONS
    search = BestFirst(growth, rule, filters, k, length_penalty, max_expansions, first)
    drive(growth, search)
    tolerance = _tolerance(engine, length_penalty, rule)
    items, scores = _returned(trie, search.results, k + bool(tolerance), filters, counts)
    return _ranking(items, scores, k, search.proven, counters, tolerance, search.dropped)


class Together:
    """A search that users join and leave while it runs: each gets what `exact_search` or `beam_search` give him alone.

    Of one thread at a time. Arguments are those of the two, and:

    * ``beams``: Of a beam search; None for the exact one.
    * ``assisted``: Whether each user brings log-probabilities of an assistant.

    Attributes:
        counters: Work done for all users so far.
        joined: How many there were.
    """

    def __init__(
        self,
        engine: TrieEngine,
        k: int,
        beams: int | None,
        *,
        length_penalty: float = 0.0,
        alpha: float = 0.0,
        scope: Scope = "node",
        gain: Float64 | None = None,
        assisted: bool = False,
        assistant_weight: float = 1.0,
        counts: Int64 | None = None,
        gain_over: GainOver = "trained",
    ) -> None:
        _check([], k, length_penalty, None, None)
        trie, n = engine.trie, engine.at_once
        self._engine, self._k, self._scope, self._counts = engine, k, scope, counts
        rule = Rule.of(trie, n, alpha, scope, gain, None, 1.0, _among(counts, gain_over))
        if assisted and assistant_weight < 1:
            share = np.zeros((n, trie.n_nodes), dtype=np.float32)
            rule = replace(rule, share=share, weight=assistant_weight)
        self._rule, self._tolerance = rule, _tolerance(engine, length_penalty, rule)
        self._filters: list[TitleFilter | None] = [None] * n
        self.counters, self.joined = Counters(), 0
        self._growth = OpenGrowth(engine, self.counters)
        first = Beams(trie, rule, self._filters, beams or k, length_penalty)
        limit = MAX_EXPANSIONS if engine.support == "vocabulary" else None
        exact = BestFirst(self._growth, rule, self._filters, k, length_penalty, limit, first)
        self._search: Beams | BestFirst = exact if beams is None else first

    @property
    def inside(self) -> int:
        """Users who are in now."""
        return len(self._growth.inside)

    def join(
        self,
        prompt: Sequence[int],
        exclude: Items | None = None,
        allow: Items | None = None,
        assistant: NDArray[np.floating] | None = None,
    ) -> int | None:
        """Let a user in: his number till he is done, or None where he has to wait; ``assistant`` is (I,)."""
        own = TitleFilter.of(self._engine.trie, exclude, allow)
        number = self._growth.join(prompt)
        if number is not None:
            self.joined += 1
            self._filters[number] = own
            if self._rule.share is not None and assistant is not None:
                self._rule.share[number] = mass_shares(self._engine.trie, assistant[None], 1)[0]
        return number

    def leave(self, user: int) -> None:
        """Let a user go who is not done."""
        self._search.forget(np.array([user]))
        self._growth.leave(user)

    def step(self) -> dict[int, Ranking]:
        """One round for everybody: the rankings (1, k) of those who are done with it."""
        fresh = self._growth.admit()
        if len(fresh):
            self._search.start(fresh)
        user, node = self._search.request()
        through = self._search.update(self._growth.expand(user, node, self._search.foreseen))
        self._growth.release(through)
        results, self._search.results = self._search.results, []
        if not len(through):
            return {}
        trie, k, tolerance = self._engine.trie, self._k, self._tolerance
        items, scores = _returned(trie, results, k + bool(tolerance), self._filters, self._counts)
        if isinstance(self._search, Beams):
            certified = self._search.discards.certify(scores[:, k - 1]) & (self._scope == "node")
            bound = self._search.discards.bound
        else:
            certified, bound = self._search.proven, self._search.dropped
        found = {}
        for b in through.tolist():
            row = slice(b, b + 1)
            one = items[row], scores[row], k, certified[row].copy()
            found[b] = _ranking(*one, self.counters, tolerance, bound[row])
        return found


def score(engine: TrieEngine, prompts: TokenLists, candidates: ItemLists) -> Float32:
    """Log-probabilities of given items: the tree of a user's candidates goes through the model in one forward.

    Args:
        engine: Model, trie and support.
        prompts: Token ids of each user.
        candidates: Per user, item indices; lists may differ in length C, items may repeat.

    Returns:
        float32 (B, C), nats, in the order given; shorter lists end in -inf.

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
    result[user, within(size)] = total
    return result


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


def _ranking(
    items: Int32,
    scores: Float32,
    k: int | None,
    certified: Bool,
    counters: Counters,
    tolerance: float,
    dropped: Float32 | None = None,
) -> Ranking:
    """The first ``k`` places; with a tolerance one more is given, and what a search dropped scored at most (B,)."""
    if not tolerance:
        return Ranking(items, scores, certified, counters.as_dict())
    missing = np.full(len(scores), -np.inf, dtype=np.float32) if dropped is None else dropped
    if k is not None and k < scores.shape[1]:
        missing = np.maximum(missing, scores[:, k])
    items, scores = items[:, :k], scores[:, :k]
    tied = tied_places(scores, missing, tolerance)
    return Ranking(items, scores, certified, counters.as_dict(), tolerance, tied)


def _tolerance(engine: TrieEngine, length_penalty: float, rule: Rule) -> float:
    """Nats, after the length penalty, that the gap between two titles changes by where they are run otherwise."""
    if engine.tolerance is None:
        weights = [p for p in engine.model.parameters() if p.is_floating_point()]
        engine.tolerance = 0.0 if all(is_precise(p.dtype) for p in weights) else TIMES * _change(engine)
    if not engine.tolerance:
        return 0.0
    trie = engine.trie
    shortest = (trie.shortest if length_penalty > 0 else trie.longest)[0]  # its score changes most
    return float(engine.tolerance * rule.weight / shortest**length_penalty)


@torch.inference_mode()
def _change(engine: TrieEngine) -> float:
    """Change of titles' scores, nats, between searches and a plain forward for each title alone.

    Root mean square over titles, of the user with the largest.
    """
    trie, positions, nobody = engine.trie, max_positions(engine.model), Counters()
    leaf, item = np.unique(trie.leaf, return_index=True)  # by length
    some = np.linspace(0, len(leaf) - 1, PROMPTS * TITLES).astype(np.int64)
    room = PROMPT_TOKENS if positions is None else min(PROMPT_TOKENS, positions - engine.longest_path)
    paths = [trie.path_to(int(n)) for n in leaf[some]]
    tokens = [np.concatenate([trie.token[path] for path in paths[user::PROMPTS]]) for user in range(PROMPTS)]
    # Of several lengths: what pads them is part of how they are run.
    prompts = [ids[: max(1, room * (user + 1) // PROMPTS)].tolist() for user, ids in enumerate(tokens)]
    engine.fits_tree(prompts)
    # A copy, of an engine that has probed its model: it remembers what it was asked last.
    found = score(copy.copy(engine), prompts, [item[some[::PROMPTS]]] * PROMPTS)
    alone = np.zeros_like(found)
    for user, place in np.ndindex(found.shape):
        path = paths[place * PROMPTS]
        above = [n for n in (0, *path[:-1]) if engine.needed[n]]
        if above:
            text = [trie.token[path[:-1]].tolist()]
            children, log_p = engine.plain_edges([prompts[user]], text, np.array([above], np.int64), nobody)
            alone[user, place] = log_p.numpy()[np.isin(children.node, path)].sum()
    return float(np.sqrt(np.mean((found - alone) ** 2, axis=1).max()))


def _blocks(
    engine: TrieEngine, prompts: TokenLists, counters: Counters
) -> Iterator[tuple[Int64, Prefix | None]]:
    """Users (n,) who share a forward, and what all like them begin with.

    Their prompts have a similar length, so that little is padded, and are on one side of RoPE's change.
    """
    side, length = np.array(engine.sides(prompts)), np.array([len(prompt) for prompt in prompts])
    for one in np.unique(side):
        users = np.flatnonzero(side == one)
        own = [prompts[b] for b in users.tolist()]
        prefix = engine.shared_prefix(own, counters) if engine.fits_tree(own) else None
        users = users[np.argsort(length[users], kind="stable")]
        for start in range(0, len(users), engine.at_once):
            yield users[start : start + engine.at_once], prefix


def _returned(
    trie: Trie,
    results: Sequence[Hypotheses],
    k: int,
    filters: Sequence[TitleFilter | None],
    counts: Int64 | None,
) -> tuple[Int32, Float32]:
    """Items (B, K) and scores (B, K): each leaf's representative, best first, ties by item index."""
    done = Hypotheses.joined([Hypotheses.none(), *results])
    items, scores = blank_lists(len(filters), k)
    leaves = zip(done.user, done.node, strict=True)
    item = np.array([_representative(trie, filters[u], n, counts) for u, n in leaves], dtype=np.int32)
    order, rank = best_of_each(done.user, done.total, item)
    order, rank = order[rank < k], rank[rank < k]
    items[done.user[order], rank], scores[done.user[order], rank] = item[order], done.total[order]
    return items, scores


def _representative(trie: Trie, own: TitleFilter | None, leaf: int, counts: Int64 | None) -> int:
    """The permitted item of a leaf with most training targets, ties by lower index."""
    every = trie.item_order[trie.item_lo[leaf] : trie.item_hi[leaf]]
    members = np.sort(every if own is None else own.items(int(leaf)))
    return int(members[0] if counts is None else members[np.argmax(counts[members])])


def _check(
    prompts: TokenLists, k: int | None, length_penalty: float, exclude: Filters, allow: Filters
) -> None:
    """UserError for what no search takes."""
    check_k(k)
    check_lists(len(prompts), exclude=exclude, allow=allow)
    if not np.isfinite(length_penalty):
        raise UserError(f"wanted a finite length_penalty, got {length_penalty}; 0 switches it off")


def _among(counts: Int64 | None, gain_over: str) -> Int64 | None:
    """The training targets that IGD-decoding goes by; None: all tokens count alike."""
    if gain_over not in get_args(GainOver):
        raise UserError(f"wanted gain_over 'trained' or 'all', got {gain_over!r}")
    return counts if gain_over == "trained" else None


def _filters(trie: Trie, prompts: TokenLists, exclude: Filters, allow: Filters) -> list[TitleFilter | None]:
    known: dict[tuple[int, int], TitleFilter | None] = {}  # a list that is given for many users is read once
    # Kept, so that no id is used twice.
    pairs = list(zip(*resolve_filters(prompts, exclude, allow), strict=True))
    for a, b in pairs:
        if (id(a), id(b)) not in known:
            known[id(a), id(b)] = TitleFilter.of(trie, a, b)
    return [known[id(a), id(b)] for a, b in pairs]
