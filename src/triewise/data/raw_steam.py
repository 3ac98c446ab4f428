"""The Steam data of the McAuley lab (UCSD), read as the script of IGD reads it.

``steam_reviews`` and ``steam_games`` hold Python literals, one a line; each file is recognised by its keys.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from triewise.data.lines import ENDS, files_with, keys_of, record_table
from triewise.data.pipelines import STEAM_WORDS, short, unescaped
from triewise.data.readers import PLAIN, Raw, read_events
from triewise.data.tables import counted, entries, names
from triewise.errors import UserError

if TYPE_CHECKING:
    from triewise.settings import DataSettings


def steam_folder(folder: Path, choices: DataSettings = PLAIN) -> Raw:
    """Reviews are interactions, the title of a game is its ``app_name``, and of rows with one id the last counts.

    As IGD's script does, reviews without user, product or a date such as 2014-06-24 are left out, and so are those of
    a game without a name of 2 letters to 25 words. All of it is counted in ``repairs``. A day begins at
    midnight UTC.

    Args:
        folder: Where the two files lie.
        choices: As in `read_events`; ``user_column`` is the key of the user, by default ``user_id``, which many reviews
            lack. All have ``username``.

    Raises:
        UserError: Missing, ambiguous or broken file, or no review is left.
    """
    user = choices.user_column or "user_id"
    keys = {path: keys_of(path) for path in files_with(folder, *ENDS)}
    reviews = _the_one(folder, keys, {"product_id", "date"}, "reviews")
    games = _the_one(folder, keys, {"id", "app_name"}, "games")
    repairs: dict[str, int] = {}
    last = record_table(games, "id", "app_name").collect(pl.all()).drop_nulls("id").unique("id", keep="last")
    named = last.select(
        "id", short(unescaped(pl.col("app_name")).str.strip_chars(), STEAM_WORDS)
    ).drop_nulls()
    title = dict(named.iter_rows())
    table = record_table(reviews, user, "product_id", "date")
    tests = {
        "rows_without_user": pl.col(user).is_null(),
        "rows_without_item_or_date": pl.col("product_id").is_null()
        | pl.col("date").str.to_date(strict=False).is_null(),
        "rows_of_untitled_items": ~pl.col("product_id").is_in(list(title)),
    }
    rows = table.collect(pl.all())
    for name, test in tests.items():
        n_rows = len(rows)
        rows = rows.filter(~test)
        counted(repairs, name, n_rows - len(rows))
    if rows.is_empty():
        raise UserError(
            f"wanted reviews with {user}, product_id, date and a game that {games.name} names in {reviews}, found none "
            f"({repairs}); check the files, or name another key of the user with --user-column"
        )
    events = read_events(replace(table, rows=rows.lazy()), user, "product_id", "date", repairs, choices)
    return Raw(events, title, (reviews, games), repairs)


def _the_one(folder: Path, keys: dict[Path, frozenset[str]], wanted: set[str], what: str) -> Path:
    found = [path for path in keys if keys[path] >= wanted]
    if len(found) == 1:
        return found[0]
    raise UserError(
        f"wanted one file of Steam {what} ({', '.join(sorted(wanted))}) in {folder}, found "
        f"{names(found or entries(folder))}; keep one of each in a folder"
    )
