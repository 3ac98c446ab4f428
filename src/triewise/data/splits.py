"""Histories and targets: leave-one-out, sliding windows and growing histories of interactions.

Shape suffixes: R rows, I items, U users.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from triewise.arrays import Int32, Int64, Ragged
from triewise.data.times import seconds_of

if TYPE_CHECKING:
    from triewise.data.interactions import Interactions
    from triewise.settings import DataSettings

NAMES = ("train", "valid", "test")
WAYS = ("leave-one-out", "time-windows", "time-growing", "dates")


@dataclass(frozen=True, eq=False)
class Split:
    """Histories with the item that came next; R rows.

    Attributes:
        user_id: Raw id of the user, objects (R,), each a string or None where it is not known.
        history: Item indices, oldest first; none of them came after the target.
        target: Item index, int32 (R,).
        timestamp: Time of the target in Unix seconds, int64 (R,); -1 where it is not known.
        seen: Everything the user had before the target; None where only the history is known.
    """

    user_id: NDArray[Any] = field(repr=False)
    history: Ragged = field(repr=False)
    target: Int32 = field(repr=False)
    timestamp: Int64 = field(repr=False)
    seen: Ragged | None = field(default=None, repr=False)

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.target)

    def to_frame(self) -> pl.DataFrame:
        """Columns user_id, history, target, timestamp and, when known, seen."""
        return _frame(pl.Series(self.user_id.tolist(), dtype=pl.String), self)

    @classmethod
    def from_frame(cls, frame: pl.DataFrame) -> Split:
        """The split that :meth:`to_frame` wrote."""
        return cls(
            user_id=_shared(frame["user_id"]),
            history=Ragged.from_series(frame["history"]),
            target=frame["target"].to_numpy(writable=True),
            timestamp=frame["timestamp"].to_numpy(writable=True),
            seen=Ragged.from_series(frame["seen"]) if "seen" in frame.columns else None,
        )

    def part(self, start: int, stop: int) -> Split:
        """The rows from ``start`` to before ``stop``; views."""
        return self._picked(slice(start, stop), lambda rows: rows[start:stop])

    def frame(self, start: int, stop: int) -> pl.DataFrame:
        """The rows from ``start`` to before ``stop``, as :meth:`to_frame` gives them."""
        return self.part(start, stop).to_frame()

    def take(self, rows: Int64) -> Split:
        """The rows with these numbers, in this order."""
        return self._picked(rows, lambda ragged: ragged.take(rows))

    def _picked(self, rows: slice | Int64, pick: Callable[[Ragged], Ragged]) -> Split:
        seen = None if self.seen is None else pick(self.seen)
        return Split(self.user_id[rows], pick(self.history), self.target[rows], self.timestamp[rows], seen)

    def then(self, other: Split) -> Split:
        """These rows and after them those of ``other``; without ``seen``, which training does not need."""
        return Split(
            user_id=np.concatenate([self.user_id, other.user_id]),
            history=self.history.then(other.history),
            target=np.concatenate([self.target, other.target]),
            timestamp=np.concatenate([self.timestamp, other.timestamp]),
        )


def _frame(user_id: pl.Series, rows: Split) -> pl.DataFrame:
    columns = {
        "user_id": user_id,
        "history": rows.history.to_series(),
        "target": pl.Series(rows.target, dtype=pl.Int32),
        "timestamp": pl.Series(rows.timestamp, dtype=pl.Int64),
    }
    return pl.DataFrame(columns | ({} if rows.seen is None else {"seen": rows.seen.to_series()}))


def _shared(column: pl.Series) -> NDArray[Any]:
    """A column of strings as objects, each different string once in memory."""
    known = column.drop_nulls().unique()
    code = column.cast(pl.Enum(known)).to_physical().cast(pl.Int64).fill_null(len(known))
    return np.array([*known.to_list(), None], dtype=object).take(code.to_numpy())


@dataclass(frozen=True, eq=False)
class LazySplit:
    """A split of many rows: the places of its targets; histories are spelled out a part at a time.

    Attributes:
        interactions: Where the rows come from, sorted.
        place: Place of each row's target among the interactions, (R,).
        max_history: A history is the last so many items before the target.
        with_seen: Whether the rows also have ``seen``, all earlier items of the user.
        first: Place of the first interaction of each user, int64 (U,).
        user_id: Raw id of each user, objects (U,).
    """

    interactions: Interactions
    place: Int32 | Int64 = field(repr=False)
    max_history: int
    with_seen: bool
    first: Int64 = field(repr=False)
    user_id: NDArray[Any] = field(repr=False)

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.place)

    @property
    def target(self) -> Int32:
        """Item index, int32 (R,)."""
        return self.interactions.item[self.place]

    @property
    def timestamp(self) -> Int64:
        """Time of the target in Unix seconds, int64 (R,)."""
        return self.interactions.timestamp[self.place]

    def part(self, start: int, stop: int) -> Split:
        """The rows from ``start`` to before ``stop``, spelled out."""
        place = self.place[start:stop].astype(np.int64)
        user, item = self.interactions.user[place], self.interactions.item
        earlier = place - self.first[user]
        length = np.minimum(earlier, self.max_history)
        return Split(
            user_id=self.user_id[user],
            history=Ragged.windows(item, place - length, length),
            target=item[place],
            timestamp=self.interactions.timestamp[place],
            seen=Ragged.windows(item, place - earlier, earlier) if self.with_seen else None,
        )

    def frame(self, start: int, stop: int) -> pl.DataFrame:
        """The same rows as :meth:`Split.to_frame` gives them."""
        user = self.interactions.user[self.place[start:stop]]
        return _frame(pl.Series(self.user_id, dtype=pl.String).gather(user), self.part(start, stop))


def lazy_splits(
    interactions: Interactions, way: str, max_history: int = 20, choices: DataSettings | None = None
) -> tuple[LazySplit, ...]:
    """Train, validation and test rows, by the places of their targets.

    * ``leave-one-out``: a user's last item is for the test, the one before it for validation, the items from the
      second to the third last are the targets of training rows. A user with fewer than three interactions has
      training rows only. Rows of validation and test also have ``seen``, all earlier items of the user.
    * ``time-windows``: a user with n interactions (numbered from 0) gives a row for each target
      i = min(H, n - 1) .. n - 1, whose history is the H items before it: n - H full windows, or one row with
      everything before the last item where n <= H; a user with one interaction gives none. Rows are sorted by the
      target's time over all users; rows of the same time keep the order (user, time, item). The first floor(0.8 R) are
      for training, those up to floor(0.9 R) for validation, the rest for the test. There is no ``seen``: over all rows
      it would grow with the square of what a user did.
    * ``time-growing``: the same, but every item of a user from the second on is the target of a row, and its history
      the last H items before it: n - 1 rows for n interactions.
    * ``dates``: the same rows; targets before ``valid_from`` are for training, from ``test_from`` on for the test.

    Where the source itself says of interactions that they are train, valid or test, each that has a history is the
    target of a row there, unless another way than leave-one-out is asked for.

    Args:
        interactions: Who met what when; walked in (timestamp, raw item id) order.
        way: One of :data:`WAYS`.
        max_history: H; a history is the last so many items before the target (papers: 10).
        choices: ``min_history``, ``valid_from`` and ``test_from`` are taken from there.

    Source: windows are the data of BIGRec and MSL (arXiv:2504.04178), growing histories those of D3 and IGD. *Differs
    from the authors' code*: items of a user with equal times are ordered by raw id, not by their place in the file.
    """
    interactions = interactions.in_order()
    first, user = interactions.first, interactions.user
    count = np.diff(first, append=len(user))
    position = np.arange(len(user)) - first[user]
    least = 1 if choices is None else choices.min_history
    if way == "leave-one-out" and interactions.part is not None:
        parts = _own_parts(interactions, np.flatnonzero(position >= least))
    elif way == "leave-one-out":
        left = count[user] - 1 - position  # how many of the user's items come after this one
        judged = count[user] >= 3
        train = (position >= 1) & (~judged | (left >= 2))
        long = position >= least
        parts = [np.flatnonzero(rows & long) for rows in (train, judged & (left == 1), judged & (left == 0))]
    else:
        shortest = np.minimum(count - 1, max_history) if way == "time-windows" else np.ones_like(count)
        place = _by_time(interactions, np.flatnonzero(position >= np.maximum(shortest, least)[user]))
        borders = [8 * len(place) // 10, 9 * len(place) // 10]
        if way == "dates" and choices is not None:
            days = [seconds_of(str(choices.valid_from)), seconds_of(str(choices.test_from))]
            borders = np.searchsorted(interactions.timestamp[place], days).tolist()
        parts = np.split(place, borders)
    user_id = np.array(interactions.user_id, dtype=object)
    if len(user) <= 2**31:
        parts = [part.astype(np.int32) for part in parts]  # half the memory
    return tuple(
        LazySplit(interactions, part, max_history, way == WAYS[0] and name != "train", first, user_id)
        for name, part in zip(NAMES, parts, strict=True)
    )


def _by_time(interactions: Interactions, place: Int64) -> Int64:
    """Places by time over all users; those of the same time keep their order."""
    if interactions.nanosecond is None:
        return place[np.argsort(interactions.timestamp[place], kind="stable")]
    return place[np.lexsort((interactions.nanosecond[place], interactions.timestamp[place]))]


def _own_parts(interactions: Interactions, place: Int64) -> list[Int64]:
    """Places by the split that the source names; without validation rows the last ninth of training is taken."""
    part = np.asarray(interactions.part)[place]
    train, valid, test = (place[part == number] for number in range(3))
    if not len(valid):
        by_time = _by_time(interactions, train)
        n_train = len(train) - round(len(train) / 9)
        train, valid = np.sort(by_time[:n_train]), np.sort(by_time[n_train:])
    return [train, valid, test]


def first_rows(split: Split, n: int | None) -> Split:
    """The first ``n`` rows of a split (all for None)."""
    return split if n is None or n >= split.n_rows else split.take(np.arange(n))
