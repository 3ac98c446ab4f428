"""What sequential models learn: next items, masked items, and the losses on their scores.

Encoder, loss and supervision are independent choices. Supervision ``every`` puts a sequence through the model once
and takes each item after the context as a target; ``last`` has one row per prefix and one target per row.

Shape key: W windows, B rows of a batch, L places, M targets, N negatives, I items.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from triewise.arrays import padded
from triewise.errors import UserError
from triewise.models import PAD, SequentialModel

if TYPE_CHECKING:
    from triewise.settings import SequentialSettings
    from triewise.training.windows import Windows

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Sequences:
    """Windows as one padded array.

    Attributes:
        ids: int32 (W, L), item + 1, padded on the right with 0.
        n_context: int32 (W,); so many leading items are no targets.
        weight: float32 (W,); weight of the targets of a window.
    """

    ids: NDArray[np.int32]
    n_context: NDArray[np.int32]
    weight: NDArray[np.float32]

    @classmethod
    def from_windows(cls, windows: Windows, weight: NDArray[Any] | None = None) -> Sequences:
        """Pad windows; each weighs 1 where ``weight`` (W,) is None."""
        ones = np.ones(len(windows)) if weight is None else weight
        return cls(padded(windows.items), windows.n_context, ones.astype(np.float32))

    def fingerprint(self) -> str:
        """Hex SHA-256 of all that batches depend on."""
        digest = hashlib.sha256(np.array(self.ids.shape, dtype="<i8").tobytes())
        for array, dtype in ((self.ids, "<i4"), (self.n_context, "<i4"), (self.weight, "<f4")):
            digest.update(np.ascontiguousarray(array, dtype=dtype).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Task:
    """One batch: what goes in, and what is asked where.

    Attributes:
        ids: int64 (B, L) input.
        place: int64 (M,); index into the flattened (B * L) of the state that predicts a target.
        target: int64 (M,); items, 0..I-1.
        weight: float32 (M,).
        row: int64 (M,); which of the sequences a target is in.
    """

    ids: NDArray[np.int64]
    place: NDArray[np.int64]
    target: NDArray[np.int64]
    weight: NDArray[np.float32]
    row: NDArray[np.int64]


# From states (M, D), the targets they are to predict and random numbers to losses (M,).
ItemLoss = Callable[[Tensor, Task, np.random.Generator], Tensor]
# From scores of all items (M, I) and of the negatives (M, N) to what is added to the losses (M,).
Added = Callable[[Tensor, Tensor, Task], Tensor]
PAIRWISE = ("bce", "mse", "bpr")


def shifted_task(sequences: Sequences, index: NDArray[np.int64]) -> Task:
    """Each item after the context is to be told from those before it."""
    ids = _trimmed(sequences.ids[index])
    before, after = ids[:, :-1], ids[:, 1:]
    ask: Bools = (np.arange(1, ids.shape[1]) >= sequences.n_context[index][:, None]) & (after != PAD)
    return _task(sequences, index, before, ask, after)


def cloze_task(
    sequences: Sequences,
    index: NDArray[np.int64],
    settings: SequentialSettings,
    mask: int,
    rng: np.random.Generator,
) -> Task:
    """Items at some places of a sequence are to be told from all others (BERT4Rec, arXiv:1904.06690).

    Of the chosen places 80 % show the mask, 10 % a random item, 10 % the item itself; a sequence has at least one.
    A share ``mask_last`` of the sequences is cut behind a random item, which shows the mask.
    """
    ids = _trimmed(sequences.ids[index])
    n_rows, n_places = ids.shape
    place = np.arange(n_places)
    length = np.count_nonzero(ids, axis=1)
    cut: Bools = np.less(rng.random(n_rows), settings.mask_last)
    # A place before the first target is never the one that is asked for.
    last = rng.integers(np.minimum(sequences.n_context[index], length - 1), length)
    ids[cut[:, None] & (place > last[:, None])] = PAD
    draw = rng.random(ids.shape) + 2.0 * (ids == PAD)
    chosen = (draw < settings.mask_probability) | (place == draw.argmin(1)[:, None])
    ask: Bools = np.where(cut[:, None], place == last[:, None], chosen)
    kind = np.where(cut[:, None], 0.0, rng.random(ids.shape))
    shown = np.where(kind < 0.8, mask, np.where(kind < 0.9, rng.integers(1, mask, ids.shape), ids))
    return _task(sequences, index, np.where(ask, shown, ids), ask, ids)


def draw_negatives(
    task: Task, n: int, n_items: int, outside: str, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Items (M, N) that are not the target, and with ``outside = "history"`` none of those before it.

    Raises:
        UserError: A history and its target are all items there are.
    """
    if outside == "target":
        drawn = rng.integers(n_items - 1, size=(len(task.target), n))
        return drawn + (drawn >= task.target[:, None])
    row, last = np.divmod(task.place, task.ids.shape[1])
    before = np.where(np.arange(task.ids.shape[1]) <= last[:, None], task.ids[row], PAD) - 1
    taken = np.sort(np.concatenate([before, task.target[:, None]], axis=1), axis=1)
    taken[:, 1:][taken[:, 1:] == taken[:, :-1]] = -1
    taken = np.sort(np.where(taken < 0, n_items, taken), axis=1)
    left = (n_items - (taken < n_items).sum(1))[:, None]
    if not left.all():
        raise UserError(
            f"wanted an item outside a history to draw as a negative, got a history of all {n_items} items; set "
            "sequential.negatives_outside = 'target'"
        )
    drawn = rng.integers(left, size=(len(left), n))
    for item in taken.T:  # ascending: a draw is counted past each item that is taken
        drawn += drawn >= item[:, None]
    return drawn


def pairwise(kind: str, positive: Tensor, negative: Tensor) -> Tensor:
    """Losses (M,) of a target's score (M,) against those of negatives (M, N), a mean over N where there are several.

    ``bce``: ``(-ln sigmoid(s_t) - ln(1 - sigmoid(s_n))) / 2`` (SASRec, arXiv:1808.09781, Eq. 6); ``mse``:
    ``((s_t - 1)^2 + s_n^2) / 2``: as the code of DROS and DLLM2Rec, means over positives and negatives together, so
    that their weights of what is added to them are ours. ``bpr``: ``-ln sigmoid(s_t - s_n)``.
    """
    if kind == "bpr":
        return F.softplus(negative - positive[:, None]).mean(1)
    if kind == "mse":
        return ((positive - 1).square() + negative.square().mean(1)) / 2
    return (F.softplus(-positive) + F.softplus(negative).mean(1)) / 2


def sampled_softmax(positive: Tensor, negative: Tensor, is_target: Tensor) -> Tensor:
    """Losses (M,) ``-ln( e^s_t / (e^s_t + sum_n e^s_n) )``; negatives that are a row's target are left out of its sum.

    Args:
        positive: Scores of the targets (M,).
        negative: Scores of the negatives (M, N), the same items for all rows.
        is_target: bool (M, N).

    Source: LLM-CF's code.
    """
    against = negative.masked_fill(is_target, -torch.inf)
    return torch.cat([positive[:, None], against], dim=1).logsumexp(1) - positive


def dros(scores: Tensor, target: Tensor, propensity: Tensor, beta0: float = 1.0) -> Tensor:
    """The distributionally robust term (M,) of DROS.

    ``ln( sum_i exp(p_i y_i^2 / b) - exp(p_t y_t^2 / b) + exp(p_t (y_t - 1)^2 / b) )`` with scores y, target t,
    propensities p and b = ``beta0``. Source: arXiv:2208.10879 and its code. Differs from the code: the sum is a
    log-sum-exp in which the target's term is put in its place, so large scores do not overflow.

    Args:
        scores: (M, I), any size.
        target: int64 (M,).
        propensity: (I,) of `propensities`.
        beta0: > 0.
    """
    at = target[:, None]
    terms = propensity * scores.square() / beta0
    own = propensity[at] * (scores.gather(1, at) - 1).square() / beta0
    return terms.scatter(1, at, own).logsumexp(1)


def propensities(counts: NDArray[np.int64]) -> NDArray[np.float32]:
    """``((c_i + 1) / sum_j (c_j + 1))^0.05`` (I,), as in the authors' code of DROS."""
    smooth = counts.astype(np.float64) + 1
    weight: NDArray[np.float64] = (smooth / smooth.sum()) ** 0.05
    return weight.astype(np.float32)


def item_loss(
    model: SequentialModel,
    settings: SequentialSettings,
    counts: NDArray[np.int64],
    added: Added | None = None,
) -> ItemLoss:
    """The loss that ``[sequential]`` asks for, DROS on top.

    Args:
        model: Gives the scores.
        settings: Which loss, and what it needs. With ``bpr`` it sees ``elu(s) + 1`` of all scores, as DROS's code.
        counts: (I,) training targets of each item, for `propensities`.
        added: What else is added, from the scores and those of the negatives; with a loss over all items the
            negatives are drawn for it alone.
    """
    propensity = torch.from_numpy(propensities(counts)).to(model.bias.device)
    alpha, pairs = settings.dros_alpha, settings.loss in PAIRWISE

    def loss(states: Tensor, task: Task, rng: np.random.Generator) -> Tensor:
        target = torch.from_numpy(task.target).to(states.device)
        items = target[:, None]
        if pairs or added is not None:
            drawn = draw_negatives(task, settings.negatives, model.n_items, settings.negatives_outside, rng)
            items = torch.cat([items, torch.from_numpy(drawn).to(states.device)], dim=1)
        if pairs and not alpha and added is None:
            some = _shown(model.scores_of(states, items))
            return pairwise(settings.loss, some[:, 0], some[:, 1:])
        if settings.loss == "sampled":
            shared = sampled(states, target, rng)
            if not alpha and added is None:
                return shared
        scores = _shown(model.scores(states))
        some = scores.gather(1, items)
        if pairs:
            total = pairwise(settings.loss, some[:, 0], some[:, 1:])
        elif settings.loss == "sampled":
            total = shared
        else:
            total = F.cross_entropy(
                scores, target, reduction="none", label_smoothing=settings.label_smoothing
            )
        if alpha:
            total = total + alpha * dros(scores, target, propensity, settings.dros_beta0)
        return total if added is None else total + added(scores, some[:, 1:], task)

    def sampled(states: Tensor, target: Tensor, rng: np.random.Generator) -> Tensor:
        n = min(settings.negatives, model.n_items)
        drawn = torch.from_numpy(rng.choice(model.n_items, n, replace=False)).to(states.device)
        negative = F.linear(states, model.weight[drawn], model.bias[drawn])
        own = model.scores_of(states, target[:, None])[:, 0]
        return sampled_softmax(own, negative, target[:, None] == drawn)

    def _shown(scores: Tensor) -> Tensor:
        return F.elu(scores) + 1 if settings.loss == "bpr" else scores

    return loss


def task_loss(model: SequentialModel, task: Task, loss: ItemLoss, rng: np.random.Generator) -> Tensor:
    """Weighted mean of a loss over the targets of a batch; only their states are scored."""
    device = model.bias.device
    place, weight = (torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in (task.place, task.weight))
    states = model(torch.from_numpy(task.ids).to(device)).flatten(0, 1)[place]
    # A batch of rows that weigh nothing, or without a target, costs nothing.
    total = (weight * loss(states, task, rng)).sum()
    return total / weight.sum().clamp(min=torch.finfo(weight.dtype).tiny)


def _task(
    sequences: Sequences,
    index: NDArray[np.int64],
    shown: NDArray[np.int64],
    ask: Bools,
    wanted: NDArray[np.int64],
) -> Task:
    """A batch that asks at some places (B, L) of what is shown for the items that are wanted there."""
    row = np.broadcast_to(index[:, None], ask.shape)[ask]
    return Task(shown, np.flatnonzero(ask), wanted[ask] - 1, sequences.weight[row], row)


def _trimmed(ids: NDArray[np.int32]) -> NDArray[np.int64]:
    """Without the columns that are padding in every row."""
    return ids[:, : max(int((ids != PAD).sum(1).max(initial=0)), 2)].astype(np.int64)
