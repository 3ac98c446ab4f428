"""What a reader of results should know about a data set: cold targets, leaks, repeats, each with an example.

Nothing is changed here, and nothing is an error: published data has all of it. Rows are looked at a part at a
time, so that splits that are larger than the memory can be judged. Shape suffixes: R rows, I items.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import numpy as np

from triewise.data.splits import LazySplit, Split

if TYPE_CHECKING:
    from triewise.data.catalog import Catalog
    from triewise.data.interactions import Interactions

Rows = Split | LazySplit
_PART = 1 << 18  # rows looked at together
_COMPARED = ("user_id", "history", "target", "timestamp")
_LONGEST_TITLE = 60  # letters of a title in an example


@dataclass(frozen=True)
class Finding:
    """One thing that was counted.

    Attributes:
        name: Which.
        count: How often.
        of: Out of how many.
        example: A sentence about the first one; empty where there is none.
    """

    name: str
    count: int
    of: int
    example: str


def count_findings(
    splits: Mapping[str, Rows], catalog: Catalog, interactions: Interactions | None = None
) -> list[Finding]:
    """Everything that is counted, also what does not occur.

    * ``cold_valid_targets``, ``cold_test_targets``: rows whose target is never the target of a training row.
    * ``targets_in_history_train``, ``_valid``, ``_test``: rows whose target is in their own history.
    * ``train_targets_after_first_test``: training rows that are later than the earliest test row: a leak across
      the split in time. Rows without a time are left out.
    * ``duplicate_rows``: rows that equal an earlier row in user, history, target and time, in whatever split.
      Rows without a user are left out.
    * ``test_histories_of_one_item``: test rows that show one item only.
    * ``empty_titles``: items whose title is empty or white space.
    * ``repeated_interactions``, where the interactions are known: those with an item that the user had before;
      both papers keep them.

    Args:
        splits: ``train``, ``valid`` and ``test``.
        catalog: The items.
        interactions: What the splits were made from, sorted.
    """
    say = _Sayer(catalog)
    findings = [_cold(name, splits, say) for name in ("valid", "test")]
    findings += [_in_history(name, splits[name], say) for name in splits]
    findings += [_after_test(splits, say), _duplicates(splits, say), _short(splits["test"], say)]
    empty = np.array([not title.strip() for title in catalog.title], dtype=bool)
    example = f"item {catalog.item_id[int(empty.argmax())]} has no title" if empty.any() else ""
    findings.append(Finding("empty_titles", int(empty.sum()), catalog.n_items, example))
    if interactions is not None:
        findings.append(_repeated(interactions, say))
    return findings


@dataclass(frozen=True)
class _Sayer:
    """Puts users, items and times into words."""

    catalog: Catalog

    def who(self, name: str, rows: Rows, row: int) -> str:
        user = rows.part(row, row + 1).user_id[0]
        return f"row {row + 1} of {name}" if user is None else f"user {user}"

    def row(self, name: str, rows: Rows, row: int, what: str) -> str:
        """A sentence about the target of one row."""
        return f"{self.who(name, rows, row)} is to get {self.title(int(rows.target[row]))}{what}"

    def title(self, item: int) -> str:
        text = " ".join(self.catalog.title[item].split())
        if not text:
            return f"item {self.catalog.item_id[item]}"
        return f"'{text if len(text) <= _LONGEST_TITLE else text[: _LONGEST_TITLE - 3] + '...'}'"

    def day(self, timestamp: int) -> str:
        try:
            return datetime.fromtimestamp(timestamp, UTC).strftime("%Y-%m-%d")
        except (OverflowError, OSError, ValueError):
            return f"time {timestamp}"


def _cold(name: str, splits: Mapping[str, Rows], say: _Sayer) -> Finding:
    rows = splits[name]
    trained = np.bincount(splits["train"].target, minlength=say.catalog.n_items) > 0
    cold = np.flatnonzero(~trained[rows.target])
    example = say.row(name, rows, int(cold[0]), ", which is no training row's target") if len(cold) else ""
    return Finding(f"cold_{name}_targets", len(cold), rows.n_rows, example)


def _in_history(name: str, rows: Rows, say: _Sayer) -> Finding:
    count, example = 0, ""
    for start, part in _parts(rows):
        row = np.repeat(np.arange(part.n_rows), part.history.lengths)
        hit = np.zeros(part.n_rows, dtype=bool)
        hit[row[part.history.values == part.target[row]]] = True
        if hit.any() and not count:
            example = say.row(name, rows, start + int(hit.argmax()), ", which is in the history")
        count += int(hit.sum())
    return Finding(f"targets_in_history_{name}", count, rows.n_rows, example)


def _after_test(splits: Mapping[str, Rows], say: _Sayer) -> Finding:
    name = "train_targets_after_first_test"
    train, test = splits["train"], splits["test"]
    known = test.timestamp[test.timestamp >= 0]
    if not len(known):
        return Finding(name, 0, train.n_rows, "")
    late = np.flatnonzero(train.timestamp > known.min())
    example = ""
    if len(late):
        row = int(late[0])
        title, day = say.title(int(train.target[row])), say.day(int(train.timestamp[row]))
        example = (
            f"{say.who('train', train, row)} is trained on {title} of {day}; "
            f"the first test target is of {say.day(int(known.min()))}"
        )
    return Finding(name, len(late), train.n_rows, example)


def _duplicates(splits: Mapping[str, Rows], say: _Sayer) -> Finding:
    """Rows with the same 64-bit fingerprint: a false pair is expected once in 400,000 data sets of 10 million rows.

    Rows made from interactions are not compared: those hold no event twice.
    """
    name = "duplicate_rows"
    read = {where: rows for where, rows in splits.items() if isinstance(rows, Split)}
    if not read:
        return Finding(name, 0, sum(rows.n_rows for rows in splits.values()), "")
    frames = [part.to_frame().select(_COMPARED) for rows in read.values() for _, part in _parts(rows)]
    prints = np.concatenate([frame.hash_rows().to_numpy() for frame in frames])
    known = np.concatenate([frame["user_id"].is_not_null().to_numpy() for frame in frames])
    place = np.flatnonzero(known)
    order = place[np.argsort(prints[place], kind="stable")]
    again = order[1:][prints[order[1:]] == prints[order[:-1]]]
    if not len(again):
        return Finding(name, 0, len(place), "")
    ends = np.cumsum([rows.n_rows for rows in read.values()])
    which = int(np.searchsorted(ends, again.min(), side="right"))
    where, rows = list(read.items())[which]
    row = int(again.min() - ends[which]) + rows.n_rows
    example = say.row(where, rows, row, " after the same history in an earlier row")
    return Finding(name, len(again), len(place), example)


def _short(test: Rows, say: _Sayer) -> Finding:
    one = np.zeros(test.n_rows, dtype=bool)
    for start, part in _parts(test):
        one[start : start + part.n_rows] = part.history.lengths == 1
    example = f"{say.who('test', test, int(one.argmax()))} shows one item" if one.any() else ""
    return Finding("test_histories_of_one_item", int(one.sum()), test.n_rows, example)


def _repeated(interactions: Interactions, say: _Sayer) -> Finding:
    n_items = len(interactions.item_id)
    pair = interactions.user.astype(np.int64) * n_items + interactions.item
    pair.sort()
    again = pair[1:] == pair[:-1]
    example = ""
    if again.any():
        first = pair[int(again.argmax())]
        user, item = divmod(int(first), n_items)
        times = np.searchsorted(pair, first, side="right") - np.searchsorted(pair, first)
        example = f"user {interactions.user_id[user]} has {say.title(item)} {times} times"
    return Finding("repeated_interactions", int(again.sum()), len(pair), example)


def _parts(rows: Rows) -> Iterator[tuple[int, Split]]:
    """Parts of a split and where each begins; without all that a user had before, which is long."""
    if isinstance(rows, LazySplit):
        rows = replace(rows, with_seen=False)
    for start in range(0, rows.n_rows, _PART):
        yield start, rows.part(start, min(start + _PART, rows.n_rows))
