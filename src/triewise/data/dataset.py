"""Prepared folders: one command turns any source into the same five files, and reading them back is checked.

A prepared folder holds ``catalog.parquet``, ``train.parquet``, ``valid.parquet``, ``test.parquet`` and
``dataset.json``. It is written beside its place and renamed when it is whole; the same input gives the same
bytes. Rows are written and read a part at a time, so that a data set may be larger than the memory.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from polars.io.plugins import register_io_source

from triewise.data.catalog import Catalog
from triewise.data.splits import NAMES, LazySplit, Split
from triewise.errors import UserError
from triewise.files import atomic_folder, read_json, scan, sha256_file, write_json
from triewise.progress import progress

DATA_FORMAT = 1
FILES = ("catalog.parquet", *(f"{name}.parquet" for name in NAMES))
_KEYS = ("source", "settings", "noun", "verb", "counts", "repairs", "notes", "sha256")
MANY_ROWS = 1 << 20  # from here on it takes long enough to say what is being done
_ROWS_IN_GROUP = 1 << 18  # fixed, so that the bytes of a file do not depend on the number of threads
_ROWS_TOGETHER = (1 << 20, 1 << 18)  # spelled out at a time, without and with all a user had before


@dataclass(frozen=True, eq=False)
class Dataset:
    """A prepared data set; the splits of one that lies in a folder are read when they are first asked for.

    Attributes:
        folder: Where it lies.
        catalog: The items.
        train: Training rows; ``valid`` and ``test`` are the other two splits.
        info: What ``dataset.json`` says: source, settings, noun, verb, counts, repairs, lint, notes, sha256, ...
    """

    folder: Path
    catalog: Catalog
    train: Split
    valid: Split
    test: Split
    info: dict[str, Any]

    @classmethod
    def in_folder(cls, folder: Path, catalog: Catalog, info: dict[str, Any]) -> Dataset:
        """The data set in a prepared folder, without its splits until one is asked for."""
        dataset = cls.__new__(cls)
        vars(dataset).update(folder=folder, catalog=catalog, info=info)
        return dataset

    if not TYPE_CHECKING:  # which knows the fields, and should not take every name for one

        def __getattr__(self, name: str) -> Split:
            """Read a split that is not there yet."""
            if name not in NAMES:
                raise AttributeError(f"a Dataset has no attribute {name!r}")
            # Checked again: the folder may have been prepared anew since it was opened.
            _check_table(self.folder, f"{name}.parquet", self.info["sha256"])
            split = Split.from_frame(scan(self.folder / f"{name}.parquet").collect())
            return vars(self).setdefault(name, split)

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
        history, user = self.train.history, pl.Series(self.train.user_id.tolist(), dtype=pl.String)
        first = np.where(user.is_null(), history.lengths == 1, user.is_first_distinct())
        before = history.take(np.flatnonzero(first)).values
        return self.train_targets + np.bincount(before, minlength=self.catalog.n_items)

    def __repr__(self) -> str:
        counts = self.info.get("counts", {})
        rows = "/".join(str(counts.get(f"{name}_rows", "?")) for name in NAMES)
        return f"Dataset({self.folder}, {self.catalog.n_items} items, {rows} rows)"


def data_hash(dataset: Dataset) -> str:
    """Hex SHA-256 over the hashes of a prepared folder's files."""
    files = dataset.info["sha256"]
    return hashlib.sha256("".join(f"{name}{files[name]}" for name in sorted(files)).encode()).hexdigest()


def load_dataset(folder: Path) -> Dataset:
    """Read a prepared folder; its splits are read when they are first asked for.

    Raises:
        UserError: If it is absent, of another format, or a file is missing or not the one that was written.
    """
    folder = Path(folder)
    if not (folder / "dataset.json").is_file():
        raise UserError(
            f"wanted a prepared folder, {folder} has no dataset.json; "
            f"run: triewise prepare SOURCE --out {folder}"
        )
    info = read_json(folder / "dataset.json")
    version = info.get("format") if isinstance(info, dict) else None
    if version != DATA_FORMAT:
        raise UserError(
            f"wanted a prepared folder of format {DATA_FORMAT}, {folder} has {version!r}; prepare it again"
        )
    absent = [name for name in _KEYS if name not in info]
    if absent:
        raise UserError(f"wanted {absent[0]!r} in {folder / 'dataset.json'}, it is missing; prepare it again")
    for name in FILES:
        _check_table(folder, name, info["sha256"])
    catalog = Catalog.from_frame(scan(folder / FILES[0]).collect())
    return Dataset.in_folder(folder, catalog, info)


def changed_raw_files(dataset: Dataset) -> list[str]:
    """Names of the raw files that are no longer those the folder was prepared from; none where theirs is not there."""
    folder = Path(dataset.info["source"].partition(":")[2])
    hashes: dict[str, str] = dataset.info.get("raw_sha256", {})
    if ":" not in dataset.info["source"] or not folder.is_dir():
        return []
    return [
        name
        for name, digest in hashes.items()
        if not (folder / name).is_file() or sha256_file(folder / name) != digest
    ]


def _check_table(folder: Path, name: str, hashes: Any) -> None:
    if not (folder / name).is_file():
        raise UserError(f"wanted {name} in the prepared folder {folder}, it is missing; prepare it again")
    if not isinstance(hashes, dict) or hashes.get(name) != sha256_file(folder / name):
        raise UserError(
            f"{folder / name} is not the file that was prepared (its sha256 differs); prepare it again"
        )


def check_place(out: Path) -> None:
    """Refuse to replace a folder that holds anything but a prepared data set."""
    if out.exists() and not out.is_dir():
        raise UserError(f"wanted a folder to write, {out} is a file; choose another --out")
    there = {path.name for path in out.iterdir()} if out.exists() else set()
    strange = sorted(there - {*FILES, "dataset.json"})
    if strange:
        raise UserError(
            f"wanted an empty or a prepared folder, {out} holds {strange[0]}; choose another --out"
        )


def write_dataset(
    out: Path, catalog: Catalog, splits: Mapping[str, Split | LazySplit], info: dict[str, Any]
) -> dict[str, Any]:
    """Write all five files; gives back what ``dataset.json`` says."""
    targets = np.bincount(splits["train"].target, minlength=catalog.n_items).astype(np.int32)
    with atomic_folder(out) as folder:
        table = catalog.to_frame(targets)
        table.rechunk().write_parquet(folder / FILES[0], compression="zstd", row_group_size=_ROWS_IN_GROUP)
        n_rows = sum(rows.n_rows for rows in splits.values())
        quiet = contextlib.nullcontext(lambda _: None)
        with progress("writing", n_rows, "rows") if n_rows >= MANY_ROWS else quiet as advance:
            for name in NAMES:
                _write_rows(folder / f"{name}.parquet", splits[name], advance)
        info = info | {"sha256": {name: sha256_file(folder / name) for name in FILES}}
        write_json(folder / "dataset.json", info, sealed=True)
    return info


def _write_rows(path: Path, rows: Split | LazySplit, advance: Callable[[int], None]) -> None:
    """Write a split a part at a time; parts are made when the writer asks for them."""
    schema = rows.frame(0, 0).schema
    together = _ROWS_TOGETHER["seen" in schema]

    def parts(*_: object) -> Iterator[pl.DataFrame]:
        for start in range(0, rows.n_rows, together):
            frame = rows.frame(start, min(start + together, rows.n_rows)).rechunk()
            yield frame
            advance(len(frame))

    frames = register_io_source(parts, schema=schema)
    frames.sink_parquet(path, compression="zstd", row_group_size=_ROWS_IN_GROUP)
