"""The bytes of raw text files: packed or plain, in whatever encoding, with quotes as they should be or not.

What polars reads exactly as Python's ``csv`` module would goes to polars; :func:`survey` finds out in one pass over
the bytes. The rest is read by that module, and what it cannot read either is one line that names the place.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import polars as pl

from triewise.errors import UserError
from triewise.files import decoded, scan

PACKED = (".gz", ".bz2", ".zst", ".zip")
BROKEN = (OSError, EOFError, zlib.error, zipfile.BadZipFile, RuntimeError, pl.exceptions.PolarsError)
_CHUNK = 1 << 24  # bytes
_HEAD = 1 << 16
_QUOTE, _LF, _CR = b'"\n\r'


def bare_name(path: Path) -> str:
    """Name in small letters, without the end that says how the file is packed."""
    name = path.name.lower()
    return name.removesuffix(next((end for end in PACKED if name.endswith(end)), ""))


@contextmanager
def reading(path: Path, kind: str = "CSV") -> Iterator[None]:
    """Make one line of what goes wrong with a file."""
    try:
        yield
    except pl.exceptions.PolarsError as error:
        raise UserError(
            f"cannot read {path} as {kind}: {' '.join(str(error).split())[:200]}; repair or download it again"
        ) from None
    except BROKEN as error:
        raise UserError(f"cannot read {path}: {error}; copy or download it again") from None


def is_packed(path: Path) -> bool:
    """Whether a file is packed, by its name or its first bytes."""
    with path.open("rb") as handle:
        return path.name.lower().endswith(PACKED) or handle.read(2) == b"\x1f\x8b"


def opened(path: Path) -> IO[bytes]:
    """The bytes of a file, unpacked."""
    if not is_packed(path):
        return path.open("rb")
    match path.suffix.lower():
        case ".bz2":
            return bz2.open(path)
        case ".zst":  # which Python reads from 3.14 on
            lines = scan(path, "lines").collect().to_series()
            return io.BytesIO("\n".join([*lines.to_list(), ""]).encode())
        case ".zip":
            return _only_member(path)
    return gzip.open(path)  # type: ignore[return-value]


def _only_member(path: Path) -> IO[bytes]:
    archive = zipfile.ZipFile(path)
    inside = [
        name
        for name in archive.namelist()
        if not name.endswith("/") and not any(part.startswith((".", "__MACOSX")) for part in name.split("/"))
    ]
    if len(inside) != 1:
        raise UserError(
            f"wanted one file in {path}, found {', '.join(inside[:10]) or 'nothing'}; unpack it and give the folder"
        )
    return archive.open(inside[0])


def read_bytes(path: Path) -> bytes:
    """All bytes of a file, unpacked."""
    with reading(path), opened(path) as handle:
        return handle.read()


def read_text(path: Path) -> str:
    """The whole text of a file, unpacked; see `triewise.files.decoded`."""
    text = decoded(read_bytes(path))
    if not text:
        raise UserError(f"wanted rows in {path}, which is empty; copy or download it again")
    return text


def head_of(path: Path) -> str:
    """The first 64 KB of a file as text, without a line that is cut off."""
    with reading(path), opened(path) as handle:
        head = handle.read(_HEAD)
        whole = not handle.read(1)
    if not head:
        raise UserError(f"wanted rows in {path}, which is empty; copy or download it again")
    if not whole and b"\n" in head and head[:2] not in (b"\xff\xfe", b"\xfe\xff"):
        head = head[: head.rindex(b"\n") + 1]
    return decoded(head)


@dataclass(frozen=True)
class Survey:
    """What a pass over the bytes of a text file showed.

    Attributes:
        utf8: Whether it is UTF-8 without zero bytes.
        quoted: Whether a double quote occurs.
        regular: Whether double quotes only surround whole cells and are doubled inside them, and lines end with LF
            or CRLF: then polars reads the file as Python's csv module does.
    """

    utf8: bool
    quoted: bool
    regular: bool


def survey(handle: IO[bytes], separator: str) -> Survey:
    """Look through all bytes, a part at a time.

    The k-th double quote opens a cell where k is even, and closes it where k is odd. Quotes are regular when each that
    opens stands behind a separator, the end of a line or a quote, and each that closes before one of these.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    around = np.array([ord(separator), _LF, _CR, _QUOTE], dtype=np.uint8)
    utf8 = regular = True
    n_quotes = 0
    before, chunk = b"\n", handle.read(_CHUNK).removeprefix(codecs.BOM_UTF8)
    while chunk:
        following = handle.read(_CHUNK)
        try:
            decoder.decode(chunk, final=not following)
        except UnicodeDecodeError:
            utf8 = False
            break
        utf8 = utf8 and 0 not in chunk
        padded = before + chunk + (following[:1] or b"\n")
        if regular and b'"' in chunk:
            data = np.frombuffer(padded, dtype=np.uint8)
            place = np.flatnonzero(data[1:-1] == _QUOTE) + 1
            opens = (n_quotes + np.arange(len(place))) % 2 == 0
            n_quotes += len(place)
            regular = bool(np.isin(data[place + np.where(opens, -1, 1)], around).all())
        if regular and b"\r" in chunk:
            regular = padded[1:].count(b"\r\n") == chunk.count(b"\r")
        before, chunk = chunk[-1:], following
    return Survey(utf8, n_quotes > 0, regular and n_quotes % 2 == 0)


def csv_rows(
    text: str, separator: str, quote: str | None, path: Path, spaced: bool = False
) -> Iterator[tuple[int, list[str]]]:
    """Rows as Python's csv module reads them, each with the number of its first line; blank lines are rows of none.

    A quote inside a cell that no quote opens stands for itself (``14" screen``). A backslash before a quote is
    taken off where that makes the file readable.

    Raises:
        UserError: A cell whose quotes fit neither way; names the line.
    """
    csv.field_size_limit(1 << 30)
    plain = {
        "delimiter": separator,
        "quoting": csv.QUOTE_MINIMAL if quote else csv.QUOTE_NONE,
        "strict": True,
    }
    try:
        for _ in csv.reader(io.StringIO(text, newline=""), **plain):  # type: ignore[arg-type]
            pass
    except csv.Error:
        if '\\"' in text:  # other backslashes stay
            text = re.sub(r'\\(?!")', r"\\\\", text)
            plain |= {"escapechar": "\\", "doublequote": False}
    reader, line = csv.reader(io.StringIO(text, newline=""), **plain), 1  # type: ignore[arg-type]
    try:
        for cells in reader:
            yield line, cells
            line = reader.line_num + 1
    except csv.Error:
        shown = text.splitlines()[line - 1][:70]
        raise UserError(
            f"{path}, line {line}: wanted quotes around whole cells and doubled inside them, got {shown!r}; "
            "repair the line"
        ) from None


def first_records(head: str, separator: str) -> list[list[str]]:
    """The first two records of some text."""
    found: list[list[str]] = []
    try:
        for cells in csv.reader(io.StringIO(head, newline=""), delimiter=separator):
            found += [cells] if cells else []
            if len(found) == 2:
                break
    except csv.Error:
        pass
    return found or [[]]


def json_problem(line: str) -> str | None:
    """What is wrong with a line that should be a JSON object."""
    try:
        return None if isinstance(json.loads(line), dict) else "no object"
    except json.JSONDecodeError as error:
        return str(error)


def json_records(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON array."""
    try:
        records = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(
            f"wanted a JSON array or JSON lines in {path}, got {error}; repair the file"
        ) from None
    return [record for record in records if isinstance(record, dict)]


def json_cell(value: Any) -> str | None:
    """A value of a JSON object as text; nested ones as JSON."""
    return value if value is None or isinstance(value, str) else json.dumps(value)


def shown(value: object) -> str:
    """A cell for a message: quoted, and cut where it is long."""
    text = repr(value)
    return text if len(text) <= 70 else f"{text[:67]}..."


def refuse_long(path: Path, line: int, cells: Sequence[str], width: int) -> None:
    """Raise one line where a row has more cells than there are columns."""
    if len(cells) > width:
        raise UserError(
            f"{path}, line {line}: wanted {width} cells, got {len(cells)}, the last {shown(cells[-1])}; put a cell "
            "that holds the separator in quotes, or leave such rows out with --bad-rows drop"
        )


def refuse_broken_json(path: Path) -> None:
    """Raise one line for the first line of a file that is no JSON object; blank ones aside."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        problem = json_problem(line) if line.strip() else None
        if problem is not None:
            raise UserError(
                f"{path}, line {number}: wanted a JSON object, got {shown(line)} ({problem}); repair the line, or "
                "leave such rows out with --bad-rows drop"
            )
