"""Histories as titles or ids in, titles with scores, certificates and deciding tokens out.

The one function behind ``triewise recommend``, and behind whatever else asks a recommender for a few users at a time.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from triewise.errors import UserError
from triewise.reports import Recommendation, pieces

if TYPE_CHECKING:
    from triewise.arrays import Int64
    from triewise.data import Catalog
    from triewise.ranking import Items, Ranking
    from triewise.recommenders import SavedRecommender


@dataclass(frozen=True)
class Recommended:
    """One title of an answer.

    Attributes:
        item: Item index.
        item_id: Raw id.
        title: Its title.
        score: As in `Ranking.scores`.
        explanation: Its tokens, where they were asked for.
    """

    item: int
    item_id: str
    title: str
    score: float
    explanation: Recommendation | None = None

    def as_json(self) -> dict[str, Any]:
        """JSON values; ``tokens`` (text, probability, whether the catalogue left an alternative) where explained."""
        values: dict[str, Any] = {"item_id": self.item_id, "title": self.title, "score": self.score}
        if self.explanation is None:
            return values
        tokens = [
            {"text": piece.text, "probability": math.exp(piece.log_p), "decided": piece.decides}
            for piece in pieces(self.explanation.tokens)
        ]
        return values | {"tokens": tokens}


@dataclass(frozen=True)
class Question:
    """What one user asks, in item indices.

    Attributes:
        known: The history, without what is not in the catalogue.
        unknown: What is not.
        unwanted: Items that may not be returned, with all of their titles; those of a request share them.
        only: The only ones that may; None for all.
        keep_history: Whether titles of the history may be.
    """

    known: tuple[int, ...]
    unknown: tuple[str, ...]
    unwanted: Int64
    only: Items | None = None
    keep_history: bool = False

    def without(self, recommender: SavedRecommender) -> Int64:
        """All items that may not be returned; made where they are needed, for they may be many."""
        if self.keep_history or not self.known:
            return self.unwanted
        return np.union1d(self.unwanted, recommender.groups.members(self.known))


@dataclass(frozen=True)
class Answer:
    """What one history gets.

    Attributes:
        recommendations: Best first; fewer than ``k`` where fewer may be returned.
        certified: Whether no better title is missing; see `Ranking`.
        unknown: Titles or ids of the history that are not in the catalogue, and were left out.
        tied: So many of the last places may be other titles' as well; see `Ranking`.
    """

    recommendations: tuple[Recommended, ...]
    certified: bool
    unknown: tuple[str, ...]
    tied: int = 0

    def as_json(self) -> dict[str, Any]:
        """JSON values; ``tied`` and ``unknown`` where there is something."""
        unknown = {"unknown": list(self.unknown)} if self.unknown else {}
        tied = {"tied": self.tied} if self.tied else {}
        listed = [recommended.as_json() for recommended in self.recommendations]
        return {"recommendations": listed, "certified": self.certified, **tied, **unknown}


@dataclass(frozen=True)
class Answers:
    """An answer for each history, and the work done for all (`Ranking.counters`)."""

    of_each: tuple[Answer, ...]
    counters: dict[str, int]


def answer(
    recommender: SavedRecommender,
    histories: Sequence[Sequence[str]],
    k: int = 10,
    *,
    by: Literal["title", "id"] = "title",
    exclude: Sequence[str] = (),
    keep_history: bool = False,
    allow: Items | None = None,
    explain: bool = False,
    strict: bool = False,
) -> Answers:
    """Recommend for histories that are given as people know them.

    A title that occurs twice is one thing to the reader: with an item, all items of its title are excluded.

    Args:
        recommender: What recommends.
        histories: Titles or raw ids, oldest first.
        k: Titles for each history.
        by: What ``histories`` and ``exclude`` are made of.
        exclude: Titles or ids that nobody gets.
        keep_history: Whether titles of a history may be returned.
        allow: Item indices of the only items that may be returned; None for all.
        explain: Also say which tokens decided.
        strict: Refuse a history with an unknown title instead of leaving that out and reporting it.

    Raises:
        UserError: An unknown title or id in ``exclude``, with ``strict`` also in a history; ``k < 1``; an explanation
            that this recommender cannot give.
    """
    catalog, item = recommender.catalog, items_by_name(recommender, by)
    if by == "title":
        exclude = list(map(catalog.spelled, exclude))
    if strict:
        spelled = catalog.spelled if by == "title" else str
        _check(catalog, by, item, [spelled(name) for names in histories for name in names])
    _check(catalog, by, item, exclude)
    unwanted = recommender.groups.members([item[name] for name in exclude])
    asked = [question(recommender, names, by, item, unwanted, keep_history, allow) for names in histories]
    return answered(recommender, asked, k, [explain] * len(asked))


def question(
    recommender: SavedRecommender,
    names: Sequence[str],
    by: Literal["title", "id"],
    item: Mapping[str, int],
    unwanted: Int64,
    keep_history: bool = False,
    allow: Items | None = None,
) -> Question:
    """What one user asks; arguments as those of `answer` and `Question`, ``item`` is `items_by_name`."""
    if by == "title":
        names = list(map(recommender.catalog.spelled, names))
    known = tuple(item[name] for name in names if name in item)
    unknown = tuple(name for name in names if name not in item)
    return Question(known, unknown, unwanted, allow, keep_history)


def answered(
    recommender: SavedRecommender, asked: Sequence[Question], k: int, explain: Sequence[bool]
) -> Answers:
    """The answers to some questions, of which some are explained."""
    known = [one.known for one in asked]
    only = [one.only for one in asked] if any(one.only is not None for one in asked) else None
    k = min(k, recommender.groups.n_groups)
    # A list that holds None is for searches that are asked by users with and without `only`.
    ranking = recommender.recommend(known, k, [one.without(recommender) for one in asked], only)  # type: ignore[arg-type]
    answers = [told(recommender, one, ranking, b, explain[b]) for b, one in enumerate(asked)]
    return Answers(tuple(answers), ranking.counters)


def told(recommender: SavedRecommender, asked: Question, ranking: Ranking, b: int, explain: bool) -> Answer:
    """One row of a ranking as an answer."""
    catalog, best = recommender.catalog, [int(i) for i in ranking.items[b] if i >= 0]
    why = recommender.explain(asked.known, best) if explain else [None] * len(best)
    titles = tuple(
        Recommended(i, catalog.item_id[i], catalog.title[i], float(s), tokens)
        for i, s, tokens in zip(best, ranking.scores[b], why, strict=False)
    )
    tied = 0 if ranking.tied is None else int(ranking.tied[b])
    return Answer(titles, bool(ranking.certified[b]), asked.unknown, tied)


def items_by_name(recommender: SavedRecommender, by: str) -> Mapping[str, int]:
    """What a history may hold by raw id, or by title: of several with one title the first, of former ones the last."""
    catalog, former = recommender.catalog, recommender.former
    items = catalog.item_of_id if by == "id" else catalog.item_of_title
    if former is None or not former.n_items:
        return items
    names = former.item_id if by == "id" else former.title
    told = {name: catalog.n_items + n for n, name in enumerate(names)}
    return ChainMap(items, told)  # type: ignore[arg-type]  # it is only read


def _check(catalog: Catalog, by: str, item: Mapping[str, int], names: Sequence[str]) -> None:
    """UserError for the first name that is not among the known ones."""
    for name in names:
        if name not in item and by == "title":
            catalog.index(name)  # knows the nearest titles
        if name not in item:
            raise UserError(
                f"wanted an item id of the catalogue ({catalog.n_items} items), got {name!r}; see item_id in "
                "catalog.parquet"
            )
