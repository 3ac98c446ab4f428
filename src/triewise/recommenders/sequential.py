"""A sequential model as a recommender: every item gets a score, a group of equal titles that of its best member.

Shape key: B histories, I items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from safetensors.torch import save_file

from triewise.arrays import Int64, Ragged, padded
from triewise.errors import UserError, reading
from triewise.files import atomic_folder, read_json, write_json
from triewise.models import SequentialModel, load_trained, resolve_device, sequential_model
from triewise.ranking import (
    Groups,
    ItemLists,
    Items,
    Ranking,
    check_histories,
    check_lists,
    rank_items,
)
from triewise.recommenders.assistants import (
    Assisted,
    Doubles,
    beginnings,
    once_a_title,
    title_log_probabilities,
)
from triewise.recommenders.changes import CatalogueChange, Changeable, changed_assistant
from triewise.recommenders.saved import Manifest, Saved, card_facts, hash_of, push, saving

if TYPE_CHECKING:
    from triewise.data import Catalog, Dataset
    from triewise.reports import Recommendation
    from triewise.settings import EvaluationSettings


class _Manifest(Manifest):
    batch_users: int = Field(ge=1)
    origin: dict[str, Any]


@dataclass(frozen=True)
class SequentialRecommender(Assisted, Changeable):
    """Ranks items by the scores of a sequential model; a group of equal titles counts as its best member.

    Scores are on no scale of their own; with an assistant they are log-probabilities of titles, of the model and the
    assistant together. The attributes of `Assisted` and `Changeable` are keywords here.

    Attributes:
        model: Encoder and head.
        catalog: The items.
        counts: (I,) training targets of each item; decide which member represents a group.
        batch_users: Histories of one forward.
        origin: What the model is, for ``run.json`` and the card.
        card: Text of its model card; empty where there is none.
        rows: (I + R,) which item of the model each item and each former one is; None: the model has these I items.
    """

    model: SequentialModel
    catalog: Catalog
    counts: NDArray[np.int64]
    batch_users: int = 256
    origin: dict[str, Any] = field(default_factory=dict)
    card: str = field(default="", repr=False)
    rows: Int64 | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Refuse an assistant that does not belong here."""
        self.check_assistant(self.catalog)

    @cached_property
    def groups(self) -> Groups:
        """Groups of items with the same title."""
        return Groups.from_labels(self.catalog.group, self.counts)

    def recommend(
        self,
        histories: ItemLists,
        k: int | None = 10,
        exclude: ItemLists | str | None = None,
        allow: ItemLists | None = None,
    ) -> Ranking:
        """The best ``k`` groups for each history; see `Recommender.recommend`."""
        return rank_items(self, histories, k, self.returned(exclude, histories, self.catalog.n_items), allow)

    @property
    def hashes(self) -> dict[str, str]:
        """Hex SHA-256 of what training and ranking must have in common."""
        return {"counts": hash_of(self.counts)}

    @property
    def used(self) -> dict[str, Any]:
        """The settings its rankings depend on, for ``metrics.json``."""
        return {"search": "catalogue", "support": "items"} | self.assisted

    @property
    def dropped(self) -> None:
        """It has no prompts."""

    def depth(self, k: int) -> None:
        """Every item is scored anyway."""

    def with_settings(self, **changes: Any) -> SequentialRecommender:
        """The same with another assistant; UserError for settings of a search, which it has not."""
        changes = {name: value for name, value in changes.items() if (name, value) != ("search", "catalogue")}
        for name, value in changes.items():
            if name not in ("assistant", "assistant_weight"):
                raise UserError(
                    f"a sequential model scores every item: wanted no {name}, got {value!r}; leave it out"
                )
        return replace(self, **changes)

    def configured(self, settings: EvaluationSettings) -> SequentialRecommender:
        """The same; of ``[evaluation]`` only ``search`` is looked at, as in `with_settings`."""
        return self.with_settings(search=settings.search)

    def explain(
        self, history: Items, items: Sequence[int], target: int | None = None
    ) -> tuple[Recommendation, ...]:
        """UserError: there is nothing to explain."""
        raise UserError(
            "wanted the tokens that decided, got a sequential model, which scores items and writes no titles; leave "
            "explain out"
        )

    def title_figures(self, dataset: Dataset) -> dict[str, Any]:
        """Nothing: it reads no titles."""
        return {}

    def item_scores(self, histories: ItemLists) -> NDArray[np.float32]:
        """Scores of all items, float32 (B, I), higher is better; with an assistant log-probabilities of their titles.

        Arguments and errors as `own_scores`.
        """
        if self.asked is None:
            return self.own_scores(histories)
        own, theirs = self.parts(histories)
        titles = self.assistant_weight * own + (1 - self.assistant_weight) * theirs
        return titles[:, self.groups.of_item].astype(np.float32)

    def log_probabilities(self, histories: ItemLists) -> Doubles:
        """(B, I) log-probabilities of titles under this model alone; see `Probabilistic`."""
        return once_a_title(self.groups, self.groups.scores(self.own_scores(histories).astype(np.float64)))

    def log_probabilities_along(self, rows: Ragged, n_context: Int64) -> Doubles:
        """`log_probabilities` of what follows each beginning of rows, (S, I); see `assistants.TitleTeacher`.

        A model whose states are the same along a longer row runs each row once.
        """
        before = beginnings(rows, n_context)
        if not (self.model.reads_along and len(before)) or before.lengths.max() > self.model.max_length:
            return self.log_probabilities(list(before))
        check_histories(list(before), self.groups, self.n_former)
        if self.rows is not None:
            rows = replace(rows, values=self.rows[rows.values].astype(np.int32))
        place = before.lengths - 1  # the state that has read a beginning; none has read nothing
        row = np.repeat(np.arange(len(rows)), rows.lengths - n_context)
        ids = torch.from_numpy(padded(rows)[:, : max(place.max() + 1, 1)].astype(np.int64)).to(
            self.model.bias.device
        )
        was_training = self.model.training
        self.model.eval()
        with torch.inference_mode():
            states = self.model(ids)[torch.from_numpy(row), torch.from_numpy(place.clip(0))]
            scores = self.model.scores(states * torch.from_numpy(place >= 0)[:, None].to(states.device))
        self.model.train(was_training)
        found = scores.cpu().numpy().astype(np.float64)
        return once_a_title(self.groups, self.groups.scores(found[:, self._columns]))

    def parts(self, histories: ItemLists) -> tuple[Doubles, Doubles]:
        """What the model and what its assistant say; see `SavedRecommender.parts`."""
        assert self.assistant is not None
        theirs = title_log_probabilities(self.assistant, histories, self.groups)
        return self.groups.scores(self.log_probabilities(histories)).astype(np.float64), theirs

    def score(self, histories: ItemLists, candidates: ItemLists) -> NDArray[np.float32]:
        """(B, C) scores of given items after each history, by the model alone; shorter lists end in -inf.

        They are those that `recommend` ranks by: an item has the score of its title.

        Raises:
            UserError: Not one list per user, unknown items.
        """
        check_lists(len(histories), candidates=candidates)
        check_histories(candidates, self.groups)
        scores = self.groups.scores(self.own_scores(histories))
        found = np.full((len(scores), max(map(len, candidates), default=0)), -np.inf, dtype=np.float32)
        for row, of_row, items in zip(found, scores, candidates, strict=True):
            row[: len(items)] = of_row[self.groups.of_item[np.asarray(items, dtype=np.int64)]]
        return found

    def item_vectors(self) -> NDArray[np.float32]:
        """(I, D) embeddings of the items."""
        vectors: NDArray[np.float32] = self.model.items.weight[1:-1].detach().float().cpu().numpy()
        return vectors[self._columns]

    def own_scores(self, histories: ItemLists) -> NDArray[np.float32]:
        """What the model alone says of all items, float32 (B, I), on no scale of its own.

        Args:
            histories: Item indices, oldest first; the last ``max_length`` of each are read. May be empty.

        Raises:
            UserError: An item outside the catalogue.
        """
        check_histories(histories, self.groups, self.n_former)
        scores = np.zeros((len(histories), self.catalog.n_items), dtype=np.float32)
        was_training = self.model.training
        self.model.eval()
        with torch.inference_mode():
            for start in range(0, len(histories), self.batch_users):
                part = [self._read(h) for h in histories[start : start + self.batch_users]]
                found = self.model.scores(self.model.states_after(part))
                scores[start : start + len(part)] = found.cpu().numpy()[:, self._columns]
        self.model.train(was_training)
        return scores

    @property
    def _columns(self) -> slice | Int64:
        """Which items of the model those of the catalogue are."""
        return slice(None) if self.rows is None else self.rows[: self.catalog.n_items]

    def _read(self, history: Items) -> list[int]:
        """A history in the numbers of the model."""
        items = np.asarray(history, dtype=np.int64)
        found: list[int] = (items if self.rows is None else self.rows[items]).tolist()
        return found

    def changed(self, change: CatalogueChange) -> SequentialRecommender:
        """The same with fewer items, or with removed ones again; this one stays as it is.

        The model stays whole and goes on reading former items in histories.

        Raises:
            UserError: A new item, or an assistant that cannot follow.
        """
        new = np.flatnonzero(change.source < 0)
        if len(new):
            title = (*change.catalog.title, *change.former.title)[new[0]]
            raise UserError(
                f"a sequential model knows the items it was trained with: wanted no new one, got {title!r}; train with "
                "it, or serve a model that writes titles"
            )
        return replace(
            self,
            catalog=change.catalog,
            counts=change.counts,
            former=change.former,
            rows=change.source if self.rows is None else self.rows[change.source],
            assistant=changed_assistant(self.assistant, change),
            folder=None,
        )

    def save_pretrained(self, folder: Path | str) -> None:
        """Write everything :meth:`from_pretrained` needs into ``folder``; each file is whole or absent.

        Raises:
            UserError: Its catalogue was changed.
        """
        if self.rows is not None:
            raise UserError(
                "wanted a sequential recommender with the catalogue of its model, got one whose catalogue was changed; "
                "save the one it was made from"
            )
        manifest = {"kind": "sequential", "batch_users": self.batch_users, "origin": self.origin}
        manifest |= self.saved_assistant
        with saving(self, folder, manifest) as place, atomic_folder(place / "model") as model:
            save_file(self.model.state_dict(), model / "model.safetensors")
            write_json(model / "config.json", self.model.config)

    def push_to_hub(self, repo_id: str, **how: Any) -> str:
        """As `GenerativeRecommender.push_to_hub`."""
        origin = {"name": self.model.config["kind"], "kind": "sequential"} | self.origin
        return push(self, card_facts(self, repo_id.rpartition("/")[2], origin=origin), repo_id, **how)

    @classmethod
    def from_pretrained(
        cls, folder_or_hub_id: Path | str, *, revision: str | None = None, device: str = "auto"
    ) -> SequentialRecommender:
        """Load what :meth:`save_pretrained` wrote, from a folder or the Hugging Face hub.

        Raises:
            UserError: Something is missing, or it is no sequential recommender.
        """
        saved = Saved.open(folder_or_hub_id, revision, "sequential", _Manifest)
        place = saved.folder / "model"
        config = read_json(place / "config.json")
        with reading(place / "config.json"):
            if config["n_items"] != saved.catalog.n_items:
                raise ValueError(f"{config['n_items']} items, {saved.catalog.n_items} in the catalogue")
            model = sequential_model(config)
        load_trained(model, place / "model.safetensors")
        model.requires_grad_(False)
        return cls(
            model.to(resolve_device(device)).eval(),
            saved.catalog,
            saved.counts,
            saved.manifest["batch_users"],
            saved.manifest["origin"],
            saved.card,
            folder=saved.folder,
        )
