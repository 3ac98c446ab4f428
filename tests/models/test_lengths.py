"""RoPE that depends on the longest row of a forward: each user has the frequencies it has alone."""

from __future__ import annotations

import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from tests.model_families import build, quiet
from tests.reference.beam import beam, generate, model_log_p
from tests.reference.trie import DictTrie
from tests.tiny_models import tiny_model
from triewise.decoding import Counters, TrieEngine, beam_search, exact_search, rank_catalogue, score
from triewise.models import as_if_alone, rope_switch
from triewise.models.lengths import RopeSwitch
from triewise.tokens import Trie

# RoPE changes above 64 tokens: prompts far below, one that titles carry over it, two above.
LENGTHS = (9, 61, 90)
END = 2
TITLES = [[10 + i % 4, 30 + i % 3, 50 + i, *([70] if i % 2 else []), END] for i in range(7)]
TOLERANCE = 1e-4


def prompts(*lengths: int) -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(4, 300, n).tolist() for n in lengths]


class Forgetful:
    """A model that was asked nothing before: dynamic RoPE keeps the frequencies of the longest row so far."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        self.model(input_ids=input_ids[:1, :1], use_cache=False)
        return self.model(input_ids=input_ids, use_cache=use_cache)


def model_of(name: str) -> Any:
    with quiet():
        return build(name)


def wanted(model: Any, prompt: list[int], support: str) -> list[float]:
    """Path sums of all titles, one plain forward for each prefix."""
    log_p = model_log_p(Forgetful(model), prompt, DictTrie(TITLES), support)
    return [sum(log_p(tuple(title[:i]))[title[i]] for i in range(len(title))) for title in TITLES]


@pytest.mark.parametrize(("name", "support"), [("phi3_longrope", "trie"), ("llama_dynamic", "vocabulary")])
@pytest.mark.filterwarnings("ignore:this model is decoded on the plain")
def test_users_of_any_length_get_what_each_gets_alone(name: str, support: str) -> None:
    model, asked = model_of(name), prompts(*LENGTHS)
    engine = TrieEngine(model, Trie.from_sequences(TITLES), support)
    true = np.array([wanted(model, prompt, support) for prompt in asked])
    whole = rank_catalogue(engine, asked)
    assert np.take_along_axis(true, whole.items, 1) == pytest.approx(whole.scores, abs=TOLERANCE)
    assert score(engine, asked, [range(7)] * 3) == pytest.approx(true, abs=TOLERANCE)
    best = exact_search(engine, asked, k=3)
    assert best.certified.all() and best.items.tolist() == whole.items[:, :3].tolist()
    assert best.scores == pytest.approx(whole.scores[:, :3], abs=TOLERANCE)
    found = beam_search(engine, asked, k=3, beams=3)
    for b, prompt in enumerate(asked):
        best_of = beam(model_log_p(Forgetful(model), prompt, DictTrie(TITLES), support), DictTrie(TITLES), 3)[
            0
        ]
        assert {tuple(TITLES[i]) for i in found.items[b]} == set(best_of)
        assert found.scores[b] == pytest.approx(sorted(best_of.values(), reverse=True), abs=TOLERANCE)


@pytest.mark.parametrize("name", ["phi3_longrope", "llama_dynamic"])
@pytest.mark.filterwarnings("ignore:this model is decoded on the plain")
def test_users_of_other_threads_change_no_frequencies(name: str) -> None:
    """Both models keep in the module what the forward that runs has; threads are switched as often as they can be."""
    engine = TrieEngine(model_of(name), Trie.from_sequences(TITLES), "vocabulary")
    asked = prompts(9, 90, 100, 20) * 6
    wanted = [rank_catalogue(engine, [prompt]).scores for prompt in asked]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(lambda prompt: rank_catalogue(engine, [prompt]).scores, asked))
    finally:
        sys.setswitchinterval(before)
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE)


def test_generate_runs_the_prompt_again_where_longrope_changes() -> None:
    """So its beams are those of one plain forward for each prefix, and ours."""
    model, [prompt] = model_of("phi3_longrope"), prompts(61)
    engine = TrieEngine(model, Trie.from_sequences(TITLES), "trie")
    with pytest.warns(
        UserWarning, match="its RoPE changes with the length above 64 tokens, and the longest path has"
    ):
        found = beam_search(engine, [prompt], k=3, beams=3)
    with quiet():
        theirs = generate(model, prompt, DictTrie(TITLES), 3, 0.0, "trie", END)
    assert found.scores[0] == pytest.approx(sorted(theirs.values(), reverse=True), abs=TOLERANCE)


def test_both_sides_of_the_change_take_the_tree_and_what_crosses_it_does_not() -> None:
    engine = TrieEngine(model_of("phi3_longrope"), Trie.from_sequences(TITLES))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for asked in (prompts(9, 12), prompts(90, 75)):
            assert engine.fits_tree(asked) and rank_catalogue(engine, asked).counters["cache_bytes_peak"]
        rank_catalogue(engine, prompts(9, 90, 12))
    assert engine.shared_prefix([[5] * 90, [5] * 80], Counters()) is None
    with pytest.warns(UserWarning, match="its RoPE changes"):
        assert not engine.fits_tree(prompts(9, 90))
    dynamic = TrieEngine(model_of("llama_dynamic"), Trie.from_sequences(TITLES))
    assert dynamic.fits_tree(prompts(9, 12))
    with pytest.warns(UserWarning, match="its RoPE changes"):
        assert not dynamic.fits_tree(prompts(90, 75))


@pytest.mark.parametrize("name", ["phi3_longrope", "llama_dynamic", "llama"])
def test_states_and_gradients_of_rows_in_a_batch_are_those_of_rows_alone(name: str) -> None:
    model, rows = model_of(name), prompts(9, 90, 64, 75, 12)
    length, width = torch.tensor([len(row) for row in rows]), 80  # nothing behind column 80 is needed
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    for b, row in enumerate(rows):
        ids[b, : len(row)] = torch.tensor(row[:width])

    def run(ids: torch.Tensor) -> torch.Tensor:
        return model.base_model(input_ids=ids, use_cache=False).last_hidden_state

    def gradient(hidden: torch.Tensor) -> torch.Tensor:
        model.zero_grad()
        (hidden * torch.linspace(-1, 1, hidden.shape[-1])).sum().backward()
        return model.model.layers[0].self_attn.o_proj.weight.grad.clone()

    together = as_if_alone(model, run, ids, length)
    found = torch.cat([together[b, : min(n, width)] for b, n in enumerate(length.tolist())])
    alone = []
    for row in rows:
        run(ids[:1, :1])
        alone.append(run(torch.tensor([row]))[0, :width])
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient(found), gradient(torch.cat(alone)), rtol=1e-3, atol=1e-4)


def test_where_rope_changes_is_read_for_all_layers_or_some() -> None:
    assert rope_switch(model_of("phi3_longrope")) == RopeSwitch(64, False)
    assert rope_switch(model_of("llama_dynamic")) == RopeSwitch(64, True)
    assert rope_switch(tiny_model()) is None
    layered = tiny_model("gemma3")
    assert rope_switch(layered) is None
    layered.config.rope_parameters["full_attention"] |= {"rope_type": "dynamic", "factor": 2.0}
    assert rope_switch(layered) == RopeSwitch(layered.config.max_position_embeddings, True)
    older = tiny_model("llama")
    older.config.rope_parameters, older.config.original_max_position_embeddings = {"type": "su"}, 50
    assert rope_switch(older) == RopeSwitch(50, False)


def test_which_rows_may_share_a_forward() -> None:
    length = np.array([70, 3, 64, 65, 70])
    assert [rows.tolist() for rows in RopeSwitch(64, False).alike(length)] == [[1, 2], [0, 3, 4]]
    assert [rows.tolist() for rows in RopeSwitch(64, True).alike(length)] == [[1, 2], [3], [0, 4]]
    assert RopeSwitch(64, False).side(10, 64) == 0
    assert RopeSwitch(64, False).side(65, 80) == 2
    assert RopeSwitch(64, True).side(65, 80) == RopeSwitch(64, False).side(64, 65) == 1
