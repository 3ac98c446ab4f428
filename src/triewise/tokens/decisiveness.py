"""How much each title token decides: numbers per trie node, from how often each item is a training target.

A token is the edge into one node, so a measure of tokens is an array over nodes. The information gain of
IGD is ``G[parent] - G[node]``, where ``G[n]`` is the sum of ``-p ln p`` over the groups (equal titles)
under n and ``p`` is a group's share of all training targets. The paper does not renormalise ``p`` under a
prefix, so no gain is negative. Everything is in nats. Source of all measures: IGD (NeurIPS '25); its
Eq. 4 is the entropy, ``docs/papers.md`` has the rest.

Shape key: N nodes, I items, T tokens of all titles end to end.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from triewise.arrays import Bool, Float64, Int64, within
from triewise.errors import UserError
from triewise.tokens.trie import Trie

# Gains of siblings with equal masses may differ in their last bits, by the order of summation. Scaled to
# [0, 1] such a difference would cost one of them a weight of 1 - alpha. Relative to the larger gain.
ROUNDING = 1e-12
MEASURES = ("information", "gini", "gain-ratio", "chi-squared", "conditional-entropy")


def gain_entropy(t: Trie, counts_per_item: ArrayLike) -> Float64:
    r"""Entropy mass of the items under each node, not renormalised.

    .. math:: G_n = -\sum_{g \in \mathrm{groups}(n)} p_g \ln p_g

    where :math:`p_g` is the sum of the counts of the items that share title g, over the sum of all counts.

    Args:
        t: The trie of the catalogue.
        counts_per_item: Integers (I,) >= 0: how often each item is a target of the training loss.

    Returns:
        float64 (N,), nats, >= 0; 0 under nodes without counts.

    Raises:
        UserError: Not one count per item, a negative count, a fraction, or no count above zero.
    """
    return _entropy(t, _masses(t, counts_per_item))


def information_gain(t: Trie, counts_per_item: ArrayLike) -> Float64:
    """How much uncertainty about the item the token into each node removes.

    ``gain[n] = G[parent[n]] - G[n]`` with ``G`` of `gain_entropy`. Along a title the gains sum to
    ``G[0] - G[leaf]``. A node without counts whose parent has some gains all of ``G[parent]``.

    Args and errors as `gain_entropy`; returns float64 (N,), nats, >= 0; exactly 0 where `zero_gain` holds, so also at
    the root.

    >>> t = Trie.from_sequences([[1, 2, 9], [1, 3, 9], [1, 3, 5, 9], [7, 8, 9]])
    >>> information_gain(t, [4, 2, 1, 1])[t.walk([1, 3, 9])].round(4).tolist()
    [0.0, 0.2599, 0.3466, 0.2599]
    """
    mass_N, gain_N = _masses(t, counts_per_item), np.zeros(t.n_nodes)
    entropy_N = _entropy(t, mass_N)
    edge = t.below(np.flatnonzero(t.branching)).at  # an only token decides nothing
    up = t.parent[edge]
    gain_N[edge] = np.where(mass_N[edge] == mass_N[up], 0.0, entropy_N[up] - entropy_N[edge])
    return gain_N


def gain_by(t: Trie, counts_per_item: ArrayLike, measure: str = "information") -> Float64:
    r"""How much the token into each node decides, by one of several measures of splits.

    With m_n the training targets under n, u its parent, p_g as in `gain_entropy` and P_n the sum of p_g under n:

    * ``information``: `information_gain`, IGD's.
    * ``gini``: the same with ``p (1 - p)`` in the place of ``-p ln p``; not renormalised either.
    * ``gain-ratio``: the information gain over the split information of u, the entropy of its children's shares
      ``m_c / m_u``. Siblings share it, so `decoding_weights` are those of the information gain.
    * ``chi-squared``: what the token adds to Pearson's statistic of the table of tokens after u by titles under u,
      over all targets. That is ``(m_u - m_n) / m_root``: the share of the targets that the token rules out.
    * ``conditional-entropy``: ``H_u - H_n`` with :math:`H_n = -\sum_g (p_g / P_n) \ln (p_g / P_n)`, renormalised
      below each node. Negative where a rare token leads to many titles.

    Args and errors as `gain_entropy`, and an unknown measure; returns float64 (N,), exactly 0 where `zero_gain` holds.

    Source: IGD (NeurIPS '25) names other measures as future work. C4.5's gain ratio and CHAID's statistic are of whole
    splits, where they say nothing here: a title's own tokens split it off, so both are fixed by the counts of u.
    """
    if measure not in MEASURES:
        raise UserError(f"wanted a measure among {', '.join(MEASURES)}, got {measure!r}; choose one of them")
    if measure == "information":
        return information_gain(t, counts_per_item)
    mass_N, up = _masses(t, counts_per_item), t.parent[1:]
    if measure == "gain-ratio":
        gain_N, share = information_gain(t, counts_per_item), mass_N[1:] / np.maximum(mass_N[up], 1)
        split_N = np.bincount(up, -share * np.log(np.where(share > 0, share, 1)), t.n_nodes)[t.parent]
        return np.divide(gain_N, split_N, out=np.zeros_like(gain_N), where=(split_N > 0) & (gain_N > 0))
    if measure == "chi-squared":
        rest_N = (mass_N[0] - mass_N) / mass_N[0]
    elif measure == "gini":
        rest_N = -_summed(t, mass_N, lambda m, total: m / total * ((total - m) / total))
    else:
        share_N = np.where(mass_N > 0, mass_N, mass_N[0]) / mass_N[0]
        rest_N = -(_entropy(t, mass_N) / share_N + np.log(share_N))
    found_N = np.concatenate(([0.0], rest_N[1:] - rest_N[up]))
    found_N[_keeps_all(t, mass_N)] = 0.0
    return found_N


def zero_gain(t: Trie, counts_per_item: ArrayLike) -> Bool:
    """Whether the token into each node decides nothing: all of its parent's counts lie under the node.

    Decided on integers, never by comparing a float with 0. A node whose parent has no counts is zero-gain;
    a node without counts whose parent has some is not.

    Args and errors as `gain_entropy`; returns bool (N,), True at the root.
    """
    return _keeps_all(t, _masses(t, counts_per_item))


def decoding_weights(
    t: Trie, gain: ArrayLike, alpha: float, counts_per_item: ArrayLike | None = None
) -> Float64:
    r"""Weights of the log-probabilities in IGD's decoding.

    .. math:: w_n = 1 - \alpha \frac{\mathrm{gain}_n - \min}{\max - \min}

    with minimum and maximum over the siblings of n, n included, that have training targets below them. Of the
    children of a node the least decisive token keeps weight 1 and the most decisive gets ``1 - alpha``:
    log-probabilities are negative, so that raises it. A token without training targets weighs 1.

    Args:
        t: The trie of the catalogue.
        gain: Finite numbers (N,), usually `information_gain`.
        alpha: Strength in [0, 1]; 0 is ordinary decoding.
        counts_per_item: (I,) as in `information_gain`. None: all siblings count alike, also those without training
            targets; these gain all of their parent's entropy, so they are raised most and their siblings less.

    Returns:
        float64 (N,) in [1 - alpha, 1]: the weight of the edge into each node; 1 at the root and where all
        siblings are equal (to rounding).

    Raises:
        UserError: ``alpha`` outside [0, 1], ``gain`` not (N,) finite numbers, or counts as `gain_entropy`.

    Source: with counts as the authors' code, whose trie holds titles of training targets alone. Differs from the
    paper: scaled over siblings, not over all candidates of a beam step (as the authors' code), and without the
    code's 1e-7 in the denominator. The paper says that alpha 1 is ordinary decoding; alpha 0 is.

    >>> t = Trie.from_sequences([[1, 9], [2, 9], [3, 9]])
    >>> decoding_weights(t, information_gain(t, [6, 3, 0]), 0.4, [6, 3, 0])[1:4].tolist()
    [0.6, 1.0, 1.0]
    """
    _check_share("alpha", alpha)
    gain_N = np.asarray(gain, dtype=np.float64)
    if gain_N.shape != (t.n_nodes,) or not np.isfinite(gain_N).all():
        raise UserError(
            f"wanted a finite gain for each of {t.n_nodes} nodes, got an array of shape {gain_N.shape} with "
            f"{int((~np.isfinite(gain_N)).sum())} values that are not; take it from information_gain"
        )
    split = np.flatnonzero(t.branching)  # elsewhere the only token weighs 1
    edges, size = t.below(split).at, t.n_children[split]
    among = None if counts_per_item is None else is_trained(t, counts_per_item, edges)
    weight_N = np.ones(t.n_nodes)
    weight_N[edges] = 1.0 - alpha * scale_within(gain_N[edges], np.cumsum(size) - size, among)
    return weight_N


def is_trained(t: Trie, counts_per_item: ArrayLike, node: Int64 | None = None) -> Bool:
    """Whether a training target lies under each node, or under some: bool (N,); errors as `gain_entropy`."""
    return _masses(t, counts_per_item, node) > 0


def scale_within(gain: Float64, start: NDArray[np.integer], among: Bool | None = None) -> Float64:
    """Gains brought to [0, 1] within groups: smallest 0, largest 1; 0 in groups whose gains are equal (to rounding).

    Args:
        gain: float64 (E,), groups one after the other.
        start: (G,), ascending; where each group begins, 0 first.
        among: (E,); the others are no part of their group, and 0. None: all are.
    """
    if not len(gain):
        return gain
    among = np.ones(len(gain), dtype=bool) if among is None else among
    low = np.minimum.reduceat(np.where(among, gain, np.inf), start)
    high = np.maximum.reduceat(np.where(among, gain, -np.inf), start)
    differ = high - low > ROUNDING * np.maximum(np.abs(low), np.abs(high))  # false where nothing is among
    low, span = np.where(differ, low, 0.0), np.where(differ, high - low, 1.0)
    size = np.diff(start, append=len(gain))
    above = gain - np.repeat(low, size)
    scaled: Float64 = above / np.repeat(span, size) * (np.repeat(differ, size) & among)
    return scaled


def binary_weights(t: Trie, counts_per_item: ArrayLike, beta: float, measure: str = "information") -> Float64:
    """Weights of the token losses in IGD's training: beta where the token decides nothing, else 1.

    Args:
        t: The trie of the catalogue.
        counts_per_item: Integers (I,) >= 0: how often each item is a target of the training loss.
        beta: Weight of zero-gain tokens in [0, 1]; 1 weighs all tokens alike.
        measure: Of `gain_by`; all agree on what is zero-gain, but for ``conditional-entropy``, where a token that
            raises the entropy counts as such too.

    Returns:
        float64 (N,): the weight of the edge into each node.

    Raises:
        UserError: ``beta`` outside [0, 1], an unknown measure, or counts as `gain_entropy`.
    """
    _check_share("beta", beta)
    idle_N, gain_N = zero_gain(t, counts_per_item), gain_by(t, counts_per_item, measure)
    if measure == "conditional-entropy":
        idle_N = idle_N | (gain_N <= ROUNDING * gain_N.max())
    return np.where(idle_N, float(beta), 1.0)


def linear_weights(t: Trie, counts_per_item: ArrayLike, beta: float, measure: str = "information") -> Float64:
    r"""Weights of the token losses in IGD's training, linear in the gain.

    .. math:: w_n = \beta + (1 - \beta) \frac{\mathrm{gain}_n}{\max \mathrm{gain}}

    Args and errors as `binary_weights`; returns float64 (N,) in [beta, 1]: the weight of the edge into each node; beta
    where a token gains nothing or less, everywhere where none gains anything.

    Source: IGD, appendix G, which does not say what the maximum is over, and has no code. Here: over the nodes
    with counts, which are all that the authors' trie has, so that items without counts change no weight.
    """
    _check_share("beta", beta)
    gain_N = gain_by(t, counts_per_item, measure)
    top = gain_N[_masses(t, counts_per_item) > 0].max()
    share_N = np.clip(gain_N / top, 0.0, 1.0) if top > 0 else np.zeros_like(gain_N)
    return beta + (1.0 - beta) * share_N


def front_weights(t: Trie, counts_per_item: ArrayLike) -> Float64:
    r"""Weights of front-greater learning along each title, high where a token settles most of what is open.

    .. math:: w_t = L \, \frac{\ln(1 + g_t)}{\sum_s \ln(1 + g_s)}

    with g the gain by ``conditional-entropy`` of `gain_by`, in nats, 0 where it is negative. Along a title of L
    tokens the weights sum to L; all are 1 where no token gains anything.

    Args and errors as `gain_entropy`; returns float64 (T,), title after title.

    Source: front-greater weighting, arXiv:2601.17787. Differs from its code: gains of each title's own tokens, not
    means over a position in per cent of the purity, and a terminator is a token like others.
    """
    after, offsets = t.paths_after()
    gain_T = np.log1p(np.maximum(gain_by(t, counts_per_item, "conditional-entropy"), 0.0))[after]
    return _of_mean_one(gain_T, offsets)


def rarity_weights(t: Trie, counts_per_item: ArrayLike, beta: float = 0.99) -> Float64:
    r"""Weights of the token losses along each title, high for tokens that training targets hold seldom.

    .. math:: w_t \propto \frac{1 - \beta}{1 - \beta^{f_t}}

    with f the occurrences of the token in all training targets, 1 where it has none; scaled so that the weights of a
    title sum to its number of tokens. Args and errors as `gain_entropy`; returns float64 (T,), title after title.

    Source: frequency weighting of arXiv:2601.17787, whose code has beta .99; its terminator always weighs 1.
    """
    (after, offsets), mass_N = t.paths_after(), _masses(t, counts_per_item)
    often_V = np.bincount(t.token[1:], mass_N[1:])
    return _of_mean_one(
        (1 - beta) / -np.expm1(np.maximum(often_V, 1) * np.log(beta))[t.token[after]], offsets
    )


def _of_mean_one(value_T: Float64, offsets: Int64) -> Float64:
    """Numbers of title tokens, scaled to a mean of 1 in each title; 1 where all of a title are 0."""
    length_I = np.diff(offsets)
    mean_T = np.repeat(np.add.reduceat(value_T, offsets[:-1]) / length_I, length_I)
    return np.divide(value_T, mean_T, out=np.ones_like(value_T), where=mean_T > 0)


def position_weights(length: ArrayLike, beta: float) -> Float64:
    r"""Weights of the token losses that fall along each title, from 1 at its first token to beta at its last.

    .. math:: w_t = 1 - \frac{(t - 1)(1 - \beta)}{L - 1}, \quad t = 1, \dots, L

    Args:
        length: Tokens of each title with its terminator, integers (I,) >= 1, or one number.
        beta: Weight of the last token in [0, 1]; 1 weighs all tokens alike.

    Returns:
        float64 (T,), title after title; 1 for a title of one token.

    Raises:
        UserError: ``beta`` outside [0, 1], or a length below 1.

    Source: Pos, the baseline of IGD (NeurIPS '25); CFT weighs so too.

    >>> position_weights(5, 0.2).round(3).tolist()
    [1.0, 0.8, 0.6, 0.4, 0.2]
    """
    _check_share("beta", beta)
    length_I = np.atleast_1d(np.asarray(length, dtype=np.int64))
    if length_I.min(initial=1) < 1:
        raise UserError(f"wanted lengths of at least 1, got {length_I.min()}; count the terminator too")
    last_T = np.repeat(np.maximum(length_I - 1, 1), length_I)
    weight_T: Float64 = 1.0 - within(length_I) * (1.0 - beta) / last_T
    return weight_T


def zero_gain_share(t: Trie, counts_per_item: ArrayLike) -> float:
    """Share of zero-gain tokens among all target tokens (IGD, Table 1), titles weighed by counts."""
    mass_N = _masses(t, counts_per_item)
    return _edge_mean(_keeps_all(t, mass_N), mass_N)


def forced_share(t: Trie, counts_per_item: ArrayLike) -> float:
    """Share of tokens without an alternative in the trie among all target tokens.

    Titles are weighed by counts; counts of one give the share over the catalogue.
    """
    return _edge_mean(t.n_children[t.parent] == 1, _masses(t, counts_per_item))


def average_valid_tokens(t: Trie, counts_per_item: ArrayLike) -> float:
    """Mean number of valid tokens over all target tokens (AVT in MSL), titles weighed by counts."""
    return _edge_mean(t.n_children[t.parent], _masses(t, counts_per_item))


def _masses(t: Trie, counts_per_item: ArrayLike, node: Int64 | None = None) -> Int64:
    """Checked counts, summed under each node, or under some: int64 (N,), positive at the root."""
    counts = np.asarray(counts_per_item)
    if counts.shape != (t.n_items,):
        raise UserError(
            f"wanted one count for each of {t.n_items} items, got shape {counts.shape}; index it by item"
        )
    whole = counts.dtype.kind in "iub" or (np.isfinite(counts) & (counts == np.floor(counts))).all()
    if not whole:
        raise UserError(f"wanted integer counts, got fractions ({counts.dtype}); count targets, do not weigh")
    count_I = counts.astype(np.int64)
    if count_I.min() < 0:
        item = int(np.argmin(count_I))
        raise UserError(f"wanted counts >= 0, got {count_I[item]} for item {item}; count training targets")
    if not count_I.any():
        raise UserError(
            "wanted at least one training target, got counts that are all zero; check the training split"
        )
    return t.subtree_count(count_I, node)


def _entropy(t: Trie, mass_N: Int64) -> Float64:
    # -ln p as log1p stays exact for p near 1.
    return _summed(t, mass_N, lambda m, total: m / total * np.log1p((total - m) / m))


def _summed(t: Trie, mass_N: Int64, term: Callable[[Int64, np.int64], Float64]) -> Float64:
    """Sum over the groups with counts under each node of a term of a group's counts and all counts."""
    leaves = np.flatnonzero(t.is_leaf)
    leaves = leaves[mass_N[leaves] > 0]
    term_I = np.zeros(t.n_items)
    # The first item of a group carries the term of the whole group.
    term_I[t.item_order[t.item_lo[leaves]]] = term(mass_N[leaves], mass_N[0])
    return t.subtree_sum(term_I)


def _keeps_all(t: Trie, mass_N: Int64) -> Bool:
    return np.concatenate(([True], mass_N[t.parent[1:]] == mass_N[1:]))


def _edge_mean(value_N: Bool | Int64, mass_N: Int64) -> float:
    """Mean of a number per edge over all target tokens; the root has no edge."""
    return float((value_N[1:] * mass_N[1:]).sum() / mass_N[1:].sum())


def _check_share(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise UserError(f"wanted {name} in [0, 1], got {value}; 0 <= {name} <= 1")
