"""Readers of raw data: the same seven ratings in every shape, and every line a user can get."""

from __future__ import annotations

import bz2
import gzip
import os
import time
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from tests.data.test_fetch import ZIP, cache  # noqa: F401  (a fixture)
from tests.data_fixtures import (
    CLEAN_FILMS,
    RATINGS,
    u_data,
    u_item,
    write_1m,
    write_100k,
    write_csv,
    write_latest,
    write_recbole,
    write_tables,
)
from triewise.data import Interactions, movielens_files
from triewise.data.readers import Raw, csv_folder, movielens_folder
from triewise.data.recbole import recbole
from triewise.data.sources import movielens
from triewise.errors import UserError


def ratings(raw: Raw) -> list[tuple[str, str, int]]:
    """User, item and time as they stand in the file."""
    events = raw.events
    rows = zip(events.user, events.item, events.timestamp, strict=True)
    return [(events.user_id[user], events.item_id[item], int(time)) for user, item, time in rows]


EXPECTED = [(str(user), str(item), time) for user, item, _, time in RATINGS]
EXPECTED_TITLES = {str(number): title for number, title in CLEAN_FILMS.items()}


# --- every shape ------------------------------------------------------------------------------------------------------


def test_movielens_comes_from_the_cache(cache: Path) -> None:  # noqa: F811
    (cache / "ml-100k.zip").write_bytes(ZIP)
    raw = movielens("ml-100k")
    assert raw.title == EXPECTED_TITLES
    got = Interactions.from_events(raw.events, raw.title)
    assert got.item_id == ("2", "7", "9", "10")
    assert got.title == ("Café au Lait (1994)", "Heat (1995)", "unknown", "Heat (1995)")
    assert [got.item_id[item] for item in got.item] == ["7", "9", "10", "2", "10", "9", "2"]
    assert got.repairs == {}


def test_titles_with_quotes_survive(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    films = u_item({1: '"Quoted", with comma'})
    tables = movielens_files.canonical(movielens_files.read_100k_originals(u_data([(1, 1, 3, 1)]), films))
    for name, content in tables.items():
        (cache / name).write_bytes(content)
    monkeypatch.setattr("triewise.data.sources.fetch", lambda _: cache)
    assert movielens("ml-100k").title == {"1": '"Quoted", with comma'}


SHAPES: list[tuple[Callable[[Path], Path], Callable[[Path], Raw]]] = [
    (write_100k, movielens_folder),
    (write_1m, movielens_folder),
    (lambda folder: write_1m(folder, "utf-8"), movielens_folder),
    (write_latest, movielens_folder),
    (write_recbole, recbole),
    (write_tables, csv_folder),
    (lambda folder: write_tables(folder, "csv.gz"), csv_folder),
    (lambda folder: write_tables(folder, "tsv"), csv_folder),
    (lambda folder: write_tables(folder, "parquet"), csv_folder),
]
NAMES = ["100k", "1m", "10m", "latest", "recbole", "csv", "csv.gz", "tsv", "parquet"]


@pytest.mark.parametrize(("write", "read"), SHAPES, ids=NAMES)
def test_every_shape_gives_the_same_interactions(tmp_path: Path, write, read) -> None:
    raw = read(write(tmp_path / "raw"))
    assert ratings(raw) == EXPECTED
    assert raw.title == EXPECTED_TITLES
    assert raw.repairs == {}
    assert [path.parent for path in raw.files] == [tmp_path / "raw"] * 2
    assert (raw.events.user_id, raw.events.item_id) == (("1", "2"), ("2", "7", "9", "10"))
    assert [array.dtype.name for array in (raw.events.user, raw.events.item)] == ["int32", "int32"]


@pytest.mark.parametrize(
    "names", [("u.data", "u.item"), ("ratings.dat", "movies.dat"), ("ratings.csv", "movies.csv")]
)
def test_movielens_files_may_be_gzip(tmp_path: Path, names: tuple[str, str]) -> None:
    for write in (write_100k, write_1m, write_latest):
        write(tmp_path / "plain")
    (tmp_path / "packed").mkdir()
    for name in names:
        content = (tmp_path / "plain" / name).read_bytes()
        (tmp_path / "packed" / f"{name}.gz").write_bytes(gzip.compress(content))
    assert ratings(movielens_folder(tmp_path / "packed")) == EXPECTED


def test_quotes_and_commas_in_a_movies_csv(tmp_path: Path) -> None:
    write_latest(tmp_path)
    lines = 'movieId,title,genres\n2,"""Quoted"", with  comma ",x\n7,a,x\n9,b,x\n10,c,x\n'
    (tmp_path / "movies.csv").write_text(lines, encoding="utf-8")
    assert movielens_folder(tmp_path).title["2"] == '"Quoted", with comma'


# --- CSV and Parquet --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    [
        ("user", "item", "timestamp"),
        ("User_ID", "item_id", "TIME"),
        ("reviewerID", "asin", "unixReviewTime"),
        ("userId", "movieId", "ts"),
    ],
)
def test_columns_go_by_several_names(tmp_path: Path, header: tuple[str, str, str]) -> None:
    write_csv(tmp_path / "a.csv", ["x", *header], [("", "u", "i", 5)])
    write_csv(tmp_path / "b.csv", ["asin", "y", "title"], [("i", "", "A, b")])
    raw = csv_folder(tmp_path)
    assert (ratings(raw), raw.title) == ([("u", "i", 5)], {"i": "A, b"})


@pytest.mark.parametrize(
    ("cells", "expected", "repairs"),
    [
        (["978300760", "0"], [978300760, 0], {}),
        (["978300760.0", "9.7830076e8"], [978300760, 978300760], {}),
        (["978300760.9", "5.2"], [978300760, 5], {"fractions_of_a_second": 2}),
        (["978300760123", "978300760"], [978300760, 978300760], {"milliseconds": 1}),
        (["2001-01-01", "1970-01-02"], [978307200, 86400], {}),
        (
            ["2001-01-01 00:00:00", "2001-01-01 00:00:01.5"],
            [978307200, 978307201],
            {"fractions_of_a_second": 1},
        ),
        (["2001-01-01T00:00:00Z", "2001-01-01T02:00:00+02:00"], [978307200, 978307200], {}),
        (["2001-01-01 02:00:00+0200", "2001-01-01 00:00:00+0000"], [978307200, 978307200], {}),
    ],
)
def test_times_are_seconds_milliseconds_or_dates_in_utc(
    tmp_path: Path, cells: list[str], expected: list[int], repairs: dict[str, int], monkeypatch
) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")  # the zone of the computer changes nothing
    if hasattr(time, "tzset"):
        time.tzset()
    rows = [("u", "i", cell) for cell in cells]
    write_csv(tmp_path / "a.csv", ["user", "item", "timestamp"], rows)
    write_csv(tmp_path / "b.csv", ["item", "title"], [("i", "I")])
    raw = csv_folder(tmp_path)
    assert [when for *_, when in ratings(raw)] == expected
    assert raw.repairs == repairs
    monkeypatch.undo()
    if hasattr(time, "tzset"):
        time.tzset()


@pytest.mark.parametrize(
    "column",
    [
        pl.Series([100, 200], dtype=pl.Int32),
        pl.Series([100_000.0, 200_000.0]) / 1000,
        pl.Series([100_000, 200_000]).cast(pl.Datetime("ms")),
        pl.Series([100_000, 200_000]).cast(pl.Datetime("ms", "Asia/Tokyo")),
        pl.Series(["1970-01-01T00:01:40", "1970-01-01T00:03:20"]),
    ],
)
def test_parquet_may_hold_times_and_ids_of_other_types(tmp_path: Path, column: pl.Series) -> None:
    ids = pl.Series(["b", "a"]).cast(pl.Categorical)
    frame = pl.DataFrame({"user": pl.Series([10, 9], dtype=pl.UInt64), "item": ids, "time": column})
    frame.write_parquet(tmp_path / "a.parquet")
    write_csv(tmp_path / "b.csv", ["item", "title"], [("a", "A"), ("b", "B")])
    assert ratings(csv_folder(tmp_path)) == [("10", "b", 100), ("9", "a", 200)]


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path: Path) -> None:
    (tmp_path / "a.tsv.csv").write_text("\ufeffuser,item,time\nu,i,5\n", encoding="utf-8")
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress("\ufeffitem,title\ni,I\n".encode()))
    assert ratings(csv_folder(tmp_path)) == [("u", "i", 5)]


def test_whole_numbers_are_ordered_as_such_and_text_as_text(tmp_path: Path) -> None:
    rows = [("10", "10", 1), ("9", "x", 2), ("007", "9", 3)]
    write_csv(tmp_path / "a.csv", ["user", "item", "timestamp"], rows)
    write_csv(tmp_path / "b.csv", ["item", "title"], [("a", "A")])
    events = csv_folder(tmp_path).events
    assert (events.user_id, events.item_id) == (("007", "9", "10"), ("10", "9", "x"))


def test_what_is_put_right_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("user,item,time\nu,i,5\n\n,,\nu,j,6\n", encoding="utf-8")
    titles = "item,title\ni,I\n\ni,I\nj,J\nk,\nl,   \n"
    (tmp_path / "b.csv").write_text(titles, encoding="utf-8")
    raw = csv_folder(tmp_path)
    assert ratings(raw) == [("u", "i", 5), ("u", "j", 6)]
    assert raw.title == {"i": "I", "j": "J"}
    assert raw.repairs == {"blank_rows": 3, "catalogue_rows_without_title": 2, "catalogue_rows_repeated": 1}


def test_other_files_and_further_columns_do_not_matter(tmp_path: Path) -> None:
    write_tables(tmp_path)
    (tmp_path / "README.md").write_text("user,item,timestamp", encoding="utf-8")
    (tmp_path / "sub.csv").mkdir()
    write_csv(tmp_path / "genres.csv", ["item", "genre"], [("2", "Drama")])
    assert ratings(csv_folder(tmp_path)) == EXPECTED


GOOD = {"a.csv": "user,item,timestamp\nu,i,5\n", "b.csv": "item,title\ni,I\n"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"a.csv": None},
            r"wanted one table with the columns user, item and timestamp in .*, found b.csv \(item, title\); name",
        ),
        (
            {"c.tsv": "user\titem\ttime\n"},
            r"user, item and timestamp in .*, found a.csv \(.*\); c.tsv \(.*\); name .* --interactions-file",
        ),
        (
            {"b.csv": None},
            r"with the columns item and title in .*, found a.csv \(.*\); name .* with --catalogue-file",
        ),
        (
            {"c.csv": "item,title\ni,I\n"},
            r"the columns item and title in .*, found b.csv \(.*\); c.csv \(item, title\)",
        ),
        (
            {"a.csv": "user,item\nu,i\n"},
            r"wanted a column for the time \(timestamp or time or ts or unixreviewtime\) in",
        ),
        (
            {"a.csv": "user,thing,time\nu,i,5\n"},
            "wanted a column for the item .* in .*a.csv, found user, thing, time",
        ),
        (
            {"a.csv": "user,item,time,ts\nu,i,5,6\n"},
            "wanted one column for the time in .*a.csv, found time, ts; name the one",
        ),
        (
            {"b.csv": "item,title,name\ni,I,J\n"},
            "wanted one column for the title in .*b.csv, found title, name; name the one",
        ),
        ({"b.csv": "id,title\ni,I\n"}, "wanted a column for the item .* in .*b.csv, found id, title"),
        ({"a.csv": ""}, "wanted rows in .*a.csv, which is empty; copy or download it again"),
        ({"a.csv": "user,item,timestamp\n"}, "wanted rows in .*a.csv, found only a header"),
        (
            {"a.csv": "user,item,timestamp\nu,i,5,6\n"},
            "a.csv, line 2: wanted 3 cells, got 4, the last '6'; put",
        ),
        (
            {"a.csv": "user,item,timestamp,x\nu,i,5,6,7\n"},
            "a.csv, line 2: wanted 4 cells, got 5, the last '7'; put",
        ),
        (
            {"b.csv": "item,title\ni,Heat, The\n"},
            "b.csv, line 2: wanted 2 cells, got 3, the last ' The'; put",
        ),
        (
            {"a.csv": "user,item,timestamp\nu,i,5\nu,,6\n"},
            "a.csv, row 2: wanted a value in column item, got an empty",
        ),
        (
            {"a.csv": 'user,item,timestamp\n"",i,5\n'},
            "a.csv, row 1: wanted a value in column user, got an empty",
        ),
        (
            {"a.csv": "user,item,timestamp\n\nu,i,\n"},
            "a.csv, row 2: wanted Unix seconds .* got an empty cell; fill it in",
        ),
        (
            {"a.csv": "user,item,timestamp\nu,i,5\nu,i,x\n"},
            "a.csv, row 2: wanted Unix seconds .*, got 'x'; repair",
        ),
        ({"a.csv": "user,item,timestamp\nu,i,nan\n"}, "a.csv, row 1: wanted Unix seconds .*, got 'nan'"),
        ({"a.csv": "user,item,timestamp\nu,i,-1\n"}, "a.csv, row 1: wanted Unix seconds .*, got '-1'"),
        ({"a.csv": "user,item,timestamp\nu,i,1e22\n"}, "a.csv, row 1: wanted Unix seconds .*, got '1e22'"),
        (
            {"a.csv": "user,item,timestamp\nu,i,01/02/2001\n"},
            "a.csv, row 1: wanted .* an ISO date .*, got '01/02/2001'",
        ),
        (
            {"a.csv": "user,item,timestamp\nu,i,2001-01-01\nu,i,5\n"},
            "a.csv, row 2: wanted .* in column timestamp, got '5'",
        ),
        ({"b.csv": "item,title\n,I\n"}, "b.csv, row 1: wanted a value in column item, got an empty cell"),
        (
            {"b.csv": "item,title\ni,I\ni,J\n"},
            "b.csv: wanted one title for each item, got 'I' and 'J' for 'i'; drop one",
        ),
        ({"b.csv": "item,title\ni,\n"}, "wanted titles in .*b.csv, found none"),
    ],
)
def test_broken_tables_are_one_clear_line(
    tmp_path: Path, change: dict[str, str | None], message: str
) -> None:
    for name, text in {**GOOD, **change}.items():
        if text is not None:
            (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        csv_folder(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le", "utf-8-sig"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress])
def test_tables_may_be_in_another_encoding(
    tmp_path: Path, encoding: str, pack: Callable[[bytes], bytes]
) -> None:
    end = {bytes: "", gzip.compress: ".gz", bz2.compress: ".bz2"}[pack]
    (tmp_path / f"a.csv{end}").write_bytes(pack(GOOD["a.csv"].encode(encoding)))
    (tmp_path / f"b.csv{end}").write_bytes(pack("item,title\ni,Café\n".encode(encoding)))
    raw = csv_folder(tmp_path)
    assert (ratings(raw), raw.title) == ([("u", "i", 5)], {"i": "Café"})
    assert any("b.csv" in note and "not UTF-8" in note for note in raw.notes) == (encoding != "utf-8-sig")


def test_broken_parquet_is_one_clear_line(tmp_path: Path) -> None:
    write_tables(tmp_path, "parquet")
    good = (tmp_path / "events.parquet").read_bytes()
    (tmp_path / "events.parquet").write_bytes(good[:-9])
    with pytest.raises(
        UserError, match=r"cannot read .*events.parquet as Parquet: .*; repair or download it"
    ):
        csv_folder(tmp_path)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (
            {"user": [1.0], "item": ["i"], "ts": [5]},
            "wanted text or whole numbers in column user of .*, got Float64; store",
        ),
        (
            {"user": ["u"], "item": ["i"], "ts": [True]},
            "wanted times in column ts of .*, got Boolean; store Unix seconds",
        ),
        ({"user": ["u"], "item": ["i"], "ts": [None]}, "wanted times in column ts of .*, got Null"),
        (
            {"user": ["u"], "item": [None], "ts": [5]},
            "wanted text or whole numbers in column item of .*, got Null",
        ),
        ({"user": [], "item": [], "ts": []}, "wanted rows in .*a.parquet, found only a header"),
    ],
)
def test_parquet_of_other_types_is_refused(tmp_path: Path, frame: dict[str, list], message: str) -> None:
    pl.DataFrame(frame).write_parquet(tmp_path / "a.parquet")
    write_csv(tmp_path / "b.csv", ["item", "title"], [("i", "I")])
    with pytest.raises(UserError, match=message):
        csv_folder(tmp_path)
    pl.DataFrame({"item": ["i"], "title": [5]}).write_parquet(tmp_path / "c.parquet")
    (tmp_path / "b.csv").unlink()
    with pytest.raises(
        UserError, match=r"wanted text in column title of .*c.parquet, got Int64; store titles as text"
    ):
        csv_folder(tmp_path)


# --- MovieLens and RecBole folders ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {},
            "wanted u.data and u.item, .* in .*, found nothing; give the unpacked folder of a MovieLens release",
        ),
        ({"x.csv": b""}, "wanted u.data and u.item, .*, found x.csv"),
        ({"u.data": b"1\t2\t3\t4\n"}, "wanted the file u.item in"),
        ({"ratings.csv": b"userId,movieId,rating,timestamp\n"}, "wanted the file movies.csv in"),
        (
            {"u.data": b"1\t2\t3\t4\n", "u.item": b"x|Heat\n"},
            "wanted a number and a title in each row of .*u.item, got: inv",
        ),
        (
            {"u.data": b"1\t2\t3\t4\n", "u.item": b"2\n"},
            "wanted a number and a title in each row of .*u.item, got: list",
        ),
        (
            {"u.data": b"1\t2\t3\t4\n", "u.item": b"2|a|\n2|b|\n"},
            "u.item: wanted one title for each item, got 'a' and 'b'",
        ),
        (
            {"u.data": b"1\t2\t3\n", "u.item": b"2|a|\n"},
            "wanted user, item, rating, timestamp in each row of .*u.data, found 3 columns",
        ),
        ({"u.data": b"1\t2\t3\tx\n", "u.item": b"2|a|\n"}, "u.data, row 1: wanted Unix seconds"),
        (
            {"u.data": b"1\t2\t3\t4\n1\t\t3\t4\n", "u.item": b"2|a|\n"},
            "u.data, row 2: wanted a value in column item",
        ),
        (
            {"u.data": gzip.compress(b"1\t2\t3\t4\n")[:-4], "u.item": b"2|a|\n"},
            "cannot read .*u.data: Compressed file ended",
        ),
    ],
)
def test_broken_movielens_folders_are_one_clear_line(
    tmp_path: Path, files: dict[str, bytes], message: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        movielens_folder(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("column", ["title:token_seq", "item_name:token_seq", "name:token"])
def test_the_title_of_an_atomic_file_goes_by_several_names(tmp_path: Path, column: str) -> None:
    write_recbole(tmp_path)
    text = (tmp_path / "ml-100k.item").read_text(encoding="utf-8")
    (tmp_path / "ml-100k.item").write_text(text.replace("movie_title:token_seq", column), encoding="utf-8")
    assert recbole(tmp_path).title == EXPECTED_TITLES


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        (
            "ml-100k.inter",
            "timestamp:float",
            "age:float",
            "wanted a column for the time .* in .*, found user_id, item_id, r",
        ),
        (
            "ml-100k.inter",
            "user_id:token",
            "session:token",
            "wanted a column for the user .* in .*ml-100k.inter, found ses",
        ),
        (
            "ml-100k.item",
            "movie_title",
            "brand",
            r"wanted a column for the title \(title or .*\) in .*, found item_id, brand",
        ),
        (
            "ml-100k.item",
            "class",
            "title",
            "wanted one column for the title in .*, found movie_title, title; name the one",
        ),
        (
            "ml-100k.item",
            "class:token_seq",
            "item_id:float",
            "wanted each column once in .*, found item_id:token, movie_t",
        ),
        ("ml-100k.inter", "\t20.0", "\tnever", "ml-100k.inter, row 2: wanted Unix seconds .*, got 'never'"),
    ],
)
def test_broken_atomic_files_are_one_clear_line(
    tmp_path: Path, name: str, old: str, new: str, message: str
) -> None:
    path = write_recbole(tmp_path) / name
    path.write_text(path.read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        recbole(tmp_path)


def test_one_atomic_data_set_in_a_folder(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"wanted one file NAME.inter in .*, found nothing; keep one data set"
    ):
        recbole(tmp_path)
    write_recbole(tmp_path, "a")
    (tmp_path / "a.item").rename(tmp_path / "b.item")
    with pytest.raises(UserError, match=r"wanted the file a.item in .*, found a.inter, b.item; add it"):
        recbole(tmp_path)
    write_recbole(tmp_path, "b")
    with pytest.raises(
        UserError, match=r"wanted one file NAME.inter in .*, found a.inter, b.inter; keep one"
    ):
        recbole(tmp_path)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="needs a user who may not read everything")
def test_a_file_without_permission_is_one_clear_line(tmp_path: Path) -> None:
    write_tables(tmp_path)
    (tmp_path / "events.csv").chmod(0)
    with pytest.raises(UserError, match=r"cannot read .*events.csv: .*Permission denied"):
        csv_folder(tmp_path)
