r"""Titles that begin with what somebody typed, or have a word that does: for a million titles in milliseconds.

All titles stand in one text, words apart by one space, titles by a line break. Searching it for ``\n`` and the typed
words finds titles that begin so, for a space and the words those with such a word further on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np

AT_ONCE = 5000  # titles; other threads run in between


class Completion:
    """An index of titles.

    Args:
        titles: Of the items.
    """

    def __init__(self, titles: Sequence[str]) -> None:
        parts: list[str] = []
        for start in range(0, len(titles), AT_ONCE):
            parts += map(_words, titles[start : start + AT_ONCE])
        self._text = "\n" + "\n".join(parts)
        self._start = np.cumsum([0, *(len(part) + 1 for part in parts)])

    def find(self, typed: str, limit: int) -> list[int]:
        """Item indices: first titles that begin with it, then those with a later word that does; each in order."""
        words = _words(typed)
        if not words:
            return list(range(min(limit, len(self._start) - 1)))
        first = list(islice(self._places("\n" + words), limit))
        later = (item for item in self._places(" " + words) if item not in first)
        return [*first, *islice(later, limit - len(first))]

    def _places(self, wanted: str) -> Iterator[int]:
        at = self._text.find(wanted)
        while at >= 0:
            item = int(np.searchsorted(self._start, at, side="right")) - 1
            yield item
            at = self._text.find(wanted, int(self._start[item + 1]))


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))
