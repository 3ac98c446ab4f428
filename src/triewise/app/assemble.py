"""From a recipe and a data set to something that can be trained and ranked with.

Everything that a recipe chooses becomes an object of the wings above: data, backbone, prompts, trie, windows,
weights and objective of a language model, or encoder, sequences and loss of a sequential one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from triewise.app.enhance import enhancement_of
from triewise.app.folders import open_partner, open_run
from triewise.app.guided import guide_of
from triewise.app.hybrid import align, item_hashes, remember, taught, with_slots
from triewise.app.item_codes import identifier_of, with_codes
from triewise.errors import UserError
from triewise.models import (
    BASE_FACTS,
    Backbone,
    ExampleModel,
    SequentialModel,
    describe_lora,
    freeze_first,
    freeze_unused,
    load_backbone,
    max_positions,
    odd_length,
    resolve_device,
    slots_of,
    training_dtype,
    unfreeze_lora,
)
from triewise.progress import note
from triewise.recommenders import (
    GenerativeRecommender,
    SavedRecommender,
    SequentialRecommender,
    hashes,
)
from triewise.tokens import (
    Prompts,
    Trie,
    binary_weights,
    build_prompts,
    front_weights,
    linear_weights,
    position_weights,
    rarity_weights,
    zero_gain,
)
from triewise.training import (
    AdaptiveTemperature,
    Apao,
    Bear,
    Contrast,
    Examples,
    FrontGreater,
    Learned,
    Objective,
    Preferences,
    Sequences,
    TrainResult,
    Windows,
    along_titles,
    draw_rejected,
    fit,
    kept_reference,
    make_windows,
    packs,
    processes,
    target_counts,
    train,
    training_warnings,
)

if TYPE_CHECKING:
    from triewise.arrays import Int64
    from triewise.data import Dataset, Split
    from triewise.recipe import Recipe
    from triewise.tokens import Identifier

REFERENCE = "reference.npz"
_OF_LOADING = {
    "device",
    "dtype",
    "quantisation",
    "trust_remote_code",
    "layers",
}  # keys that say how a backbone is loaded
MAX_TOKENS = 1024  # of a prompt, where a recipe leaves it open


@dataclass(frozen=True)
class Assembly:
    """What a recipe and a data set become before training starts."""

    backbone: Backbone
    prompts: Prompts
    trie: Trie
    windows: Windows
    counts: NDArray[np.int64]
    autocast: bool = False  # forwards of the training compute in bfloat16


@dataclass(frozen=True)
class Learner:
    """What a recipe and a data set become: something to train that can be ranked with.

    Attributes:
        recommender: Ranks with the model as it is now.
        facts: What ``run.json`` says of it.
        fit: ``fit(out, validate=..., resume=..., title=...)`` trains it.
    """

    recommender: SavedRecommender
    facts: dict[str, Any]
    fit: Callable[..., TrainResult]


def learner_of(recipe: Recipe, dataset: Dataset) -> Learner:
    """A language model over titles, or a sequential model over items, as a recipe says."""
    return (_generative if recipe.sequential is None else _sequential)(recipe, dataset)


def assemble(recipe: Recipe, dataset: Dataset) -> Assembly:
    """Backbone, prompts, trie, training windows and target counts of a recipe."""
    settings, reference = recipe.backbone, recipe.objective.preference.reference
    how, autocast = settings.model_dump(include=_OF_LOADING), False
    frozen = recipe.hybrid is not None and recipe.hybrid.frozen
    if not (settings.lora.rank or frozen):  # every weight is trained
        how["dtype"], autocast = training_dtype(settings.dtype, resolve_device(settings.device))
    if reference is not None:
        backbone = _reference_backbone(recipe, dataset, reference, how)
    else:
        lora = settings.lora if recipe.identifier.kind == "title" else None
        how |= {"tiny": settings.tiny, "lora": lora}
        backbone = load_backbone(settings.name, titles=dataset.catalog.title, seed=recipe.seed, **how)
    rows = training_rows(recipe, dataset)
    identifier = identifier_of(recipe, dataset, rows, backbone)
    if identifier is not None:
        backbone = with_codes(recipe, dataset, backbone, identifier)
    if not any(p.requires_grad for p in backbone.model.parameters()):
        raise UserError(
            f"wanted a model with something to train, got {settings.name!r}, which is frozen; give its base as "
            "backbone.name and set backbone.lora.rank > 0"
        )
    freeze_unused(backbone.model, odd_length(backbone.model))
    freeze_first(backbone.model, recipe.training.freeze)
    if backbone.adapted:
        note(describe_lora(backbone.model))
    backbone = with_slots(recipe, dataset, backbone)
    prompts = _prompts(recipe, dataset, backbone, identifier)
    trie = Trie.from_sequences((prompts.title_tokens.values, prompts.title_tokens.offsets))
    if reference is not None:
        theirs = open_run(reference)[1]["hashes"]
        for part, ours in (("prompt", prompts.hash), ("trie", trie.fingerprint())):
            if theirs.get(part) != ours:
                raise UserError(
                    f"the {part} of the reference {reference} is another one; give both the same data, "
                    "data.max_history and backbone, or train a reference for this recipe"
                )
    windows = make_windows(rows, recipe.training.supervision, prompts)
    remember(backbone, windows, prompts.max_history)
    counts = target_counts(windows, dataset.catalog.n_items)
    for line in training_warnings(recipe.objective, prompts, trie, windows, counts):
        note(line)
    return Assembly(backbone, prompts, trie, windows, counts, autocast)


def _prompts(recipe: Recipe, dataset: Dataset, backbone: Backbone, identifier: Identifier | None) -> Prompts:
    """Prompts that leave room for the longest title, where the model has only so many positions."""
    settings, slots = recipe.backbone, slots_of(backbone.model)
    build = functools.partial(
        build_prompts,
        backbone.tokenizer,
        dataset.catalog,
        recipe.template,
        dataset.info["noun"],
        dataset.info["verb"],
        max_history=recipe.data.max_history,
        chat=settings.chat,
        slots=None if recipe.hybrid is None or slots is None else slots.ids,
        identifier=identifier,
        growing=recipe.training.supervision == "every",
    )
    prompts = build(max_tokens=settings.max_tokens or MAX_TOKENS)
    positions, longest = max_positions(backbone.model), int(prompts.title_tokens.lengths.max(initial=0))
    if positions is None or prompts.max_tokens + longest <= positions:
        return prompts
    room = positions - longest
    if settings.max_tokens is not None or room < 1:
        raise UserError(
            f"wanted prompt and title within the {positions} positions of {settings.name!r}, got backbone.max_tokens = "
            f"{prompts.max_tokens} and a title of {longest} tokens; set it to at most {room}, or choose another model"
        )
    note(
        f"backbone.max_tokens is {room}: {settings.name!r} has {positions} positions, and the longest title takes "
        f"{longest} of them"
    )
    return build(max_tokens=room)


def _reference_backbone(recipe: Recipe, dataset: Dataset, reference: Path, how: dict[str, Any]) -> Backbone:
    """The model of a run as a start: all its weights, a new adapter on them, or its adapter trained on."""
    started_from = open_partner(reference, "the reference", recipe, dataset)
    if started_from.sequential is not None:
        raise UserError(
            f"wanted a language model as the reference, got the sequential run {reference}; give one with a [backbone]"
        )
    ours, theirs, folder = recipe.backbone, started_from.backbone, reference / "model"
    adapted = (folder / BASE_FACTS).is_file()
    for key in ("name", "tiny", "layers", *(("quantisation", "lora") if adapted else ())):
        if getattr(ours, key) != getattr(theirs, key):
            raise UserError(
                f"wanted backbone.{key} = {getattr(theirs, key)} as in the reference {reference}, got "
                f"{getattr(ours, key)}; give the same, or train a reference for this recipe"
            )
    if recipe.identifier != started_from.identifier:
        raise UserError(
            f"wanted the [identifier] of the reference {reference}, got another one; give the same, or train a "
            "reference for this recipe"
        )
    lora = None if adapted or recipe.identifier.kind != "title" else ours.lora
    how.pop("layers")  # which the folder knows
    backbone = load_backbone(str(folder), seed=recipe.seed, lora=lora, **how)
    if adapted:
        unfreeze_lora(backbone.model)
    return backbone


def _generative(recipe: Recipe, dataset: Dataset) -> Learner:
    parts = assemble(recipe, dataset)
    model = parts.backbone.model
    examples, rejected = _examples(recipe, parts), None
    guided = guide_of(recipe, dataset, parts, training_rows(recipe, dataset))
    if n := recipe.objective.preference.negatives:
        rejected = draw_rejected(parts.windows, parts.trie.leaf, n, recipe.seed)

    def fit_it(out: Path, **how: Any) -> TrainResult:
        align(recipe, parts.backbone, parts.prompts, parts.windows, out)
        learned = _learned(recipe, model, examples, parts.counts, rejected, guided, out / REFERENCE)
        learned = taught(recipe, parts.backbone, learned)
        how |= {"seed": recipe.seed, "autocast": parts.autocast}
        return train(model, examples, learned, recipe.training, out, **how)

    made = GenerativeRecommender(parts.backbone, dataset.catalog, parts.prompts, parts.trie, parts.counts)
    recommender = made.configured(recipe.evaluation)
    known = hashes(parts.prompts, parts.trie, parts.counts) | item_hashes(parts.backbone)
    sizes = (model.num_parameters(), model.num_parameters(only_trainable=True))
    facts = _facts(known, parts.backbone.origin, sizes, parts.windows, parts.counts)
    return Learner(recommender, facts, fit_it)


def _sequential(recipe: Recipe, dataset: Dataset) -> Learner:
    settings = recipe.sequential
    assert settings is not None
    rows, n_items = training_rows(recipe, dataset), dataset.catalog.n_items
    windows = make_windows(rows, recipe.training.supervision)
    counts = target_counts(windows, n_items)
    weight = None
    if settings.half_life_days is not None:  # one window a row
        if (rows.timestamp < 0).any():
            raise UserError(
                "sequential.half_life_days needs the time of every training row, which this data set does not know; "
                "leave it out"
            )
        age_days = (rows.timestamp.max() - rows.timestamp) / 86400
        weight = np.exp2(-age_days / settings.half_life_days)
    sequences = Sequences.from_windows(windows, weight)
    got = enhancement_of(recipe, dataset, rows, _drawn(recipe, dataset.train.n_rows))
    shape = settings, n_items, recipe.data.max_history, recipe.seed
    if got.in_context is None:
        model = SequentialModel(*shape, got.vectors, got.vector_weight)
    else:
        model = ExampleModel(*shape, got.in_context)
    model.to(resolve_device(settings.device))
    origin = {"name": settings.encoder, "kind": "sequential"}
    recommender = SequentialRecommender(model, dataset.catalog, counts, origin=origin)
    size = sum(p.numel() for p in model.parameters())
    known = recommender.hashes | {"sequences": sequences.fingerprint()} | got.hashes
    facts = _facts(known, origin, (size, size), windows, counts) | got.facts
    loss = None if got.loss is None else got.loss(model, counts)
    learned = model, sequences, counts, settings, recipe.training
    return Learner(recommender, facts, functools.partial(fit, *learned, seed=recipe.seed, loss=loss))


def _facts(
    hashes: dict[str, str],
    origin: dict[str, Any],
    sizes: tuple[int, int],
    windows: Windows,
    counts: NDArray[np.int64],
) -> dict[str, Any]:
    """What ``run.json`` says of the model, with its numbers of parameters, all and trained, and of the data."""
    return {
        "hashes": hashes,
        "origin": origin,
        "parameters": sizes[0],
        "trained_parameters": sizes[1],
        "windows": len(windows),
        "targets": int(counts.sum()),
    }


def training_rows(recipe: Recipe, dataset: Dataset) -> Split:
    """The rows that a recipe trains on."""
    rows = dataset.train
    if recipe.training.rows == "train+valid":
        rows = rows.then(dataset.valid)
    drawn = _drawn(recipe, rows.n_rows)
    return rows if len(drawn) == rows.n_rows else rows.take(drawn)


def _drawn(recipe: Recipe, n_rows: int) -> Int64:
    """Which rows are learned from, ascending: all, or a sample."""
    if recipe.training.sample is None or recipe.training.sample >= n_rows:
        return np.arange(n_rows)
    return np.sort(np.random.default_rng(recipe.seed).permutation(n_rows)[: recipe.training.sample])


def _examples(recipe: Recipe, parts: Assembly) -> Examples:
    """Training examples; title tokens are weighed as the objective says, zero-gain edges marked for the log."""
    weight, kind, beta = None, recipe.objective.weight, recipe.objective.beta
    if kind == "position":
        weight = position_weights(parts.prompts.title_tokens.lengths, beta)
    elif kind in ("igd", "igd-linear"):
        by_gain = binary_weights if kind == "igd" else linear_weights
        each = by_gain(parts.trie, parts.counts, beta, recipe.objective.measure)
        weight = along_titles(parts.trie, each)
    return Examples(parts.windows, parts.prompts, parts.trie, weight, zero_gain(parts.trie, parts.counts))


def _learned(
    recipe: Recipe,
    model: Any,
    examples: Examples,
    counts: NDArray[np.int64],
    rejected: NDArray[np.int32] | None,
    guided: Callable[[Objective], Learned] | None,
    kept: Path,
) -> Learned:
    """What is trained; the reference of S-DPO is read from ``kept``, or computed and written there."""
    settings, contrast = recipe.objective, recipe.objective.contrast
    if rejected is not None:
        packing = recipe.training.packing and packs(model, examples)
        at_once = processes.share(recipe.training)
        reference, key = kept_reference(kept, model, examples, rejected, settings.support, at_once, packing)
        return Preferences(rejected, reference, settings.preference.beta, settings.support, key)
    temperature = settings.temperature
    ats = AdaptiveTemperature(**settings.adaptive.model_dump()) if temperature == "adaptive" else temperature
    objective = Objective(settings.support, ats, settings.normaliser, settings.expand_negatives)
    if guided is not None:
        return guided(objective)
    if settings.bear.strength:
        return Bear(objective, **settings.bear.model_dump())
    if settings.apao.strength:
        return Apao(objective, **settings.apao.model_dump())
    if settings.weight == "front-greater":
        front = front_weights(examples.trie, counts)
        late = (1 + settings.front.rarity * rarity_weights(examples.trie, counts)) / (
            1 + settings.front.rarity
        )
        course = (recipe.training.steps, recipe.training.accumulation, settings.front.curriculum)
        return FrontGreater(objective, front, late, *course)
    return Contrast(objective, **contrast.model_dump()) if contrast.strength else objective
