"""Raw files to arrays: user, item, time. Everything that can be wrong with a file is said here, in one line.

Users and items are numbered in the order of their raw ids, compared as integers when all of them are. Within
a user the order is (timestamp, raw item id), everywhere: many events share a time stamp, and a split must not
depend on the order of rows in a file.

Cells of published files are untrusted text. They are matched against a pattern and never evaluated; a title
such as ``None`` or ``NA`` is a title.
"""

from __future__ import annotations

import codecs
import gzip
import json
import math
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from trierec.errors import UserError
from trierec.fetch import INTERACTIONS, TITLES, fetch

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]

ROW = "row number"  # column with the number of a data row: the first row after the header is 1
_LIST = r"^\s*\[\s*(?:-?[0-9]+\s*(?:,\s*-?[0-9]+\s*)*,?\s*)?\]\s*$"
_INTEGER = r"^\s*-?[0-9]+(?:\.0*)?\s*$"
_CHUNK = 1 << 24  # bytes


@dataclass(frozen=True, eq=False)
class Interactions:
    """Who met what when; R interactions of U users with I items.

    Attributes:
        user: User index, int32 (R,), ascending.
        item: Item index, int32 (R,); within a user by (timestamp, raw item id).
        timestamp: Unix seconds, int64 (R,).
        user_id: Raw id of each user, U strings.
        item_id: Raw id of each item, I strings.
        title: Title of each item, I strings.
        repairs: What was left out or put right, and how often.
    """

    user: Int32 = field(repr=False)
    item: Int32 = field(repr=False)
    timestamp: Int64 = field(repr=False)
    user_id: tuple[str, ...] = field(repr=False)
    item_id: tuple[str, ...] = field(repr=False)
    title: tuple[str, ...] = field(repr=False)
    repairs: dict[str, int]

    @classmethod
    def from_frame(cls, events: pl.DataFrame, title: Mapping[str, str]) -> Interactions:
        """Number users and items and sort.

        Args:
            events: Columns ``user`` and ``item`` (strings) and ``timestamp`` (Unix seconds), in any order.
            title: Title of each raw item id; those of items that do not occur are left out and counted.

        Raises:
            UserError: If an item has no title.
        """
        user_id, item_id = (ordered_ids(events[name].unique().to_list()) for name in ("user", "item"))
        untitled = [item for item in item_id if item not in title]
        if untitled:
            raise UserError(
                f"wanted a title for each item, {len(untitled)} have none, first {untitled[0]!r}; add them"
            )
        columns = [
            pl.col("user").cast(pl.Enum(user_id)).to_physical().cast(pl.Int32),
            pl.col("item").cast(pl.Enum(item_id)).to_physical().cast(pl.Int32),
            pl.col("timestamp").cast(pl.Int64),
        ]
        rows = events.select(columns).sort("user", "timestamp", "item")
        unused = len(title) - len(item_id)
        return cls(
            user=rows["user"].to_numpy(writable=True),
            item=rows["item"].to_numpy(writable=True),
            timestamp=rows["timestamp"].to_numpy(writable=True),
            user_id=tuple(user_id),
            item_id=tuple(item_id),
            title=tuple(title[item] for item in item_id),
            repairs={"titles_without_interactions": unused} if unused else {},
        )


def movielens(name: str) -> Interactions:
    """The ratings of ``"ml-100k"`` or ``"ml-1m"`` as interactions; every rating counts, whatever its value.

    Raises:
        UserError: If the data cannot be had; see :func:`trierec.fetch.fetch`.
    """
    folder = fetch(name)
    schema = {"user": pl.String, "item": pl.String, "timestamp": pl.Int64, "rating": pl.Int64}
    events = pl.read_csv(folder / INTERACTIONS, separator="\t", quote_char=None, schema=schema)
    lines = (folder / TITLES).read_text(encoding="utf-8").split("\n")[1:-1]
    return Interactions.from_frame(events, dict(line.split("\t") for line in lines))


def ordered_ids(ids: Iterable[str]) -> list[str]:
    """Raw ids in their order: as integers when all of them are, else as text.

    >>> ordered_ids(["10", "9"]), ordered_ids(["10", "9", "b"])
    (['9', '10'], ['10', '9', 'b'])
    """
    known = list(ids)
    if all(re.fullmatch(r"-?[0-9]+", text) for text in known):
        return sorted(known, key=lambda text: (int(text), text))
    return sorted(known)


# --- files --------------------------------------------------------------------------------------------------


def find_file(folder: Path, name: str) -> Path:
    """The file ``name`` or ``name.gz`` in ``folder``."""
    if not folder.is_dir():
        state = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"wanted the folder {folder}, which {state}; check the path")
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
    raise UserError(f"wanted the file {name} in {folder}, found {there}; add it")


def read_text(path: Path) -> str:
    """The whole text of a UTF-8 file, plain or gzip."""
    check_text(path)
    with _open(path) as handle:
        return handle.read().decode("utf-8-sig")


def check_text(path: Path) -> None:
    """Raise one clear line unless ``path`` is readable, not empty and UTF-8; gzip is unpacked on the way."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    done = line = 0
    try:
        with _open(path) as handle:
            while chunk := handle.read(_CHUNK):
                decoder.decode(chunk)
                line += chunk.count(b"\n")
                done += len(chunk)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        line += error.object[: error.start].count(b"\n") + 1
        raise UserError(
            f"wanted UTF-8 text in {path}, got the byte 0x{error.object[error.start]:02x} in line {line}; "
            "save the file as UTF-8"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}; copy or download it again") from None
    if not done:
        raise UserError(f"wanted rows in {path}, which is empty; copy or download it again")


def read_rows(
    path: Path, columns: Sequence[str], repairs: dict[str, int], optional: Sequence[str] = ()
) -> pl.DataFrame:
    """Some columns of a CSV file as text, with the number of each row.

    Args:
        path: A comma-separated UTF-8 file with a header, plain or gzip.
        columns: Names that must be there; a row in which one of them is empty is an error.
        repairs: Rows without any of the columns (blank lines) are left out and counted here, ``blank_rows``.
        optional: Names that may be there.

    Returns:
        :data:`ROW` and the columns found, all of type String.

    Raises:
        UserError: Unreadable file, other encoding, missing column, broken row, empty cell, no row at all.
    """
    check_text(path)
    source = _unpacked(path)
    try:
        header = pl.read_csv(source, n_rows=0, infer_schema=False).columns
        missing = [name for name in columns if name not in header]
        if missing:
            raise UserError(
                f"wanted the column {missing[0]} in {path}, found {', '.join(header)}; rename or add it"
            )
        wanted = [name for name in header if name in columns or name in optional]
        rows = pl.read_csv(source, columns=wanted, infer_schema=False, row_index_name=ROW, row_index_offset=1)
    except pl.exceptions.PolarsError as error:
        raise UserError(
            f"cannot read {path} as CSV: {' '.join(str(error).split())[:200]}; repair or download it again"
        ) from None
    blank = rows.select(pl.all_horizontal(pl.col(wanted).is_null())).to_series()
    if blank.any():
        repairs["blank_rows"] = repairs.get("blank_rows", 0) + int(blank.sum())
        rows = rows.filter(~blank)
    if rows.is_empty():
        raise UserError(f"wanted rows in {path}, found only a header; copy or download it again")
    for name in wanted:
        empty = rows.filter(pl.col(name).is_null() | (pl.col(name) == ""))
        if not empty.is_empty():
            raise UserError(
                f"{path}, row {empty[ROW][0]}: wanted a value in column {name}, got an empty cell; fill it in"
            )
    return rows


def integers(rows: pl.DataFrame, column: str, path: Path) -> Int64:
    """A column of whole numbers, int64 (R,)."""
    text = pl.col(column).str.strip_chars().str.replace(r"\.0*$", "")
    values = rows.select(
        pl.when(pl.col(column).str.contains(_INTEGER)).then(text).cast(pl.Int64, strict=False)
    ).to_series()
    _refuse(rows, values.is_null(), column, path, "a whole number")
    return values.to_numpy(writable=True)


def id_lists(rows: pl.DataFrame, column: str, path: Path) -> tuple[Int64, Int64]:
    """A column of lists such as ``[3, 14]``: all ids in one array (E,), and where each row starts, (R+1,)."""
    _refuse(rows, ~rows[column].str.contains(_LIST), column, path, "a list of ids such as [3, 14]")
    lists = rows[column].str.extract_all(r"-?[0-9]+")
    starts = np.concatenate([[0], np.cumsum(lists.list.len().to_numpy(), dtype=np.int64)])
    values = lists.explode().drop_nulls().cast(pl.Int64, strict=False)
    if values.null_count():
        row = np.searchsorted(starts, values.is_null().arg_true()[0], side="right") - 1
        raise UserError(
            f"{path}, row {rows[ROW][int(row)]}: wanted ids of at most 18 digits in column {column}, "
            "got a longer one; repair the list"
        )
    return values.to_numpy(), starts


def item_indices(ids: Int64, known: Int64, row: Int64, path: Path, titles: Path) -> Int32:
    """Indices of raw ids.

    Args:
        ids: Raw ids, (E,).
        known: Raw id of each item, ascending, (I,).
        row: Number of the row that each id stands in, (E,); for the message.
        path: File of the ids; for the message.
        titles: File that names the items; for the message.

    Raises:
        UserError: If an id is not among the known ones.
    """
    index = np.minimum(np.searchsorted(known, ids), len(known) - 1)
    unknown = np.flatnonzero(known[index] != ids)
    if len(unknown):
        first = unknown[0]
        raise UserError(
            f"{path}, row {row[first]}: wanted item ids that {titles.name} names, got {ids[first]} "
            f"({len(unknown)} such ids in the file); add its title or drop the row"
        )
    return index.astype(np.int32)


def _refuse(rows: pl.DataFrame, bad: pl.Series, column: str, path: Path, wanted: str) -> None:
    if bad.any():
        first = int(bad.arg_true()[0])
        got = _shown(rows[column][first])
        raise UserError(
            f"{path}, row {rows[ROW][first]}: wanted {wanted} in column {column}, got {got}; repair the cell"
        )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 70 else f"{text[:67]}..."


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as handle:
        return path.suffix == ".gz" or handle.read(2) == b"\x1f\x8b"


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if _is_gzip(path) else path.open("rb")  # type: ignore[return-value]


def _unpacked(path: Path) -> Path | bytes:
    if not _is_gzip(path):
        return path
    with _open(path) as handle:
        return handle.read()


# --- titles -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Titles:
    """The items that a published data set names, in the order of their ids.

    Attributes:
        path: The file.
        item_id: Raw ids, int64 (I,), ascending.
        title: Their titles, as they stand in the file.
        repairs: ``empty_titles`` (kept as they are) and ``missing_titles`` (null or NaN, made empty).
    """

    path: Path
    item_id: Int64
    title: tuple[str, ...]
    repairs: dict[str, int]


def json_titles(path: Path) -> Titles:
    """Titles of an ``id2name4Rec.json`` of MSL: an object from id to title.

    Raises:
        UserError: Not UTF-8 JSON, not an object, an id that is no integer or occurs twice, a title that is no
            text.
    """
    try:
        pairs = json.loads(read_text(path), object_pairs_hook=list)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"wanted JSON in {path}, got {error}; download it again") from None
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
        raise UserError(
            f'wanted an object such as {{"1": "a title"}} in {path}, got something else; check the file'
        )
    return _titles(path, [(key, value, f"id {key!r}") for key, value in pairs])


def tab_titles(path: Path) -> Titles:
    """Titles of a D3 info file: a title, a TAB and its id on each line.

    A title may contain TABs itself; the id is behind the last one.

    Raises:
        UserError: Not UTF-8, a line without TAB, an id that is no integer or occurs twice.
    """
    lines = read_text(path).split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        title, tab, key = line.rpartition("\t")
        if tab:
            rows.append((key.strip(), title, f"line {number}"))
        elif line.strip():
            raise UserError(
                f"{path}, line {number}: wanted a title, a TAB and an id, got {_shown(line)}; repair the line"
            )
    return _titles(path, rows)


def _titles(path: Path, rows: list[tuple[str, Any, str]]) -> Titles:
    """Check ids and titles; ``rows`` are (id, title, where it stands)."""
    if not rows:
        raise UserError(f"wanted titles in {path}, found none; download it again")
    title_of: dict[int, str] = {}
    repairs: dict[str, int] = {}
    for key, title, where in rows:
        if not re.fullmatch(r"[0-9]{1,18}", key):
            raise UserError(
                f"{path}, {where}: wanted an id that is a whole number, got {_shown(key)}; repair it"
            )
        if int(key) in title_of:
            raise UserError(
                f"{path}, {where}: wanted each id once, got {int(key)} again; drop one of the two"
            )
        if title is None or (isinstance(title, float) and math.isnan(title)):
            repairs["missing_titles"] = repairs.get("missing_titles", 0) + 1
            title = ""
        elif not isinstance(title, str) or not _is_text(title):
            raise UserError(
                f"{path}, {where}: wanted a title that is text, got {_shown(title)}; put it in quotes"
            )
        elif not title:
            repairs["empty_titles"] = repairs.get("empty_titles", 0) + 1
        title_of[int(key)] = title
    known = sorted(title_of)
    return Titles(path, np.array(known, dtype=np.int64), tuple(title_of[key] for key in known), repairs)


def _is_text(title: str) -> bool:
    return not any(0xD800 <= ord(letter) <= 0xDFFF for letter in title)
