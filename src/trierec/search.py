"""Which nodes to expand and how paths are scored. No language model lives here: the engine gives edge scores.

Dimension key: B users, N trie nodes, G groups (leaves), I items, K returned items.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trierec.decisiveness import decoding_weights
from trierec.engine import Counters, TokenLists, TrieEngine, edge_log_probabilities
from trierec.errors import UserError
from trierec.ranking import Groups, Items, Ranking, rank_groups
from trierec.trie import Trie


def rank_catalogue(
    engine: TrieEngine,
    prompts: TokenLists,
    k: int | None = None,
    length_penalty: float = 0.0,
    alpha: float = 0.0,
    gain: NDArray[np.float64] | None = None,
    exclude: Sequence[Items | None] | None = None,
    allow: Sequence[Items | None] | None = None,
    counts: NDArray[np.int64] | None = None,
) -> Ranking:
    r"""Score every title of the catalogue and order them: exact, whatever the model.

    .. math:: S(i) = L_i^{-\lambda} \sum_t w(n_t) \log p(y_t \mid n_{t-1})

    In trie support only decisions and their ancestors are run (forced tokens score 0); in vocabulary support every
    inner node is. Filters take items out of the ranking and change no score.

    Args:
        engine: Model, trie and support.
        prompts: Token ids of each user.
        k: Number of groups to return, None for all.
        length_penalty: Exponent :math:`\lambda` of the number of title tokens with terminator (BIGRec 1, D3
            0).
        alpha: IGD-decoding: edges are weighed with ``decoding_weights(trie, gain, alpha)``; 0 switches it
            off.
        gain: (N,) information gain in nats, needed when ``alpha > 0``.
        exclude: Per user, items that are not returned.
        allow: Per user, the only items that are returned.
        counts: (I,) training targets; the allowed member with most represents a group. Default: the lowest
            index.

    Returns:
        A :class:`~trierec.ranking.Ranking` with ``certified`` true everywhere; scores in nats (natural
        logarithm).

    Raises:
        UserError: ``alpha`` outside [0, 1], ``alpha > 0`` without ``gain``, ``k < 1``, unknown items in a
            filter.

    Source: the full ranking by the product of P_valid is what MSL's Lemma 1 speaks of; the weights are IGD-decoding
    with the gain scaled per node, as in its authors' code. Differs from both: the authors look at ten beams only.
    """
    counters = Counters()
    if len(prompts) == 0:
        width = k or engine.trie.n_groups
        empty = np.zeros((0, width))
        return Ranking(
            empty.astype(np.int32), empty.astype(np.float32), np.ones(0, dtype=bool), counters.as_dict()
        )
    edges = edge_log_probabilities(engine, prompts, counters)
    weight = edge_weights(engine.trie, alpha, gain)
    if weight is not None:
        edges *= weight.astype(np.float32)
    trie = engine.trie
    leaves = np.unique(trie.leaf)
    scores = path_sums(trie, edges)[:, leaves]
    if length_penalty:
        scores = scores / trie.depth[leaves].astype(np.float32) ** length_penalty
    items, best = rank_groups(scores, Groups.from_labels(trie.leaf, counts), k, exclude, allow)
    return Ranking(items, best, np.ones(len(prompts), dtype=bool), counters.as_dict())


def edge_weights(trie: Trie, alpha: float, gain: NDArray[np.float64] | None) -> NDArray[np.float64] | None:
    """(N,) weight of the edge into each node under IGD-decoding, or None when it is off."""
    if not 0 <= alpha <= 1:
        raise UserError(f"wanted alpha in [0, 1], got {alpha}")
    if alpha == 0:
        return None
    if gain is None:
        raise UserError("alpha > 0 needs gain: give information_gain(trie, counts)")
    return decoding_weights(trie, gain, alpha)


def path_sums(trie: Trie, edges: NDArray[np.float32]) -> NDArray[np.float32]:
    """(B, N) sums of edge scores from the root to each node, level by level."""
    total = edges.copy()
    for depth in range(1, len(trie.level_ptr) - 1):
        level = slice(int(trie.level_ptr[depth]), int(trie.level_ptr[depth + 1]))
        total[:, level] += total[:, trie.parent[level]]
    return total
