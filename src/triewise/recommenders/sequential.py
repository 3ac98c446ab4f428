"""A sequential model as a recommender: every item gets a score, a group of equal titles that of its best member.

Shape key: B histories, I items.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from triewise.arrays import Ragged, padded
from triewise.data import Catalog
from triewise.errors import UserError
from triewise.files import atomic_folder, read_json, write_json, write_text
from triewise.models import SequentialModel, load_trained, resolve_device
from triewise.ranking import Groups, ItemLists, Ranking, check_histories, rank_items
from triewise.recommenders.saved import CARD, FORMAT, MANIFEST, local_folder, save_catalog


@dataclass(frozen=True)
class SequentialRecommender:
    """Ranks items by the scores of a sequential model; a group of equal titles counts as its best member.

    Attributes:
        model: Encoder and head.
        catalog: The items.
        counts: (I,) training targets of each item; decide which member represents a group.
        batch_users: Histories of one forward.
        origin: What the model is, for ``run.json`` and the card.
        card: Text of its model card; empty where there is none.
    """

    model: SequentialModel
    catalog: Catalog
    counts: NDArray[np.int64]
    batch_users: int = 256
    origin: dict[str, Any] = field(default_factory=dict)
    card: str = field(default="", repr=False)

    @cached_property
    def groups(self) -> Groups:
        """Groups of items with the same title."""
        return Groups.from_labels(self.catalog.group, self.counts)

    @property
    def hashes(self) -> dict[str, str]:
        """Hex SHA-256 of what training and ranking must have in common."""
        return {"counts": hashlib.sha256(self.counts.astype("<i8").tobytes()).hexdigest()}

    def with_settings(self, **changes: Any) -> SequentialRecommender:
        """The same: a sequential model scores every item and has no settings of its search.

        Raises:
            UserError: Any other setting than ``search = "catalogue"``.
        """
        for name, value in changes.items():
            if (name, value) != ("search", "catalogue"):
                raise UserError(
                    f"a sequential model scores every item: wanted no {name}, got {value!r}; leave it out"
                )
        return self

    def item_scores(self, histories: ItemLists) -> NDArray[np.float32]:
        """Scores of all items, float32 (B, I), higher is better, on no scale of their own.

        Args:
            histories: Item indices, oldest first; the last ``max_length`` of each are read. May be empty.

        Raises:
            UserError: An item outside the catalogue.
        """
        check_histories(histories, self.groups)
        scores = np.zeros((len(histories), self.catalog.n_items), dtype=np.float32)
        last = self.model.max_length
        was_training, device = self.model.training, self.model.bias.device
        self.model.eval()
        with torch.inference_mode():
            for start in range(0, len(histories), self.batch_users):
                part = [np.asarray(h)[-last:].tolist() for h in histories[start : start + self.batch_users]]
                ids = padded(Ragged.from_lists(part))
                if not ids.shape[1]:
                    ids = np.zeros((len(ids), 1), dtype=np.int32)
                found = self.model.last_scores(torch.from_numpy(ids.astype(np.int64)).to(device))
                scores[start : start + len(part)] = found.cpu().numpy()
        self.model.train(was_training)
        return scores

    def recommend(
        self,
        histories: ItemLists,
        k: int | None = 10,
        exclude: ItemLists | str | None = None,
        allow: ItemLists | None = None,
    ) -> Ranking:
        """The ``k`` best groups for each history, which may be empty; see `Recommender.recommend`.

        Raises:
            UserError: An item outside the catalogue, or ``k < 1``.
        """
        return rank_items(self, histories, k, exclude, allow)

    def save_pretrained(self, folder: Path | str) -> None:
        """Write everything :meth:`from_pretrained` needs into ``folder``; each file is whole or absent."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)
        with atomic_folder(folder / "model") as model:
            save_file(self.model.state_dict(), model / "model.safetensors")
            write_json(model / "config.json", self.model.config)
        save_catalog(self.catalog, self.counts, folder / "catalog.parquet")
        if self.card:
            write_text(folder / CARD, self.card)
        facts = {"format": FORMAT, "kind": "sequential", "batch_users": self.batch_users}
        write_json(folder / MANIFEST, facts | {"origin": self.origin})

    @classmethod
    def from_pretrained(
        cls, folder_or_hub_id: Path | str, *, revision: str | None = None, device: str = "auto"
    ) -> SequentialRecommender:
        """Load what :meth:`save_pretrained` wrote, from a folder or the Hugging Face hub.

        Raises:
            UserError: Something is missing, or it is no sequential recommender.
        """
        folder = local_folder(folder_or_hub_id, revision)
        facts = read_json(folder / MANIFEST)
        if (facts.get("format"), facts.get("kind")) != (FORMAT, "sequential"):
            got = f"kind {facts.get('kind')} of format {facts.get('format')}"
            raise UserError(
                f"wanted a sequential recommender of format {FORMAT} in {folder}/{MANIFEST}, got {got}; load it with "
                "triewise.load, or save it again"
            )
        for name in ("catalog.parquet", "model"):
            if not (folder / name).exists():
                raise UserError(f"wanted {name} in {folder}, which is missing; restore it or train again")
        model = SequentialModel.from_config(read_json(folder / "model" / "config.json"))
        load_trained(model, folder / "model" / "model.safetensors")
        model.requires_grad_(False)
        frame = pl.read_parquet(folder / "catalog.parquet")
        return cls(
            model.to(resolve_device(device)).eval(),
            Catalog.from_frame(frame),
            frame["train_targets"].to_numpy().astype(np.int64),
            facts["batch_users"],
            facts["origin"],
            (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).is_file() else "",
        )
