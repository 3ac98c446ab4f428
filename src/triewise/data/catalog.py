"""Item index, raw id and title; which items share a title.

Items with the same title cannot be told apart by a model that writes titles: they form a group.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, compress
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from triewise.errors import UserError
from triewise.files import decoded


@dataclass(frozen=True, eq=False)
class Catalog:
    """The items of a data set; I items.

    Attributes:
        item_id: Raw ids, I strings.
        title: Titles, I strings; may be empty, may repeat.
        group: Lowest index of an item with the same title, int32 (I,).
    """

    item_id: tuple[str, ...] = field(repr=False)
    title: tuple[str, ...] = field(repr=False)
    group: NDArray[np.int32] = field(repr=False)

    @classmethod
    def from_titles(cls, item_id: Sequence[str], title: Sequence[str]) -> Catalog:
        """Group the items by title.

        Raises:
            ValueError: If ids and titles differ in number.

        >>> Catalog.from_titles(["a", "b", "c"], ["Heat", "Alien", "Heat"]).group
        array([0, 1, 0], dtype=int32)
        """
        if len(item_id) != len(title):
            raise ValueError(f"wanted a title for each item, got {len(item_id)} ids and {len(title)} titles")
        first = dict(zip(reversed(title), reversed(range(len(title))), strict=True))
        group = np.fromiter(map(first.__getitem__, title), np.int32, len(title))
        return cls(tuple(item_id), tuple(title), group)

    @property
    def n_items(self) -> int:
        """Number of items."""
        return len(self.item_id)

    @property
    def n_titles(self) -> int:
        """Number of distinct titles."""
        return len(self._first_of_title)

    def fingerprint(self) -> str:
        """Hex SHA-256 of ids and titles, in their order."""
        return hashlib.sha256(json.dumps([self.item_id, self.title]).encode()).hexdigest()

    def __repr__(self) -> str:
        return f"Catalog({self.n_items} items, {self.n_titles} titles)"

    def index(self, title: str) -> int:
        """Item index of a title; of the lowest-numbered item where several share it.

        Raises:
            UserError: If there is no such title; names the nearest ones.
        """
        if self.spelled(title) in self.item_of_title:
            return self.item_of_title[self.spelled(title)]
        form = _form(title).casefold()
        near = [
            name for name in reversed(list(self.item_of_title)) if _form(name).casefold() == form
        ] or difflib.get_close_matches(title, self.item_of_title, n=3, cutoff=0.5)
        there = f"; the nearest are {', '.join(map(repr, near))}" if near else ""
        raise UserError(
            f"wanted a title of the catalogue ({self.n_titles} titles), got {title!r}{there}; "
            "check the spelling"
        )

    def to_frame(self, train_targets: NDArray[np.int32] | None = None) -> pl.DataFrame:
        """Columns item, item_id, title, group and, when given, train_targets.

        Args:
            train_targets: How often each item is the target of a training row, (I,).
        """
        columns = {
            "item": pl.Series(np.arange(self.n_items), dtype=pl.Int32),
            "item_id": pl.Series(self.item_id, dtype=pl.String),
            "title": pl.Series(self.title, dtype=pl.String),
            "group": pl.Series(self.group, dtype=pl.Int32),
        }
        if train_targets is not None:
            columns["train_targets"] = pl.Series(train_targets, dtype=pl.Int32)
        return pl.DataFrame(columns)

    @classmethod
    def from_frame(cls, frame: pl.DataFrame) -> Catalog:
        """The catalogue that :meth:`to_frame` wrote; ValueError where something is missing in it."""
        frame = frame.select(pl.col("item_id", "title").cast(pl.String))
        if not len(frame) or sum(frame.null_count().row(0)):
            raise ValueError("wanted an id and a title for each item")
        return cls.from_titles(frame["item_id"].to_list(), frame["title"].to_list())

    @property
    def _first_of_title(self) -> NDArray[np.int64]:
        """The first item of each title, ascending."""
        return np.flatnonzero(self.group == np.arange(self.n_items))

    @cached_property
    def item_of_id(self) -> Mapping[str, int]:
        """Items by raw id."""
        return dict(zip(self.item_id, range(self.n_items), strict=True))

    @cached_property
    def item_of_title(self) -> Mapping[str, int]:
        """Items by title as it stands; of several with one title the first."""
        items = self._first_of_title.tolist()
        return dict(zip(map(self.title.__getitem__, items), items, strict=True))

    @cached_property
    def origin(self) -> tuple[Catalog, NDArray[np.int32]] | None:
        """What `changed` made this of, and where each of its items is here (-1: gone); None: of nothing."""
        return None

    def changed(self, gone: NDArray[np.int64], added: Sequence[tuple[str, str]]) -> Catalog:
        """What `from_titles` gives without some items and with others behind; what stays is not looked at again.

        Args:
            gone: Items of this catalogue.
            added: Ids, of which none stays, and titles.
        """
        stays = np.ones(self.n_items, dtype=bool)
        stays[gone] = False
        kept = np.flatnonzero(stays)
        place = np.where(stays, np.cumsum(stays, dtype=np.int32) - 1, -1)
        first = np.full(self.n_items, -1, dtype=np.int32)  # of each title's former first item: the first now
        first[self.group[kept][::-1]] = np.arange(len(kept), dtype=np.int32)[::-1]
        by_title = _Changed(self.item_of_title, first, {})
        for item, (_, title) in enumerate(added, len(kept)):
            if title not in by_title:
                by_title.added[title] = item
        of_added = np.array([by_title[title] for _, title in added], dtype=np.int32)
        which, (ids, titles) = stays.tolist(), zip(*added, strict=True) if added else ((), ())
        made = Catalog(
            tuple(chain(compress(self.item_id, which), ids)),
            tuple(chain(compress(self.title, which), titles)),
            np.concatenate([first[self.group[kept]], of_added]),
        )
        by_id = _Changed(self.item_of_id, place, dict(zip(ids, range(len(kept), made.n_items), strict=True)))
        unlike = sorted((int(first[item]), form) for item, form in self._unlike if first[item] >= 0)
        unlike += _unlike_of(by_title.added)
        made.__dict__.update(item_of_id=by_id, item_of_title=by_title, _unlike=unlike, origin=(self, place))
        return made

    def spelled(self, title: str) -> str:
        """The title as the catalogue has it, where its normal form and its outer space alone differ; else as it is."""
        form = _form(title)
        known = form if form in self.item_of_title else title
        return title if title in self.item_of_title else self._of_form.get(form, known)

    @cached_property
    def _of_form(self) -> dict[str, str]:
        """Titles that are not their own form, by that; of all with one form the first."""
        items = self.item_of_title
        unlike: dict[str, str] = {}
        for item, form in self._unlike:
            unlike.setdefault(form, self.title[item] if item <= items.get(form, item) else form)
        return unlike

    @cached_property
    def _unlike(self) -> list[tuple[int, str]]:
        """The first items of titles that are not their own form, ascending, and that form."""
        return _unlike_of(self.item_of_title)


@dataclass(frozen=True, eq=False)
class _Changed(Mapping[str, int]):
    """Items by a name, after a change of the catalogue.

    Attributes:
        before: Items of the catalogue before.
        place: Where each of these is now, int32; -1: no longer.
        added: Items under names that none of those has.
    """

    before: Mapping[str, int]
    place: NDArray[np.int32]
    added: dict[str, int]

    def __getitem__(self, name: str) -> int:
        item = int(self.place[self.before[name]]) if name in self.before else -1
        return self.added[name] if item < 0 else item

    def __iter__(self) -> Iterator[str]:
        return chain((name for name, item in self.before.items() if self.place[item] >= 0), self.added)

    def __len__(self) -> int:
        return int((self.place >= 0).sum()) + len(self.added)


def _unlike_of(items: Mapping[str, int]) -> list[tuple[int, str]]:
    """Those of some items whose titles are not their own form, and that form."""
    strange = ((i, title) for title, i in items.items() if not (title.isascii() and title == title.strip()))
    return [(item, form) for item, title in strange if (form := _form(title)) != title]


def _form(title: str) -> str:
    return unicodedata.normalize("NFC", title).strip()


def allowed_items(path: Path, catalog: Catalog) -> NDArray[np.int32]:
    """Item indices of the raw ids in a text file, one a line; blank lines are left out.

    A line is an id as it stands, else without the blanks around it.

    Raises:
        UserError: No such file, no id, or an id that is not in the catalogue.
    """
    try:
        lines = decoded(path.read_bytes()).replace("\r\n", "\n").split("\n")  # ids may hold other line breaks
    except OSError as error:
        raise UserError(f"wanted a file of item ids in {path}, got: {error}; one raw id a line") from None
    index = catalog.item_of_id
    ids = [
        line if line in index else line.strip() for line in lines if line.strip()
    ]  # an id may begin with a blank
    unknown = [raw for raw in ids if raw not in index]
    if unknown or not ids:
        got = f"{unknown[0]!r} ({len(unknown)} unknown ids)" if unknown else "none"
        raise UserError(
            f"wanted raw item ids of the catalogue in {path}, got {got}; see item_id in catalog.parquet"
        )
    return np.array([index[raw] for raw in ids], dtype=np.int32)
