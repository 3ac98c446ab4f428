"""Histories and targets: leave-one-out by hand and by invariant, published splits as they stand in the files."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trierec.errors import UserError
from trierec.interactions import Interactions
from trierec.splits import Ragged, Split, leave_one_out, read_d3, read_msl

from .conftest import shared
from .data_fixtures import D3_TITLES, write_csv, write_d3, write_d3_original, write_msl


def lists(ragged: Ragged) -> list[list[int]]:
    return [row.tolist() for row in ragged]


def interactions(rows: list[tuple[int, int, int]], item_id: tuple[str, ...]) -> Interactions:
    user, item, timestamp = np.array(rows).reshape(-1, 3).T
    names = tuple(f"u{number}" for number in range(int(user.max()) + 1))
    return Interactions(user.astype(np.int32), item.astype(np.int32), timestamp, names, item_id, item_id, {})


# --- ragged -----------------------------------------------------------------------------------------------------------

ROWS = [[3, 1, 4], [], [1], [5, 9]]


def test_ragged_rows() -> None:
    ragged = Ragged.from_lists(ROWS)
    assert (ragged.values.dtype.name, ragged.offsets.dtype.name) == ("int32", "int64")
    assert lists(ragged) == ROWS
    assert ragged[-1].tolist() == [5, 9]
    assert ragged.lengths.tolist() == [3, 0, 1, 2]
    assert lists(ragged.last(2)) == [[1, 4], [], [1], [5, 9]]
    assert lists(ragged.take(np.array([3, 1, 0]))) == [[5, 9], [], [3, 1, 4]]
    with pytest.raises(IndexError):
        ragged[4]


@pytest.mark.parametrize("rows", [ROWS, [], [[]], [[], [], [7]], [[7], []]])
def test_a_column_gives_the_rows_back(rows: list[list[int]]) -> None:
    column = Ragged.from_lists(rows).to_series()
    assert column.dtype == pl.List(pl.Int32)
    assert column.to_list() == rows
    again = Ragged.from_series(column)
    assert lists(again) == rows
    assert (again.values.dtype.name, again.offsets.dtype.name) == ("int32", "int64")
    assert again.values.flags.writeable


def test_a_frame_gives_the_split_back() -> None:
    users = np.array(["a", None], dtype=object)
    split = Split(users, Ragged.from_lists([[1], [2, 3]]), np.array([4, 5], np.int32), np.array([7, -1]))
    for seen in (None, Ragged.from_lists([[0, 1], [2, 3]])):
        with_seen = Split(split.user_id, split.history, split.target, split.timestamp, seen)
        frame = with_seen.to_frame()
        assert frame.columns == ["user_id", "history", "target", "timestamp"] + ["seen"] * (seen is not None)
        again = Split.from_frame(frame)
        assert again.user_id.tolist() == ["a", None]
        assert lists(again.history) == [[1], [2, 3]]
        assert again.target.tolist() == [4, 5]
        assert again.timestamp.tolist() == [7, -1]
        assert (again.seen is None) == (seen is None)
        assert again.seen is None or lists(again.seen) == [[0, 1], [2, 3]]
        assert again.n_rows == 2


# --- leave-one-out ----------------------------------------------------------------------------------------------------


def test_leave_one_out_by_hand() -> None:
    # user 0: items 0 1 2 3 4 at times 1..5; user 1: two items; user 2: one; user 3: three at one time, ids "10" and "9"
    rows = [(0, item, item + 1) for item in range(5)] + [
        (1, 3, 8),
        (1, 0, 9),
        (2, 2, 5),
        (3, 6, 4),
        (3, 5, 4),
        (3, 0, 4),
    ]
    train, valid, test = leave_one_out(
        interactions(rows, ("0", "1", "2", "3", "4", "10", "9")), max_history=2
    )
    assert train.user_id.tolist() == ["u0", "u0", "u1", "u3"][:3]
    assert lists(train.history) == [[0], [0, 1], [3]]
    assert train.target.tolist() == [1, 2, 0]
    assert train.timestamp.tolist() == [2, 3, 9]
    assert train.seen is None
    assert valid.user_id.tolist() == test.user_id.tolist() == ["u0", "u3"]
    assert lists(valid.history) == [[1, 2], [0]]
    assert valid.target.tolist() == [3, 6]
    assert valid.seen is not None and lists(valid.seen) == [[0, 1, 2], [0]]
    assert lists(test.history) == [[2, 3], [0, 6]]
    assert test.target.tolist() == [4, 5]
    assert test.seen is not None and lists(test.seen) == [[0, 1, 2, 3], [0, 6]]


Row = tuple[int, list[int], int, int, list[int]]  # user, history, target, timestamp, seen


def slow_leave_one_out(
    rows: list[tuple[int, int, int]], item_id: tuple[str, ...], max_history: int
) -> tuple[list[Row], list[Row], list[Row]]:
    """The definition, one user and one row at a time."""
    train: list[Row] = []
    valid: list[Row] = []
    test: list[Row] = []
    for user in sorted({user for user, _, _ in rows}):
        events = sorted((time, int(item_id[item]), item) for owner, item, time in rows if owner == user)
        for place in range(1, len(events)):
            earlier = [item for *_, item in events[:place]]
            row = (user, earlier[-max_history:], events[place][2], events[place][0], earlier)
            later = len(events) - 1 - place
            part = train if len(events) < 3 else {0: test, 1: valid}.get(later, train)
            part.append(row)
    return train, valid, test


ROWS_OF_USERS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 11), st.integers(0, 4)), min_size=1, max_size=30
)


@settings(max_examples=60, deadline=None)
@given(ROWS_OF_USERS, st.integers(1, 4))
def test_leave_one_out_equals_the_slow_one(rows: list[tuple[int, int, int]], max_history: int) -> None:
    item_id = tuple(str(number) for number in range(12))[::-1]
    fast = leave_one_out(interactions(rows, item_id), max_history)
    for got, wanted in zip(fast, slow_leave_one_out(rows, item_id, max_history), strict=True):
        shown = list(
            zip(got.user_id, lists(got.history), got.target.tolist(), got.timestamp.tolist(), strict=True)
        )
        assert shown == [(f"u{user}", history, target, time) for user, history, target, time, _ in wanted]
        if got.seen is not None:
            assert lists(got.seen) == [seen for *_, seen in wanted]


@settings(max_examples=40, deadline=None)
@given(ROWS_OF_USERS)
def test_no_history_item_comes_after_its_target(rows: list[tuple[int, int, int]]) -> None:
    unique = [(user, number, time) for number, (user, _, time) in enumerate(rows)]  # an item is one event
    item_id = tuple(str(number) for number in range(len(rows)))
    when = {number: (time, number) for _, number, time in unique}
    for split in leave_one_out(interactions(unique, item_id), max_history=3):
        for history, target in zip(split.history, split.target, strict=True):
            moments = [when[item] for item in (*history, target)]
            assert moments == sorted(moments)


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
        UserError, match=r"wanted an info file .*, found none; name it info.txt or info/train.txt"
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
