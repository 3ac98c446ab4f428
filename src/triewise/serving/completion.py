r"""Titles that begin with what somebody typed, or have a word that does: for a million titles in milliseconds.

Titles stand in long texts, words apart by one space, titles by a line break. Searching them for ``\n`` and the typed
words finds titles that begin so, for a space and the words those with such a word further on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np

AT_ONCE = 20_000  # titles of a text; other threads run in between


class Completion:
    """An index of titles.

    Args:
        titles: Of the items.
    """

    def __init__(self, titles: Sequence[str]) -> None:
        self._n_items = len(titles)
        self._texts = []  # with the place where each title begins, and the end
        for first in range(0, len(titles), AT_ONCE):
            parts = [_words(title) for title in titles[first : first + AT_ONCE]]
            start = np.cumsum([0, *(len(part) + 1 for part in parts)])
            self._texts.append(("\n" + "\n".join(parts), start))

    def find(self, typed: str, limit: int) -> list[int]:
        """Item indices: first titles that begin with it, then those with a later word that does; each in order."""
        words = _words(typed)
        if not words:
            return list(range(min(limit, self._n_items)))
        first = list(islice(self._places("\n" + words), limit))
        later = (item for item in self._places(" " + words) if item not in first)
        return [*first, *islice(later, limit - len(first))]

    def _places(self, wanted: str) -> Iterator[int]:
        for n, (text, start) in enumerate(self._texts):
            at = text.find(wanted)
            while at >= 0:
                item = int(np.searchsorted(start, at, side="right")) - 1
                yield n * AT_ONCE + item
                at = text.find(wanted, int(start[item + 1]))


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))
