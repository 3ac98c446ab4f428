"""Items, titles, groups of equal titles."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from triewise.data import Catalog
from triewise.data.titles import clean_titles
from triewise.errors import UserError

CATALOG = Catalog.from_titles(["1", "2", "7", "9"], ["Heat", "Alien", "Heat", ""])


def test_equal_titles_form_a_group_named_by_its_lowest_item() -> None:
    assert CATALOG.group.tolist() == [0, 1, 0, 3]
    assert CATALOG.group.dtype == np.int32
    assert (CATALOG.n_items, CATALOG.n_titles) == (4, 3)
    assert repr(CATALOG) == "Catalog(4 items, 3 titles)"


def test_case_and_white_space_make_another_title() -> None:
    assert Catalog.from_titles("abc", ["Heat", "heat", "Heat "]).n_titles == 3


def test_index_takes_the_lowest_item_of_a_title() -> None:
    assert [CATALOG.index(title) for title in ("Heat", "Alien", "")] == [0, 1, 3]


def test_an_unknown_title_is_answered_with_the_nearest_ones() -> None:
    with pytest.raises(
        UserError, match=r"of the catalogue \(3 titles\), got 'Alein'; the nearest are 'Alien'"
    ):
        CATALOG.index("Alein")
    with pytest.raises(UserError, match="got 'HEAT'; the nearest are 'Heat'; check"):
        CATALOG.index("HEAT")
    with pytest.raises(UserError, match="got 'xyzzy'; check the spelling"):
        CATALOG.index("xyzzy")


def test_a_frame_gives_the_catalogue_back() -> None:
    frame = CATALOG.to_frame(np.array([3, 0, 1, 0], dtype=np.int32))
    assert dict(frame.schema).keys() == {"item", "item_id", "title", "group", "train_targets"}
    assert [str(kind) for kind in frame.dtypes] == ["Int32", "String", "String", "Int32", "Int32"]
    again = Catalog.from_frame(frame)
    assert (again.item_id, again.title) == (CATALOG.item_id, CATALOG.title)
    assert again.group.tolist() == CATALOG.group.tolist()
    assert "train_targets" not in CATALOG.to_frame().columns


def test_ids_and_titles_must_agree_in_number() -> None:
    with pytest.raises(ValueError, match="got 2 ids and 1 titles"):
        Catalog.from_titles(["1", "2"], ["Heat"])


def test_titles_are_left_as_they_are_unless_asked() -> None:
    odd = (" a&amp;b\n", "None", "")
    assert clean_titles(odd) == odd
    with pytest.raises(
        UserError, match=r"wanted clean to be 'none', 'all' or steps of mojibake, .*, got 'html\+x'; choose"
    ):
        clean_titles(odd, "html+x")


@pytest.mark.parametrize(
    ("title", "cleaned"),
    [
        (" a&amp;b\n", "a&b"),
        ("Ink  &\t\n well", "Ink & well"),
        ("&quot;Heat&quot; &#40;1995&#x29;", '"Heat" (1995)'),
        ("AT&amp;amp;T", "AT&amp;T"),  # escaped twice, unescaped once
        ("a&nbsp;b\u2003c", "a b c"),
        ("fish & chips &unknown; <b>", "fish & chips &unknown; <b>"),
        ("None", "None"),
        ("&nbsp;", ""),
    ],
)
def test_cleaning_unescapes_html_once_and_collapses_white_space(title: str, cleaned: str) -> None:
    assert clean_titles([title], "html+space") == (cleaned,)


NAMES = st.sampled_from(
    ["Heat", " Heat", "Heat ", "Cafe\u0301", "Caf\u00e9", " Caf\u00e9", "Alien", "", "\u3000"]
)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_changed_catalogue_is_the_rebuilt_one(data: st.DataObject) -> None:
    ids, titles = [f"old-{i}" for i in range(8)], data.draw(st.lists(NAMES, min_size=8, max_size=8))
    made = Catalog.from_titles(ids, titles)
    for step in range(2):  # a changed one can be changed again
        gone = data.draw(st.sets(st.integers(0, made.n_items - 1), max_size=4))
        new = [(f"{step}-{i}", title) for i, title in enumerate(data.draw(st.lists(NAMES, max_size=4)))]
        made = made.changed(np.array(sorted(gone), dtype=np.int64), new)
        ids = [raw for i, raw in enumerate(ids) if i not in gone] + [raw for raw, _ in new]
        titles = [title for i, title in enumerate(titles) if i not in gone] + [title for _, title in new]
        wanted = Catalog.from_titles(ids, titles)
        assert (made.item_id, made.title) == (wanted.item_id, wanted.title)
        assert made.group.tolist() == wanted.group.tolist() and made.group.dtype == np.int32
        for ours, theirs in (
            (made.item_of_id, wanted.item_of_id),
            (made.item_of_title, wanted.item_of_title),
        ):
            assert dict(ours) == theirs and len(ours) == len(theirs) and "old" not in ours
        assert made._of_form == wanted._of_form and made.n_titles == wanted.n_titles
        assert [made.spelled(name) for name in titles] == [wanted.spelled(name) for name in titles]
