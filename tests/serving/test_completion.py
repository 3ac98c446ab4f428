"""Titles that begin with what was typed, against a loop over words."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings, strategies as st

from triewise.serving import completion
from triewise.serving.completion import Completion


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def slowly(titles: list[str], typed: str, limit: int) -> list[int]:
    """The same, title by title."""
    wanted = " ".join(words(typed))
    suffixes = [[" ".join(words(title)[n:]) for n in range(len(words(title)))] for title in titles]
    first = [i for i, own in enumerate(suffixes) if own and own[0].startswith(wanted)]
    later = [i for i, own in enumerate(suffixes) if any(end.startswith(wanted) for end in own[1:])]
    found = [*first, *(i for i in later if i not in first)] if wanted else list(range(len(titles)))
    return found[:limit]


@given(
    st.lists(st.text("aB .\n-é", max_size=12), max_size=9), st.text("abB .é", max_size=4), st.integers(1, 5)
)
@settings(deadline=None)
def test_as_a_loop_finds_them(titles: list[str], typed: str, limit: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(completion, "AT_ONCE", 3)
        assert Completion(titles).find(typed, limit) == slowly(titles, typed, limit)


def test_known_titles() -> None:
    index = Completion(["(500) Days of Summer", "Toy Story (1995)", "Storytelling", "漢字の映画"])
    assert index.find("(500", 5) == [0] and index.find("STORY", 5) == [2, 1] and index.find("tory", 5) == []
    assert index.find("toy  st", 5) == [1] and index.find("漢", 5) == [3]
