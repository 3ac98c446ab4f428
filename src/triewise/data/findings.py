"""What a reader of results should know about a data set: cold targets, leaks, repeats, each with an example.

Nothing is changed here, and nothing is an error: published data has all of it. Rows are looked at a part at a
time, so that splits that are larger than the memory can be judged. Shape suffixes: R rows, I items.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from triewise.data.interactions import ID_FORMS, id_folded
from triewise.data.splits import LazySplit, Split
from triewise.data.times import FIRST
from triewise.data.titles import LONG_TITLE, has_control, has_markup, is_mis_decoded, look

if TYPE_CHECKING:
    from triewise.arrays import Bool, Int32, Int64
    from triewise.data.catalog import Catalog
    from triewise.data.interactions import Interactions

Rows = Split | LazySplit
_PART = 1 << 18  # rows looked at together
_COMPARED = ("user_id", "history", "target", "timestamp")
_DAY = 86_400  # seconds
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
    * ``look_alike_titles``: items whose title differs from another one in normal form, case, white space, entities or
      invisible characters only. ``markup_in_titles``, ``control_characters_in_titles``, ``mis_decoded_titles``,
      ``very_long_titles``: items; the example names the step of ``clean`` that repairs it.
    * ``titles_shared_by_items``: items whose title another item has too; both get the same place in a ranking.

    Where the interactions are known also:

    * ``repeated_interactions``: those with an item that the user had before; both papers keep them.
    * ``ties``: those whose time another interaction of the user has; what decides their order is ``ties`` of the
      settings. ``ties_test_targets``: test rows whose target is one of them.
    * ``times_before_1995``, ``times_in_the_future``: interactions.
    * ``look_alike_users``, ``look_alike_items``: raw ids that differ from another one in outer space, ``.0``, leading
      zeros or case only.

    Args:
        splits: ``train``, ``valid`` and ``test``.
        catalog: The items.
        interactions: What the splits were made from, sorted.
    """
    say = _Sayer(catalog)
    findings = [_cold(name, splits, say) for name in ("valid", "test")]
    findings += [_in_history(name, splits[name], say) for name in splits]
    findings += [_after_test(splits, say), _duplicates(splits, say), _short(splits["test"], say)]
    findings += _titles(catalog)
    empty = np.array([not title.strip() for title in catalog.title], dtype=bool)
    findings.append(_found("empty_titles", empty, lambda item: f"item {catalog.item_id[item]} has no title"))
    if interactions is not None:
        findings.append(_repeated(interactions, say))
        findings += _ties(interactions, splits["test"], say) + _times(interactions, say)
        for name, ids in (("users", interactions.user_id), ("items", interactions.item_id)):
            findings.append(
                _alike(f"look_alike_{name}", ids, id_folded, f"{name} {{}} and {{}} differ in {{}} only")
            )
    return findings


def said_of_ties(info: Mapping[str, Any]) -> tuple[str, ...]:
    """A sentence on what hangs on the order of events at one time, from ``dataset.json``; none where nothing does."""
    found = {finding["name"]: finding for finding in info.get("lint", ())}
    if not found.get("ties", {}).get("count"):
        return ()
    rows, targets = (
        f"{found[name]['count']:,} of {found[name]['of']:,} {what} ({found[name]['count'] / found[name]['of']:.1%})"
        for name, what in (("ties", "interactions"), ("ties_test_targets", "test targets"))
    )
    return (
        f"{rows} and {targets} share their time with another interaction of the user; what decides their order is "
        f"data.ties = {info['settings'].get('ties', 'item')}",
    )


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


def _titles(catalog: Catalog) -> list[Finding]:
    """Findings about the text of titles; each distinct title is looked at once."""
    distinct = list(dict.fromkeys(catalog.title))
    looks: dict[str, list[str]] = {}
    for title in distinct:
        if title.strip():
            looks.setdefault(look(title), []).append(title)
    alike = {title for titles in looks.values() if len(titles) > 1 for title in titles}

    def of_title(name: str, odd: Callable[[str], bool], sentence: str) -> Finding:
        hits = {title for title in distinct if odd(title)}
        mask = np.array([title in hits for title in catalog.title], dtype=bool)
        return _found(
            name,
            mask,
            lambda item: sentence.format(
                _quoted(catalog.title[item]), catalog.item_id[item], len(catalog.title[item])
            ),
        )

    def twin(item: int) -> str:
        one = catalog.title[item]
        other = next(title for title in looks[look(one)] if title != one)
        return (
            f"{_quoted(one, ascii)} and {_quoted(other, ascii)} look alike; clean = 'html+control+nfc+space' makes one "
            "title of those that differ in more than case"
        )

    shared = np.bincount(catalog.group, minlength=catalog.n_items)[catalog.group] > 1
    shared &= np.array([bool(title.strip()) for title in catalog.title], dtype=bool)

    def sharers(_: int) -> str:
        most = int(np.bincount(catalog.group[shared]).argmax())
        n = int((catalog.group == most).sum())
        return f"{n:,} of {catalog.n_items:,} items share the title {_quoted(catalog.title[most])}"

    step = "{} (item {}); clean = '%s' repairs it"
    return [
        _found("look_alike_titles", np.array([title in alike for title in catalog.title], dtype=bool), twin),
        of_title("markup_in_titles", has_markup, step % "html+tags"),
        of_title("control_characters_in_titles", has_control, step % "control"),
        of_title("mis_decoded_titles", is_mis_decoded, step % "mojibake"),
        of_title(
            "very_long_titles", lambda title: len(title) > LONG_TITLE, "{} (item {}) has {:,} characters"
        ),
        _found("titles_shared_by_items", shared, sharers),
    ]


def _quoted(title: str, form: Callable[[str], str] = repr) -> str:
    """A title for an example, with escapes for what cannot be seen."""
    return form(title if len(title) <= _LONGEST_TITLE else title[: _LONGEST_TITLE - 3] + "...")


def _ties(interactions: Interactions, test: Rows, say: _Sayer) -> list[Finding]:
    """Interactions that share user and time with a neighbour; without any time none is known to."""
    rows = interactions.in_order()
    keys: list[Int32 | Int64] = [
        rows.user,
        rows.timestamp,
        *([] if rows.nanosecond is None else [rows.nanosecond]),
    ]
    again = np.logical_and.reduce([key[1:] == key[:-1] for key in keys]) & (rows.timestamp[1:] >= 0)
    tied = np.zeros(len(rows.user), dtype=bool)
    tied[1:] = again
    tied[:-1] |= again

    def sentence(row: int) -> str:
        same = np.flatnonzero((rows.user == rows.user[row]) & (rows.timestamp == rows.timestamp[row]))
        items = ", ".join(say.title(int(item)) for item in rows.item[same[:3]])
        who = f"user {rows.user_id[rows.user[row]]}"
        return f"{who} has {len(same)} of one time ({items}); data.ties chooses their order"

    of_test = np.zeros(test.n_rows, dtype=bool)
    if isinstance(test, LazySplit):
        of_test = tied[test.place]
    return [
        _found("ties", tied, sentence),
        _found(
            "ties_test_targets", of_test, lambda row: say.row("test", test, row, " by the order of one time")
        ),
    ]


def _times(interactions: Interactions, say: _Sayer) -> list[Finding]:
    time = interactions.timestamp

    def sentence(row: int) -> str:
        return f"user {interactions.user_id[interactions.user[row]]} at {say.day(int(time[row]))}"

    late = time > datetime.now(UTC).timestamp() + _DAY
    early = (time >= 0) & (time < FIRST)
    return [_found("times_before_1995", early, sentence), _found("times_in_the_future", late, sentence)]


def _alike(name: str, ids: Sequence[str], fold: Callable[[str], str], sentence: str) -> Finding:
    """Raw ids that are one when they are folded."""
    folded = pl.Series([fold(raw) for raw in ids], dtype=pl.String)
    hit = folded.is_duplicated().to_numpy()

    def pair(first: int) -> str:
        one, other = (ids[place] for place in np.flatnonzero((folded == folded[first]).to_numpy())[:2])
        how = next(what for what, form in ID_FORMS.items() if form(one) == form(other))
        return sentence.format(repr(one), repr(other), how)

    return _found(name, hit, pair)


def _parts(rows: Rows) -> Iterator[tuple[int, Split]]:
    """Parts of a split and where each begins; without all that a user had before, which is long."""
    if isinstance(rows, LazySplit):
        rows = replace(rows, with_seen=False)
    for start in range(0, rows.n_rows, _PART):
        yield start, rows.part(start, min(start + _PART, rows.n_rows))
