r"""D3's assistant: another recommender of the same catalogue that has a say in what is recommended.

.. math:: S(i) = a \log p(i) + (1 - a) \log r(i)

where p is the model's probability of title i and r the assistant's: the softmax of its scores over all titles. Along
the trie the same is said step by step, with the assistant's mass under the child over that under the node. Where a
model writes freely (grounding), the assistant is BIGRec's collaborator: its log-probabilities, scaled to [0, 1] for
each user, take the place of popularity, and gamma that of the weight.

Dimension key: B histories, I items, G groups of equal titles.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from triewise.arrays import Int64, Ragged, ranges
from triewise.errors import UserError
from triewise.ranking import Groups, ItemLists, ItemScorer, Ranking, Recommender

if TYPE_CHECKING:
    from triewise.data import Catalog

Doubles = NDArray[np.float64]


@runtime_checkable
class Probabilistic(Recommender, Protocol):
    """A recommender that knows the probability of every title."""

    def log_probabilities(self, histories: ItemLists) -> Doubles:
        """(B, I) nats; of items with one title one has the probability of the title, the others have -inf."""


@dataclass(frozen=True, kw_only=True)
class Assisted:
    """What a recommender has that another one may assist.

    Attributes:
        assistant: Any recommender of the same catalogue that scores every item; None for no assistant.
        assistant_weight: Weight a of the model itself, in [0, 1]; 1 leaves the assistant unasked. Grounding has gamma.
        folder: Where this recommender was loaded from, so that one which it assists can name it.
    """

    assistant: Recommender | None = field(default=None, repr=False)
    assistant_weight: float = 1.0
    folder: Path | None = field(default=None, repr=False, compare=False)

    @property
    def asked(self) -> Recommender | None:
        """The assistant, where it has any weight."""
        return self.assistant if self.assistant_weight < 1 else None

    @property
    def assisted(self) -> dict[str, Any]:
        """The assistant's folder and the weight, as JSON values; nothing without an assistant."""
        if self.assistant is None:
            return {}
        place = getattr(self.assistant, "folder", None) or type(self.assistant).__name__
        return {"assistant": str(place), "assistant_weight": self.assistant_weight}

    @property
    def saved_assistant(self) -> dict[str, Any]:
        """`assisted` for a manifest, which needs a folder to name.

        Raises:
            UserError: The assistant is in memory alone.
        """
        if self.assistant is not None and getattr(self.assistant, "folder", None) is None:
            raise UserError(
                "wanted an assistant that was loaded from a folder, got one in memory; save it, and give the one that "
                "is loaded from there"
            )
        return self.assisted

    def check_assistant(self, catalog: Catalog) -> None:
        """UserError for a weight outside [0, 1], or an assistant of another catalogue."""
        if not 0 <= self.assistant_weight <= 1:
            raise UserError(f"wanted assistant_weight in [0, 1], got {self.assistant_weight}")
        if self.assistant is None:
            if self.assistant_weight < 1:
                raise UserError("assistant_weight < 1 needs an assistant: give one, or leave the weight at 1")
            return
        theirs = getattr(self.assistant, "catalog", None)
        alike = theirs is None or (theirs.item_id, theirs.title) == (catalog.item_id, catalog.title)
        if not alike or self.assistant.groups.n_items != catalog.n_items:
            raise UserError(
                f"wanted an assistant of the same catalogue of {catalog.n_items} items, got one of "
                f"{self.assistant.groups.n_items} others; train both on one prepared folder"
            )


@dataclass(frozen=True)
class Collaborator:
    """An assistant as what `GroundedRecommender` takes: finite scores of every item."""

    assistant: Recommender

    @property
    def groups(self) -> Groups:
        """The units of ranking."""
        return self.assistant.groups

    def recommend(self, *args: Any, **how: Any) -> Ranking:
        """As the assistant."""
        return self.assistant.recommend(*args, **how)

    def item_scores(self, histories: ItemLists) -> NDArray[np.float32]:
        """(B, I) log-probabilities of the items' titles, nats."""
        titles = title_log_probabilities(self.assistant, histories, self.groups)
        return titles[:, self.groups.of_item].astype(np.float32)


@dataclass(frozen=True)
class TitleTeacher:
    """A recommender of the same catalogue that says, for every target of a training window, how likely each title is.

    Attributes:
        recommender: Scores every item. One that reads every position at once has ``log_probabilities_along``.
    """

    recommender: Recommender

    def __call__(self, rows: Ragged, n_context: Int64) -> Doubles:
        """Log-probabilities (S, I) of titles after each beginning of rows that a target follows.

        Args:
            rows: Items (B), oldest first.
            n_context: (B,); what follows so many leading items of a row are targets.
        """
        along = getattr(self.recommender, "log_probabilities_along", None)
        if along is not None:
            found: Doubles = along(rows, n_context)
            return found
        return log_probabilities(self.recommender, list(beginnings(rows, n_context)))


def beginnings(rows: Ragged, n_context: Int64) -> Ragged:
    """What stands before each target of rows (S): the first ``n_context`` (B,) items of a row, one more, and so on."""
    each = ranges(n_context, rows.lengths - n_context)
    return Ragged.windows(rows.values, rows.offsets[:-1][each.row], each.at)


def log_probabilities(recommender: Recommender, histories: ItemLists) -> Doubles:
    """What a recommender says of every title as (B, I) log-probabilities; see `Probabilistic`.

    Scores of items (`ItemScorer`) go through a softmax over all titles, in float64; a group of equal titles counts
    once, as its best member.

    Raises:
        UserError: It scores no items, or an item outside the catalogue.
    """
    if isinstance(recommender, Probabilistic):
        return recommender.log_probabilities(histories)
    if not isinstance(recommender, ItemScorer):
        raise UserError(
            f"wanted an assistant that scores every item, got a {type(recommender).__name__}; give it item_scores"
        )
    groups = recommender.groups
    return once_a_title(
        groups, groups.scores(np.asarray(recommender.item_scores(histories), dtype=np.float64))
    )


def title_log_probabilities(recommender: Recommender, histories: ItemLists, groups: Groups) -> Doubles:
    """(B, G) what a recommender says of the groups of another one, nats."""
    titles: Doubles = groups.scores(log_probabilities(recommender, histories)).astype(np.float64)
    return titles


def once_a_title(groups: Groups, scores: NDArray[np.floating]) -> Doubles:
    """(B, I) log-softmax of the scores of groups (B, G), at the item that represents each; -inf at the others."""
    shifted = scores.astype(np.float64) - scores.max(1, keepdims=True, initial=-np.inf)
    found = np.full((len(scores), groups.n_items), -np.inf)
    found[:, groups.permitted()] = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return found


def by_group(ranking: Ranking, groups: Groups) -> Doubles:
    """(B, G) scores of groups from a ranking of all of them."""
    scores = np.empty(ranking.scores.shape)
    np.put_along_axis(scores, groups.of_item[ranking.items], ranking.scores, axis=1)
    return scores
