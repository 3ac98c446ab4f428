"""What columns are called: the names by which each role is found, and the choice where a recipe names one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from triewise.errors import UserError

if TYPE_CHECKING:
    from triewise.settings import DataSettings

# Folded, see `folded`.
USER = ("user", "userid", "reviewerid")
ITEM = ("item", "itemid", "movieid", "asin", "parentasin")
TIME = ("timestamp", "time", "ts", "unixreviewtime")
TITLE = ("title", "itemtitle", "movietitle", "itemname", "name")
RATING = ("rating", "ratings", "stars", "score", "overall")
EVENT = ("event", "eventtype", "action", "behavior", "behaviour", "behaviortype")
TAG = ("tag", "tags")
ROLES = {"user": USER, "item": ITEM, "time": TIME, "title": TITLE, "rating": RATING, "event": EVENT}
_PARTS = {
    "train": ("train", "training"),
    "valid": ("valid", "val", "validation", "dev"),
    "test": ("test", "testing"),
}


def folded(name: str) -> str:
    """A name without case, outer space, and what is no letter or digit: ``User ID`` and ``user_id`` are one name."""
    return re.sub(r"[\W_]+", "", name.casefold())


def named(columns: Iterable[str], known: Sequence[str]) -> list[str]:
    """Columns whose name is among the known ones; of ``asin`` and ``parent_asin`` the second, as its publisher says."""
    found = [column for column in columns if folded(column) in known]
    parents = [column for column in found if folded(column) == "parentasin"]
    return parents if parents and all("asin" in folded(column) for column in found) else found


def chosen(columns: Iterable[str], role: str, wish: str | None) -> list[str]:
    """Columns that can have a role: the wished one (of several, the first that is there), or those of known name."""
    there = list(columns)
    if wish is None:
        return named(there, ROLES[role])
    for name in (text.strip() for text in wish.split(",")):
        found = [column for column in there if column == name] or [
            c for c in there if folded(c) == folded(name)
        ]
        if found:
            return found[:1]
    return []


def the_column(columns: Sequence[str], role: str, wish: str | None, path: Path) -> str:
    """The one column that has a role.

    Raises:
        UserError: If there is none, or more than one.
    """
    found = chosen(columns, role, wish)
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"wanted one column for the {role} in {path}, found {', '.join(found)}; "
            f"name the one that is meant with --{role}-column"
        )
    raise UserError(
        f"wanted a column for the {role} ({wish or ' or '.join(ROLES[role])}) in {path}, "
        f"found {', '.join(columns)}; name it with --{role}-column"
    )


def part_of(path: Path) -> str | None:
    """The split that a file holds by its name: ``train.csv``, ``games.valid.inter``, ``ml_test.parquet``."""
    words = re.split(r"[\W_]+", path.name.lower())
    return next((part for part, known in _PARTS.items() if any(word in known for word in words)), None)


def parts_of(paths: Sequence[Path]) -> list[int | None]:
    """Numbers of the splits that files hold by their names; none where not each does, or there is no test."""
    parts = [part_of(path) for path in paths]
    if None in parts or "test" not in parts or "train" not in parts:
        return [None] * len(paths)
    return [list(_PARTS).index(part) for part in parts if part]


class ColumnRoles(NamedTuple):
    """Names of the columns of interactions; None for one that is not there."""

    user: str
    item: str
    time: str | None
    rating: str | None = None
    event: str | None = None


def columns_of(there: Sequence[str], path: Path, choices: DataSettings) -> ColumnRoles:
    """The columns of a table of interactions; there may be no time where the order of the file is taken."""
    user, item = (
        the_column(there, role, wish, path)
        for role, wish in (("user", choices.user_column), ("item", choices.item_column))
    )
    time = None
    if choices.ties != "file" or chosen(there, "time", choices.time_column):
        try:
            time = the_column(there, "time", choices.time_column, path)
        except UserError as error:
            if chosen(there, "time", choices.time_column):
                raise
            raise UserError(f"{error}, or take the order of the file with --ties file") from None
    optional = {
        role: the_column(there, role, wish, path)
        for role, wish in (("rating", choices.rating_column), ("event", choices.event_column))
        if wish is not None
        or len(chosen(there, role, None)) == 1
        or (role == "rating" and choices.min_rating is not None)
        or (role == "event" and choices.events)
    }
    return ColumnRoles(user, item, time, **optional)
