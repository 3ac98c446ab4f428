"""Which search a test row uses, grounding's gamma, an assistant's weight: chosen on validation rows, named in the row.

MSL reports, for every baseline, the better of grounding and constrained beam search.

Dimension key: B rows of a split, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from triewise.errors import UserError
from triewise.progress import note, progress
from triewise.ranking import (
    Groups,
    ItemLists,
    Items,
    evaluate,
    excluded_items,
    metrics_from_rank,
    rank_of_target,
)
from triewise.recommenders.generative import GenerativeRecommender
from triewise.recommenders.grounding import (
    COLLABORATIVE_GAMMAS,
    POPULARITY_GAMMAS,
    GroundedRecommender,
    inject,
)

if TYPE_CHECKING:
    from triewise.data import Split
    from triewise.recommenders.saved import SavedRecommender
    from triewise.settings import EvaluationSettings

METRIC = "NDCG@10"
ROWS_AT_ONCE = 256


def choose_search(
    recommender: SavedRecommender,
    split: Split,
    settings: EvaluationSettings,
    allow: Items | None = None,
) -> tuple[EvaluationSettings, dict[str, Any]]:
    """The best of ``settings.choose`` on validation rows, by NDCG@10; of equals the first.

    Args:
        recommender: The model, with the other settings already made.
        split: Validation rows.
        settings: Which searches are tried, and the filters.
        allow: The only items that may be returned, or None.

    Returns:
        The settings with ``search`` and ``gamma`` chosen, and for ``metrics.json``: the metric, the rows and what each
        search reached.

    Raises:
        UserError: No validation rows, ``exclude = "seen"`` where that is unknown, or a model that does not search.

    Differs from the authors' code: BIGRec chooses gamma anew for every metric and cut-off; here one gamma serves all.
    """
    if split.n_rows == 0:
        raise UserError("evaluation.choose needs validation rows, and this data set has none; set search")
    tried: dict[str, dict[str, float]] = {}
    for search in settings.choose:
        asked = recommender.with_settings(search=search)
        if search == "grounding" and isinstance(asked, GenerativeRecommender):
            gamma, best = choose_gamma(asked.grounded, split, settings.exclude, allow)
            tried[search] = {"gamma": gamma, METRIC: best}
            continue
        depth = max(settings.beams if search == "beam" else 0, settings.k, 10)
        judged = evaluate(
            asked,
            split,
            name=f"{search} on validation rows",
            split_name="valid",
            depth=depth,
            exclude=settings.exclude,
            allow=allow,
        )
        tried[search] = {METRIC: judged.metrics[METRIC]}
    chosen = max(settings.choose, key=lambda search: tried[search][METRIC])
    changes: dict[str, Any] = {"search": chosen}
    if chosen == "grounding":
        changes["gamma"] = tried[chosen]["gamma"]
    said = ", ".join(f"{search} {values[METRIC]:.4f}" for search, values in tried.items())
    note(f"{chosen} is chosen on {split.n_rows} validation rows by {METRIC}: {said}")
    return settings.model_copy(update=changes), {"by": METRIC, "rows": split.n_rows, "tried": tried}


def choose_gamma(
    grounded: GroundedRecommender, split: Split, exclude: str = "none", allow: Items | None = None
) -> tuple[float, float]:
    """The gamma of BIGRec's grid with the best NDCG@10 on these rows, and that NDCG@10; of equals the smallest.

    Every text is generated once. 0, no injection, is among the gammas; the model's own plays no part. Filters as for
    `evaluate`.
    """
    gammas = POPULARITY_GAMMAS if grounded.collaborator is None else (0.0, *sorted(set(COLLABORATIVE_GAMMAS)))

    def judged(histories: ItemLists) -> Callable[[float], NDArray[np.float64]]:
        distance, weight = grounded.distances(histories), grounded.weights(histories)
        return lambda gamma: -inject(distance, weight, gamma)

    values = _values(judged, gammas, grounded.groups, split, "gamma", exclude, allow)
    best = int(np.argmax(values))
    return gammas[best], values[best]


def choose_weight(
    recommender: SavedRecommender, split: Split, exclude: str = "none", allow: Items | None = None
) -> tuple[float, dict[str, Any]]:
    """The weight of the model beside its assistant with the best NDCG@10; of equals the larger.

    Weights 1, .9, ... 0 are tried on full rankings, which exact search and the catalogue have; a beam search is not run
    for each. Model and assistant are asked once; the weight they have now plays no part. Filters as for `evaluate`.

    Returns:
        The weight, and for ``metrics.json``: the metric, the rows and what each weight reached.

    Raises:
        UserError: No validation rows, or ``exclude = "seen"`` where that is unknown.
    """
    if split.n_rows == 0:
        raise UserError(
            "assistant_weight = 'choose' needs validation rows, and this data set has none; set it to a number"
        )
    weights = tuple(n / 10 for n in range(10, -1, -1))

    def judged(histories: ItemLists) -> Callable[[float], NDArray[np.float64]]:
        own, theirs = recommender.parts(histories)
        return lambda a: own if a == 1 else theirs if a == 0 else a * own + (1 - a) * theirs

    values = _values(judged, weights, recommender.groups, split, "the assistant's weight", exclude, allow)
    best = int(np.argmax(values))
    tried = {f"{weight:g}": value for weight, value in zip(weights, values, strict=True)}
    said = ", ".join(f"{weight} {value:.4f}" for weight, value in tried.items())
    note(f"weight {weights[best]:g} is chosen on {split.n_rows} validation rows by {METRIC}: {said}")
    return weights[best], {"by": METRIC, "rows": split.n_rows, "tried": tried}


def _values(
    judged: Callable[[ItemLists], Callable[[float], NDArray[np.float64]]],
    grid: Sequence[float],
    groups: Groups,
    split: Split,
    what: str,
    exclude: str,
    allow: Items | None,
) -> list[float]:
    """NDCG@10 at each point of a grid; ``judged`` gives for histories what maps a point to scores (B, G)."""
    rank = np.zeros((len(grid), split.n_rows), dtype=np.int32)
    without = excluded_items(split, exclude)
    with progress(f"choosing {what}", split.n_rows, "users") as advance:
        for start in range(0, split.n_rows, ROWS_AT_ONCE):
            rows = range(start, min(start + ROWS_AT_ONCE, split.n_rows))
            scores = judged([split.history[r] for r in rows])
            own = [None if without is None else without[r] for r in rows]
            hidden = np.array([groups.permitted(one, allow) < 0 for one in own])
            target = groups.of_item[split.target[start : rows.stop]]
            gone = hidden[np.arange(len(rows)), target]
            for g, point in enumerate(grid):
                found = rank_of_target(np.where(hidden, -np.inf, scores(point)), target)
                rank[g, start : rows.stop] = np.where(gone, -1, found)
            advance(len(rows))
    return [float(metrics_from_rank(r, (10,))[METRIC].mean()) for r in rank]
