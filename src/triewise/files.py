"""Files that are whole or absent: write under a temporary name, sync, rename.

A process may be killed at any moment. What it was writing then carries a name that starts with ``.tmp-`` and
is never read; the next successful write of the same file removes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from triewise.errors import UserError, reading

TEMPORARY = ".tmp-"


class Shape(BaseModel):
    """What is read of a JSON file: keys and types. The file may hold more; it is looked at, and stays as it is."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


def sync(path: Path) -> None:
    """Flush a file, or every file under a folder, to the disk."""
    for file in [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]:
        with file.open("rb+") as handle:
            os.fsync(handle.fileno())


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it over ``path`` when the block succeeds."""
    path = Path(os.path.abspath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside ``path``; put it in the place of ``path`` when the block succeeds.

    Renaming over a folder that is not empty is not possible, so an old folder is first renamed aside. A kill
    between the two renames leaves no folder of that name, never a half-written one; the next call brings the
    old one back before it starts.
    """
    path = Path(os.path.abspath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (path.with_name(f"{TEMPORARY}{path.name}{suffix}") for suffix in ("", ".old"))
    _restore(old, path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        sync(temporary)
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
    finally:
        _restore(old, path)
        shutil.rmtree(temporary, ignore_errors=True)


def _restore(old: Path, path: Path) -> None:
    """Bring ``old`` back when nothing took its place, else remove it."""
    if old.exists() and not path.exists():
        os.replace(old, path)
    shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented UTF-8 JSON, atomically; NaN and infinities are refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, shape: type[Shape] = Shape) -> Any:
    """Read an object from a UTF-8 JSON file; one clear line when it is absent, broken, or of another shape."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"wanted the file {path}, which does not exist; check the path") from None
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and lists in lists
        raise UserError(f"wanted UTF-8 JSON in {path}, got {error}; restore or remake the file") from None
    with reading(path):
        shape.model_validate(value)
    return value


def read_json_lines(path: Path, shape: type[Shape] = Shape, *, cut: bool = False) -> list[Any]:
    """Read an object from each line of a file; with ``cut`` the last one may have been cut short, and is left out."""
    rows, lines = [], path.read_bytes().splitlines()
    for n, line in enumerate(lines, 1):
        try:
            with reading(f"line {n} of {path}"):
                shape.model_validate(row := json.loads(line))
        except UserError:
            if cut and n == len(lines):
                break
            raise
        rows.append(row)
    return rows


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
