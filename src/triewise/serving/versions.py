"""The catalogue of a running service: changed while it answers, gone back from, and kept on disk.

A version is a recommender of its own, built beside the current one and then put in its place by one assignment. On disk
a version is what it differs by from the catalogue that the model was trained with: a table and, written after it, a
sealed file that vouches for it. So whoever is killed leaves whole versions, and the last one is taken up again.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from triewise.data import Catalog
from triewise.errors import UserError, reading
from triewise.files import Shape, atomic_path, check_files, read_json, scan, sha256_file, write_json
from triewise.locks import one_writer
from triewise.recommenders import CatalogueChange

if TYPE_CHECKING:
    from triewise.arrays import Int64
    from triewise.recommenders import SavedRecommender

FORMAT = 1
KEPT = 20  # versions, the current one among them, beside that of the model
ADDED, REMOVED = "added", "removed"


@dataclass(frozen=True)
class Version:
    """A catalogue and what recommends from it.

    Attributes:
        number: 0 is the catalogue of the model; every change and every way back has a number of its own.
        recommender: Stays as it is, so who holds it finishes on it.
    """

    number: int
    recommender: SavedRecommender


@dataclass(frozen=True)
class _Content:
    """Which items a version has, by the numbers that a `LiveCatalogue` gives to everything it ever met.

    Attributes:
        number: Of the version.
        before: The version that a rollback goes to; None for that of the model.
        added: int64, items that the model was not trained with, in their order.
        former: int64, what was removed, oldest first.
    """

    number: int
    before: int | None
    added: Int64 = field(repr=False)
    former: Int64 = field(repr=False)


class _Manifest(Shape):
    format: int
    number: int
    before: int | None
    catalogue: str
    sha256: str


class LiveCatalogue:
    """The versions of a recommender's catalogue; may be used by several threads at once.

    Items that stay keep their order, and new ones follow them. An item that comes back under its old title has its
    place and its training targets again. An item that was removed is no longer recommended, but a history may still
    hold it: who bought what is sold out has bought it.

    Args:
        recommender: As it was trained: version 0.
        folder: Where versions are kept; None keeps them in memory alone. The last whole one in it is taken up.

    Raises:
        UserError: The folder holds versions of another catalogue, or a damaged one.
    """

    def __init__(self, recommender: SavedRecommender, folder: Path | None = None) -> None:
        self._base, self._counts = recommender.catalog, recommender.counts
        self._met: list[tuple[str, str]] = []  # ids and titles that the model was not trained with
        self._number_met: dict[tuple[str, str], int] = {}
        self._changing, self._folder = threading.RLock(), folder
        nothing = np.zeros(0, dtype=np.int64)
        self._contents = [_Content(0, None, nothing, nothing)]
        self._current = Version(0, recommender)
        if folder is not None:
            self._fingerprint = self._base.fingerprint()
            for number in _numbers(folder)[-1:]:
                self._put(self._read(folder, number))

    @property
    def current(self) -> Version:
        """What answers new requests."""
        return self._current

    def change(self, add: Sequence[tuple[str, str]], remove: Sequence[str]) -> Version:
        """Remove items, add others, and make that the current version.

        An id that is in both has another title afterwards.

        Args:
            add: Raw ids and titles.
            remove: Raw ids.

        Raises:
            UserError: An id that is added and there already, removed and not there, or named twice; an id or a title
                without text; nothing to do, or nothing left; another process changes that folder; or the recommender
                cannot have such a catalogue.
        """
        with self._changing:
            now = self._contents[-1]
            gone = _checked(self._current.recommender.catalog, add, remove)
            leaving = self._items(now)[gone]
            known = len(self._met)
            arriving = np.array([self._number(*pair) for pair in add], dtype=np.int64)
            new = arriving[arriving >= self._base.n_items]
            added = np.concatenate([now.added[~np.isin(now.added, leaving)], new])
            former = np.concatenate([now.former, leaving])
            former = former[~np.isin(former, arriving)]
            try:
                return self._put(_Content(now.number + 1, now.number, added, former), write=True)
            except Exception:
                for pair in self._met[known:]:  # what could not be added was never met
                    del self._number_met[pair]
                del self._met[known:]
                raise

    def rollback(self) -> Version:
        """Make the catalogue before the last change the current one again, under a number of its own.

        A second call goes back one change more.

        Raises:
            UserError: There is no version before this one, it is no longer kept, or it is damaged.
        """
        with self._changing:
            now = self._contents[-1]
            known = {content.number: content for content in self._contents}
            if self._folder is not None and now.before in _numbers(self._folder):
                known.setdefault(now.before, self._read(self._folder, now.before))
            if now.before not in known:
                raise UserError(
                    f"wanted a version before {now.number} to go back to, got none: that of the model and the last "
                    f"{KEPT} are kept; change the catalogue instead"
                )
            return self._put(replace(known[now.before], number=now.number + 1), write=True)

    def _put(self, content: _Content, write: bool = False) -> Version:
        """Build a version, write it, and let it answer."""
        version = self._built(content)
        if self._folder is not None and write:
            self._write(self._folder, content)
        self._contents = [self._contents[0], *[*self._contents[1:], content][-KEPT:]]
        self._current = version
        return version

    def _built(self, content: _Content) -> Version:
        """A version, made from the current one; it has run once, so that no request waits for what is made once."""
        now, items = self._contents[-1], self._items(content)
        place = np.full(self._base.n_items + len(self._met), -1, dtype=np.int64)
        held = np.concatenate([self._items(now), now.former])
        place[held] = np.arange(len(held))
        counts = np.append(self._counts, 0)[np.minimum(items, self._base.n_items)]
        source = place[np.concatenate([items, content.former])]
        gone = content.former[content.former < self._base.n_items]
        catalog = self._base.changed(gone, self._pairs(content.added))
        former = self._pairs(content.former)
        names = Catalog.from_titles([item_id for item_id, _ in former], [title for _, title in former])
        made = self._current.recommender.changed(CatalogueChange(catalog, counts, names, source))
        made.recommend([[0]], 1)
        catalog.spelled("")  # makes the table of titles that are spelled otherwise
        return Version(content.number, made)

    def _items(self, content: _Content) -> Int64:
        """The items of a version by their numbers, in the order of its catalogue."""
        base = np.setdiff1d(np.arange(self._base.n_items), content.former, assume_unique=True)
        return np.concatenate([base, content.added])

    def _number(self, item_id: str, title: str) -> int:
        """The number of an item: its place in the catalogue of the model, or one behind them that it keeps."""
        item = self._base.item_of_id.get(item_id)
        if item is not None and self._base.title[item] == title:
            return item
        number = self._number_met.setdefault((item_id, title), len(self._met))
        if number == len(self._met):
            self._met.append((item_id, title))
        return self._base.n_items + number

    def _pairs(self, numbers: Int64) -> list[tuple[str, str]]:
        """Ids and titles."""
        n, base = self._base.n_items, self._base
        return [(base.item_id[i], base.title[i]) if i < n else self._met[i - n] for i in numbers.tolist()]

    def _read(self, folder: Path, number: int) -> _Content:
        """A version from its files."""
        file, table = _path(folder, number, "json"), _path(folder, number, "parquet")
        said = read_json(file, _Manifest)
        if (said["format"], said["catalogue"]) != (FORMAT, self._fingerprint):
            raise UserError(
                f"{folder} holds versions of another catalogue than the model's; choose another folder, or remove it"
            )
        check_files(
            folder, {table.name: said["sha256"]}, f"restore it, or remove {file} to go a version back"
        )
        with reading(table):
            rows = scan(table).collect()
            pairs = zip(rows["item_id"].to_list(), rows["title"].to_list(), strict=True)
            numbers = np.array([self._number(*pair) for pair in pairs], dtype=np.int64)
            gone = (rows["state"] == REMOVED).to_numpy()
        return _Content(number, said["before"], numbers[~gone], numbers[gone])

    def _write(self, folder: Path, content: _Content) -> None:
        """Write a version: its table, then what vouches for it; and remove those that are no longer kept."""
        import polars as pl

        pairs = self._pairs(np.concatenate([content.added, content.former]))
        state = [ADDED] * len(content.added) + [REMOVED] * len(content.former)
        columns = {"item_id": [p[0] for p in pairs], "title": [p[1] for p in pairs], "state": state}
        with _one_changer(folder, content.number - 1):
            table = _path(folder, content.number, "parquet")
            with atomic_path(table) as temporary:
                pl.DataFrame(columns, schema=dict.fromkeys(columns, pl.String)).write_parquet(temporary)
            facts: dict[str, Any] = {"format": FORMAT, "number": content.number, "before": content.before}
            facts |= {"catalogue": self._fingerprint, "sha256": sha256_file(table)}
            write_json(_path(folder, content.number, "json"), facts, sealed=True)
            for number in _numbers(folder)[:-KEPT]:
                for end in ("json", "parquet"):
                    _path(folder, number, end).unlink(missing_ok=True)


@contextlib.contextmanager
def _one_changer(folder: Path, number: int) -> Iterator[None]:
    """A block in which no other process writes versions; UserError where one has, since ``number`` was read."""
    with one_writer(folder):
        last = max(_numbers(folder), default=0)
        if last != number:
            raise UserError(
                f"another process has made version {last} in {folder}, this one has {number}; start it again"
            )
        yield


def _checked(catalog: Catalog, add: Sequence[tuple[str, str]], remove: Sequence[str]) -> list[int]:
    """The items that are to be removed; UserError where the change cannot be made."""
    item = catalog.item_of_id
    if not add and not remove:
        raise UserError("wanted items to add or to remove, got neither; name some")
    for names in ([item_id for item_id, _ in add], remove):
        name, times = Counter(names).most_common(1)[0] if names else ("", 1)
        if times > 1:
            raise UserError(f"wanted each item once, got {name!r} {times} times; name it once")
    unknown = [name for name in remove if name not in item]
    if unknown:
        raise UserError(
            f"wanted ids of the catalogue ({catalog.n_items} items) to remove, got {unknown[0]!r} ({len(unknown)} "
            "unknown ids); see GET /v1/catalog"
        )
    leaving = set(remove)
    for item_id, title in add:
        if item_id in item and item_id not in leaving:
            raise UserError(
                f"wanted new ids to add, got {item_id!r}, which is there; to give it another title, remove it too"
            )
        if not item_id.strip() or not title.strip() or re.search("[\ud800-\udfff]", item_id + title):
            raise UserError(
                f"wanted an id and a title with text, got {item_id!r} and {title!r}; correct them"
            )
    if catalog.n_items - len(remove) + len(add) < 1:
        raise UserError("wanted at least one item to be left, got a change that removes all; keep one")
    return [item[name] for name in remove]


def _path(folder: Path, number: int, end: str) -> Path:
    return folder / f"version-{number:06d}.{end}"


def _numbers(folder: Path) -> list[int]:
    """Whole versions in a folder, ascending."""
    found = (re.fullmatch(r"version-(\d+)\.json", path.name) for path in folder.glob("version-*.json"))
    return sorted(int(match[1]) for match in found if match)
