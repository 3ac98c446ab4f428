"""What a reader of results should know about a data set: cold targets, leaks, repeats, each with an example.

Nothing is changed here, and nothing is an error: published data has all of it. Rows are looked at a part at a
time, so that splits that are larger than the memory can be judged. Shape suffixes: R rows, I items.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from triewise.data.splits import LazySplit, Split

if TYPE_CHECKING:
    from triewise.arrays import Bool
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
    findings.append(_found("empty_titles", empty, lambda item: f"item {catalog.item_id[item]} has no title"))
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


def _found(name: str, hit: Bool, sentence: Callable[[int], str]) -> Finding:
    """What ``hit`` says of all (R,), with a sentence about the first one."""
    return Finding(name, int(hit.sum()), len(hit), sentence(int(hit.argmax())) if hit.any() else "")


def _cold(name: str, splits: Mapping[str, Rows], say: _Sayer) -> Finding:
    rows, what = splits[name], ", which is no training row's target"
    trained = np.bincount(splits["train"].target, minlength=say.catalog.n_items) > 0
    cold = ~trained[rows.target]
    return _found(f"cold_{name}_targets", cold, lambda row: say.row(name, rows, row, what))


def _in_history(name: str, rows: Rows, say: _Sayer) -> Finding:
    hit, what = np.zeros(rows.n_rows, dtype=bool), ", which is in the history"
    for start, part in _parts(rows):
        row = np.repeat(np.arange(part.n_rows), part.history.lengths)
        hit[start + row[part.history.values == part.target[row]]] = True
    return _found(f"targets_in_history_{name}", hit, lambda row: say.row(name, rows, row, what))


def _after_test(splits: Mapping[str, Rows], say: _Sayer) -> Finding:
    train, tested = splits["train"], splits["test"].timestamp
    first = int(tested[tested >= 0].min(initial=np.iinfo(np.int64).max))

    def sentence(row: int) -> str:
        title, day = say.title(int(train.target[row])), say.day(int(train.timestamp[row]))
        return (
            f"{say.who('train', train, row)} is trained on {title} of {day}; "
            f"the first test target is of {say.day(first)}"
        )

    return _found("train_targets_after_first_test", train.timestamp > first, sentence)


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
    again = ~pl.Series(prints[known]).is_first_distinct().to_numpy()

    def sentence(first: int) -> str:
        row = int(np.flatnonzero(known)[first])
        ends = np.cumsum([rows.n_rows for rows in read.values()])
        which = int(np.searchsorted(ends, row, side="right"))
        where, rows = list(read.items())[which]
        row += rows.n_rows - int(ends[which])
        return say.row(where, rows, row, " after the same history in an earlier row")

    return _found(name, again, sentence)


def _short(test: Rows, say: _Sayer) -> Finding:
    one = np.concatenate([np.zeros(0, dtype=bool), *(part.history.lengths == 1 for _, part in _parts(test))])
    name = "test_histories_of_one_item"
    return _found(name, one, lambda row: f"{say.who('test', test, row)} shows one item")


def _repeated(interactions: Interactions, say: _Sayer) -> Finding:
    n_items = len(interactions.item_id)
    pair = interactions.user.astype(np.int64) * n_items + interactions.item
    pair.sort()
    again = np.zeros(len(pair), dtype=bool)
    again[1:] = pair[1:] == pair[:-1]

    def sentence(row: int) -> str:
        user, item = divmod(int(pair[row]), n_items)
        times = int((pair == pair[row]).sum())
        return f"user {interactions.user_id[user]} has {say.title(item)} {times} times"

    return _found("repeated_interactions", again, sentence)


def _parts(rows: Rows) -> Iterator[tuple[int, Split]]:
    """Parts of a split and where each begins; without all that a user had before, which is long."""
    if isinstance(rows, LazySplit):
        rows = replace(rows, with_seen=False)
    for start in range(0, rows.n_rows, _PART):
        yield start, rows.part(start, min(start + _PART, rows.n_rows))
