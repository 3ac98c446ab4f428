"""What the scripts of D3, MSL and IGD do with raw reviews before they split them, rule by rule.

Each takes events in the order of the file and gives those that are left, its users in the order in which they first
occur: rows of one time then stand in the order of the script. What the scripts do alike (order of the file for equal
times, every repeat kept, histories of 10, 8:1:1) are settings, see `triewise.settings.PIPELINES`.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import polars as pl

from triewise.data.interactions import Events, core
from triewise.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from triewise.arrays import Bool

_TITLE = pl.col("title")
_LAST_YEAR, _FIRST_YEAR = 2017, 1996  # where D3's search for a start begins and ends
_ENOUGH_ITEMS = 10_000
_D3_WORDS, STEAM_WORDS = 20, 25
_SEED = 42  # of MSL's sample; that of its authors is not known


class Kept(NamedTuple):
    """What the rules of a script leave: events, titles of items, a sentence about the rules, and what they left out."""

    events: Events
    title: dict[str, str]
    note: str
    repairs: dict[str, int]


def unescaped(title: pl.Expr) -> pl.Expr:
    """Titles with the two entities replaced that the scripts of D3 and IGD know."""
    return title.str.replace_all("&quot;", '"', literal=True).str.replace_all("&amp;", "&", literal=True)


def short(title: pl.Expr, most_words: int) -> pl.Expr:
    """Titles of 2 letters or more and at most so many words, which are what stands between single blanks; else null."""
    return pl.when((title.str.len_chars() > 1) & (title.str.count_matches(" ") < most_words)).then(title)


def d3(events: Events, rows: pl.DataFrame, k_core: int, start_year: int | str) -> Kept:
    """D3's rules: a time range, titles, k-core; while fewer than 10,000 items are left, from an earlier year again.

    The range is from October 1 of the start year to November 1, 2018, both included, in UTC; the first year tried is
    2017, and 1996 is taken however few items it leaves. An item counts when every row of its metadata has a title of 2
    letters to 20 words without ``<span id``; its title is that of the last row. The script cleans titles in place
    whenever it starts again, so they are cleaned once more for each year that was tried.

    Args:
        events: In the order of the file.
        rows: Titles as the metadata have them: ``item`` and ``title``, null where there is none.
        k_core: Least number of interactions of a user and of an item; 0 or 1 keeps all.
        start_year: A year, ``"auto"`` for D3's rule, or ``"all"`` for interactions of any time.

    Returns:
        In ``repairs`` are ``rows_out_of_range`` and ``rows_of_untitled_items``.

    Raises:
        UserError: If nothing is left.

    Source: code/process.py of D3 (EMNLP 2024), the same file in IGD's code. *Differs*: there the time zone is that of
    the computer, and items are numbered in a shuffled order.
    """
    years = range(_LAST_YEAR, _FIRST_YEAR - 1, -1) if start_year == "auto" else [start_year]
    for year in years:
        rows = rows.with_columns(unescaped(_TITLE).str.strip_chars(" ").str.strip_chars('"'))
        title = _titles_of_d3(rows)
        titled = _has(events, title)
        in_range = np.ones_like(titled) if year == "all" else _since(events, int(year))
        left = in_range & titled
        if len(np.unique(events.item[_in_core(events, left, k_core)])) >= _ENOUGH_ITEMS:
            break
    repairs = {"rows_out_of_range": ~in_range, "rows_of_untitled_items": in_range & ~titled}
    when = "of any time" if year == "all" else f"of {year}-10-01 to 2018-11-01"
    found = ", the latest start that leaves 10,000 items or else 1996" * (start_year == "auto")
    rules = f"d3: interactions {when}{found}; titles of 2 letters to {_D3_WORDS} words"
    return _finished(events, title, left, k_core, rules, repairs)


def msl(events: Events, rows: pl.DataFrame, k_core: int, sample_items: int) -> Kept:
    """MSL's rules: titles of 2 letters or more, a random sample of items where one is wanted, then the k-core.

    Args:
        events: In the order of the file.
        rows: Titles as the metadata have them: ``item`` and ``title``, null where there is none; the last row counts.
        k_core: Least number of interactions of a user and of an item; 0 or 1 keeps all.
        sample_items: Of more items than these so many are drawn (MSL: 100,000 of the books); 0 keeps all.

    Returns:
        In ``repairs`` are ``rows_of_untitled_items`` and ``rows_of_items_not_drawn``.

    Raises:
        UserError: If nothing is left.

    Source: MSL (arXiv:2504.04178), section 5.1, and the notebook of BIGRec that its data come from. *Differs*: the
    authors' draw is not known.
    """
    last = rows.unique("item", keep="last", maintain_order=True).with_columns(short(_TITLE, 1 << 30))
    title = dict(last.drop_nulls().select("item", "title").iter_rows())
    left = _has(events, title)
    repairs = {"rows_of_untitled_items": ~left}
    items, rules = np.unique(events.item[left]), "msl: titles of 2 letters or more"
    if 0 < sample_items < len(items):
        drawn = np.random.default_rng(_SEED).choice(items, sample_items, replace=False)
        rules += f"; {sample_items:,} of {len(items):,} items drawn with seed {_SEED}"
        of_drawn = np.isin(events.item, drawn)
        repairs["rows_of_items_not_drawn"] = left & ~of_drawn
        left &= of_drawn
    return _finished(events, title, left, k_core, rules, repairs)


def igd_steam(events: Events, title: Mapping[str, str], k_core: int) -> Kept:
    """IGD's rules for Steam: what `steam_folder` reads, and the k-core over the whole time.

    Raises:
        UserError: If nothing is left.

    Source: code/process_steam.py of IGD. *Differs*: there a day begins at midnight of the computer's time zone.
    """
    left = np.ones(len(events.user), dtype=bool)
    return _finished(events, dict(title), left, k_core, "igd-steam: reviews of any time", {})


def _finished(
    events: Events, title: dict[str, str], left: Bool, k_core: int, rules: str, repairs: Mapping[str, Bool]
) -> Kept:
    """The k-core of what is left, walked as the scripts walk it."""
    kept = _in_core(events, left, k_core)
    if not kept.any():
        raise UserError(
            f"wanted interactions that the rules leave ({rules}; {k_core}-core), got none: {left.sum():,} of "
            f"{len(left):,} are left before the core; choose another pipeline, start_year or k_core"
        )
    note = (
        f"{rules}; {k_core}-core: {kept.sum():,} of {left.sum():,} interactions are in it"
        if k_core > 1
        else rules
    )
    return Kept(
        _walked(events.take(kept)), title, note, {name: int(rows.sum()) for name, rows in repairs.items()}
    )


def _in_core(events: Events, left: Bool, k_core: int) -> Bool:
    kept = left.copy()
    kept[kept] = core(events.user[kept], events.item[kept], k_core)
    return kept


def _titles_of_d3(rows: pl.DataFrame) -> dict[str, str]:
    """Title of each item whose rows D3 accepts, all of them."""
    kept = pl.when(~_TITLE.str.contains("<span id", literal=True)).then(short(_TITLE, _D3_WORDS))
    last = rows.with_columns(kept).group_by("item", maintain_order=True)
    items = last.agg(_TITLE.last(), _TITLE.is_null().any().alias("without"))
    return dict(items.filter(~pl.col("without")).select("item", "title").iter_rows())


def _has(events: Events, title: Mapping[str, str]) -> Bool:
    return np.array([raw in title for raw in events.item_id], dtype=bool)[events.item]


def _since(events: Events, year: int) -> Bool:
    start, end = (int(datetime(*day, tzinfo=UTC).timestamp()) for day in ((year, 10, 1), (2018, 11, 1)))
    return (events.timestamp >= start) & (events.timestamp <= end)


def _walked(events: Events) -> Events:
    """The events with their users numbered anew, in the order in which they occur."""
    known, first, number = np.unique(events.user, return_index=True, return_inverse=True)
    order = np.argsort(first)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    user_id = tuple(events.user_id[user] for user in known[order].tolist())
    return replace(events, user=place[number].astype(np.int32), user_id=user_id)
