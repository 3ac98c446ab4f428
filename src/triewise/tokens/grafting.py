"""The trie of a changed catalogue, from the trie before: titles that stay are neither read nor sorted again.

Nodes are numbered breadth first in the order of their tokens, so nodes that stay keep their order and a new one has one
place between two of them. Every step is a pass over arrays.

Shape key: N nodes before, M nodes of the new titles' own trie, T nodes after, J items after.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from triewise.arrays import Bool, Int64, offsets_of
from triewise.errors import UserError
from triewise.tokens.trie import Trie

if TYPE_CHECKING:
    from triewise.arrays import Ints, Ragged


def changed_trie(trie: Trie, source_J: Int64, added: Ragged) -> Trie:
    """What `Trie.from_sequences` gives for another catalogue, array by array.

    Args:
        trie: The trie before.
        source_J: int64 (J,); which item before each item is, -1 for a new one.
        added: Token sequences of the new ones, in their order.

    Raises:
        UserError: No items, or a sequence that is a proper prefix of another one.
    """
    is_new = source_J < 0
    if is_new.all():
        return Trie.from_sequences((added.values, added.offsets))
    stays = source_J[~is_new]
    count_N = trie.subtree_count(np.bincount(stays, minlength=trie.n_items))
    keep_N = count_N > 0
    if not len(added):
        before_N1 = offsets_of(keep_N)
        parent, levels = before_N1[trie.parent[keep_N]], before_N1[trie.level_ptr[1:]]
        leaf = before_N1[trie.leaf[source_J]]
        return _assembled(trie.token[keep_N], parent, count_N[keep_N], levels, leaf)
    own = Trie.from_sequences((added.values, added.offsets))
    known_M, place_M = _places(trie, own)
    count_M = (own.item_hi - own.item_lo).astype(np.int64)
    keep_N[place_M[known_M]] = True
    count_N[place_M[known_M]] += count_M[known_M]
    fresh = np.flatnonzero(~known_M)
    # A node that stays moves up by what is gone before it and down by what is put before it.
    before_N1 = offsets_of(keep_N)
    put_N = np.cumsum(np.bincount(place_M[fresh], minlength=trie.n_nodes + 1))[:-1]
    to_N = before_N1[:-1] + put_N
    to_M = np.where(known_M, to_N[np.minimum(place_M, trie.n_nodes - 1)], 0)
    to_M[fresh] = before_N1[place_M[fresh]] + np.arange(len(fresh))
    kept = np.flatnonzero(keep_N)
    total = len(kept) + len(fresh)
    token, parent, count = np.empty(total, np.int32), np.empty(total, np.int64), np.empty(total, np.int64)
    token[to_N[kept]], token[to_M[fresh]] = trie.token[kept], own.token[fresh]
    parent[to_N[kept]], parent[to_M[fresh]] = to_N[trie.parent[kept]], to_M[own.parent[fresh]]
    count[to_N[kept]], count[to_M[fresh]] = count_N[kept], count_M[fresh]
    levels = np.zeros(max(len(trie.level_ptr), len(own.level_ptr)) - 1, dtype=np.int64)
    levels[: len(trie.level_ptr) - 1] += np.diff(before_N1[trie.level_ptr])
    levels[: len(own.level_ptr) - 1] += np.bincount(own.depth[fresh], minlength=len(own.level_ptr) - 1)
    leaf_J = np.empty(len(source_J), dtype=np.int64)
    leaf_J[~is_new], leaf_J[is_new] = to_N[trie.leaf[stays]], to_M[own.leaf]
    return _assembled(token, parent, count, np.cumsum(levels), leaf_J)


def _places(trie: Trie, own: Trie) -> tuple[Bool, Int64]:
    """Which nodes of the new titles' trie are there already, and where each is, or before which node it belongs; (M,).

    A node that belongs behind all nodes of its level comes before the first of the next one.
    """
    known_M, place_M = np.zeros(own.n_nodes, dtype=bool), np.zeros(own.n_nodes, dtype=np.int64)
    known_M[0] = True
    for low, high in pairwise(own.level_ptr[1:]):
        above, token = own.parent[low:high], own.token[low:high]
        node, is_known = place_M[above], known_M[above]
        end = trie.child_ptr[np.where(is_known, node + 1, node)]
        at = _first_from(trie.token, trie.child_ptr[node], end, token)
        known_M[low:high] = (at < end) & (trie.token[np.minimum(at, trie.n_nodes - 1)] == token)
        place_M[low:high] = at
    return known_M, place_M


def _first_from(token_N: Ints, low: Ints, high: Ints, wanted: Ints) -> Ints:
    """The first place in each range, whose tokens ascend, with at least the token wanted; else its end."""
    while (low < high).any():
        middle = (low + high) // 2
        less = (low < high) & (token_N[np.minimum(middle, len(token_N) - 1)] < wanted)
        low, high = np.where(less, middle + 1, low), np.where(less | (low == high), high, middle)
    return low


def _assembled(token_T: Ints, parent_T: Ints, count_T: Int64, levels: Int64, leaf_J: Ints) -> Trie:
    """A trie from its edges in their order, the items below each node, the ends of levels and the leaf of each item."""
    token_T[0], parent_T[0] = -1, -1
    level_ptr = np.unique(np.append(0, levels))  # without the empty ones behind the deepest
    child_ptr = np.ones(len(token_T) + 1, dtype=np.int64)
    child_ptr[1:] += np.cumsum(np.bincount(parent_T[1:], minlength=len(token_T)))
    inner = child_ptr[1:][leaf_J] > child_ptr[:-1][leaf_J]
    if inner.any():
        raise UserError(
            f"wanted no title that begins another, got item {int(np.argmax(inner))}, which another one continues; end "
            "every title with one terminator token"
        )
    lo_T, running_T = np.zeros(len(token_T), dtype=np.int64), offsets_of(count_T)
    for low, high in pairwise(level_ptr[1:]):
        above = parent_T[low:high]
        lo_T[low:high] = lo_T[above] + running_T[low:high] - running_T[child_ptr[above]]
    order = np.argsort(lo_T[leaf_J], kind="stable")
    columns = (child_ptr, token_T, parent_T, lo_T, lo_T + count_T, order, leaf_J)
    children, token, parent, lo, hi, place, leaf = (column.astype(np.int32) for column in columns)
    return Trie(children, token, parent, lo, hi, place, leaf, level_ptr)
