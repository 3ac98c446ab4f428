"""Prepared folders: one command turns any source into the same five files, and reading them back is checked.

A prepared folder holds ``catalog.parquet``, ``train.parquet``, ``valid.parquet``, ``test.parquet`` and
``dataset.json``. It is written beside its place and renamed when it is whole; the same input gives the same
bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from trierec.catalog import Catalog, clean_titles
from trierec.errors import UserError
from trierec.fetch import CITATION, RELEASES
from trierec.files import atomic_folder, read_json, sha256_file, write_json
from trierec.interactions import movielens
from trierec.splits import NAMES, Published, Split, leave_one_out, read_d3, read_msl

FORMAT = 1
FILES = ("catalog.parquet", *(f"{name}.parquet" for name in NAMES))
SOURCES = "ml-100k, ml-1m, msl:DIR or d3:DIR"
_KEYS = ("source", "settings", "noun", "verb", "counts", "repairs", "notes", "sha256")
_LATER = ("movielens", "recbole", "csv", "amazon", "steam")
_ROWS_IN_GROUP = 1 << 18  # fixed, so that the bytes of a file do not depend on the number of threads

# What the items are and what users did with them, by a word in the name of the folder or of a file: the words
# of the papers ("musics" is D3's).
_MSL_WORDS = {
    "toy": ("toys", "played"),
    "book": ("books", "read"),
    "cloth": ("clothing", "worn"),
    "office": ("office products", "used"),
}
_D3_WORDS = {
    "toy": ("toys and games", "enjoyed"),
    "steam": ("games", "enjoyed"),
    "game": ("video games", "enjoyed"),
    "book": ("books", "enjoyed"),
    "cd": ("musics", "enjoyed"),
    "music": ("musics", "enjoyed"),
}
_UNKNOWN_WORDS = ("items", "bought")


@dataclass(frozen=True, eq=False)
class Dataset:
    """A prepared data set.

    Attributes:
        folder: Where it lies.
        catalog: The items.
        train: Training rows.
        valid: Validation rows.
        test: Test rows.
        info: What ``dataset.json`` says: source, settings, noun, verb, counts, repairs, notes, sha256, ...
    """

    folder: Path
    catalog: Catalog
    train: Split
    valid: Split
    test: Split
    info: dict[str, Any]

    @property
    def train_targets(self) -> NDArray[np.int64]:
        """How often each item is the target of a training row, (I,)."""
        return np.bincount(self.train.target, minlength=self.catalog.n_items)

    @property
    def train_interactions(self) -> NDArray[np.int64]:
        """How often each item occurs in the training interactions, (I,).

        These are the targets of the training rows and what the first row of each user has before its target; of rows
        without a user, those with one item of history are taken for first ones.
        """
        first: dict[object, int] = {}
        for row, (user, length) in enumerate(
            zip(self.train.user_id, self.train.history.lengths, strict=True)
        ):
            if user is not None:
                first.setdefault(user, row)
            elif length == 1:
                first[row] = row
        before = self.train.history.take(np.array(list(first.values()), dtype=np.int64)).values
        return self.train_targets + np.bincount(before, minlength=self.catalog.n_items)

    def __repr__(self) -> str:
        rows = "/".join(str(split.n_rows) for split in (self.train, self.valid, self.test))
        return f"Dataset({self.folder}, {self.catalog.n_items} items, {rows} rows)"


@dataclass(frozen=True)
class _Parts:
    """What a source gives, before it is written."""

    item_id: tuple[str, ...]
    title: tuple[str, ...]
    splits: dict[str, Split]
    users: int
    interactions: int
    noun: str
    verb: str
    split: str
    repairs: dict[str, int]
    notes: tuple[str, ...]
    citation: str | None
    raw_sha256: dict[str, str]


def prepare(source: str, out: Path, *, max_history: int = 20, clean: str = "none") -> Dataset:
    """Read a source and write a prepared folder.

    Args:
        source: ``ml-100k``, ``ml-1m``, ``msl:DIR`` or ``d3:DIR``.
        out: Folder to write; may be absent, empty or an older prepared folder, which is replaced as a whole.
        max_history: Histories are cut to the last so many items.
        clean: How titles are cleaned; ``"none"`` leaves them as they are.

    Returns:
        The data set, read back from ``out``.

    Raises:
        UserError: Unknown source, bad setting, broken raw files, ``out`` holds something else.
    """
    out = Path(out)
    if max_history < 1:
        raise UserError(f"wanted max_history of at least 1, got {max_history}; choose for example 20")
    clean_titles((), clean)
    read = _reader(source, max_history)
    _check_place(out)
    parts = read()
    catalog = Catalog.from_titles(parts.item_id, clean_titles(parts.title, clean))
    splits = {name: _cut(parts.splits[name], max_history) for name in NAMES}
    empty = [name for name, split in splits.items() if not split.n_rows]
    if empty:
        raise UserError(
            f"wanted rows for train, valid and test from {source}, found none for {empty[0]}; use more data"
        )
    counts = {
        "users": parts.users,
        "items": catalog.n_items,
        "titles": catalog.n_titles,
        "interactions": parts.interactions,
        **{f"{name}_rows": splits[name].n_rows for name in NAMES},
    }
    info = {
        "format": FORMAT,
        "source": source,
        "settings": {"split": parts.split, "max_history": max_history, "clean": clean},
        "noun": parts.noun,
        "verb": parts.verb,
        "counts": counts,
        "repairs": parts.repairs,
        "notes": list(parts.notes),
        "citation": parts.citation,
        "raw_sha256": parts.raw_sha256,
    }
    try:
        _write(out, catalog, splits, info)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(f"cannot write {out}: {error}; choose another folder") from None
    return load_dataset(out)


def load_dataset(folder: Path) -> Dataset:
    """Read a prepared folder.

    Raises:
        UserError: If it is absent, of another format, or a file is missing or not the one that was written.
    """
    folder = Path(folder)
    if not (folder / "dataset.json").is_file():
        raise UserError(
            f"wanted a prepared folder, {folder} has no dataset.json; "
            f"run: trierec prepare SOURCE --out {folder}"
        )
    info = read_json(folder / "dataset.json")
    found = info.get("format") if isinstance(info, dict) else None
    if found != FORMAT:
        raise UserError(
            f"wanted a prepared folder of format {FORMAT}, {folder} has {found!r}; prepare it again"
        )
    absent = [name for name in _KEYS if name not in info]
    if absent:
        raise UserError(f"wanted {absent[0]!r} in {folder / 'dataset.json'}, it is missing; prepare it again")
    hashes = info["sha256"]
    tables = {}
    for name in FILES:
        if not (folder / name).is_file():
            raise UserError(f"wanted {name} in the prepared folder {folder}, it is missing; prepare it again")
        if not isinstance(hashes, dict) or hashes.get(name) != sha256_file(folder / name):
            raise UserError(
                f"{folder / name} is not the file that was prepared (its sha256 differs); prepare it again"
            )
        tables[name] = pl.read_parquet(folder / name)
    catalog, *splits = (tables[name] for name in FILES)
    train, valid, test = (Split.from_frame(split) for split in splits)
    return Dataset(folder, Catalog.from_frame(catalog), train, valid, test, info)


# --- sources ------------------------------------------------------------------------------------------------


def _reader(source: str, max_history: int) -> Callable[[], _Parts]:
    """What reads ``source``; a Windows path has a second colon, so only the first one counts."""
    kind, colon, place = source.partition(":")
    if source in RELEASES:
        return lambda: _movielens(source, max_history)
    if kind in ("msl", "d3") and colon:
        if not place:
            raise UserError(
                f"wanted a folder after {kind}:, got nothing; write for example {kind}:data/games"
            )
        return lambda: _published(kind, Path(place))
    if kind in _LATER and colon:
        raise UserError(f"wanted one of {SOURCES}, got {source!r}; {kind}: is not yet supported")
    raise UserError(f"wanted one of {SOURCES} as the source, got {source!r}; choose one of them")


def _movielens(name: str, max_history: int) -> _Parts:
    interactions = movielens(name)
    count = np.bincount(interactions.user)
    repairs = dict(interactions.repairs)
    if (count < 3).any():
        repairs["users_without_test_row"] = int((count < 3).sum())
    return _Parts(
        item_id=interactions.item_id,
        title=interactions.title,
        splits=dict(zip(NAMES, leave_one_out(interactions, max_history), strict=True)),
        users=len(interactions.user_id),
        interactions=len(interactions.item),
        noun="movies",
        verb="watched",
        split="leave-one-out",
        repairs=repairs,
        notes=("every rating is an interaction, whatever its value",),
        citation=CITATION,
        raw_sha256=RELEASES[name].sha256,
    )


def _published(kind: str, folder: Path) -> _Parts:
    published = read_msl(folder) if kind == "msl" else read_d3(folder)
    noun, verb = _words(kind, folder, published)
    return _Parts(
        item_id=tuple(str(item) for item in published.titles.item_id),
        title=published.titles.title,
        splits=published.splits,
        users=published.users,
        interactions=published.interactions,
        noun=noun,
        verb=verb,
        split="published",
        repairs=published.repairs,
        notes=published.notes,
        citation=None,
        raw_sha256={str(file.relative_to(folder).as_posix()): sha256_file(file) for file in published.files},
    )


def _words(kind: str, folder: Path, published: Published) -> tuple[str, str]:
    """Noun and verb for prompts, by the name of the folder or else of its files."""
    words = _MSL_WORDS if kind == "msl" else _D3_WORDS
    for name in (folder.resolve().name.lower(), *(file.name.lower() for file in published.files)):
        for word, found in words.items():
            if word in name:
                return found
    return _UNKNOWN_WORDS


# --- writing ------------------------------------------------------------------------------------------------


def _check_place(out: Path) -> None:
    """Refuse to replace a folder that holds anything but a prepared data set."""
    if out.exists() and not out.is_dir():
        raise UserError(f"wanted a folder to write, {out} is a file; choose another --out")
    there = {path.name for path in out.iterdir()} if out.exists() else set()
    strange = sorted(there - {*FILES, "dataset.json"})
    if strange:
        raise UserError(
            f"wanted an empty or a prepared folder, {out} holds {strange[0]}; choose another --out"
        )


def _cut(split: Split, max_history: int) -> Split:
    return Split(split.user_id, split.history.last(max_history), split.target, split.timestamp, split.seen)


def _write(out: Path, catalog: Catalog, splits: dict[str, Split], info: dict[str, Any]) -> None:
    targets = np.bincount(splits["train"].target, minlength=catalog.n_items).astype(np.int32)
    tables = [catalog.to_frame(targets), *(splits[name].to_frame() for name in NAMES)]
    with atomic_folder(out) as folder:
        for name, table in zip(FILES, tables, strict=True):
            table.rechunk().write_parquet(folder / name, compression="zstd", row_group_size=_ROWS_IN_GROUP)
        hashes = {name: sha256_file(folder / name) for name in FILES}
        write_json(folder / "dataset.json", info | {"sha256": hashes})
