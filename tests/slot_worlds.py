"""Small recommenders whose prompts carry item slots."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.worlds import TITLES, catalog, recommender as plain_recommender
from triewise.models import Backbone, ItemSlots, SequentialModel, attach
from triewise.recommenders import GenerativeRecommender
from triewise.settings import EncoderSettings
from triewise.tokens import build_prompts

KINDS = ("llara", "a-llmrec")


def with_slots(made: Backbone, kind: str, n_items: int = len(TITLES), size: float = 3.0) -> ItemSlots:
    """Random item vectors, large enough to matter, and for ``a-llmrec`` a random encoder of users."""
    torch.manual_seed(1)
    encoder = None
    if kind == "a-llmrec":
        encoder = SequentialModel(EncoderSettings(encoder="sasrec", width=8), n_items, 5, seed=2)
    words = made.model.get_input_embeddings()
    titles = catalog() if n_items == len(TITLES) else catalog(tuple(f"t{i}" for i in range(n_items)))
    slots = ItemSlots(words, kind, torch.randn(n_items, 6), titles.fingerprint(), encoder, seed=3)
    with torch.no_grad():
        for projector in (slots.item, slots.user):
            if projector is not None:
                projector[-1].weight.mul_(size)
    attach(made.model, slots)
    return slots


def recommender(kind: str = "llara", template: str = "plain", **changes: Any) -> GenerativeRecommender:
    """As `worlds.recommender`, with slots."""
    made = plain_recommender(template=template)
    slots = with_slots(made.backbone, kind)
    prompts = build_prompts(made.backbone.tokenizer, catalog(), template, max_history=5, slots=slots.ids)
    return replace(made, prompts=prompts, **changes)


def write_order_world(
    folder: Path, n_hubs: int = 8, n_guides: int = 400, n_rows: int = 5000, seed: int = 0
) -> Path:
    """A published split in the MSL format in which titles say nothing and order decides.

    Titles are random strings. The last item of a history is a guide, and each guide leads to one of a few hubs, which
    the best recommender always names: HR@1 is 1. Who has read only a few guides' titles cannot know where the others
    lead; item vectors that were trained on all rows can.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    titles = {str(i + 1): "".join(rng.choice(letters, 4)) for i in range(n_hubs + n_guides)}
    (folder / "id2name4Rec.json").write_text(json.dumps(titles), encoding="utf-8")
    hub = rng.permutation(np.arange(n_guides) % n_hubs)
    for name, size in (("train", n_rows), ("valid", 50), ("test", 200)):
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["user_id", "item_ids", "timestamp"])
            for row in range(size):
                guides = rng.integers(n_guides, size=2)
                ids = [*(guides + n_hubs + 1).tolist(), int(hub[guides[-1]]) + 1]
                writer.writerow([row, str(ids), 1000 + row])
    return folder


ITEMS = """
name = "items"
[data]
source = "msl:{raw}"
folder = "{prepared}"
[sequential]
encoder = "sasrec"
width = 16
blocks = 1
heads = 1
dropout = 0.0
[training]
supervision = "last"
steps = 150
batch_size = 64
learning_rate = 1e-2
schedule = "cosine"
"""
WORDS = """
name = "words"
[data]
source = "msl:{raw}"
folder = "{prepared}"
[backbone]
name = "tiny"
[backbone.tiny]
vocabulary = 300
width = 32
layers = 2
heads = 2
feed_forward = 64
[training]
supervision = "last"
sample = 200
steps = 80
batch_size = 16
learning_rate = 6e-3
schedule = "cosine"
"""
HYBRID = """
[hybrid]
kind = "{kind}"
items = "{items}"
"""
