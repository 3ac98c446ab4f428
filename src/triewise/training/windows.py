"""Windows of one user's items: what is learned from, and in which order.

Some leading items of a window are context, the titles of the rest are targets. Supervision ``last`` (the papers')
has one target per row; ``every`` makes each title after the first a target of the same sequence and tiles every
user's items with as few windows as it can.

Shape key: W windows, I items, R rows of a split.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from triewise.arrays import Ragged, ranges
from triewise.errors import UserError
from triewise.progress import note

if TYPE_CHECKING:
    from triewise.data import Split
    from triewise.tokens import Prompts

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
        UserError: Unknown supervision, or no window with a target.
    """
    if supervision not in ("last", "every"):
        raise UserError(f"wanted supervision 'last' or 'every', got {supervision!r}")
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


def batch_order(
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
    ours = ranges(rows.offsets[later], history_R[later])
    theirs = ranges(rows.offsets[later] - history_R[later], history_R[later])  # it ends where ours begins
    differs = rows.values[ours.at] != rows.values[theirs.at]
    result[later] = np.bincount(ours.row, weights=differs, minlength=len(later)) == 0
    return result


def _fit(windows: Windows, prompts: Prompts) -> Windows:
    """Drop the oldest titles of windows whose prompt, that is all but the last title, is too long."""
    items = windows.items
    size = prompts.title_tokens.lengths[items.values] + (prompts.slots is not None)
    end = np.concatenate(([0], np.cumsum(size)))
    last = items.offsets[1:] - 1
    room = prompts.max_tokens - len(prompts.head)
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
