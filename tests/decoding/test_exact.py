"""Best-first search: the same as ranking everything, with less work, and what it says when it may not finish."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from tests.conftest import SIX
from tests.decoding.test_beams import random_titles
from tests.strategies import weighted_catalogues
from tests.tiny_models import tiny_model
from triewise.decoding import TrieEngine, beam_search, exact_search, rank_catalogue, score
from triewise.errors import UserError
from triewise.tokens import Trie, information_gain

TOLERANCE = 1e-4
START = [21, 22, 23, 24, 25, 26, 27, 28, 29, 20]  # an instruction that prompts share
prompt_lists = st.lists(st.lists(st.integers(0, 29), min_size=1, max_size=6), min_size=1, max_size=5)


@settings(max_examples=80, deadline=None)
@given(
    st.data(),
    weighted_catalogues(),
    prompt_lists,
    st.integers(1, 8),
    st.sampled_from(["trie", "vocabulary"]),
    st.sampled_from([-1.0, 0.0, 1.0]),
    st.sampled_from([0.0, 0.4]),
    st.integers(1, 4),
)
def test_equals_ranking_everything(
    data: st.DataObject,
    world: tuple[list[list[int]], list[int]],
    prompts: list[list[int]],
    k: int,
    support: Any,
    length_penalty: float,
    alpha: float,
    at_once: int,
) -> None:
    """Any catalogue, filters, weights, penalty, more titles asked for than there are, users coming and going."""
    titles, counts = world
    trie = Trie.from_sequences(titles)
    items = st.lists(st.integers(0, len(titles) - 1), max_size=len(titles))
    exclude = data.draw(st.none() | st.lists(items, min_size=len(prompts), max_size=len(prompts)))
    allow = data.draw(st.none() | st.lists(items, min_size=len(prompts), max_size=len(prompts)))
    assistant = np.log(np.random.default_rng(len(titles)).dirichlet(np.ones(len(titles)), size=len(prompts)))
    a = data.draw(st.sampled_from([1.0, 0.5]))
    shared: dict[str, Any] = {
        "length_penalty": length_penalty,
        "alpha": alpha,
        "gain": information_gain(trie, counts),
        "exclude": exclude,
        "allow": allow,
        "assistant": assistant,
        "assistant_weight": a,
        "counts": np.array(counts),
    }
    prompts = [[*START, *prompt] if data.draw(st.booleans()) else prompt for prompt in prompts]
    found = exact_search(TrieEngine(tiny_model(), trie, support, at_once=at_once), prompts, k, **shared)
    wanted = rank_catalogue(TrieEngine(tiny_model(), trie, support), prompts, k, **shared)
    further = rank_catalogue(TrieEngine(tiny_model(), trie, support), prompts, k + 1, **shared)
    assert found.certified.all()
    assert found.scores == pytest.approx(wanted.scores, abs=TOLERANCE)
    for b in range(len(prompts)):
        scores = further.scores[b][np.isfinite(further.scores[b])]
        if (np.abs(np.diff(scores)) > TOLERANCE).all():
            assert found.items[b].tolist() == wanted.items[b].tolist()


def test_exact_ties_are_broken_by_item_index() -> None:
    """A head of zeros: every choice is a coin toss, so equal depth means equal scores."""
    model = tiny_model()
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    titles = [[a, b, 0] for a in (5, 3, 4) for b in (2, 1)]
    engine = TrieEngine(model, Trie.from_sequences(titles))
    assert exact_search(engine, [[7]], 4).items.tolist() == [[0, 1, 2, 3]]
    assert rank_catalogue(engine, [[7]], 4).items.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("support", ["trie", "vocabulary"])
def test_it_expands_less_than_there_is(support: Any) -> None:
    titles = random_titles(3, n=400)
    trie = Trie.from_sequences(titles)
    prompts = [[4, 5], [6], [7, 8, 9]]
    found = exact_search(TrieEngine(tiny_model(), trie, support), prompts, 5)
    whole = rank_catalogue(TrieEngine(tiny_model(), trie, support), prompts, 5)
    assert found.items.tolist() == whole.items.tolist()
    assert found.counters["tree_tokens"] < 0.5 * whole.counters["tree_tokens"]
    assert found.counters["expansions"] < 0.5 * whole.counters["expansions"]


def test_a_budget_ends_the_search_and_the_certificate_says_so() -> None:
    titles = random_titles(3, n=400)
    trie = Trie.from_sequences(titles)
    for support in ("trie", "vocabulary"):
        engine = TrieEngine(tiny_model(), trie, support)  # type: ignore[arg-type]
        cut = exact_search(engine, [[4, 5]], 5, max_expansions=2)
        assert not cut.certified.any()
        assert cut.counters["expansions"] <= 2 or support == "vocabulary"
        if support == "vocabulary":  # what the beams found is kept
            beams = beam_search(engine, [[4, 5]], 5, 5)
            assert (cut.items >= 0).all()
            assert (cut.scores >= beams.scores - TOLERANCE).all()
        full = exact_search(engine, [[4, 5]], 5, max_expansions=10**9)
        assert full.certified.all()
        assert (cut.scores <= full.scores + TOLERANCE).all()
    with pytest.raises(UserError, match="wanted max_expansions of at least 1 or None, got 0"):
        exact_search(engine, [[4]], 5, max_expansions=0)
    with pytest.raises(UserError, match="exact_search wants scope = 'node', got 'step'"):
        exact_search(engine, [[4]], 5, scope="step")


@pytest.mark.parametrize("search", [beam_search, exact_search, rank_catalogue])
@pytest.mark.parametrize("support", ["trie", "vocabulary"])
def test_a_shared_instruction_runs_once_and_changes_nothing(search: Any, support: Any) -> None:
    titles = random_titles(5)
    trie = Trie.from_sequences(titles)
    prompts = [[*START, 3 + b % 4, *range(b % 3)] for b in range(7)]
    model = tiny_model().requires_grad_(False)
    shared = TrieEngine(model, trie, support, at_once=3)
    found = search(shared, prompts, 5)
    n_prompt = sum(map(len, prompts))
    assert found.counters["prompt_tokens"] == n_prompt - 6 * len(START)
    assert found.counters["shared_prompt_tokens"] == 7 * len(START)
    again = search(shared, prompts, 5)  # the engine remembers
    assert again.counters["prompt_tokens"] == n_prompt - 7 * len(START)
    for b, prompt in enumerate(prompts):
        alone = search(TrieEngine(tiny_model(), trie, support), [prompt], 5)
        assert alone.counters["prompt_tokens"] == len(prompt)
        assert found.scores[b] == pytest.approx(alone.scores[0], abs=TOLERANCE)


def test_what_is_remembered_is_forgotten_when_the_weights_change() -> None:
    """Validation during training uses one engine while the model learns."""
    model, prompts = tiny_model(), [[*START, 3], [*START, 4, 5]]
    trie = Trie.from_sequences(random_titles(5))
    engine = TrieEngine(model, trie)
    before = exact_search(engine, prompts, 5)
    assert exact_search(engine, prompts, 5).counters["prompt_tokens"] == before.counters["prompt_tokens"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    optimizer.step()
    after = exact_search(engine, prompts, 5)
    assert after.scores == pytest.approx(exact_search(TrieEngine(model, trie), prompts, 5).scores, abs=1e-6)
    assert not np.allclose(before.scores, after.scores, atol=1e-2)


def test_users_who_come_one_at_a_time_share_the_instruction_too() -> None:
    engine = TrieEngine(tiny_model().requires_grad_(False), Trie.from_sequences(random_titles(5)))
    tokens = [exact_search(engine, [[*START, 3 + b]], 5).counters["prompt_tokens"] for b in range(4)]
    assert tokens[0] == len(START) + 1
    assert tokens[2:] == [1, 1]


def test_users_who_are_done_make_room() -> None:
    """Two places for nine users: nobody is lost and padding is not counted."""
    trie = Trie.from_sequences(random_titles(7))
    prompts = [list(range(1, 2 + b)) for b in range(9)]
    small, large = (TrieEngine(tiny_model(), trie, at_once=n) for n in (2, 99))
    for search in (beam_search, exact_search, rank_catalogue):
        a, b = search(small, prompts, 5), search(large, prompts, 5)
        assert a.items.tolist() == b.items.tolist()
        assert a.scores == pytest.approx(b.scores, abs=TOLERANCE)
        assert a.counters["tree_tokens"] == b.counters["tree_tokens"]
    candidates = [[0, 1, 2 + b] for b in range(9)]
    assert score(small, prompts, candidates) == pytest.approx(
        score(large, prompts, candidates), abs=TOLERANCE
    )


def test_a_model_without_a_tree_cache_gives_the_same() -> None:
    model = tiny_model("gemma3")
    engine = TrieEngine(model, Trie.from_sequences(SIX), "vocabulary")
    with pytest.warns(UserWarning, match="plain, slower path"):
        found = exact_search(engine, [[3, 4], [5]], 3)
    wanted = rank_catalogue(engine, [[3, 4], [5]], 3)
    assert found.scores == pytest.approx(wanted.scores, abs=TOLERANCE)
    assert found.items.tolist() == wanted.items.tolist()
