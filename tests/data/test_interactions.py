"""Interactions: the order of ids and rows, what is dropped, the k-core."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings, strategies as st

from tests.reference import splits as slow
from triewise.data import Interactions
from triewise.data.interactions import core, ordered_ids
from triewise.errors import UserError


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
    assert got.repairs == {"rows_out_of_time_order": 1, "titles_without_interactions": 1}
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
    assert one.repairs.get("duplicate_rows", 0) == len(rows) - len(set(rows))
    assert sorted(set(rows), key=lambda row: (row[0], row[2], row[1])) == [
        (one.user_id[u], int(one.item_id[i]), t)
        for u, i, t in zip(one.user, one.item, one.timestamp, strict=True)
    ]


def test_an_item_without_title_is_an_error() -> None:
    with pytest.raises(UserError, match="wanted a title for each item, 1 have none, first '9'"):
        Interactions.from_frame(events([("1", "9", 5)]), {"8": "Eight"})


@pytest.mark.parametrize("title", ["", "  ", None])
def test_an_empty_title_is_none(title: str | None) -> None:
    titles = {"9": "Nine"} | ({} if title is None else {"8": title})
    rows = [("1", "9", 5), ("1", "8", 6), ("1", "7", 6)]
    with pytest.raises(UserError, match="wanted a title for each item, 2 have none, first '7'; add them"):
        Interactions.from_frame(events(rows), titles)


# --- what is dropped and counted ------------------------------------------------------------------------------

TITLES = {str(item): f"T{item}" for item in range(20)}


def test_an_event_that_is_there_twice_is_dropped_and_a_repeated_purchase_is_kept() -> None:
    rows = [("1", "9", 5), ("1", "9", 6), ("1", "9", 5), ("1", "9", 5), ("2", "9", 5)]
    got = Interactions.from_frame(events(rows), {"9": "Nine"})
    assert list(zip(got.user.tolist(), got.timestamp.tolist(), strict=True)) == [(0, 5), (0, 6), (1, 5)]
    assert got.repairs == {"rows_out_of_time_order": 1, "duplicate_rows": 2}


@pytest.mark.parametrize(
    ("rows", "count"),
    [
        ([("1", 1), ("2", 2), ("1", 3), ("2", 3)], 0),  # in order of time
        ([("1", 5), ("1", 9), ("2", 1), ("2", 2)], 0),  # in order of user and time
        ([("1", 5), ("2", 1), ("1", 4), ("1", 6), ("2", 0)], 2),
        ([], 0),
    ],
)
def test_rows_out_of_time_order_are_those_before_the_last_of_their_user(
    rows: list[tuple[str, int]], count: int
) -> None:
    got = Interactions.from_frame(
        events([(user, str(number), time) for number, (user, time) in enumerate(rows)]), TITLES
    )
    assert got.repairs.get("rows_out_of_time_order", 0) == count


# --- k-core ---------------------------------------------------------------------------------------------------

PAIRS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=40)


@settings(max_examples=100, deadline=None)
@given(PAIRS, st.integers(0, 4))
def test_the_k_core_equals_the_slow_one(pairs: list[tuple[int, int]], k: int) -> None:
    user, item = np.array(pairs, dtype=np.int32).reshape(-1, 2).T
    kept = core(user, item, k)
    assert [pair for pair, stays in zip(pairs, kept, strict=True) if stays] == slow.k_core(pairs, k)


def test_interactions_of_a_k_core_are_numbered_anew() -> None:
    rows = [(user, item, 5) for user in "ab" for item in ("3", "7")] + [("a", "5", 9), ("c", "7", 1)]
    got = Interactions.from_frame(events(rows), {"3": "Three", "7": "Seven"}, k_core=2)  # 5 needs no title
    assert (got.user_id, got.item_id, got.title) == (("a", "b"), ("3", "7"), ("Three", "Seven"))
    assert got.user.tolist() == [0, 0, 1, 1]
    assert got.item.tolist() == [0, 1, 0, 1]
    assert got.repairs == {}
    assert got.notes == ("2-core: 4 of 6 interactions are in it",)


def test_an_event_that_is_there_twice_does_not_help_into_the_k_core() -> None:
    rows = [
        ("a", "3", 5),
        ("a", "3", 5),
        ("b", "3", 5),
        ("b", "7", 5),
        ("a", "7", 6),
        ("b", "5", 1),
        ("b", "5", 1),
    ]
    assert Interactions.from_frame(events(rows), TITLES, k_core=2).item_id == ("3", "7")


def test_an_empty_k_core_is_an_error() -> None:
    with pytest.raises(
        UserError,
        match="wanted users and items with at least 3 interactions each, the 3-core is empty; choose",
    ):
        Interactions.from_frame(events([("a", "3", 5), ("a", "3", 6)]), TITLES, k_core=3)
