"""Published splits: every row as it stands in the files, and every line a user can get."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from tests.conftest import shared
from tests.data_fixtures import D3_TITLES, write_csv, write_d3, write_d3_original, write_msl
from triewise.arrays import Ragged
from triewise.data.published import id_lists, item_indices, json_titles, read_d3, read_msl, tab_titles
from triewise.data.tables import ROW
from triewise.errors import UserError


def lists(ragged: Ragged) -> list[list[int]]:
    return [row.tolist() for row in ragged]


# --- MSL --------------------------------------------------------------------------------------------------------------


def test_msl_rows_are_taken_as_they_are(tmp_path: Path) -> None:
    data = read_msl(write_msl(tmp_path))
    assert data.titles.title == ("Pen, blue", "Tape\nwide", "Ink &amp; well", "", "Pen, blue")
    train, valid, test = (data.splits[name] for name in ("train", "valid", "test"))
    assert lists(train.history) == [[0, 1], [1, 2], [3], [3, 0]]
    assert train.target.tolist() == [2, 4, 0, 0]
    assert train.user_id.tolist() == ["7", "7", "a8", "a8"]
    assert train.timestamp.tolist() == [100, 110, 120, 130]
    assert (lists(valid.history), valid.target.tolist()) == ([[2, 4]], [3])
    assert (lists(test.history), test.target.tolist()) == ([[4], [0, 0]], [1, 2])
    # user 7: first row 3 items and 2 more rows; a8: 2 and 2 more; 9: 2
    assert (data.users, data.interactions) == (3, 5 + 4 + 2)
    assert data.repairs == {"empty_titles": 1}
    assert data.notes == ()
    assert [file.name for file in data.files] == ["id2name4Rec.json", "train.csv", "test.csv", "valid.csv"]


def test_msl_without_valid_takes_the_last_ninth_of_train(tmp_path: Path) -> None:
    write_msl(tmp_path, valid=False)
    rows = [(user, "[1, 2]", 100) for user in range(22)]
    write_csv(tmp_path / "train.csv", ["user_id", "item_ids", "timestamp"], rows)
    data = read_msl(tmp_path)
    assert data.splits["train"].user_id.tolist() == [str(user) for user in range(20)]
    assert data.splits["valid"].user_id.tolist() == ["20", "21"]
    assert data.notes[0].startswith("no valid.csv: the last 2 of the 22 training rows in file order")
    assert round(35_060 / 9) == 3_896


def test_msl_files_may_be_gzip(tmp_path: Path) -> None:
    write_msl(tmp_path)
    for name in ("train.csv", "valid.csv"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
        (tmp_path / name).unlink()
    data = read_msl(tmp_path)
    assert (data.splits["train"].n_rows, data.splits["valid"].n_rows) == (4, 1)


def test_rows_without_history_are_left_out_and_counted(tmp_path: Path) -> None:
    write_msl(tmp_path)
    rows = [("1", "[1]", 5), ("1", "[1, 2]", 6), ("2", "[3]", 7)]
    write_csv(tmp_path / "train.csv", ["user_id", "item_ids", "timestamp"], rows)
    data = read_msl(tmp_path)
    assert (lists(data.splits["train"].history), data.splits["train"].target.tolist()) == ([[0]], [1])
    assert data.repairs == {"empty_titles": 1, "rows_without_history": 2}
    write_csv(tmp_path / "train.csv", ["user_id", "item_ids", "timestamp"], rows[:1])
    with pytest.raises(UserError, match=r"wanted rows with a history in .*train.csv, found none"):
        read_msl(tmp_path)


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        (
            ["user_id", "item_ids"],
            ("1", "[1, 2]"),
            "wanted the column timestamp in .*train.csv, found user_id, item_ids",
        ),
        (
            ["user_id", "item_ids", "timestamp"],
            ("1", "[1, 99]", 5),
            "row 1: wanted item ids .* names, got 99",
        ),
        (["user_id", "item_ids", "timestamp"], ("1", "[0, 1]", 5), "row 1: wanted item ids .* names, got 0"),
        (
            ["user_id", "item_ids", "timestamp"],
            ("1", "[]", 5),
            r"row 1: wanted a target at the end of item_ids, got \[\]",
        ),
        (["user_id", "item_ids", "timestamp"], ("1", "1, 2", 5), "row 1: wanted a list of ids"),
        (
            ["user_id", "item_ids", "timestamp"],
            ("1", "[1, 2]", "now"),
            "row 1: wanted a whole number in column timestamp",
        ),
        (["user_id", "item_ids", "timestamp"], ("", "[1, 2]", 5), "row 1: wanted a value in column user_id"),
    ],
)
def test_broken_msl_rows_are_one_clear_line(
    tmp_path: Path, header: list[str], row: tuple[object, ...], message: str
) -> None:
    write_msl(tmp_path)
    write_csv(tmp_path / "train.csv", header, [row])
    with pytest.raises(UserError, match=message):
        read_msl(tmp_path)


@pytest.mark.parametrize("name", ["id2name4Rec.json", "train.csv", "test.csv"])
def test_a_missing_msl_file_is_named(tmp_path: Path, name: str) -> None:
    (write_msl(tmp_path) / name).unlink()
    with pytest.raises(UserError, match=f"wanted the file {name} in"):
        read_msl(tmp_path)


# --- D3 ---------------------------------------------------------------------------------------------------------------


def test_d3_rows_are_taken_as_they_are(tmp_path: Path) -> None:
    data = read_d3(write_d3(tmp_path))
    assert list(data.titles.title) == D3_TITLES
    train, valid, test = (data.splits[name] for name in ("train", "valid", "test"))
    assert (lists(train.history), train.target.tolist()) == ([[0], [0, 1], [3]], [1, 2, 3])
    assert train.user_id.tolist() == [None] * 3
    assert train.timestamp.tolist() == [-1] * 3
    assert (lists(valid.history), valid.target.tolist(), valid.timestamp.tolist()) == ([[3, 3]], [4], [7])
    assert (test.user_id.tolist(), lists(test.history), test.target.tolist()) == (["0"], [[0, 1, 2]], [0])
    assert (data.users, data.interactions) == (2, 5 + 2)
    assert data.notes == (
        "not every row names its user: users are counted by the rows whose history is one item",
        "train.csv has no timestamps; its rows keep the order of the file",
    )


def test_the_original_layout_of_d3_gives_the_same_rows(tmp_path: Path) -> None:
    plain, original = read_d3(write_d3(tmp_path / "plain")), read_d3(write_d3_original(tmp_path / "original"))
    assert original.titles.title == plain.titles.title
    for name, split in original.splits.items():
        assert lists(split.history) == lists(plain.splits[name].history)
        assert split.target.tolist() == plain.splits[name].target.tolist()
    assert original.splits["train"].user_id.tolist() == ["A1", "A1", "B2"]
    assert original.splits["train"].timestamp.tolist() == [2, 3, 4]
    assert (original.users, original.interactions, original.notes) == (2, 7, ())


def test_two_data_sets_in_one_d3_folder_are_refused(tmp_path: Path) -> None:
    write_d3_original(tmp_path)
    write_csv(tmp_path / "train" / "Books.csv", ["history_item_id", "item_id"], [("[0]", 1)])
    with pytest.raises(
        UserError, match=r"wanted one CSV file in .*train, found Books.csv, Video_Games_5.*keep one"
    ):
        read_d3(tmp_path)


def test_the_info_file_must_be_clear(tmp_path: Path) -> None:
    write_d3(tmp_path)
    (tmp_path / "README.txt").write_text("hello", encoding="utf-8")
    assert list(read_d3(tmp_path).titles.title) == D3_TITLES
    (tmp_path / "info.txt").rename(tmp_path / "names.txt")
    with pytest.raises(
        UserError, match=r"wanted an info file .*, found README.txt, names.txt; name it info.txt"
    ):
        read_d3(tmp_path)
    for name in ("README.txt", "names.txt"):
        (tmp_path / name).unlink()
    with pytest.raises(
        UserError, match=r"wanted an info file .*, found nothing; name it info.txt or info/train.txt"
    ):
        read_d3(tmp_path)


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        (["item_id"], (1,), "wanted the column history_item_id in .*train.csv, found item_id"),
        (["history_item_id", "item_id"], ("[0]", 77), "row 1: wanted item ids that info.txt names, got 77"),
        (["history_item_id", "item_id"], ("[77]", 0), "row 1: wanted item ids that info.txt names, got 77"),
        (
            ["history_item_id", "item_id"],
            ("[0]", ""),
            "row 1: wanted a value in column item_id, got an empty cell",
        ),
        (
            ["history_item_id", "item_id"],
            ("[0]", "B00X"),
            "row 1: wanted a whole number in column item_id, got 'B00X'",
        ),
        (["history_item_id", "item_id"], ("[]", 0), "wanted rows with a history in .*train.csv, found none"),
    ],
)
def test_broken_d3_rows_are_one_clear_line(
    tmp_path: Path, header: list[str], row: tuple[object, ...], message: str
) -> None:
    write_d3(tmp_path)
    write_csv(tmp_path / "train.csv", header, [row])
    with pytest.raises(UserError, match=message):
        read_d3(tmp_path)


def test_no_history_of_the_real_games_is_later_than_its_target() -> None:
    folder = shared("amazon_games_d3")
    for name in ("valid", "test"):
        frame = pl.read_csv(folder / f"{name}.csv", infer_schema_length=None)
        latest = (
            frame["history_timestamp"]
            .str.extract_all(r"[0-9]+")
            .list.eval(pl.element().cast(pl.Int64))
            .list.max()
        )
        assert (latest <= frame["timestamp"]).all()


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


def test_json_titles_may_be_in_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "id2name4Rec.json"
    path.write_bytes(json.dumps({"1": "é"}, ensure_ascii=False).encode("latin-1"))
    assert json_titles(path).title == ("é",)


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


def test_titles_that_rows_repeat_are_compared_with_the_info_file(tmp_path: Path) -> None:
    def write(*titles: str) -> Path:
        (tmp_path / "info.txt").write_text("A\t0\nB\t1\n", encoding="utf-8")
        rows = "".join(f'[0],1,"{title}"\n' for title in titles)
        for name in ("train", "valid", "test"):
            (tmp_path / f"{name}.csv").write_text(
                f"history_item_id,item_id,item_title\n{rows}", encoding="utf-8"
            )
        return tmp_path

    assert "rows_of_other_titles" not in read_d3(write("B", "")).repairs
    assert read_d3(write("B", "C")).repairs["rows_of_other_titles"] == 3
    with pytest.raises(
        UserError, match="wanted the titles of info.txt in column item_title, got 'C' for 'B'; take"
    ):
        read_d3(write("C", "D"))
