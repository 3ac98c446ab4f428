"""Files with one record a line: JSON, or the Python literals in which parts of the Amazon and Steam dumps came.

A file is read a piece at a time, also out of gzip, and only the keys that are asked for are kept. Literals are parsed
by `ast.literal_eval`, which runs nothing.
"""

from __future__ import annotations

import ast
import contextlib
import json
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import polars as pl

from triewise.data.tables import Table, bare_name, entries, opened, reading, shown
from triewise.errors import UserError
from triewise.files import scan
from triewise.progress import progress

ENDS = (".json", ".jsonl", ".ndjson")
_PIECE = 1 << 25  # bytes, read together
_LARGE = 1 << 27  # bytes of a file; reading more takes long enough to say how far it is
_BROKEN = (ValueError, TypeError, SyntaxError, RecursionError, MemoryError)


def files_with(folder: Path, *ends: str) -> list[Path]:
    """The files of a folder whose names, unpacked and in small letters, have one of these ends; no hidden ones."""
    there = (path for path in entries(folder) if path.is_file() and not path.name.startswith("."))
    return [path for path in there if bare_name(path).endswith(ends)]


def record_table(path: Path, *keys: str) -> Table:
    """Some keys of every record, as text and in the order of the file; null where a record lacks one.

    Raises:
        UserError: A line that is no record, or a value that is neither text nor a number; names the line. Or there is
            no record.
    """
    schema = dict.fromkeys(keys, pl.String())
    n_lines = 0
    frames = [pl.DataFrame(schema=schema)]
    for piece in _pieces(path):
        try:
            frame = scan(piece, "json", schema=schema).collect()
        except pl.exceptions.PolarsError:  # literals, NaN, or a broken line
            with _unwarned():
                frame = _one_by_one(piece, schema, path, n_lines)
        frames.append(frame)
        n_lines += piece.count(b"\n")
    records = pl.concat(frames)
    if records.is_empty():
        raise UserError(f"wanted a record on each line of {path}, found none; copy or download it again")
    return Table(path, "records", records.lazy(), dict(records.schema))


def keys_of(path: Path, n: int = 100) -> frozenset[str]:
    """The keys of the first records of a file; those of fewer where what follows is none."""
    keys: set[str] = set()
    with reading(path, "records"), opened(path) as handle, _unwarned(), contextlib.suppress(*_BROKEN):
        for line in islice(handle, n):
            keys.update(_record(line) if line.strip() else ())
    return frozenset(keys)


def _record(line: bytes) -> dict[str, Any]:
    """A line as an object: JSON, or else a Python literal, whose texts mostly stand in single quotes."""
    text = line.decode("utf-8-sig").strip()
    record = None
    if text[:9].replace(" ", "").startswith('{"'):
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(text)
    record = ast.literal_eval(text) if record is None else record
    if not isinstance(record, dict):
        raise TypeError("no object")
    return record


@contextlib.contextmanager
def _unwarned() -> Iterator[None]:
    """A literal may hold a backslash that escapes nothing, of which Python warns; it is read as it stands."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _pieces(path: Path) -> Iterator[bytes]:
    """The file in pieces of whole lines; says how far it is, in megabytes of the file as it lies there."""
    size, rest, done = path.stat().st_size, b"", 0
    loud = progress(f"reading {path.name}", size >> 20, "MB") if size > _LARGE else None
    with reading(path, "records"), opened(path) as handle, loud or contextlib.nullcontext() as advance:
        while piece := handle.read(_PIECE):
            end = piece.rfind(b"\n") + 1
            if end:
                yield rest + piece[:end]
            rest = piece[end:] if end else rest + piece
            if advance is not None:
                at = getattr(handle, "fileobj", handle).tell() >> 20
                advance(at - done)
                done = at
    if rest.strip():
        yield rest


def _one_by_one(piece: bytes, schema: dict[str, pl.String], path: Path, n_before: int) -> pl.DataFrame:
    """The records of a piece, a line at a time."""
    columns: dict[str, list[str | None]] = {key: [] for key in schema}
    for number, line in enumerate(piece.split(b"\n"), start=n_before + 1):
        if not line.strip():
            continue
        try:
            record = _record(line)
        except _BROKEN:
            raise UserError(
                f"{path}, line {number}: wanted a JSON object or a Python literal such as {{'asin': 'B01'}}, got "
                f"{shown(line.decode(errors='replace'))}; repair the line or download the file again"
            ) from None
        for key in schema:
            columns[key].append(
                _text(record.get(key), f"{path}, line {number}: wanted text or a number as {key}")
            )
    return pl.DataFrame(columns, schema=schema)


def _text(value: Any, place: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return None if value != value else str(value)
    raise UserError(f"{place}, got {shown(value)}; repair the line")
