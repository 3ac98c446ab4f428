"""Who met what when, as arrays: numbered, sorted, without duplicates, reduced to a k-core.

Users and items are numbered in the order of their raw ids, compared as integers when all of them are. Within
a user the order is (time, raw item id), everywhere, unless another one is asked for: many events share a time, and
a split must not depend on the order of rows in a file. The time is that of the file, with what is below a second.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from triewise.errors import UserError
from triewise.settings import DataSettings

if TYPE_CHECKING:
    from triewise.arrays import Bool, Int8, Int32, Int64


PLAIN = DataSettings(source="")  # every choice at its default


@dataclass(frozen=True, eq=False)
class Events:
    """Interactions in the order of a file; R of them.

    Attributes:
        user: Index into ``user_id``, int32 (R,).
        item: Index into ``item_id``, int32 (R,).
        timestamp: Unix seconds, int64 (R,).
        user_id: Raw ids, each once, in the order of :func:`ordered_ids`.
        item_id: Raw ids, each once, in the order of :func:`ordered_ids`.
        nanosecond: Of the second, int32 (R,); None where all times are whole seconds.
        part: 0, 1 or 2 for rows that the source puts into train, valid or test, int8 (R,); None where it does not.
    """

    user: Int32 = field(repr=False)
    item: Int32 = field(repr=False)
    timestamp: Int64 = field(repr=False)
    user_id: tuple[str, ...] = field(repr=False)
    item_id: tuple[str, ...] = field(repr=False)
    nanosecond: Int32 | None = field(default=None, repr=False, kw_only=True)
    part: Int8 | None = field(default=None, repr=False, kw_only=True)

    def take(self, rows: Int64 | Bool) -> Events:
        """Some of the events; ids stay as they are."""
        arrays: dict[str, Any] = {
            name: None if column is None else column[rows] for name, column in self._columns().items()
        }
        return replace(self, **arrays)

    def _columns(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("user", "item", "timestamp", "nanosecond", "part")}


@dataclass(frozen=True, eq=False)
class Interactions(Events):
    """Events without duplicates, by user and within a user by (timestamp, raw item id); U users, I items.

    Attributes:
        title: Title of each item, I strings.
        in_place: Whether the rows stand in the order in which they are to be walked.
        repairs: What was left out or put right, and how often.
        notes: What a reader of the numbers should know.
    """

    title: tuple[str, ...] = field(repr=False)
    repairs: dict[str, int]
    notes: tuple[str, ...] = ()
    in_place: bool = field(default=False, repr=False)

    @classmethod
    def from_frame(cls, events: pl.DataFrame, title: Mapping[str, str], k_core: int = 0) -> Interactions:
        """Number users and items, then :meth:`from_events`.

        ``events`` has the columns ``user`` and ``item`` (strings) and ``timestamp`` (Unix seconds), in any order.
        """
        ids = [ordered_ids(events[name].unique().to_list()) for name in ("user", "item")]
        user, item = (
            events[name].cast(pl.Enum(known)).to_physical().cast(pl.Int32).to_numpy(writable=True)
            for name, known in zip(("user", "item"), ids, strict=True)
        )
        timestamp = events["timestamp"].cast(pl.Int64).to_numpy(writable=True)
        return cls.from_events(Events(user, item, timestamp, tuple(ids[0]), tuple(ids[1])), title, k_core)

    @classmethod
    def from_events(
        cls, events: Events, title: Mapping[str, str], k_core: int = 0, choices: DataSettings = PLAIN
    ) -> Interactions:
        """Sort, drop events that occur twice (same user, item and time), keep the k-core, attach titles.

        Counted in ``repairs``: ``rows_out_of_time_order`` (a row earlier than the row of the same user before
        it in the file), ``duplicate_rows``, ``rows_of_untitled_items``, ``titles_without_interactions``.

        Args:
            events: In any order.
            title: Title of each raw item id; those of items that do not occur are left out and counted. Items
                outside the k-core need none.
            k_core: Each user and each item that remains has at least so many interactions; 0 or 1 keeps all.
            choices: ``ties``, ``untitled``, ``keep_unused``, ``min_user`` and ``min_item`` are taken from there; a
                ``pipeline`` keeps events that occur twice.

        Raises:
            UserError: If the k-core is empty, or one of its items has no title or an empty one.
        """
        repairs = {"rows_out_of_time_order": _out_of_order(events)}
        if choices.untitled == "drop":
            known = np.array([bool(title.get(raw, "").strip()) for raw in events.item_id], dtype=bool)
            repairs["rows_of_untitled_items"] = int((~known[events.item]).sum())
            events = events if known.all() else events.take(known[events.item])
        kept, repairs["duplicate_rows"] = _in_order(events, choices.ties, choices.pipeline is not None)
        notes: tuple[str, ...] = ()
        least = max(k_core, choices.min_user), max(k_core, choices.min_item)
        if max(least) > 1:
            mask = core(kept.user, kept.item, *least)
            k = "/".join(dict.fromkeys(map(str, least)))  # users / items, where they differ
            if not mask.any():
                raise UserError(
                    f"wanted users and items with at least {k} interactions each, the {k}-core is empty; choose a "
                    "smaller k_core"
                )
            notes = (f"{k}-core: {int(mask.sum()):,} of {len(mask):,} interactions are in it",)
            kept = kept.take(mask)
        repairs["titles_without_interactions"] = len(title) - sum(item in title for item in events.item_id)
        user, user_id = _renumbered(kept.user, kept.user_id)
        item, item_id = _renumbered(kept.item, kept.item_id)
        _refuse_untitled([raw for raw in item_id if not title.get(raw, "").strip()], title)
        if choices.keep_unused:
            item, item_id = _with_unused(item, item_id, title)
            repairs["titles_without_interactions"] = 0
        return cls(
            user=user,
            item=item,
            timestamp=kept.timestamp,
            nanosecond=kept.nanosecond,
            part=kept.part,
            user_id=user_id,
            item_id=item_id,
            title=tuple(title[raw] for raw in item_id),
            repairs={name: count for name, count in repairs.items() if count},
            notes=notes,
            in_place=True,
        )

    @property
    def first(self) -> Int64:
        """Place of the first interaction of each user, int64 (U,)."""
        return np.searchsorted(self.user, np.arange(len(self.user_id)))

    def in_order(self) -> Interactions:
        """The same interactions, sorted; they are already, unless they were put together by hand."""
        if self.in_place:
            return self
        raw_order = {item: place for place, item in enumerate(ordered_ids(self.item_id))}
        place = np.array([raw_order[item] for item in self.item_id], dtype=np.int32)[self.item]
        keys = self.user, self.timestamp, place
        (u, t, p), (next_u, next_t, next_p) = [key[:-1] for key in keys], [key[1:] for key in keys]
        if ((u < next_u) | (u == next_u) & ((t < next_t) | (t == next_t) & (p <= next_p))).all():
            return self
        order = np.lexsort((place, self.timestamp, self.user))
        return replace(self, user=self.user[order], item=self.item[order], timestamp=self.timestamp[order])


def ordered_ids(ids: Iterable[str]) -> list[str]:
    """Raw ids in their order: as integers when all of them are, else as text.

    >>> ordered_ids(["10", "9"]), ordered_ids(["10", "9", "b"])
    (['9', '10'], ['10', '9', 'b'])
    """
    known = list(ids)
    if all(re.fullmatch(r"-?[0-9]{1,4000}", text) for text in known):  # Python converts no longer ones
        return sorted(known, key=lambda text: (int(text), text))
    return sorted(known)


def _in_order(events: Events, ties: str, every: bool = False) -> tuple[Events, int]:
    """Events by user and time, each once unless ``every`` one counts, and how many were left out.

    Without times nothing is known to occur twice.

    Events of one user and time are in the order of their raw item ids, or of the file, or in a random one that is
    always the same for the same events.
    """
    columns = {name: column for name, column in events._columns().items() if column is not None}
    keys = [name for name in ("user", "part", "timestamp", "nanosecond", "item") if name in columns]
    rows = pl.DataFrame(columns)
    if ties == "file":
        rows = rows.with_row_index("row")
    rows = rows.sort(keys, maintain_order=ties == "file")
    arrays: dict[str, Any] = {name: rows[name].to_numpy() for name in rows.columns}
    del rows
    every |= ties == "file" and len(events.user) > 0 and events.timestamp.max() < 0
    keep = np.full(len(events.user), every)
    keep[:1] = True
    for name in keys if not every else []:
        keep[1:] |= arrays[name][1:] != arrays[name][:-1]
    if not keep.all():
        arrays = {name: column[keep] for name, column in arrays.items()}
    if ties != "item":
        last = arrays.pop("row") if ties == "file" else np.random.default_rng(0).permutation(int(keep.sum()))
        order = np.lexsort((last, *(arrays[name] for name in reversed(keys[:-1]))))
        arrays = {name: column[order] for name, column in arrays.items()}
    return replace(events, **arrays), int((~keep).sum())


def _with_unused(
    item: Int32, item_id: tuple[str, ...], title: Mapping[str, str]
) -> tuple[Int32, tuple[str, ...]]:
    """Items numbered anew among all that have a title."""
    every = ordered_ids({*item_id, *(raw for raw, text in title.items() if text.strip())})
    place = {raw: number for number, raw in enumerate(every)}
    return np.array([place[raw] for raw in item_id], dtype=np.int32)[item], tuple(every)


ID_FORMS: dict[str, Callable[[str], str]] = {
    "outer space": str.strip,
    "'.0' at the end": lambda text: re.sub(r"\.0+$", "", text),
    "leading zeros": lambda text: text.lstrip("0") or "0",
    "case": str.casefold,
    "outer space, '.0', zeros or case": lambda text: id_folded(text),
}


def id_folded(text: str) -> str:
    """A raw id without outer space, ``.0`` at its end, leading zeros and case."""
    return re.sub(r"\.0+$", "", text.strip()).lstrip("0").casefold() or "0"


def _refuse_untitled(untitled: list[str], title: Mapping[str, str]) -> None:
    """Raise one line for items without title; where ids of titles differ from theirs in form only, it says in what."""
    if not untitled:
        return
    hint = "add them, or leave out their interactions with --untitled drop"
    for what, fold in ID_FORMS.items():
        known = {fold(raw): raw for raw in title}
        close = [
            (raw, known[fold(raw)]) for raw in untitled if fold(raw) in known and known[fold(raw)] != raw
        ]
        if close:
            share = "all" if len(close) == len(untitled) else f"{len(close)} of them"
            hint = (
                f"{share} would match without {what}: there is a title for {close[0][1]!r}; write ids alike on both "
                "sides"
            )
            break
    raise UserError(f"wanted a title for each item, {len(untitled)} have none, first {untitled[0]!r}; {hint}")


def core(user: Int32, item: Int32, k: int, k_item: int | None = None) -> Bool:
    """Which interactions (R,) are in the k-core: each user and each item among them has at least ``k`` of them.

    With ``k_item`` that is the least number of an item, and ``k`` that of a user.

    Users and items below ``k`` are left out, which may bring others below, until none is; the largest such set
    does not depend on the order in which they go. A repeated purchase counts each time.

    >>> core(np.array([0, 0, 1, 1, 2]), np.array([0, 1, 0, 1, 0]), 2)
    array([ True,  True,  True,  True, False])
    """
    mask = np.zeros(len(user), dtype=bool)
    kept = np.arange(len(user))
    while len(kept):
        enough = (np.bincount(user) >= k)[user] & (np.bincount(item) >= (k_item or k))[item]
        if enough.all():
            break
        kept, user, item = kept[enough], user[enough], item[enough]
    mask[kept] = True
    return mask


def _out_of_order(events: Events) -> int:
    """Rows that are earlier than the row of the same user before them in the file."""
    time = events.timestamp  # what is below a second is rarely out of order alone
    if not (time[1:] < time[:-1]).any():
        return 0
    order = np.argsort(events.user, kind="stable")
    user, time = events.user[order], time[order]
    return int(((user[1:] == user[:-1]) & (time[1:] < time[:-1])).sum())


def _renumbered(index: Int32, ids: tuple[str, ...]) -> tuple[Int32, tuple[str, ...]]:
    """Indices without gaps, and the ids that are left."""
    used = np.bincount(index, minlength=len(ids)) > 0
    if used.all():
        return index, ids
    new = np.cumsum(used, dtype=np.int32) - np.int32(1)
    return new[index], tuple(ids[old] for old in np.flatnonzero(used).tolist())
