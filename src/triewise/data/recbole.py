"""RecBole's atomic files: interactions to be split, or rows that already hold a history and what came next."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from triewise.data.published import NAMES, Published, Split, Titles, of_rows, split_of_texts
from triewise.data.readers import (
    PLAIN,
    Raw,
    dropped,
    folded,
    of_tables,
    ordered_ids,
    part_of,
    parts_of,
    read_titles,
    the_column,
    visible,
)
from triewise.data.tables import (
    SEPARATOR_NAMES,
    Table,
    bare_name,
    counted,
    find_file,
    joined,
    load,
    names,
    outline,
)
from triewise.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from triewise.settings import DataSettings

_SEPARATORS = "\t,;| "


def recbole(folder: Path, choices: DataSettings = PLAIN) -> Raw:
    """RecBole's atomic files ``NAME.inter`` and ``NAME.item``: a header of ``name:type``, and tabs or what it has.

    The interactions need ``user_id``, ``item_id`` and a time; the items ``item_id`` and a title, found by its
    name. Files ``NAME.train.inter``, ``NAME.valid.inter`` and ``NAME.test.inter`` are the splits.

    Raises:
        UserError: Missing or ambiguous file or column, or a broken row.
    """
    *inters, item = recbole_files(folder)
    events = joined(folder, [_atomic(path, choices) for path in inters], parts_of(inters))
    return of_tables(events, _atomic(item, choices), choices)


def recbole_files(folder: Path) -> list[Path]:
    """The files of interactions, and at the end that of the items.

    Raises:
        UserError: If one is missing, or there are others.
    """
    inters = [path for path in visible(folder) if bare_name(path).endswith(".inter")]
    name = _stem(inters[0]) if inters else ""
    if len(inters) != 1:
        parts = [part_of(path) for path in inters]
        name = name.rpartition(".")[0]
        if None in parts or len(set(parts)) < len(parts) or not inters:
            raise UserError(
                f"wanted one file NAME.inter in {folder}, or NAME.train.inter, NAME.valid.inter and NAME.test.inter, "
                f"found {names(inters)}; keep one data set in a folder"
            )
    return [*inters, find_file(folder, f"{name}.item")]


def has_histories(folder: Path) -> bool:
    """Whether the rows of interactions hold what came before them: ``item_id_list:token_seq``."""
    if not folder.is_dir():
        return False
    try:
        made = [outline(path, _SEPARATORS) for path in visible(folder) if bare_name(path).endswith(".inter")]
    except UserError:  # which says it again when the files are read
        return False
    return any(_lists([name.partition(":")[0] for name in file.columns]) for file in made)


def recbole_rows(folder: Path) -> Published:
    """Files of a benchmark whose rows hold a history, ``item_id_list``, and the item that came next, ``item_id``.

    Their user or session and their time are taken where they are. All titled items are in the catalogue.

    Raises:
        UserError: Missing, ambiguous or broken file or column, an item without a title; rows that are not split.
    """
    *inters, item_file = recbole_files(folder)
    parts = parts_of(inters)
    if None in parts:
        raise UserError(
            f"wanted NAME.train.inter and NAME.test.inter in {folder}, whose rows hold histories (item_id_list), found "
            f"{names(inters)}; split the rows, or give interactions without histories"
        )
    items, repairs = _atomic(item_file, PLAIN), dict[str, int]()
    item, title = (the_column(list(items.columns), role, None, item_file) for role in ("item", "title"))
    title_of = read_titles(items, item, title, repairs)
    item_id = ordered_ids(title_of)
    titles = Titles(item_file, np.array(item_id, dtype=object), tuple(map(title_of.__getitem__, item_id)), {})
    splits = {
        NAMES[part]: _split(_atomic(path, PLAIN), titles, repairs)
        for path, part in zip(inters, parts, strict=True)
        if part is not None
    }
    published = of_rows(titles, splits, repairs, (*inters, item_file), "NAME.valid.inter")
    note = f"rows and their histories are those of {names(inters)}"
    return replace(published, notes=(note, *published.notes))


def _lists(columns: Sequence[str]) -> list[str]:
    """Columns of lists of items: ``item_id_list``."""
    return [name for name in columns if folded(name) in ("itemidlist", "itemlist")]


def _split(table: Table, titles: Titles, repairs: dict[str, int]) -> Split:
    """The rows of one file; a length that is said beside a list has to be its length."""
    there = list(table.columns)
    if not _lists(there):
        raise UserError(
            f"wanted the column item_id_list in {table.path}, as in the other files, found {', '.join(there)}; add it"
        )
    lists, target = _lists(there)[0], the_column(there, "item", None, table.path)
    table.check(*there)
    user, time, length = (
        next((name for name in there if folded(name) in known), None)
        for known in (("userid", "user", "sessionid"), ("timestamp", "time"), ("itemlength",))
    )
    history = pl.col(lists).fill_null("").str.extract_all(r"\S+").alias("history")
    whose = pl.lit(None, pl.String) if user is None else table.ids(user)
    rows = table.collect(whose.alias("user"), history, table.ids(target).alias("target"))
    if rows["target"].null_count():
        table.refuse(target, int(rows["target"].is_null().arg_true()[0]) + 1)
    if length is not None:
        n_items = rows["history"].list.len()
        other = table.collect(table.numbers(length)).to_series().fill_null(-1) != n_items
        if other.any():
            row = int(other.arg_true()[0])
            table.refuse(length, row + 1, f"{n_items[row]}, the number of items of {lists},")
    second = np.full(len(rows), -1, dtype=np.int64)
    if time is not None:
        expression, read = table.times(time)
        times = read(table.collect(expression).to_series())
        if times.bad.any():
            table.refuse(time, int(times.bad.argmax()) + 1, "Unix seconds or an ISO date")
        second = times.second
        for name, count in times.units.items():
            counted(repairs, name, count)
    return split_of_texts(rows, second, titles, table.path, repairs)


def _stem(path: Path) -> str:
    return path.name[: len(bare_name(path))].rpartition(".")[0]


def _atomic(path: Path, choices: DataSettings) -> Table:
    """A table without the types in its header."""
    made = outline(path, _SEPARATORS)
    if len(made.first) != len(made.columns):
        raise UserError(
            f"wanted {len(made.columns)} cells in each row of {path}, whose header has "
            f"{SEPARATOR_NAMES[made.separator]} between them, got {len(made.first)}; save the file with tabs"
        )
    table = load(made, None, drop=dropped(choices))
    bare = {column: column.partition(":")[0] for column in table.columns}
    if len(set(bare.values())) < len(bare):
        raise UserError(f"wanted each column once in {path}, found {', '.join(bare)}; rename one of the two")
    columns = {bare[column]: kind for column, kind in table.columns.items()}
    return replace(table, rows=table.rows.rename(bare), columns=columns)
