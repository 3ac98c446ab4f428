"""Small data sets with known answers, and a recommender over them with a random or trained tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from triewise.arrays import Ragged
from triewise.data import Catalog, Split
from triewise.models import Backbone, load_backbone
from triewise.recommenders import GenerativeRecommender
from triewise.settings import TinyModel
from triewise.testing import RecommenderContract
from triewise.tokens import Trie, build_prompts

TITLES = (  # two equal, one that spells the terminator, one with markup, one with a newline
    "Alien (1979)",
    "Aliens (1986)",
    "Alien 3 (1992)",
    "Brazil (1985)",
    "Brazil (1985)",
    "漢字の映画 🎬",
    "x <|end|> y",
    '"Quoted", & [bold] <b>',
    "two\nlines",
)
HISTORIES = [list(history) for history in RecommenderContract.histories]
TINY = TinyModel(vocabulary=300, width=16, layers=2, heads=2, feed_forward=32)


def catalog(titles: tuple[str, ...] = TITLES) -> Catalog:
    return Catalog.from_titles(tuple(f"raw-{i}" for i in range(len(titles))), titles)


def backbone(titles: tuple[str, ...] = TITLES, seed: int = 0) -> Backbone:
    return load_backbone("tiny", titles=titles, seed=seed, device="cpu", tiny=TINY)


def recommender(
    titles: tuple[str, ...] = TITLES, seed: int = 0, template: str = "plain", **changes: Any
) -> GenerativeRecommender:
    """A random model whose weights are scaled up, so that its rankings are far from ties."""
    import torch

    model = backbone(titles, seed)
    with torch.no_grad():
        for parameter in model.model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    prompts = build_prompts(model.tokenizer, catalog(titles), template, max_history=5)
    trie = Trie.from_sequences((prompts.title_tokens.values, prompts.title_tokens.offsets))
    counts = np.arange(len(titles), dtype=np.int64)
    return GenerativeRecommender(model, catalog(titles), prompts, trie, counts, **changes)


def split(histories: list[list[int]], targets: list[int], seen: list[list[int]] | None = None) -> Split:
    return Split(
        user_id=np.array([f"u{i}" for i in range(len(targets))], dtype=object),
        history=Ragged.from_lists(histories),
        target=np.array(targets, dtype=np.int32),
        timestamp=np.full(len(targets), -1, dtype=np.int64),
        seen=None if seen is None else Ragged.from_lists(seen),
    )


def write_msl_folder(folder: Path, n_users: int = 40, n_items: int = 12, seed: int = 0) -> Path:
    """A published split in the MSL format: everybody walks round a cycle of items, so the next item is known."""
    import csv
    import json

    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    names = [
        "Red",
        "Red Dawn",
        "Blue Moon",
        "Blue",
        "Green Mile",
        "Green",
        "Night",
        "Night Train",
        "Sun",
        "Sunday",
    ]
    titles = {str(i + 1): names[i] if i < len(names) else f"Film {i}" for i in range(n_items)}
    (folder / "id2name4Rec.json").write_text(json.dumps(titles), encoding="utf-8")
    for name, n_rows in (("train", 5 * n_users), ("valid", n_users), ("test", n_users)):
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["user_id", "item_ids", "timestamp"])
            for row in range(n_rows):
                start, length = int(rng.integers(n_items)), int(rng.integers(4, 8))
                ids = [(start + j) % n_items + 1 for j in range(length + 1)]
                writer.writerow([row % n_users, str(ids), 1000 + row])
    return folder
