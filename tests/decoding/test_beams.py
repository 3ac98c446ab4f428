"""Beam search: the same items and scores as `transformers.generate` and as loops over lists; filters; certificates."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from tests.conftest import SIX
from tests.reference import beam as reference
from tests.reference.trie import DictTrie
from tests.strategies import catalogues
from tests.tiny_models import tiny_model
from triewise.decoding import TrieEngine, beam_search, rank_catalogue
from triewise.errors import UserError
from triewise.ranking import Ranking
from triewise.tokens import Trie, decoding_weights, information_gain

PROMPTS = [[7, 8, 9, 10, 11], [12, 13], [14]]
TOLERANCE = 1e-4  # float32, two layers
prompt_lists = st.lists(st.lists(st.integers(0, 29), min_size=1, max_size=6), min_size=1, max_size=3)


def random_titles(seed: int, n: int = 60, end: int = 0) -> list[list[int]]:
    """Titles that share prefixes, with long forced tails."""
    rng = np.random.default_rng(seed)
    stems = [rng.integers(1, 30, size=rng.integers(1, 4)).tolist() for _ in range(12)]
    return [
        [*stems[rng.integers(12)], *rng.integers(1, 30, size=rng.integers(1, 6)).tolist(), end]
        for _ in range(n)
    ]


def assert_equal(
    ranking: Ranking,
    b: int,
    titles: Sequence[Sequence[int]],
    wanted: dict[tuple[int, ...], float],
    margin: float,
) -> int:
    """One user's ranking against titles and scores; 1 where a margin within the tolerance excuses a difference."""
    items = [int(i) for i in ranking.items[b] if i >= 0]
    found = {tuple(titles[i]): float(s) for i, s in zip(items, ranking.scores[b], strict=False)}
    k = ranking.items.shape[1]
    best = dict(sorted(wanted.items(), key=lambda pair: -pair[1])[:k])
    if margin <= TOLERANCE and set(found) != set(best):
        return 1
    assert set(found) == set(best)
    assert len(items) == len(found)
    for title, score in found.items():
        assert score == pytest.approx(best[title], abs=TOLERANCE)
    assert (np.diff(ranking.scores[b][: len(items)]) <= 0).all()
    return 0


@pytest.mark.parity
@pytest.mark.parametrize("beams", [5, 10])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
@pytest.mark.parametrize("support", ["trie", "vocabulary"])
@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt2"])
def test_equals_generate(kind: str, support: Any, length_penalty: float, beams: int) -> None:
    model, titles = tiny_model(kind), random_titles(beams)
    trie = DictTrie(titles)
    ranking = beam_search(
        TrieEngine(model, Trie.from_sequences(titles), support), PROMPTS, beams, beams, length_penalty
    )
    for b, prompt in enumerate(PROMPTS):
        wanted = reference.generate(model, prompt, trie, beams, length_penalty, support, end=0)
        assert len(wanted) == beams
        _, margin = reference.beam(
            reference.model_log_p(model, prompt, trie, support), trie, beams, length_penalty
        )
        assert margin > TOLERANCE, "pick another seed: this case proves nothing"
        assert_equal(ranking, b, titles, wanted, margin)


@settings(max_examples=60, deadline=None)
@given(
    catalogues(),
    prompt_lists,
    st.integers(1, 6),
    st.sampled_from(["trie", "vocabulary"]),
    st.sampled_from([-0.5, 0.0, 1.0]),
    st.sampled_from(["qwen2", "llama", "gpt2"]),
    st.integers(1, 9),
    st.integers(0, 3),
)
def test_equals_loops_over_lists(
    titles: list[list[int]],
    prompts: list[list[int]],
    beams: int,
    support: Any,
    length_penalty: float,
    kind: str,
    chunk: int,
    seed: int,
) -> None:
    """Any catalogue, model, prompts of different length in one batch, any number of beams, k beyond the items."""
    model, trie = tiny_model(kind, seed=seed), DictTrie(titles)
    engine = TrieEngine(model, Trie.from_sequences(titles), support, chunk=chunk)
    together = beam_search(engine, prompts, beams, beams, length_penalty)
    for b, prompt in enumerate(prompts):
        wanted, margin = reference.beam(
            reference.model_log_p(model, prompt, trie, support), trie, beams, length_penalty
        )
        assert_equal(together, b, titles, wanted, margin)
        alone = beam_search(engine, [prompt], beams, beams, length_penalty)
        assert alone.scores[0] == pytest.approx(together.scores[b], abs=TOLERANCE)
        if margin > TOLERANCE:
            assert alone.items[0].tolist() == together.items[b].tolist()


@settings(max_examples=40, deadline=None)
@given(st.data(), catalogues(), st.sampled_from(["trie", "vocabulary"]), st.sampled_from(["node", "step"]))
def test_weights_and_filters_equal_loops_over_lists(
    data: st.DataObject, titles: list[list[int]], support: Any, scope: Any
) -> None:
    model, slow, trie = tiny_model(), DictTrie(titles), Trie.from_sequences(titles)
    items = st.integers(0, len(titles) - 1)
    exclude = data.draw(st.lists(items, max_size=len(titles)))
    allow = data.draw(st.none() | st.lists(items, max_size=len(titles)))
    alpha = data.draw(st.sampled_from([0.0, 0.3, 1.0]))
    beams = data.draw(st.integers(1, 5))
    some = st.lists(st.integers(0, 9), min_size=len(titles), max_size=len(titles)).filter(any)
    counts, gain_over = np.array(data.draw(some)), data.draw(st.sampled_from(["trained", "all"]))
    gain, mass = information_gain(trie, counts), trie.subtree_count(counts)
    free = [i for i in range(len(titles)) if i not in exclude and (allow is None or i in allow)]

    def permitted(prefix: tuple[int, ...]) -> bool:
        return any(tuple(titles[i][: len(prefix)]) == prefix for i in free)

    def weigh(continuations: list[tuple[int, ...]]) -> list[float]:
        nodes = [int(trie.walk(c)[-1]) for c in continuations]
        if scope == "node":
            return decoding_weights(trie, gain, alpha, counts if gain_over == "trained" else None)[
                nodes
            ].tolist()
        among = [n for n in nodes if mass[n] or gain_over == "all"]
        low, high = min(gain[among], default=0), max(gain[among], default=0)
        equal = high - low <= 1e-12 * high
        return [1.0 if equal or n not in among else 1 - alpha * (gain[n] - low) / (high - low) for n in nodes]

    ranking = beam_search(
        TrieEngine(model, trie, support),
        [[4, 5, 6]],
        beams,
        beams,
        alpha=alpha,
        scope=scope,
        gain=gain,
        exclude=[exclude],
        allow=None if allow is None else [allow],
        counts=counts,
        gain_over=gain_over,
    )
    log_p = reference.model_log_p(model, [4, 5, 6], slow, support)
    wanted, margin = reference.beam(log_p, slow, beams, 0.0, weigh if alpha else None, permitted)
    assert_equal(ranking, 0, titles, wanted, margin)
    assert all(int(i) in free for i in ranking.items[0] if i >= 0)
    if scope == "step" and alpha:
        assert not ranking.certified.any()


@settings(max_examples=40, deadline=None)
@given(
    catalogues(),
    st.integers(1, 8),
    st.integers(1, 8),
    st.sampled_from(["trie", "vocabulary"]),
    st.sampled_from([-1.0, 0.0, 1.0]),
    st.data(),
)
def test_what_is_certified_is_exact(
    titles: list[list[int]], k: int, extra: int, support: Any, length_penalty: float, data: st.DataObject
) -> None:
    allow = data.draw(st.none() | st.lists(st.integers(0, len(titles) - 1), max_size=len(titles)))
    engine = TrieEngine(tiny_model(), Trie.from_sequences(titles), support)
    only = None if allow is None else [allow, allow]
    prompts = [[4, 5, 6], [9]]
    found = beam_search(engine, prompts, k, k + extra - 1, length_penalty, allow=only)
    exact = rank_catalogue(engine, prompts, k, length_penalty, allow=only)
    for b in np.flatnonzero(found.certified):
        assert found.scores[b] == pytest.approx(exact.scores[b], abs=TOLERANCE)
    for b in range(2):  # never better than the best
        assert (found.scores[b] <= exact.scores[b] + TOLERANCE).all()


@settings(max_examples=25, deadline=None)
@given(catalogues(), st.sampled_from(["trie", "vocabulary"]), st.sampled_from([0.0, 1.0]))
def test_with_a_beam_for_every_item_it_is_the_full_ranking(
    titles: list[list[int]], support: Any, length_penalty: float
) -> None:
    engine = TrieEngine(tiny_model(), Trie.from_sequences(titles), support)
    n = len(titles)
    found = beam_search(engine, PROMPTS, n, n, length_penalty)
    exact = rank_catalogue(engine, PROMPTS, n, length_penalty)
    assert found.scores == pytest.approx(exact.scores, abs=TOLERANCE)
    assert found.certified.all()
    if support == "trie" and length_penalty == 0:
        assert np.exp(found.scores.astype(float)).sum(1) == pytest.approx(np.ones(3), abs=TOLERANCE)


def test_a_model_without_a_tree_cache_gives_the_same() -> None:
    model = tiny_model("gemma3")
    engine = TrieEngine(model, Trie.from_sequences(SIX), "vocabulary")
    with pytest.warns(UserWarning, match="plain, slower path"):
        ranking = beam_search(engine, PROMPTS, 3, 3)
    trie = DictTrie(SIX)
    for b, prompt in enumerate(PROMPTS):
        log_p = reference.model_log_p(model, prompt, trie, "vocabulary")
        assert_equal(ranking, b, SIX, *reference.beam(log_p, trie, 3))


def test_forced_tokens_after_the_last_decision_never_run_in_trie_support() -> None:
    """Two titles that part at the first token: the prompt decides, nothing else is run."""
    titles = [[1, 5, 6, 7, 0], [2, 8, 9, 10, 11, 0]]
    trie = Trie.from_sequences(titles)
    ranking = beam_search(TrieEngine(tiny_model(), trie, "trie"), [[3, 4]], 2, 2)
    assert ranking.counters["tree_tokens"] == 0
    ranking = beam_search(TrieEngine(tiny_model(), trie, "vocabulary"), [[3, 4]], 2, 2)
    assert ranking.counters["tree_tokens"] == 4 + 5  # every inner node but the root, each once
    assert ranking.counters["rounds"] == 1  # two beams for two titles: nothing can be dropped


@settings(max_examples=40, deadline=None)
@given(catalogues(), prompt_lists, st.integers(1, 6), st.data())
def test_only_what_the_search_asks_for_runs_in_vocabulary_support(
    titles: list[list[int]], prompts: list[list[int]], beams: int, data: st.DataObject
) -> None:
    """Tokens are run before the search asks for them, but none that it never asks for."""
    model, slow = tiny_model(), DictTrie(titles)
    free = data.draw(st.none() | st.lists(st.integers(0, len(titles) - 1), min_size=1, max_size=4))
    allowed = [titles[i] for i in (range(len(titles)) if free is None else free)]
    ranking = beam_search(
        TrieEngine(model, Trie.from_sequences(titles), "vocabulary"),
        prompts,
        beams,
        beams,
        allow=None if free is None else [free] * len(prompts),
    )
    asked, margins = 0, []
    for prompt in prompts:
        log_p, prefixes = reference.model_log_p(model, prompt, slow, "vocabulary"), set()

        def seen(prefix: tuple[int, ...], log_p: Any = log_p, prefixes: Any = prefixes) -> dict[int, float]:
            prefixes.add(prefix)
            return log_p(prefix)  # type: ignore[no-any-return]

        _, margin = reference.beam(
            seen, slow, beams, permitted=lambda p: any(tuple(t[: len(p)]) == p for t in allowed)
        )
        asked += len(prefixes - {()})
        margins.append(margin)
    if min(margins) > TOLERANCE:
        assert ranking.counters["tree_tokens"] == asked


def test_no_title_twice_and_none_that_is_not_permitted() -> None:
    """`generate` fills its beams with rubbish where there are fewer titles than beams."""
    engine = TrieEngine(tiny_model(), Trie.from_sequences(SIX))
    ranking = beam_search(engine, [[3, 4]], 10, 10, exclude=[[0, 2]])
    assert sorted(ranking.items[0].tolist()) == [-1] * 7 + [1, 3, 5]
    assert ranking.certified.all()
    nothing = beam_search(engine, [[3, 4], [5]], 3, 3, allow=[[], [2]])
    assert nothing.items.tolist() == [[-1, -1, -1], [2, -1, -1]]
    assert np.isneginf(nothing.scores[0]).all()
    assert nothing.certified.all()
    assert beam_search(engine, [], 3, 3).items.shape == (0, 3)


def test_the_permitted_member_with_most_targets_represents_a_group() -> None:
    """Items 1 and 4 of the six share a title."""
    engine = TrieEngine(tiny_model(), Trie.from_sequences(SIX))
    search = partial(beam_search, engine, [[3, 4]], 5, 5, counts=np.array([0, 1, 0, 0, 5, 0]))
    assert 4 in search().items[0]
    assert 1 in search(exclude=[[4]]).items[0]


def test_the_assistant_decides_alone_at_weight_zero() -> None:
    """With a beam for every item the order is that of the assistant's mass per group."""
    engine = TrieEngine(tiny_model(), Trie.from_sequences(SIX))
    mass = np.array([0.1, 0.05, 0.3, 0.2, 0.15, 0.2 - 1e-3])
    log_p = np.log(mass / mass.sum())[None]
    for ranking in (
        beam_search(engine, [[3, 4]], 6, 6, assistant=log_p, assistant_weight=0.0),
        rank_catalogue(engine, [[3, 4]], 6, assistant=log_p, assistant_weight=0.0),
    ):
        assert ranking.items[0, :5].tolist() == [2, 1, 3, 5, 0]
        wanted = np.log(np.array([0.3, 0.2, 0.2, 0.199, 0.1]) / mass.sum())
        assert ranking.scores[0, :5] == pytest.approx(wanted, abs=1e-6)


def test_the_assistant_is_mixed_in_and_off_at_weight_one() -> None:
    engine = TrieEngine(tiny_model(), Trie.from_sequences(SIX))
    log_p = np.log(np.full((2, 6), 1 / 6))
    prompts = [[3, 4], [5]]
    half = beam_search(engine, prompts, 5, 9, assistant=log_p, assistant_weight=0.5)
    assert half.scores == pytest.approx(
        rank_catalogue(engine, prompts, 5, assistant=log_p, assistant_weight=0.5).scores, abs=1e-5
    )
    off = beam_search(engine, prompts, 5, 9, assistant=log_p)
    assert off.scores == pytest.approx(beam_search(engine, prompts, 5, 9).scores, abs=0)


def test_user_errors() -> None:
    engine = TrieEngine(tiny_model(), Trie.from_sequences(SIX))
    search = partial(beam_search, engine, [[3, 4]])
    for changes, line in (
        ({"k": 5, "beams": 4}, "wanted beams >= k, got 4 beams for k = 5"),
        ({"k": 0}, "wanted k >= 1"),
        ({"alpha": 1.5}, r"wanted alpha in \[0, 1\], got 1.5"),
        ({"alpha": 0.5}, "alpha > 0 needs gain"),
        ({"gain_over": "some"}, "wanted gain_over 'trained' or 'all', got 'some'"),
        ({"length_penalty": float("nan")}, "wanted a finite length_penalty, got nan"),
        ({"scope": "beam"}, "wanted scope 'node' or 'step', got 'beam'"),
        ({"assistant_weight": 2.0}, r"wanted assistant_weight in \[0, 1\], got 2.0"),
        ({"assistant_weight": 0.5}, "assistant_weight < 1 needs assistant"),
        (
            {"assistant": np.zeros((1, 5)), "assistant_weight": 0.5},
            r"for 1 users and 6 items, got shape \(1, 5\)",
        ),
        (
            {"assistant": np.full((1, 6), np.nan), "assistant_weight": 0.5},
            "assistant log-probabilities below infinity",
        ),
        ({"exclude": [[6]]}, r"wanted item indices in \[0, 6\), got 6"),
        ({"allow": [[0], [1]]}, "wanted allow lists for 1 users, got 2"),
    ):
        with pytest.raises(UserError, match=line):
            search(**changes)


def test_what_still_lives_at_the_stop_is_not_certified_away() -> None:
    """A short title ends the search of one beam at once; with a penalty a long one may be better."""
    engine = TrieEngine(tiny_model(), Trie.from_sequences([[0], [5] * 11 + [0]]))
    prompts = [[p] for p in range(1, 20)]
    found = beam_search(engine, prompts, 1, 1, 2.0)
    exact = rank_catalogue(engine, prompts, 1, 2.0)
    wrong = found.items[:, 0] != exact.items[:, 0]
    assert wrong.any()
    assert not found.certified[wrong].any()


def test_certificates_are_given_and_true() -> None:
    certified = wrong = 0
    for seed in range(12):
        titles = random_titles(seed)
        engine = TrieEngine(tiny_model(), Trie.from_sequences(titles))
        exclude = [list(range(0, 60, 3))] * 3 if seed % 2 else None
        for beams, penalty in ((3, 0.0), (4, 1.0), (6, -1.0), (10, 0.5)):
            found = beam_search(engine, PROMPTS, 3, beams, penalty, exclude=exclude)
            exact = rank_catalogue(engine, PROMPTS, 3, penalty, exclude=exclude)
            certified += int(found.certified.sum())
            same = np.isclose(found.scores, exact.scores, atol=TOLERANCE).all(1)
            wrong += int((found.certified & ~same).sum())
    assert certified > 20
    assert wrong == 0


def test_gains_scaled_per_step_are_those_of_one_user() -> None:
    titles = random_titles(4)
    trie = Trie.from_sequences(titles)
    gain = information_gain(trie, np.arange(1, len(titles) + 1))
    engine = TrieEngine(tiny_model(), trie, at_once=2)
    search = partial(beam_search, engine, k=5, beams=5, alpha=0.7, scope="step", gain=gain)
    together = search(PROMPTS)
    assert not together.certified.any()
    for b, prompt in enumerate(PROMPTS):
        alone = search([prompt])
        assert alone.items[0].tolist() == together.items[b].tolist()
        assert alone.scores[0] == pytest.approx(together.scores[b], abs=TOLERANCE)


@settings(max_examples=60, deadline=None)
@given(
    catalogues(),
    prompt_lists,
    st.integers(1, 4),
    st.sampled_from(["trie", "vocabulary"]),
    st.sampled_from([0.0, 1.0]),
    st.integers(0, 99),
)
def test_a_watched_title_is_pruned_where_a_loop_drops_a_prefix_of_it(
    titles: list[list[int]],
    prompts: list[list[int]],
    beams: int,
    support: Any,
    length_penalty: float,
    seed: int,
) -> None:
    model, trie = tiny_model("qwen2", seed=seed % 3), DictTrie(titles)
    engine = TrieEngine(model, Trie.from_sequences(titles), support)
    watch = np.random.default_rng(seed).integers(0, len(titles), len(prompts))
    ranking = beam_search(engine, prompts, beams, beams, length_penalty, watch=watch)
    assert ranking.pruned is not None
    assert beam_search(engine, prompts, beams, beams, length_penalty).pruned is None
    everything = beam_search(engine, prompts, 1, 20 * len(titles), watch=watch).pruned
    assert everything is not None and not everything.any(), "with room for all none is dropped"
    for b, prompt in enumerate(prompts):
        dropped: list[tuple[int, ...]] = []
        log_p = reference.model_log_p(model, prompt, trie, support)
        _, margin = reference.beam(log_p, trie, beams, length_penalty, dropped=dropped)
        title = tuple(titles[watch[b]])
        lost = any(title[: len(prefix)] == prefix for prefix in dropped)
        assert ranking.pruned[b] == lost or margin <= TOLERANCE
        if any(tuple(titles[i]) == title for i in ranking.items[b] if i >= 0):
            assert not ranking.pruned[b]
