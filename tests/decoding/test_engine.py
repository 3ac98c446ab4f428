"""Edge log-probabilities: the tree sweep equals plain forwards, for every family, and steps aside where it cannot."""

from __future__ import annotations

import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from tests.conftest import SIX
from tests.reference import search as reference
from tests.strategies import catalogues
from tests.tiny_models import tiny_model
from triewise.decoding import Counters, TrieEngine, beam_search, exact_search, rank_catalogue
from triewise.decoding.engine import edge_log_probabilities
from triewise.errors import UserError
from triewise.tokens import Trie

PROMPTS = [[7, 8, 9, 10, 11], [12, 13], [14]]
TOLERANCE = 1e-4  # float32, two layers


@pytest.mark.parametrize("support", ["trie", "vocabulary"])
@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt2", "gemma2", "granite"])
def test_the_sweep_equals_one_forward_per_title(kind: str, support: str) -> None:
    model = tiny_model(kind)
    engine = TrieEngine(model, Trie.from_sequences(SIX), support, chunk=2)
    ranking = rank_catalogue(engine, PROMPTS)
    for b, prompt in enumerate(PROMPTS):
        wanted = reference.catalogue(model, prompt, SIX, support)
        for item, score in zip(ranking.items[b], ranking.scores[b], strict=True):
            assert score == pytest.approx(wanted[item], abs=TOLERANCE)


@settings(max_examples=25, deadline=None)
@given(
    catalogues(),
    st.lists(st.lists(st.integers(0, 29), min_size=1, max_size=6), min_size=1, max_size=3),
    st.integers(1, 9),
)
def test_any_catalogue_any_prompts_any_chunk(
    titles: list[list[int]], prompts: list[list[int]], chunk: int
) -> None:
    model = tiny_model()
    trie = Trie.from_sequences(titles)
    for support in ("trie", "vocabulary"):
        ranking = rank_catalogue(TrieEngine(model, trie, support, chunk=chunk), prompts)
        for b, prompt in enumerate(prompts):
            wanted = reference.catalogue(model, prompt, titles, support)
            assert ranking.scores[b] == pytest.approx(
                sorted((wanted[i] for i in ranking.items[b]), reverse=True), abs=TOLERANCE
            )
        if support == "trie":
            assert np.exp(ranking.scores.astype(float)).sum(1) == pytest.approx(
                np.ones(len(prompts)), abs=TOLERANCE
            )


def test_batch_equals_one_by_one_and_padding_changes_nothing() -> None:
    engine = TrieEngine(tiny_model(), Trie.from_sequences(SIX), "vocabulary")
    together = edge_log_probabilities(engine, PROMPTS, Counters())
    alone = np.concatenate([edge_log_probabilities(engine, [prompt], Counters()) for prompt in PROMPTS])
    assert together == pytest.approx(alone, abs=1e-5)
    assert (together <= 0).all()


def test_work_is_counted_where_it_is_done() -> None:
    """Below the root of the six: node [1] and node [1, 3] branch; trie support runs just those two."""
    counters = Counters()
    edge_log_probabilities(TrieEngine(tiny_model(), Trie.from_sequences(SIX), "trie"), PROMPTS, counters)
    assert counters.prompt_tokens == 8
    assert counters.tree_tokens == 2 * 3
    assert counters.expansions == counters.head_rows == 3 * 3  # root, [1], [1, 3] for each of three users
    assert counters.token_forwards == 14
    counters = Counters()
    edge_log_probabilities(
        TrieEngine(tiny_model(), Trie.from_sequences(SIX), "vocabulary"), PROMPTS, counters
    )
    assert counters.tree_tokens == 6 * 3  # every inner node but the root
    assert counters.cache_bytes_peak > 0


def test_eager_attention_takes_an_additive_mask() -> None:
    model = tiny_model()
    wanted = edge_log_probabilities(TrieEngine(model, Trie.from_sequences(SIX)), PROMPTS, Counters())
    model.set_attn_implementation("eager")
    got = edge_log_probabilities(TrieEngine(model, Trie.from_sequences(SIX)), PROMPTS, Counters())
    assert got == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "reason"), [("gemma3", "attention window of 4 tokens"), ("bert", "not the product")]
)
def test_models_the_tree_cache_is_wrong_for_take_the_plain_path_with_one_warning(
    kind: str, reason: str
) -> None:
    model = tiny_model(kind)
    engine = TrieEngine(model, Trie.from_sequences(SIX), "vocabulary")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        ranking = rank_catalogue(engine, PROMPTS)
        rank_catalogue(engine, PROMPTS)
    assert len(seen) == 1
    assert re.search(reason, str(seen[0].message))
    wanted = reference.catalogue(model, PROMPTS[0], SIX, "vocabulary")
    assert ranking.scores[0] == pytest.approx([wanted[i] for i in ranking.items[0]], abs=TOLERANCE)
    assert ranking.counters["token_forwards"] > 0


def test_a_family_that_takes_no_mask_of_ours_takes_the_plain_path() -> None:
    import transformers as tf

    config = tf.BloomConfig(
        vocab_size=30, hidden_size=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=0
    )
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    with pytest.warns(UserWarning, match="plain, slower path"):
        ranking = rank_catalogue(TrieEngine(model, Trie.from_sequences(SIX)), PROMPTS)
    wanted = reference.catalogue(model, PROMPTS[0], SIX, "trie")
    assert ranking.scores[0] == pytest.approx([wanted[i] for i in ranking.items[0]], abs=TOLERANCE)


def test_a_window_shorter_than_the_longest_path_is_not_trusted() -> None:
    """The probe fits into the window; only the real prompt does not."""
    model = tiny_model("gemma3", sliding_window=16)
    engine = TrieEngine(model, Trie.from_sequences(SIX), "trie")
    assert engine.tree_cache_works
    rank_catalogue(engine, [[5, 6]])
    long = list(range(5, 19))
    with pytest.warns(
        UserWarning, match="attention window of 16 tokens is shorter than the longest path of 18"
    ):
        ranking = rank_catalogue(engine, [long])
    wanted = reference.catalogue(model, long, SIX, "trie")
    assert ranking.scores[0] == pytest.approx([wanted[i] for i in ranking.items[0]], abs=TOLERANCE)


@pytest.mark.parametrize("kind", ["global", "local"])
@pytest.mark.parametrize("search", [exact_search, beam_search, rank_catalogue])
def test_a_mask_or_window_over_places_of_the_cache_takes_the_plain_path(search: Any, kind: str) -> None:
    """GPT-Neo keeps a mask of as many places as it has positions; a cache of a whole tree has more."""
    import transformers as tf

    shape = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 64, "window_size": 24}
    layers = {"attention_types": [[[kind], 2]], "max_position_embeddings": 40}
    model = tf.GPTNeoForCausalLM(tf.GPTNeoConfig(vocab_size=30, **shape, **layers)).eval()
    titles = [[2 + i, 9 + i % 5, 14 + i % 7, 0] for i in range(20)]
    engine, prompt = TrieEngine(model, Trie.from_sequences(titles), "vocabulary"), list(range(3, 23))
    with pytest.warns(
        UserWarning, match=f"its attention counts places up to {24 if kind == 'local' else 40}, of"
    ):
        ranking = search(engine, [prompt], k=5)
    wanted = reference.catalogue(model, prompt, titles, "vocabulary")
    assert ranking.scores[0] == pytest.approx([wanted[i] for i in ranking.items[0]], abs=TOLERANCE)


@pytest.mark.parametrize("support", ["trie", "vocabulary"])
def test_threads_that_share_an_engine_get_what_each_gets_alone(support: str) -> None:
    model = tiny_model().requires_grad_(False)  # so that the common beginning of prompts is kept
    trie, beginning = Trie.from_sequences(SIX), list(range(5, 17))
    prompts = [[*beginning, *extra] for extra in ([1], [2, 3], [4], [5, 6, 7], [8, 9])] + [[9, 8], [3]]
    searches = [exact_search, beam_search, rank_catalogue] * 7
    calls = [(search, prompts[i % len(prompts)]) for i, search in enumerate(searches)]
    wanted = [search(TrieEngine(model, trie, support), [prompt], k=3) for search, prompt in calls]
    engine = TrieEngine(model, trie, support)
    with ThreadPoolExecutor(6) as pool:
        rankings = list(pool.map(lambda call: call[0](engine, [call[1]], k=3), calls))
    for ranking, alone in zip(rankings, wanted, strict=True):
        assert ranking.items.tolist() == alone.items.tolist()
        assert ranking.scores == pytest.approx(alone.scores, abs=1e-5)
    assert engine._prefix is not None


def test_one_warning_for_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, said = TrieEngine(tiny_model("bert"), Trie.from_sequences(SIX)), []
    monkeypatch.setattr(warnings, "warn", lambda text, **_: said.append(text))
    with ThreadPoolExecutor(6) as pool:
        assert not any(pool.map(engine.fits_tree, [PROMPTS] * 12))
    assert len(said) == 1 and "not the product" in said[0]


def test_user_errors() -> None:
    trie = Trie.from_sequences(SIX)
    with pytest.raises(UserError, match="wanted at_once and chunk of at least 1, got 0 and 256"):
        TrieEngine(tiny_model(), trie, at_once=0)
    with pytest.raises(
        UserError, match=r"wanted prompt tokens in \[0, 30\), the model's vocabulary, got up to 30"
    ):
        edge_log_probabilities(TrieEngine(tiny_model(), trie), [[1, 30]], Counters())
    with pytest.raises(UserError, match="wanted support 'trie' or 'vocabulary', got 'all'"):
        TrieEngine(tiny_model(), trie, "all")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="wanted trie tokens below 4, the model's vocabulary, got 5"):
        TrieEngine(tiny_model(vocabulary=4), trie)
    with pytest.raises(UserError, match="at least one token in every prompt"):
        edge_log_probabilities(TrieEngine(tiny_model(), trie), [[1], []], Counters())


@pytest.mark.parametrize("support", ["trie", "vocabulary"])
@pytest.mark.parametrize("takes", [True, False])
def test_the_plain_path_makes_the_logits_it_needs_in_blocks(
    takes: bool, support: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model with a head of its own; with and without a forward that is told which positions are wanted."""
    from triewise.decoding import engine as module

    model, made = tiny_model("bert"), []
    forward = type(model).forward

    def seen(self: Any, input_ids: Any, use_cache: Any, **keep: Any) -> Any:
        output = forward(self, input_ids=input_ids, use_cache=use_cache, **keep)
        made.append((input_ids.shape, output.logits.numel()))
        return output

    def unkept(self: Any, input_ids: Any, use_cache: Any) -> Any:
        return seen(self, input_ids, use_cache)

    def kept(self: Any, input_ids: Any, use_cache: Any, logits_to_keep: Any = 0) -> Any:
        return seen(self, input_ids, use_cache, logits_to_keep=logits_to_keep)

    monkeypatch.setattr(type(model), "forward", kept if takes else unkept)
    monkeypatch.setattr(module, "LOGIT_BLOCK", 150)  # five positions of 30 tokens
    for search in (rank_catalogue, exact_search):
        engine = TrieEngine(model, Trie.from_sequences(SIX), support)  # type: ignore[arg-type]
        with pytest.warns(UserWarning, match="plain, slower path"):
            assert not engine.tree_cache_works
        made.clear()
        ranking = search(engine, PROMPTS, 4)
        for b, prompt in enumerate(PROMPTS):
            wanted = reference.catalogue(model, prompt, SIX, support)
            assert ranking.scores[b] == pytest.approx([wanted[i] for i in ranking.items[b]], abs=TOLERANCE)
        assert made
        for shape, n in made[: ranking.counters["rounds"]]:
            assert n <= 150 or shape[0] == 1
            assert takes or n == shape[0] * shape[1] * 30
