"""Raw files to columns. Everything that can be wrong with a file is said here, in one line.

Cells of published files are untrusted text. They are matched against a pattern and never evaluated; a title
such as ``None`` or ``NA`` is a title. A :class:`Table` is read when its columns are asked for, a piece at a
time, so that a file may be larger than the memory.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, SupportsInt

import numpy as np
import polars as pl
from numpy.typing import NDArray

from triewise.data.columns import ROLES, folded
from triewise.data.textfiles import (
    PACKED as PACKED,
    bare_name as bare_name,
    csv_rows,
    first_records,
    head_of,
    is_packed,
    json_cell,
    json_problem,
    json_records,
    opened as opened,
    read_bytes as read_bytes,
    read_text as read_text,
    reading as reading,
    refuse_broken_json,
    refuse_long,
    shown as shown,
    survey,
)
from triewise.data.times import DATES, Times, from_dates, from_numbers, read_dates
from triewise.errors import UserError
from triewise.files import decoded, scan

ROW = "row number"  # column with the number of a data row: the first row after the header is 1
PART = "part of the split"  # column with the number of the split that a file holds
_INTEGER = r"^\s*-?[0-9]+(?:\.0*)?\s*$"
_NUMBER = r"^[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?$"
_JSON = (".jsonl", ".ndjson", ".json")
_SEPARATORS = ",\t;|"
SEPARATOR_NAMES = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars", " ": "spaces"}


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
    """The file ``name``, packed or not, in ``folder``; the case of letters does not matter."""
    there = entries(folder)
    for path in (folder / name, *there):
        if path.is_file() and not path.name.startswith(".") and bare_name(path) == name.lower():
            return path
    raise UserError(f"wanted the file {name} in {folder}, found {names(there)}; add it")


def counted(repairs: dict[str, int], name: str, count: SupportsInt) -> None:
    """Add to how often something was put right; what never was is not named."""
    if int(count):
        repairs[name] = repairs.get(name, 0) + int(count)


def read_rows(
    path: Path,
    columns: Sequence[str],
    repairs: dict[str, int],
    optional: Sequence[str] = (),
    loose: Sequence[str] = (),
) -> pl.DataFrame:
    """Some columns of a CSV file as text, with the number of each row.

    Args:
        path: A comma-separated file with a header, packed or not.
        columns: Names that must be there; a row in which one of them is empty is an error.
        repairs: Rows without any of the columns (blank lines) are left out and counted here, ``blank_rows``.
        optional: Names that may be there.
        loose: Names that may be there, and cells that may be empty.

    Returns:
        :data:`ROW` and the columns found, all of type String.

    Raises:
        UserError: Unreadable file, missing column, broken row, empty cell, no row at all.
    """
    table = open_table(path)
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise UserError(
            f"wanted the column {missing[0]} in {path}, found {', '.join(table.columns)}; rename or add it"
        )
    wanted = [name for name in table.columns if name in (*columns, *optional, *loose)]
    table.check(*wanted)
    rows = table.collect(*map(pl.col, wanted)).with_row_index(ROW, offset=1)
    blank = rows.select(pl.all_horizontal(pl.col(wanted).is_null())).to_series()
    counted(repairs, "blank_rows", blank.sum())
    rows = rows.filter(~blank)
    if rows.is_empty():
        raise UserError(f"wanted rows in {path}, found only a header; copy or download it again")
    for name in (name for name in wanted if name not in loose):
        refuse(rows, rows[name].is_null() | (rows[name] == ""), name, path)
    return rows


def integers(rows: pl.DataFrame, column: str, path: Path) -> NDArray[np.int64]:
    """A column of whole numbers, int64 (R,)."""
    text = pl.col(column).str.strip_chars().str.replace(r"\.0*$", "")
    whole = pl.when(pl.col(column).str.contains(_INTEGER)).then(text)
    values = rows.select(whole.cast(pl.Int64, strict=False)).to_series()
    refuse(rows, values.is_null(), column, path, "a whole number")
    return values.to_numpy(writable=True)


def seconds(rows: pl.DataFrame, column: str, path: Path, repairs: dict[str, int]) -> NDArray[np.int64]:
    """A column of times in whole numbers as Unix seconds, int64 (R,); counts other units, see `triewise.data.times`."""
    found = from_numbers(integers(rows, column, path))
    for name, count in found.units.items():
        counted(repairs, name, count)
    return found.second


def refuse(rows: pl.DataFrame, bad: pl.Series, column: str, path: Path, wanted: str = "a value") -> None:
    """Raise one line for the first row in which ``bad`` is true; ``rows`` lacks a column only where cells are empty."""
    if bad.any():
        first = rows.row(int(bad.arg_true()[0]), named=True)
        cell = first.get(column)
        got = "an empty cell; fill it in" if cell in (None, "") else f"{shown(cell)}; repair the cell"
        raise UserError(f"{path}, row {first[ROW]}: wanted {wanted} in column {column}, got {got}")


@dataclass(frozen=True)
class Outline:
    """What the first bytes of a file say of its columns.

    Attributes:
        path: The file; a folder where files in it are one table.
        kind: ``"CSV"`` (any text with separators), ``"JSON"``, ``"JSON lines"`` or ``"Parquet"``.
        columns: Their names, in order.
        separator: Between cells of text.
        first: The first cells below the header, for messages.
        spaced: Whether each separator of the header has a space behind it, which is no part of a cell.
        shards: The files of text that are one table.
    """

    path: Path
    kind: str
    columns: tuple[str, ...]
    separator: str = ","
    first: tuple[str, ...] = ()
    spaced: bool = False
    shards: tuple[Outline, ...] = ()


@dataclass(frozen=True, eq=False)
class Table:
    """Rows with named columns, read when they are asked for.

    Attributes:
        path: The file; of several, the folder.
        kind: As in `Outline`.
        rows: The rows in the order of the file; cells of text files are strings.
        columns: Type of each column.
        parts: The tables it is made of, where it is of several files.
        notes: What was odd with the file and how it was read.
        separator: As in `Outline`.
    """

    path: Path
    kind: str
    rows: pl.LazyFrame = field(repr=False)
    columns: dict[str, pl.DataType] = field(repr=False)
    parts: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    separator: str = ","

    def collect(self, *columns: pl.Expr) -> pl.DataFrame:
        """Some columns, in the order of the file."""
        return self.frame(self.rows.select(columns))

    def frame(self, rows: pl.LazyFrame) -> pl.DataFrame:
        """What was asked of :attr:`rows`, a piece of the file at a time."""
        try:
            return rows.collect(engine="streaming")
        except pl.exceptions.PolarsError:
            for part in self.parts or (self,):
                _refuse_broken_row(part)
            with reading(self.path, self.kind):
                raise

    def check(self, *read: str) -> None:
        """Check what reading some columns would not show.

        Args:
            read: The columns that will be read.

        Raises:
            UserError: If the number of cells of a row is not as it must be, or there is no row.
        """
        for part in self.parts or (self,):
            if part.kind == "CSV" and set(part.columns) - set(read):  # a row with too many cells shows
                part.collect(pl.all().null_count())  # when all columns are read
            if not part.collect(pl.len()).item():
                raise UserError(f"wanted rows in {part.path}, found only a header; copy or download it again")

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

    def numbers(self, column: str) -> pl.Expr:
        """A column of numbers, float64; null where a cell holds none."""
        return pl.col(column).cast(pl.Float64, strict=False)

    def times(self, column: str) -> tuple[pl.Expr, Callable[[pl.Series], Times]]:
        """What to collect of a column of times, and what makes times of that; see `triewise.data.times`.

        The first cell decides whether a column of text holds numbers or dates, and in which form; where some cells
        have another form of date, that is tried too. A date without a zone is UTC, whatever the zone of this computer.
        """
        kind, cell = self.columns[column], pl.col(column)
        if kind.is_integer():
            return cell.cast(pl.Int64, strict=False), _of_numbers
        if kind.is_numeric():
            return cell.cast(pl.Float64), _of_numbers
        if isinstance(kind, pl.Date | pl.Datetime):
            unit: Literal["ns", "us"] = "ns" if getattr(kind, "time_unit", "us") == "ns" else "us"
            dates = cell if unit == "ns" else cell.cast(pl.Datetime("us"))
            return dates.dt.timestamp(unit), lambda value: from_dates(value, {"us": 10**6, "ns": 10**9}[unit])
        if kind != pl.String:
            raise UserError(
                f"wanted times in column {column} of {self.path}, got {kind}; store Unix seconds or ISO dates"
            )
        text = cell.str.strip_chars()
        first = self.frame(self.rows.select(text.alias("first")).filter(pl.col("first") != "").head(1))
        form = None
        if len(first) and not first["first"].str.contains(_NUMBER)[0]:
            forms = (f for f in DATES if first.select(read_dates(pl.col("first"), f)).item() is not None)
            form = next(forms, None)

        def of_dates(value: pl.Series) -> Times:
            if value.null_count():
                value = self.collect(
                    pl.coalesce(*(read_dates(text, f) for f in (form, *DATES) if f))
                ).to_series()
            return from_dates(value, 10**6)

        def of_text(value: pl.Series) -> Times:
            if value.null_count():
                floats = self.collect(text.cast(pl.Float64, strict=False)).to_series()
                value = floats if floats.null_count() < value.null_count() else value
            return _of_numbers(value)

        return (
            (text.cast(pl.Int64, strict=False), of_text)
            if form is None
            else (read_dates(text, form), of_dates)
        )

    def refuse(self, column: str, row: int, wanted: str = "a value", hint: str = "") -> None:
        """Raise one line about a cell; rows count from 1 and, of several files, through all of them."""
        for part in self.parts:
            n_rows = part.collect(pl.len()).item()
            if row <= n_rows:
                return part.refuse(column, row, wanted, hint)
            row -= n_rows
        cell = self.frame(self.rows.select(column).slice(row - 1, 1))[column][0]
        got = "an empty cell; fill it in" if cell in (None, "") else f"{shown(cell)}; repair the cell"
        raise UserError(f"{self.path}, row {row}: wanted {wanted} in column {column}, got {got}{hint}")


def _of_numbers(value: pl.Series) -> Times:
    """Times of whole or other numbers; null where a cell holds none."""
    if value.dtype == pl.Float64:
        return from_numbers(value.fill_null(np.nan).to_numpy())
    missing = value.is_null().to_numpy()
    if not missing.any():
        return from_numbers(value.to_numpy())
    found = from_numbers(value.drop_nulls().to_numpy())
    place = np.maximum(np.cumsum(~missing) - 1, 0)
    nano = None if found.nanosecond is None else found.nanosecond[place]
    return (
        replace(found, second=found.second[place], nanosecond=nano, bad=missing | found.bad[place])
        if len(found.second)
        else Times(np.zeros(len(value), dtype=np.int64), None, missing, {}, 0)
    )


def outline(path: Path, separators: str = _SEPARATORS) -> Outline:
    """Look at the first bytes of a file, or at the Parquet files in a folder.

    Args:
        path: The file or the folder.
        separators: What may stand between the cells of text: the one under which most known names of columns appear
            counts, then the one that makes most columns.

    Raises:
        UserError: If the file is empty or cannot be read.
    """
    if path.is_dir() or bare_name(path).endswith((".parquet", ".pq")):
        with reading(path, "Parquet"):
            return Outline(path, "Parquet", tuple(_parquet(path).collect_schema()))
    head = head_of(path)
    start = head.lstrip()[:1]
    if bare_name(path).endswith(_JSON) or start == "{":
        if start == "[":
            records = json_records(path)
            return Outline(path, "JSON", tuple(dict.fromkeys(key for record in records for key in record)))
        keys: dict[str, None] = {}
        for line in head.splitlines()[:1000]:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            keys |= dict.fromkeys(record) if isinstance(record, dict) else {}
        return Outline(path, "JSON lines", tuple(keys))
    known = {name for role in ROLES.values() for name in role}
    if bare_name(path).endswith(".tsv"):
        separators = "\t" + separators.replace("\t", "")

    def worth(separator: str) -> tuple[int, int]:
        header = first_records(head, separator)[0]
        return sum(folded(cell.partition(":")[0]) in known for cell in header), len(header)

    separator = max(separators, key=worth)
    header, *below = [*first_records(head, separator), []][:2]
    if not header:
        raise UserError(f"wanted rows in {path}, which is empty; copy or download it again")
    columns = tuple(cell.strip() or f"column {number}" for number, cell in enumerate(header, start=1))
    spaced = len(header) > 1 and separator != " " and all(cell.startswith(" ") for cell in header[1:])
    return Outline(path, "CSV", columns, separator, tuple(below[0]), spaced)


def open_table(
    path: Path,
    *,
    separator: str | None = ",",
    quote: str | None = '"',
    header: Sequence[str] | None = None,
) -> Table:
    """A Parquet file (by its name), JSON lines, or text with separators, packed or not.

    Args:
        path: The file.
        separator: One character; None: the one that its header has.
        quote: What surrounds cells that hold a separator; None where nothing does.
        header: Names of the columns of a file whose first line does not hold them.

    Raises:
        UserError: If the file is empty or cannot be read, or has other columns than ``header``.
    """
    made = outline(path, separator or _SEPARATORS)
    if header is None:
        return load(made, quote)
    if len(made.columns) != len(header):
        raise UserError(
            f"wanted {', '.join(filter(None, header))} in each row of {path}, found {len(made.columns)} columns; "
            "download it again"
        )
    unique = [name or f"column {number}" for number, name in enumerate(header)]
    return _csv_table(Outline(path, "CSV", tuple(unique), made.separator), quote, headed=False)


def load(made: Outline, quote: str | None = '"', *, drop: dict[str, int] | None = None) -> Table:
    """The table of an outline; text is looked through once, see `triewise.data.textfiles`.

    Args:
        made: From :func:`outline`.
        quote: As in :func:`open_table`.
        drop: Rows that cannot be read, with too many cells or no JSON, are left out and counted here,
            ``broken_rows``; None: they are errors.
    """
    path = made.path
    if len(set(made.columns)) < len(made.columns):
        raise UserError(
            f"wanted each column once in {path}, found {', '.join(made.columns)}; rename one of the two"
        )
    if made.kind == "Parquet":
        rows = _parquet(path)
        return Table(path, made.kind, rows, dict(rows.collect_schema()))
    text = dict.fromkeys(made.columns, pl.String())
    if made.kind == "JSON":
        cells = (
            {name: json_cell(record.get(name)) for name in made.columns} for record in json_records(path)
        )
        return Table(path, made.kind, pl.LazyFrame(list(cells), schema=text), dict(text))
    return _csv_table(made, quote, drop=drop) if made.kind == "CSV" else _json_table(made, drop)


def _parquet(path: Path) -> pl.LazyFrame:
    """A Parquet file, or those in a folder; names of folders such as ``year=2020`` are a column."""
    if not path.is_dir():
        return scan(path)
    shards = sorted(
        shard
        for shard in path.rglob("*")
        if shard.is_file() and bare_name(shard).endswith((".parquet", ".pq"))
    )
    inside = {folder for shard in shards for folder in shard.relative_to(path).parts[:-1]}
    return scan(shards, hive_partitioning=any("=" in folder for folder in inside))


def _csv_table(
    made: Outline, quote: str | None, headed: bool = True, drop: dict[str, int] | None = None
) -> Table:
    path, columns = made.path, dict.fromkeys(made.columns, pl.String())
    with reading(path):
        with opened(path) as handle:
            found = survey(handle, made.separator)
        content = read_bytes(path) if is_packed(path) or not found.utf8 else None
        if content is not None and not found.utf8:
            content = decoded(content).encode()
            found = replace(survey(io.BytesIO(content), made.separator), utf8=False)
        notes = () if found.utf8 else (f"{path.name} is not UTF-8: its encoding was guessed",)
        if quote is None or found.regular:
            rows = scan(
                path if content is None else content,
                "csv",
                separator=made.separator,
                quote_char=quote if found.quoted else None,
                has_header=headed,
                new_columns=list(columns),
                infer_schema=False,
            )
            if made.spaced:
                rows = rows.with_columns(pl.all().str.strip_chars_start(" "))
            if drop is None or _can_read(rows):
                return Table(path, "CSV", rows, dict(columns), (), notes, made.separator)
    padded: list[list[str | None]] = []
    for line, cells in _csv_records(made, quote, headed):
        if len(cells) <= len(columns):
            padded.append([cell or None for cell in cells] + [None] * (len(columns) - len(cells)))
        elif drop is None:
            refuse_long(path, line, cells, len(columns))
        else:
            counted(drop, "broken_rows", 1)
    rows = pl.LazyFrame(padded, schema=columns, orient="row")
    return Table(path, "CSV", rows, dict(columns), (), notes, made.separator)


def _can_read(rows: pl.LazyFrame) -> bool:
    try:
        rows.select(pl.all().null_count()).collect(engine="streaming")
    except pl.exceptions.PolarsError:
        return False
    return True


def _csv_records(made: Outline, quote: str | None, headed: bool = True) -> Iterator[tuple[int, list[str]]]:
    """Rows below the header with the numbers of their lines, as Python reads them."""
    for line, cells in csv_rows(read_text(made.path), made.separator, quote, made.path, made.spaced):
        if headed:
            headed = not cells
        else:
            yield line, cells


def _json_table(made: Outline, drop: dict[str, int] | None) -> Table:
    """A table of JSON lines; numbers and nested values are text as they stand in the file."""
    path, columns = made.path, dict.fromkeys(made.columns, pl.String())
    with reading(path, made.kind):
        with opened(path) as handle:
            plain = survey(handle, ",").utf8 and not is_packed(path)
        source = path if plain else decoded(read_bytes(path)).encode()
        if drop is not None and not _can_read(scan(source, "json", schema=columns)):
            lines = [line for line in read_text(path).split("\n") if line.strip()]
            good = [line for line in lines if json_problem(line) is None]
            counted(drop, "broken_rows", len(lines) - len(good))
            source = "\n".join(good).encode()
        return Table(path, made.kind, scan(source, "json", schema=columns), dict(columns))


def _refuse_broken_row(table: Table) -> None:
    """One line for the row that polars could not read, where Python finds it."""
    if table.kind == "CSV":
        made = Outline(table.path, table.kind, tuple(table.columns), table.separator)
        for number, cells in _csv_records(made, '"', headed=False):
            refuse_long(table.path, number, cells, len(table.columns))
    elif table.kind == "JSON lines":
        refuse_broken_json(table.path)


def joined(folder: Path, tables: Sequence[Table], parts: Sequence[int | None]) -> Table:
    """Tables of the same columns as one; column :data:`PART` says from which split a row is, where files say so."""
    if len(tables) == 1:
        return tables[0]
    columns = dict(tables[0].columns)
    rows = []
    for table, part in zip(tables, parts, strict=True):
        mine = {folded(name): name for name in table.columns}
        kinds = {name: table.columns[mine[folded(name)]] for name in columns}
        texts = any(kind == pl.String for kind in kinds.values())
        picked = [
            pl.col(mine[folded(name)]).cast(pl.String if texts else kind).alias(name)
            for name, kind in kinds.items()
        ]
        rows.append(
            table.rows.select(*picked, *([] if part is None else [pl.lit(part, pl.Int8).alias(PART)]))
        )
        columns = columns if not texts else dict.fromkeys(columns, pl.String())
    notes = tuple(note for table in tables for note in table.notes)
    rows_of_all = pl.concat(rows, how="vertical_relaxed")
    parts_of_all = tuple(part for table in tables for part in table.parts or (table,))
    return Table(folder, tables[0].kind, rows_of_all, columns, parts_of_all, notes)
