"""A language model as a recommender: backbone + prompts + trie + engine + search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import create_model

from triewise.decoding import (
    Together,
    TokenLists,
    TrieEngine,
    beam_search,
    exact_search,
    rank_catalogue,
    score,
)
from triewise.errors import UserError, reading
from triewise.files import Shape
from triewise.models import Backbone, load_backbone, slots_of
from triewise.ranking import (
    Groups,
    ItemLists,
    Items,
    Ranking,
    check_histories,
    check_lists,
    resolve_filters,
)
from triewise.recommenders.assistants import (
    Assisted,
    Collaborator,
    Doubles,
    by_group,
    log_probabilities,
    once_a_title,
    title_log_probabilities,
)
from triewise.recommenders.changes import CatalogueChange, Changeable, changed_assistant
from triewise.recommenders.grounding import GroundedRecommender
from triewise.recommenders.saved import (
    IDENTIFIER,
    MANIFEST,
    TRIE,
    Manifest,
    Saved,
    card_facts,
    hash_of,
    push,
    saving,
)
from triewise.recommenders.search_settings import SEARCHES, SETTINGS, SearchSettings
from triewise.reports import Recommendation, describe, explain, forced_by_position
from triewise.tokens import (
    Dropped,
    Prompts,
    Trie,
    build_prompts,
    changed_trie,
    gain_by,
    read_identifier,
    single_start,
)

if TYPE_CHECKING:
    from triewise.data import Catalog, Dataset
    from triewise.settings import EvaluationSettings


LONGEST_TITLE = 256  # tokens of a new title, where none of the catalogue has more


class _Prompt(Shape):
    template: str
    chat: bool


# A setting of the search has the type of its default; a folder from before it has none.
_TYPES: dict[str, Any] = {f.name: (type(f.default), f.default) for f in fields(SearchSettings)}
_Searching: Any = create_model("_Searching", __base__=Manifest, **_TYPES)


class _Manifest(_Searching):
    prompt: _Prompt
    hashes: dict[str, str]
    origin: dict[str, Any]


@dataclass(frozen=True)
class GenerativeRecommender(SearchSettings, Assisted, Changeable):
    """Ranks titles by the probability that the language model writes them.

    Scores are natural-log probabilities of titles; with ``grounding`` minus distances, see `GroundedRecommender`. A
    history may be empty where the template has a start token. How it searches is said by the attributes of
    `SearchSettings`, who assists it by those of `Assisted`, and which items were removed by that of `Changeable`; all
    of them are keywords here.

    Attributes:
        backbone: The language model and its tokenizer.
        catalog: The items.
        prompts: How histories become token ids.
        trie: The prefix tree of the titles' tokens.
        counts: (I,) training targets of each item; decide which member represents a group.
        card: Text of its model card; empty where there is none.
    """

    backbone: Backbone
    catalog: Catalog
    prompts: Prompts
    trie: Trie
    counts: NDArray[np.int64]
    card: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        """Refuse an assistant or item vectors that do not belong here."""
        self.check_assistant(self.catalog)
        slots = slots_of(self.backbone.model)
        if slots is not None and slots.catalog != self.catalog.fingerprint():
            raise UserError(
                "wanted item vectors of this catalogue, got a model with those of other items; restore its "
                "catalogue, or train it on this one"
            )

    @cached_property
    def groups(self) -> Groups:
        """Groups of items with the same title tokens."""
        return Groups.from_labels(self.trie.leaf, self.counts)

    @cached_property
    def titles(self) -> Groups:
        """Those groups, parted where different titles share their tokens."""
        pair = self.groups.of_item.astype(np.int64) * self.catalog.n_items + self.catalog.group
        return Groups.from_labels(pair, self.counts)

    @property
    def hashes(self) -> dict[str, str]:
        """Of what training and decoding must have in common; see `hashes`."""
        return hashes(self.prompts, self.trie, self.counts)

    @property
    def origin(self) -> dict[str, Any]:
        """Where its model came from, for the card; see `SavedRecommender.origin`."""
        return {key: value for key, value in self.backbone.anonymous().origin.items() if key != "merged"}

    @property
    def used(self) -> dict[str, Any]:
        """`SearchSettings.used`, the assistant, and where there is an adapter, whether it is folded into the base."""
        adapter = {"adapter": "separate" if self.backbone.adapted else "merged"}
        used = super().used | (adapter if "lora" in self.backbone.origin else {}) | self.assisted
        if self.search == "grounding":
            used.pop("assistant_weight", None)
        return used

    @property
    def dropped(self) -> Dropped:
        """What its prompts had no room for so far."""
        return replace(self.prompts.dropped, limit=self.prompts.max_tokens)

    @cached_property
    def engine(self) -> TrieEngine:
        """The engine that scores edges; made once, so the model is probed once."""
        return TrieEngine(self.backbone.model, self.trie, self.support, at_once=self.batch_users)

    @cached_property
    def gain(self) -> NDArray[np.float64]:
        """(N,) how much each token decides, for IGD-decoding and explanations; 0 where all titles are new."""
        if not self.counts.any():
            return np.zeros(self.trie.n_nodes)
        return gain_by(self.trie, self.counts, self.measure)

    @property
    def _strength(self) -> float:
        """``alpha``, where a token has training targets: others are left as they are."""
        return self.alpha if self.counts.any() else 0.0

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
            None if self.assistant is None else Collaborator(self.assistant),
        )

    @cached_property
    def alone(self) -> GenerativeRecommender:
        """The same without assistant, penalty and IGD-decoding, scoring every title."""
        _ = self.engine  # kept, so that the model is probed once
        plain = {"length_penalty": 0.0, "alpha": 0.0, "scope": "node"}
        return self.with_settings(search="catalogue", assistant=None, assistant_weight=1.0, **plain)

    def with_settings(self, **changes: Any) -> GenerativeRecommender:
        """The same model with other settings of its ranking: ``support``, ``search``, ``assistant``, ..."""
        other = replace(self, **changes)
        if "engine" in self.__dict__ and not {"backbone", "trie", "support", "batch_users"} & changes.keys():
            other.__dict__["engine"] = self.engine  # the model was probed, and the shared instruction run
        for name in {"groups", "titles", "gain"} & self.__dict__.keys():
            if not {"catalog", "trie", "counts", "measure"} & changes.keys():
                other.__dict__[name] = self.__dict__[name]
        if "grounded" in self.__dict__ and not {"backbone", "prompts"} & changes.keys():
            other.__dict__["grounded"] = replace(other.grounded, kept=self.grounded.kept)  # titles embedded
        return other

    def configured(self, settings: EvaluationSettings) -> GenerativeRecommender:
        """The same model, searching as ``[evaluation]`` of a recipe says."""
        return self.with_settings(**settings.model_dump(include=set(SETTINGS)))

    def depth(self, k: int) -> int | None:
        """How many titles an evaluation asks for; see `SavedRecommender.depth`."""
        return {"exact": max(k, 10), "beam": self.beams}.get(self.search)

    def recommend(
        self,
        histories: ItemLists,
        k: int | None = 10,
        exclude: ItemLists | str | None = None,
        allow: ItemLists | None = None,
        watch: NDArray[np.integer] | None = None,
    ) -> Ranking:
        """The ``k`` most probable titles for each history; see `Recommender.recommend`.

        ``watch`` (B,), items whose titles a beam search looks after; see `beam_search`.
        """
        if self.search not in SEARCHES:
            raise UserError(f"wanted search among {', '.join(SEARCHES)}, got {self.search!r}")
        if self.scope == "step" and self.search != "beam":
            raise UserError(
                f"scope = 'step' needs search = 'beam', got {self.search!r}: other searches have no steps"
            )
        if self.search == "grounding":
            if self.prompts.identifier is not None:
                raise UserError(
                    "grounding compares free texts with titles, got a model that writes codes; search otherwise"
                )
            exclude = self.returned(exclude, histories, self.catalog.n_items)
            return self.grounded.recommend(histories, k, exclude, allow)
        check_histories(histories, self.groups, self.n_former)
        exclude = self.returned(exclude, histories, self.catalog.n_items)
        excluded, allowed = resolve_filters(histories, exclude, allow)
        helper = self.asked
        return self._search(
            [self.prompts.encode(history) for history in histories],
            k,
            length_penalty=self.length_penalty,
            alpha=self._strength,
            gain=self.gain if self._strength else None,
            exclude=excluded,
            allow=allowed,
            assistant=None if helper is None else log_probabilities(helper, histories),
            assistant_weight=1.0 if helper is None else self.assistant_weight,
            counts=self.counts,
            gain_over=self.gain_over,
            **({} if watch is None else {"watch": watch}),
        )

    @property
    def joinable(self) -> bool:
        """Whether users can join and leave its search while it runs."""
        return self.search == "beam" or (self.search == "exact" and self.scope != "step")

    def together(self, k: int) -> Together | None:
        """A search that users join and leave while it runs, see `Together`; None where its search is no such one."""
        if not self.joinable:
            return None
        return Together(
            self.engine,
            k,
            max(k, self.beams) if self.search == "beam" else None,
            length_penalty=self.length_penalty,
            alpha=self._strength,
            scope=self.scope,
            gain=self.gain if self._strength else None,
            assisted=self.asked is not None,
            assistant_weight=self.assistant_weight,
            counts=self.counts,
            gain_over=self.gain_over,
        )

    def join(
        self, search: Together, history: Items, exclude: Items | None, allow: Items | None
    ) -> int | None:
        """Let a user join a search that `together` gave; see `Together.join`."""
        check_histories([history], self.groups, self.n_former)
        helper = self.asked
        theirs = None if helper is None else log_probabilities(helper, [history])[0]
        return search.join(self.prompts.encode(history), exclude, allow, theirs)

    def log_probabilities(self, histories: ItemLists) -> Doubles:
        """(B, I) log-probabilities of titles under this model alone; see `Probabilistic`.

        Titles that share their codes have equal parts of what their codes have.
        """
        of = self.groups.of_item[self.titles.permitted()]
        found = by_group(self.alone.recommend(histories, None), self.groups)[:, of]
        return once_a_title(self.titles, found - np.log(np.bincount(of))[of])

    def parts(self, histories: ItemLists) -> tuple[Doubles, Doubles]:
        """What the model and what its assistant say; see `SavedRecommender.parts`."""
        assert self.assistant is not None
        _ = self.engine
        own = self.with_settings(search="catalogue", scope="node", assistant=None, assistant_weight=1.0)
        theirs = title_log_probabilities(self.assistant, histories, self.groups)
        length = self.trie.depth[np.unique(self.trie.leaf)].astype(np.float64)
        return by_group(own.recommend(histories, None), self.groups), theirs / length**self.length_penalty

    def item_vectors(self) -> NDArray[np.float32]:
        """(I, D) last hidden states of the titles, as grounding compares them."""
        vectors: NDArray[np.float32] = self.grounded.title_embeddings().cpu().numpy()
        return vectors[self.groups.of_item]

    def score(self, histories: ItemLists, candidates: ItemLists) -> NDArray[np.float32]:
        """(B, C) log-probabilities of given items after each history, by the model alone; see `decoding.score`."""
        check_histories(histories, self.groups, self.n_former)
        check_lists(len(histories), candidates=candidates)
        return score(self.engine, [self.prompts.encode(history) for history in histories], candidates)

    def explain(
        self, history: Items, items: Sequence[int], target: int | None = None
    ) -> tuple[Recommendation, ...]:
        """Which tokens decided each of the ``items`` after a history, for the model alone; see `reports.explain`."""
        prompt, tokenizer = self.prompts.encode(history), self.backbone.tokenizer
        found = explain(self.engine, tokenizer, self.catalog, prompt, items, target, self.gain)
        coded = self.prompts.identifier is not None and not self.prompts.identifier.titled
        return tuple(replace(one, coded=coded) for one in found)

    def title_figures(self, dataset: Dataset) -> dict[str, Any]:
        """What a `Report` says of the titles as this model's tokenizer reads them."""
        return {
            "facts": describe(dataset, self.prompts, self.trie, self.counts),
            "forced": forced_by_position(self.trie, self.counts),
        }

    def _search(self, prompts: TokenLists, k: int | None, **settings: Any) -> Ranking:
        if self.search == "catalogue":
            return rank_catalogue(self.engine, prompts, k, **settings)
        k = self.groups.n_groups if k is None else k
        if self.search == "exact":
            return exact_search(self.engine, prompts, k, **settings)
        return beam_search(self.engine, prompts, k, max(k, self.beams), scope=self.scope, **settings)

    def changed(self, change: CatalogueChange) -> GenerativeRecommender:
        """The same with another catalogue, as if it had been built with it; this one stays as it is.

        A new title can be recommended at once; its training targets are 0, so IGD-decoding leaves it as it is.

        Raises:
            UserError: A new item for a model that writes codes, any change for one that reads item vectors, a title too
                long, or an assistant that cannot follow.
        """
        if slots_of(self.backbone.model) is not None:
            raise UserError(
                "a model that reads item vectors has those of its own catalogue: wanted no change of it; train on the "
                "new one, or exclude what may not be returned"
            )
        assistant = changed_assistant(self.assistant, change)
        n_items = change.catalog.n_items
        titles = (*change.catalog.title, *change.former.title)
        prompts = self.prompts.changed(titles, change.source, n_items)
        source = np.where(change.source < self.catalog.n_items, change.source, -1)[:n_items]
        added = prompts.title_tokens.take(np.flatnonzero(source < 0))
        room = max(LONGEST_TITLE, len(self.trie.level_ptr) - 2)
        if added.lengths.max(initial=0) > room:
            long = titles[np.flatnonzero(source < 0)[added.lengths.argmax()]]
            raise UserError(
                f"wanted titles of at most {room} tokens, got one of {added.lengths.max()} ({long[:40]!r}...); "
                "shorten it"
            )
        other = replace(
            self,
            catalog=change.catalog,
            prompts=prompts,
            trie=changed_trie(self.trie, source, added),
            counts=change.counts,
            former=change.former,
            assistant=assistant,
            folder=None,
        )
        other.__dict__["engine"] = self.engine.over(other.trie)
        return other

    def merged(self) -> GenerativeRecommender:
        """The same with the adapter folded into the base, which decodes faster; see `Backbone.merged`."""
        return replace(self, backbone=self.backbone.merged())

    def save_pretrained(self, folder: Path | str) -> None:
        """Write everything :meth:`from_pretrained` needs into ``folder``.

        With an adapter, ``model/`` holds the adapter and says which base it is on (name, revision, hash, quantisation).
        A base that was built here, such as ``tiny``, is saved with it; any other one is loaded from where it was.
        """
        manifest = {
            "kind": "generative",
            **self.search_settings,
            "prompt": self.prompts.settings,
            "hashes": self.hashes,
            "origin": self.backbone.origin,
            **self.saved_assistant,
        }
        identifier = self.prompts.identifier
        if identifier is not None:
            manifest["identifier"] = "codes+title" if identifier.titled else "codes"
        with saving(self, folder, manifest) as place:
            if identifier is not None:
                own = replace(identifier, codes=identifier.codes[: self.catalog.n_items])
                own.save(place / IDENTIFIER, self.catalog.item_id)
            self.backbone.save(place / "model")
            self.trie.save(place / TRIE)

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
        """Load what :meth:`save_pretrained` wrote, whatever a recipe beside it says, and without its assistant.

        Arguments as for `triewise.load`, which goes by the recipe and brings the assistant.

        Raises:
            UserError: Something is missing, or the tokenizer, the trie, the catalogue and the base model do not
                belong together.
        """
        saved = Saved.open(folder_or_hub_id, revision, "generative", _Manifest)
        model, manifest = str(saved.folder / "model"), saved.manifest
        backbone = load_backbone(
            model, device=device, dtype=dtype, base=base, trust_remote_code=trust_remote_code
        )
        backbone.model.requires_grad_(False)  # so the engine may keep what the prompts of all calls share
        trie = Trie.load(saved.folder / TRIE)
        made: dict[str, Any] = manifest["prompt"]
        slots = slots_of(backbone.model)
        start = single_start(
            backbone.tokenizer, made["template"], made["chat"]
        )  # where the folder names none
        made = {"start": start, "slots": None if slots is None else slots.ids} | made
        if "identifier" in manifest:
            titled = manifest["identifier"] == "codes+title"
            made["identifier"] = read_identifier(saved.folder / IDENTIFIER, saved.catalog, titled)
        with reading(saved.folder / MANIFEST):
            prompts = build_prompts(backbone.tokenizer, saved.catalog, **made)
        if prompts.template == "d3" and prompts.hash != manifest["hashes"]["prompt"]:
            made |= {"template": "d3-reworded"}  # it was saved with the former words
            prompts = build_prompts(backbone.tokenizer, saved.catalog, **made)
        saved.check(hashes(prompts, trie, saved.counts))
        rebuilt = Trie.from_sequences((prompts.title_tokens.values, prompts.title_tokens.offsets))
        if rebuilt.fingerprint() != trie.fingerprint():
            raise UserError(
                f"the tokenizer in {model} does not give the titles of {TRIE}; restore the one it was saved with"
            )
        return cls(
            replace(backbone, origin=manifest["origin"]),
            saved.catalog,
            prompts,
            rebuilt,
            saved.counts,
            saved.card,
            folder=saved.folder,
            **{"gain_over": "all"}  # as searches did before they could be told
            | {name: manifest[name] for name in SETTINGS if name in manifest},
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
            UserError: The hub cannot be reached, or refuses; or an assistant, whose folder is on this machine.
        """
        backbone = self.backbone.anonymous()
        facts = card_facts(
            self, repo_id.rpartition("/")[2], origin=backbone.origin, settings=self.search_settings
        )
        shared = replace(self, backbone=backbone)
        return push(shared, facts, repo_id, private=private, token=token, license=license, message=message)


def hashes(prompts: Prompts, trie: Trie, counts: NDArray[np.int64]) -> dict[str, str]:
    """Hex SHA-256 of the prompts (template, titles, tokenizer, limits), the trie and the training targets."""
    return {"prompt": prompts.hash, "trie": trie.fingerprint(), "counts": hash_of(counts)}
