"""What another run adds to an objective: the soft targets of a teacher, or the rewards of Flower."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from triewise.app.folders import consented, open_partner
from triewise.decoding import TrieEngine, sample
from triewise.files import sha256_file
from triewise.progress import note
from triewise.recommenders import TitleTeacher, load
from triewise.training import Flow, Learned, Objective, SoftTargets, TreeTargets, history_prior

if TYPE_CHECKING:
    from triewise.app.assemble import Assembly
    from triewise.arrays import Float64, Int32
    from triewise.data import Dataset, Split
    from triewise.recipe import Recipe


def guide_of(
    recipe: Recipe, dataset: Dataset, parts: Assembly, rows: Split
) -> Callable[[Objective], Learned] | None:
    """What makes of an objective what a recipe says is learned with another run; None where it names nothing.

    Args:
        recipe: Says which run.
        dataset: What that run has to have learned from.
        parts: What is trained.
        rows: The training rows, for the prior of Flower.
    """
    objective, flow = recipe.objective, recipe.objective.flow
    if objective.soft_targets is not None:
        teacher, key = _teacher(recipe, dataset, objective.soft_targets)
        numbers = (objective.soft_alpha, objective.soft_temperature, objective.soft_form, key)
        if objective.soft_scope == "tree":
            return lambda plain: TreeTargets(plain, teacher, *numbers, share=objective.soft_share)
        return lambda plain: SoftTargets(plain, teacher, *numbers)
    if flow is None:
        return None
    prior = _prior(dataset, parts, rows)
    scores = (None, "") if flow.scores is None else _teacher(recipe, dataset, flow.scores)
    draw = functools.partial(_draw, TrieEngine(parts.backbone.model, parts.trie), parts.autocast)
    return lambda plain: Flow(plain, flow, recipe.training, prior, draw, scores[0], recipe.seed, scores[1])


def _prior(dataset: Dataset, parts: Assembly, rows: Split) -> Float64:
    """`history_prior` of training rows, with a line on the targets that are in no history."""
    counts = np.bincount(rows.history.values, minlength=dataset.catalog.n_items)
    unseen = parts.trie.subtree_count(counts)[parts.trie.leaf] == 0
    targets, lost = np.flatnonzero(parts.counts), np.flatnonzero(unseen & (parts.counts > 0))
    if len(lost):
        note(
            f"objective.flow: {len(lost)} of {len(targets)} titles that are targets stand in no history, such as "
            f"{dataset.catalog.title[lost[0]]!r}; their reward is that of leaving the histories, exp(-15)"
        )
    return history_prior(parts.trie, counts)


def _draw(engine: TrieEngine, autocast: bool, prompts: Sequence[list[int]], uniform: Float64) -> Int32:
    """`sample` from a model that is trained, without its dropout and in the dtype of its training."""
    model = engine.model
    was = model.training
    model.eval()
    try:
        with torch.autocast(engine.device.type, torch.bfloat16, enabled=autocast):
            return sample(engine, prompts, uniform)
    finally:
        model.train(was)


def _teacher(recipe: Recipe, dataset: Dataset, run: Path) -> tuple[TitleTeacher, str]:
    """A run that says how likely titles are, and the hash of its weights; UserError where it is none of these rows."""
    theirs = open_partner(run, "the teacher", recipe, dataset)
    trust = consented(theirs, recipe.backbone.trust_remote_code, run)
    teacher = load(run, assistant=False, trust_remote_code=trust)
    weights = sorted((run / "model").glob("*.safetensors"))
    return TitleTeacher(teacher), " ".join(sha256_file(file) for file in weights)
