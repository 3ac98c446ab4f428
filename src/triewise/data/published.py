"""The published splits of MSL and D3, taken as they are: titles, histories and targets of their authors' files."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from triewise.arrays import Int32, Int64, Ragged, offsets_of
from triewise.data.splits import NAMES as NAMES, Split as Split
from triewise.data.tables import (
    ROW,
    counted,
    entries,
    find_file,
    integers,
    names,
    read_rows,
    read_text,
    refuse,
    seconds,
    shown,
)
from triewise.errors import UserError

_CODED = r"((?:<[^<>\s]+>)+)\t(.*)"  # code tokens, a TAB and the title
_UNNAMED = "not every row names its user: users are counted by the rows whose history is one item"
_LIST = r"^\s*\[\s*(?:-?[0-9]+\s*(?:,\s*-?[0-9]+\s*)*,?\s*)?\]\s*$"


@dataclass(frozen=True, eq=False)
class Published:
    """A data set that its authors split; rows and titles are as in the files.

    Attributes:
        titles: The items.
        splits: ``train``, ``valid`` and ``test``.
        users: Number of users.
        interactions: Number of interactions behind the rows.
        repairs: As in :class:`triewise.data.interactions.Interactions`, and so are the notes.
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
    files = msl_files(folder)
    repairs: dict[str, int] = dict(titles.repairs)
    splits = {name: _msl_rows(path, titles, repairs) for name, path in files.items()}
    read = (titles.path, *files.values())
    return of_rows(titles, splits, repairs, read, "valid.csv")


def of_rows(
    titles: Titles, splits: dict[str, Split], repairs: dict[str, int], files: tuple[Path, ...], valid: str
) -> Published:
    """Rows and the sizes of the data; without a file named ``valid`` the last ninth of train are validation rows."""
    # A user's first row has a history and a target, each further row a target.
    known = [splits[name] for name in NAMES if name in splits]
    user_id = np.concatenate([split.user_id for split in known]).astype(str)
    users, first = np.unique(user_id, return_index=True)
    length = np.concatenate([split.history.lengths for split in known])
    n_users, interactions = len(users), int(length[first].sum() + len(user_id))
    notes = []
    if any(user is None for split in known for user in split.user_id):
        n_users = int((length == 1).sum())
        interactions = n_users + len(user_id)
        notes.append(_UNNAMED)
    if "valid" not in splits:
        rows, all_rows = splits["train"], splits["train"].n_rows
        n_valid = round(all_rows / 9)
        n_train = all_rows - n_valid
        splits["train"], splits["valid"] = rows.part(0, n_train), rows.part(n_train, all_rows)
        notes.append(
            f"no {valid}: the last {n_valid:,} of the {all_rows:,} training rows in file order are the "
            "validation split; choose settings with them, then train on both"
        )
    return Published(titles, splits, n_users, interactions, repairs, tuple(notes), files)


def split_of_texts(
    rows: pl.DataFrame, times: Int64, titles: Titles, path: Path, repairs: dict[str, int]
) -> Split:
    """Rows of raw ids as a split.

    Args:
        rows: ``user`` and ``target`` are texts, ``history`` lists of texts; R rows.
        times: Unix seconds, int64 (R,).
        titles: The items.
        path: The file.
        repairs: Counts ``rows_without_history``, which are left out.

    Raises:
        UserError: An id without a title, or no row with a history; names the row.
    """
    length = rows["history"].list.len().to_numpy().astype(np.int64)
    number = np.arange(1, len(rows) + 1)
    history, target = (
        _of_texts(ids, titles, row, path)
        for ids, row in (
            (rows["history"].explode().drop_nulls(), np.repeat(number, length)),
            (rows["target"], number),
        )
    )
    users = np.array(rows["user"].to_list(), dtype=object)
    return _with_history(Split(users, Ragged(history, offsets_of(length)), target, times), path, repairs)


def _of_texts(ids: pl.Series, titles: Titles, row: Int64, path: Path) -> Int32:
    known = pl.Enum(titles.item_id.tolist())
    found = ids.cast(known, strict=False).to_physical().cast(pl.Int32)
    if found.null_count():
        unknown = found.is_null().to_numpy()
        first = int(unknown.argmax())
        raise UserError(
            f"{path}, row {row[first]}: wanted item ids that {titles.path.name} has a title for, got "
            f"{shown(ids[first])} ({unknown.sum()} such ids in the file); add its title or drop the row"
        )
    return found.to_numpy()


def msl_files(folder: Path) -> dict[str, Path]:
    """The rows of MSL by the name of their split."""
    files = {name: find_file(folder, f"{name}.csv") for name in ("train", "test")}
    if any((folder / name).is_file() for name in ("valid.csv", "valid.csv.gz")):
        files["valid"] = find_file(folder, "valid.csv")
    return files


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
        timestamp=seconds(rows, "timestamp", path, repairs),
    )
    return _with_history(split, path, repairs)


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
        notes.append(_UNNAMED)
    for name, split in splits.items():
        if (split.timestamp < 0).all():
            notes.append(f"{files[name].name} has no timestamps; its rows keep the order of the file")
        if files[name].name.startswith(f"{name}_") and files[name].parent == folder:
            notes.append(f"there is no {name}.csv: the {name} rows are those of {files[name].name}")
    # Every prefix of a user's sequence is a row, so only the first item of a user is not the target of a row.
    read = (titles.path, *files.values())
    return Published(titles, splits, users, rows + users, repairs, tuple(notes), read)


def _d3_rows(path: Path, titles: Titles, repairs: dict[str, int]) -> Split:
    rows = read_rows(path, ["history_item_id", "item_id"], repairs, ["user_id", "timestamp"], ["item_title"])
    ids, starts = id_lists(rows, "history_item_id", path)
    number = rows[ROW].to_numpy()
    history = item_indices(ids, titles.item_id, np.repeat(number, np.diff(starts)), path, titles.path)
    target = item_indices(integers(rows, "item_id", path), titles.item_id, number, path, titles.path)
    users = rows["user_id"].to_list() if "user_id" in rows.columns else [None] * len(rows)
    timed = "timestamp" in rows.columns
    times = seconds(rows, "timestamp", path, repairs) if timed else np.full(len(rows), -1, dtype=np.int64)
    _compare_titles(rows, target, path, titles, repairs)
    split = Split(np.array(users, dtype=object), Ragged(history, starts), target, times)
    return _with_history(split, path, repairs)


def _compare_titles(
    rows: pl.DataFrame, target: Int32, path: Path, titles: Titles, repairs: dict[str, int]
) -> None:
    """Count rows that call their item otherwise than the info file does; where all do, one of the two is wrong."""
    if "item_title" not in rows.columns:
        return
    known = pl.Series(titles.title, dtype=pl.String).str.strip_chars().gather(target)
    said = rows["item_title"].str.strip_chars()
    other = (said != known) & (said != "")
    counted(repairs, "rows_of_other_titles", other.sum())
    if other.sum() and other.sum() == (said != "").sum():
        raise UserError(
            f"{path}: wanted the titles of {titles.path.name} in column item_title, got {shown(said[0])} for "
            f"{shown(known[0])}; take both files from one data set"
        )


def _d3_file(folder: Path, name: str) -> Path:
    inner = sorted(path for path in (folder / name).glob("*") if path.name.endswith((".csv", ".csv.gz")))
    if not inner:
        like = [path for path in entries(folder) if path.name.startswith(f"{name}_")]
        whole = any((folder / f"{name}.csv{end}").is_file() for end in ("", ".gz"))
        return like[0] if len(like) == 1 and not whole else find_file(folder, f"{name}.csv")
    if len(inner) > 1:
        raise UserError(
            f"wanted one CSV file in {folder / name}, found {names(inner)}; keep one data set in a folder"
        )
    return inner[0]


def _d3_info(folder: Path, stem: str) -> Path:
    texts = sorted(path for place in (folder, folder / "info") for path in place.glob("*.txt"))
    by_name = [path for path in texts if path.stem in ("info", stem)]
    if len(by_name) == 1 or len(texts) == 1:
        return (by_name or texts)[0]
    raise UserError(
        f"wanted an info file (title, TAB, id) in {folder}, found {names(texts)}; "
        f"name it info.txt or info/{stem}.txt"
    )


def _with_history(split: Split, path: Path, repairs: dict[str, int]) -> Split:
    """Leave out rows without any history, and count them."""
    chosen = split.history.lengths > 0
    counted(repairs, "rows_without_history", (~chosen).sum())
    if not chosen.any():
        raise UserError(f"wanted rows with a history in {path}, found none; check the file")
    return split if chosen.all() else split.take(np.flatnonzero(chosen))


def id_lists(rows: pl.DataFrame, column: str, path: Path) -> tuple[Int64, Int64]:
    """A column of lists such as ``[3, 14]``: all ids in one array (E,), and where each row starts, (R+1,)."""
    refuse(rows, ~rows[column].str.contains(_LIST), column, path, "a list of ids such as [3, 14]")
    lists = rows[column].str.extract_all(r"-?[0-9]+")
    starts = offsets_of(lists.list.len().to_numpy())
    values = lists.explode().drop_nulls().cast(pl.Int64, strict=False)
    if values.null_count():
        row = np.searchsorted(starts, values.is_null().arg_true()[0], side="right") - 1
        raise UserError(
            f"{path}, row {rows[ROW][int(row)]}: wanted ids of at most 18 digits in column {column}, "
            "got a longer one; repair the list"
        )
    return values.to_numpy(), starts


def item_indices(ids: Int64, known: Int64, row: Int64, path: Path, titles: Path) -> Int32:
    """Indices of raw ids (E,) among those of the items (I,), which ascend.

    Raises:
        UserError: If an id is not among them; tells its ``row`` (E,), its file, and the file that names the items.
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


@dataclass(frozen=True, eq=False)
class Titles:
    """The items that a published data set names, in the order of their ids.

    Attributes:
        path: The file.
        item_id: Raw ids (I,), ascending: int64, or of RecBole texts in the order of `interactions.ordered_ids`.
        title: Their titles, as they stand in the file.
        repairs: ``empty_titles`` (kept as they are) and ``missing_titles`` (null or NaN, made empty).
        codes: Their semantic ids, where the file names them (MiniOneRec), else nothing.
    """

    path: Path
    item_id: NDArray[Any]
    title: tuple[str, ...]
    repairs: dict[str, int]
    codes: tuple[str, ...] = ()


def json_titles(path: Path) -> Titles:
    """Titles of an ``id2name4Rec.json`` of MSL: an object from id to title.

    Raises:
        UserError: Not UTF-8, not a JSON object, an id that is no integer or occurs twice, a title that is no text.
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
    """Titles of a D3 info file: a title, a TAB and its id on each line; MiniOneRec has codes and a TAB before them.

    A title may contain TABs itself; the id is behind the last one. Only where every line begins with code tokens
    such as ``<a_7><b_0>`` are these taken for codes.

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
                f"{path}, line {number}: wanted a title, a TAB and an id, got {shown(line)}; repair the line"
            )
    coded = [re.fullmatch(_CODED, title, re.DOTALL) for _, title, _ in rows]
    if not all(coded):
        return _titles(path, rows)
    parts = [match.groups() for match in coded if match]
    titles = _titles(
        path, [(key, title, where) for (key, _, where), (_, title) in zip(rows, parts, strict=True)]
    )
    code_of = {int(key): code for (key, _, _), (code, _) in zip(rows, parts, strict=True)}
    return replace(titles, codes=tuple(code_of[item] for item in titles.item_id.tolist()))


def _titles(path: Path, rows: list[tuple[str, Any, str]]) -> Titles:
    """Check ids and titles; ``rows`` are (id, title, where it stands)."""
    if not rows:
        raise UserError(f"wanted titles in {path}, found none; download it again")
    title_of: dict[int, str] = {}
    repairs: dict[str, int] = {}
    for key, title, where in rows:
        if not re.fullmatch(r"[0-9]{1,18}", key):
            raise UserError(
                f"{path}, {where}: wanted an id that is a whole number, got {shown(key)}; repair it"
            )
        if int(key) in title_of:
            raise UserError(
                f"{path}, {where}: wanted each id once, got {int(key)} again; drop one of the two"
            )
        if title is None or (isinstance(title, float) and math.isnan(title)):
            counted(repairs, "missing_titles", 1)
            title = ""
        elif not isinstance(title, str) or any(0xD800 <= ord(letter) <= 0xDFFF for letter in title):
            raise UserError(
                f"{path}, {where}: wanted a title that is text, got {shown(title)}; put it in quotes"
            )
        elif not title:
            counted(repairs, "empty_titles", 1)
        title_of[int(key)] = title
    known = sorted(title_of)
    return Titles(path, np.array(known, dtype=np.int64), tuple(title_of[key] for key in known), repairs)
