"""A language model as a recommender: backbone + prompts + trie + engine + search.

A saved recommender is a folder that stands on its own: ``model/`` (an ordinary Hugging Face checkpoint, or an
adapter that names its base), ``trie.npz``, ``catalog.parquet`` and ``recommender.json`` (prompt settings and the
hashes that tie the parts together), with a model card in ``README.md`` once it was evaluated.
"""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from triewise.data import Catalog
from triewise.decoding import (
    Scope,
    Support,
    TokenLists,
    TrieEngine,
    beam_search,
    exact_search,
    rank_catalogue,
    score,
)
from triewise.errors import UserError
from triewise.files import read_json, write_json, write_text
from triewise.models import Backbone, load_backbone, upload
from triewise.ranking import Groups, ItemLists, Ranking, check_histories, check_lists, resolve_filters
from triewise.recommenders.grounding import GroundedRecommender
from triewise.recommenders.saved import CARD, FILES, FORMAT, MANIFEST, local_folder, save_catalog
from triewise.reports import CardFacts, addressed, model_card
from triewise.tokens import Prompts, Trie, build_prompts, information_gain

Search = Literal["beam", "exact", "catalogue", "grounding"]
SEARCHES: tuple[Search, ...] = ("beam", "exact", "catalogue", "grounding")
SETTINGS = (
    "support",
    "search",
    "beams",
    "batch_users",
    "length_penalty",
    "alpha",
    "scope",
    "text_beams",
    "text_tokens",
    "gamma",
)


@dataclass(frozen=True)
class GenerativeRecommender:
    """Ranks titles by the probability that the language model writes them.

    Attributes:
        backbone: The language model and its tokenizer.
        catalog: The items.
        prompts: How histories become token ids.
        trie: The prefix tree of the titles' tokens.
        counts: (I,) training targets of each item; decide which member represents a group.
        support: Softmax over valid tokens (``trie``) or over the vocabulary.
        search: How the trie is searched; ``catalogue`` scores every title, ``exact`` finds the same best ones with
            less work, ``beam`` is a beam search. ``grounding`` does not search it: the model writes freely, and the
            titles nearest to that are returned (BIGRec); the settings below it are then the last three.
        beams: Beams of the beam search; where more titles are asked for, so many.
        batch_users: Users that share a forward.
        length_penalty: Exponent of the title's length that divides a score (BIGRec 1).
        alpha: Strength of IGD-decoding; 0 switches it off.
        scope: What IGD-decoding scales the gain over, ``node`` or (beam search only) ``step``.
        text_beams: Grounding: beams of the free generation.
        text_tokens: Grounding: most tokens of the free text.
        gamma: Grounding: strength with which popularity is injected; 0 switches it off.
        card: Text of its model card; empty where there is none.
    """

    backbone: Backbone
    catalog: Catalog
    prompts: Prompts
    trie: Trie
    counts: NDArray[np.int64]
    support: Support = "trie"
    search: Search = "catalogue"
    beams: int = 10
    batch_users: int = 16
    length_penalty: float = 0.0
    alpha: float = 0.0
    scope: Scope = "node"
    text_beams: int = 4
    text_tokens: int = 128
    gamma: float = 0.0
    card: str = field(default="", repr=False)

    @cached_property
    def groups(self) -> Groups:
        """Groups of items with the same title tokens."""
        return Groups.from_labels(self.trie.leaf, self.counts)

    @property
    def hashes(self) -> dict[str, str]:
        """Hex SHA-256 of what training and decoding must have in common; see `hashes`."""
        return hashes(self.prompts, self.trie, self.counts)

    @cached_property
    def engine(self) -> TrieEngine:
        """The engine that scores edges; made once, so the model is probed once."""
        return TrieEngine(self.backbone.model, self.trie, self.support, at_once=self.batch_users)

    @cached_property
    def gain(self) -> NDArray[np.float64] | None:
        """(N,) information gain for IGD-decoding, None where it is off."""
        return information_gain(self.trie, self.counts) if self.alpha else None

    @cached_property
    def grounded(self) -> GroundedRecommender:
        """The same model where it writes freely; made once, so the titles are embedded once."""
        return GroundedRecommender(
            self.backbone,
            self.prompts,
            self.groups,
            self.text_beams,
            self.text_tokens,
            self.gamma,
            self.batch_users,
        )

    def with_settings(self, **changes: Any) -> GenerativeRecommender:
        """The same model with other settings of its ranking: ``support``, ``search``, ``beams``, ..."""
        other = replace(self, **changes)
        if "engine" in self.__dict__ and not {"backbone", "trie", "support", "batch_users"} & changes.keys():
            other.__dict__["engine"] = self.engine  # the model was probed, and the shared instruction run
        if "grounded" in self.__dict__ and not {"backbone", "prompts"} & changes.keys():
            other.__dict__["grounded"] = replace(other.grounded, kept=self.grounded.kept)  # titles embedded
        return other

    def recommend(
        self,
        histories: ItemLists,
        k: int | None = 10,
        exclude: ItemLists | str | None = None,
        allow: ItemLists | None = None,
    ) -> Ranking:
        """The ``k`` most probable titles for each history; see `Recommender.recommend`.

        A history may be empty where the template has a start token.

        Returns:
            Scores are natural-log probabilities of titles; with ``grounding`` minus distances, see
            `GroundedRecommender`.

        Raises:
            UserError: An item outside the catalogue, ``k < 1``, or search settings that do not go together.
        """
        if self.search not in SEARCHES:
            raise UserError(f"wanted search among {', '.join(SEARCHES)}, got {self.search!r}")
        if self.scope == "step" and self.search != "beam":
            raise UserError(
                f"scope = 'step' needs search = 'beam', got {self.search!r}: other searches have no steps"
            )
        if self.search == "grounding":
            return self.grounded.recommend(histories, k, exclude, allow)
        check_histories(histories, self.groups)
        excluded, allowed = resolve_filters(histories, exclude, allow)
        return self._search(
            [self.prompts.encode(history) for history in histories],
            k,
            length_penalty=self.length_penalty,
            alpha=self.alpha,
            gain=self.gain,
            exclude=excluded,
            allow=allowed,
            counts=self.counts,
        )

    def score(self, histories: ItemLists, candidates: ItemLists) -> NDArray[np.float32]:
        """Log-probability of given items for each history.

        Args:
            histories: Item indices, oldest first.
            candidates: Per user, item indices; lists may differ in length.

        Returns:
            float32 (B, C), nats, in the order given; shorter lists end in -inf.

        Raises:
            UserError: An item outside the catalogue, or not one list of candidates for each history.
        """
        check_histories(histories, self.groups)
        check_lists(len(histories), candidates=candidates)
        return score(self.engine, [self.prompts.encode(history) for history in histories], candidates)

    def _search(self, prompts: TokenLists, k: int | None, **settings: Any) -> Ranking:
        if self.search == "catalogue":
            return rank_catalogue(self.engine, prompts, k, **settings)
        k = self.groups.n_groups if k is None else k
        if self.search == "exact":
            return exact_search(self.engine, prompts, k, **settings)
        return beam_search(self.engine, prompts, k, max(k, self.beams), scope=self.scope, **settings)

    def merged(self) -> GenerativeRecommender:
        """The same with the adapter folded into the base, which decodes faster; see `Backbone.merged`."""
        return replace(self, backbone=self.backbone.merged())

    def save_pretrained(self, folder: Path | str) -> None:
        """Write everything :meth:`from_pretrained` needs into ``folder``; each file is whole or absent.

        With an adapter, ``model/`` holds the adapter and says which base it is on (name, revision, hash, quantisation).
        A base that was built here, such as ``tiny``, is saved with it; any other one is loaded from where it was.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)
        self.backbone.save(folder / "model")
        self.trie.save(folder / "trie.npz")
        save_catalog(self.catalog, self.counts, folder / "catalog.parquet")
        if self.card:
            write_text(folder / CARD, self.card)
        prompts = self.prompts
        write_json(
            folder / MANIFEST,
            {
                "format": FORMAT,
                "kind": "generative",
                **{name: getattr(self, name) for name in SETTINGS},
                "prompt": prompts.settings,
                "hashes": self.hashes,
                "origin": self.backbone.origin,
            },
        )

    @classmethod
    def from_pretrained(
        cls,
        folder_or_hub_id: Path | str,
        *,
        revision: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        base: Path | str | None = None,
        trust_remote_code: bool = False,
    ) -> GenerativeRecommender:
        """Load a recommender from a run folder, a folder of :meth:`save_pretrained`, or the Hugging Face hub.

        Args:
            folder_or_hub_id: A folder, or ``namespace/name``; a folder of that name comes first.
            revision: Commit, branch or tag on the hub.
            device: ``auto`` or a torch device.
            dtype: ``auto`` or a torch dtype's name.
            base: Folder of the base model under a saved adapter, where it is no longer at its old place.
            trust_remote_code: Passed to transformers; executes code of the model's repository.

        Raises:
            UserError: Something is missing, or the tokenizer, the trie, the catalogue and the base model do not
                belong together.
        """
        folder = local_folder(folder_or_hub_id, revision)
        facts = read_json(folder / MANIFEST)
        if facts.get("format") != FORMAT:
            raise UserError(
                f"wanted {folder}/{MANIFEST} of format {FORMAT}, got {facts.get('format')}; save it again"
            )
        for name in FILES:
            if not (folder / name).exists():
                raise UserError(f"wanted {name} in {folder}, which is missing; restore it or train again")
        frame = pl.read_parquet(folder / "catalog.parquet")
        backbone = load_backbone(
            str(folder / "model"), device=device, dtype=dtype, base=base, trust_remote_code=trust_remote_code
        )
        catalog, trie = Catalog.from_frame(frame), Trie.load(folder / "trie.npz")
        backbone.model.requires_grad_(False)  # so the engine may keep what the prompts of all calls share
        prompts = build_prompts(backbone.tokenizer, catalog, **facts["prompt"])
        counts = frame["train_targets"].to_numpy().astype(np.int64)
        _check_parts(folder, facts["hashes"], prompts, trie, counts)
        return cls(
            replace(backbone, origin=facts["origin"]),
            catalog,
            prompts,
            trie,
            counts,
            **{name: facts[name] for name in SETTINGS if name in facts},
            card=(folder / CARD).read_text(encoding="utf-8") if (folder / CARD).is_file() else "",
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        license: str | None = None,
        message: str = "Upload a recommender",
    ) -> str:
        """Write the recommender and its model card into a repository of the Hugging Face hub.

        Uploaded is what :meth:`save_pretrained` writes, without paths of this machine, and the card: the one that
        ``triewise evaluate`` wrote, else a short one. Titles, item ids and how often each item was a training target
        are part of the catalogue; histories, users and ``run.json`` are not uploaded. A base model that is a local
        folder is not uploaded either: who loads the adapter gives it as ``base``.

        Args:
            repo_id: ``namespace/name``; made where it is absent.
            private: Whether a new repository is private; None: as the namespace has it.
            token: Of the hub; None: the one of ``hf auth login``.
            license: Of the model, for the card, such as ``apache-2.0``; the choice is yours.
            message: Of the commit.

        Returns:
            The address of the repository.

        Raises:
            UserError: The hub cannot be reached, or refuses.
        """
        items = int(np.argmax(self.counts))
        facts = CardFacts(
            name=repo_id.rpartition("/")[2],
            n_items=self.catalog.n_items,
            example=self.catalog.title[items],
            origin=self.backbone.anonymous().origin,
            settings={name: getattr(self, name) for name in SETTINGS},
        )
        card = addressed(self.card or model_card(facts), repo_id, license)
        with tempfile.TemporaryDirectory() as scratch:
            shared = replace(self, backbone=self.backbone.anonymous(), card=card)
            shared.save_pretrained(Path(scratch, "recommender"))
            return upload(
                Path(scratch, "recommender"), repo_id, private=private, token=token, message=message
            )


def hashes(prompts: Prompts, trie: Trie, counts: NDArray[np.int64]) -> dict[str, str]:
    """Hex SHA-256 of the prompts (template, titles, tokenizer, limits), the trie and the training targets."""
    of_counts = hashlib.sha256(counts.astype("<i8").tobytes()).hexdigest()
    return {"prompt": prompts.hash, "trie": trie.fingerprint(), "counts": of_counts}


def _check_parts(
    folder: Path, saved: dict[str, str], prompts: Prompts, trie: Trie, counts: NDArray[np.int64]
) -> None:
    """Refuse a tokenizer, catalogue or trie that is not the one the recommender was saved with."""
    found = hashes(prompts, trie, counts)
    for part, wanted in saved.items():
        if found[part] != wanted:
            raise UserError(
                f"the {part} of {folder} is not the one this model was trained with (hash {found[part][:12]}, wanted "
                f"{wanted[:12]}); restore its tokenizer, catalog.parquet and trie.npz, or train again"
            )
    rebuilt = Trie.from_sequences((prompts.title_tokens.values, prompts.title_tokens.offsets))
    if rebuilt.fingerprint() != trie.fingerprint():
        raise UserError(
            f"the tokenizer in {folder}/model does not give the titles of trie.npz; restore the one it was saved with"
        )
