"""Raw data in the shapes people have it: MovieLens folders, CSV or Parquet tables.

Every reader gives the same thing: interactions in the order of the file and a title for each item. Sorting,
duplicates, k-core and splits are the same for all of them and come later.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from triewise.data.columns import (
    chosen,
    columns_of,
    folded as folded,
    part_of as part_of,
    parts_of as parts_of,
    the_column as the_column,
)
from triewise.data.interactions import PLAIN as PLAIN, Events, ordered_ids as ordered_ids
from triewise.data.movielens_files import CITATION, film_titles, movies_dat, u_item
from triewise.data.picking import catalogue_among, interactions_among
from triewise.data.tables import (
    PACKED,
    PART,
    ROW,
    Outline,
    Table,
    bare_name,
    counted,
    entries,
    find_file,
    joined,
    load,
    names,
    open_table,
    outline,
    read_bytes,
    read_rows,
    shown,
)
from triewise.data.times import Times, seconds_of
from triewise.errors import UserError
from triewise.progress import note

if TYPE_CHECKING:
    from triewise.arrays import Bool, Int64
    from triewise.settings import DataSettings

_RATING = ("user", "item", "rating", "timestamp")
_TEXTS = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".ndjson")
_PARQUET = (".parquet", ".pq")
_OURS = ("dataset.json", "run.json", "recommender.json")  # prepared data, runs, recommenders
_ENDS = (*_TEXTS, *_PARQUET)
_HIDDEN = (".", "_", "~")
_LARGE = 1 << 26  # bytes; reading more than this takes long enough to say so


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


def movielens_folder(folder: Path, choices: DataSettings = PLAIN) -> Raw:
    """An unpacked MovieLens release, recognised by its files; every rating is an interaction.

    ``u.data`` and ``u.item`` (100K), ``ratings.dat`` and ``movies.dat`` (1M, 10M), or ``ratings.csv`` and
    ``movies.csv`` (20M, 25M, 32M, latest). Titles are as in the canonical tables of :mod:`triewise.data.fetch`.

    Raises:
        UserError: None of the pairs is there, or a file is broken.
    """
    note(CITATION)
    there = {bare_name(path) for path in entries(folder)}
    if "u.data" in there:
        return _films(folder, ("u.data", "u.item"), u_item, "\t", _RATING, choices)
    if "ratings.dat" in there:
        # The double colon is read as a colon with an empty column behind it.
        double = [name for column in _RATING for name in (column, "")][:-1]
        return _films(folder, ("ratings.dat", "movies.dat"), movies_dat, ":", double, choices)
    if "ratings.csv" not in there:
        raise UserError(
            f"wanted u.data and u.item, ratings.dat and movies.dat, or ratings.csv and movies.csv in {folder}, "
            f"found {names(entries(folder))}; give the unpacked folder of a MovieLens release"
        )
    ratings, movies = find_file(folder, "ratings.csv"), find_file(folder, "movies.csv")
    repairs: dict[str, int] = {}
    films = read_rows(movies, ["movieId", "title"], repairs)
    pairs = films.select("movieId", "title").iter_rows()
    title = _film_titles(lambda: film_titles(pairs), movies, repairs, choices)
    table = open_table(ratings)
    events = read_events(table, "userId", "movieId", "timestamp", repairs, choices, rating="rating")
    return Raw(events, title, (ratings, movies), repairs)


def _films(
    folder: Path,
    pair: tuple[str, str],
    read: Callable[[bytes], pl.DataFrame],
    sep: str,
    header: Sequence[str],
    choices: DataSettings,
) -> Raw:
    """A release without headers; ``pair`` names its ratings and its films."""
    ratings, films = (find_file(folder, name) for name in pair)
    repairs: dict[str, int] = {}
    title = _film_titles(lambda: read(read_bytes(films)), films, repairs, choices)
    table = open_table(ratings, separator=sep, quote=None, header=header)
    events = read_events(table, "user", "item", "timestamp", repairs, choices, rating="rating")
    return Raw(events, title, (ratings, films), repairs)


def _film_titles(
    read: Callable[[], pl.DataFrame], path: Path, repairs: dict[str, int], choices: DataSettings
) -> dict[str, str]:
    try:
        films = read()
    except (ValueError, IndexError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"wanted a number and a title in each row of {path}, got: {error}; download it again"
        ) from None
    said = films.lazy().select(pl.col("item").cast(pl.String), "title").with_row_index(ROW, offset=1)
    return _one_title_each(_counted_titles(said).collect(), path, repairs, choices.second_titles)


def csv_folder(folder: Path, choices: DataSettings = PLAIN) -> Raw:
    """Tables found by their columns: interactions (user, item, time) and a catalogue (item, title).

    Files may be text with separators, JSON (lines) or Parquet, packed or not; folders of Parquet files, and of
    numbered text files (``part-0000.csv``), are one table.
    Names of files do not matter, further columns neither, and files that have none of the columns are left aside.
    Several tables of interactions with the same columns are one; named train, valid and test they are the splits.
    Where no table is a catalogue, that of the interactions may hold the title. Names of columns:
    `triewise.data.columns`, or as the settings say.

    Raises:
        UserError: Missing or ambiguous table or column, or a broken row.
    """
    events, titles, aside = _csv_tables(folder, choices)
    drop = dropped(choices)
    paths = [made.path for made in events]
    table = joined(folder, [_loaded(made, drop) for made in events], parts_of(paths))
    raw = of_tables(table, table if titles in events else _loaded(titles, drop), choices, drop)
    notes = [f"interactions are read from {names(paths)}, not from {names(aside)}"] * bool(aside)
    if table.parts:
        how = "as its splits" if parts_of(paths)[0] is not None else "as one table"
        notes.append(f"interactions are read from {names(paths)} {how}")
    return replace(raw, notes=(*notes, *raw.notes))


def csv_files(folder: Path, choices: DataSettings) -> list[Path]:
    """The files that `csv_folder` would read."""
    events, titles, _ = _csv_tables(folder, choices)
    return [file for made in (*events, titles) for file in _files(made.path)]


def _csv_tables(folder: Path, choices: DataSettings) -> tuple[list[Outline], Outline, list[Path]]:
    """The tables of interactions, that of titles, and other tables of interactions that are left aside.

    Folders of numbered text files are looked at only where the other tables are not enough.
    """
    found, failures = _outlines(folder)
    users = [made for made in found if chosen(made.columns, "user", choices.user_column)]

    def among(tables: list[Outline]) -> tuple[list[Outline], Outline]:
        of_users = [made for made in tables if made in users]
        others = [made for made in tables if made not in users]
        events = interactions_among(folder, tables, of_users, failures, choices)
        return events, catalogue_among(folder, others, events, failures, choices)

    try:
        events, titles = among([made for made in found if not made.shards])
    except UserError:
        events, titles = among(found)
    aside = [
        made.path
        for made in users
        if made not in events and chosen(made.columns, "item", choices.item_column)
    ]
    return events, titles, aside


def _loaded(made: Outline, drop: dict[str, int] | None) -> Table:
    """The table of an outline, or of all shards in a folder; folders such as ``year=2020`` in it are a column."""
    if not made.shards:
        return load(made, drop=drop)
    tables = []
    for shard in made.shards:
        table = load(shard, drop=drop)
        more = _hive(made.path, shard.path)
        rows = table.rows.with_columns(pl.lit(value).alias(key) for key, value in more.items())
        tables.append(replace(table, rows=rows, columns=table.columns | dict.fromkeys(more, pl.String())))
    return joined(made.path, tables, [None] * len(tables))


def _hive(folder: Path, shard: Path) -> dict[str, str]:
    return dict(part.split("=", 1) for part in shard.relative_to(folder).parts[:-1] if "=" in part)


def _shards(folder: Path) -> Outline | None:
    """Text files in a folder that are one table: numbered, and named alike before the number; None where it has none.

    Raises:
        UserError: If the columns of two of them differ; those of JSON lines may.
    """
    files = [file for file in _files(folder) if bare_name(file).endswith(_TEXTS)]
    named = {re.split("[0-9]", bare_name(file))[0] for file in files}
    if len(named) != 1 or not all(re.search("[0-9]", bare_name(file)) for file in files):
        return None
    shards = [outline(file) for file in files]
    columns = tuple(dict.fromkeys(name for shard in shards for name in shard.columns))
    for shard in shards:
        if shard.kind == "CSV" and {*map(folded, columns)} != {*map(folded, shard.columns)}:
            raise UserError(
                f"wanted the columns {', '.join(shards[0].columns)} of {files[0].name} in every file of {folder}, "
                f"found {', '.join(shard.columns)} in {shard.path.name}; make them alike, or keep one table in a folder"
            )
    shards = [shard if shard.kind == "CSV" else replace(shard, columns=columns) for shard in shards]
    columns = (*shards[0].columns, *_hive(folder, files[0]))
    return replace(shards[0], path=folder, columns=columns, shards=tuple(shards))


def dropped(choices: DataSettings) -> dict[str, int] | None:
    """Where rows that cannot be read are counted; None where they are errors."""
    return {} if choices.bad_rows == "drop" else None


def visible(folder: Path) -> list[Path]:
    """What is in a folder and not hidden."""
    return [path for path in entries(folder) if not path.name.startswith(_HIDDEN)]


def _outlines(folder: Path) -> tuple[list[Outline], list[UserError]]:
    """Outlines of all that may be a table, and what was wrong with those that cannot be read."""
    found, failures = [], []
    for path in visible(folder):
        name = bare_name(path)
        if (
            not path.is_dir()
            and not name.endswith(_ENDS)
            and not (path.name.lower().endswith(PACKED) and "." not in name)
        ):
            continue
        inside = list(path.rglob("*")) if path.is_dir() else []
        if any(file.name in _OURS for file in inside):
            continue  # what was made of this folder before
        try:
            texts = path.is_dir() and not any(bare_name(file).endswith(_PARQUET) for file in inside)
            made = _shards(path) if texts else outline(path)
            found += [] if made is None else [made]
        except UserError as error:
            failures.append(error)
    return found, failures


def of_tables(events: Table, titles: Table, choices: DataSettings, drop: dict[str, int] | None = None) -> Raw:
    """Tables whose columns are found by their names."""
    repairs: dict[str, int] = dict(drop or {})
    item_of_title, text = (
        the_column(list(titles.columns), role, wish, titles.path)
        for role, wish in (("item", choices.item_column), ("title", choices.title_column))
    )
    title = read_titles(titles, item_of_title, text, repairs, choices, of_events=titles is events)
    columns = columns_of(list(events.columns), events.path, choices)
    notes = [*events.notes, *(() if titles is events else titles.notes)]
    if columns.time is None:
        notes.append("there are no times: the events of a user are in the order of the file")
    if columns.rating and choices.min_rating is None:
        notes.append(
            f"the column {columns.rating} is not used: every row counts, whatever its value; --min-rating leaves out "
            "low ones"
        )
    user, item, time, rating, event = columns
    found = read_events(events, user, item, time, repairs, choices, rating=rating, event=event)
    if columns.event and not choices.events:
        kinds = events.frame(
            events.rows.group_by(columns.event).len().sort("len", columns.event, descending=True)
        )
        said = ", ".join(f"{kind} ({n:,})" for kind, n in kinds.head(5).iter_rows())
        notes.append(
            f"the column {columns.event} is not used: every row counts; --events chooses among {said}"
        )
    files = [part.path for part in events.parts or (events,)] + [titles.path] * (titles is not events)
    return Raw(found, title, tuple(file for path in files for file in _files(path)), repairs, tuple(notes))


def _files(path: Path) -> list[Path]:
    """The file, or those in the folder that are not hidden."""
    there = path.rglob("*") if path.is_dir() else [path]
    return sorted(file for file in there if file.is_file() and not file.name.startswith(_HIDDEN))


def read_events(
    table: Table,
    user: str,
    item: str,
    time: str | None,
    repairs: dict[str, int],
    choices: DataSettings = PLAIN,
    *,
    rating: str | None = None,
    event: str | None = None,
) -> Events:
    """Columns of a table as numbers, in the order of the file.

    Args:
        table: The table.
        user: Column of raw user ids.
        item: Column of raw item ids.
        time: Column of times, see :mod:`triewise.data.times`; None where there is none, and all times are -1.
        repairs: Counts ``blank_rows``, ``bad_rows`` and unwanted rows, which are left out, times in other units than
            seconds, and ``fractions_of_a_second`` (cut off once rows are in order).
        choices: ``bad_rows``, ``min_rating``, ``events``, ``since`` and ``until`` are taken from there.
        rating: Column of ratings, for ``min_rating``.
        event: Column of kinds of events, for ``events``.

    Raises:
        UserError: Unreadable file, an empty or a strange cell; names the row.
    """
    if sum(path.stat().st_size for path in _files(table.path)) > _LARGE:
        note(f"reading {table.path.name}")
    table.check(user, item, *filter(None, [time]))
    cells = {"user": table.ids(user), "item": table.ids(item)}
    ids = [ordered_ids(table.collect(cell.unique())[:, 0].drop_nulls().to_list()) for cell in cells.values()]
    wanted = [
        cell.cast(pl.Enum(known)).to_physical().cast(pl.Int32).alias(name)
        for (name, cell), known in zip(cells.items(), ids, strict=True)
    ]
    wanted += [pl.col(PART)] * (PART in table.rows.collect_schema().names())
    if rating is not None and choices.min_rating is not None:
        wanted.append((table.numbers(rating) >= choices.min_rating).fill_null(False).alias("rating"))
    if event is not None and choices.events:
        wanted.append(_is_wanted_kind(table, event, choices.events).alias("event"))
    read = None
    if time is not None:
        expression, read = table.times(time)
        wanted.append(expression.alias("time"))
    rows = table.collect(*wanted)
    times = None if read is None else read(rows["time"])
    good = _good_rows(table, {"user": user, "item": item}, time, rows, times, repairs, choices)
    second = np.full(len(rows), -1, dtype=np.int64) if times is None else times.second
    events = Events(
        rows["user"].fill_null(0).to_numpy(),
        rows["item"].fill_null(0).to_numpy(),
        second,
        tuple(ids[0]),
        tuple(ids[1]),
        nanosecond=None if times is None else times.nanosecond,
        part=rows[PART].to_numpy() if PART in rows.columns else None,
    )
    good = _wanted_rows(table, good, rows, second, repairs, choices)
    return events if good.all() else events.take(good)


def _wanted_rows(
    table: Table,
    good: Bool,
    rows: pl.DataFrame,
    second: Int64,
    repairs: dict[str, int],
    choices: DataSettings,
) -> Bool:
    """Which of the good rows (R,) have the rating, the event and the time that are wanted."""
    for column, name in (("rating", "rows_below_min_rating"), ("event", "rows_of_other_events")):
        if column in rows.columns:
            counted(repairs, name, (good & ~rows[column].to_numpy()).sum())
            good = good & rows[column].to_numpy()
    for wish, late in ((choices.since, False), (choices.until, True)):
        if wish is not None:
            outside = good & ((second >= seconds_of(wish)) == late)
            counted(repairs, "rows_outside_the_time_range", outside.sum())
            good = good & ~outside
    if not good.any():
        raise UserError(
            f"wanted interactions in {table.path}, nothing is left of its rows; see which of bad_rows, min_rating, "
            "events, since and until leaves them out"
        )
    return good


def _is_wanted_kind(table: Table, column: str, wanted: Sequence[str]) -> pl.Expr:
    kind = pl.col(column).cast(pl.String).str.strip_chars()
    known = table.collect(kind.unique()).to_series().drop_nulls().to_list()
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise UserError(
            f"wanted events of column {column} in {table.path}, got {unknown[0]!r}; there are "
            f"{', '.join(sorted(known)[:10])}"
        )
    return kind.is_in(wanted).fill_null(False)


def _good_rows(
    table: Table,
    ids: Mapping[str, str],
    time: str | None,
    rows: pl.DataFrame,
    times: Times | None,
    repairs: dict[str, int],
    choices: DataSettings,
) -> Bool:
    """Which rows (R,) are neither blank nor bad; bad ones are an error unless they are to be left out."""
    no_id = {name: rows[name].is_null().to_numpy() for name in ids}
    no_time = np.zeros(len(rows), dtype=bool) if times is None else times.bad
    blank = no_id["user"] & no_id["item"]
    if times is not None and blank.any():
        blank &= rows["time"].is_null().to_numpy()
    counted(repairs, "blank_rows", blank.sum())
    bad = ~blank & (no_id["user"] | no_id["item"] | no_time)
    if choices.bad_rows == "drop":
        counted(repairs, "bad_rows", bad.sum())
    elif bad.any():
        hint = ", or leave such rows out with --bad-rows drop"
        for name, column in ids.items():
            hit = ~blank & no_id[name]
            if hit.any():
                table.refuse(column, int(hit.argmax()) + 1, hint=hint)
        what = "Unix seconds or an ISO date such as 2020-12-31T23:59:59Z"
        table.refuse(str(time), int((~blank & no_time).argmax()) + 1, what, hint)
    if times is not None:
        for name, count in times.units.items():
            counted(repairs, name, count)
        counted(repairs, "fractions_of_a_second", times.fractions)
    good: Bool = ~(blank | bad)
    return good


def read_titles(
    table: Table,
    item: str,
    title: str,
    repairs: dict[str, int],
    choices: DataSettings = PLAIN,
    *,
    of_events: bool = False,
) -> dict[str, str]:
    """Title of each raw item id.

    Rows whose title is empty are left out and counted (``catalogue_rows_without_title``): whether that matters
    shows when it is known which items occur. So are rows that say the same again (``catalogue_rows_repeated``),
    unless the rows are interactions, and second titles where one of them is chosen (``items_with_second_titles``).

    Raises:
        UserError: Unreadable file, a title without item, two different titles for an item; names the row.
    """
    table.check(item, title)
    if table.columns[title] not in (pl.String, pl.Categorical, pl.Enum):
        raise UserError(
            f"wanted text in column {title} of {table.path}, got {table.columns[title]}; store titles as text"
        )
    said = table.rows.select(table.ids(item).alias("item"), pl.col(title).cast(pl.String).alias("title"))
    rows = table.frame(_counted_titles(said.with_row_index(ROW, offset=1)))
    untitled = rows["title"].is_null() | (rows["title"].str.strip_chars() == "")
    blank = untitled & rows["item"].is_null()
    if not of_events:
        counted(repairs, "blank_rows", rows.filter(blank)["rows"].sum())
        counted(repairs, "catalogue_rows_without_title", rows.filter(untitled & ~blank)["rows"].sum())
    rows = rows.filter(~untitled)
    without = rows["item"].is_null()
    if without.any() and choices.bad_rows == "drop":
        counted(repairs, "catalogue_rows_without_item", rows.filter(without)["rows"].sum())
        rows = rows.filter(~without)
    elif without.any():
        table.refuse(item, int(rows.filter(without)[ROW][0]))
    return _one_title_each(rows, table.path, {} if of_events else repairs, choices.second_titles, repairs)


def _counted_titles(said: pl.LazyFrame) -> pl.LazyFrame:
    """Each pair of item and title once: its first and last row, and in how many it stands; by first row."""
    pairs = said.group_by("item", "title").agg(
        pl.col(ROW).min(), pl.col(ROW).max().alias("last"), pl.len().alias("rows")
    )
    return pairs.sort(ROW)


def _one_title_each(
    rows: pl.DataFrame,
    path: Path,
    repairs: dict[str, int],
    choice: str = "error",
    chosen_repairs: dict[str, int] | None = None,
) -> dict[str, str]:
    """Title of each item of what `_counted_titles` gives."""
    n_rows, n_pairs = int(rows["rows"].sum()), len(rows)
    order = {"last": "last", "most-frequent": "rows"}.get(choice)
    if order is not None:
        rows = rows.sort(order, ROW, descending=[True, False])
    title_of: dict[str, str] = {}
    several = set()
    for item, title in rows.select("item", "title").iter_rows():
        if title_of.setdefault(item, title) != title:
            several.add(item)
            if choice == "error":
                raise UserError(
                    f"{path}: wanted one title for each item, got {shown(title_of[item])} and {shown(title)} for "
                    f"{item!r}; drop one of the two rows, or choose with --second-titles"
                )
    counted(repairs, "catalogue_rows_repeated", n_rows - n_pairs)
    counted(repairs if chosen_repairs is None else chosen_repairs, "items_with_second_titles", len(several))
    if not title_of:
        raise UserError(f"wanted titles in {path}, found none; copy or download it again")
    return title_of
