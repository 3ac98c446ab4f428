"""Training of a sequential model on whole users' sequences.

A run leaves the same log, checkpoints and best weights as `trainer.train`, and a resumed one ends with the weights
of an uninterrupted one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from triewise.errors import UserError
from triewise.training import processes
from triewise.training.checkpoints import (
    load_state,
    random_file,
    random_state,
    seed_others,
    set_random_state,
)
from triewise.training.item_tasks import (
    ItemLoss,
    Sequences,
    Task,
    cloze_task,
    item_loss,
    shifted_task,
    task_loss,
)
from triewise.training.rates import floor_cosine
from triewise.training.state import TrainingState, TrainResult, Validate, Watch
from triewise.training.windows import batch_order

if TYPE_CHECKING:
    from triewise.models import SequentialModel
    from triewise.settings import SequentialSettings, TrainingSettings

# What of [sequential] a checkpoint is of, beside the encoder; "base" is ``loss``.
_OF_THE_LOSS = (
    *("negatives", "label_smoothing", "mask_probability", "mask_last", "dros_alpha", "dros_beta0"),
    "optimizer",
)
_ADDED = {"negatives_outside": "target"}  # later keys, and what was done before


def fit(
    model: SequentialModel,
    sequences: Sequences,
    counts: NDArray[np.int64],
    sequential: SequentialSettings,
    settings: TrainingSettings,
    out: Path,
    *,
    seed: int = 0,
    loss: ItemLoss | None = None,
    validate: Validate | None = None,
    resume: bool = False,
    title: str = "",
    watch: Watch | None = None,
    facts: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Train ``model`` in place; of several processes each takes a part of every batch.

    Arguments that are not named here are as of `trainer.train`.

    ``counts`` (I,) are the training targets of each item, for DROS; ``sequential`` says which loss and optimiser. What
    of ``settings`` only a language model has a use for has no meaning here. ``loss`` takes the place of
    `item_tasks.item_loss`; a checkpoint does not tell one from the other.

    Raises:
        UserError: As of `trainer.train`; a loss that does not go with the encoder.
    """
    if (sequential.loss == "cloze") != model.bidirectional:
        fitting = "cloze" if model.bidirectional else "cross-entropy or bce"
        raise UserError(f"wanted the loss {fitting} for {model.settings.encoder}, got {sequential.loss!r}")
    later: dict[str, Any] = {key: v for key, old in _ADDED.items() if (v := getattr(sequential, key)) != old}
    if sequential.loss == "bce":
        later["scale"] = 0.5  # it was 1
    learned = {
        "encoder": model.config,
        "loss": {"base": sequential.loss} | sequential.model_dump(include=set(_OF_THE_LOSS)) | later,
        "sequences": sequences.fingerprint(),
    }
    state = TrainingState(model, model.bias.device, learned, settings, seed, out, validate)
    loss = item_loss(model, sequential, counts) if loss is None else loss
    steps = _Steps(model, sequences, sequential, loss, state)
    return state.conduct(steps.go_on, steps.take, resume, title, watch, facts)


def learning_rate(settings: TrainingSettings, step: int) -> float:
    """The rate of a step (the first is 0): linear warm-up, then constant, or down to 0 in a line or half a wave."""
    if settings.schedule == "cosine-floor":
        return settings.learning_rate * floor_cosine(step, settings.steps, settings.warmup_steps)
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / (settings.warmup_steps + 1)
    share = (step - settings.warmup_steps) / max(settings.steps - settings.warmup_steps, 1)
    left = {"constant": 1.0, "linear": 1 - share, "cosine": 0.5 + 0.5 * math.cos(math.pi * share)}
    return settings.learning_rate * left[settings.schedule]


class _Steps:
    """The steps of one run, and what of them a checkpoint keeps."""

    def __init__(
        self,
        model: SequentialModel,
        sequences: Sequences,
        sequential: SequentialSettings,
        loss: ItemLoss,
        state: TrainingState,
    ) -> None:
        self.model, self.sequences, self.sequential, self.loss = model, sequences, sequential, loss
        self.state, self.settings = state, state.settings
        self.optimizer = _optimizer(model, sequential.optimizer, state.settings)
        self.sums = torch.zeros(2, device=state.device)  # loss and gradient norm since the last row
        self.summed = 0
        torch.manual_seed(state.seed)
        seed_others(state.seed, 0)

    def take(self, advance: Callable[..., None]) -> None:
        """All steps that are left."""
        state, settings = self.state, self.settings
        order = batch_order(len(self.sequences.ids), settings.batch_size, settings.steps, state.seed)
        detail = ""
        while state.stopped is None:
            self.one(order[state.step])
            state.check_stop(state.step + 1)
            if state.stopped or state.logs_at(state.step):
                detail = self.log()
            if state.validates_at(state.step):
                state.validate()
            if state.saves:
                self.save()
            advance(1, detail)

    def one(self, index: NDArray[np.int64]) -> None:
        """One step of the optimiser; what is drawn for it depends on the seed and its number alone."""
        ours = [processes.rank()] if processes.count() > 1 else []
        rng = np.random.default_rng([self.state.seed, 1, self.state.step, *ours])
        index = processes.part(index[None])[0]
        tasks = [self.task(rows, rng) for rows in self.micro_batches(index)]
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, self.state.step)
        weights = [float(task.weight.sum()) for task in tasks]
        total = sum(weight for (weight,) in processes.gather([sum(weights)]))
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for task, weight in zip(tasks, weights, strict=True):
            loss = task_loss(self.model, task, self.loss, rng)
            if len(tasks) * processes.count() > 1:  # a mean over the targets of all
                loss = loss * (weight / max(total, 1e-30))
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        loss = torch.stack(losses).sum()
        processes.add_up([loss, *(p.grad for p in self.model.parameters() if p.grad is not None)])
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm)
        self.optimizer.step()
        self.sums += torch.stack([loss, norm.detach()])
        self.summed += 1

    def micro_batches(self, index: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """The rows of a step in ``accumulation`` parts; of several, rows of like length share one and pad less."""
        if self.settings.accumulation == 1:
            return [index]
        by_length = np.argsort(np.count_nonzero(self.sequences.ids[index], axis=1), kind="stable")
        return np.array_split(index[by_length], self.settings.accumulation)

    def task(self, index: NDArray[np.int64], rng: np.random.Generator) -> Task:
        """What some rows are asked."""
        if self.model.bidirectional:
            return cloze_task(self.sequences, index, self.sequential, self.model.mask, rng)
        return shifted_task(self.sequences, index)

    def save(self) -> None:
        """Write a checkpoint."""
        random_states = processes.gather_objects(random_state(self.state.device))
        files = {"optimizer.pt": self.optimizer.state_dict()}
        files |= {random_file(i): numbers for i, numbers in enumerate(random_states)}
        sums = {"sums": self.sums.tolist(), "summed": self.summed}
        processes.on_first(lambda: self.state.save(sums, files))

    def log(self) -> str:
        """Write a row about the steps since the last one; what the progress line says."""
        loss, norm = (self.sums / max(self.summed, 1)).tolist()
        step = self.state.step
        rate = learning_rate(self.settings, step - 1)
        epoch = step * self.settings.batch_size / len(self.sequences.ids)
        row = {"step": step, "loss": loss, "learning_rate": rate, "grad_norm": norm, "epoch": epoch}
        self.state.write_row(row | {"seconds": self.state.seconds})
        self.sums.zero_()
        self.summed = 0
        return f"loss {loss:.3f}"

    def go_on(self, checkpoint: Path) -> None:
        """Continue from a checkpoint."""

        def take(state: dict[str, Any]) -> None:
            self.sums.copy_(torch.tensor(state["sums"]))
            self.summed = int(state["summed"])

        self.state.resume(checkpoint, take)
        load_state(checkpoint / "optimizer.pt", self.optimizer.load_state_dict)
        if (file := checkpoint / random_file(processes.rank())).is_file():
            load_state(file, functools.partial(set_random_state, device=self.state.device))
        else:
            seed_others(self.state.seed, self.state.step)


def _optimizer(model: SequentialModel, name: str, settings: TrainingSettings) -> torch.optim.Optimizer:
    """AdamW without decay of norms and biases, or Adam with an L2 term on everything."""
    parameters, decay = list(model.parameters()), settings.weight_decay
    if name == "adam":
        return torch.optim.Adam(parameters, lr=settings.learning_rate, weight_decay=decay)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate)
