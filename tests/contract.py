"""What every recommender owes: test classes inherit :class:`RecommenderContract` and say how to make one."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest

from triewise.errors import UserError
from triewise.ranking import Recommender

HISTORIES = [[0, 1], [2], [5, 6, 7, 0, 1, 2], [4]]


@functools.cache
def _made(make: Callable[[], Recommender]) -> Recommender:
    return make()


class RecommenderContract:
    """Nine items, two of them (3 and 4) with equal titles."""

    make: Callable[[], Recommender]  # a static method; called once a class

    @pytest.fixture
    def recommender(self) -> Recommender:
        return _made(type(self).make)

    def test_batch_equals_single(self, recommender: Recommender) -> None:
        together = recommender.recommend(HISTORIES, k=8)
        for b, history in enumerate(HISTORIES):
            alone = recommender.recommend([history], k=8)
            assert alone.items[0].tolist() == together.items[b].tolist()
            assert alone.scores[0] == pytest.approx(together.scores[b], abs=1e-4)

    def test_no_repeats_and_descending(self, recommender: Recommender) -> None:
        ranking = recommender.recommend(HISTORIES, k=None)
        assert ranking.items.shape == (4, 8)
        for row in ranking.items:
            assert len({int(recommender.groups.of_item[i]) for i in row}) == 8
        assert (np.diff(ranking.scores) <= 0).all()
        assert (ranking.items.dtype, ranking.scores.dtype, ranking.certified.dtype) == (
            np.int32,
            np.float32,
            bool,
        )

    def test_k_beyond_the_catalogue_is_padded(self, recommender: Recommender) -> None:
        ranking = recommender.recommend(HISTORIES, k=20)
        assert (ranking.items[:, 8:] == -1).all()
        assert np.isneginf(ranking.scores[:, 8:]).all()

    def test_filtered_equals_the_full_ranking_without_the_filtered(self, recommender: Recommender) -> None:
        full = recommender.recommend(HISTORIES, k=None)
        exclude = [[0, 8], [3, 4], [], [1]]
        cut = recommender.recommend(HISTORIES, k=None, exclude=exclude)
        for b in range(len(HISTORIES)):
            kept = [i for i in full.items[b].tolist() if i not in exclude[b]]
            assert cut.items[b, : len(kept)].tolist() == kept

    def test_the_history_can_be_excluded_and_everything_filtered_out(self, recommender: Recommender) -> None:
        ranking = recommender.recommend(HISTORIES, k=None, exclude="history")
        for row, history in zip(ranking.items, HISTORIES, strict=True):
            assert not set(row.tolist()) & set(history)
        assert (recommender.recommend([[0]], k=3, allow=[[]]).items == -1).all()

    def test_allow_lists_keep_the_group(self, recommender: Recommender) -> None:
        ranking = recommender.recommend([[0]], k=5, allow=[[3, 7]])
        assert sorted(ranking.items[0].tolist()) == [-1, -1, -1, 3, 7]

    def test_unknown_items_are_one_clear_line(self, recommender: Recommender) -> None:
        with pytest.raises(UserError, match=r"item indices in \[0, 9\), got 9"):
            recommender.recommend([[9]])

    def test_no_users(self, recommender: Recommender) -> None:
        assert recommender.recommend([], k=3).items.shape == (0, 3)
