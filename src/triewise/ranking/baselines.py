"""Item-kNN: items that the same users had are neighbours, and a history speaks for the neighbours of its items.

Sarwar et al. (WWW 2001) with the cosine of the binary user-item matrix; the k-th last item of a history counts
``decay ** (k - 1)``, as sequence-aware variants do (Ludewig and Jannach, UMUAI 2018). Co-occurrences are counted
for a block of items at a time and only the nearest neighbours are kept: no matrix of items x items.

Dimension key: B users, I items, N neighbours, P different pairs of items, those of a block in rows of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from triewise.arrays import Float32, Float64, Int32, Int64, Ragged, among_best, offsets_of, place_in_run
from triewise.ranking.ranking import Groups, ItemLists, check_histories, rank_items

if TYPE_CHECKING:
    from triewise.data import Split


@dataclass(frozen=True)
class MostPopular:
    """Everybody gets the items with most training interactions; the row every method has to beat.

    Attributes:
        groups: The units of ranking.
        counts: (I,) interactions of each item in the training split.
    """

    groups: Groups
    counts: Int64
    recommend = rank_items

    def item_scores(self, histories: ItemLists) -> Float32:
        """(B, I) the counts, for everybody alike; a view that takes no memory."""
        check_histories(histories, self.groups)
        return np.broadcast_to(self.counts.astype(np.float32), (len(histories), len(self.counts)))


PAIRS_AT_ONCE = 1 << 22  # co-occurrences looked at together
TINY = 1e-12  # popularity orders what no neighbour speaks for, and nothing else


@dataclass(frozen=True)
class ItemKNN:
    """A recommender of neighbours; deterministic, nothing is drawn.

    Attributes:
        groups: The units of ranking.
        neighbour: (I, N) int32 nearest items, nearest first, ties by index.
        cosine: (I, N) float32 in [0, 1]; 0 where there are fewer neighbours.
        counts: (I,) int64, users of each item in the training rows.
        decay: Weight of an item of a history over that of the next younger one, in [0, 1].
    """

    groups: Groups
    neighbour: Int32
    cosine: Float32
    counts: Int64
    decay: float = 0.6
    recommend = rank_items

    @classmethod
    def fit(cls, train: Split, groups: Groups, *, neighbours: int = 50, decay: float = 0.6) -> ItemKNN:
        """Count which items the same users had, in histories and targets of the training rows.

        The defaults were chosen on validation rows of ml-100k and amazon_office (``docs/log.md``).

        Args:
            train: Training rows; a row without a user is a user of its own.
            groups: The units of ranking.
            neighbours: How many to keep of each item.
            decay: See the class.
        """
        n_items = groups.n_items
        items_of = _items_of_users(train, n_items)
        by_item = np.argsort(items_of.values, kind="stable")
        user = np.repeat(np.arange(len(items_of)), items_of.lengths)[by_item]
        counts = np.bincount(items_of.values, minlength=n_items)
        first = offsets_of(counts)  # of an item's users in ``user``
        before = offsets_of(items_of.lengths[user])[first]  # co-occurrences, by item
        width = min(neighbours, max(n_items - 1, 1))
        nearest = np.zeros((n_items, width), dtype=np.int32)
        cosine = np.zeros((n_items, width), dtype=np.float32)
        low = 0
        while low < n_items:
            high = max(low + 1, int(np.searchsorted(before, before[low] + PAIRS_AT_ONCE, side="right")) - 1)
            users = user[first[low] : first[high]]
            with_ = Ragged.windows(items_of.values, items_of.offsets[users], items_of.lengths[users]).values
            key = np.repeat(np.arange(high - low) * n_items, np.diff(before[low : high + 1])) + with_
            key, together = _counted(key, (high - low) * n_items)
            row, item = key // n_items, key % n_items
            near = together / np.sqrt(counts[low + row].astype(np.float64) * counts[item])
            near[item == low + row] = 0.0  # everything is nearest to itself
            row, item, near, place = _nearest(row, item, near, width)
            nearest[low + row, place], cosine[low + row, place] = item, near
            low = high
        return cls(groups, nearest, cosine, counts, decay)

    def item_scores(self, histories: ItemLists) -> Float32:
        """(B, I) float32, >= 0: weighted sum of the cosines to the items of each history."""
        check_histories(histories, self.groups)
        scores = np.tile((TINY * self.counts).astype(np.float32), (len(histories), 1))
        for row, history in zip(scores, histories, strict=True):
            item = np.asarray(history, dtype=np.int64)
            weight = (self.decay ** np.arange(len(item))[::-1]).astype(np.float32)
            np.add.at(row, self.neighbour[item], self.cosine[item] * weight[:, None])
        return scores


def _items_of_users(train: Split, n_items: int) -> Ragged:
    """Every user's items, each once, ascending."""
    known: dict[object, int] = {}
    row = [known.setdefault(n if user is None else user, len(known)) for n, user in enumerate(train.user_id)]
    user = np.concatenate([np.repeat(row, train.history.lengths), row]).astype(np.int64)
    item = np.concatenate([train.history.values, train.target])
    pair, _ = _counted(user * n_items + item, len(known) * n_items)
    offsets = np.searchsorted(pair, np.arange(len(known) + 1) * n_items)
    return Ragged((pair % n_items).astype(np.int32), offsets)


def _counted(key: Int64, size: int) -> tuple[Int64, Int64]:
    """Different keys below ``size``, ascending, and how often each occurs."""
    if size > 4 * PAIRS_AT_ONCE:
        different, count = np.unique(key, return_counts=True)
        return different, count
    count = np.bincount(key, minlength=size)
    different = np.flatnonzero(count)
    return different, count[different]


def _nearest(row: Int64, item: Int64, near: Float64, width: int) -> tuple[Int64, Int64, Float64, Int64]:
    """Of pairs (P,), row by row, the ``width`` nearest of each row: row, item, cosine and place, nearest first."""
    kept = among_best(row, near, width)  # no need to sort them all
    row, item, near = row[kept], item[kept], near[kept]
    # Stable: of equally near items the lower index comes first.
    order = np.lexsort((-near, row))
    place = place_in_run(row)  # the rows stay where they are
    order, place = order[place < width], place[place < width]
    return row[order], item[order], near[order], place
