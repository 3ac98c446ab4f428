"""Histories and targets: by hand, by invariant, and against loops."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings, strategies as st

from tests.reference import splits as slow
from triewise.arrays import Ragged
from triewise.data import Interactions, Split, splits
from triewise.data.splits import lazy_splits


def lists(ragged: Ragged) -> list[list[int]]:
    return [row.tolist() for row in ragged]


def spelled_out(interactions: Interactions, way: str, max_history: int = 20) -> list[Split]:
    return [part.part(0, part.n_rows) for part in lazy_splits(interactions, way, max_history)]


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
    train, valid, test = spelled_out(
        interactions(rows, ("0", "1", "2", "3", "4", "10", "9")), "leave-one-out", 2
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


ROWS_OF_USERS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 11), st.integers(0, 4)), min_size=1, max_size=30
)


WAYS = [
    ("leave-one-out", slow.leave_one_out),
    ("time-windows", slow.time_windows),
    ("time-growing", slow.time_growing),
]


@pytest.mark.parametrize(("way", "loops"), WAYS)
@settings(max_examples=60, deadline=None)
@given(rows=ROWS_OF_USERS, max_history=st.integers(1, 4))
def test_a_split_equals_the_slow_one(way, loops, rows: list[tuple[int, int, int]], max_history: int) -> None:
    item_id = tuple(str(number) for number in range(12))[::-1]
    parts = spelled_out(interactions(rows, item_id), way, max_history)
    for got, wanted in zip(parts, loops(rows, item_id, max_history), strict=True):
        shown = list(
            zip(got.user_id, lists(got.history), got.target.tolist(), got.timestamp.tolist(), strict=True)
        )
        assert shown == [(f"u{user}", history, target, time) for user, history, target, time, _ in wanted]
        if got.seen is not None:
            assert lists(got.seen) == [seen for *_, seen in wanted]
    assert [part.seen is None for part in parts] == [
        True,
        way != "leave-one-out",
        way != "leave-one-out",
    ]


@pytest.mark.parametrize("way", splits.WAYS[:3])
@settings(max_examples=40, deadline=None)
@given(rows=ROWS_OF_USERS)
def test_no_history_item_comes_after_its_target(way: str, rows: list[tuple[int, int, int]]) -> None:
    unique = [(user, number, time) for number, (user, _, time) in enumerate(rows)]  # an item is one event
    item_id = tuple(str(number) for number in range(len(rows)))
    when = {number: (time, number) for _, number, time in unique}
    owner = {number: f"u{user}" for user, number, _ in unique}
    for part in lazy_splits(interactions(unique, item_id), way, max_history=3):
        split = part.part(0, part.n_rows)
        for user, history, target in zip(split.user_id, split.history, split.target, strict=True):
            moments = [when[item] for item in (*history, target)]
            assert moments == sorted(moments)
            assert {owner[item] for item in (*history, target)} == {user}


# --- windows and growing histories by time ------------------------------------------------------------------


def one_user(n: int) -> Interactions:
    return interactions([(0, item, item) for item in range(n)], tuple(str(item) for item in range(n)))


@pytest.mark.parametrize(("n", "windows", "growing"), [(1, 0, 0), (4, 1, 3), (11, 1, 10), (13, 3, 12)])
def test_rows_of_a_user_are_as_many_as_the_papers_code_makes(n: int, windows: int, growing: int) -> None:
    assert sum(part.n_rows for part in spelled_out(one_user(n), "time-windows", 10)) == windows
    assert sum(part.n_rows for part in spelled_out(one_user(n), "time-growing", 10)) == growing


def test_windows_are_full_or_the_only_one_of_a_short_user() -> None:
    everything = [
        row for part in spelled_out(one_user(13), "time-windows", 10) for row in lists(part.history)
    ]
    assert everything == [list(range(start, start + 10)) for start in range(3)]
    assert [row for part in spelled_out(one_user(4), "time-windows", 10) for row in lists(part.history)] == [
        [0, 1, 2]
    ]


@pytest.mark.parametrize(("n", "sizes"), [(10, [8, 1, 1]), (19, [15, 2, 2]), (11, [8, 1, 2]), (5, [4, 0, 1])])
def test_rows_are_split_at_the_floors_of_80_and_90_per_cent(n: int, sizes: list[int]) -> None:
    assert [part.n_rows for part in spelled_out(one_user(n + 1), "time-growing", 10)] == sizes


def test_rows_of_all_users_are_in_order_of_time_and_ties_keep_theirs() -> None:
    rows = [(user, item, 10 - item // 2) for user in range(3) for item in range(6)]
    parts = spelled_out(interactions(rows, tuple("012345")), "time-growing", 2)
    time = np.concatenate([part.timestamp for part in parts])
    user = np.concatenate([part.user_id for part in parts])
    assert time.tolist() == sorted(time.tolist())
    for moment in set(time.tolist()):
        assert user[time == moment].tolist() == sorted(user[time == moment])


# --- rows that are not spelled out yet ----------------------------------------------------------------------


@pytest.mark.parametrize("way", splits.WAYS[:3])
def test_parts_are_the_rows_of_the_whole(way: str, rng: np.random.Generator) -> None:
    rows = [(int(u), int(i), int(t)) for u, i, t in rng.integers(0, [5, 9, 50], (60, 3))]
    for part in lazy_splits(interactions(rows, tuple(map(str, range(9)))), way, 3):
        whole = part.part(0, part.n_rows)
        assert part.n_rows == whole.n_rows
        assert part.target.tolist() == whole.target.tolist()
        assert part.timestamp.tolist() == whole.timestamp.tolist()
        for start, stop in [(0, part.n_rows), (1, 4), (2, 2)]:
            wanted = whole.take(np.arange(part.n_rows)[start:stop]).to_frame()
            assert part.frame(start, stop).equals(wanted)
            assert part.part(start, stop).to_frame().equals(wanted)
            assert whole.frame(start, stop).equals(wanted)


def test_a_user_id_that_occurs_often_is_in_memory_once() -> None:
    frame = Split(
        np.array(["a long enough name"] * 3 + [None], dtype=object),
        Ragged.from_lists([[1]] * 4),
        np.zeros(4, dtype=np.int32),
        np.zeros(4, dtype=np.int64),
    ).to_frame()
    again = Split.from_frame(frame).user_id
    assert again.tolist() == ["a long enough name"] * 3 + [None]
    assert len({id(name) for name in again[:3]}) == 1
