"""Hybrids: a language model that reads the item vectors of a sequential run (LLaRA, A-LLMRec)."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from triewise.app.folders import open_sequential
from triewise.errors import UserError
from triewise.models import ItemSlots, attach, slots_of, title_encoder
from triewise.training import Curriculum, kept_alignment

if TYPE_CHECKING:
    from triewise.data import Dataset
    from triewise.models import Backbone
    from triewise.recipe import Recipe
    from triewise.tokens import Prompts
    from triewise.training import Learned, Windows

CODES = "alignment.safetensors"


def with_slots(recipe: Recipe, dataset: Dataset, backbone: Backbone) -> Backbone:
    """The backbone with slots for the items of the run that a recipe names; those of a reference are trained on.

    Raises:
        UserError: That run is none of this data, or has seen what this one may not; a model to start from whose slots
            are of another kind.
    """
    hybrid, model = recipe.hybrid, backbone.model
    slots = slots_of(model)
    kind = None if hybrid is None else hybrid.kind
    if slots is not None and slots.kind != kind:
        raise UserError(
            f"wanted hybrid.kind = {slots.kind!r}, whose item slots the model to start from has, got {kind!r}; "
            "give the same, or start from another model"
        )
    if hybrid is None:
        return backbone
    if hybrid.frozen:
        model.requires_grad_(False)
    if slots is None:
        items = open_sequential(hybrid.items, recipe, dataset).model
        words, name = model.get_input_embeddings(), dataset.catalog.fingerprint()
        table, encoder = items.items.weight[1:-1], None
        if hybrid.kind == "a-llmrec":  # its codes are made before training
            if "in_context" in items.config:
                raise UserError(
                    f"wanted a sequential run whose states need its items alone, got LLM-CF in {hybrid.items}; give "
                    "its encoder without [enhance], or set hybrid.kind = 'llara'"
                )
            table, encoder = table.new_zeros(len(table), hybrid.alignment.width), items
        slots = ItemSlots(words, hybrid.kind, table, name, encoder, recipe.seed)
        attach(model, slots)
    for part in (slots.item, slots.user):
        if part is not None:
            part.requires_grad_(True)
    return replace(backbone, origin=backbone.origin | {"hybrid": hybrid.kind})


def item_hashes(backbone: Backbone) -> dict[str, str]:
    """Hex SHA-256 of what slots read and no training changes, for ``run.json``; nothing where there are none."""
    slots = slots_of(backbone.model)
    if slots is None:
        return {}
    digest = hashlib.sha256()
    for name, tensor in sorted(slots.parts().items()):
        if not name.startswith(("item.", "user.")):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return {"items": digest.hexdigest()}


def remember(backbone: Backbone, windows: Windows, max_history: int) -> None:
    """Let user slots of all training rows be known, in every process that reads them."""
    slots = slots_of(backbone.model)
    if slots is None or slots.ids.histories is None:
        return
    for items, n_context in zip(windows.items, windows.n_context, strict=True):
        slots.ids.histories.number(items[:n_context][-max_history:], keep=True)


def align(recipe: Recipe, backbone: Backbone, prompts: Prompts, windows: Windows, out: Path) -> None:
    """Stage 1 of A-LLMRec, once for a run folder; the codes of a reference stay."""
    slots = slots_of(backbone.model)
    if recipe.hybrid is None or slots is None or slots.ids.histories is None or slots.table.any():
        return
    settings, encoder = recipe.hybrid.alignment, slots.ids.histories.encoder
    titles = title_encoder(settings.text_encoder, prompts.title, prompts.title_tokens, recipe.seed)
    device = slots.table.device
    slots.table.copy_(kept_alignment(out / CODES, encoder, titles, windows, settings, recipe.seed, device))


def taught(recipe: Recipe, backbone: Backbone, learned: Learned) -> Learned:
    """What is learned, under the curriculum of the recipe."""
    slots, settings = slots_of(backbone.model), recipe.training
    share = 0.0 if recipe.hybrid is None else recipe.hybrid.share_of_curriculum
    n_batches = settings.steps * settings.accumulation
    length = round(share * n_batches)
    if slots is None or not length:
        return learned
    return Curriculum(learned, slots.ids, n_batches, length, recipe.seed)
