"""Users who join and leave a running search get what they get alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests import worlds
from triewise.ranking import Ranking
from triewise.recommenders import GenerativeRecommender

TITLES = tuple(
    f"{a} {b} {c}" for a in ("Red", "Blue", "Green") for b in ("Sun", "Moon") for c in ("one", "two", "three")
)


def asked(rng: np.random.Generator, n: int) -> list[tuple[list[int], list[int] | None, list[int] | None]]:
    """Histories of many lengths, some with filters."""
    out = []
    for i in range(n):
        history = rng.integers(0, len(TITLES), rng.integers(0, 6)).tolist()
        exclude = rng.integers(0, len(TITLES), 4).tolist() if i % 3 == 0 else None
        allow = rng.integers(0, len(TITLES), 7).tolist() if i % 4 == 0 else None
        out.append((history, exclude, allow))
    return out


def joined(
    recommender: GenerativeRecommender, users: list[Any], k: int, rng: np.random.Generator, leave: set[int]
) -> dict[int, Ranking]:
    """Users come at random rounds, and some leave before they are done."""
    search = recommender.together(k)
    assert search is not None
    waiting, number, found = list(range(len(users))), dict[int, int](), dict[int, Ranking]()
    while waiting or number:
        while waiting and (not number or rng.random() < 0.6):
            ticket = recommender.join(search, *users[waiting[0]])
            if ticket is None:
                break
            number[ticket] = waiting.pop(0)
        for ticket in [t for t, user in number.items() if user in leave and rng.random() < 0.5]:
            search.leave(ticket)
            del number[ticket]
        if number:
            for ticket, ranking in search.step().items():
                found[number.pop(ticket)] = ranking
        assert search.inside == len(number)
    assert search.joined == len(users)
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {"search": "exact"},
        {"search": "beam", "beams": 3},
        {"search": "exact", "support": "vocabulary", "length_penalty": 1.0},
        {"search": "beam", "support": "vocabulary", "alpha": 0.5, "beams": 4},
        {"search": "beam", "alpha": 0.5, "scope": "step"},
        {"search": "exact", "template": "msl"},
    ],
    ids=str,
)
def test_joined_is_alone(changes: dict[str, Any], rng: np.random.Generator) -> None:
    recommender = worlds.recommender(TITLES, batch_users=5, **changes)
    users = asked(rng, 24)
    found = joined(recommender, users, 3, rng, leave=set())
    assert len(found) == 24
    for user, (history, exclude, allow) in enumerate(users):
        alone = recommender.recommend(
            [history], 3, None if exclude is None else [exclude], None if allow is None else [allow]
        )
        assert np.array_equal(found[user].items, alone.items), user
        np.testing.assert_allclose(found[user].scores, alone.scores, atol=1e-5)
        assert np.array_equal(found[user].certified, alone.certified)


def test_who_leaves_disturbs_nobody(rng: np.random.Generator) -> None:
    recommender = worlds.recommender(TITLES, batch_users=4, search="exact")
    users = asked(rng, 30)
    found = joined(recommender, users, 4, rng, leave=set(range(0, 30, 2)))
    for user, ranking in found.items():
        history, exclude, allow = users[user]
        without, only = (None if one is None else [one] for one in (exclude, allow))
        assert np.array_equal(ranking.items, recommender.recommend([history], 4, without, only).items)
    assert set(range(1, 30, 2)) <= set(found)


def test_an_assistant_has_its_say(rng: np.random.Generator) -> None:
    other = worlds.recommender(TITLES, seed=3)
    recommender = worlds.recommender(
        TITLES, batch_users=4, search="exact", assistant=other, assistant_weight=0.4
    )
    users = asked(rng, 8)
    found = joined(recommender, users, 3, rng, leave=set())
    for user, (history, exclude, allow) in enumerate(users):
        without, only = (None if one is None else [one] for one in (exclude, allow))
        alone = recommender.recommend([history], 3, without, only)
        assert np.array_equal(found[user].items, alone.items)
        np.testing.assert_allclose(found[user].scores, alone.scores, atol=1e-5)


def test_work_is_that_of_one_alone() -> None:
    recommender = worlds.recommender(TITLES, search="exact")
    search = recommender.together(3)
    assert search is not None and recommender.with_settings(search="catalogue").together(3) is None
    alone = recommender.recommend([[1, 2]], 3).counters
    ticket = recommender.join(search, [1, 2], None, None)
    while not (found := search.step()):
        pass
    assert list(found) == [ticket]
    same = {name: found[ticket].counters[name] for name in alone if name != "cache_bytes_peak"}
    assert same == {name: alone[name] for name in same}
