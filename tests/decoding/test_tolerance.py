"""Half precision: a measured tolerance, and titles within it are said to be tied."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from tests.conftest import SIX
from tests.model_families import TITLES
from tests.tiny_models import tiny_model
from triewise.cache import cache_folder
from triewise.decoding import TrieEngine, beam_search, exact_search, rank_catalogue
from triewise.decoding.scoring import tied_places
from triewise.models import Head, load_backbone
from triewise.ranking import Ranking
from triewise.tokens import Trie

RNG = np.random.default_rng(0)
CATALOGUE = [[*RNG.integers(3, 100, RNG.integers(3, 8)).tolist(), 2] for _ in range(60)]
PROMPTS = [RNG.integers(3, 100, RNG.integers(4, 60)).tolist() for _ in range(16)]
K = 10
HALF = [(dtype, support) for dtype in ("bfloat16", "float16") for support in ("trie", "vocabulary")]
SEARCHES: list[Callable[..., Ranking]] = [rank_catalogue, exact_search, beam_search]


@cache
def engine(dtype: str, support: Any, kind: str = "llama") -> TrieEngine:
    model = tiny_model(kind, vocabulary=100).to(getattr(torch, dtype))
    return TrieEngine(model, Trie.from_sequences(CATALOGUE), support)


def beyond(given: TrieEngine, prompts: list[list[int]], other: TrieEngine | None = None) -> Iterator[float]:
    """By how much titles that one search returns and another does not are away from the last place, by the other."""
    whole = rank_catalogue(given, prompts)
    scores = np.take_along_axis(whole.scores, np.argsort(whole.items, axis=1), axis=1)
    exact = exact_search(other or given, prompts, K)
    assert exact.certified.all()
    for b, row in enumerate(scores):
        last = whole.scores[b, K - 1]
        ours, theirs = set(exact.items[b].tolist()), set(whole.items[b, :K].tolist())
        for item in ours ^ theirs:
            yield abs(float(row[item] - last))
        if ours != theirs and other is None:
            assert exact.tied is not None
            assert exact.tied[b] >= len(ours - theirs), "what may be another title's was said"
        for item, own in zip(exact.items[b].tolist(), exact.scores[b], strict=True):
            yield abs(float(row[item] - own))


@pytest.mark.parametrize(("dtype", "support"), HALF)
def test_exact_and_catalogue_agree_outside_the_tolerance(dtype: str, support: str) -> None:
    made = engine(dtype, support)
    gaps = list(beyond(made, PROMPTS))
    assert made.tolerance is not None
    assert 0 < max(gaps) <= made.tolerance, "and a tolerance of 0 would not do"
    assert made.tolerance < (0.1 if support == "trie" else 0.5), "it says something"


@pytest.mark.parametrize("support", ["trie", "vocabulary"])
@pytest.mark.parametrize("kind", ["gemma3", "bert"])
def test_the_plain_path_has_a_tolerance_too(kind: str, support: str) -> None:
    made = engine("bfloat16", support, kind)
    with pytest.warns(UserWarning, match="plain, slower path"):
        assert max(beyond(made, PROMPTS[:4])) <= (made.tolerance or 0) < 1


def test_a_head_that_is_off_by_a_twentieth_is_outside_the_tolerance() -> None:
    made = engine("bfloat16", "trie")
    other = copy.copy(made)
    other.__dict__["head"] = Head(factor=1.05)
    assert max(beyond(made, PROMPTS, other)) > made.tolerance  # type: ignore[operator]


@pytest.mark.parametrize("support", ["trie", "vocabulary"])
def test_float32_has_none(support: str) -> None:
    for search in SEARCHES:
        ranking = search(engine("float32", support), PROMPTS[:3], 5)
        assert (ranking.tolerance, ranking.tied) == (0.0, None)


def test_it_is_measured_once_counts_no_work_and_forgets_no_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", vocabulary=100).bfloat16().requires_grad_(False)
    made, again = (TrieEngine(model, Trie.from_sequences(CATALOGUE)) for _ in range(2))
    shared = [[*range(5, 20), n] for n in (3, 4, 5)]
    first = exact_search(made, shared, 5)
    again.tolerance = made.tolerance
    assert exact_search(again, shared, 5).counters == first.counters
    assert again._prefix is not None and made._prefix is not None
    assert again._prefix[1].tokens == made._prefix[1].tokens
    monkeypatch.setattr("triewise.decoding.search._change", lambda _: pytest.fail("measured again"))
    assert exact_search(made, shared, 5).tolerance == first.tolerance == made.tolerance


def test_penalty_and_assistant_scale_it() -> None:
    made = TrieEngine(tiny_model().bfloat16(), Trie.from_sequences(SIX))
    made.tolerance = 0.8
    shortest, longest = min(map(len, SIX)), max(map(len, SIX))
    assistant = np.zeros((1, len(SIX)))
    for search in SEARCHES:
        ask = lambda search=search, **settings: search(made, [[7]], 2, **settings).tolerance  # noqa: E731
        assert ask() == 0.8
        assert ask(length_penalty=1.0) == pytest.approx(0.8 / shortest)
        assert ask(length_penalty=-1.0) == pytest.approx(0.8 * longest)
        assert ask(assistant=assistant, assistant_weight=0.25) == pytest.approx(0.2)


@pytest.mark.parametrize("support", ["trie", "vocabulary"])
@pytest.mark.parametrize("tolerance", [0.05, 0.5, 3.0])
def test_places_that_are_tied(tolerance: float, support: str) -> None:
    """Of the whole ranking by what is known of it; searches that drop prefixes may say tied where it is not known."""
    made = TrieEngine(tiny_model("llama", vocabulary=100), Trie.from_sequences(CATALOGUE), support)  # type: ignore[arg-type]
    made.tolerance = tolerance
    whole = rank_catalogue(made, PROMPTS)
    assert whole.tied is not None and not whole.tied.any(), "nothing is missing"
    last = whole.scores[:, K - 1 : K]
    wanted = np.where(
        whole.scores[:, K] >= last[:, 0] - tolerance, (whole.scores[:, :K] <= last + tolerance).sum(1), 0
    )
    found = rank_catalogue(made, PROMPTS, K)
    assert found.items.tolist() == whole.items[:, :K].tolist()
    assert found.tied is not None and found.tied.tolist() == wanted.tolist()
    for search in (exact_search, beam_search):
        other = search(made, PROMPTS, K)
        assert other.items.shape == (len(PROMPTS), K)
        assert other.tied is not None
        exact = (other.items == found.items).all(1)
        assert (other.tied >= wanted)[exact].all()
        assert np.isin(other.tied, [0, *range(1, K + 1)]).all()
    cut = exact_search(made, PROMPTS, K, max_expansions=1)
    assert cut.tied is not None and (cut.tied > 0)[~cut.certified & np.isfinite(cut.scores[:, -1])].all()


def test_nothing_is_tied_with_nothing() -> None:
    made = TrieEngine(tiny_model(), Trie.from_sequences(SIX))
    made.tolerance = 1e6
    for search in SEARCHES:
        few = search(made, [[7, 8]], 5, allow=[[0, 3]])
        assert few.tied is not None and few.tied.tolist() == [0]
        assert (few.items >= 0).sum() == 2


@given(
    st.lists(st.floats(-9, 0, width=32), min_size=1, max_size=6),
    st.floats(-12, 0, width=32),
    st.floats(0.015625, 4, width=32),
)
def test_tied_places_by_the_definition(scores: list[float], missing: float, tolerance: float) -> None:
    row = np.sort(np.array(scores, dtype=np.float32))[::-1]
    wanted = sum(s <= np.float32(row[-1] + tolerance) for s in row) * (
        missing >= np.float32(row[-1] - tolerance)
    )
    assert tied_places(row[None], np.array([missing], np.float32), tolerance).tolist() == [wanted]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_smollm2_in_bfloat16() -> None:
    """Eight users, sixty titles: with logits in bfloat16 four places of ten were another title's."""
    folder: Path = cache_folder() / "models" / "smollm2-135m-q4"
    if not folder.is_dir():
        pytest.skip("the weights of smollm2-135m-q4 are not in the cache; load that backbone once")
    backbone: Any = load_backbone("smollm2-135m-q4", device="cpu", dtype="bfloat16")
    encode = lambda text: backbone.tokenizer(text)["input_ids"]  # noqa: E731
    names = [f"{title}{part}" for part in (" II", " (1995)", ": The Return") for title in TITLES][:60]
    trie = Trie.from_sequences([[*encode(name), backbone.tokenizer.eos_token_id] for name in names])
    rng = np.random.default_rng(0)
    prompts = [
        encode(f"The user has watched: {', '.join(rng.choice(names, 1 + b % 3))}. The next movie is: ")
        for b in range(8)
    ]
    made = TrieEngine(backbone.model, trie)
    assert max(beyond(made, prompts)) <= (made.tolerance or 0) < 1
