"""One version of the catalogue as requests see it, who finish on the one they began with.

Names become items here, settings become searches, and what is found becomes what is said.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from triewise.errors import UserError
from triewise.recommenders import GenerativeRecommender
from triewise.serving.answers import Answer, Question, answered, items_by_name, question, told
from triewise.serving.completion import Completion, completion_of
from triewise.serving.contract import History, SearchName

if TYPE_CHECKING:
    from triewise.arrays import Int64
    from triewise.decoding import Together
    from triewise.ranking import Items
    from triewise.recommenders import SavedRecommender
    from triewise.serving.versions import Version

BEAMS = 10  # of what exact search is compared with


class View:
    """A version, made ready for requests; its maps are built here, not in the first request.

    Args:
        version: Number and recommender.
        sets: Named sets of raw ids, for ``exclude`` and ``allow``.
    """

    def __init__(self, version: Version, sets: Mapping[str, Sequence[str]]) -> None:
        self.number, self.recommender, self.catalog = (
            version.number,
            version.recommender,
            version.recommender.catalog,
        )
        self.item = self.catalog.item_of_id
        self._by_id, self._by_title = (items_by_name(self.recommender, by) for by in ("id", "title"))
        self.sets = {name: np.array(self.items(ids)[0], dtype=np.int64) for name, ids in sets.items()}
        self.nothing = self.recommender.groups.members(())
        self._searching: dict[tuple[str | None, bool], SavedRecommender] = {}
        self._lock = threading.Lock()
        _ = getattr(self.recommender, "engine", None)  # copies with other settings share it
        self.question(History(titles=[""], ids=None))

    @property
    def generative(self) -> bool:
        """Whether a language model writes titles, in one of several ways of searching."""
        return isinstance(self.recommender, GenerativeRecommender)

    @property
    def searches(self) -> tuple[str, ...]:
        """What ``search`` may be."""
        return get_args(SearchName) if self.generative else ("catalogue",)

    @cached_property
    def completion(self) -> Completion:
        """The titles, for who types them."""
        return completion_of(self.catalog)

    def items(self, ids: Sequence[str]) -> tuple[list[int], list[str]]:
        """Items of raw ids, and the ids that are unknown."""
        return [self.item[raw] for raw in ids if raw in self.item], [
            raw for raw in ids if raw not in self.item
        ]

    def named(self, given: Sequence[str] | str) -> tuple[Items, list[str]]:
        """Items of raw ids or of a named set, and the ids that are unknown.

        Raises:
            UserError: No such set.
        """
        if not isinstance(given, str):
            return self.items(given)
        if given not in self.sets:
            there = ", ".join(sorted(self.sets)) or "none"
            raise UserError(f"wanted the name of a set ({there}) or a list of ids, got {given!r}")
        return self.sets[given], []

    def question(
        self, history: History, unwanted: Int64 | None = None, only: Items | None = None, keep: bool = False
    ) -> Question:
        """One history of a request; arguments as those of `Question`."""
        unwanted = self.nothing if unwanted is None else unwanted
        if history.ids is not None:
            return question(self.recommender, history.ids, "id", self._by_id, unwanted, keep, only)
        names = history.titles or ()
        return question(self.recommender, names, "title", self._by_title, unwanted, keep, only)

    def searching(self, search: str | None, beams: bool = False) -> SavedRecommender:
        """The recommender with a search; ``beams``: ten beams instead, whatever it has.

        Raises:
            UserError: It does not search so.
        """
        with self._lock:
            if (search, beams) not in self._searching:
                changes: dict[str, Any] = {} if search is None else {"search": search}
                changes = {"search": "beam", "beams": BEAMS} if beams else changes
                other = self.recommender.with_settings(**changes) if changes else self.recommender
                self._searching[search, beams] = other
            return self._searching[search, beams]


Row = tuple[Question, bool, bool]  # and whether it is explained, and compared with beams


@dataclass(frozen=True)
class Recommending:
    """What a batch of recommendations has in common."""

    view: View
    search: str | None
    k: int

    @property
    def joins(self) -> bool:
        """Whether users join a search that runs."""
        recommender = self.view.searching(self.search)
        return isinstance(recommender, GenerativeRecommender) and recommender.joinable

    def open(self) -> Searching | None:
        """A search that users join, where they do."""
        recommender = self.view.searching(self.search)
        if not isinstance(recommender, GenerativeRecommender):
            return None
        search = recommender.together(self.k)
        return None if search is None else Searching(self, recommender, search)

    def run(self, rows: Sequence[Row]) -> tuple[list[dict[str, Any]], dict[str, int]]:
        """Results of the contract."""
        asked = [row[0] for row in rows]
        found = answered(self.view.searching(self.search), asked, self.k, [row[1] for row in rows])
        return self.told(rows, found.of_each), found.counters

    def told(self, rows: Sequence[Row], answers: Sequence[Answer]) -> list[dict[str, Any]]:
        """Answers as the contract has them, with what ten beams find where that is asked for."""
        results = [_result(answer) for answer in answers]
        compared = [n for n, row in enumerate(rows) if row[2]]
        if compared:
            recommender, k = self.view.searching(None, beams=True), min(self.k, BEAMS)
            beams = answered(recommender, [rows[n][0] for n in compared], k, [False] * len(compared))
            for n, answer in zip(compared, beams.of_each, strict=True):
                results[n]["beam"] = [one.item_id for one in answer.recommendations]
        return results


class Searching:
    """Users of one kind of recommendation who are decoded together; see `batching.Session`."""

    def __init__(self, work: Recommending, recommender: GenerativeRecommender, search: Together) -> None:
        self.work, self.recommender, self.search = work, recommender, search
        self.rows: dict[int, Row] = {}

    @property
    def inside(self) -> int:
        """Users who are in now."""
        return len(self.rows)

    def join(self, row: Row) -> int | None:
        """Let a user in."""
        asked = row[0]
        number = self.recommender.join(self.search, asked.known, asked.without(self.recommender), asked.only)
        if number is not None:
            self.rows[number] = row
        return number

    def leave(self, number: int) -> None:
        """Let a user go."""
        del self.rows[number]
        self.search.leave(number)

    def step(self) -> dict[int, Any]:
        """One round; results of the contract, or what went wrong with one."""
        found: dict[int, Any] = {}
        for number, ranking in self.search.step().items():
            row = self.rows.pop(number)
            try:
                answer = told(self.recommender, row[0], ranking, 0, row[1])
                [found[number]] = self.work.told([row], [answer])
            except Exception as error:
                found[number] = error
        return found

    def counts(self) -> dict[str, int]:
        """Work so far, and for how many."""
        return self.search.counters.as_dict() | {"users": self.search.joined}


def _result(answer: Answer) -> dict[str, Any]:
    told = answer.as_json()
    items = told.pop("recommendations")
    return {"items": [{"id": one.pop("item_id"), **one} for one in items], "unknown": [], **told}


@dataclass(frozen=True)
class Scoring:
    """What a batch of scores has in common."""

    view: View
    joins = False

    def open(self) -> None:
        """Batches are run whole."""

    def run(self, rows: Sequence[tuple[Question, list[int]]]) -> tuple[list[dict[str, Any]], dict[str, int]]:
        """Results of the contract."""
        scores = self.view.recommender.score([asked.known for asked, _ in rows], [items for _, items in rows])
        ids = self.view.catalog.item_id
        results = []
        for (asked, items), row in zip(rows, scores.tolist(), strict=True):
            of_items = zip(items, row, strict=False)
            found = [{"id": ids[i], "score": s if math.isfinite(s) else None} for i, s in of_items]
            results.append({"scores": found, "unknown": list(asked.unknown)})
        return results, {}
