"""Prepared folders: one command turns any source into the same five files, and reading them back is checked.

A prepared folder holds ``catalog.parquet``, ``train.parquet``, ``valid.parquet``, ``test.parquet`` and
``dataset.json``. It is written beside its place and renamed when it is whole; the same input gives the same
bytes. Rows are written and read a part at a time, so that a data set may be larger than the memory.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from polars.io.plugins import register_io_source

from triewise.data.catalog import Catalog
from triewise.data.findings import Rows, count_findings
from triewise.data.sources import Prepared, read_source, settings_of
from triewise.data.splits import NAMES, Split
from triewise.errors import UserError
from triewise.files import atomic_folder, read_json, sha256_file, write_json
from triewise.locks import one_writer
from triewise.progress import note, progress

DATA_FORMAT = 1
FILES = ("catalog.parquet", *(f"{name}.parquet" for name in NAMES))
_KEYS = ("source", "settings", "noun", "verb", "counts", "repairs", "notes", "sha256")
_MANY_ROWS = 1 << 20  # from here on it takes long enough to say what is being done
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
            split = Split.from_frame(pl.read_parquet(self.folder / f"{name}.parquet"))
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


def prepare(
    source: str,
    out: Path,
    *,
    max_history: int = 20,
    clean: str = "none",
    k_core: int = 0,
    split: str = "leave-one-out",
) -> Dataset:
    """Read a source and write a prepared folder.

    Args:
        source: ``ml-100k``, ``ml-1m``, ``movielens:DIR``, ``recbole:DIR``, ``csv:DIR``, ``msl:DIR`` or ``d3:DIR``.
        out: Folder to write; may be absent, empty or an older prepared folder, which is replaced as a whole.
        max_history: Histories are cut to the last so many items; with ``"time-windows"`` also the length of a
            window.
        clean: How titles are cleaned; see :func:`triewise.data.catalog.clean_titles`.
        k_core: Users and items with fewer interactions are left out, again and again until none is left; 0 or 1
            keeps all. Not for published splits.
        split: ``"leave-one-out"``, ``"time-windows"`` or ``"time-growing"``; see
            :func:`triewise.data.splits.lazy_splits`. Published splits stay as they are.

    Returns:
        The data set in ``out``.

    Raises:
        UserError: Unknown source, bad setting, broken raw files, ``out`` holds something else.
    """
    out = Path(out)
    settings = settings_of(source, max_history=max_history, clean=clean, k_core=k_core, split=split)
    _check_place(out)
    with one_writer(out, beside=True):
        return _prepare(source, out, settings)


def _prepare(source: str, out: Path, settings: dict[str, Any]) -> Dataset:
    read = read_source(source, settings)
    empty = [name for name in NAMES if not read.splits[name].n_rows]
    if empty:
        raise UserError(
            f"wanted rows for train, valid and test from {source}, found none for {empty[0]}; use more data"
        )
    info = {"format": DATA_FORMAT, "source": source, "settings": settings, **_described(read)}
    try:
        info = _write(out, read.catalog, read.splits, info)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(f"cannot write {out}: {error}; choose another folder") from None
    return Dataset.in_folder(out, read.catalog, info)


def _described(read: Prepared) -> dict[str, Any]:
    """What ``dataset.json`` says of the data."""
    rows = {f"{name}_rows": read.splits[name].n_rows for name in NAMES}
    if sum(rows.values()) >= _MANY_ROWS:
        note(f"looking for leaks, cold targets and repeats in {sum(rows.values()):,} rows")
    findings = count_findings(read.splits, read.catalog, read.interactions)
    sizes = {"users": read.users, "items": read.catalog.n_items, "titles": read.catalog.n_titles}
    return {
        "noun": read.words[0],
        "verb": read.words[1],
        "counts": {**sizes, "interactions": read.n_interactions, **rows},
        "repairs": read.repairs,
        "lint": [asdict(finding) for finding in findings],
        "notes": list(read.notes),
        "citation": read.citation,
        "raw_sha256": read.raw_sha256,
    }


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
    catalog = Catalog.from_frame(pl.read_parquet(folder / FILES[0]))
    return Dataset.in_folder(folder, catalog, info)


def _check_table(folder: Path, name: str, hashes: Any) -> None:
    if not (folder / name).is_file():
        raise UserError(f"wanted {name} in the prepared folder {folder}, it is missing; prepare it again")
    if not isinstance(hashes, dict) or hashes.get(name) != sha256_file(folder / name):
        raise UserError(
            f"{folder / name} is not the file that was prepared (its sha256 differs); prepare it again"
        )


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


def _write(out: Path, catalog: Catalog, splits: Mapping[str, Rows], info: dict[str, Any]) -> dict[str, Any]:
    """Write all five files; gives back what ``dataset.json`` says."""
    targets = np.bincount(splits["train"].target, minlength=catalog.n_items).astype(np.int32)
    with atomic_folder(out) as folder:
        table = catalog.to_frame(targets)
        table.rechunk().write_parquet(folder / FILES[0], compression="zstd", row_group_size=_ROWS_IN_GROUP)
        n_rows = sum(rows.n_rows for rows in splits.values())
        quiet = contextlib.nullcontext(lambda _: None)
        with progress("writing", n_rows, "rows") if n_rows >= _MANY_ROWS else quiet as advance:
            for name in NAMES:
                _write_rows(folder / f"{name}.parquet", splits[name], advance)
        info = info | {"sha256": {name: sha256_file(folder / name) for name in FILES}}
        write_json(folder / "dataset.json", info, sealed=True)
    return info


def _write_rows(path: Path, rows: Rows, advance: Callable[[int], None]) -> None:
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
