"""Arrays that several wings share: rows of different lengths, ranges and runs end to end, partial sorts, padding.

Shape key: R rows, E values end to end, L columns.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from triewise.errors import UserError

Int8 = NDArray[np.int8]
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Bool = NDArray[np.bool_]
Ints = NDArray[np.integer[Any]]
_TOGETHER = 1 << 14  # rows


@dataclass(frozen=True, eq=False)
class Ragged:
    """Rows of int32 of different lengths in two flat arrays.

    Attributes:
        values: All rows one after the other, int32 (E,).
        offsets: Row i is ``values[offsets[i]:offsets[i + 1]]``, int64 (R+1,).

    >>> Ragged.from_lists([[3, 1], [], [4]])[0]
    array([3, 1], dtype=int32)
    """

    values: Int32
    offsets: Int64

    @classmethod
    def from_lists(cls, rows: Sequence[Sequence[int]]) -> Ragged:
        """Pack lists of integers."""
        values = np.array([value for row in rows for value in row], dtype=np.int32)
        return cls(values, offsets_of([len(row) for row in rows]))

    @classmethod
    def windows(cls, values: Int32, start: Int64, length: Int64) -> Ragged:
        """Row i is ``values[start[i]:start[i] + length[i]]``; windows may overlap."""
        offsets = offsets_of(length)
        gathered = np.empty(offsets[-1], dtype=np.int32)
        for low in range(0, len(length), _TOGETHER):  # the places to gather from take twice the memory
            high = min(low + _TOGETHER, len(length))
            begin, end = offsets[low], offsets[high]
            place = np.repeat(start[low:high] - offsets[low:high], length[low:high])
            place += np.arange(begin, end)
            gathered[begin:end] = values[place]
        return cls(gathered, offsets)

    @classmethod
    def from_series(cls, lists: pl.Series) -> Ragged:
        """Rows of a polars List column."""
        values = lists.explode().drop_nulls().cast(pl.Int32).to_numpy(writable=True)
        return cls(values, offsets_of(lists.list.len().to_numpy()))

    def to_series(self) -> pl.Series:
        """The same rows as a polars column of type List(Int32)."""
        full = np.flatnonzero(self.lengths)
        row = np.repeat(np.arange(len(full), dtype=np.int32), self.lengths[full])
        pairs = pl.DataFrame({"row": row, "values": self.values}).with_columns(pl.col("row").set_sorted())
        lists = pairs.group_by("row", maintain_order=True).agg("values")["values"]
        if len(full) == len(self):
            return lists
        place = np.full(len(self), len(full))
        place[full] = np.arange(len(full))
        return lists.append(pl.Series([[]], dtype=pl.List(pl.Int32))).gather(place)

    @property
    def lengths(self) -> Int64:
        """Length of each row, int64 (R,)."""
        return np.diff(self.offsets)

    def take(self, rows: Int64) -> Ragged:
        """The rows with these numbers, in this order."""
        return Ragged.windows(self.values, self.offsets[rows], self.lengths[rows])

    def then(self, other: Ragged) -> Ragged:
        """These rows and after them those of ``other``."""
        offsets = np.concatenate([self.offsets, other.offsets[1:] + self.offsets[-1]])
        return Ragged(np.concatenate([self.values, other.values]), offsets)

    def last(self, n: int) -> Ragged:
        """The last ``n`` values of each row, or all where there are fewer."""
        length = np.minimum(self.lengths, n)
        return Ragged.windows(self.values, self.offsets[1:] - length, length)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, row: int) -> Int32: ...
    @overload
    def __getitem__(self, row: slice) -> Ragged: ...
    def __getitem__(self, row: int | slice) -> Int32 | Ragged:
        """The values of a row, or, of a slice, those rows; a view but where it has a step."""
        if isinstance(row, slice):
            rows = range(len(self))[row]
            if rows.step != 1:
                return self.take(np.array(rows, dtype=np.int64))
            offsets = self.offsets[rows.start : max(rows.start, rows.stop) + 1]
            return Ragged(self.values[offsets[0] : offsets[-1]], offsets - offsets[0])
        row = range(len(self))[row]
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def __iter__(self) -> Iterator[Int32]:
        return (self[row] for row in range(len(self)))


def offsets_of(length: ArrayLike) -> Int64:
    """Where rows of some lengths (R,) begin when they lie end to end, and the end of the last; int64 (R+1,)."""
    return np.concatenate([[0], np.cumsum(length, dtype=np.int64)])


def within(length: Ints) -> Int64:
    """Place of each value in its row, rows of some lengths (R,) end to end; int64 (E,).

    >>> within(np.array([2, 0, 3])).tolist()
    [0, 1, 0, 1, 2]
    """
    return ranges(np.zeros_like(length), length).at


class Flat(NamedTuple):
    """Several ranges end to end: ``at`` (E,) are their numbers, ``row`` (E,) the range that each is from."""

    at: Int64
    row: Int64


def ranges(start: Ints, length: Ints) -> Flat:
    """Ranges ``start[i]`` to before ``start[i] + length[i]``, end to end.

    >>> ranges(np.array([5, 9]), np.array([2, 1]))
    Flat(at=array([5, 6, 9]), row=array([0, 0, 1]))
    """
    row = np.repeat(np.arange(len(start)), length)
    shift = start - (np.cumsum(length) - length)
    return Flat(np.arange(len(row)) + shift[row], row)


def runs(key: Ints) -> Int64:
    """Where each run of equal keys (E,) >= 0 begins, and the end of the last; int64 (runs + 1,)."""
    return np.flatnonzero(np.diff(key, prepend=-1, append=-1))


def place_in_run(key: Ints) -> Int64:
    """Place of each entry among those with its key; keys (E,) ascend. int64 (E,)."""
    return np.arange(len(key)) - np.searchsorted(key, key)


def nth_largest(values: NDArray[Any], n: int) -> NDArray[Any]:
    """The ``n``-th largest value along the last axis, which has at least so many."""
    place = values.shape[-1] - n
    largest: NDArray[Any] = np.partition(values, place, axis=-1)[..., place]
    return largest


def among_best(key: Ints, values: NDArray[np.floating], n: int) -> Bool:
    """Which values (E,) are not below the ``n``-th best with their key; equal keys >= 0 lie together.

    Cheaper than an order; ties with the n-th stay in.

    >>> among_best(np.array([0, 0, 0, 1]), np.array([0.1, 0.5, 0.5, 0.0]), 1).tolist()
    [False, True, True, True]
    """
    near = np.ones(len(key), dtype=bool)
    for low, high in pairwise(runs(key).tolist()):
        if high - low > n:
            near[low:high] = values[low:high] >= nth_largest(values[low:high], n)
    return near


def memory_here(root: Path = Path("/")) -> float:
    """Bytes of memory that this process may have: the machine's, or less where a container or a job (cgroup) has less.

    Args:
        root: Where Linux shows ``proc`` and ``sys``.
    """
    limits = []
    with contextlib.suppress(AttributeError, ValueError, OSError):  # Windows does not say
        limits.append(float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")))
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            number, kinds, path = line.split(":", 2)
            if number != "0" and "memory" not in kinds.split(","):
                continue
            group = root / "sys/fs/cgroup" / ("" if number == "0" else "memory") / path.strip("/")
            file = "memory.max" if number == "0" else "memory.limit_in_bytes"
            for place in (group, *group.parents):  # a container may see its own group at the top only
                with contextlib.suppress(OSError, ValueError):  # "max": no limit
                    limits.append(float((place / file).read_text(encoding="ascii")))
    return min(limits, default=float(1 << 40))


def check_memory(n_bytes: float, what: str) -> None:
    """Refuse what this machine has no memory for, before it is tried.

    Raises:
        UserError: It has less; the line says how much of it ``what`` would take.
    """
    have = memory_here()
    if n_bytes > have:
        raise UserError(
            f"{what} would take at least {n_bytes / 1e9:.3g} GB, and this machine has {have / 1e9:.3g} GB; lower it"
        )


def blank_lists(n_users: int, k: int) -> tuple[Int32, Float32]:
    """Lists of ``k`` items (B, K) without any yet: -1, and scores of -inf; UserError where they have no room."""
    check_memory(8.0 * n_users * k, f"the best {k} items of {n_users} users")
    return np.full((n_users, k), -1, np.int32), np.full((n_users, k), -np.inf, np.float32)


def padded(rows: Ragged) -> Int32:
    """Item indices as int32 (R, L) of ``item + 1``, padded on the right with 0."""
    length = rows.lengths
    ids = np.zeros((len(rows), int(length.max(initial=0))), dtype=np.int32)
    ids[np.arange(ids.shape[1]) < length[:, None]] = rows.values + 1
    return ids
