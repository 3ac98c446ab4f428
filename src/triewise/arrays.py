"""Arrays that several wings share: rows of different lengths, ranges end to end, padding.

Shape key: R rows, E values end to end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
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
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        return cls(np.array([value for row in rows for value in row], dtype=np.int32), offsets)

    @classmethod
    def windows(cls, values: Int32, start: Int64, length: Int64) -> Ragged:
        """Row i is ``values[start[i]:start[i] + length[i]]``; windows may overlap."""
        offsets = np.concatenate([[0], np.cumsum(length, dtype=np.int64)])
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
        offsets = np.concatenate([[0], np.cumsum(lists.list.len().to_numpy(), dtype=np.int64)])
        return cls(lists.explode().drop_nulls().cast(pl.Int32).to_numpy(writable=True), offsets)

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

    def part(self, start: int, stop: int) -> Ragged:
        """The rows from ``start`` to before ``stop``; a view."""
        offsets = self.offsets[start : stop + 1]
        return Ragged(self.values[offsets[0] : offsets[-1]], offsets - offsets[0])

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

    def __getitem__(self, row: int) -> Int32:
        row = range(len(self))[row]
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def __iter__(self) -> Iterator[Int32]:
        return (self[row] for row in range(len(self)))


Ints = NDArray[np.integer[Any]]


class Flat(NamedTuple):
    """Several ranges end to end: ``at`` are their numbers, ``row`` the range that each is from."""

    at: NDArray[np.int64]
    row: NDArray[np.int64]


def ranges(start: Ints, length: Ints) -> Flat:
    """Ranges ``start[i]`` to before ``start[i] + length[i]``, end to end."""
    row = np.repeat(np.arange(len(start)), length)
    shift = start - (np.cumsum(length) - length)
    return Flat(np.arange(len(row)) + shift[row], row)


def padded(rows: Ragged) -> NDArray[np.int32]:
    """Item indices as int32 (R, L) of ``item + 1``, padded on the right with 0."""
    length = rows.lengths
    ids = np.zeros((len(rows), int(length.max(initial=0))), dtype=np.int32)
    ids[np.arange(ids.shape[1]) < length[:, None]] = rows.values + 1
    return ids
