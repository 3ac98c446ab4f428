"""Training examples: windows of items, and their ids with one trie node per target token.

A window is a run of one user's items: some leading ones are context, the titles of the rest are targets.
Supervision ``last`` (the papers') has one target per row; ``every`` makes each title after the first a target
of the same sequence and tiles every user's items with as few windows as it can.

Shape key: W windows, I items, N trie nodes, B batch, L tokens, M target positions, R rows of a split, S
titles, T tokens.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from triewise.errors import UserError
from triewise.progress import note
from triewise.prompts import Prompts
from triewise.splits import Ragged, Split
from triewise.trie import Trie

Ints = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Windows:
    """What is learned from.

    Attributes:
        items: W rows of item indices, oldest first.
        n_context: int32 (W,); so many leading items of a window are context only, the others are targets.
    """

    items: Ragged
    n_context: NDArray[np.int32]

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.n_context)

    @property
    def is_target(self) -> NDArray[np.bool_]:
        """Whether each of ``items.values`` is a target."""
        length = self.items.lengths
        place = np.arange(len(self.items.values)) - np.repeat(self.items.offsets[:-1], length)
        return place >= np.repeat(self.n_context, length)


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Right padding needs no attention mask with a causal model: it stands behind every token that matters.

    Attributes:
        input_ids: int64 (B, L), padded on the right with 0.
        position: int64 (M,); index into the flattened (B * L) of the position whose hidden state predicts the
            target.
        target: int64 (M,); token ids.
        node: int64 (M,); trie node before the target.
        weight: float32 (M,); weight of the target in the loss.
        zero_gain: bool (M,); whether the target decides nothing.
        n_tokens: Tokens of ``input_ids`` without the padding.
    """

    input_ids: NDArray[np.int64]
    position: NDArray[np.int64]
    target: NDArray[np.int64]
    node: NDArray[np.int64]
    weight: NDArray[np.float32]
    zero_gain: NDArray[np.bool_]
    n_tokens: int


@dataclass(frozen=True)
class Alone:
    """The target titles of a `Batch` behind a prompt that is the same for all.

    Attributes:
        input_ids: int64 (U, L); one row for each different title, padded on the right with 0.
        position: int64 (M,); as in `Batch`, in the same order, but into (U * L).
        node: int64 (M,); as in `Batch`.
        n_tokens: Tokens of ``input_ids`` without the padding.
    """

    input_ids: NDArray[np.int64]
    position: NDArray[np.int64]
    node: NDArray[np.int64]
    n_tokens: int


def make_windows(split: Split, supervision: str, prompts: Prompts | None = None) -> Windows:
    """The windows of a split.

    ``last``: one window a row, its history and its target. ``every``: the rows of one user that continue each
    other (each history is the end of the row before with its target added) form a piece; a piece is covered
    from its end, each window as long as its row, so that every interaction after the first of the piece is a
    target exactly once. Where the first two windows of a piece overlap, the overlap is context of the second.
    Rows without a user stand alone.

    Args:
        split: The rows.
        supervision: ``last`` or ``every``.
        prompts: Where given, windows of ``every`` that are longer than its ``max_tokens`` lose whole titles,
            oldest first, as prompts do; how many targets that costs is printed.

    Raises:
        UserError: Unknown supervision, a template other than ``plain`` with ``every``, or no window with a
            target.
    """
    if supervision not in ("last", "every"):
        raise UserError(f"wanted supervision 'last' or 'every', got {supervision!r}")
    if supervision == "every" and prompts is not None and prompts.template != "plain":
        raise UserError(
            f"supervision = 'every' needs the plain template, got {prompts.template!r}: elsewhere titles of "
            "the history are no answers; set backbone.template = 'plain' or supervision = 'last'"
        )
    rows = _with_target(split)
    if supervision == "last" or not len(rows):
        windows = Windows(rows, (rows.lengths - 1).astype(np.int32))
    else:
        windows = _tile(split, rows)
        windows = windows if prompts is None else _fit(windows, prompts)
    if not len(windows):
        raise UserError("wanted rows to train on, got none with a target; check the split")
    return windows


def target_counts(windows: Windows, n_items: int) -> NDArray[np.int64]:
    """How often each item is a target of the training loss, int64 (I,)."""
    counts = np.bincount(windows.items.values[windows.is_target], minlength=n_items)
    return counts.astype(np.int64)


def chains(windows: Windows) -> NDArray[np.int64]:
    """Which windows are one user's, found by what they hold: int64 (W,), a number per chain.

    A window belongs to the chain of the newest earlier one whose items, target included and cut to the longest
    history, are its history; each window is continued once. Files of rows without users are enough, as long as
    the rows of a user are in the order of time.
    """
    items, n = windows.items, len(windows)
    longest = int((items.lengths - 1).max(initial=0))
    chain = np.arange(n)
    waiting: dict[bytes, list[int]] = {}
    for w in range(n):
        row = items[w]
        before = waiting.get(row[:-1].tobytes())
        if before:
            chain[w] = chain[before.pop()]
        waiting.setdefault(row[-longest:].tobytes(), []).append(w)
    return np.unique(chain, return_inverse=True)[1].astype(np.int64)


def draw_rejected(windows: Windows, group: Ints, n: int, seed: int) -> NDArray[np.int32]:
    """Titles that were not chosen, for S-DPO: uniform over all items, the same in every epoch.

    Left out are the titles of the window, its target included, and titles that were drawn already.

    Args:
        windows: One target in each.
        group: A number per item (I,), equal for items of equal titles, such as ``trie.leaf``.
        n: How many for each window, >= 1.
        seed: Of ``default_rng([seed, n])``.

    Returns:
        Item indices, int32 (W, n).

    Raises:
        UserError: Windows with several targets, or fewer than n other titles.

    Source: S-DPO draws from a list of 20 candidates of its own task; uniform over all titles is Flower's, which
    does not leave the history out.
    """
    if (windows.items.lengths - windows.n_context != 1).any():
        raise UserError("S-DPO wants one target in each window; use training.supervision = 'last'")
    n_groups = int(group.max()) + 1
    row_I = np.repeat(np.arange(len(windows)), windows.items.lengths)
    taken = np.unique(row_I * n_groups + group[windows.items.values])
    fewest = len(np.unique(group)) - int(np.bincount(taken // n_groups).max())
    if fewest < n:
        raise UserError(
            f"wanted {n} rejected titles for each row, got a row that leaves {fewest} others; set fewer "
            "objective.preference.negatives"
        )
    rng = np.random.default_rng([seed, n])
    drawn = rng.integers(len(group), size=(len(windows), n))
    while True:
        code = np.arange(len(windows))[:, None] * n_groups + group[drawn]
        again = np.isin(code, taken)
        for j in range(1, n):
            again[:, j] |= (code[:, :j] == code[:, j : j + 1]).any(1)
        if not again.any():
            return drawn.astype(np.int32)
        drawn[again] = rng.integers(len(group), size=int(again.sum()))


def schedule(
    n_windows: int, batch_size: int, steps: int, seed: int, chain: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """The order of a whole run: which windows make each step, int64 (steps, batch_size).

    Epoch after epoch a fresh permutation; a batch may cross the border of two. Resuming is an offset into the
    array.

    Args:
        n_windows: Number of windows, > 0.
        batch_size: Windows of one optimiser step, > 0.
        steps: Number of optimiser steps.
        seed: Epoch e is shuffled by ``default_rng([seed, e])``.
        chain: int64 (W,), numbers of `chains`; given, whole chains are shuffled and the windows of one follow each
            other.
    """
    needed = steps * batch_size
    epochs = []
    for epoch in range(-(-needed // n_windows)):
        rng = np.random.default_rng([seed, epoch])
        if chain is None:
            epochs.append(rng.permutation(n_windows))
        else:
            place = rng.permutation(int(chain.max()) + 1)
            epochs.append(np.argsort(place[chain], kind="stable"))
    order = np.concatenate(epochs or [np.zeros(0, dtype=np.int64)])[:needed]
    return order.astype(np.int64).reshape(steps, batch_size)


class Examples:
    """Windows with everything that turns a few of them into a `Batch`.

    Args:
        windows: What is learned from.
        prompts: Histories to prompt ids.
        trie: Built from ``prompts.title_tokens``.
        weight: Weight of each title token in the loss, title after title, float (T,); None: 1. `along_titles`
            makes it from weights of nodes.
        zero_gain: bool (N,); whether the token into each node decides nothing.

    Raises:
        UserError: A trie of other titles, arrays of another size, or several targets in a window without the
            plain template.
    """

    def __init__(
        self,
        windows: Windows,
        prompts: Prompts,
        trie: Trie,
        weight: NDArray[Any] | None,
        zero_gain: NDArray[np.bool_],
    ) -> None:
        self.windows, self.prompts, self.trie = windows, prompts, trie
        before_T, offsets = trie.paths()
        after_T = _node_after(trie)
        title = prompts.title_tokens
        if not (np.array_equal(offsets, title.offsets) and np.array_equal(trie.token[after_T], title.values)):
            raise UserError(
                "wanted the trie of the prompts' titles, got another one; build both from one catalogue"
            )
        weight_T = np.ones(len(after_T)) if weight is None else weight
        sized = (
            ("weight", weight_T, len(after_T), "title tokens"),
            ("zero_gain", zero_gain, trie.n_nodes, "nodes"),
        )
        for name, array, size, what in sized:
            if array.shape != (size,):
                raise UserError(f"wanted {name} for {size} {what}, got an array of shape {array.shape}")
        self._check_windows()
        self._node_T = before_T.astype(np.int64)
        self._weight_T = weight_T.astype(np.float32)
        self._zero_T = zero_gain[after_T]

    def _check_windows(self) -> None:
        n_targets = self.windows.items.lengths - self.windows.n_context
        if n_targets.max(initial=0) > 1 and self.prompts.template != "plain":
            raise UserError(
                "windows with several targets need the plain template, got "
                f"{self.prompts.template!r}; use supervision = 'last'"
            )

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.windows)

    @cached_property
    def size(self) -> NDArray[np.int64]:
        """Tokens of the titles of each window, context included; int64 (W,)."""
        length = self.prompts.title_tokens.lengths[self.windows.items.values]
        return np.add.reduceat(length, self.windows.items.offsets[:-1])

    @cached_property
    def of_title(self) -> dict[str, NDArray[np.int64]]:
        """How many tokens of each title (I,) are ``tokens``, ``zero_gain``, ``positive_gain``, ``decisions``."""
        is_T = {
            "tokens": np.ones(len(self._zero_T), dtype=np.bool_),
            "zero_gain": self._zero_T,
            "positive_gain": ~self._zero_T,
            "decisions": self.trie.branching[self._node_T],
        }
        first = self.prompts.title_tokens.offsets[:-1]
        return {name: np.add.reduceat(is_t.astype(np.int64), first) for name, is_t in is_T.items()}

    def fingerprint(self) -> str:
        """Hex SHA-256 of all that batches depend on."""
        digest = hashlib.sha256((self.prompts.hash + self.trie.fingerprint()).encode())
        for array in (self.windows.items.values, self.windows.items.offsets, self.windows.n_context):
            digest.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
        digest.update(self._weight_T.astype("<f4").tobytes() + self._zero_T.tobytes())
        return digest.hexdigest()

    def batch(self, indices: Sequence[int] | Ints) -> Batch:
        """The ids of some windows and where their target tokens are.

        Args:
            indices: Window numbers (B,).
        """
        index_B = np.asarray(indices, dtype=np.int64)
        items, title = self.windows.items, self.prompts.title_tokens
        start_B, n_context_B = items.offsets[index_B], self.windows.n_context[index_B].astype(np.int64)
        prefixes = [
            self.prompts.encode(items.values[s : s + n].tolist())
            for s, n in zip(start_B, n_context_B, strict=True)
        ]
        prefix_B = np.array([len(p) for p in prefixes], dtype=np.int64)

        n_titles_B = items.offsets[index_B + 1] - start_B - n_context_B
        item_S = items.values[_ranges(start_B + n_context_B, n_titles_B).at]
        token_T = _ranges(title.offsets[item_S], title.lengths[item_S])
        row_T = np.repeat(np.arange(len(index_B)), n_titles_B)[token_T.row]
        n_tokens_B = np.bincount(row_T, minlength=len(index_B))
        place_T = _ranges(prefix_B, n_tokens_B).at

        length_B = prefix_B + n_tokens_B
        input_ids = np.zeros((len(index_B), int(length_B.max(initial=0))), dtype=np.int64)
        for row, prefix in enumerate(prefixes):
            input_ids[row, : len(prefix)] = prefix
        target = title.values[token_T.at].astype(np.int64)
        input_ids[row_T, place_T] = target
        return Batch(
            input_ids=input_ids,
            position=row_T * input_ids.shape[1] + place_T - 1,
            target=target,
            node=self._node_T[token_T.at],
            weight=self._weight_T[token_T.at],
            zero_gain=self._zero_T[token_T.at],
            n_tokens=int(length_B.sum()),
        )

    def alone(self, indices: Sequence[int] | Ints, prompt: Sequence[int]) -> Alone:
        """The target titles of some windows, each different one once, behind a prompt without history.

        Args:
            indices: Window numbers (B,), as for `batch`.
            prompt: Ids in front of every title, at least one.
        """
        index_B = np.asarray(indices, dtype=np.int64)
        items, title = self.windows.items, self.prompts.title_tokens
        first_B = items.offsets[index_B] + self.windows.n_context[index_B]
        item_S = items.values[_ranges(first_B, items.offsets[index_B + 1] - first_B).at]
        item_U, row_S = np.unique(item_S, return_inverse=True)
        ids_U, place_U = (
            _ranges(start, title.lengths[item_U]) for start in (title.offsets[item_U], 0 * item_U)
        )
        input_ids = np.zeros((len(item_U), len(prompt) + int(place_U.at.max(initial=-1)) + 1), dtype=np.int64)
        input_ids[:, : len(prompt)] = prompt
        input_ids[place_U.row, len(prompt) + place_U.at] = title.values[ids_U.at]
        length_S = title.lengths[item_S]
        place_T, token_T = _ranges(0 * item_S, length_S), _ranges(title.offsets[item_S], length_S).at
        position = row_S[place_T.row] * input_ids.shape[1] + len(prompt) + place_T.at - 1
        n_tokens = len(item_U) * len(prompt) + len(ids_U.at)
        return Alone(input_ids, position.astype(np.int64), self._node_T[token_T], n_tokens)

    def against(self, rejected: NDArray[np.int32]) -> Examples:
        """Each window once with its target and then once with each rejected title in its place.

        Args:
            rejected: Item indices (W, n); each window has one target.

        Returns:
            Examples of ``W * (1 + n)`` windows; window w is number ``w * (1 + n)``.
        """
        items, n = self.windows.items, rejected.shape[1]
        times = np.full(len(self.windows), 1 + n)
        start, length = (np.repeat(array, times) for array in (items.offsets[:-1], items.lengths))
        more = Ragged.windows(items.values, start, length)
        target = np.column_stack([items.values[items.offsets[1:] - 1], rejected])
        more.values[more.offsets[1:] - 1] = target.ravel()
        other = copy.copy(self)
        other.windows = Windows(more, np.repeat(self.windows.n_context, times))
        other.__dict__.pop("size", None)
        return other


def along_titles(trie: Trie, value_per_node: NDArray[Any]) -> NDArray[Any]:
    """A number per node (N,) as one per title token (T,), title after title: that of the node it leads into."""
    if value_per_node.shape != (trie.n_nodes,):
        raise UserError(
            f"wanted a value for each of {trie.n_nodes} nodes, got an array of shape {value_per_node.shape}"
        )
    return value_per_node[_node_after(trie)]


def _node_after(trie: Trie) -> NDArray[np.int32]:
    """The node that each title token leads into, (T,)."""
    before_T, offsets = trie.paths()
    after_T = np.append(before_T[1:], before_T[:1])
    after_T[offsets[1:] - 1] = trie.leaf
    return after_T


class _Flat(NamedTuple):
    """Several ranges end to end: ``at`` are their numbers, ``row`` the range that each is from."""

    at: NDArray[np.int64]
    row: NDArray[np.int64]


def _ranges(start: Ints, length: Ints) -> _Flat:
    row = np.repeat(np.arange(len(start)), length)
    shift = start - (np.cumsum(length) - length)
    return _Flat(np.arange(len(row)) + shift[row], row)


def _rows(rows: Ragged, index: Ints) -> Ragged:
    """Some rows of a ragged array, in the order of ``index``."""
    return Ragged.windows(rows.values, rows.offsets[index], rows.lengths[index])


def _with_target(split: Split) -> Ragged:
    """Each row's history with its target added."""
    values = np.insert(split.history.values, split.history.offsets[1:], split.target)
    return Ragged(values.astype(np.int32), split.history.offsets + np.arange(len(split.target) + 1))


def _tile(split: Split, rows: Ragged) -> Windows:
    """Cover each piece from its end, all pieces side by side."""
    code_R = _user_codes(split.user_id)
    order_R = np.lexsort((np.arange(len(code_R)), split.timestamp, code_R))  # a file may interleave its users
    rows, code_R = _rows(rows, order_R), code_R[order_R]
    history_R = rows.lengths - 1
    first = np.flatnonzero(~_continues(rows, code_R))
    row = np.append(first[1:], len(code_R)) - 1
    windows: list[tuple[Ints, Ints]] = []
    while len(row):
        height, h = row - first, history_R[row]
        left = height + history_R[first] - h  # interactions, but for the first, that are no target yet
        overlap = np.where(left > 0, np.maximum(h - height, 0), 0)
        windows.append((row, 1 + overlap))
        row, first = (row - np.minimum(h, height))[left > 0], first[left > 0]
    chosen, n_context = (np.concatenate([pair[i] for pair in windows]) for i in (0, 1))
    keep = history_R[chosen] > 0  # a first interaction has nothing before it to be predicted from
    chosen, n_context = chosen[keep], n_context[keep]
    by_row = np.argsort(chosen)
    return Windows(_rows(rows, chosen[by_row]), n_context[by_row].astype(np.int32))


def _user_codes(user_id: NDArray[Any]) -> NDArray[np.int64]:
    """A number per row, equal for rows of one user; a row without a user has its own."""
    known: dict[Any, int] = {}
    n = len(user_id)
    codes = (n + i if u is None else known.setdefault(u, len(known)) for i, u in enumerate(user_id))
    return np.fromiter(codes, dtype=np.int64, count=n)


def _continues(rows: Ragged, code_R: Ints) -> NDArray[np.bool_]:
    """Whether the history of each row is the end of the row before it, of the same user."""
    history_R = rows.lengths - 1
    result = np.zeros(len(code_R), dtype=np.bool_)
    fits = (code_R[1:] == code_R[:-1]) & (history_R[1:] > 0) & (history_R[1:] <= history_R[:-1] + 1)
    later = np.flatnonzero(fits) + 1
    ours = _ranges(rows.offsets[later], history_R[later])
    theirs = _ranges(rows.offsets[later] - history_R[later], history_R[later])  # it ends where ours begins
    differs = rows.values[ours.at] != rows.values[theirs.at]
    result[later] = np.bincount(ours.row, weights=differs, minlength=len(later)) == 0
    return result


def _fit(windows: Windows, prompts: Prompts) -> Windows:
    """Drop the oldest titles of windows whose prompt, that is all but the last title, is too long."""
    items = windows.items
    size = prompts.title_tokens.lengths[items.values]
    end = np.concatenate(([0], np.cumsum(size)))
    last = items.offsets[1:] - 1
    room = prompts.max_tokens - len(prompts.bos)
    # The first title of a window that may stay: titles first..last-1 take at most ``room`` tokens.
    first = np.minimum(np.searchsorted(end, end[last] - room, side="left"), last - 1)
    cut = np.maximum(first - items.offsets[:-1], 0)
    if not cut.any():
        return windows
    n_context = np.maximum(windows.n_context - cut, 1)
    kept = Ragged.windows(items.values, items.offsets[:-1] + cut, items.lengths - cut)
    fitted = Windows(kept, n_context.astype(np.int32))
    lost = int(windows.is_target.sum() - fitted.is_target.sum())
    note(
        f"{int((cut > 0).sum())} of {len(windows)} windows are longer than {prompts.max_tokens} tokens: "
        f"their oldest titles are dropped, {lost} of {int(windows.is_target.sum())} targets with them"
    )
    return fitted
