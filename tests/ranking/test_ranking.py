"""Groups, filters and ties: the rules every recommender shares."""

from __future__ import annotations

import numpy as np
import pytest

from triewise.errors import UserError
from triewise.ranking import Groups, MostPopular, rank_groups, resolve_filters

GROUPS = Groups.from_labels([0, 1, 0, 2], priority=[1, 5, 3, 0])  # items 0 and 2 have equal titles


def test_the_allowed_member_with_most_targets_represents_its_group() -> None:
    assert GROUPS.permitted().tolist() == [2, 1, 3]
    assert GROUPS.permitted(exclude=[2]).tolist() == [0, 1, 3]
    assert GROUPS.permitted(exclude=[0, 2]).tolist() == [-1, 1, 3]
    assert GROUPS.permitted(allow=[0, 3], exclude=[3]).tolist() == [0, -1, -1]
    assert GROUPS.permitted(allow=[]).tolist() == [-1, -1, -1]


def test_equal_counts_give_the_lowest_index() -> None:
    assert Groups.from_labels([7, 7, 7]).permitted().tolist() == [0]


def test_ties_break_by_item_index_also_at_the_last_place() -> None:
    groups = Groups.from_labels([3, 2, 1, 0])  # group g holds item 3 - g
    items, scores = rank_groups(np.zeros((1, 4)), groups, 2)
    assert items.tolist() == [[0, 1]]
    assert scores.tolist() == [[0.0, 0.0]]


def test_more_places_than_groups_are_padded() -> None:
    items, scores = rank_groups(np.array([[0.1, 0.3, 0.2]]), GROUPS, 5, exclude=[[1]])
    assert items.tolist() == [[3, 2, -1, -1, -1]]
    assert scores[0, 2:].tolist() == [-np.inf] * 3
    everything, _ = rank_groups(np.array([[0.1, 0.3, 0.2]]), GROUPS, None)
    assert everything.tolist() == [[1, 3, 2]]


@pytest.mark.parametrize("seed", range(5))
def test_a_filtered_ranking_is_the_full_one_without_the_filtered(seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = Groups.from_labels(np.arange(20))
    scores = rng.integers(0, 4, size=(3, 20)).astype(float)
    exclude = [rng.choice(20, size=5, replace=False).tolist() for _ in range(3)]
    full, _ = rank_groups(scores, groups, None)
    cut, _ = rank_groups(scores, groups, 6, exclude=exclude)
    for b in range(3):
        assert cut[b].tolist() == [i for i in full[b].tolist() if i not in exclude[b]][:6]


def test_bad_filters_are_named() -> None:
    with pytest.raises(UserError, match=r"item indices in \[0, 4\), got 4"):
        GROUPS.permitted(exclude=[4])
    with pytest.raises(UserError, match='exclude = "history"'):
        resolve_filters([[0]], "seen", None)
    with pytest.raises(UserError, match="allow lists for 1 users, got 2"):
        resolve_filters([[0]], None, [[0], [1]])
    with pytest.raises(UserError, match="wanted k >= 1"):
        rank_groups(np.zeros((1, 3)), GROUPS, 0)


def test_a_diverged_model_is_no_ranking() -> None:
    with pytest.raises(UserError, match="NaN.: the model diverged"):
        rank_groups(np.array([[0.1, np.nan, 0.2]]), GROUPS, 2)


def test_filters_are_one_list_of_integers_a_user() -> None:
    scores = np.array([[0.1, 0.3, 0.2]])
    assert rank_groups(scores, GROUPS, 1, exclude=np.array([[1]]))[0].tolist() == [[3]]
    for wrong in ([[1], [2]], []):
        with pytest.raises(UserError, match=rf"exclude lists for 1 users, got {len(wrong)}"):
            rank_groups(scores, GROUPS, 1, exclude=wrong)
    for items in ([1.7], 3, ["1"]):
        with pytest.raises(UserError, match="a list of item indices for each user"):
            GROUPS.permitted(exclude=items)  # type: ignore[arg-type]


def test_most_popular_counts_a_group_as_its_best_member() -> None:
    popular = MostPopular(GROUPS, np.array([1, 2, 3, 0]))
    ranking = popular.recommend([[], [2]], k=3, exclude="history")
    assert ranking.items.tolist() == [[2, 1, 3], [0, 1, 3]]
    assert ranking.certified.all()
    with pytest.raises(UserError, match="item indices"):
        popular.recommend([[9]])
