"""Hypothesis strategies: small random catalogues of token sequences, and counts of their items."""

from __future__ import annotations

from hypothesis import strategies as st

TERMINATORS = (0, 3, 9)  # below, among and above the tokens of titles


@st.composite
def catalogues(draw: st.DrawFn, max_items: int = 12, max_tokens: int = 5) -> list[list[int]]:
    """Token sequences none of which begins another, some of them equal, in any order."""
    terminator = draw(st.sampled_from(TERMINATORS))
    token = st.integers(0, 6).filter(lambda t: t != terminator)
    bodies = draw(st.lists(st.lists(token, max_size=max_tokens), min_size=1, max_size=max_items))
    repeats = draw(st.lists(st.sampled_from(bodies), max_size=3))
    return draw(st.permutations([[*body, terminator] for body in bodies + repeats]))


def priors(n_items: int) -> st.SearchStrategy[list[int]]:
    """A count per item, many of them zero, at least one above; some huge."""
    count = st.one_of(st.just(0), st.integers(0, 5), st.integers(0, 10**9))
    return st.lists(count, min_size=n_items, max_size=n_items).filter(any)


@st.composite
def weighted_catalogues(draw: st.DrawFn, max_items: int = 12) -> tuple[list[list[int]], list[int]]:
    """A catalogue and a prior over its items."""
    sequences = draw(catalogues(max_items=max_items))
    return sequences, draw(priors(len(sequences)))
