"""Histories and targets: leave-one-out from interactions, and the published splits of MSL and D3 as they are.

Shape suffixes: R rows, I items.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from trierec.errors import UserError
from trierec.interactions import (
    ROW,
    Int32,
    Int64,
    Interactions,
    Titles,
    find_file,
    id_lists,
    integers,
    item_indices,
    json_titles,
    ordered_ids,
    read_rows,
    tab_titles,
)

NAMES = ("train", "valid", "test")


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
        return cls(values[np.repeat(start - offsets[:-1], length) + np.arange(offsets[-1])], offsets)

    @classmethod
    def from_series(cls, lists: pl.Series) -> Ragged:
        """Rows of a polars List column."""
        offsets = np.concatenate([[0], np.cumsum(lists.list.len().to_numpy(), dtype=np.int64)])
        return cls(lists.explode().drop_nulls().cast(pl.Int32).to_numpy(writable=True), offsets)

    def to_series(self) -> pl.Series:
        """The same rows as a polars column of type List(Int32)."""
        row = np.repeat(np.arange(len(self)), self.lengths)
        pairs = pl.DataFrame({"row": row, "values": self.values}).with_columns(pl.col("row").set_sorted())
        rows = pl.DataFrame({"row": np.arange(len(self))}).with_columns(pl.col("row").set_sorted())
        lists = rows.join(
            pairs.group_by("row", maintain_order=True).agg("values"),
            on="row",
            how="left",
            maintain_order="left",
        )
        return lists["values"].fill_null(pl.lit([], dtype=pl.List(pl.Int32)))

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

    def __getitem__(self, row: int) -> Int32:
        row = range(len(self))[row]
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def __iter__(self) -> Iterator[Int32]:
        return (self[row] for row in range(len(self)))


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
        columns = {
            "user_id": pl.Series(self.user_id.tolist(), dtype=pl.String),
            "history": self.history.to_series(),
            "target": pl.Series(self.target, dtype=pl.Int32),
            "timestamp": pl.Series(self.timestamp, dtype=pl.Int64),
        }
        return pl.DataFrame(columns | ({} if self.seen is None else {"seen": self.seen.to_series()}))

    @classmethod
    def from_frame(cls, frame: pl.DataFrame) -> Split:
        """The split that :meth:`to_frame` wrote."""
        return cls(
            user_id=np.array(frame["user_id"].to_list(), dtype=object),
            history=Ragged.from_series(frame["history"]),
            target=frame["target"].to_numpy(writable=True),
            timestamp=frame["timestamp"].to_numpy(writable=True),
            seen=Ragged.from_series(frame["seen"]) if "seen" in frame.columns else None,
        )

    def take(self, rows: Int64) -> Split:
        """The rows with these numbers, in this order."""
        return Split(
            user_id=self.user_id[rows],
            history=self.history.take(rows),
            target=self.target[rows],
            timestamp=self.timestamp[rows],
            seen=None if self.seen is None else self.seen.take(rows),
        )

    def then(self, other: Split) -> Split:
        """These rows and after them those of ``other``; without ``seen``, which training does not need."""
        return Split(
            user_id=np.concatenate([self.user_id, other.user_id]),
            history=self.history.then(other.history),
            target=np.concatenate([self.target, other.target]),
            timestamp=np.concatenate([self.timestamp, other.timestamp]),
        )


# --- leave-one-out ------------------------------------------------------------------------------------------


def leave_one_out(interactions: Interactions, max_history: int = 20) -> tuple[Split, Split, Split]:
    """Train, validation and test rows: a user's last item is for the test, the one before it for validation.

    Users are walked in (timestamp, raw item id) order. Training rows have every item from the second to the
    third last as target. A user with fewer than three interactions has training rows only.

    Args:
        interactions: Who met what when.
        max_history: A history is the last so many items before the target.

    Returns:
        Three splits. Those of validation and test also have ``seen``, all earlier items of the user.
    """
    raw_order = {item: place for place, item in enumerate(ordered_ids(interactions.item_id))}
    place = np.array([raw_order[item] for item in interactions.item_id], dtype=np.int64)
    order = np.lexsort((place[interactions.item], interactions.timestamp, interactions.user))
    user, item = interactions.user[order], interactions.item[order]
    timestamp = interactions.timestamp[order]
    count = np.bincount(user, minlength=len(interactions.user_id))
    first = np.cumsum(count) - count
    position = np.arange(len(user)) - first[user]
    left = count[user] - 1 - position  # how many of the user's items come after this one
    judged = count[user] >= 3
    user_id = np.array(interactions.user_id, dtype=object)

    def rows(chosen: NDArray[np.bool_], with_seen: bool) -> Split:
        end = np.flatnonzero(chosen)
        begin = first[user[end]]
        seen = Ragged.windows(item, begin, end - begin) if with_seen else None
        length = np.minimum(end - begin, max_history)
        history = Ragged.windows(item, end - length, length)
        return Split(user_id[user[end]], history, item[end], timestamp[end], seen)

    train = (position >= 1) & (~judged | (left >= 2))
    return rows(train, False), rows(judged & (left == 1), True), rows(judged & (left == 0), True)


# --- published splits ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Published:
    """A data set that its authors split; rows and titles are as in the files.

    Attributes:
        titles: The items.
        splits: ``train``, ``valid`` and ``test``.
        users: Number of users.
        interactions: Number of interactions behind the rows.
        repairs: What was left out or put right, and how often.
        notes: What a reader of the numbers should know.
        files: The files that were read.
    """

    titles: Titles
    splits: dict[str, Split]
    users: int
    interactions: int
    repairs: dict[str, int]
    notes: tuple[str, ...]
    files: tuple[Path, ...]


def read_msl(folder: Path) -> Published:
    """The files of MSL: ``id2name4Rec.json``, ``train.csv``, ``test.csv`` and, where it is, ``valid.csv``.

    The last id of ``item_ids`` is the target, those before it the history. Without ``valid.csv`` the last
    ninth of the training rows in file order, rounded, is the validation split: train to valid is 8 to 1.

    Raises:
        UserError: Missing file or column, broken cell, unknown id, no usable row.
    """
    titles = json_titles(find_file(folder, "id2name4Rec.json"))
    files = {name: find_file(folder, f"{name}.csv") for name in ("train", "test")}
    if any((folder / name).is_file() for name in ("valid.csv", "valid.csv.gz")):
        files["valid"] = find_file(folder, "valid.csv")
    repairs: dict[str, int] = dict(titles.repairs)
    splits = {name: _msl_rows(path, titles, repairs) for name, path in files.items()}
    users, interactions = _msl_counts([splits[name] for name in NAMES if name in splits])
    notes = []
    if "valid" not in files:
        all_rows = splits["train"].n_rows
        n_valid = round(all_rows / 9)
        train, valid = np.split(np.arange(all_rows), [all_rows - n_valid])
        splits["train"], splits["valid"] = splits["train"].take(train), splits["train"].take(valid)
        notes.append(
            f"no valid.csv: the last {n_valid:,} of the {all_rows:,} training rows in file order are the "
            "validation split; choose settings with them, then train on both"
        )
    return Published(
        titles, splits, users, interactions, repairs, tuple(notes), (titles.path, *files.values())
    )


def _msl_rows(path: Path, titles: Titles, repairs: dict[str, int]) -> Split:
    rows = read_rows(path, ["user_id", "item_ids", "timestamp"], repairs)
    ids, starts = id_lists(rows, "item_ids", path)
    length = np.diff(starts)
    if not length.all():
        raise UserError(
            f"{path}, row {rows[ROW][int(length.argmin())]}: wanted a target at the end of item_ids, got []; "
            "fill it in or drop the row"
        )
    items = item_indices(ids, titles.item_id, np.repeat(rows[ROW].to_numpy(), length), path, titles.path)
    split = Split(
        user_id=np.array(rows["user_id"].to_list(), dtype=object),
        history=Ragged.windows(items, starts[:-1], length - 1),
        target=items[starts[1:] - 1],
        timestamp=integers(rows, "timestamp", path),
    )
    return _with_history(split, path, repairs)


def _msl_counts(splits: list[Split]) -> tuple[int, int]:
    """Users and interactions: a user's first row has a history and a target, each further row a target."""
    user_id = np.concatenate([split.user_id for split in splits]).astype(str)
    length = np.concatenate([split.history.lengths for split in splits])
    users, first = np.unique(user_id, return_index=True)
    return len(users), int(length[first].sum() + len(user_id))


def read_d3(folder: Path) -> Published:
    """The files of D3: an info file (title, TAB, id) and a CSV for each of train, valid and test.

    Both layouts are read: ``info.txt`` beside ``train.csv``, and the original ``info/NAME.txt`` beside
    ``train/NAME.csv``. Only ``history_item_id`` and ``item_id`` are needed; ``user_id`` and ``timestamp`` are
    taken where they are.

    Raises:
        UserError: Missing file or column, more than one candidate, broken cell, unknown id, no usable row.
    """
    files = {name: _d3_file(folder, name) for name in NAMES}
    titles = tab_titles(_d3_info(folder, files["train"].name.split(".")[0]))
    repairs: dict[str, int] = dict(titles.repairs)
    splits = {name: _d3_rows(path, titles, repairs) for name, path in files.items()}
    notes = []
    rows = sum(split.n_rows for split in splits.values())
    known = [user for split in splits.values() for user in split.user_id.tolist()]
    if None not in known:
        users = len(set(known))
    else:
        users = sum(int((split.history.lengths == 1).sum()) for split in splits.values())
        notes.append("not every row names its user: users are counted by the rows whose history is one item")
    for name, split in splits.items():
        if (split.timestamp < 0).all():
            notes.append(f"{files[name].name} has no timestamps; its rows keep the order of the file")
    # Every prefix of a user's sequence is a row, so only the first item of a user is not the target of a row.
    return Published(
        titles, splits, users, rows + users, repairs, tuple(notes), (titles.path, *files.values())
    )


def _d3_rows(path: Path, titles: Titles, repairs: dict[str, int]) -> Split:
    rows = read_rows(path, ["history_item_id", "item_id"], repairs, optional=["user_id", "timestamp"])
    ids, starts = id_lists(rows, "history_item_id", path)
    number = rows[ROW].to_numpy()
    history = item_indices(ids, titles.item_id, np.repeat(number, np.diff(starts)), path, titles.path)
    target = item_indices(integers(rows, "item_id", path), titles.item_id, number, path, titles.path)
    users = rows["user_id"].to_list() if "user_id" in rows.columns else [None] * len(rows)
    times = (
        integers(rows, "timestamp", path)
        if "timestamp" in rows.columns
        else np.full(len(rows), -1, dtype=np.int64)
    )
    return _with_history(
        Split(np.array(users, dtype=object), Ragged(history, starts), target, times), path, repairs
    )


def _d3_file(folder: Path, name: str) -> Path:
    inner = sorted(path for path in (folder / name).glob("*") if path.name.endswith((".csv", ".csv.gz")))
    if not inner:
        return find_file(folder, f"{name}.csv")
    if len(inner) > 1:
        found = ", ".join(path.name for path in inner)
        raise UserError(
            f"wanted one CSV file in {folder / name}, found {found}; keep one data set in a folder"
        )
    return inner[0]


def _d3_info(folder: Path, stem: str) -> Path:
    found = sorted(path for place in (folder, folder / "info") for path in place.glob("*.txt"))
    by_name = [path for path in found if path.stem in ("info", stem)]
    if len(by_name) == 1 or len(found) == 1:
        return (by_name or found)[0]
    names = ", ".join(path.name for path in found) or "none"
    raise UserError(
        f"wanted an info file (title, TAB, id) in {folder}, found {names}; "
        f"name it info.txt or info/{stem}.txt"
    )


def _with_history(split: Split, path: Path, repairs: dict[str, int]) -> Split:
    """Leave out rows without any history, and count them."""
    chosen = split.history.lengths > 0
    if chosen.all():
        return split
    repairs["rows_without_history"] = repairs.get("rows_without_history", 0) + int((~chosen).sum())
    if not chosen.any():
        raise UserError(f"wanted rows with a history in {path}, found none; check the file")
    return split.take(np.flatnonzero(chosen))
