"""DLLM2Rec: what a sequential student learns from the rankings of a teacher, beside the targets.

A teacher is a folder of ``triewise teach``: the best K items for each training row, how far each is behind the first
one, and a vector for each item.

Shape key: R training rows, M targets of a batch, N negatives, K places of a ranking, I items, Z of a teacher's vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from triewise.errors import UserError, reading
from triewise.files import Hashed, atomic_path, check_files, read_json
from triewise.training.item_tasks import Added, Task, dros, propensities

if TYPE_CHECKING:
    from triewise.arrays import Float32, Int32, Int64
    from triewise.settings import DistilSettings, SequentialSettings

TEACHER, VECTORS = "teacher.json", "vectors.npy"
LEAST = 1e-8  # of a weight by distance or consistency, as in the authors' code


class TeacherFile(Hashed):
    """What is read of ``teacher.json``."""

    status: str
    run: str
    trained_on: str
    k: int
    rows: int
    rows_of_a_part: int
    hashes: dict[str, str]


@dataclass(frozen=True)
class Teacher:
    """What a model says of the training rows.

    Attributes:
        items: int32 (R, K), best first, -1 where the ranking is shorter.
        distances: float32 (R, K), >= 0: how far behind the first; nats of a language model.
        vectors: float32 (I, Z).
        facts: Content of ``teacher.json``.
    """

    items: Int32
    distances: Float32
    vectors: Float32
    facts: dict[str, Any]

    @classmethod
    def load(cls, folder: Path) -> Teacher:
        """Read a folder.

        Raises:
            UserError: It is no teacher, or not whole.
        """
        facts = read_json(folder / TEACHER, TeacherFile)
        if facts["status"] != "taught":
            raise UserError(
                f"the teacher in {folder} has not ranked all rows; go on with: triewise teach {facts['run']} --out "
                f"{folder}"
            )
        check_files(folder, facts.get("sha256"), "teach again into another --out")
        parts = []
        for row in range(0, facts["rows"], facts["rows_of_a_part"]):
            with reading(part_path(folder, row)), np.load(part_path(folder, row)) as part:
                parts.append((part["items"], part["distances"]))
        with reading(folder):
            items, distances = map(np.concatenate, zip(*parts, strict=True))
            return cls(items, distances, np.load(folder / VECTORS), facts)


def part_path(folder: Path, row: int) -> Path:
    """The file with the rankings from a row on."""
    return folder / f"rankings-{row:09d}.npz"


def write_part(folder: Path, row: int, items: Int32, distances: Float32) -> None:
    """Write the rankings (n, K) of rows from ``row`` on; the file is whole or absent."""
    with atomic_path(part_path(folder, row)) as temporary, temporary.open("wb") as file:
        np.savez(file, items=items, distances=distances)


def teacher_weights(scores: Tensor, items: Tensor, distances: Tensor, settings: DistilSettings) -> Tensor:
    """How much each place of the teacher's rankings counts for a student, (M, K), each row sums to 1; no gradient.

    The sum, times the gammas, of weights by place r = 1, ..., K (``exp(-r / scale)``) and by distance (``exp(-d)``),
    both divided by their sums, and by consistency: 1 where the item is among the student's own best K.

    Args:
        scores: (M, I) of the student.
        items: int64 (M, K); -1 counts nothing.
        distances: (M, K).
        settings: The gammas and the scale.

    Source: DLLM2Rec and its code, where the distance is one number for each candidate; the paper's is one for each
    row, between what the teacher wrote and the target.
    """
    with torch.no_grad():
        k, real = items.shape[1], items >= 0
        place = torch.arange(1, k + 1, dtype=scores.dtype, device=scores.device)
        by_place = (-place / settings.position_scale).softmax(0).expand_as(items)
        by_distance = (-distances.to(scores.dtype)).exp() + LEAST
        by_distance = by_distance / by_distance.sum(1, keepdim=True)
        own = scores.topk(min(k, scores.shape[1]), dim=1).indices
        agrees = (items[:, :, None] == own[:, None, :]).any(2).to(scores.dtype) + LEAST
        weight = settings.gamma_position * by_place + settings.gamma_confidence * by_distance
        weight = (weight + settings.gamma_consistency * agrees) * real
        return weight / weight.sum(1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)


def distilled(
    items: Int32, distances: Float32, settings: DistilSettings, sequential: SequentialSettings, counts: Int64
) -> Added:
    """What a student's loss gets on top: its scores are to be high at the teacher's items, and low at the negatives.

    ``lam sum_k w_k (-ln sigmoid(s_k) - ln(1 - sigmoid(s_n)) + alpha DROS_k)`` with the weights of `teacher_weights`,
    the negatives of the row's own loss for all k, and DROS with the teacher's item as target. As in the authors' code
    this is a whole sum where the row's own BCE is half of one.

    Args:
        items: (W, K) of the windows that are trained on, -1 padded.
        distances: (W, K).
        settings: ``[enhance]``.
        sequential: Has alpha and beta0 of DROS.
        counts: (I,) training targets, for its propensities.

    Source: DLLM2Rec. Its code has ``-ln sigmoid(1 - s_n)`` for the negative (``negative = "coded"``) and the product of
    the batch's mean weight and mean DROS (``dros_rows = "crossed"``: an outer product by accident).
    """
    # An unused place has distance infinity and the item -1.
    all_items, all_distances = torch.from_numpy(items.astype(np.int64)), torch.from_numpy(distances)
    propensity, alpha = torch.from_numpy(propensities(counts)), sequential.dros_alpha

    def added(scores: Tensor, negative: Tensor, task: Task) -> Tensor:
        row = torch.from_numpy(np.ascontiguousarray(task.row))
        theirs, far = all_items[row].to(scores.device), all_distances[row].to(scores.device)
        weight, theirs = teacher_weights(scores, theirs, far, settings), theirs.clamp(min=0)
        against = F.softplus(negative - 1 if settings.negative == "coded" else negative).mean(1)
        loss = weight * (F.softplus(-scores.gather(1, theirs)) + against[:, None])
        if alpha:
            p = propensity.to(scores.device)
            robust = [dros(scores, target, p, sequential.dros_beta0) for target in theirs.T]
            shared = weight.mean(0, keepdim=True) if settings.dros_rows == "crossed" else weight
            loss = loss + alpha * shared * torch.stack(robust, dim=1)
        total: Tensor = settings.lam * loss.sum(1)
        return total

    return added
