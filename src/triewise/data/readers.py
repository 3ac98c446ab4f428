"""Raw data in the shapes people have it: MovieLens folders, RecBole atomic files, CSV or Parquet tables.

Every reader gives the same thing: interactions in the order of the file and a title for each item. Sorting,
duplicates, k-core and splits are the same for all of them and come later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from triewise.data.interactions import Events, ordered_ids
from triewise.data.movielens_files import CITATION, film_titles, movies_dat, u_item
from triewise.data.tables import (
    ROW,
    Table,
    counted,
    entries,
    find_file,
    names,
    open_table,
    read_bytes,
    read_rows,
    refuse,
    shown,
)
from triewise.errors import UserError
from triewise.progress import note

if TYPE_CHECKING:
    from triewise.arrays import Int64

# Names of columns, in small letters: those of csv:DIR, and of the files it is mostly made from.
USER = ("user", "user_id", "userid", "reviewerid")
ITEM = ("item", "item_id", "itemid", "movieid", "asin")
TIME = ("timestamp", "time", "ts", "unixreviewtime")
TITLE = ("title", "item_title", "movie_title", "item_name", "name")
_RATING = ("user", "item", "rating", "timestamp")
_TABLES = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet")
_LARGE = 1 << 26  # bytes; reading more than this takes long enough to say so
_MILLISECONDS = 1e11  # larger times are not seconds, which would be after the year 5000


@dataclass(frozen=True, eq=False)
class Raw:
    """What a source holds, before anything is sorted or left out.

    Attributes:
        events: The interactions in the order of the file.
        title: Title of each raw item id.
        files: The files that were read.
        repairs: As in :class:`triewise.data.interactions.Interactions`, and so are the notes.
        title_rows: Titles as the metadata have them, where a pipeline may choose: ``item`` and ``title``, null where
            there is none.
    """

    events: Events
    title: dict[str, str] = field(repr=False)
    files: tuple[Path, ...]
    repairs: dict[str, int]
    notes: tuple[str, ...] = ()
    title_rows: pl.DataFrame | None = field(default=None, repr=False)


def movielens_folder(folder: Path) -> Raw:
    """An unpacked MovieLens release, recognised by its files; every rating is an interaction.

    ``u.data`` and ``u.item`` (100K), ``ratings.dat`` and ``movies.dat`` (1M, 10M), or ``ratings.csv`` and
    ``movies.csv`` (20M, 25M, 32M, latest). Titles are as in the canonical tables of :mod:`triewise.data.fetch`.

    Raises:
        UserError: None of the pairs is there, or a file is broken.
    """
    note(CITATION)
    there = {path.name.removesuffix(".gz") for path in entries(folder)}
    if "u.data" in there:
        return _films(folder, ("u.data", "u.item"), u_item, "\t", _RATING)
    if "ratings.dat" in there:
        # The double colon is read as a colon with an empty column behind it.
        double = [name for column in _RATING for name in (column, "")][:-1]
        return _films(folder, ("ratings.dat", "movies.dat"), movies_dat, ":", double)
    if "ratings.csv" not in there:
        raise UserError(
            f"wanted u.data and u.item, ratings.dat and movies.dat, or ratings.csv and movies.csv in {folder}, "
            f"found {names(entries(folder))}; give the unpacked folder of a MovieLens release"
        )
    ratings, movies = find_file(folder, "ratings.csv"), find_file(folder, "movies.csv")
    repairs: dict[str, int] = {}
    films = read_rows(movies, ["movieId", "title"], repairs)
    title = _film_titles(lambda: film_titles(films.select("movieId", "title").iter_rows()), movies, repairs)
    events = read_events(open_table(ratings), "userId", "movieId", "timestamp", repairs)
    return Raw(events, title, (ratings, movies), repairs)


def _films(
    folder: Path,
    pair: tuple[str, str],
    read: Callable[[bytes], pl.DataFrame],
    sep: str,
    header: Sequence[str],
) -> Raw:
    """A release without headers; ``pair`` names its ratings and its films."""
    ratings, films = (find_file(folder, name) for name in pair)
    repairs: dict[str, int] = {}
    title = _film_titles(lambda: read(read_bytes(films)), films, repairs)
    table = open_table(ratings, separator=sep, quote=None, header=header)
    return Raw(read_events(table, "user", "item", "timestamp", repairs), title, (ratings, films), repairs)


def _film_titles(read: Callable[[], pl.DataFrame], path: Path, repairs: dict[str, int]) -> dict[str, str]:
    try:
        films = read()
    except (ValueError, IndexError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"wanted a number and a title in each row of {path}, got: {error}; download it again"
        ) from None
    return _one_title_each(zip(films["item"].cast(pl.String), films["title"], strict=True), path, repairs)


def recbole(folder: Path) -> Raw:
    """RecBole's atomic files ``NAME.inter`` and ``NAME.item``: tabs, and a header of ``name:type``.

    The interactions need ``user_id``, ``item_id`` and a time; the items ``item_id`` and a title, found by its
    name (:data:`TITLE`). Ratings are not used.

    Raises:
        UserError: Missing or ambiguous file or column, or a broken row.
    """
    inters = [path for path in entries(folder) if path.name.removesuffix(".gz").endswith(".inter")]
    if len(inters) != 1:
        raise UserError(
            f"wanted one file NAME.inter in {folder}, found {names(inters)}; keep one data set in a folder"
        )
    inter = inters[0]
    item = find_file(folder, inter.name.removesuffix(".gz").removesuffix(".inter") + ".item")
    return _tables(_atomic(inter), _atomic(item))


def _atomic(path: Path) -> Table:
    """A table without the types in its header."""
    table = open_table(path, separator="\t", quote=None)
    bare = {column: column.partition(":")[0] for column in table.columns}
    if len(set(bare.values())) < len(bare):
        raise UserError(f"wanted each column once in {path}, found {', '.join(bare)}; rename one of the two")
    columns = {bare[column]: kind for column, kind in table.columns.items()}
    return Table(path, table.kind, table.rows.rename(bare), columns)


def csv_folder(folder: Path) -> Raw:
    """Two tables found by their columns: interactions (user, item, timestamp) and a catalogue (item, title).

    Files may be CSV or TSV, plain or gzip, or Parquet; names of files do not matter, further columns neither.
    Names of columns: :data:`USER`, :data:`ITEM`, :data:`TIME`, :data:`TITLE`, in any case.

    Raises:
        UserError: Missing or ambiguous table or column, or a broken row.
    """
    tables = [
        open_table(path, separator="\t" if path.name.removesuffix(".gz").endswith(".tsv") else ",")
        for path in entries(folder)
        if path.is_file() and path.name.endswith(_TABLES)
    ]
    events = _one_table(folder, [t for t in tables if t.named(USER)], "user, item and timestamp")
    titles = _one_table(folder, [t for t in tables if not t.named(USER) and t.named(TITLE)], "item and title")
    return _tables(events, titles)


def _tables(events: Table, titles: Table) -> Raw:
    """Two tables whose columns are found by their names."""
    repairs: dict[str, int] = {}
    title = read_titles(titles, titles.one(ITEM, "item"), titles.one(TITLE, "title"), repairs)
    columns = events.one(USER, "user"), events.one(ITEM, "item"), events.one(TIME, "time")
    return Raw(read_events(events, *columns, repairs), title, (events.path, titles.path), repairs)


def _one_table(folder: Path, tables: list[Table], columns: str) -> Table:
    if len(tables) == 1:
        return tables[0]
    there = names([table.path for table in tables] or entries(folder))
    raise UserError(
        f"wanted one table (.csv, .csv.gz, .tsv, .tsv.gz or .parquet) with the columns {columns} in {folder}, "
        f"found {there}; keep one of each in a folder"
    )


def read_events(table: Table, user: str, item: str, time: str, repairs: dict[str, int]) -> Events:
    """Three columns of a table as numbers, in the order of the file.

    Args:
        table: The table.
        user: Column of raw user ids.
        item: Column of raw item ids.
        time: Column of Unix seconds or milliseconds, or of dates; see :meth:`triewise.data.tables.Table.seconds`.
        repairs: Counts ``blank_rows`` (left out), ``milliseconds`` (divided by 1000) and
            ``fractions_of_a_second`` (cut off).

    Raises:
        UserError: Unreadable file, an empty or a strange cell; names the row.
    """
    if table.path.stat().st_size > _LARGE:
        note(f"reading {table.path.name}")
    table.check(user, item, time)
    cells = {"user": table.ids(user), "item": table.ids(item)}
    ids = [ordered_ids(table.collect(cell.unique())[:, 0].drop_nulls().to_list()) for cell in cells.values()]
    coded = (
        cell.cast(pl.Enum(known)).to_physical().cast(pl.Int32).alias(name)
        for (name, cell), known in zip(cells.items(), ids, strict=True)
    )
    rows = table.collect(*coded, table.seconds(time).alias("time")).with_row_index(ROW, offset=1)
    blank = rows["user"].is_null() & rows["item"].is_null() & rows["time"].is_null()
    counted(repairs, "blank_rows", blank.sum())
    rows = rows.filter(~blank) if blank.any() else rows  # a table may be large
    for name, column in (("user", user), ("item", item)):
        refuse(rows, rows[name].is_null(), column, table.path)
    seconds = _whole_seconds(table, time, rows, repairs)
    return Events(rows["user"].to_numpy(), rows["item"].to_numpy(), seconds, tuple(ids[0]), tuple(ids[1]))


def _whole_seconds(table: Table, column: str, rows: pl.DataFrame, repairs: dict[str, int]) -> Int64:
    """Whole Unix seconds, int64 (R,), from numbers that may be milliseconds or have fractions."""
    time = rows["time"].fill_null(np.nan).to_numpy(writable=True)
    large = time > _MILLISECONDS
    fractions = ~large & np.isfinite(time) & (time != np.floor(time))
    time[large] /= 1000
    bad = ~((time >= 0) & (time <= _MILLISECONDS))
    if bad.any():
        row = int(rows[ROW][int(bad.argmax())])
        table.refuse(column, row, "Unix seconds or an ISO date such as 2020-12-31T23:59:59Z")
    counted(repairs, "milliseconds", large.sum())
    counted(repairs, "fractions_of_a_second", fractions.sum())
    return time.astype(np.int64)


def read_titles(table: Table, item: str, title: str, repairs: dict[str, int]) -> dict[str, str]:
    """Title of each raw item id.

    Rows whose title is empty are left out and counted (``catalogue_rows_without_title``): whether that matters
    shows when it is known which items occur. So are rows that say the same again (``catalogue_rows_repeated``).

    Raises:
        UserError: Unreadable file, a title without item, two different titles for an item; names the row.
    """
    table.check(item, title)
    if table.columns[title] not in (pl.String, pl.Categorical, pl.Enum):
        raise UserError(
            f"wanted text in column {title} of {table.path}, got {table.columns[title]}; store titles as text"
        )
    rows = table.collect(table.ids(item).alias("item"), pl.col(title).cast(pl.String).alias("title"))
    rows = rows.with_row_index(ROW, offset=1)
    untitled = rows["title"].is_null() | (rows["title"].str.strip_chars() == "")
    blank = untitled & rows["item"].is_null()
    counted(repairs, "blank_rows", blank.sum())
    counted(repairs, "catalogue_rows_without_title", (untitled & ~blank).sum())
    rows = rows.filter(~untitled)
    refuse(rows, rows["item"].is_null(), item, table.path)
    return _one_title_each(zip(rows["item"], rows["title"], strict=True), table.path, repairs)


def _one_title_each(pairs: Iterable[tuple[str, str]], path: Path, repairs: dict[str, int]) -> dict[str, str]:
    title_of: dict[str, str] = {}
    n_rows = 0
    for n_rows, (item, title) in enumerate(pairs, start=1):  # noqa: B007
        if title_of.setdefault(item, title) != title:
            raise UserError(
                f"{path}: wanted one title for each item, got {shown(title_of[item])} and {shown(title)} for "
                f"{item!r}; drop one of the two rows"
            )
    counted(repairs, "catalogue_rows_repeated", n_rows - len(title_of))
    if not title_of:
        raise UserError(f"wanted titles in {path}, found none; copy or download it again")
    return title_of
