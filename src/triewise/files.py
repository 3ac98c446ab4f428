"""Files that are whole or absent: write under a temporary name, sync, rename; and whether they are what was written.

A process may be killed at any moment. What it was writing then carries a name that starts with ``.tmp-`` and
is never read; who next holds the lock of that folder (`triewise.locks`) removes it. What is read again and decides a
result is compared with its SHA-256, and a JSON file of that kind with the seal in it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import glob
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from triewise.errors import UserError, reading
from triewise.progress import note

if TYPE_CHECKING:
    import polars as pl

TEMPORARY = ".tmp-"
_SEAL = "seal"  # the key of a sealed JSON file with the SHA-256 of all others
_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
# What torch, safetensors, polars and numpy say of a full disk; none of them with an errno.
_FULL_IN_WORDS = (
    r"inline_container|iostream error|No space left|File too large|quota exceeded|"
    r"\d+ requested and \d+ written"
)


class Shape(BaseModel):
    """What is read of a JSON file: keys and types. The file may hold more; it is looked at, and stays as it is."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class Hashed(Shape):
    """A JSON file that vouches for others, see `check_files`."""

    sha256: dict[str, str] | None = None


def sync(path: Path) -> None:
    """Flush a file, or every file under a folder, to the disk."""
    for file in [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]:
        with file.open("rb+") as handle:
            os.fsync(handle.fileno())


def _rename(source: Path, target: Path) -> None:
    """Rename, and flush the folder that says so, where the system can."""
    os.replace(source, target)
    with contextlib.suppress(OSError):
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def writes(path: Path) -> Iterator[None]:
    """A block that writes ``path``; a full disk becomes one line that names it, whichever library met it.

    Raises:
        UserError: There is no space left.
    """
    try:
        yield
    except Exception as error:
        full = getattr(error, "errno", None) in _FULL or re.search(_FULL_IN_WORDS, str(error))
        # Inside a temporary folder the block around it knows the name that a person knows.
        if not full or isinstance(error, UserError) or any(p.startswith(TEMPORARY) for p in path.parts):
            raise
        raise UserError(
            f"cannot write {path}: no space left; free some and go on with --resume, or where there is none with the "
            "same command"
        ) from None


def short(name: str) -> str:
    """A name with room for what a temporary name or a lock adds to it: a long one ends in its hash."""
    if len(os.fsencode(name)) <= 200:
        return name
    return f"{name[:40]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"


def _temporary(path: Path) -> Path:
    return path.with_name(f"{TEMPORARY}{os.getpid()}-{short(path.name)}")


def _real(path: Path) -> Path:
    """The path behind all links, in a folder that exists: renaming over a link would replace the link."""
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it over ``path`` when the block succeeds."""
    with writes(path):
        path = _real(path)
        temporary = _temporary(path)
        temporary.unlink(missing_ok=True)
        try:
            yield temporary
            sync(temporary)
            _rename(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside ``path``; put it in the place of ``path`` when the block succeeds."""
    with writes(path):
        path = _real(path)
        _restore(path)
        temporary = _temporary(path)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            sync(temporary)
            _swap(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def atomic_files(folder: Path, last: str) -> Iterator[Path]:
    """Yield an empty temporary folder; what is in it takes its place in ``folder`` when the block succeeds.

    The file ``last`` says that the others are there and belong together. Till all are written nothing is changed;
    then ``last`` goes first and comes last, so that there are the old ones, none or the new ones.
    """
    with writes(folder):
        folder = _real(folder / last).parent
        temporary = _temporary(folder / last)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            sync(temporary)
            (folder / last).unlink(missing_ok=True)
            for new in sorted(temporary.iterdir(), key=lambda path: (path.name == last, path.name)):
                _put(new, folder / new.name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _put(new: Path, path: Path) -> None:
    """Give a whole file or folder its place."""
    if path.is_symlink() and new.is_dir():  # perhaps to another disk
        with atomic_folder(path) as temporary:
            shutil.copytree(new, temporary, dirs_exist_ok=True)
    elif path.is_symlink():
        with atomic_path(path) as temporary:
            shutil.copyfile(new, temporary)
    elif new.is_dir():
        _swap(new, path)
    else:
        _rename(new, path)


def _swap(new: Path, path: Path) -> None:
    """Put a whole folder in the place of ``path``.

    Renaming over a folder that is not empty is not possible, so an old folder is first renamed aside. A kill
    between the two renames leaves no folder of that name, never a half-written one; the next call brings the
    old one back before it starts.
    """
    try:
        _restore(path)
        if path.exists():
            os.replace(path, _aside(path))
        _rename(new, path)
    finally:
        _restore(path)


def _aside(path: Path) -> Path:
    return path.with_name(f"{TEMPORARY}{short(path.name)}.old")


def _restore(path: Path) -> None:
    """Bring an old folder back when nothing took its place, else remove it."""
    if _aside(path).exists() and not path.exists():
        os.replace(_aside(path), path)
    _discard(_aside(path))


def _discard(path: Path) -> None:
    """Remove a folder or a file, or a link to one, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove(folder: Path) -> None:
    """Remove a folder; a kill on the way leaves a temporary name, never half of what was there."""
    if folder.exists():
        temporary = folder.with_name(f"{TEMPORARY}{short(folder.name)}.removed")
        _discard(temporary)
        os.replace(folder, temporary)
        shutil.rmtree(temporary)


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes left in a folder, all or what was to become ``name``; for who holds its lock."""
    for path in list(folder.glob(f"{TEMPORARY}*")):
        whose = re.fullmatch(rf"{re.escape(TEMPORARY)}(?:\d+-)?(.*?)(\.old|\.removed)?", path.name)
        if whose is None or (name is not None and short(name) != whose[1]):
            continue
        if whose[2] == ".old":
            _restore(folder / (name or whose[1]))
        _discard(path)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: Any, sealed: bool = False) -> None:
    """Write ``value`` as indented UTF-8 JSON, atomically; NaN and infinities are refused.

    Args:
        path: The file.
        value: JSON values; an object where it is sealed.
        sealed: Whether `read_json` is to notice that a value of it was changed.
    """
    if sealed:
        value = json.loads(json.dumps(value, allow_nan=False))
        value |= {_SEAL: _sealed(value)}
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _sealed(value: dict[str, Any]) -> str:
    """Hex SHA-256 of JSON values, however they are laid out."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_json(path: Path, shape: type[Shape] = Shape) -> Any:
    """Read an object from a UTF-8 JSON file, without its seal.

    Raises:
        UserError: It is absent, broken, of another shape, or was changed after it was sealed.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"wanted the file {path}, which does not exist; check the path") from None
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and lists in lists
        raise UserError(f"wanted UTF-8 JSON in {path}, got {error}; restore or remake the file") from None
    if isinstance(value, dict) and _SEAL in value and value.pop(_SEAL) != _sealed(value):
        raise UserError(
            f"{path} was changed after it was written (its seal does not hold); restore or remake the file"
        )
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
    """Hex SHA-256 of a file's bytes; about a second a gigabyte, once as long as the file is not touched."""
    state = path.stat()
    return _digest(str(path), state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)


@functools.lru_cache(maxsize=4096)
def _digest(path: str, *state: int) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def file_hashes(folder: Path) -> dict[str, str]:
    """Hex SHA-256 of the `file_names` of a folder."""
    return {name: sha256_file(folder / name) for name in file_names(folder)}


def check_files(folder: Path, hashes: Mapping[str, str] | None, advice: str) -> None:
    """Refuse files that are not those that were written.

    Args:
        folder: Where they are.
        hashes: Of `file_hashes`; of a folder inside, all its files are named. None: it was written before there were
            any, which is said once.
        advice: What to do, as the end of a sentence.

    Raises:
        UserError: One is missing or another one, or a folder inside holds one more.
    """
    if hashes is None:
        _say_unchecked(os.path.realpath(folder))
        return
    for name, wanted in hashes.items():
        if not (folder / name).is_file():
            raise UserError(f"wanted {folder / name}, which is missing; {advice}")
        if sha256_file(folder / name) != wanted:
            raise UserError(
                f"{folder / name} is not the file that was written (its sha256 differs); {advice}"
            )
    for inside in sorted({name.partition("/")[0] for name in hashes if "/" in name}):
        more = [
            f"{inside}/{name}" for name in file_names(folder / inside) if f"{inside}/{name}" not in hashes
        ]
        if more:
            raise UserError(f"{folder / more[0]} was not written with the files beside it; remove it")


def file_names(folder: Path) -> list[str]:
    """Every file in a folder, by its path inside, sorted; what starts with a dot is none of ours."""
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    return [name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts)]


class _Log(Shape):
    bytes: int
    sha256: str


class _Record(Shape):
    files: dict[str, str] | None = None
    log: _Log | None = None


def read_record(run: Path, names: Iterable[str] | None = None) -> dict[str, Any]:
    """``run.json`` of a run folder.

    Args:
        run: The run folder.
        names: Which of the files that it vouches for have to be those; None: all.

    Raises:
        UserError: It is broken, or such a file is another one.
    """
    record: dict[str, Any] = read_json(run / "run.json", _Record)
    files = record.get("files")
    if files is not None and names is not None:
        files = {name: sha256 for name, sha256 in files.items() if name in names}
    check_files(run, files, "restore it, or train again")
    return record


@functools.cache
def _say_unchecked(folder: str) -> None:
    note(f"{folder} was written before files were hashed: whether they are still the same is not checked")


def decoded(content: bytes) -> str:
    """Text by the one rule for every file: UTF-8, UTF-16 by its mark or its zero bytes, else cp1252, else latin-1."""
    zeros = content[:1000].count(0)
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        wide = ["utf-16"]
    else:  # an ASCII letter has its zero second (LE) or first (BE)
        wide = [f"utf-16-{'le' if content[1:2] == bytes(1) else 'be'}"] * (
            4 * zeros > len(content[:1000]) > 0
        )
    for encoding in (*wide, "utf-8-sig", "cp1252"):
        with contextlib.suppress(UnicodeDecodeError):
            return content.decode(encoding)
    return content.decode("latin-1")


def parquet_metadata(path: Path) -> dict[str, str]:
    """What a Parquet file says of itself beside its rows."""
    import polars as pl

    with path.open("rb") as file:
        return pl.read_parquet_metadata(file)


def scan(
    source: Path | bytes | list[Path],
    form: Literal["parquet", "csv", "lines", "json"] = "parquet",
    **options: Any,
) -> pl.LazyFrame:
    """Rows of a file, or of several: the one place that hands a path to polars, as a path and never as a pattern."""
    import polars as pl

    given = io.BytesIO(source) if isinstance(source, bytes) else source
    if form == "json":  # has no switch for patterns
        return pl.scan_ndjson(glob.escape(str(given)) if isinstance(given, Path) else given, **options)
    read: Any = {"parquet": pl.scan_parquet, "csv": pl.scan_csv, "lines": pl.scan_lines}[form]
    rows: pl.LazyFrame = read(given, glob=False, **options)
    return rows
