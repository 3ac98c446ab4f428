"""Codes in the place of titles: from what a recipe says to an identifier, and to a backbone that has its tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from triewise.app.folders import open_sequential, read_codes
from triewise.models import add_tokens, title_encoder, with_adapter
from triewise.progress import note
from triewise.tokens import build_prompts, residual_codes, told_apart

if TYPE_CHECKING:
    from triewise.arrays import Float64, Int32, Ragged
    from triewise.data import Dataset, Split
    from triewise.models import Backbone
    from triewise.recipe import Recipe
    from triewise.tokens import Identifier

TITLES_AT_ONCE = 256  # that a text encoder reads


def identifier_of(recipe: Recipe, dataset: Dataset, rows: Split, backbone: Backbone) -> Identifier | None:
    """What ``[identifier]`` says, or the codes of the reference that training starts from; None: titles.

    Args:
        recipe: What to do.
        dataset: The data.
        rows: Training rows, for the SVD and for how often each item is met.
        backbone: Whose embedding is averaged, where that is what is quantised.

    Raises:
        UserError: A file of codes, or a run of item vectors, that is none of this data.
    """
    settings, catalog = recipe.identifier, dataset.catalog
    titled = settings.kind == "codes+title"
    if settings.kind == "title":
        return None
    met = np.bincount(np.concatenate([rows.history.values, rows.target]), minlength=catalog.n_items)
    file = recipe.objective.preference.reference or settings.file
    if file is not None:
        made = read_codes(file, dataset, titled)
    else:
        vectors = _vectors(recipe, dataset, rows, backbone)
        made = residual_codes(vectors, catalog.group, settings.levels, titled, recipe.seed, met)
    if settings.collisions == "level":
        made = told_apart(made, catalog.group, met)
    shared = f", {made.collisions} items share theirs" if made.collisions else ""
    note(f"codes of items: {len(made.names)} tokens, at most {max(map(len, made.codes))} an item{shared}")
    return made


def with_codes(recipe: Recipe, dataset: Dataset, backbone: Backbone, identifier: Identifier) -> Backbone:
    """The backbone with the tokens of an identifier, and with the adapter of the recipe, which trains their rows.

    A new row is the mean of those of the titles of its items, token by token.
    """
    titles = _without_end(build_prompts(backbone.tokenizer, dataset.catalog).title_tokens)
    items: dict[str, list[int]] = {name: [] for name in identifier.names}
    for item, codes in enumerate(identifier.codes):
        for name in set(codes):
            items[name].append(item)
    like = [np.concatenate([titles[item] for item in some]) for some in items.values()]
    if not backbone.adapted:
        tokens = add_tokens(backbone.model, backbone.tokenizer, identifier.names, like)
        if recipe.backbone.lora.rank:
            backbone = with_adapter(backbone, recipe.backbone.lora, recipe.seed, tokens)
    return replace(backbone, origin=backbone.origin | {"identifier": recipe.identifier.kind})


def _vectors(recipe: Recipe, dataset: Dataset, rows: Split, backbone: Backbone) -> Float64:
    """What is quantised, float64 (I, d)."""
    settings, catalog = recipe.identifier, dataset.catalog
    if settings.items is not None:
        found = torch.from_numpy(open_sequential(settings.items, recipe, dataset).item_vectors())
    elif settings.vectors == "svd":
        found = _singular_vectors(rows, catalog.n_items, settings.width, recipe.seed)
    else:
        titles = build_prompts(backbone.tokenizer, catalog).title_tokens
        if settings.vectors == "backbone":
            found = _means(backbone.model.get_input_embeddings().weight.detach().cpu(), _without_end(titles))
        else:
            encoder = title_encoder(settings.vectors, catalog.title, titles, recipe.seed).eval()
            with torch.no_grad():
                parts = torch.split(torch.arange(catalog.n_items), TITLES_AT_ONCE)
                found = torch.cat([encoder(some) for some in parts])
    vectors: Float64 = found.double().numpy()
    return vectors


def _without_end(titles: Ragged) -> list[Int32]:
    """The tokens of each title, without the terminator where there are others."""
    return [row[: max(len(row) - 1, 1)] for row in titles]


def _means(table: torch.Tensor, titles: list[Int32]) -> torch.Tensor:
    """Mean row (I, D), float32, of a table (V, D) over the tokens of each title."""
    ids = torch.from_numpy(np.concatenate(titles)).long()
    offsets = torch.from_numpy(np.cumsum([0, *map(len, titles[:-1])]))
    return torch.nn.functional.embedding_bag(ids, table.float(), offsets, mode="mean")


def _singular_vectors(rows: Split, n_items: int, width: int, seed: int) -> torch.Tensor:
    """Right singular vectors (I, d) of the matrix of users and items, ones where a user had an item, times values."""
    number: dict[object, int] = {}
    user = np.array([number.setdefault(u or (r,), len(number)) for r, u in enumerate(rows.user_id)])
    items: Int32 = np.concatenate([rows.history.values, rows.target])
    users = np.concatenate([np.repeat(user, rows.history.lengths), user])
    pairs = np.unique(np.stack([users, items]), axis=1)
    shape = len(number), n_items
    ones = torch.ones(pairs.shape[1])
    matrix = torch.sparse_coo_tensor(torch.from_numpy(pairs), ones, shape, check_invariants=True).coalesce()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _, values, vectors = torch.svd_lowrank(matrix, q=min(width, *shape), niter=4)
    return vectors * values
