"""Titles drawn along the trie: as frequent as the model says, whoever is drawn for beside them."""

from __future__ import annotations

import numpy as np
import pytest

from tests import worlds
from triewise.decoding import TrieEngine, rank_catalogue, sample


def test_draws_are_as_frequent_as_the_model_says() -> None:
    made = worlds.recommender()
    engine, prompts = (
        TrieEngine(made.backbone.model, made.trie),
        [made.prompts.encode(h) for h in ([0], [2, 5])],
    )
    ranking = rank_catalogue(engine, prompts)
    longest = int(made.trie.depth.max())
    n = 1500
    uniform = np.random.default_rng(0).random((2 * n, longest))
    drawn = sample(engine, [*prompts[:1] * n, *prompts[1:] * n], uniform).reshape(2, n)
    for user in range(2):
        p = np.zeros(made.trie.n_items)
        p[made.trie.item_order[made.trie.item_lo[made.trie.leaf[ranking.items[user]]]]] = np.exp(
            ranking.scores[user]
        )
        assert p.sum() == pytest.approx(1, abs=1e-5)
        frequency = np.bincount(drawn[user], minlength=len(p)) / n
        assert np.abs(frequency - p).max() < 4 * np.sqrt(0.25 / n)
    assert 4 not in drawn  # of equal titles the lower one stands for both


def test_draws_do_not_depend_on_support_or_neighbours() -> None:
    made = worlds.recommender()
    prompts = [made.prompts.encode(history) for history in worlds.HISTORIES] * 4
    uniform = np.random.default_rng(1).random((len(prompts), int(made.trie.depth.max())))
    engine = TrieEngine(made.backbone.model, made.trie)
    together = sample(engine, prompts, uniform)
    assert len(set(together.tolist())) > 2
    alone = [sample(engine, [prompt], uniform[b : b + 1])[0] for b, prompt in enumerate(prompts)]
    assert together.tolist() == alone
    whole = TrieEngine(made.backbone.model, made.trie, "vocabulary", at_once=3)
    assert sample(whole, prompts, uniform).tolist() == alone


@pytest.mark.parametrize("titles", [("Alien",), ("Alien", "Alien")])
def test_one_title_is_drawn_without_a_decision(titles: tuple[str, ...]) -> None:
    made = worlds.recommender(titles)
    engine = TrieEngine(made.backbone.model, made.trie)
    assert sample(engine, [made.prompts.encode([0])] * 20, np.zeros((20, 9))).tolist() == [0] * 20
