"""What every recommender owes its users, as tests to inherit; for your own recommenders too.

Write a class whose name begins with ``Test``, say how the recommender is made, and pytest runs every check::

    from triewise.testing import RecommenderContract

    class TestMine(RecommenderContract):
        @staticmethod
        def make():
            return MyRecommender(...)

Without pytest, `broken_promises` runs the same checks and says which of them fail.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from triewise.ranking import Ranking, Recommender


@functools.cache
def _made(make: Callable[[], Recommender]) -> Recommender:
    return make()


class RecommenderContract:
    """One test for each promise of `Recommender.recommend`; works on a catalogue of at least nine items.

    Attributes:
        make: Static method without arguments: the recommender, as small as you like. Called once a class.
        histories: Item indices of the users the tests ask for, oldest first.
        tolerance: Largest difference of a score where only the other users of a batch differ.
        takes_empty_history: Whether ``recommend([[]])`` gives a ranking; else it is a ``ValueError``.
    """

    make: Callable[[], Recommender]
    histories: Sequence[Sequence[int]] = ((0, 1), (2,), (5, 6, 7, 0, 1, 2), (4,))
    tolerance: float = 1e-4
    takes_empty_history: bool = True

    @property
    def recommender(self) -> Recommender:
        """The recommender under test."""
        return _made(type(self).make)

    def test_types_and_shapes(self) -> None:
        """Items (B, K) int32, scores (B, K) float32 without NaN, certified (B,) bool."""
        n_groups, n_users = self.recommender.groups.n_groups, len(self.histories)
        for k, width in ((3, 3), (None, n_groups)):
            ranking = self.recommender.recommend(self.histories, k)
            shapes = (ranking.items.shape, ranking.scores.shape, ranking.certified.shape)
            assert shapes == ((n_users, width), (n_users, width), (n_users,)), shapes
            types = [str(part.dtype) for part in (ranking.items, ranking.scores, ranking.certified)]
            assert types == ["int32", "float32", "bool"], types
            assert not np.isnan(ranking.scores).any(), "a score is not a number"

    def test_no_users(self) -> None:
        """Nobody asked, nothing is returned."""
        assert self.recommender.recommend([], 3).items.shape == (0, 3)

    def test_whole_catalogue_without_repeats(self) -> None:
        """``k=None`` returns an item of every group, each once."""
        ranking = self.recommender.recommend(self.histories, None)
        for row in ranking.items:
            assert sorted(self._groups(row)) == list(range(self.recommender.groups.n_groups)), row

    def test_scores_descend(self) -> None:
        """Best first."""
        scores = self.recommender.recommend(self.histories, None).scores
        assert (scores[:, 1:] <= scores[:, :-1]).all(), "a score is above the one before it"

    def test_batch_equals_single(self) -> None:
        """Who else is asked for in the same call changes nothing."""
        together = self.recommender.recommend(self.histories, None)
        for b, history in enumerate(self.histories):
            alone = self.recommender.recommend([history], None)
            assert alone.items[0].tolist() == together.items[b].tolist(), f"other items for {history}"
            assert np.allclose(alone.scores[0], together.scores[b], atol=self.tolerance)

    def test_k_beyond_the_catalogue_is_padded(self) -> None:
        """Places that nothing is left for are -1 with score -inf; the others are the full ranking."""
        n_groups = self.recommender.groups.n_groups
        ranking = self.recommender.recommend(self.histories, n_groups + 3)
        assert ranking.items.shape == (len(self.histories), n_groups + 3)
        self._padded_from(ranking, n_groups)

    def test_exclude_takes_out_and_changes_nothing_else(self) -> None:
        """The ranking of what is left is the full one without the excluded groups."""
        of_item = self.recommender.groups.of_item
        full = self.recommender.recommend(self.histories, None)
        unwanted = [np.flatnonzero(np.isin(of_item, self._groups(row[[0, 2]]))) for row in full.items]
        cut = self.recommender.recommend(self.histories, None, exclude=unwanted)
        for b, without in enumerate(unwanted):
            kept = [i for i in full.items[b].tolist() if i not in without]
            assert cut.items[b, : len(kept)].tolist() == kept
        self._padded_from(cut, self.recommender.groups.n_groups - 2)

    def test_history_can_be_excluded(self) -> None:
        """``exclude="history"`` returns none of the user's own items."""
        ranking = self.recommender.recommend(self.histories, None, exclude="history")
        for row, history in zip(ranking.items, self.histories, strict=True):
            assert not set(row.tolist()) & set(history), f"an item of {history} was returned"

    def test_only_allowed_items_are_returned(self) -> None:
        """``allow`` returns these items, whichever member of its group usually stands for one; no item: no result."""
        for items in ([7], [3, 7], [0, 2, 8], []):
            expected = {g: [i for i in items if self._groups([i]) == [g]] for g in self._groups(items)}
            ranking = self.recommender.recommend([self.histories[0]], 9, allow=[items])
            found = [i for i in ranking.items[0].tolist() if i >= 0]
            assert set(found) <= set(items), f"{found} for allow = {items}"
            assert sorted(self._groups(found)) == sorted(expected), f"{found} for allow = {items}"
            self._padded_from(ranking, len(expected))

    def test_exclude_comes_before_allow(self) -> None:
        """What is excluded is not returned though it is allowed."""
        ranking = self.recommender.recommend([self.histories[0]], 2, exclude=[[7]], allow=[[7, 8]])
        assert ranking.items[0].tolist() == [8, -1]

    def test_each_user_has_filters_of_his_own(self) -> None:
        """The lists of one user do not touch another; one list too few is a ``ValueError``."""
        ranking = self.recommender.recommend(self.histories[:2], 9, allow=[[0, 5], [8]])
        assert [sorted(i for i in row.tolist() if i >= 0) for row in ranking.items] == [[0, 5], [8]]
        self._refuses(lambda: self.recommender.recommend(self.histories[:2], exclude=[[0]]))

    def test_mistakes_are_value_errors(self) -> None:
        """Items outside the catalogue, in a history or a filter, and ``k < 1``: not a wrong ranking."""
        recommend, beyond = self.recommender.recommend, self.recommender.groups.n_items
        self._refuses(lambda: recommend([[beyond]]), f"{beyond}")
        self._refuses(lambda: recommend([[-1]]), "-1")
        self._refuses(lambda: recommend([[0]], exclude=[[beyond]]), f"{beyond}")
        self._refuses(lambda: recommend([[0]], allow=[[beyond]]), f"{beyond}")
        self._refuses(lambda: recommend([[0]], 0), "0")

    def test_empty_history(self) -> None:
        """A user without a history gets a ranking, or a clear error where the recommender says so."""
        if self.takes_empty_history:
            assert (self.recommender.recommend([[]], 3).items >= 0).all()
        else:
            self._refuses(lambda: self.recommender.recommend([[]], 3))

    def _groups(self, items: Sequence[int] | NDArray[np.int32]) -> list[int]:
        """Group of each item."""
        return [int(self.recommender.groups.of_item[i]) for i in items]

    @staticmethod
    def _padded_from(ranking: Ranking, n: int) -> None:
        assert (ranking.items[:, :n] >= 0).all(), f"fewer than {n} items"
        assert (ranking.items[:, n:] == -1).all(), f"an item behind the {n} that there are"
        assert np.isfinite(ranking.scores[:, :n]).all() and np.isneginf(ranking.scores[:, n:]).all()

    @staticmethod
    def _refuses(call: Callable[[], object], named: str = "") -> None:
        try:
            call()
        except ValueError as error:
            assert named in str(error), f"wanted {named} in the error, got: {error}"
        else:
            raise AssertionError(
                f"wanted a ValueError{f' that names {named}' if named else ''}, got a ranking"
            )


def broken_promises(contract: type[RecommenderContract]) -> dict[str, str]:
    """Run a contract without pytest.

    Args:
        contract: A subclass with ``make``.

    Returns:
        Name of each test that fails, without ``test_``, and its error; empty where all is well.
    """
    broken = {}
    for name in (name for name in dir(contract) if name.startswith("test_")):
        try:
            getattr(contract(), name)()
        except Exception as error:
            broken[name.removeprefix("test_")] = f"{type(error).__name__}: {error}"
    return broken
