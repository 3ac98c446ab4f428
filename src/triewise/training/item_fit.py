"""Training of a sequential model on whole users' sequences.

A run leaves the same log, checkpoints and best weights as `trainer.train`, and a resumed one ends with the weights
of an uninterrupted one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from triewise.errors import UserError
from triewise.models import SequentialModel
from triewise.progress import progress
from triewise.training.checkpoints import clear, random_state, set_random_state, signals_set
from triewise.training.item_tasks import (
    LOSSES,
    LossConfig,
    Sequences,
    cloze_task,
    propensities,
    shifted_task,
    task_loss,
)
from triewise.training.state import Course, TrainConfig, TrainResult, Validate
from triewise.training.windows import schedule


def fit(
    model: SequentialModel,
    sequences: Sequences,
    counts: NDArray[np.int64],
    loss: LossConfig,
    config: TrainConfig,
    out: Path,
    *,
    validate: Validate | None = None,
    resume: bool = False,
    title: str = "",
) -> TrainResult:
    """Train ``model`` in place; the weights it ends with are the best validation's, or the last ones.

    A first Ctrl-C or SIGTERM finishes the step, writes a checkpoint and returns; a second one acts at once. It is for
    one process; a recipe refuses several.

    Args:
        model: On its device.
        sequences: What is learned from.
        counts: (I,) training targets of each item, for `propensities`.
        loss: What is minimised.
        config: Budget and optimiser; ``accumulation`` and ``log_parts`` have no meaning here.
        out: Folder for the log, checkpoints and best weights.
        validate: From the model to metrics; called every ``evaluate_every`` steps.
        resume: Go on from the newest whole checkpoint in ``out``, or from the start where there is none.
        title: What the progress line calls this run.

    Raises:
        UserError: A loss that does not go with the encoder, ``evaluate_every`` without ``validate``, a checkpoint
            of another run, a metric that ``validate`` does not give, or a loss that is not finite.
    """
    if loss.base not in LOSSES or (loss.base == "cloze") != model.bidirectional:
        fitting = "cloze" if model.bidirectional else "cross-entropy or bce"
        raise UserError(f"wanted the loss {fitting} for {model.config.kind}, got {loss.base!r}")
    config.check_validate(validate)
    checkpoint = clear(out, resume)
    run = _Fit(model, sequences, counts, loss, config, Course(config, out, validate))
    if checkpoint is not None:
        run.take_up(checkpoint)
    if run.course.stopped is None:
        left = config.steps - run.step
        with signals_set(run.course.asked_to_stop), progress(title or "training", left, "steps") as advance:
            run.run(advance)
    return run.course.result(model, run.step, run.course.seconds)


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of a step (the first is 0): linear warm-up, then constant, or down to 0 in a line or half a wave."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    share = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    left = {"constant": 1.0, "linear": 1 - share, "cosine": 0.5 + 0.5 * math.cos(math.pi * share)}
    return config.learning_rate * left[config.schedule]


class _Fit:
    """The state of one training run."""

    def __init__(
        self,
        model: SequentialModel,
        sequences: Sequences,
        counts: NDArray[np.int64],
        loss: LossConfig,
        config: TrainConfig,
        course: Course,
    ) -> None:
        self.model, self.sequences, self.loss = model, sequences, loss
        self.config, self.course = config, course
        self.device = model.bias.device
        self.propensity = torch.from_numpy(propensities(counts)).to(self.device) if loss.dros_alpha else None
        self.optimizer = _optimizer(model, loss.optimizer, config)
        self.step = 0
        self.sums = torch.zeros(2, device=self.device)  # loss and gradient norm since the last row
        self.summed = 0
        torch.manual_seed(config.seed)

    def run(self, advance: Callable[..., None]) -> None:
        """All steps that are left."""
        config, course = self.config, self.course
        order = schedule(len(self.sequences.ids), config.batch_size, config.steps, config.seed)
        detail = ""
        while course.stopped is None:
            self.one_step(order[self.step])
            self.step += 1
            course.see(self.step)
            if course.stopped or course.logs_at(self.step):
                detail = self.log()
            if course.validates_at(self.step):
                course.judge(self.model, self.step, self.device)
            if course.saves_at(self.step):
                self.save()
            advance(1, detail)
        if course.judges_late(self.step):
            course.judge(self.model, self.step, self.device)

    def one_step(self, index: NDArray[np.int64]) -> None:
        """One step of the optimiser; what is drawn for it depends on the seed and its number alone."""
        rng = np.random.default_rng([self.config.seed, 1, self.step])
        if self.model.bidirectional:
            task = cloze_task(self.sequences, index, self.loss, self.model.config.mask, rng)
        else:
            task = shifted_task(self.sequences, index)
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        loss = task_loss(self.model, task, self.loss, self.propensity, rng)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.sums += torch.stack([loss.detach(), norm.detach()])
        self.summed += 1

    def log(self) -> str:
        """Write a row about the steps since the last one; what the progress line says."""
        loss, norm = (self.sums / max(self.summed, 1)).tolist()
        rate = learning_rate(self.config, self.step - 1)
        epoch = self.step * self.config.batch_size / len(self.sequences.ids)
        row = {"step": self.step, "loss": loss, "learning_rate": rate, "grad_norm": norm, "epoch": epoch}
        self.course.write_row(row | {"seconds": self.course.seconds})
        self.sums.zero_()
        self.summed = 0
        return f"loss {loss:.3f}"

    def learned(self) -> dict[str, Any]:
        """What a checkpoint is of; a run with anything else cannot go on from it."""
        data = self.sequences.fingerprint()
        return {"encoder": asdict(self.model.config), "loss": asdict(self.loss), "sequences": data}

    def save(self) -> None:
        """Write a checkpoint."""
        state = {"sums": self.sums.tolist(), "summed": self.summed}
        files = {"optimizer.pt": self.optimizer.state_dict(), "rng.pt": random_state(self.device)}
        self.course.save(self.model, self.step, self.learned(), state, files)

    def take_up(self, checkpoint: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            UserError: The checkpoint is of another run.
        """
        state = self.course.take_up(self.model, checkpoint, self.learned())
        self.step, self.summed = int(state["step"]), state["summed"]
        self.sums = torch.tensor(state["sums"], device=self.device)
        load = functools.partial(torch.load, map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(load(checkpoint / "optimizer.pt"))
        set_random_state(load(checkpoint / "rng.pt"), self.device)


def _optimizer(model: SequentialModel, name: str, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW without decay of norms and biases, or Adam with an L2 term on everything."""
    parameters = list(model.parameters())
    if name == "adam":
        return torch.optim.Adam(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    flat = [p for p in parameters if p.dim() < 2]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": flat, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate)
