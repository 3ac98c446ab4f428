"""Small recommenders whose prompts carry item slots."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from tests.worlds import TITLES, backbone, catalog, recommender as plain_recommender
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


__all__ = ["KINDS", "backbone", "recommender", "with_slots"]
