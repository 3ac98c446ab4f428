"""Item-kNN: cosines by a plain loop, whatever the blocks; recent items first; the contract."""

from __future__ import annotations

from collections import Counter
from math import sqrt

import numpy as np
import pytest

from tests.worlds import catalog, split
from triewise.data import Split
from triewise.ranking import Groups, ItemKNN, baselines as neighbours
from triewise.testing import RecommenderContract


class TestItemKNN(RecommenderContract):
    @staticmethod
    def make() -> ItemKNN:
        rng = np.random.default_rng(0)
        rows = split(rng.integers(0, 9, (40, 3)).tolist(), rng.integers(0, 9, 40).tolist())
        return ItemKNN.fit(rows, Groups.from_labels(catalog().group))


def shopping(n_users: int = 30, n_items: int = 20, seed: int = 0) -> Split:
    """Rows of users who come several times, and rows of nobody known."""
    rng = np.random.default_rng(seed)
    rows = split(
        [rng.integers(0, n_items - 1, rng.integers(1, 6)).tolist() for _ in range(n_users)],
        rng.integers(0, n_items - 1, n_users).tolist(),  # the last item is nobody's
    )
    rows.user_id[:] = [None if n % 5 == 0 else f"u{n % 11}" for n in range(n_users)]
    return rows


def cosines(rows: Split) -> dict[tuple[int, int], float]:
    """Pairs of items with a user in common, by a plain loop."""
    had: dict[object, set[int]] = {}
    for n, user in enumerate(rows.user_id):
        had.setdefault(n if user is None else user, set()).update(
            rows.history[n].tolist(), [int(rows.target[n])]
        )
    users = Counter(i for items in had.values() for i in items)
    both = Counter((i, j) for items in had.values() for i in items for j in items if i != j)
    return {(i, j): n / sqrt(users[i] * users[j]) for (i, j), n in both.items()}


@pytest.mark.parametrize("at_once", [1, 10, 300, 1 << 22])
@pytest.mark.parametrize("kept", [3, 50])
def test_neighbours_are_those_of_a_plain_loop(
    monkeypatch: pytest.MonkeyPatch, at_once: int, kept: int
) -> None:
    monkeypatch.setattr(neighbours, "PAIRS_AT_ONCE", at_once)
    rows = shopping()
    model = ItemKNN.fit(rows, Groups.from_labels(np.arange(20)), neighbours=kept)
    expected = cosines(rows)
    for i in range(20):
        wanted = sorted(((-c, b) for (a, b), c in expected.items() if a == i))[:kept]
        found = [
            (-float(c), int(j)) for j, c in zip(model.neighbour[i], model.cosine[i], strict=True) if c > 0
        ]
        assert [j for _, j in found] == [j for _, j in wanted]
        assert [c for c, _ in found] == pytest.approx([c for c, _ in wanted])


def test_scores_are_sums_over_the_history_and_younger_items_count_more() -> None:
    rows = shopping()
    model = ItemKNN.fit(rows, Groups.from_labels(np.arange(20)), decay=0.5)
    expected = cosines(rows)
    scores = model.item_scores([[3, 7, 3]])[0]
    wanted = [
        0.25 * expected.get((3, j), 0) + 0.5 * expected.get((7, j), 0) + expected.get((3, j), 0)
        for j in range(20)
    ]
    assert scores.tolist() == pytest.approx(wanted, abs=1e-6)


def test_without_a_neighbour_the_popular_comes_first() -> None:
    rows = shopping()
    model = ItemKNN.fit(rows, Groups.from_labels(np.arange(20)))
    ranked = model.recommend([[], [19]], k=None).items  # nothing, and an item that nobody had
    popular = np.lexsort((np.arange(20), -model.counts))
    assert ranked.tolist() == [popular.tolist()] * 2


def test_it_finds_the_next_item_of_a_cycle_and_nothing_in_noise() -> None:
    """Everybody walks round a cycle of twenty: the next item is one of the two nearest to the last."""
    rng = np.random.default_rng(0)
    start = rng.integers(0, 20, 400)
    rows = split([[(s + j) % 20 for j in range(3)] for s in start], ((start + 3) % 20).tolist())
    model = ItemKNN.fit(rows, Groups.from_labels(np.arange(20)), decay=0.3)
    best = model.recommend([[s, s + 1, s + 2] for s in range(17)], k=1, exclude="history").items[:, 0]
    assert best.tolist() == [s + 3 for s in range(17)]
    noise = split(rng.integers(0, 20, (400, 3)).tolist(), rng.integers(0, 20, 400).tolist())
    guess = ItemKNN.fit(noise, Groups.from_labels(np.arange(20))).recommend(list(noise.history), k=1)
    fresh = rng.integers(0, 20, 400)
    assert (guess.items[:, 0] == fresh).mean() < 0.12


def test_nobody_and_one_item() -> None:
    empty = ItemKNN.fit(split([], []), Groups.from_labels(np.arange(4)))
    assert empty.recommend([[2]], k=2).items.tolist() == [[0, 1]]
    alone = ItemKNN.fit(split([[0]], [0]), Groups.from_labels([0]))
    assert alone.recommend([[0]], k=2).items.tolist() == [[0, -1]]
