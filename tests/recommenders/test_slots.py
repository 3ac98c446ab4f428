"""Recommenders whose prompts carry item slots keep the contract of all recommenders."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.slot_worlds import recommender
from tests.worlds import HISTORIES, catalog
from triewise.models import Histories, SequentialModel
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
