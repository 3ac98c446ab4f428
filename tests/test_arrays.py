"""Ragged idioms against loops."""

from __future__ import annotations

import numpy as np
from hypothesis import given, strategies as st

from triewise.arrays import (
    Ragged,
    among_best,
    blank_lists,
    nth_largest,
    offsets_of,
    padded,
    place_in_run,
    ranges,
    runs,
    within,
)
from triewise.tokens import Trie

LENGTHS = st.lists(st.integers(0, 4), max_size=8)
KEYS = st.lists(st.integers(0, 5), max_size=20).map(sorted)


@given(LENGTHS)
def test_offsets_are_running_sums(lengths: list[int]) -> None:
    offsets = offsets_of(lengths)
    assert offsets.dtype == np.int64
    assert offsets.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]


@given(LENGTHS)
def test_places_within_rows_count_from_zero(lengths: list[int]) -> None:
    assert within(np.array(lengths, dtype=np.int64)).tolist() == [i for n in lengths for i in range(n)]


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 4)), max_size=8))
def test_ranges_lie_end_to_end(pairs: list[tuple[int, int]]) -> None:
    start, length = np.array(pairs, dtype=np.int32).reshape(-1, 2).T
    at, row = ranges(start, length)
    assert at.tolist() == [value for low, n in pairs for value in range(low, low + n)]
    assert row.tolist() == [i for i, (_, n) in enumerate(pairs) for _ in range(n)]


@given(KEYS)
def test_runs_and_places_in_them(keys: list[int]) -> None:
    key = np.array(keys, dtype=np.int64)
    starts = [i for i, k in enumerate(keys) if i == 0 or keys[i - 1] != k]
    assert runs(key).tolist() == starts + [len(keys)] * bool(keys)
    assert place_in_run(key).tolist() == [i - keys.index(k) for i, k in enumerate(keys)]


@given(KEYS, st.integers(1, 4), st.randoms())
def test_the_best_of_each_key_with_all_that_tie(keys: list[int], n: int, random) -> None:
    values = [random.randrange(4) / 2 for _ in keys]
    best = among_best(np.array(keys, dtype=np.int64), np.array(values, dtype=np.float32), n)
    for key, value, near in zip(keys, values, best, strict=True):
        own = sorted((v for k, v in zip(keys, values, strict=True) if k == key), reverse=True)
        assert near == (value >= own[min(n, len(own)) - 1])


@given(
    st.lists(st.lists(st.integers(-5, 5), min_size=4, max_size=4), min_size=1, max_size=5), st.integers(1, 4)
)
def test_the_nth_largest_of_each_row(rows: list[list[int]], n: int) -> None:
    assert nth_largest(np.array(rows), n).tolist() == [sorted(row, reverse=True)[n - 1] for row in rows]


def test_edges_below_nodes() -> None:
    trie = Trie.from_sequences([[1, 2, 9], [1, 3, 9], [1, 3, 5, 9], [7, 8, 9]])
    nodes = np.array([1, 0, int(trie.leaf[0]), 1], dtype=np.int64)
    child, row = trie.below(nodes)
    wanted = [(i, int(c)) for i, n in enumerate(nodes) for c in trie.children(int(n))[1]]
    assert list(zip(row.tolist(), child.tolist(), strict=True)) == wanted


def test_lists_without_items_and_padded_rows() -> None:
    items, scores = blank_lists(2, 3)
    assert items.tolist() == [[-1] * 3] * 2 and items.dtype == np.int32
    assert np.isneginf(scores).all() and scores.shape == (2, 3) and scores.dtype == np.float32
    assert padded(Ragged.from_lists([[4, 0], [], [7]])).tolist() == [[5, 1], [0, 0], [8, 0]]


@given(st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=8), st.slices(10))
def test_a_slice_has_the_rows_of_a_list(rows: list[list[int]], part: slice) -> None:
    assert [row.tolist() for row in Ragged.from_lists(rows)[part]] == rows[part]
