"""Users whose rankings a report looks at closely: whom it shows, and what each of its methods says of them.

Rankings are those that the evaluation stored; only what explains the ones of the users shown is computed here: the
tokens of their titles, and the other search of the trie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from triewise.data import allowed_items
from triewise.ranking import Groups, excluded_items
from triewise.recommenders import SETTINGS
from triewise.reports import Example, Explored, Explorer, Method, Ranked, Recommendation

if TYPE_CHECKING:
    from triewise.arrays import Bool, Int64
    from triewise.data import Dataset, Split
    from triewise.ranking import Evaluation
    from triewise.recommenders import SavedRecommender

TOP = 10  # titles of a method that are shown, and compared with the other search


@dataclass(frozen=True)
class Looked:
    """A row of the report, and what is needed to look at its users closely.

    Attributes:
        evaluation: What it ranked.
        recommender: What writes its titles, without assistant; None where it writes none.
    """

    evaluation: Evaluation
    recommender: SavedRecommender | None = None

    @property
    def other(self) -> tuple[str, SavedRecommender] | None:
        """The other search of its trie: beams beside an exact ranking, else the exact one, with what it is called.

        None where there is none: it has no trie, was assisted, or weighs tokens by step.
        """
        asked = self.evaluation.metrics
        apart = "assistant" in asked or asked.get("scope") == "step" or asked["search"] == "grounding"
        if self.recommender is None or apart:
            return None
        search = "exact" if asked["search"] == "beam" else "beam"
        kept = {key: asked[key] for key in SETTINGS if key in asked} | {"search": search}
        name = "the exact search" if search == "exact" else f"{max(asked['beams'], TOP)} beams"
        return name, self.recommender.with_settings(**kept)

    @property
    def note(self) -> str:
        """What a reader has to know of the probabilities shown."""
        asked = self.evaluation.metrics
        if "assistant" in asked or asked.get("alpha") or asked.get("length_penalty"):
            return "Probabilities are those of the model alone; the ranking also weighs other things."
        return ""


def example_rows(evaluation: Evaluation, n: int = 3) -> list[int]:
    """Rows worth a look, chosen by rule and not by taste: the first hit in the top 5, near miss, and miss."""
    rank = evaluation.rank
    hit, miss = (rank >= 0) & (rank < 5), (rank >= 100) | (rank < 0)
    near, any_row = (rank >= evaluation.items.shape[1]) & (rank < 100), np.ones(len(rank), dtype=bool)
    rows: list[int] = []
    for kind in (hit, near, miss, any_row, any_row):
        rows += [r for r in np.flatnonzero(kind).tolist() if r not in rows][:1]
    return rows[:n]


def example(
    recommender: SavedRecommender, evaluation: Evaluation, split: Split, r: int, top: int = 5
) -> Example:
    """A user with history, target and the tokens that decided each of the top recommendations."""
    title, target = recommender.catalog.title, int(split.target[r])
    items = [int(i) for i in evaluation.items[r, :top] if i >= 0]
    return Example(
        str(split.user_id[r]),
        evaluation.name,
        tuple(title[i] for i in split.history[r]),
        title[target],
        int(evaluation.rank[r]),
        recommender.explain(split.history[r], items, target),
    )


def explore(
    looked: Sequence[Looked], dataset: Dataset, split: Split, n: int, first: Sequence[int] = ()
) -> Explorer:
    """Users of all kinds, and what each method recommends them.

    For the first method that writes titles both searches are compared on twice as many rows: those where they part
    are found there.

    Args:
        looked: Rows of the report, all of the same rows of the split; the first is the one it is about.
        dataset: Their data.
        split: The rows.
        n: Number of users.
        first: Rows that are among them anyway.
    """
    others = [each.other for each in looked]
    writer = next((i for i, other in enumerate(others) if other is not None), 0)
    pool = sorted({*first, *_spread(np.arange(split.n_rows), 2 * n)})
    seen = [
        _searched(pool if i == writer else [], e, o, dataset, split)
        for i, (e, o) in enumerate(zip(looked, others, strict=True))
    ]
    kinds = _kinds(looked, dataset, split, seen[writer], looked[writer], pool)
    rows = chosen_rows({name: of for name, (_, of) in kinds.items()}, first, n)
    for each, other, found in zip(looked, others, seen, strict=True):
        found |= _searched([r for r in rows if r not in found], each, other, dataset, split)
    kinds = _kinds(looked, dataset, split, seen[writer], looked[writer], pool)
    title = dataset.catalog.title
    users = tuple(
        Explored(
            str(split.user_id[r]),
            tuple(name for name, (_, of) in kinds.items() if of[r]),
            tuple(title[i] for i in split.history[r]),
            title[split.target[r]],
            tuple(
                _ranked(each, found.get(r), split, r, dataset)
                for each, found in zip(looked, seen, strict=True)
            ),
        )
        for r in rows
    )
    said = (
        f"{len(rows)} of {split.n_rows:,} users, chosen by rule: of each kind an equal share where there are so many, "
        "evenly over the rows; the rest evenly over all others."
    )
    methods = tuple(
        Method(each.evaluation.name, other[0] if other else "", each.note)
        for each, other in zip(looked, others, strict=True)
    )
    return Explorer(users, methods, {name: meaning for name, (meaning, _) in kinds.items()}, said)


def chosen_rows(kinds: Mapping[str, Bool], first: Sequence[int], n: int) -> list[int]:
    """``n`` rows in order: ``first``, of each kind an equal share where there are so many, the rest of all rows.

    Args:
        kinds: (B,) which rows are of a kind.
        first: Rows that are taken anyway.
        n: How many; all of them where there are fewer.
    """
    rows, share = list(first)[:n], -(-n // len(kinds))
    for of_kind in sorted(kinds.values(), key=lambda each: int(each.sum())):  # the rarest first
        missing = min(share - int(of_kind[rows].sum()), n - len(rows))
        rows += _spread(np.setdiff1d(np.flatnonzero(of_kind), rows), missing)
    n_rows = len(next(iter(kinds.values())))
    return sorted([*rows, *_spread(np.setdiff1d(np.arange(n_rows), rows), n - len(rows))])


def _spread(rows: Int64, n: int) -> list[int]:
    """At most ``n`` of some rows, evenly."""
    if len(rows) <= n:
        return list(map(int, rows))
    return [int(rows[i * len(rows) // n]) for i in range(n)]


def _searched(
    rows: Sequence[int],
    looked: Looked,
    other: tuple[str, SavedRecommender] | None,
    dataset: Dataset,
    split: Split,
) -> dict[int, list[int]]:
    """The best items of the other search, by row."""
    if other is None or not rows:
        return {}
    asked, recommender = looked.evaluation.metrics, other[1]
    excluded = excluded_items(split, asked["exclude"])
    allow = None if asked["allow"] is None else allowed_items(Path(asked["allow"]), dataset.catalog)
    ranking = recommender.recommend(
        [split.history[r] for r in rows],
        min(TOP, recommender.groups.n_groups),
        None if excluded is None else [excluded[r] for r in rows],
        None if allow is None else [allow] * len(rows),
    )
    return {r: [int(i) for i in items if i >= 0] for r, items in zip(rows, ranking.items, strict=True)}


def _kinds(
    looked: Sequence[Looked],
    dataset: Dataset,
    split: Split,
    searched: Mapping[int, list[int]],
    writer: Looked,
    pool: Sequence[int],
) -> dict[str, tuple[str, Bool]]:
    """Kinds of users that there are: what they mean, and (B,) who is of one; means are those of the ``pool``."""
    about = looked[0].evaluation
    hits = np.array([(each.evaluation.rank >= 0) & (each.evaluation.rank < TOP) for each in looked])
    groups = Groups.from_labels(dataset.catalog.group)
    lost = np.zeros(split.n_rows, dtype=np.int64)
    won = lost.astype(bool)
    for r, items in searched.items():
        stored = set(writer.evaluation.items[r, : len(items)].tolist())
        lost[r] = len(stored - set(items))
        found = np.isin(groups.of_item[split.target[r]], groups.of_item[items])
        won[r] = found != (0 <= writer.evaluation.rank[r] < len(items))
    name = writer.evaluation.name
    kinds = {
        "found": (f"the true next title is among the first {TOP} of {about.name}", hits[0]),
        "missed": ("it is not", ~hits[0]),
        "methods disagree": (
            f"some methods have it among their first {TOP}, and others have not",
            hits.any(0) & ~hits.all(0),
        ),
        "beams differ": (
            f"beams and the exact search of {name} return other titles: so for {int((lost[pool] > 0).sum())} of "
            f"{len(pool)} users, evenly over the rows; {lost[pool].mean():.1f} titles on average",
            lost > 0,
        ),
        "beams decide": (f"one search of {name} returns the true next title and the other does not", won),
        "never in training": (
            "the true next title occurs in nobody's training history",
            groups.total(dataset.train_interactions)[split.target] == 0,
        ),
    }
    return {name: (meaning, of) for name, (meaning, of) in kinds.items() if of.any()}


def _ranked(looked: Looked, other: Sequence[int] | None, split: Split, r: int, dataset: Dataset) -> Ranked:
    """What a method recommends a user, the tokens of its titles where it writes them."""
    evaluation, title, target = looked.evaluation, dataset.catalog.title, int(split.target[r])
    items = [int(i) for i in evaluation.items[r, :TOP] if i >= 0]
    rank, group = int(evaluation.rank[r]), dataset.catalog.group
    if looked.recommender is None:
        scores = evaluation.scores[r]
        found = tuple(
            Recommendation(i, title[i], float(s), (), group[i] == group[target])
            for i, s in zip(items, scores, strict=False)
        )
        return Ranked(rank, found)
    beyond = [] if 0 <= rank < len(items) else [target]
    explained = looked.recommender.explain(split.history[r], items + beyond, target)
    return Ranked(
        rank,
        explained[: len(items)],
        explained[-1] if beyond else None,
        None if other is None else tuple(title[i] for i in other),
    )
