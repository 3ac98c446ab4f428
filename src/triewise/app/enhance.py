"""What a language model adds to a sequential run, before it is trained: ``[enhance]`` of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from triewise.data import Dataset, data_hash
from triewise.errors import UserError
from triewise.files import sha256_file
from triewise.training import TEACHER, ItemLoss, Teacher, distilled, item_loss

if TYPE_CHECKING:
    from triewise.arrays import Int64
    from triewise.models import SequentialModel
    from triewise.recipe import Recipe
    from triewise.settings import DistilSettings


@dataclass(frozen=True)
class Enhancement:
    """What a sequential run gets from elsewhere; a plain one gets nothing.

    Attributes:
        vectors: float32 (I, Z) at the input, see `triewise.models.SequentialModel`; None: none.
        vector_weight: What they count.
        loss: From the model and the training targets (I,) of each item to its loss; None: as ``[sequential]`` says.
        hashes: Hex SHA-256 of what came from elsewhere, for ``run.json``.
    """

    vectors: Tensor | None = None
    vector_weight: float = 0.0
    loss: Callable[[SequentialModel, Int64], ItemLoss] | None = None
    hashes: dict[str, str] = field(default_factory=dict)


def enhancement_of(recipe: Recipe, dataset: Dataset, rows: Int64) -> Enhancement:
    """What ``[enhance]`` says; ``rows`` (W,) are the training rows that the windows are of."""
    settings, sequential = recipe.enhance, recipe.sequential
    if settings is None or sequential is None:
        return Enhancement()
    teacher = _teacher(settings, dataset)
    items, distances = teacher.items[rows, : settings.top], teacher.distances[rows, : settings.top]

    def loss(model: SequentialModel, counts: Int64) -> ItemLoss:
        return item_loss(model, sequential, counts, distilled(items, distances, settings, sequential, counts))

    vectors = torch.from_numpy(teacher.vectors) if settings.ed_weight else None
    known = {"teacher": sha256_file(settings.teacher / TEACHER)}
    return Enhancement(vectors, settings.ed_weight, loss if settings.lam else None, known)


def teacher_hashes(dataset: Dataset) -> dict[str, str]:
    """Hex SHA-256 of what a teacher and its student have in common."""
    files = dataset.info["sha256"]
    return {"data": data_hash(dataset), "catalogue": files["catalog.parquet"], "rows": files["train.parquet"]}


def _teacher(settings: DistilSettings, dataset: Dataset) -> Teacher:
    """The teacher of a student; UserError where it does not belong to its data, or looked at validation rows."""
    teacher = Teacher.load(settings.teacher)
    for part, wanted in teacher_hashes(dataset).items():
        if teacher.facts["hashes"].get(part) != wanted:
            raise UserError(
                f"the {part} of the teacher {settings.teacher} is not that of {dataset.folder}; give both the same "
                "data, split and data.max_history"
            )
    if teacher.facts["trained_on"] != "train":
        raise UserError(
            f"the teacher {settings.teacher} was trained on the validation rows, by which its student is chosen; give "
            "one trained on train"
        )
    if teacher.facts["k"] < settings.top:
        raise UserError(
            f"wanted enhance.top of at most {teacher.facts['k']}, the places of {settings.teacher}, got "
            f"{settings.top}; teach with -k {settings.top}"
        )
    return teacher
