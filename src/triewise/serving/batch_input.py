"""The users of a batch, read in pieces: a file is cut into parts of equally many rows, whoever reads them.

Parquet is cut by row numbers, JSON lines by the places of line ends; a part is read alone, so no process holds more
than one. Rows that are none are told, never dropped in silence.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from triewise.errors import UserError, first_line, reading
from triewise.files import scan

USER = "user_id"
COLUMNS = {"titles": "title", "ids": "id"}  # what a history is made of
CHUNK = 1 << 24  # bytes
SHOWN = 80  # characters of a bad row that are told


@dataclass(frozen=True)
class Source:
    """A file of users, cut into parts.

    Attributes:
        path: The file.
        column: Which of `COLUMNS` it has.
        n_rows: Users.
        rows: Of a part; the last one may have fewer.
        ends: For JSON lines the byte behind each part; None: it is Parquet.
    """

    path: Path
    column: str
    n_rows: int
    rows: int
    ends: tuple[int, ...] | None = field(default=None, repr=False)

    @property
    def n_parts(self) -> int:
        """Number of parts."""
        return -(-self.n_rows // self.rows)

    @property
    def by(self) -> Literal["title", "id"]:
        """What histories are made of, as `answer` takes it."""
        return "title" if self.column == "titles" else "id"


@dataclass
class Users:
    """The rows of a part.

    Attributes:
        user_id: Of each row that is one.
        history: Titles or ids, oldest first.
        bad: Numbers of other rows, from 0 in the file, and what is wrong with each.
    """

    user_id: list[str] = field(default_factory=list)
    history: list[list[str]] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)

    def add(self, row: int, user_id: Any, history: Any, column: str) -> None:
        """Take a row, or say what is wrong with it."""
        if isinstance(user_id, bool) or not isinstance(user_id, str | int):
            self.bad.append((row, f"{USER} is {_shown(user_id)}, neither text nor a whole number"))
        elif not isinstance(history, list):
            self.bad.append((row, f"{column} is {_shown(history)}, no list"))
        elif (wrong := next((x for x in history if not _is_name(x, column)), history)) is not history:
            self.bad.append((row, f"{column} holds {_shown(wrong)}, which is no {COLUMNS[column]}"))
        else:
            self.user_id.append(str(user_id))
            self.history.append([str(x) for x in history])


def _is_name(value: Any, column: str) -> bool:
    return isinstance(value, str) or (
        column == "ids" and isinstance(value, int) and not isinstance(value, bool)
    )


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def cut(path: Path, rows: int) -> Source:
    """How a file is cut into parts of so many rows.

    Raises:
        UserError: No such file, neither Parquet nor JSON lines by its name, no users, or not the columns.
    """
    if not path.is_file():
        raise UserError(f"wanted a file of users, but {path} is none; check the path")
    if path.suffix == ".parquet":
        with reading(path):
            columns = list(scan(path).collect_schema())
            n_rows, ends = scan(path).select(columns[:1]).collect().height, None
    elif path.suffix in (".jsonl", ".ndjson"):
        n_rows, ends = _line_ends(path, rows)
        columns = _first_keys(path)
    else:
        raise UserError(f"wanted users in a file that ends in .parquet or .jsonl, got {path}; convert it")
    found = [column for column in COLUMNS if column in columns]
    if USER not in columns or len(found) != 1:
        raise UserError(
            f"wanted {USER} and one of {', '.join(COLUMNS)} in {path}, got {', '.join(columns) or 'nothing'}; rename "
            "its columns"
        )
    if not n_rows:
        raise UserError(f"wanted at least one user in {path}, got none")
    return Source(path, found[0], n_rows, rows, ends)


def _line_ends(path: Path, rows: int) -> tuple[int, tuple[int, ...]]:
    """The number of lines, and the place behind each run of so many, the last one included."""
    n_rows, place, ends = 0, 0, []
    last = b"\n"
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            at = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n"))
            full = np.arange(rows - 1 - n_rows % rows, len(at), rows)
            ends += (at[full] + 1 + place).tolist()
            n_rows, place, last = n_rows + len(at), place + len(chunk), chunk[-1:]
    n_rows += last != b"\n"
    return n_rows, tuple(ends if ends and ends[-1] == place else [*ends, place])


def _first_keys(path: Path) -> list[str]:
    """Keys of the first line that has some."""
    with path.open("rb") as file:
        for line in file:
            value = _parsed(line)
            if isinstance(value, dict) and value:
                return list(value)
    return []


def _parsed(line: bytes) -> Any:
    """The JSON value of a line, or the error that says why there is none."""
    try:
        value = json.loads(line.removeprefix(b"\xef\xbb\xbf").decode("utf-8"))
        if b"\\ud" in line.lower():  # half a character, which is no text: no file takes it
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        return error


def read_part(source: Source, part: int) -> Users:
    """The users of a part."""
    users, first, column = Users(), part * source.rows, source.column
    if source.ends is None:
        with reading(source.path):
            frame = scan(source.path).select(USER, column).slice(first, source.rows).collect()
        for n, (user_id, history) in enumerate(frame.iter_rows()):
            users.add(first + n, user_id, history, column)
        return users
    with source.path.open("rb") as file:
        begin = source.ends[part - 1] if part else 0
        file.seek(begin)
        lines = file.read(source.ends[part] - begin).removesuffix(b"\n").split(b"\n")
    for n, line in enumerate(lines):
        value = _parsed(line)
        if isinstance(value, dict):
            users.add(first + n, value.get(USER), value.get(column), column)
        else:
            said = (
                f"no JSON: {first_line(value)}"
                if isinstance(value, Exception)
                else f"{_shown(value)} is no object"
            )
            users.bad.append((first + n, said))
    return users
