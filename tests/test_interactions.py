"""Reading raw files: every line a user can get, and the order of ids."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trierec import fetch
from trierec.errors import UserError
from trierec.interactions import (
    ROW,
    Interactions,
    find_file,
    id_lists,
    integers,
    item_indices,
    json_titles,
    movielens,
    ordered_ids,
    read_rows,
    tab_titles,
)

from .data_fixtures import RATINGS, u_data, u_item, write_csv
from .test_fetch import ZIP, cache  # noqa: F401  (a fixture)


def events(rows: list[tuple[str, str, int]]) -> pl.DataFrame:
    return pl.DataFrame(
        rows, schema={"user": pl.String, "item": pl.String, "timestamp": pl.Int64}, orient="row"
    )


# --- order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (["10", "9", "1"], ["1", "9", "10"]),
        (["10", "9", "B1"], ["10", "9", "B1"]),
        (["007", "7", "-3"], ["-3", "007", "7"]),
        ([], []),
    ],
)
def test_ids_are_ordered_as_integers_when_all_are(ids: list[str], expected: list[str]) -> None:
    assert ordered_ids(ids) == expected


def test_interactions_are_numbered_and_sorted_by_user_time_item() -> None:
    rows = [("10", "9", 5), ("9", "10", 7), ("9", "9", 7), ("9", "10", 1)]
    got = Interactions.from_frame(events(rows), {"9": "Nine", "10": "Ten", "11": "Eleven"})
    assert got.user_id == ("9", "10")
    assert got.item_id == ("9", "10")
    assert got.title == ("Nine", "Ten")
    assert got.user.tolist() == [0, 0, 0, 1]
    assert got.timestamp.tolist() == [1, 7, 7, 5]
    assert got.item.tolist() == [1, 0, 1, 0]  # at time 7 item 9 comes before item 10
    assert got.repairs == {"titles_without_interactions": 1}
    assert [array.dtype.name for array in (got.user, got.item, got.timestamp)] == ["int32", "int32", "int64"]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 12), st.integers(0, 3)), min_size=1),
    st.randoms(),
)
def test_the_order_of_rows_changes_nothing(rows: list[tuple[str, int, int]], random: object) -> None:
    text = [(user, str(item), time) for user, item, time in rows]
    title = {str(item): f"T{item}" for item in range(13)}
    one = Interactions.from_frame(events(text), title)
    random.shuffle(text)  # type: ignore[attr-defined]
    other = Interactions.from_frame(events(text), title)
    for name in ("user", "item", "timestamp"):
        assert np.array_equal(getattr(one, name), getattr(other, name))
    assert sorted(rows, key=lambda row: (row[0], row[2], row[1])) == [
        (one.user_id[u], int(one.item_id[i]), t)
        for u, i, t in zip(one.user, one.item, one.timestamp, strict=True)
    ]


def test_an_item_without_title_is_an_error() -> None:
    with pytest.raises(UserError, match="wanted a title for each item, 1 have none, first '9'"):
        Interactions.from_frame(events([("1", "9", 5)]), {"8": "Eight"})


def test_movielens_comes_from_the_cache(cache: Path) -> None:  # noqa: F811
    (cache / "ml-100k.zip").write_bytes(ZIP)
    got = movielens("ml-100k")
    assert got.item_id == ("2", "7", "9", "10")
    assert got.title == ("Café au Lait (1994)", "Heat (1995)", "unknown", "Heat (1995)")
    assert [got.item_id[item] for item in got.item] == ["7", "9", "10", "2", "10", "9", "2"]
    assert len(got.user) == len(RATINGS)


def test_titles_with_quotes_survive(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    ratings, films = u_data([(1, 1, 3, 1)]), u_item({1: '"Quoted", with comma'})
    tables = fetch.canonical(fetch.read_100k_originals(ratings, films))
    for name, content in tables.items():
        (cache / name).write_bytes(content)
    monkeypatch.setattr("trierec.interactions.fetch", lambda _: cache)
    assert movielens("ml-100k").title == ('"Quoted", with comma',)


# --- files ------------------------------------------------------------------------------------------------------------


def test_files_may_be_gzip_under_either_name(tmp_path: Path) -> None:
    content = "﻿a,b\n1,x\n".encode()
    (tmp_path / "plain.csv").write_bytes(content)
    (tmp_path / "packed.csv.gz").write_bytes(gzip.compress(content))
    (tmp_path / "hidden.csv").write_bytes(gzip.compress(content))
    for name in ("plain.csv", "packed.csv", "hidden.csv"):
        assert read_rows(find_file(tmp_path, name), ["a"], {}).rows() == [(1, "1")]


def test_missing_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"wanted the folder .*nowhere, which does not exist; check the path"):
        find_file(tmp_path / "nowhere", "train.csv")
    with pytest.raises(UserError, match=r"wanted the file train.csv in .*, found nothing; add it"):
        find_file(tmp_path, "train.csv")
    (tmp_path / "training.csv").write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match=r"wanted the file train.csv in .*, found training.csv; add it"):
        find_file(tmp_path, "train.csv")
    with pytest.raises(UserError, match=r"wanted the folder .*training.csv, which is a file; check the path"):
        find_file(tmp_path / "training.csv", "train.csv")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "which is empty; copy or download it again"),
        (b"a,b\n", "wanted rows in .*, found only a header"),
        (b"\n\n", r"cannot read .* as CSV: empty CSV"),
        (b"x,b\n1,2\n", "wanted the column a in .*, found x, b; rename or add it"),
        (
            b"a,b\n1,2\n3,caf\xe9\n",
            "wanted UTF-8 text in .*, got the byte 0xe9 in line 3; save the file as UTF-8",
        ),
        ("a,b\n1,2\n".encode("utf-16"), "wanted UTF-8 text in .*, got the byte 0xff in line 1"),
        (b"a,b\n1,2\n3\n", "row 2: wanted a value in column b, got an empty cell; fill it in"),
        (b'a,b\n1,2\n"",4\n', "row 2: wanted a value in column a, got an empty cell"),
        (b"a,b\n1,2,3\n", "cannot read .* as CSV: found more fields"),
        (b'a,b\n1,"2\n', "cannot read .* as CSV: could not parse"),
        (gzip.compress(b"a,b\n1,2\n" * 1000)[:-30], "cannot read .*: Compressed file ended before .*; copy"),
        (gzip.compress(b"a,b\n1,2\n")[:-4] + b"\0\0\0\0", "cannot read .*: Incorrect length of data"),
        (b"\x1f\x8bno gzip", "cannot read .*; copy or download it again"),
    ],
)
def test_broken_files_are_one_clear_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "train.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_rows(path, ["a", "b"], {})
    assert "\n" not in str(caught.value)
    assert "train.csv" in str(caught.value)
    assert path.read_bytes() == content


def test_blank_lines_are_left_out_and_counted(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"a,b\r\n1,2\r\n\r\n3,4\r\n\r\n")
    repairs: dict[str, int] = {}
    assert read_rows(tmp_path / "t.csv", ["a", "b"], repairs).rows() == [(1, "1", "2"), (3, "3", "4")]
    assert repairs == {"blank_rows": 2}


def test_text_that_looks_like_nothing_stays_text(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", ["a"], [["None"], ["NA"], ["null"], ["nan"], ["x\ny"]])
    assert read_rows(path, ["a"], {})["a"].to_list() == ["None", "NA", "null", "nan", "x\ny"]


# --- cells ------------------------------------------------------------------------------------------------------------


def cells(*values: str) -> pl.DataFrame:
    return pl.DataFrame({ROW: range(1, len(values) + 1), "x": values})


def test_lists_are_parsed_without_evaluation() -> None:
    values, starts = id_lists(cells("[3, 14]", "[]", " [ 1,2 , 3,] ", "[-5]"), "x", Path("f"))
    assert values.tolist() == [3, 14, 1, 2, 3, -5]
    assert starts.tolist() == [0, 2, 2, 5, 6]


@pytest.mark.parametrize(
    "cell",
    [
        *[
            "",
            "3",
            "[3",
            "3]",
            "[3 4]",
            "[3,,4]",
            "['3']",
            "[3.5]",
            "[None]",
            "[[3]]",
            "(3, 4)",
            "[3]\n[4]",
            "[٣]",
        ],
        *["__import__('os').abort()", "[1, __import__('os').abort()]", "[" + "1, " * 50],
    ],
)
def test_a_malformed_list_names_its_row(cell: str) -> None:
    with pytest.raises(
        UserError, match=r"f.csv, row 2: wanted a list of ids such as \[3, 14\] in column x, got"
    ) as caught:
        id_lists(cells("[1]", cell), "x", Path("f.csv"))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_an_id_beyond_64_bits_names_its_row() -> None:
    with pytest.raises(UserError, match="row 3: wanted ids of at most 18 digits in column x"):
        id_lists(cells("[1, 2]", "[]", f"[5, {10**30}]"), "x", Path("f.csv"))


def test_whole_numbers_may_be_written_as_floats() -> None:
    assert integers(cells("5", " -6 ", "7.0", "8."), "x", Path("f")).tolist() == [5, -6, 7, 8]


@pytest.mark.parametrize("cell", ["1.5", "1e9", "nan", "x", "1 2", str(10**30)])
def test_other_numbers_name_their_row(cell: str) -> None:
    with pytest.raises(UserError, match=r"f.csv, row 2: wanted a whole number in column x, got"):
        integers(cells("5", cell), "x", Path("f.csv"))


def test_ids_become_indices_and_unknown_ones_name_their_row() -> None:
    known, row = np.array([1, 2, 5]), np.array([1, 1, 4])
    assert item_indices(np.array([5, 1, 2]), known, row, Path("f"), Path("t")).tolist() == [2, 0, 1]
    for wrong in (0, 3, 9):
        with pytest.raises(
            UserError, match=rf"f.csv, row 4: wanted item ids that t.json names, got {wrong} \(1 such"
        ):
            item_indices(np.array([5, 1, wrong]), known, row, Path("f.csv"), Path("t.json"))


# --- titles -----------------------------------------------------------------------------------------------------------


def test_json_titles_stay_as_they_are_in_the_order_of_their_ids(tmp_path: Path) -> None:
    path = tmp_path / "id2name4Rec.json"
    path.write_text('{"10": "None", "2": "", "9": null, "1": " a &amp;\\n b ", "3": NaN}', encoding="utf-8")
    titles = json_titles(path)
    assert titles.item_id.tolist() == [1, 2, 3, 9, 10]
    assert titles.title == (" a &amp;\n b ", "", "", "", "None")
    assert titles.repairs == {"missing_titles": 2, "empty_titles": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "wanted JSON in .*, got Expecting property name"),
        ("[" * 100_000, "wanted JSON in .*, got"),
        ("{}", "wanted titles in .*, found none"),
        ('["a"]', "wanted an object such as .* in .*, got something else"),
        ('"a"', "wanted an object such as"),
        ('{"x": "a"}', "id 'x': wanted an id that is a whole number, got 'x'"),
        ('{"1": "a", "01": "b"}', "id '01': wanted each id once, got 1 again; drop one of the two"),
        ('{"1": ["a"]}', "id '1': wanted a title that is text, got .*; put it in quotes"),
        ('{"1": 1984}', "id '1': wanted a title that is text, got 1984; put it in quotes"),
        ('{"1": "\\ud800"}', "id '1': wanted a title that is text, got"),
    ],
)
def test_broken_json_titles_are_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "id2name4Rec.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        json_titles(path)
    assert "\n" not in str(caught.value)


def test_json_titles_in_another_encoding_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "id2name4Rec.json"
    path.write_bytes(json.dumps({"1": "é"}, ensure_ascii=False).encode("latin-1"))
    with pytest.raises(
        UserError, match=r"wanted UTF-8 text in .*id2name4Rec.json, got the byte 0xe9 in line 1"
    ):
        json_titles(path)


def test_the_id_is_behind_the_last_tab(tmp_path: Path) -> None:
    path = tmp_path / "info.txt"
    path.write_bytes("a\tb\t1\r\nNone\t0\n\t2\nc\x85d\t3\n\n".encode())
    titles = tab_titles(path)
    assert titles.item_id.tolist() == [0, 1, 2, 3]
    assert titles.title == ("None", "a\tb", "", "c\x85d")
    assert titles.repairs == {"empty_titles": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a\t0\nno tab\n",
            "info.txt, line 2: wanted a title, a TAB and an id, got 'no tab'; repair the line",
        ),
        ("a\tx\n", "info.txt, line 1: wanted an id that is a whole number, got 'x'"),
        ("a\t0\nb\t0\n", "info.txt, line 2: wanted each id once, got 0 again"),
        ("\n\n", "wanted titles in .*info.txt, found none"),
        ("", "info.txt, which is empty"),
    ],
)
def test_a_broken_info_file_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "info.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        tab_titles(path)
