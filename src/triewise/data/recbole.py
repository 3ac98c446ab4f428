"""RecBole's atomic files: interactions to be split, or rows that already hold a history and what came next."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from triewise.data.readers import PLAIN, Raw, dropped, of_tables, part_of, parts_of, visible
from triewise.data.tables import (
    SEPARATOR_NAMES,
    Table,
    bare_name,
    find_file,
    joined,
    load,
    names,
    outline,
)
from triewise.errors import UserError

if TYPE_CHECKING:
    from triewise.settings import DataSettings


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


def _stem(path: Path) -> str:
    return path.name[: len(bare_name(path))].rpartition(".")[0]


def _atomic(path: Path, choices: DataSettings) -> Table:
    """A table without the types in its header."""
    made = outline(path, "\t,;| ")
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
