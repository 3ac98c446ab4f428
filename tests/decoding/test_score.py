"""Scores of given candidates, and filters as places in the item order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from tests.conftest import SIX
from tests.decoding.test_beams import random_titles
from tests.reference import search as reference
from tests.strategies import catalogues
from tests.tiny_models import tiny_model
from triewise.decoding import TrieEngine, score
from triewise.decoding.filters import TitleFilter
from triewise.errors import UserError
from triewise.tokens import Trie

TOLERANCE = 1e-4


@settings(max_examples=40, deadline=None)
@given(
    st.data(),
    catalogues(),
    st.sampled_from(["trie", "vocabulary"]),
    st.sampled_from(["qwen2", "llama", "gpt2"]),
)
def test_scores_equal_one_forward_per_title(
    data: st.DataObject, titles: list[list[int]], support: Any, kind: str
) -> None:
    prompts = data.draw(
        st.lists(st.lists(st.integers(0, 29), min_size=1, max_size=5), min_size=1, max_size=3)
    )
    items = st.lists(st.integers(0, len(titles) - 1), max_size=6)
    candidates = data.draw(st.lists(items, min_size=len(prompts), max_size=len(prompts)))
    chunk = data.draw(st.integers(1, 9))
    model = tiny_model(kind)
    found = score(TrieEngine(model, Trie.from_sequences(titles), support, chunk=chunk), prompts, candidates)
    assert found.dtype == np.float32
    assert found.shape == (len(prompts), max(map(len, candidates)))
    for b, prompt in enumerate(prompts):
        wanted = reference.catalogue(model, prompt, titles, support)
        n = len(candidates[b])
        assert found[b, :n] == pytest.approx([wanted[i] for i in candidates[b]], abs=TOLERANCE)
        assert np.isneginf(found[b, n:]).all()


def test_a_model_without_a_tree_cache_scores_the_same() -> None:
    model = tiny_model("gemma3")
    with pytest.warns(UserWarning, match="plain, slower path"):
        found = score(TrieEngine(model, Trie.from_sequences(SIX), "vocabulary"), [[7, 8], [9]], [[0, 3], [5]])
    wanted = [reference.catalogue(model, prompt, SIX, "vocabulary") for prompt in ([7, 8], [9])]
    assert found[0] == pytest.approx([wanted[0][0], wanted[0][3]], abs=TOLERANCE)
    assert found[1, 0] == pytest.approx(wanted[1][5], abs=TOLERANCE)


def test_scores_of_nothing_and_bad_candidates() -> None:
    engine = TrieEngine(tiny_model(), Trie.from_sequences(SIX))
    assert score(engine, [[1], [2]], [[], []]).shape == (2, 0)
    with pytest.raises(UserError, match="wanted candidates lists for 2 users, got 1"):
        score(engine, [[1], [2]], [[0]])
    with pytest.raises(UserError, match=r"wanted item indices in \[0, 6\), got 6"):
        score(engine, [[1]], [[6]])


@settings(max_examples=60, deadline=None)
@given(st.data(), catalogues())
def test_a_filter_counts_what_lies_under_a_node(data: st.DataObject, titles: list[list[int]]) -> None:
    trie = Trie.from_sequences(titles)
    items = st.lists(st.integers(0, len(titles) - 1), max_size=len(titles))
    exclude, allow = data.draw(st.none() | items), data.draw(st.none() | items)
    free = {i for i in range(len(titles)) if i not in (exclude or []) and (allow is None or i in allow)}
    found = TitleFilter.of(trie, exclude, allow)
    if found is None:
        assert len(free) == len(titles)
        return
    under = [
        set(trie.item_order[lo:hi].tolist()) & free for lo, hi in zip(trie.item_lo, trie.item_hi, strict=True)
    ]
    assert found.count(np.arange(trie.n_nodes)).tolist() == [len(s) for s in under]
    assert [set(found.items(n).tolist()) for n in range(trie.n_nodes)] == under


@pytest.mark.parametrize("n_allowed", [0, 3, 150])
def test_short_and_long_allow_lists_count_alike(n_allowed: int) -> None:
    rng = np.random.default_rng(n_allowed)
    trie = Trie.from_sequences(random_titles(1, n=200))
    allow, exclude = rng.choice(200, size=n_allowed, replace=False), rng.choice(200, size=40)
    found = TitleFilter.of(trie, exclude, allow)
    assert found is not None
    free = np.isin(np.arange(200), allow) & ~np.isin(np.arange(200), exclude)
    assert found.count(np.arange(trie.n_nodes)).tolist() == trie.subtree_count(free).tolist()
    for node in range(0, trie.n_nodes, 7):
        under = trie.item_order[trie.item_lo[node] : trie.item_hi[node]]
        assert sorted(found.items(node).tolist()) == sorted(under[free[under]].tolist())
