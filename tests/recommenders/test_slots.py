"""Recommenders whose prompts carry item slots keep the contract of all recommenders."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.slot_worlds import recommender
from tests.worlds import HISTORIES, catalog
from triewise.models import Histories, SequentialModel, slots_of
from triewise.recommenders import GenerativeRecommender, SequentialRecommender
from triewise.settings import EncoderSettings
from triewise.testing import RecommenderContract


class TestLlara(RecommenderContract):
    @staticmethod
    def make() -> GenerativeRecommender:
        return recommender("llara", batch_users=3)


class TestALlmRec(RecommenderContract):
    @staticmethod
    def make() -> GenerativeRecommender:
        return recommender("a-llmrec", search="exact", batch_users=2)


class TestALlmRecWithBeams(RecommenderContract):
    @staticmethod
    def make() -> GenerativeRecommender:
        return recommender("a-llmrec", "msl", search="beam", support="vocabulary", batch_users=2)


@pytest.mark.parametrize("kind", ["gru4rec", "sasrec", "bert4rec", "lrurec"])
def test_the_state_of_a_user_is_what_any_encoder_predicts_from(kind: str) -> None:
    model = SequentialModel(EncoderSettings(encoder=kind, width=8), catalog().n_items, 5, seed=1)
    theirs = SequentialRecommender(model, catalog(), np.ones(catalog().n_items, dtype=np.int64))
    histories = Histories(model)
    numbers = [histories.number(history) for history in HISTORIES]
    states = histories.states(numbers, torch.device("cpu"))
    np.testing.assert_allclose(model.scores(states).detach(), theirs.own_scores(HISTORIES), atol=1e-6)


def test_what_prompts_share_is_forgotten_when_item_vectors_change() -> None:
    found = []
    for asked_before in (True, False):
        made = recommender("llara")
        made.backbone.model.requires_grad_(False)
        histories = [[0, 1, 2], [0, 1, 2, 3]]
        before = made.recommend(histories, None).scores if asked_before else None
        slots = slots_of(made.backbone.model)
        assert slots is not None
        slots.table.mul_(-2)
        found.append(made.recommend(histories, None).scores)
        assert before is None or not np.allclose(found[-1], before, atol=1e-2)
    np.testing.assert_allclose(*found, atol=1e-5)
