"""Ranking the whole catalogue: order, filters, groups, length penalty, IGD weights."""

from __future__ import annotations

import numpy as np
import pytest

from tests.conftest import SIX
from tests.tiny_models import tiny_model
from triewise.decoding import Counters, TrieEngine, rank_catalogue
from triewise.decoding.engine import edge_log_probabilities
from triewise.errors import UserError
from triewise.tokens import Trie, decoding_weights, information_gain

PROMPTS = [[7, 8, 9], [12, 13]]
TRIE = Trie.from_sequences(SIX)
COUNTS = np.array([3, 1, 4, 0, 5, 2])


@pytest.fixture(scope="module")
def engine() -> TrieEngine:
    return TrieEngine(tiny_model(), TRIE)


def test_every_group_once_best_first(engine: TrieEngine) -> None:
    ranking = rank_catalogue(engine, PROMPTS, counts=COUNTS)
    assert ranking.items.shape == (2, 5)
    assert {tuple(sorted(row)) for row in ranking.items.tolist()} == {(0, 2, 3, 4, 5)}  # 4 stands for 1 and 4
    assert (np.diff(ranking.scores) <= 0).all()
    assert ranking.certified.all()
    assert ranking.items.dtype == np.int32
    assert ranking.scores.dtype == np.float32


def test_filters_take_items_out_and_change_no_score(engine: TrieEngine) -> None:
    full = rank_catalogue(engine, PROMPTS)
    cut = rank_catalogue(engine, PROMPTS, exclude=[[0, 1], [5]], allow=[[0, 1, 2, 4], None])
    assert sorted(cut.items[0].tolist()) == [-1, -1, -1, 2, 4]
    score = {int(i): s for i, s in zip(full.items[0], full.scores[0], strict=True)}
    assert (
        cut.scores[0, 0] == score[int(cut.items[0, 0])] or cut.items[0, 0] == 4
    )  # 4 carries the score of its group
    assert [i for i in full.items[1].tolist() if i != 5] == cut.items[1, :4].tolist()


def test_k_larger_than_the_catalogue_is_padded(engine: TrieEngine) -> None:
    ranking = rank_catalogue(engine, PROMPTS, k=8)
    assert ranking.items.shape == (2, 8)
    assert (ranking.items[:, 5:] == -1).all()
    assert np.isneginf(ranking.scores[:, 5:]).all()


def test_length_penalty_divides_by_the_tokens_of_the_title(engine: TrieEngine) -> None:
    plain, divided = rank_catalogue(engine, PROMPTS), rank_catalogue(engine, PROMPTS, length_penalty=1.0)
    score = {int(i): s for i, s in zip(plain.items[0], plain.scores[0], strict=True)}
    for i, s in zip(divided.items[0], divided.scores[0], strict=True):
        assert s == pytest.approx(score[int(i)] / len(SIX[int(i)]), rel=1e-5)


def test_alpha_weighs_every_edge_by_its_gain(engine: TrieEngine) -> None:
    gain = information_gain(TRIE, COUNTS)
    weights = decoding_weights(TRIE, gain, 0.4)
    edges = edge_log_probabilities(engine, PROMPTS, Counters())
    ranking = rank_catalogue(engine, PROMPTS, alpha=0.4, gain=gain)
    for i, s in zip(ranking.items[0], ranking.scores[0], strict=True):
        path = TRIE.walk(SIX[int(i)])[1:]
        assert s == pytest.approx(float((weights[path] * edges[0, path]).sum()), abs=1e-5)


def test_shuffling_the_catalogue_changes_nothing(engine: TrieEngine, rng: np.random.Generator) -> None:
    order = rng.permutation(len(SIX))
    other = TrieEngine(engine.model, Trie.from_sequences([SIX[i] for i in order]))
    a = rank_catalogue(engine, PROMPTS, counts=COUNTS)
    b = rank_catalogue(other, PROMPTS, counts=COUNTS[order])
    assert order[b.items].tolist() == a.items.tolist()
    assert b.scores == pytest.approx(a.scores, abs=1e-5)


def test_one_item() -> None:
    ranking = rank_catalogue(TrieEngine(tiny_model(), Trie.from_sequences([[4, 0]])), PROMPTS, k=2)
    assert ranking.items.tolist() == [[0, -1], [0, -1]]
    assert ranking.scores[:, 0].tolist() == [0.0, 0.0]
    assert ranking.counters["tree_tokens"] == 0


def test_user_errors(engine: TrieEngine) -> None:
    with pytest.raises(UserError, match=r"alpha in \[0, 1\], got 2"):
        rank_catalogue(engine, PROMPTS, alpha=2)
    with pytest.raises(UserError, match="alpha > 0 needs gain"):
        rank_catalogue(engine, PROMPTS, alpha=0.1)
    with pytest.raises(UserError, match="k >= 1"):
        rank_catalogue(engine, PROMPTS, k=0)
