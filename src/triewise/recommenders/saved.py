"""A saved recommender as a folder that stands on its own, and where such folders come from.

In it are ``model/``, ``catalog.parquet``, ``recommender.json`` (kind, settings, the hashes that tie the parts
together, and that of each file), ``trie.npz`` where the model writes titles, and a model card in ``README.md`` once it
was evaluated.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from triewise.data import Catalog, Dataset
from triewise.errors import UserError, reading
from triewise.files import (
    Hashed,
    atomic_files,
    check_files,
    file_hashes,
    read_json,
    scan,
    write_json,
    write_text,
)
from triewise.models import download, upload
from triewise.ranking import ItemLists, Items, Recommender
from triewise.reports import CardFacts, Recommendation, addressed, model_card

if TYPE_CHECKING:
    from triewise.arrays import Float32, Int64
    from triewise.recommenders.changes import CatalogueChange
    from triewise.settings import EvaluationSettings
    from triewise.tokens import Dropped

FORMAT = 1
MANIFEST = "recommender.json"  # written last: where it is, the rest is whole
CATALOG = "catalog.parquet"
TRIE = "trie.npz"
IDENTIFIER = "identifier.json"  # codes, where the model writes some
CARD = "README.md"
PARTS = {"generative": (CATALOG, TRIE, "model"), "sequential": (CATALOG, "model")}


class SavedRecommender(Recommender, Protocol):
    """A recommender that a run trains, a folder holds, and `triewise.load` gives back; it answers for itself."""

    @property
    def catalog(self) -> Catalog:
        """The items."""

    @property
    def counts(self) -> Int64:
        """(I,) training targets of each item."""

    @property
    def former(self) -> Catalog | None:
        """Items that were removed, which histories may hold; see `CatalogueChange`."""

    @property
    def card(self) -> str:
        """Text of its model card; empty where there is none."""

    @property
    def hashes(self) -> dict[str, str]:
        """Hex SHA-256 of what training and ranking must have in common."""

    @property
    def origin(self) -> dict[str, Any]:
        """Where its model came from, for the card: without paths, and as it was before an adapter was merged."""

    @property
    def used(self) -> dict[str, Any]:
        """The settings its rankings depend on, for ``metrics.json``."""

    @property
    def dropped(self) -> Dropped | None:
        """What its prompts had no room for so far; None where it has no prompts."""

    def depth(self, k: int) -> int | None:
        """How many titles an evaluation of the best ``k`` asks for; None: all, where all are scored anyway."""

    def with_settings(self, **changes: Any) -> Self:
        """The same model with other settings of its ranking."""

    def configured(self, settings: EvaluationSettings) -> Self:
        """The same model, ranking as ``[evaluation]`` of a recipe says."""

    def log_probabilities(self, histories: ItemLists) -> NDArray[np.float64]:
        """(B, I) log-probabilities of titles under the model alone; see `assistants.Probabilistic`."""

    def parts(self, histories: ItemLists) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """What the model and what its assistant say of every group of equal titles, both (B, G).

        With weight a of the model the score of a title is a * first + (1 - a) * second, whatever the search.
        """

    def item_vectors(self) -> Float32:
        """(I, Z) what the model knows of each item: of titles it reads, or of items it has numbers for."""

    def explain(
        self, history: Items, items: Sequence[int], target: int | None = None
    ) -> tuple[Recommendation, ...]:
        """Which tokens decided each of the ``items``, recommended after a history; see `triewise.reports.explain`."""

    def title_figures(self, dataset: Dataset) -> dict[str, Any]:
        """What a `Report` says of the titles as this model reads them; empty where it reads none."""

    def score(self, histories: ItemLists, candidates: ItemLists) -> Float32:
        """(B, C) scores of given items by the model alone; shorter lists end in -inf."""

    def changed(self, change: CatalogueChange) -> Self:
        """The same with another catalogue; UserError where it can have none."""

    def save_pretrained(self, folder: Path | str) -> None:
        """Write what `triewise.load` needs."""


class Manifest(Hashed):
    """What is read of ``recommender.json``."""

    format: int | None = None
    kind: str = "generative"
    assistant: str = ""
    assistant_weight: float = Field(1.0, ge=0, le=1)


@dataclass(frozen=True)
class Saved:
    """What every saved recommender has in its folder beside its model.

    Attributes:
        folder: Where it lies, on this machine.
        manifest: Content of ``recommender.json``.
        catalog: The items.
        counts: (I,) training targets of each item.
        card: Text of its model card; empty where there is none.
    """

    folder: Path
    manifest: dict[str, Any]
    catalog: Catalog
    counts: Int64
    card: str

    @classmethod
    def open(cls, name: Path | str, revision: str | None, kind: str, shape: type[Manifest]) -> Saved:
        """Read a folder, or the downloaded one of a hub id, whose ``recommender.json`` has a shape.

        Raises:
            UserError: No such folder, another kind or format, or a file is missing.
        """
        import polars as pl

        folder = local_folder(name, revision)
        manifest = read_json(folder / MANIFEST, Manifest)
        got = manifest.get("format"), manifest.get("kind", "generative")
        if got != (FORMAT, kind):
            raise UserError(
                f"wanted a {kind} recommender of format {FORMAT} in {folder}/{MANIFEST}, got kind {got[1]} of format "
                f"{got[0]}; load it with triewise.load, or save it again"
            )
        manifest = read_json(folder / MANIFEST, shape)
        for part in PARTS[kind]:
            if not (folder / part).exists():
                raise UserError(f"wanted {part} in {folder}, which is missing; restore it or train again")
        check_saved(folder)
        with reading(folder / CATALOG):
            frame = scan(folder / CATALOG).collect()
            catalog, counts = Catalog.from_frame(frame), frame["train_targets"].cast(pl.Int64).to_numpy()
            if len(counts) != frame["train_targets"].is_between(0, counts.sum()).sum():
                raise ValueError("counts are missing or below 0")
        with reading(folder / CARD):
            card = (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).is_file() else ""
        return cls(folder, manifest, catalog, counts, card)

    def check(self, found: Mapping[str, str]) -> None:
        """Refuse parts that are not those the recommender was saved with, by their hashes."""
        for part, wanted in self.manifest["hashes"].items():
            if found.get(part) != wanted:
                raise UserError(
                    f"the {part} of {self.folder} is not the one this model was trained with (hash "
                    f"{found.get(part, 'none')[:12]}, wanted {wanted[:12]}); restore its tokenizer, {CATALOG} and "
                    f"{TRIE}, or train again"
                )


@contextlib.contextmanager
def saving(recommender: SavedRecommender, folder: Path | str, manifest: Mapping[str, Any]) -> Iterator[Path]:
    """Write a folder, made where it is absent; the model is written inside the block.

    An earlier recommender there stays till all of this one is written.

    Args:
        recommender: What is saved.
        folder: Where to.
        manifest: Content of ``recommender.json`` beside the format and the hash of each file but the card.
    """
    with atomic_files(Path(folder), last=MANIFEST) as place:
        yield place
        frame = recommender.catalog.to_frame(recommender.counts.astype(np.int32))
        frame.write_parquet(place / CATALOG)
        write_json(
            place / MANIFEST, {"format": FORMAT, **manifest, "sha256": file_hashes(place)}, sealed=True
        )
        if recommender.card:
            write_text(place / CARD, recommender.card)


def check_saved(folder: Path) -> None:
    """UserError where a file of a recommender is not the one that was saved."""
    check_files(folder, read_json(folder / MANIFEST, Hashed).get("sha256"), "restore it, or train again")


def push(
    shared: SavedRecommender,
    facts: CardFacts,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    license: str | None = None,
    message: str = "Upload a recommender",
) -> str:
    """Upload a recommender that names no path of this machine; arguments as `GenerativeRecommender.push_to_hub`.

    Raises:
        UserError: The hub cannot be reached, or refuses; or an assistant, whose folder is on this machine.
    """
    if getattr(shared, "assistant", None) is not None:
        raise UserError(
            "wanted a recommender without assistant to upload, got one whose assistant stays on this machine; "
            "upload with_settings(assistant=None, assistant_weight=1.0)"
        )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "recommender")
        shared.save_pretrained(folder)
        write_text(folder / CARD, addressed(shared.card or model_card(facts), repo_id, license))
        return upload(folder, repo_id, private=private, token=token, message=message)


def local_folder(name: Path | str, revision: str | None = None) -> Path:
    """The folder itself, or the downloaded one of a hub id; a name that looks like a path is no hub id.

    Raises:
        UserError: No such folder and no hub id, or it cannot be downloaded.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    is_id = isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)
    if not is_id or Path(name).parent.exists():
        raise UserError(
            f"wanted a run folder with a trained recommender, but {name} is no folder; train one first"
        )
    files = sorted({MANIFEST, CARD, IDENTIFIER, *PARTS["generative"]} - {"model"})
    return download(str(name), revision, [*files, "model/*"])


def hash_of(counts: Int64) -> str:
    """Hex SHA-256 of the training targets (I,)."""
    return hashlib.sha256(counts.astype("<i8").tobytes()).hexdigest()


def card_facts(recommender: SavedRecommender, name: str, **more: Any) -> CardFacts:
    """What a card says of a recommender; ``more`` is what only its training and evaluation know."""
    catalog = recommender.catalog
    example = catalog.title[int(np.argmax(recommender.counts))]
    origin, settings = more.pop("origin", recommender.origin), more.pop("settings", recommender.used)
    return CardFacts(name, catalog.n_items, example, origin, settings, **more)
