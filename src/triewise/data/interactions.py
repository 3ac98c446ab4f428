"""Who met what when, as arrays: numbered, sorted, without duplicates, reduced to a k-core.

Users and items are numbered in the order of their raw ids, compared as integers when all of them are. Within
a user the order is (timestamp, raw item id), everywhere: many events share a time stamp, and a split must not
depend on the order of rows in a file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from triewise.errors import UserError

if TYPE_CHECKING:
    from triewise.arrays import Bool, Int32, Int64


@dataclass(frozen=True, eq=False)
class Events:
    """Interactions in the order of a file; R of them.

    Attributes:
        user: Index into ``user_id``, int32 (R,).
        item: Index into ``item_id``, int32 (R,).
        timestamp: Unix seconds, int64 (R,).
        user_id: Raw ids, each once, in the order of :func:`ordered_ids`.
        item_id: Raw ids, each once, in the order of :func:`ordered_ids`.
    """

    user: Int32 = field(repr=False)
    item: Int32 = field(repr=False)
    timestamp: Int64 = field(repr=False)
    user_id: tuple[str, ...] = field(repr=False)
    item_id: tuple[str, ...] = field(repr=False)


@dataclass(frozen=True, eq=False)
class Interactions(Events):
    """Events without duplicates, by user and within a user by (timestamp, raw item id); U users, I items.

    Attributes:
        title: Title of each item, I strings.
        repairs: What was left out or put right, and how often.
        notes: What a reader of the numbers should know.
    """

    title: tuple[str, ...] = field(repr=False)
    repairs: dict[str, int]
    notes: tuple[str, ...] = ()

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
    def from_events(cls, events: Events, title: Mapping[str, str], k_core: int = 0) -> Interactions:
        """Sort, drop events that occur twice (same user, item and time), keep the k-core, attach titles.

        Counted in ``repairs``: ``rows_out_of_time_order`` (a row earlier than the row of the same user before
        it in the file), ``duplicate_rows``, ``titles_without_interactions``.

        Args:
            events: In any order.
            title: Title of each raw item id; those of items that do not occur are left out and counted. Items
                outside the k-core need none.
            k_core: Each user and each item that remains has at least so many interactions; 0 or 1 keeps all.

        Raises:
            UserError: If the k-core is empty, or one of its items has no title or an empty one.
        """
        repairs = {"rows_out_of_time_order": _out_of_order(events)}
        columns = {"user": events.user, "item": events.item, "timestamp": events.timestamp}
        rows = pl.DataFrame(columns).sort("user", "timestamp", "item")
        user, item, timestamp = (rows[name].to_numpy() for name in columns)
        del rows
        keep = np.ones(len(user), dtype=bool)
        keep[1:] = np.logical_or.reduce([column[1:] != column[:-1] for column in (user, item, timestamp)])
        repairs["duplicate_rows"] = int((~keep).sum())
        notes: tuple[str, ...] = ()
        if k_core > 1:
            unique = int(keep.sum())
            keep[keep] = core(user[keep], item[keep], k_core)
            if not keep.any():
                raise UserError(
                    f"wanted users and items with at least {k_core} interactions each, the {k_core}-core is empty; "
                    "choose a smaller k_core"
                )
            notes = (f"{k_core}-core: {int(keep.sum()):,} of {unique:,} interactions are in it",)
        repairs["titles_without_interactions"] = len(title) - sum(item in title for item in events.item_id)
        user, user_id = _renumbered(user[keep], events.user_id)
        item, item_id = _renumbered(item[keep], events.item_id)
        untitled = [raw for raw in item_id if not title.get(raw, "").strip()]
        if untitled:
            raise UserError(
                f"wanted a title for each item, {len(untitled)} have none, first {untitled[0]!r}; add them"
            )
        return cls(
            user=user,
            item=item,
            timestamp=timestamp[keep],
            user_id=user_id,
            item_id=item_id,
            title=tuple(title[raw] for raw in item_id),
            repairs={name: count for name, count in repairs.items() if count},
            notes=notes,
        )

    @property
    def first(self) -> Int64:
        """Place of the first interaction of each user, int64 (U,)."""
        return np.searchsorted(self.user, np.arange(len(self.user_id)))

    def in_order(self) -> Interactions:
        """The same interactions, sorted; they are already, unless they were put together by hand."""
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
    if all(re.fullmatch(r"-?[0-9]+", text) for text in known):
        return sorted(known, key=lambda text: (int(text), text))
    return sorted(known)


def core(user: Int32, item: Int32, k: int) -> Bool:
    """Which interactions (R,) are in the k-core: each user and each item among them has at least ``k`` of them.

    Users and items below ``k`` are left out, which may bring others below, until none is; the largest such set
    does not depend on the order in which they go. A repeated purchase counts each time.

    >>> core(np.array([0, 0, 1, 1, 2]), np.array([0, 1, 0, 1, 0]), 2)
    array([ True,  True,  True,  True, False])
    """
    mask = np.zeros(len(user), dtype=bool)
    kept = np.arange(len(user))
    while len(kept):
        enough = (np.bincount(user) >= k)[user] & (np.bincount(item) >= k)[item]
        if enough.all():
            break
        kept, user, item = kept[enough], user[enough], item[enough]
    mask[kept] = True
    return mask


def _out_of_order(events: Events) -> int:
    """Rows that are earlier than the row of the same user before them in the file."""
    time = events.timestamp
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
