"""The trie of a changed catalogue, from the trie before: titles that stay are neither read nor sorted again.

Nodes are numbered breadth first in the order of their tokens, so nodes that stay keep their order and a new one has one
place between two of them. Every step is a pass over arrays.

Shape key: N nodes before, M nodes of the new titles' own trie, T nodes after, J items after.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from triewise.arrays import Bool, Int32, Int64, offsets_of
from triewise.errors import UserError
from triewise.tokens.trie import Trie

if TYPE_CHECKING:
    from triewise.arrays import Ints, Ragged

_NONE, _MINUS_ONE, _ZERO = (np.array(values, dtype=np.int32) for values in ([], [-1], [0]))
# A trie without titles, which `from_sequences` does not give.
_ROOT = Trie(_ZERO.repeat(2) + 1, _MINUS_ONE, _MINUS_ONE, _ZERO, _ZERO, _NONE, _NONE, np.array([0, 1]))


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
    own = Trie.from_sequences((added.values, added.offsets)) if len(added) else _ROOT
    known_M, place_M = _places(trie, own)
    running_I1 = offsets_of(np.bincount(stays, minlength=trie.n_items)[trie.item_order]).astype(np.int32)
    count_N = running_I1[trie.item_hi] - running_I1[trie.item_lo]
    count_M = own.item_hi - own.item_lo
    count_N[place_M[known_M]] += count_M[known_M]
    fresh, gone = np.flatnonzero(~known_M), np.flatnonzero(count_N == 0)
    at = place_M[fresh]
    # A node that stays moves up by what is gone before it and down by what is put before it.
    before_N1 = np.arange(trie.n_nodes + 1, dtype=np.int32) - _number_before(gone, trie.n_nodes)
    to_N = before_N1[:-1] + _number_before(at, trie.n_nodes)[1:]
    here = before_N1[at] + np.arange(len(fresh))
    to_M = to_N[np.minimum(place_M, trie.n_nodes - 1)]
    to_M[fresh] = here
    # Of each node after, the one before, or, of a fresh one, that which it is put before.
    of_T = np.insert(
        np.delete(np.arange(trie.n_nodes), gone), before_N1[at], np.minimum(at, trie.n_nodes - 1)
    )
    token, parent, count = trie.token[of_T], to_N[trie.parent[of_T]], count_N[of_T]
    token[here], parent[here], count[here] = own.token[fresh], to_M[own.parent[fresh]], count_M[fresh]
    parent[0] = -1
    child_ptr = _number_before(parent[here], len(of_T))
    child_ptr[:-1] += before_N1[trie.child_ptr[of_T]]
    child_ptr[-1] = len(of_T)
    levels = np.zeros(max(len(trie.level_ptr), len(own.level_ptr)) - 1, dtype=np.int64)
    levels[: len(trie.level_ptr) - 1] += np.diff(before_N1[trie.level_ptr])
    levels[: len(own.level_ptr) - 1] += np.bincount(own.depth[fresh], minlength=len(own.level_ptr) - 1)
    leaf_J = np.empty(len(source_J), dtype=np.int32)
    leaf_J[~is_new], leaf_J[is_new] = to_N[trie.leaf[stays]], to_M[own.leaf]
    level_ptr = np.unique(offsets_of(levels))  # without the empty ones behind the deepest
    return _finished(child_ptr, token, parent, count, leaf_J, level_ptr)


def _number_before(place: Ints, n: int) -> Int32:
    """How many of some places lie before each of 0, 1, ..., n; int32 (n + 1,)."""
    step = np.zeros(n + 2, dtype=np.int32)
    np.add.at(step, place + 1, 1)
    return np.cumsum(step[:-1], dtype=np.int32)


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


def _finished(
    child_ptr: Int32, token: Int32, parent: Int32, count: Int32, leaf_J: Int32, level_ptr: Int64
) -> Trie:
    """A trie from its edges, the items below each node and the leaf of each item; see `Trie`."""
    inner = child_ptr[leaf_J + 1] > child_ptr[leaf_J]
    if inner.any():
        raise UserError(
            f"wanted no title that begins another, got item {int(np.argmax(inner))}, which another one continues; end "
            "every title with one terminator token"
        )
    running = np.zeros(len(count) + 1, dtype=np.int32)
    np.cumsum(count, dtype=np.int32, out=running[1:])  # from int32 to int32: other threads run meanwhile
    lo = np.zeros(len(token), dtype=np.int32)
    for up, low, high in zip(level_ptr, level_ptr[1:], level_ptr[2:], strict=False):
        shift = lo[up:low] - running[child_ptr[up:low]]
        lo[low:high] = running[low:high] + shift[parent[low:high] - up]
    order = np.argsort(lo[leaf_J], kind="stable").astype(np.int32)
    return Trie(child_ptr, token, parent, lo, lo + count, order, leaf_J, level_ptr)
