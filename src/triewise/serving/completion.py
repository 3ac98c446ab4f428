r"""Titles that begin with what somebody typed, or have a word that does: for a million titles in milliseconds.

Titles stand in long texts, words apart by one space, titles by a line break. Searching them for ``\n`` and the typed
words finds titles that begin so, for a space and the words those with such a word further on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from copy import copy
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from triewise.arrays import Ints
    from triewise.data import Catalog

AT_ONCE = 20_000  # titles of a text; other threads run in between


class Completion:
    """An index of titles.

    Args:
        titles: Of the items.
    """

    def __init__(self, titles: Sequence[str]) -> None:
        self._n_items = len(titles)
        self._texts = list(_texts(titles, 0))

    def changed(self, place: Ints, titles: Sequence[str]) -> Completion:
        """The same where items are elsewhere, and others behind them; texts that are there are not made again.

        Args:
            place: Where each item is now; -1: gone.
            titles: Of the others.
        """
        other, stay = copy(self), int(np.count_nonzero(place >= 0))
        other._n_items = stay + len(titles)
        other._texts = [(text, start, place[items]) for text, start, items in self._texts]
        other._texts += _texts(titles, stay)
        return other

    def find(self, typed: str, limit: int) -> list[int]:
        """Item indices: first titles that begin with it, then those with a later word that does; each in order."""
        words = _words(typed)
        if not words:
            return list(range(min(limit, self._n_items)))
        first = list(islice(self._places("\n" + words), limit))
        later = (item for item in self._places(" " + words) if item not in first)
        return [*first, *islice(later, limit - len(first))]

    def _places(self, wanted: str) -> Iterator[int]:
        for text, start, items in self._texts:
            at = text.find(wanted)
            while at >= 0:
                n = int(np.searchsorted(start, at, side="right")) - 1
                if items[n] >= 0:
                    yield int(items[n])
                at = text.find(wanted, int(start[n + 1]))


def _texts(titles: Sequence[str], first: int) -> Iterator[tuple[str, Ints, Ints]]:
    """Texts of some titles, where each title begins in them, with the end, and its item, from ``first`` on."""
    for low in range(0, len(titles), AT_ONCE):
        parts = [_words(title) for title in titles[low : low + AT_ONCE]]
        start = np.cumsum([0, *(len(part) + 1 for part in parts)])
        yield "\n" + "\n".join(parts), start, first + low + np.arange(len(parts))


def completion_of(catalog: Catalog) -> Completion:
    """The index of a catalogue; of one that was changed mostly that of the one before, which is made once."""
    if catalog.origin is None:
        return _made(catalog)
    before, place = catalog.origin
    return completion_of(before).changed(place, catalog.title[np.count_nonzero(place >= 0) :])


@lru_cache(maxsize=1)
def _made(catalog: Catalog) -> Completion:
    return Completion(catalog.title)


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))
