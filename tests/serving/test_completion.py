"""Titles that begin with what was typed, against a loop over words."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from triewise.data import Catalog
from triewise.serving import completion
from triewise.serving.completion import Completion, completion_of


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


@given(
    st.lists(st.text("aB .", max_size=6), min_size=1, max_size=9),
    st.lists(st.text("aB .", max_size=6), max_size=5),
    st.data(),
)
@settings(deadline=None)
def test_a_changed_catalogue_is_completed_from_the_texts_before(
    titles: list[str], new: list[str], data: st.DataObject
) -> None:
    gone = sorted(data.draw(st.sets(st.integers(0, len(titles) - 1))))
    ids = [str(i) for i in range(len(titles))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(completion, "AT_ONCE", 3)
        base = Catalog.from_titles(ids, titles)
        made = base.changed(np.array(gone, dtype=np.int64), [(f"n{i}", title) for i, title in enumerate(new)])
        assert completion_of(base) is completion_of(base)
        for typed in ("a", "b a", ""):
            assert completion_of(made).find(typed, 3) == slowly(list(made.title), typed, 3)
