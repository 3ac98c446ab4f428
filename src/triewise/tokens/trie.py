"""The prefix tree of the catalogue's titles as a few flat arrays: what every method counts on.

Two orderings replace node objects. Nodes are numbered breadth first by (parent, token), and items are also kept
in lexicographic order of their token sequences, so the children of a node and the items under it are ranges; see
`Trie`. A title token is the edge into one node; a title is a leaf; items with equal sequences share their leaf and
form a group.

Shape key: N nodes, I items, L tokens of all titles, D levels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
from numpy.typing import ArrayLike, NDArray

from triewise.arrays import Bool, Flat, Float64, Int32, Int64, offsets_of, ranges
from triewise.errors import UserError
from triewise.files import atomic_path

if TYPE_CHECKING:
    import torch

TRIE_FORMAT = 1
LIMIT = 2**31  # tokens and node ids are int32
SHOWN = 12  # tokens of a title that an error line quotes
_ARRAYS = ("child_ptr", "token", "parent", "item_lo", "item_hi", "item_order", "leaf", "level_ptr")
Sequences = Sequence[Sequence[int]] | tuple[NDArray[Any], NDArray[Any]]


@dataclass(frozen=True)
class DeviceTrie:
    """The arrays of a `Trie` as int64 torch tensors on one device; same names, same meaning."""

    child_ptr: torch.Tensor
    token: torch.Tensor
    parent: torch.Tensor
    item_lo: torch.Tensor
    item_hi: torch.Tensor
    item_order: torch.Tensor
    leaf: torch.Tensor
    n_children: torch.Tensor

    @property
    def n_nodes(self) -> int:
        """Number of nodes, the root included."""
        return len(self.token)

    @property
    def n_items(self) -> int:
        """Number of items."""
        return len(self.leaf)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.token.device

    def __repr__(self) -> str:
        return f"DeviceTrie({self.n_items} items, {self.n_nodes} nodes, on {self.device})"


@dataclass(frozen=True, eq=False, repr=False)
class Trie:
    """A prefix tree of token sequences; build it with `from_sequences`, never by hand.

    Attributes:
        child_ptr: int32 (N+1,); ``child_ptr[n]:child_ptr[n + 1]`` are the ids of n's children.
        token: int32 (N,); the token on the edge into each node, -1 at the root.
        parent: int32 (N,); -1 at the root (node 0).
        item_lo: int32 (N,); ``item_order[item_lo[n]:item_hi[n]]`` are the items under n.
        item_hi: int32 (N,).
        item_order: int32 (I,); items in lexicographic order of their sequences, ties by index.
        leaf: int32 (I,); the node of each item.
        level_ptr: int64 (D+1,); the nodes of depth d are ``level_ptr[d]:level_ptr[d + 1]``.
    """

    child_ptr: Int32
    token: Int32
    parent: Int32
    item_lo: Int32
    item_hi: Int32
    item_order: Int32
    leaf: Int32
    level_ptr: Int64
    _on_device: dict[str, DeviceTrie] = field(default_factory=dict, init=False)

    @classmethod
    def from_sequences(cls, sequences: Sequences) -> Trie:
        """Build the tree of a catalogue; item i is sequence i, equal sequences share a leaf.

        Args:
            sequences: A list of int lists, or two arrays ``(tokens (L,), offsets (I+1,))`` where sequence i
                is ``tokens[offsets[i]:offsets[i + 1]]``. Tokens lie in [0, 2**31).

        Raises:
            UserError: No items, an empty sequence, a token out of range, offsets that do not fit the
                tokens, or a sequence that is a proper prefix of another (both items are named).

        >>> t = Trie.from_sequences([[1, 2, 9], [1, 3, 9], [7, 9]])
        >>> t
        Trie(3 titles of 3 items, 8 nodes, 2 branching, depth 3)
        >>> t.token.tolist()
        [-1, 1, 7, 2, 3, 9, 9, 9]
        >>> t.leaf.tolist()
        [6, 7, 5]
        """
        return _grow(*_flat(sequences))

    @property
    def n_nodes(self) -> int:
        """Number of nodes, the root included."""
        return len(self.token)

    @property
    def n_items(self) -> int:
        """Number of items, items with equal titles counted one by one."""
        return len(self.leaf)

    @cached_property
    def n_groups(self) -> int:
        """Number of leaves: groups of items with equal token sequences."""
        return int(self.is_leaf.sum())

    @cached_property
    def n_children(self) -> Int64:
        """Number of children of each node, int64 (N,)."""
        return np.diff(self.child_ptr).astype(np.int64)

    @cached_property
    def branching(self) -> Bool:
        """Whether a node has more than one child, that is, its next token is a decision; bool (N,)."""
        return self.n_children > 1

    @cached_property
    def is_leaf(self) -> Bool:
        """Whether a node is the end of a title; bool (N,)."""
        return self.n_children < 1

    @cached_property
    def depth(self) -> Int32:
        """Number of tokens from the root to each node, int32 (N,)."""
        return np.repeat(np.arange(len(self.level_ptr) - 1, dtype=np.int32), np.diff(self.level_ptr))

    @cached_property
    def next_decision(self) -> Int32:
        """The first decision or leaf that forced tokens lead to from each node, itself included; int32 (N,)."""
        itself = np.arange(self.n_nodes, dtype=np.int32)
        return _ends(np.where(self.n_children == 1, self.child_ptr[:-1], itself))

    @cached_property
    def forced_depth(self) -> Int32:
        """Number of forced tokens from the last decision to each node: 0 right behind a decision; int32 (N,)."""
        itself, above = np.arange(self.n_nodes, dtype=np.int32), np.maximum(self.parent, 0)
        return self.depth - self.depth[_ends(np.where(self.branching[above] | (above == 0), itself, above))]

    @cached_property
    def place(self) -> Int64:
        """Place of each item in ``item_order``, int64 (I,)."""
        return np.argsort(self.item_order)

    @cached_property
    def longest(self) -> Int32:
        """Tokens of the longest title under each node, counted from the root, terminator included; int32 (N,)."""
        return self._from_below(self.depth.copy(), np.maximum)

    @cached_property
    def shortest(self) -> Int32:
        """Tokens of the shortest title under each node, counted from the root, terminator included; int32 (N,)."""
        return self._from_below(self.depth.copy(), np.minimum)

    def _from_below(self, value_N: NDArray[Any], join: np.ufunc) -> NDArray[Any]:
        """Put in the place of each inner node's value what ``join`` makes of its children's, deepest level first."""
        inner = np.flatnonzero(self.n_children)
        split = np.searchsorted(inner, self.level_ptr)
        for d in reversed(range(len(self.level_ptr) - 2)):
            above, low = inner[split[d] : split[d + 1]], self.level_ptr[d + 1]
            value_N[above] = join.reduceat(value_N[low : self.level_ptr[d + 2]], self.child_ptr[above] - low)
        return value_N

    def __repr__(self) -> str:
        return (
            f"Trie({self.n_groups} titles of {self.n_items} items, {self.n_nodes} nodes, "
            f"{int(self.branching.sum())} branching, depth {len(self.level_ptr) - 2})"
        )

    def children(self, node: int) -> tuple[Int32, Int32]:
        """The valid next tokens after a node and the nodes they lead to.

        Returns:
            (tokens, nodes), both int32 and ascending; empty at a leaf.

        Raises:
            UserError: ``node`` is not in [0, N).
        """
        if not 0 <= node < self.n_nodes:
            raise UserError(f"wanted a node in [0, {self.n_nodes}), got {node}; take it from walk or leaf")
        low, high = int(self.child_ptr[node]), int(self.child_ptr[node + 1])
        return self.token[low:high], np.arange(low, high, dtype=np.int32)

    def continuations(self, nodes: ArrayLike) -> Int64:
        """The distinct tokens below any of some nodes, which come in any order; int64 (U,), ascending.

        >>> Trie.from_sequences([[7, 2], [9, 2], [7, 3]]).continuations([0, 1]).tolist()
        [2, 3, 7, 9]
        """
        node = np.unique(np.asarray(nodes, dtype=np.int64))
        return np.unique(self.token[self.below(node).at]).astype(np.int64)

    def below(self, node: Int64) -> Flat:
        """The edges below some nodes (R,), end to end: child nodes ``at`` (E,) and which of the nodes ``row`` (E,)."""
        return ranges(self.child_ptr[node], self.n_children[node])

    def walk(self, sequence: Iterable[int]) -> Int32:
        """Follow a sequence from the root.

        Returns:
            int32 (len(sequence) + 1,): the node before each token, then the node reached, which is the
            item's leaf when the sequence is a whole title.

        Raises:
            KeyError: A token does not continue the prefix before it; the message names the tokens that do.

        >>> Trie.from_sequences([[1, 2, 9], [1, 3, 9], [7, 9]]).walk([1, 3, 9]).tolist()
        [0, 1, 4, 7]
        """
        nodes = [0]
        for position, token in enumerate(sequence):
            low, high = int(self.child_ptr[nodes[-1]]), int(self.child_ptr[nodes[-1] + 1])
            child = low + int(np.searchsorted(self.token[low:high], token))
            if child == high or self.token[child] != token:
                raise KeyError(self._off(position, token, self.token[low:high]))
            nodes.append(child)
        return np.array(nodes, dtype=np.int32)

    def _off(self, position: int, token: int, valid: Int32) -> str:
        more = f" and {len(valid) - SHOWN} more" if len(valid) > SHOWN else ""
        some = f"one of the tokens {valid[:SHOWN].tolist()}{more}"
        wanted = some if len(valid) else "the end of the title"
        return (
            f"at position {position} wanted {wanted}, got the token {token}; "
            f"the title is not one of the {self.n_groups} in the trie"
        )

    def path_to(self, node: int) -> list[int]:
        """Nodes from below the root down to ``node``; empty for the root."""
        path = []
        while node > 0:
            path.append(node)
            node = int(self.parent[node])
        return path[::-1]

    def paths(self) -> tuple[Int32, Int64]:
        """The node before each token of every item, as `walk` gives it without the leaf.

        Returns:
            (node_before, offsets): int32 (L,) and int64 (I+1,); item i has
            ``node_before[offsets[i]:offsets[i + 1]]``.
        """
        offsets_I1 = offsets_of(self.depth[self.leaf])
        node_before = np.empty(offsets_I1[-1], dtype=np.int32)
        node, place = self.leaf, offsets_I1[1:] - 1
        while len(node):  # one step up for all titles that are not at the root yet
            node = self.parent[node]
            node_before[place] = node
            place, node = place[node > 0] - 1, node[node > 0]
        return node_before, offsets_I1

    def paths_after(self) -> tuple[Int32, Int64]:
        """The node that each token of every item leads into, and the offsets of `paths`."""
        before, offsets = self.paths()
        after = np.append(before[1:], before[:1])
        after[offsets[1:] - 1] = self.leaf
        return after, offsets

    def subtree_sum(self, values_per_item: ArrayLike) -> Float64:
        """Sum of the values of the items under each node, float64 (N,).

        Bottom-up, level by level. Differences of running sums would be one line, but subtracting two totals
        near 1 leaves nothing of a 1e-17 leaf, and its logarithm is what some methods need.

        Args:
            values_per_item: Numbers (I,).

        Raises:
            UserError: Not one value per item.
        """
        value_I = self._per_item(values_per_item).astype(np.float64)
        sum_N = np.zeros(self.n_nodes)
        np.add.at(sum_N, self.leaf, value_I)
        return self._from_below(sum_N, np.add)

    def subtree_count(self, counts_per_item: ArrayLike, node: Int64 | None = None) -> Int64:
        """Sum of integer counts (I,) of the items under each node, or under some, exact, int64 (N,).

        Raises:
            UserError: Not one value per item, or values that are not integers.
        """
        count_I = self._per_item(counts_per_item)
        if count_I.dtype.kind not in "iub":
            raise UserError(f"wanted integer counts, got {count_I.dtype}; round them or use subtree_sum")
        running = offsets_of(count_I[self.item_order])
        low, high = (self.item_lo, self.item_hi) if node is None else (self.item_lo[node], self.item_hi[node])
        return running[high] - running[low]

    def _per_item(self, values: ArrayLike) -> NDArray[Any]:
        array = np.asarray(values)
        if array.shape != (self.n_items,):
            raise UserError(
                f"wanted one value for each of {self.n_items} items, got an array of shape {array.shape}; "
                "index it by item as the catalogue does"
            )
        return array

    def to(self, device: str | torch.device) -> DeviceTrie:
        """The arrays as int64 tensors on a device; made once per device, then the same object."""
        import torch

        key = str(torch.device(device))
        if key not in self._on_device:
            arrays = (getattr(self, f.name).astype(np.int64) for f in fields(DeviceTrie))
            self._on_device[key] = DeviceTrie(*(torch.from_numpy(array).to(device) for array in arrays))
        return self._on_device[key]

    def __getstate__(self) -> dict[str, Any]:
        """What other processes are given: no tensors of a device."""
        return vars(self) | {"_on_device": {}}

    def fingerprint(self) -> str:
        """Hex SHA-256 of the arrays: equal exactly for equal token sequences in equal order."""
        digest = hashlib.sha256(f"trie {TRIE_FORMAT} {self.n_nodes} {self.n_items}".encode())
        for name in ("child_ptr", "token", "leaf"):  # the other arrays follow from these
            digest.update(getattr(self, name).astype("<i4").tobytes())
        return digest.hexdigest()

    def save(self, path: Path | str) -> None:
        """Write one uncompressed ``.npz`` file, whole or not at all."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        with atomic_path(Path(path)) as temporary, temporary.open("wb") as handle:
            np.savez(handle, format=np.int64(TRIE_FORMAT), **arrays)

    @classmethod
    def load(cls, path: Path | str) -> Trie:
        """Read a file that `save` wrote.

        Raises:
            UserError: The file is absent, damaged, not a trie, or of another format version.
        """
        try:
            with Path(path).open("rb") as handle, np.load(handle, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        except FileNotFoundError:
            raise UserError(f"wanted the trie file {path}, which does not exist; check the path") from None
        except Exception as error:  # a foreign feature of zip files, an array of a size that it has not, ...
            raise UserError(
                f"wanted a trie in {path}, got a file that is none ({error}); build it again"
            ) from None
        version = arrays.pop("format", "none")
        whole = set(arrays) == set(_ARRAYS) and all(
            a.ndim == 1 and a.dtype.kind == "i" for a in arrays.values()
        )
        if version != TRIE_FORMAT or not whole:
            raise UserError(
                f"wanted a trie of format {TRIE_FORMAT} in {path}, got format {version}; build it again"
            )
        return cls(**arrays)


def _ends(step_N: Int32) -> Int32:
    """Where one comes from each node by going on to ``step_N[node]`` until that is the node itself; int32 (N,)."""
    while not np.array_equal(step_N, further_N := step_N[step_N]):
        step_N = further_N
    return step_N


def _flat(sequences: Sequences) -> tuple[Int32, Int64]:
    """Bring both accepted forms to ``(tokens (L,), offsets (I+1,))`` and check all that needs no tree."""
    if _is_flat(sequences):
        tokens, offsets = sequences
    else:
        offsets = offsets_of(np.fromiter(map(len, sequences), np.int64, len(sequences)))
        tokens = np.fromiter(chain.from_iterable(sequences), np.int64, int(offsets[-1]))
    if any(a.ndim != 1 or a.dtype.kind not in "iu" for a in (tokens, offsets)):
        raise UserError(
            f"wanted flat integer arrays (tokens, offsets), got {tokens.dtype} of shape {tokens.shape} and "
            f"{offsets.dtype} of shape {offsets.shape}; convert them"
        )
    if len(offsets) < 2:
        raise UserError("wanted at least one title, got no items; check the catalogue")
    length_I = np.diff(offsets.astype(np.int64))
    if offsets[0] != 0 or offsets[-1] != len(tokens) or length_I.min() < 0:
        raise UserError(
            f"wanted offsets that ascend from 0 to the {len(tokens)} tokens, got {offsets[0]} to "
            f"{offsets[-1]}; make them with a running sum of the lengths"
        )
    if length_I.min() == 0:
        empty = int(np.argmin(length_I))
        raise UserError(f"wanted at least one token per title, got none for item {empty}; add a terminator")
    if tokens.min() < 0 or tokens.max() >= LIMIT:
        place = int(np.argmax((tokens < 0) | (tokens >= LIMIT)))
        item = int(np.searchsorted(offsets, place, side="right")) - 1
        raise UserError(
            f"wanted tokens in [0, 2**31), got {tokens[place]} in item {item}; check the tokenizer"
        )
    return tokens.astype(np.int32, copy=False), offsets.astype(np.int64, copy=False)


def _is_flat(sequences: Sequences) -> TypeGuard[tuple[NDArray[Any], NDArray[Any]]]:
    pair = isinstance(sequences, tuple) and len(sequences) == 2
    return pair and all(isinstance(part, np.ndarray) for part in sequences)


def _grow(token_L: Int32, offsets_I1: Int64) -> Trie:
    """Build the tree one level at a time, with all titles that still run; nothing is padded to the longest.

    ``item`` holds these titles in order of their prefixes, ``node`` the rank of each prefix in its level
    and ``slot`` the place that the title at this position takes in ``item_order``. Titles move within their
    node only, so ``slot`` stays while ``item`` is sorted.
    """
    start_I, length_I, width = offsets_I1[:-1], np.diff(offsets_I1), int(token_L.max()) + 1
    item_order, leaf = np.empty(len(start_I), np.int32), np.empty(len(start_I), np.int32)
    item = slot = np.arange(len(start_I))
    node, first = np.zeros_like(item), 0
    root = (-1, -1, 0, len(start_I))  # token, parent, item_lo, item_hi
    levels = [tuple(np.array([value], np.int32) for value in root)]
    for depth in range(int(length_I.max()) + 1):
        ended = length_I[item] == depth
        if ended.any():
            _refuse_prefix(token_L, offsets_I1, item, node, ended)
            leaf[item[ended]] = first + node[ended]
            item_order[slot[ended]] = item[ended]
            item, node, slot = item[~ended], node[~ended], slot[~ended]
        if not len(item):
            break
        key = node * width + token_L[start_I[item] + depth]
        order = np.argsort(key, kind="stable")  # stable: equal titles stay in order of their index
        key, item = key[order], item[order]
        run = np.flatnonzero(np.concatenate(([True], key[1:] != key[:-1])))
        size = np.diff(run, append=len(key))
        above, token = np.divmod(key[run], width)
        low = slot[run]
        levels.append(tuple(a.astype(np.int32) for a in (token, first + above, low, low + size)))
        first += len(levels[-2][0])
        if first + len(run) >= LIMIT:
            raise UserError(
                f"wanted fewer than 2**31 nodes, got more at depth {depth + 1}; split the catalogue"
            )
        node = np.repeat(np.arange(len(run)), size)
    level_ptr = np.cumsum([0] + [len(level[0]) for level in levels], dtype=np.int64)
    token_N, parent_N, lo_N, hi_N = (np.concatenate(column) for column in zip(*levels, strict=True))
    child_ptr = np.ones(len(token_N) + 1, np.int32)
    child_ptr[1:] += np.cumsum(np.bincount(parent_N[1:], minlength=len(token_N)), dtype=np.int32)
    return Trie(child_ptr, token_N, parent_N, lo_N, hi_N, item_order, leaf, level_ptr)


def _refuse_prefix(token_L: Int32, offsets_I1: Int64, item: Int64, node: Int64, ended: Bool) -> None:
    """Raise when a title ends at a node where another goes on."""
    clash = np.isin(node, node[ended]) & ~ended
    if not clash.any():
        return
    at = int(np.argmax(clash))
    longer, shorter = int(item[at]), int(item[np.argmax(ended & (node == node[at]))])
    quoted = token_L[offsets_I1[shorter] : offsets_I1[shorter + 1]]
    more = "..." if len(quoted) > SHOWN else ""
    raise UserError(
        f"wanted no title that begins another, got item {shorter} ({quoted[:SHOWN].tolist()}{more}) "
        f"that item {longer} continues; end every title with one terminator token"
    )
