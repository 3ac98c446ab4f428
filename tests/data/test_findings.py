"""What is counted, by hand, and that it is the same however the rows are given."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings, strategies as st

from triewise.arrays import Ragged
from triewise.data import Catalog, Interactions, Split, findings as room
from triewise.data.findings import Finding, count_findings
from triewise.data.splits import NAMES, WAYS, lazy_splits

CATALOG = Catalog.from_titles("abcdef", ["Alien", "Brazil", "Casino  (1995)\n", "", "Eraserhead", "x" * 99])

Row = tuple[str | None, list[int], int, int]  # user, history, target, time


def split(*rows: Row) -> Split:
    user, history, target, time = zip(*rows, strict=True) if rows else ((), (), (), ())
    return Split(
        np.array(user, dtype=object),
        Ragged.from_lists(history),
        np.array(target, dtype=np.int32),
        np.array(time, dtype=np.int64),
    )


def found(train: Split, valid: Split, test: Split) -> dict[str, Finding]:
    findings = count_findings({"train": train, "valid": valid, "test": test}, CATALOG)
    assert len({finding.name for finding in findings}) == len(findings)
    return {finding.name: finding for finding in findings}


CLEAN = (split(("u", [0], 1, 10)), split(("u", [0, 2], 1, 20)), split(("v", [0, 2], 1, 30)))


def test_nothing_is_found_in_clean_rows() -> None:
    findings = found(*CLEAN)
    assert {finding.name for finding in findings.values() if finding.count} == {"empty_titles"}
    assert findings["cold_test_targets"] == Finding("cold_test_targets", 0, 1, "")
    assert findings["empty_titles"] == Finding("empty_titles", 1, 6, "item d has no title")


def test_targets_that_training_never_has_are_cold() -> None:
    valid = split(("u", [0], 1, 20), ("w", [0], 0, 21))
    test = split(("v", [0], 2, 30), ("u", [0, 1], 1, 31), ("v", [0], 5, 32))
    findings = found(CLEAN[0], valid, test)
    example = "user w is to get 'Alien', which is no training row's target"
    assert findings["cold_valid_targets"] == Finding("cold_valid_targets", 1, 2, example)
    assert findings["cold_test_targets"].count == 2
    assert "'Casino (1995)'" in findings["cold_test_targets"].example  # one sentence, one line


def test_a_target_in_its_own_history_is_counted_once_a_row() -> None:
    test = split(("v", [0, 2], 1, 30), (None, [1, 0, 1], 1, 30), ("v", [1], 1, 31))
    findings = found(CLEAN[0], CLEAN[1], test)
    example = "row 2 of test is to get 'Brazil', which is in the history"
    assert findings["targets_in_history_test"] == Finding("targets_in_history_test", 2, 3, example)
    assert findings["targets_in_history_train"].count == findings["targets_in_history_valid"].count == 0


def test_training_later_than_the_first_test_target_is_a_leak() -> None:
    train = split(("u", [0], 1, 30), ("v", [0], 1, 31), ("v", [0], 3, 86400 * 366), ("w", [0], 1, -1))
    findings = found(train, CLEAN[1], split(("v", [0, 2], 1, -1), ("v", [0, 2], 1, 30)))
    example = "user v is trained on 'Brazil' of 1970-01-01; the first test target is of 1970-01-01"
    name = "train_targets_after_first_test"
    assert findings[name] == Finding(name, 2, 4, example)
    assert found(train, CLEAN[1], split(("v", [0], 1, -1)))[name] == Finding(name, 0, 4, "")
    findings = found(split(("u", [0], 3, 10**17)), CLEAN[1], CLEAN[2])
    assert "trained on item d of time 100000000000000000;" in findings[name].example


def test_equal_rows_are_duplicates_in_whatever_split() -> None:
    train = split(
        ("u", [0], 1, 10), ("u", [0], 1, 10), ("u", [0, 0], 1, 10), ("v", [0], 1, 10), ("u", [0], 1, 11)
    )
    valid = split(("u", [0], 1, 10), (None, [0], 1, 10), (None, [0], 1, 10))
    findings = found(train, valid, CLEAN[2])
    example = "user u is to get 'Brazil' after the same history in an earlier row"
    assert findings["duplicate_rows"] == Finding("duplicate_rows", 2, 7, example)
    assert found(CLEAN[0], CLEAN[0], CLEAN[2])["duplicate_rows"].count == 1


def test_test_rows_that_show_one_item() -> None:
    test = split(("u", [0, 1], 1, 30), ("v", [4], 1, 30))
    finding = found(CLEAN[0], CLEAN[1], test)["test_histories_of_one_item"]
    assert finding == Finding("test_histories_of_one_item", 1, 2, "user v shows one item")


def test_a_long_title_is_cut() -> None:
    example = found(CLEAN[0], CLEAN[1], split(("v", [0], 5, 30)))["cold_test_targets"].example
    assert f"'{'x' * 57}...'" in example


# --- rows that are not spelled out ----------------------------------------------------------------------------

EVENTS = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 5), st.integers(0, 30)), min_size=12, max_size=60, unique=True
)


def interactions(rows: list[tuple[int, int, int]]) -> Interactions:
    frame = pl.DataFrame(
        [(str(user), "abcdef"[item], time) for user, item, time in rows],
        schema={"user": pl.String, "item": pl.String, "timestamp": pl.Int64},
        orient="row",
    )
    return Interactions.from_frame(frame, dict(zip("abcdef", "ABCDEF", strict=True)))


@pytest.mark.parametrize("way", WAYS[:3])
@settings(max_examples=25, deadline=None)
@given(rows=EVENTS)
def test_lazy_splits_and_the_rows_they_stand_for_give_the_same(
    way: str, rows: list[tuple[int, int, int]]
) -> None:
    known = interactions(rows)
    catalog = Catalog.from_titles(known.item_id, known.title)
    short = dict(zip(NAMES, lazy_splits(known, way, 3), strict=True))
    whole = {name: part.part(0, part.n_rows) for name, part in short.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "_PART", 4)
        findings = count_findings(short, catalog, known)
    of_interactions = [finding.name for finding in count_findings(short, catalog, known)][-7:]
    without = [finding for finding in findings if finding.name not in ("duplicate_rows", *of_interactions)]
    wanted = [finding for finding in count_findings(whole, catalog) if finding.name != "duplicate_rows"]
    assert without == wanted
    pairs = [row[:2] for row in rows]
    assert findings[-7].count == len(pairs) - len(set(pairs))
    if way != "leave-one-out":
        after = next(f for f in findings if f.name == "train_targets_after_first_test")
        assert after.count == 0  # that is what a split in time is for


def test_repeated_interactions_are_counted_with_an_example() -> None:
    rows = [(0, 0, 1), (0, 1, 2), (0, 0, 3), (0, 0, 4), (1, 0, 5), (1, 1, 6)]
    known = interactions(rows)
    catalog = Catalog.from_titles(known.item_id, known.title)
    finding = count_findings(
        dict(zip(NAMES, lazy_splits(known, "leave-one-out"), strict=True)), catalog, known
    )[-7]
    assert finding == Finding("repeated_interactions", 2, 6, "user 0 has 'A' 3 times")
