"""The test of the tests: a recommender that breaks one promise fails the check of that promise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.worlds import catalog
from triewise.ranking import Groups, ItemLists, Ranking, check_histories, rank_items, resolve_filters
from triewise.testing import RecommenderContract, broken_promises


@dataclass
class Counting:
    """Scores by how near an item's index is to the last one of the history; ranks as every recommender should."""

    groups: Groups = field(default_factory=lambda: Groups.from_labels(catalog().group, np.arange(9)))

    def item_scores(self, histories: ItemLists) -> NDArray[np.float32]:
        check_histories(histories, self.groups)
        last = np.array([list(history)[-1] if len(history) else 0 for history in histories])
        return -np.abs(np.arange(9) - last[:, None] - 0.3).astype(np.float32)

    def recommend(self, histories: Any, k: Any = 10, exclude: Any = None, allow: Any = None) -> Ranking:
        return rank_items(self, histories, k, exclude, allow)


class TestCounting(RecommenderContract):
    make = Counting


def test_a_recommender_that_keeps_its_promises() -> None:
    assert broken_promises(TestCounting) == {}


def test_whether_a_history_may_be_empty_is_said() -> None:
    class SaysNo(TestCounting):
        takes_empty_history = False

    assert set(broken_promises(SaysNo)) == {"empty_history"}


def returned(change: Callable[[Ranking], Ranking]) -> Callable[..., Ranking]:
    """A recommender that changes what it returns."""
    return lambda self, histories, k=10, exclude=None, allow=None: change(
        Counting.recommend(self, histories, k, exclude, allow)
    )


def asked(**changes: Callable[..., Any]) -> Callable[..., Ranking]:
    """A recommender that changes what it is asked for; a change sees histories, k, exclude, allow."""

    def recommend(self: Any, histories: Any, k: Any = 10, exclude: Any = None, allow: Any = None) -> Ranking:
        given = {"histories": histories, "k": k, "exclude": exclude, "allow": allow}
        return Counting.recommend(self, **(given | {n: change(**given) for n, change in changes.items()}))

    return recommend


def with_items(change: Callable[[Any], Any]) -> Callable[..., Ranking]:
    return returned(lambda r: replace(r, items=change(r.items.copy())))


def twice(items: Any) -> Any:
    items[:, 1:2] = items[:, :1]
    return items


def wrapped(items: Any) -> Any:
    items[items < 0] = 0
    return items


def inside(lists: Any) -> Any:
    return lists if lists is None or isinstance(lists, str) else [[i % 9 for i in one] for one in lists]


def only_the_usual_members(
    self: Any, histories: Any, k: Any = 10, exclude: Any = None, allow: Any = None
) -> Ranking:
    """Filters that forget that another member of a group may stand for it."""
    without, only = resolve_filters(histories, exclude, allow)
    usual = set(self.groups.permitted().tolist())
    full = Counting.recommend(self, histories, None)
    width = k or self.groups.n_groups
    items, scores = (
        np.full((len(histories), width), -1, np.int32),
        np.full((len(histories), width), -np.inf, np.float32),
    )
    for b in range(len(histories)):
        allowed = (usual if only[b] is None else usual & set(only[b])) - set(without[b] or ())  # type: ignore[arg-type]
        kept = [j for j, i in enumerate(full.items[b].tolist()) if i in allowed][:width]
        items[b, : len(kept)], scores[b, : len(kept)] = full.items[b, kept], full.scores[b, kept]
    return Ranking(items, scores, full.certified)


BROKEN = {
    "types_and_shapes": returned(lambda r: replace(r, certified=r.certified.astype(np.int8))),
    "no_users": lambda self, histories, *args, **kw: Counting.recommend(
        self, histories or [[0]], *args, **kw
    ),
    "whole_catalogue_without_repeats": with_items(twice),
    "scores_descend": returned(
        lambda r: replace(r, scores=np.where(np.isfinite(r.scores), -r.scores, r.scores))
    ),
    "batch_equals_single": asked(histories=lambda histories, **_: [histories[-1] for _ in histories]),
    "k_beyond_the_catalogue_is_padded": with_items(wrapped),
    "exclude_takes_out_and_changes_nothing_else": asked(exclude=lambda exclude, **_: None),
    "history_can_be_excluded": asked(exclude=lambda exclude, **_: None if exclude == "history" else exclude),
    "only_allowed_items_are_returned": only_the_usual_members,
    "exclude_comes_before_allow": asked(
        exclude=lambda exclude, allow, **_: exclude if allow is None else None
    ),
    "each_user_has_filters_of_his_own": asked(
        allow=lambda histories, allow, **_: None if allow is None else [allow[0]] * len(histories)
    ),
    "mistakes_are_value_errors": asked(
        histories=lambda histories, **_: inside(histories),
        exclude=lambda exclude, **_: inside(exclude),
        allow=lambda allow, **_: inside(allow),
    ),
    "empty_history": asked(histories=lambda histories, **_: [(h[-1:] and h) or [99] for h in histories]),
}


@pytest.mark.parametrize("promise", BROKEN)
def test_each_broken_promise_is_noticed(promise: str) -> None:
    class Broken(Counting):
        recommend = BROKEN[promise]  # type: ignore[assignment]

    class TestBroken(RecommenderContract):
        make = Broken

    assert promise in broken_promises(TestBroken)


def test_there_is_a_broken_recommender_for_each_check() -> None:
    checks = {name.removeprefix("test_") for name in dir(RecommenderContract) if name.startswith("test_")}
    assert checks == set(BROKEN)


def test_nothing_of_pytest_is_needed() -> None:
    import subprocess
    import sys

    code = (
        "import sys; sys.modules['pytest'] = None; import triewise.testing; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
