"""Small raw data sets in the shapes of the published ones, written where a test wants them."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import polars as pl

# (user, item, rating, timestamp), shuffled as in u.data; items 10 and 9 of user 1 have the same time.
RATINGS = [
    (2, 9, 4, 50),
    (1, 10, 3, 20),
    (1, 9, 5, 20),
    (2, 10, 1, 40),
    (1, 2, 4, 30),
    (2, 2, 2, 60),
    (1, 7, 5, 10),
]
FILMS = {2: "Café au  Lait (1994) ", 7: "Heat (1995)", 9: "unknown", 10: "Heat (1995)"}
CLEAN_FILMS = {2: "Café au Lait (1994)", 7: "Heat (1995)", 9: "unknown", 10: "Heat (1995)"}

MSL_TITLES = {"1": "Pen, blue", "2": "Tape\nwide", "3": "Ink &amp; well", "4": "", "10": "Pen, blue"}
MSL_TRAIN = [
    ("7", [1, 2, 3], 100),
    ("7", [2, 3, 10], 110),
    ("a8", [4, 1], 120),
    ("a8", [4, 1, 1], 130),
]
MSL_VALID = [("7", [3, 10, 4], 140)]
MSL_TEST = [("9", [10, 2], 150), ("a8", [1, 1, 3], 160)]

D3_TITLES = ["None", "a\tb", "Zelda", "NA", " Zelda "]


def u_data(rows: Iterable[tuple[int, int, int, int]] = RATINGS) -> bytes:
    return "".join("\t".join(map(str, row)) + "\n" for row in rows).encode()


def u_item(films: dict[int, str] = FILMS) -> bytes:
    lines = (f"{number}|{title}|01-Jan-1995||http://x/?{number}|0|1\n" for number, title in films.items())
    return "".join(lines).encode("latin-1")


def widedeep(
    rows: Iterable[tuple[int, int, int, int]] = RATINGS, films: dict[int, str] = FILMS
) -> tuple[bytes, bytes]:
    ratings = pl.DataFrame(list(rows), schema=["user_id", "movie_id", "rating", "timestamp"], orient="row")
    titles = pl.DataFrame(
        {"movie_id": list(films), "movie_title": list(films.values()), "Action": [0] * len(films)}
    )
    return _parquet(ratings), _parquet(titles)


def _parquet(frame: pl.DataFrame) -> bytes:
    buffer = io.BytesIO()
    frame.write_parquet(buffer, compression="brotli")
    return buffer.getvalue()


def zip_bytes(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as handle:
        csv.writer(handle).writerows([header, *rows])
    return path


def write_msl(folder: Path, valid: bool = True) -> Path:
    """A small MSL folder; ``item_titles`` is one of the columns that are to be ignored."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "id2name4Rec.json").write_text(json.dumps(MSL_TITLES), encoding="utf-8")
    parts = {"train": MSL_TRAIN, "valid": MSL_VALID, "test": MSL_TEST}
    for name, rows in parts.items():
        if name != "valid" or valid:
            cells = [(user, str(items), "['x', None]", time) for user, items, time in rows]
            write_csv(folder / f"{name}.csv", ["user_id", "item_ids", "item_titles", "timestamp"], cells)
    return folder


def write_d3(folder: Path) -> Path:
    """A small D3 folder without titles in its rows; train has neither users nor times."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(f"{title}\t{number}\n" for number, title in enumerate(D3_TITLES))
    (folder / "info.txt").write_text(lines, encoding="utf-8")
    write_csv(folder / "train.csv", ["history_item_id", "item_id"], [("[0]", 1), ("[0, 1]", 2), ("[3]", 3)])
    header = ["user_id", "history_item_id", "item_id", "history_timestamp", "timestamp"]
    write_csv(folder / "valid.csv", header, [(0, "[3, 3]", 4, "[5, 6]", 7)])
    write_csv(folder / "test.csv", header, [(0, "[0, 1, 2]", 0, "[1, 2, 3]", 9)])
    return folder


def write_d3_original(folder: Path) -> Path:
    """The same rows in the original layout of D3, with ASINs, titles, ratings and users."""
    name = "Video_Games_5_2012-10-2018-11"
    (folder / "info").mkdir(parents=True)
    lines = "".join(f"{title}\t{number}\n" for number, title in enumerate(D3_TITLES))
    (folder / "info" / f"{name}.txt").write_text(lines, encoding="utf-8")
    parts = {
        "train": [("A1", [0], 1, 2), ("A1", [0, 1], 2, 3), ("B2", [3], 3, 4)],
        "valid": [("B2", [3, 3], 4, 7)],
        "test": [("A1", [0, 1, 2], 0, 9)],
    }
    header = [
        "user_id",
        "item_asins",
        "item_asin",
        "history_item_id",
        "item_id",
        "history_item_title",
        "item_title",
    ]
    header += ["history_rating", "rating", "history_timestamp", "timestamp"]
    for part, rows in parts.items():
        cells = [
            (
                user,
                str([f"B00{item}" for item in history]),
                f"B00{target}",
                str(history),
                target,
                str([D3_TITLES[item] for item in history]),
                D3_TITLES[target],
                str([5.0] * len(history)),
                5.0,
                str([time - 1] * len(history)),
                time,
            )
            for user, history, target, time in rows
        ]
        write_csv(folder / part / f"{name}.csv", header, cells)
    return folder


def write_100k(folder: Path) -> Path:
    """An unpacked ml-100k of seven ratings."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "u.data").write_bytes(u_data())
    (folder / "u.item").write_bytes(u_item())
    return folder


def write_1m(folder: Path, encoding: str = "latin-1") -> Path:
    """The same ratings in the shape of ml-1m (latin-1) or ml-10m (UTF-8)."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ("::".join(map(str, row)) + "\n" for row in RATINGS)
    (folder / "ratings.dat").write_text("".join(lines), encoding="utf-8")
    films = "".join(f"{number}::{title}::Drama|War\n" for number, title in FILMS.items())
    (folder / "movies.dat").write_bytes(films.encode(encoding))
    return folder


def write_latest(folder: Path) -> Path:
    """The same ratings in the shape of ml-20m and later ones."""
    write_csv(folder / "ratings.csv", ["userId", "movieId", "rating", "timestamp"], RATINGS)
    films = [(number, title, "Drama|War") for number, title in FILMS.items()]
    write_csv(folder / "movies.csv", ["movieId", "title", "genres"], films)
    return folder


def write_recbole(folder: Path, name: str = "ml-100k") -> Path:
    """The same ratings as RecBole's atomic files; times are floats."""
    folder.mkdir(parents=True, exist_ok=True)
    inter = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    inter += "".join(f"{user}\t{item}\t{rating}\t{time}.0\n" for user, item, rating, time in RATINGS)
    item = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    item += "".join(f"{number}\t{title}\t1994\tDrama War\n" for number, title in CLEAN_FILMS.items())
    (folder / f"{name}.inter").write_text(inter, encoding="utf-8")
    (folder / f"{name}.item").write_text(item, encoding="utf-8")
    return folder


def write_tables(folder: Path, form: str = "csv", rows: Sequence[Sequence[object]] = RATINGS) -> Path:
    """The same ratings as two tables: csv, csv.gz, tsv or parquet."""
    folder.mkdir(parents=True, exist_ok=True)
    events = pl.DataFrame(list(rows), schema=["user_id", "item_id", "stars", "timestamp"], orient="row")
    items = pl.DataFrame({"item": list(CLEAN_FILMS), "title": list(CLEAN_FILMS.values()), "year": 1994})
    for name, table in (("events", events), ("items", items)):
        path = folder / f"{name}.{form}"
        if form == "parquet":
            table.write_parquet(path)
        else:
            text = table.write_csv(separator="\t" if form == "tsv" else ",").encode()
            path.write_bytes(gzip.compress(text) if form == "csv.gz" else text)
    return folder
