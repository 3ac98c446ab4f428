"""Raw files to columns. Everything that can be wrong with a file is said here, in one line.

Cells of published files are untrusted text. They are matched against a pattern and never evaluated; a title
such as ``None`` or ``NA`` is a title. A :class:`Table` is read when its columns are asked for, a piece at a
time, so that a file may be larger than the memory.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, SupportsInt

import numpy as np
import polars as pl
from numpy.typing import NDArray

from triewise.errors import UserError

ROW = "row number"  # column with the number of a data row: the first row after the header is 1
_INTEGER = r"^\s*-?[0-9]+(?:\.0*)?\s*$"
_NUMBER = r"^[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?$"
# A time without a zone is UTC.
_DATES = ("%+", "%Y-%m-%d", *(f"%Y-%m-%d{t}%H:%M:%S%.f{zone}" for zone in ("", "%#z") for t in " T"))
_CHUNK = 1 << 24  # bytes


def entries(folder: Path) -> list[Path]:
    """What is in a folder, sorted; one clear line when it is no folder."""
    if not folder.is_dir():
        state = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"wanted the folder {folder}, which {state}; check the path")
    return sorted(folder.iterdir())


def names(paths: Sequence[Path]) -> str:
    """Names of the first ten, for a message."""
    return ", ".join(path.name for path in paths[:10]) or "nothing"


def find_file(folder: Path, name: str) -> Path:
    """The file ``name`` or ``name.gz`` in ``folder``."""
    there = entries(folder)
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise UserError(f"wanted the file {name} in {folder}, found {names(there)}; add it")


def read_bytes(path: Path) -> bytes:
    """All bytes of a file, plain or gzip."""
    with reading(path), opened(path) as handle:
        return handle.read()


def read_text(path: Path) -> str:
    """The whole text of a UTF-8 file, plain or gzip."""
    check_text(path)
    return read_bytes(path).decode("utf-8-sig")


def check_text(path: Path) -> None:
    """Raise one clear line unless ``path`` is readable, not empty and UTF-8; gzip is unpacked on the way."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    done = line = 0
    try:
        with reading(path), opened(path) as handle:
            while chunk := handle.read(_CHUNK):
                decoder.decode(chunk)
                line += chunk.count(b"\n")
                done += len(chunk)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        line += error.object[: error.start].count(b"\n") + 1
        raise UserError(
            f"wanted UTF-8 text in {path}, got the byte 0x{error.object[error.start]:02x} in line {line}; "
            "save the file as UTF-8"
        ) from None
    if not done:
        raise UserError(f"wanted rows in {path}, which is empty; copy or download it again")


def counted(repairs: dict[str, int], name: str, count: SupportsInt) -> None:
    """Add to how often something was put right; what never was is not named."""
    if int(count):
        repairs[name] = repairs.get(name, 0) + int(count)


def shown(value: object) -> str:
    """A cell for a message: quoted, and cut where it is long."""
    text = repr(value)
    return text if len(text) <= 70 else f"{text[:67]}..."


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as handle:
        return path.suffix == ".gz" or handle.read(2) == b"\x1f\x8b"


def opened(path: Path) -> IO[bytes]:
    """The bytes of a file, unpacked."""
    return gzip.open(path) if _is_gzip(path) else path.open("rb")  # type: ignore[return-value]


def _unpacked(path: Path) -> Path | bytes:
    return read_bytes(path) if _is_gzip(path) else path


@contextlib.contextmanager
def reading(path: Path, kind: str = "CSV") -> Iterator[None]:
    """Make one line of what goes wrong with a file."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}; copy or download it again") from None
    except pl.exceptions.PolarsError as error:
        raise UserError(
            f"cannot read {path} as {kind}: {' '.join(str(error).split())[:200]}; repair or download it again"
        ) from None


def read_rows(
    path: Path, columns: Sequence[str], repairs: dict[str, int], optional: Sequence[str] = ()
) -> pl.DataFrame:
    """Some columns of a CSV file as text, with the number of each row.

    Args:
        path: A comma-separated UTF-8 file with a header, plain or gzip.
        columns: Names that must be there; a row in which one of them is empty is an error.
        repairs: Rows without any of the columns (blank lines) are left out and counted here, ``blank_rows``.
        optional: Names that may be there.

    Returns:
        :data:`ROW` and the columns found, all of type String.

    Raises:
        UserError: Unreadable file, other encoding, missing column, broken row, empty cell, no row at all.
    """
    check_text(path)
    source = _unpacked(path)
    with reading(path):
        header = pl.read_csv(source, n_rows=0, infer_schema=False).columns
        missing = [name for name in columns if name not in header]
        if missing:
            raise UserError(
                f"wanted the column {missing[0]} in {path}, found {', '.join(header)}; rename or add it"
            )
        wanted = [name for name in header if name in columns or name in optional]
        rows = pl.read_csv(source, columns=wanted, infer_schema=False, row_index_name=ROW, row_index_offset=1)
    blank = rows.select(pl.all_horizontal(pl.col(wanted).is_null())).to_series()
    counted(repairs, "blank_rows", blank.sum())
    rows = rows.filter(~blank)
    if rows.is_empty():
        raise UserError(f"wanted rows in {path}, found only a header; copy or download it again")
    for name in wanted:
        refuse(rows, rows[name].is_null() | (rows[name] == ""), name, path)
    return rows


def integers(rows: pl.DataFrame, column: str, path: Path) -> NDArray[np.int64]:
    """A column of whole numbers, int64 (R,)."""
    text = pl.col(column).str.strip_chars().str.replace(r"\.0*$", "")
    whole = pl.when(pl.col(column).str.contains(_INTEGER)).then(text)
    values = rows.select(whole.cast(pl.Int64, strict=False)).to_series()
    refuse(rows, values.is_null(), column, path, "a whole number")
    return values.to_numpy(writable=True)


def refuse(rows: pl.DataFrame, bad: pl.Series, column: str, path: Path, wanted: str = "a value") -> None:
    """Raise one line for the first row in which ``bad`` is true; ``rows`` lacks a column only where cells are empty."""
    if bad.any():
        first = rows.row(int(bad.arg_true()[0]), named=True)
        cell = first.get(column)
        got = "an empty cell; fill it in" if cell in (None, "") else f"{shown(cell)}; repair the cell"
        raise UserError(f"{path}, row {first[ROW]}: wanted {wanted} in column {column}, got {got}")


@dataclass(frozen=True, eq=False)
class Table:
    """A file with named columns, read when they are asked for.

    Attributes:
        path: The file.
        kind: ``"CSV"`` (any text with separators) or ``"Parquet"``, for messages.
        rows: The rows in the order of the file; cells of text files are strings.
        columns: Type of each column.
    """

    path: Path
    kind: str
    rows: pl.LazyFrame = field(repr=False)
    columns: dict[str, pl.DataType] = field(repr=False)

    def collect(self, *columns: pl.Expr) -> pl.DataFrame:
        """Some columns, in the order of the file."""
        with reading(self.path, self.kind):
            return self.rows.select(columns).collect(engine="streaming")

    def check(self, *read: str) -> None:
        """Check what reading some columns would not show.

        Args:
            read: The columns that will be read.

        Raises:
            UserError: If the bytes, the encoding or the number of fields of a row are not as they must be, or
                there is no row.
        """
        if self.kind != "Parquet":
            check_text(self.path)
            if set(self.columns) - set(read):  # a row with too many fields shows when all columns are read
                self.collect(pl.all().null_count())
        if not self.collect(pl.len()).item():
            raise UserError(f"wanted rows in {self.path}, found only a header; copy or download it again")

    def named(self, known: Sequence[str]) -> list[str]:
        """Columns whose name is among the known ones, case aside."""
        return [column for column in self.columns if column.lower() in known]

    def one(self, known: Sequence[str], what: str) -> str:
        """The one column whose name is among the known ones.

        Raises:
            UserError: If there is none, or more than one.
        """
        columns = self.named(known)
        if len(columns) == 1:
            return columns[0]
        if columns:
            raise UserError(
                f"wanted one column for the {what} in {self.path}, found {', '.join(columns)}; "
                "rename those that are not meant"
            )
        raise UserError(
            f"wanted a column for the {what} ({' or '.join(known)}) in {self.path}, "
            f"found {', '.join(self.columns)}; rename or add it"
        )

    def ids(self, column: str) -> pl.Expr:
        """A column of raw ids as text; empty cells are null."""
        kind, cell = self.columns[column], pl.col(column)
        if kind == pl.String:
            return pl.when(cell != "").then(cell)
        if kind.is_integer() or kind in (pl.Categorical, pl.Enum):
            return cell.cast(pl.String)
        raise UserError(
            f"wanted text or whole numbers in column {column} of {self.path}, got {kind}; store ids as text"
        )

    def seconds(self, column: str) -> pl.Expr:
        """A column of times as numbers, float64; null where a cell holds none. ISO dates become Unix seconds.

        The first cell decides whether a column of text holds numbers or dates, and in which form. A date
        without a zone is UTC, whatever the zone of this computer.
        """
        kind, cell = self.columns[column], pl.col(column)
        if kind.is_numeric():
            return cell.cast(pl.Float64)
        if kind in (pl.Date, pl.Datetime):
            return cell.cast(pl.Datetime("ms")).dt.timestamp("ms").cast(pl.Float64) / 1000
        if kind != pl.String:
            raise UserError(
                f"wanted times in column {column} of {self.path}, got {kind}; store Unix seconds or ISO dates"
            )
        text = cell.str.strip_chars()
        first = self.rows.select(text).filter(pl.col(column) != "").head(1)
        with reading(self.path, self.kind):
            example = first.collect(engine="streaming").to_series()
        if len(example) and not example.str.contains(_NUMBER)[0]:
            for form in _DATES:
                dates = text.str.to_datetime(form, strict=False, time_unit="ms", time_zone="UTC")
                if example.to_frame().select(dates)[column][0] is not None:
                    return dates.dt.timestamp("ms").cast(pl.Float64) / 1000
        return text.cast(pl.Float64, strict=False)

    def refuse(self, column: str, row: int, wanted: str) -> None:
        """Raise one line about a cell; rows count from 1."""
        cell = self.rows.select(pl.lit(row).alias(ROW), column).slice(row - 1, 1).collect(engine="streaming")
        refuse(cell, pl.Series([True]), column, self.path, wanted)


def open_table(
    path: Path, *, separator: str = ",", quote: str | None = '"', header: Sequence[str] | None = None
) -> Table:
    """A Parquet file (by its name), or text with separators, plain or gzip; only its header is read.

    Args:
        path: The file.
        separator: One character.
        quote: What surrounds cells that hold a separator; None where nothing does.
        header: Names of the columns of a file whose first line does not hold them.

    Raises:
        UserError: If the file is empty or cannot be read, or has other columns than ``header``.
    """
    if path.suffix == ".parquet":
        with reading(path, "Parquet"):
            rows = pl.scan_parquet(path)
            return Table(path, "Parquet", rows, dict(rows.collect_schema()))
    with reading(path):
        source = _unpacked(path)
        if not (source if isinstance(source, bytes) else path.stat().st_size):
            raise UserError(f"wanted rows in {path}, which is empty; copy or download it again")
        rows = pl.scan_csv(
            source, separator=separator, quote_char=quote, has_header=header is None, infer_schema=False
        )
        columns = dict(rows.collect_schema())
    if header is not None:
        if len(columns) != len(header):
            raise UserError(
                f"wanted {', '.join(filter(None, header))} in each row of {path}, found {len(columns)} columns; "
                "download it again"
            )
        rows = rows.select(pl.col(c).alias(name) for c, name in zip(columns, header, strict=True) if name)
        columns = dict.fromkeys(filter(None, header), pl.String())
    return Table(path, "CSV", rows, columns)
