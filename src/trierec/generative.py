"""A language model as a recommender: backbone + prompts + trie + engine + search.

A saved recommender is a folder that stands on its own: ``model/`` (an ordinary Hugging Face checkpoint),
``trie.npz``, ``catalog.parquet`` and ``recommender.json`` (prompt settings and the hashes that tie the parts
together).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from trierec.backbones import Backbone, load_backbone
from trierec.catalog import Catalog
from trierec.decisiveness import information_gain
from trierec.engine import Support, TrieEngine
from trierec.errors import UserError
from trierec.files import atomic_path, read_json, write_json
from trierec.prompts import Prompts, build_prompts
from trierec.ranking import Groups, ItemLists, Ranking, add_counters, check_histories, resolve_filters
from trierec.search import rank_catalogue
from trierec.trie import Trie

FORMAT = 1
MANIFEST = "recommender.json"  # written last: where it is, the rest is whole


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
        search: How the trie is searched; ``catalogue`` scores every title.
        batch_users: Users that share a forward.
        length_penalty: Exponent of the title's length that divides a score (BIGRec 1).
        alpha: Strength of IGD-decoding; 0 switches it off.
    """

    backbone: Backbone
    catalog: Catalog
    prompts: Prompts
    trie: Trie
    counts: NDArray[np.int64]
    support: Support = "trie"
    search: str = "catalogue"
    batch_users: int = 16
    length_penalty: float = 0.0
    alpha: float = 0.0

    @cached_property
    def groups(self) -> Groups:
        """Groups of items with the same title tokens."""
        return Groups.from_labels(self.trie.leaf, self.counts)

    @cached_property
    def engine(self) -> TrieEngine:
        """The engine that scores edges; made once, so the model is probed once."""
        return TrieEngine(self.backbone.model, self.trie, self.support)

    @cached_property
    def gain(self) -> NDArray[np.float64] | None:
        """(N,) information gain for IGD-decoding, None where it is off."""
        return information_gain(self.trie, self.counts) if self.alpha else None

    def with_settings(self, **changes: Any) -> GenerativeRecommender:
        """The same model with another ``support``, ``search`` or ``batch_users``."""
        return replace(self, **changes)

    def recommend(
        self,
        histories: ItemLists,
        k: int | None = 10,
        exclude: ItemLists | str | None = None,
        allow: ItemLists | None = None,
        advance: Callable[[int], None] | None = None,
    ) -> Ranking:
        """The ``k`` most probable titles for each history.

        Args:
            histories: Item indices, oldest first; may be empty where the template has a start token.
            k: Number of titles; None ranks the whole catalogue.
            exclude: Per user, items that must not be returned; ``"history"`` stands for the user's own items.
            allow: Per user, the only items that may be returned.
            advance: Called with the number of users done, for progress.

        Returns:
            Scores are natural-log probabilities of titles.

        Raises:
            UserError: An item outside the catalogue, ``k < 1``, or a search that is not known.
        """
        if self.search != "catalogue":
            raise UserError(
                f"wanted search = 'catalogue', got {self.search!r}: beam and exact search come later"
            )
        check_histories(histories, self.groups)
        excluded, allowed = resolve_filters(histories, exclude, allow)
        prompts = [self.prompts.encode(history) for history in histories]
        # Users of similar prompt length share a forward, so little is padded; results go back to their rows.
        order = np.argsort([len(prompt) for prompt in prompts], kind="stable")
        parts: list[Ranking] = []
        for start in range(0, len(order), self.batch_users):
            rows = order[start : start + self.batch_users].tolist()
            part = rank_catalogue(
                self.engine,
                [prompts[row] for row in rows],
                k,
                self.length_penalty,
                self.alpha,
                self.gain,
                exclude=[excluded[row] for row in rows],
                allow=[allowed[row] for row in rows],
                counts=self.counts,
            )
            parts.append(part)
            if advance:
                advance(len(rows))
        return _join(parts, order, k or self.groups.n_groups)

    def save(self, folder: Path) -> None:
        """Write everything :func:`load_recommender` needs into ``folder``; each file is whole or absent."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)
        self.backbone.save(folder / "model")
        self.trie.save(folder / "trie.npz")
        save_catalog(self.catalog, self.counts, folder / "catalog.parquet")
        prompts = self.prompts
        write_json(
            folder / MANIFEST,
            {
                "format": FORMAT,
                "kind": "generative",
                "support": self.support,
                "search": self.search,
                "batch_users": self.batch_users,
                "length_penalty": self.length_penalty,
                "alpha": self.alpha,
                "prompt": prompts.settings,
                "hashes": {"prompt": prompts.hash, "trie": self.trie.fingerprint()},
                "origin": self.backbone.origin,
            },
        )


def save_catalog(catalog: Catalog, counts: NDArray[np.int64], path: Path) -> None:
    """Write a catalogue with the training targets of each item."""
    with atomic_path(path) as temporary:
        catalog.to_frame(counts.astype(np.int32)).write_parquet(temporary)


def load_recommender(
    folder: Path | str, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False
) -> GenerativeRecommender:
    """Load a recommender from a run folder or from where :meth:`GenerativeRecommender.save` wrote it.

    Raises:
        UserError: Something is missing, or the tokenizer, the trie and the catalogue do not belong together.
    """
    folder = Path(folder)
    facts = read_json(folder / MANIFEST) if folder.is_dir() else None
    if facts is None:
        raise UserError(
            f"wanted a run folder with a trained recommender, but {folder} is no folder; train one first"
        )
    if facts.get("format") != FORMAT:
        raise UserError(
            f"wanted {folder}/{MANIFEST} of format {FORMAT}, got {facts.get('format')}; save it again"
        )
    for name in ("catalog.parquet", "trie.npz", "model"):
        if not (folder / name).exists():
            raise UserError(f"wanted {name} in {folder}, which is missing; restore it or train again")
    frame = pl.read_parquet(folder / "catalog.parquet")
    catalog = Catalog.from_frame(frame)
    backbone = load_backbone(
        str(folder / "model"), device=device, dtype=dtype, trust_remote_code=trust_remote_code
    )
    prompts = build_prompts(backbone.tokenizer, catalog, **facts["prompt"])
    trie = Trie.load(folder / "trie.npz")
    rebuilt = Trie.from_sequences((prompts.title_tokens.values, prompts.title_tokens.offsets))
    hashes = {"prompt": prompts.hash, "trie": trie.fingerprint()}
    for part, wanted in facts["hashes"].items():
        if hashes[part] != wanted:
            raise UserError(
                f"the {part} of {folder} is not the one this model was trained with (hash {hashes[part][:12]}, wanted "
                f"{wanted[:12]}); restore its tokenizer, catalog.parquet and trie.npz, or train again"
            )
    if rebuilt.fingerprint() != trie.fingerprint():
        raise UserError(
            f"the tokenizer in {folder}/model does not give the titles of trie.npz; restore the one it was saved with"
        )
    counts = frame["train_targets"].to_numpy().astype(np.int64)
    backbone = replace(backbone, origin=facts["origin"])
    return GenerativeRecommender(
        backbone,
        catalog,
        prompts,
        trie,
        counts,
        **{name: facts[name] for name in ("support", "search", "batch_users", "length_penalty", "alpha")},
    )


def _join(parts: list[Ranking], order: NDArray[np.int64], k: int) -> Ranking:
    """Rankings of length-sorted batches as one, in the order the users came in."""
    n_users = len(order)
    items, scores = np.full((n_users, k), -1, np.int32), np.full((n_users, k), -np.inf, np.float32)
    certified = np.ones(n_users, dtype=bool)
    counters: dict[str, int] = {}
    done = 0
    for part in parts:
        rows = order[done : done + len(part.items)]
        items[rows], scores[rows], certified[rows] = part.items, part.scores, part.certified
        done += len(rows)
        add_counters(counters, part.counters)
    return Ranking(items, scores, certified, counters)
