"""A trie made from the one before equals the one that is built from nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from triewise.arrays import Ragged
from triewise.errors import UserError
from triewise.tokens import Trie, changed_trie
from triewise.tokens.trie import _ARRAYS

TITLES = st.lists(st.integers(1, 3), max_size=5).map(lambda body: [*body, 0])


def rebuilt(old: list[list[int]], new: list[list[int]], source: list[int]) -> Trie:
    """The slow and obvious way."""
    fresh = iter(new)
    return Trie.from_sequences([old[i] if i >= 0 else next(fresh) for i in source])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_changed_trie_is_the_rebuilt_one(data: st.DataObject) -> None:
    old = data.draw(st.lists(TITLES, min_size=1, max_size=12))
    new = data.draw(st.lists(TITLES, max_size=6))
    kept = data.draw(st.lists(st.integers(0, len(old) - 1), unique=True, min_size=0 if new else 1))
    source = data.draw(st.permutations([*kept, *[-1] * len(new)]))
    made = changed_trie(Trie.from_sequences(old), np.array(source, dtype=np.int64), Ragged.from_lists(new))
    wanted = rebuilt(old, new, source)
    for name in _ARRAYS:
        assert np.array_equal(getattr(made, name), getattr(wanted, name)), name
        assert getattr(made, name).dtype == getattr(wanted, name).dtype
    assert made.fingerprint() == wanted.fingerprint()


def test_a_title_that_begins_another_is_refused() -> None:
    trie = Trie.from_sequences([[1, 2, 0], [3, 0]])
    with pytest.raises(UserError, match="wanted no title that begins another, got item 2, which another"):
        changed_trie(trie, np.array([0, 1, -1]), Ragged.from_lists([[1, 2]]))
    with pytest.raises(UserError, match="wanted no title that begins another, got item 1, which another"):
        changed_trie(trie, np.array([0, 1, -1]), Ragged.from_lists([[3, 0, 4]]))
    assert changed_trie(trie, np.array([0, -1]), Ragged.from_lists([[3, 0, 4]])).n_groups == 2
