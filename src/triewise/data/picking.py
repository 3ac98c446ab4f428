"""Which of the tables in a folder holds the interactions, and which the titles; by their columns alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from triewise.data.columns import TAG, chosen, folded
from triewise.errors import UserError

if TYPE_CHECKING:
    from triewise.data.tables import Outline
    from triewise.settings import DataSettings


def interactions_among(
    folder: Path, found: list[Outline], users: list[Outline], failures: list[UserError], choices: DataSettings
) -> list[Outline]:
    """The table, or the tables of the same columns, that hold the interactions."""
    wanted = "user, item and timestamp"
    if choices.interactions_file is not None:
        return [_of_name(folder, found, failures, choices.interactions_file)]
    both = [made for made in users if chosen(made.columns, "item", choices.item_column)]
    timed = [made for made in both or users if chosen(made.columns, "time", choices.time_column)]
    if not (timed or both):
        timed = users if len(users) == 1 and not failures else []

    def worth(made: Outline) -> tuple[bool, bool]:
        rated = chosen(made.columns, "rating", choices.rating_column) or chosen(made.columns, "event", None)
        return not any(folded(column) in TAG for column in made.columns), bool(rated)

    candidates = timed or both
    best = [made for made in candidates if worth(made) == max(map(worth, candidates))]
    layouts = {tuple(sorted(map(folded, made.columns))) for made in best}
    if len(layouts) == 1:
        return best
    if not best and failures:
        raise failures[0]
    raise UserError(_which(folder, best or found, wanted, "interactions"))


def _which(folder: Path, tables: list[Outline], columns: str, file: str) -> str:
    """A line about the tables of which none or too many fit."""
    there = "; ".join(f"{made.path.name} ({', '.join(made.columns[:6])})" for made in tables[:6])
    bare = [made for made in tables if any(cell.replace(".", "").isdigit() for cell in made.columns)]
    header = f"; {bare[0].path.name} has no header, add one" if bare else ""
    return (
        f"wanted one table with the columns {columns} in {folder}, found {there or 'nothing'}{header}; name "
        f"its columns with --user-column and so on, or the file with --{file}-file"
    )


def _of_name(folder: Path, found: list[Outline], failures: list[UserError], name: str) -> Outline:
    there = [made for made in found if made.path.name == name]
    if there:
        return there[0]
    broken = [error for error in failures if name in str(error)]
    if broken:
        raise broken[0]
    raise UserError(
        f"wanted the table {name} in {folder}, found {', '.join(made.path.name for made in found)}; check the name"
    )


def catalogue_among(
    folder: Path,
    others: list[Outline],
    events: list[Outline],
    failures: list[UserError],
    choices: DataSettings,
) -> Outline:
    """The table that holds the titles; that of the interactions where no other one does."""
    if choices.catalogue_file is not None:
        return _of_name(folder, others + events, failures, choices.catalogue_file)
    titled = [made for made in others if chosen(made.columns, "title", choices.title_column)]
    whole = [made for made in titled if chosen(made.columns, "item", choices.item_column)]
    candidates = whole or titled
    if not whole and chosen(events[0].columns, "title", choices.title_column):
        return events[0]
    if len(candidates) == 1:
        return candidates[0]
    if not candidates and failures:
        raise failures[0]
    raise UserError(_which(folder, candidates or others or events, "item and title", "catalogue"))
