"""Raw Amazon reviews (McAuley lab, UCSD) of 2014, 2018 and 2023: what each file is, its keys say, not its name.

A folder holds the reviews and the metadata of one category, plain or gzip. Of 2023 the interactions that the hub
offers as CSV (``user_id,parent_asin,rating,timestamp``) do in place of the reviews.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import polars as pl

from triewise.data.lines import ENDS, files_with, keys_of, record_table
from triewise.data.readers import PLAIN, Raw, read_events, read_titles
from triewise.data.tables import Table, counted, entries, names, open_table, outline
from triewise.errors import UserError

if TYPE_CHECKING:
    from triewise.settings import DataSettings


class _Keys(NamedTuple):
    user: str
    item: str
    time: str


_OLD = _Keys("reviewerID", "asin", "unixReviewTime")  # 2014 and 2018
_NEW = _Keys("user_id", "parent_asin", "timestamp")  # 2023
# Keys of metadata that one release has and the other has not.
_METADATA = {2014: {"imUrl", "salesRank", "related"}, 2018: {"also_buy", "main_cat", "tech1"}}


@dataclass(frozen=True)
class _File:
    """A file of the folder and the keys of its first records, or the columns of a table; ratings have no header."""

    path: Path
    is_table: bool
    keys: frozenset[str] = field(repr=False)
    is_bare: bool = False

    @property
    def is_reviews(self) -> bool:
        return self.keys.issuperset(_OLD) or self.keys.issuperset(_NEW)

    @property
    def is_metadata(self) -> bool:
        return "title" in self.keys and bool(self.keys & {"asin", "parent_asin"}) and not self.is_reviews


def amazon_folder(folder: Path, choices: DataSettings = PLAIN) -> Raw:
    """Reviews with metadata; every review is an interaction of its user with its item, whatever the rating.

    Ratings alone, CSV without a header (2014 and 2018), do in place of reviews.

    The item of 2023 is ``parent_asin``, and of several reviews of a user and an item the first counts, as in the
    benchmark of its authors.

    Args:
        folder: Where the files lie.
        choices: As in `read_events` and `read_titles`; a ``pipeline`` decides itself which title of an item counts.

    Raises:
        UserError: No or several files that could be the one or the other, files of different releases, broken lines.
    """
    source, metadata, aside = _chosen(folder)
    keys, year = (
        (_NEW, 2023) if source.keys.issuperset(_NEW) else (_OLD, 2014 if "helpful" in source.keys else 2018)
    )
    if keys.item not in metadata.keys:
        raise UserError(
            f"wanted metadata of {year} ({keys.item} and title) for {source.path.name}, {metadata.path} is of another "
            "release; put both of one release into the folder"
        )
    repairs: dict[str, int] = {}
    titles = record_table(metadata.path, keys.item, "title")
    if source.is_bare:
        reviewed, year = _ratings(source.path, titles)
    else:
        reviewed = (
            open_table(source.path) if source.is_table else _reviews(source.path, keys, choices, repairs)
        )
    notes = [f"Amazon {year}: {source.path.name} with {metadata.path.name}"]
    if aside:
        notes.append(f"the interactions are those of {source.path.name}; {aside[0].path.name} is not read")
    looks = [release for release, known in _METADATA.items() if metadata.keys & known]
    if year in _METADATA and looks and year not in looks:
        notes.append(f"the metadata look like those of {looks[0]}")
    rating = "rating" if keys is _NEW else "overall"
    events = read_events(reviewed, keys.user, keys.item, keys.time, repairs, choices, rating=rating)
    rows = titles.collect(titles.ids(keys.item).alias("item"), pl.col("title"))
    title = {} if choices.pipeline else read_titles(titles, keys.item, "title", repairs, choices)
    return Raw(events, title, (source.path, metadata.path), repairs, tuple(notes), rows)


def amazon_files(folder: Path) -> list[Path]:
    """The files that `amazon_folder` would read."""
    source, metadata, _ = _chosen(folder)
    return [source.path, metadata.path]


def _chosen(folder: Path) -> tuple[_File, _File, list[_File]]:
    """The interactions, the metadata, and other interactions that are not read."""
    files = [_File(path, False, keys_of(path)) for path in files_with(folder, *ENDS)]
    tables = []
    for path in files_with(folder, ".csv"):
        columns = outline(path, ",").columns
        bare = len(columns) == 4 and columns[2].replace(".", "", 1).isdigit() and columns[3].isdigit()
        tables.append(_File(path, True, frozenset(columns), bare))
    # The hub's splits have the history too; together they are its interactions.
    whole = [file for file in tables if file.keys.issuperset(_NEW) and "history" not in file.keys]
    reviews = [file for file in files if file.is_reviews]
    rated = [file for file in tables if file.is_bare]
    source = _the_one(whole or reviews or rated, "reviews", folder)
    metadata = _the_one([file for file in files if file.is_metadata], "metadata", folder)
    return source, metadata, [file for file in (*reviews, *rated) if file not in (whole or reviews or rated)]


def _ratings(path: Path, titles: Table) -> tuple[Table, int]:
    """Ratings without a header, and their release: 2014 has user, item, rating and time, 2018 the item first.

    The item is the one of the two that is more often among those of the metadata.
    """
    known = titles.collect(pl.col(_OLD.item).unique()).to_series().to_list()
    header = (_OLD.user, _OLD.item, "overall", _OLD.time)
    table = open_table(path, header=header)
    first, second = table.collect(pl.col(*header[:2]).is_in(known).sum()).row(0)
    if first <= second:
        return table, 2014
    return open_table(path, header=(_OLD.item, _OLD.user, *header[2:])), 2018


def _reviews(path: Path, keys: _Keys, choices: DataSettings, repairs: dict[str, int]) -> Table:
    rating = ["rating" if keys is _NEW else "overall"] * (choices.min_rating is not None)
    table = record_table(path, *keys, *rating)
    if keys is _OLD:
        return table
    rows = table.collect(pl.all())
    time = pl.col(keys.time).cast(pl.Int64, strict=False)
    first = rows.filter(time.is_null() | (time == time.min().over(keys.user, keys.item)))
    once = first.unique([keys.user, keys.item], keep="first", maintain_order=True)
    counted(repairs, "repeated_reviews", len(rows) - len(once))
    return replace(table, rows=once.lazy())


def _the_one(found: list[_File], what: str, folder: Path) -> _File:
    if len(found) == 1:
        return found[0]
    there = names([file.path for file in found] or entries(folder))
    raise UserError(
        f"wanted one file of {what} of an Amazon release (2014, 2018 or 2023) in {folder}, found {there}; "
        "keep the reviews and the metadata of one category in a folder"
    )
