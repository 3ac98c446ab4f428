"""How far a training run has come: its budget, log, best validation and checkpoints, and what ends it.

A run folder holds, while training, ``log.jsonl`` (one JSON object a line), ``checkpoint-N/`` (whole or absent) and
``best/`` (the weights with the best validation metric). What is learned, language model or encoder of items, is
no business of this room; in several processes the first one writes and validates, and all know the outcome.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from triewise.errors import UserError
from triewise.files import atomic_folder, read_json, write_json
from triewise.models import load_trained, save_trained
from triewise.training import processes
from triewise.training.checkpoints import (
    BEST,
    BEST_WEIGHTS,
    LOG,
    STATE,
    WEIGHTS,
    checkpoints,
    keep_best,
    link,
    random_state,
    remove,
    restore_folder,
    set_random_state,
)

SCHEDULES = ("linear", "cosine", "constant")
ORDERS = ("rows", "chains")


# A resumed run may change these: they decide when to look, when to stop and what memory it takes, not what is computed.
FREE = (
    *("log_every", "log_parts", "checkpoint_every", "keep_checkpoints", "patience", "time_limit_s"),
    "gradient_checkpointing",
)
Validate = Callable[[Any], Mapping[str, float]]


@dataclass(frozen=True)
class TrainConfig:
    """The budget and the optimiser (torch's AdamW; no weight decay on norms and biases).

    Attributes:
        steps: Optimiser steps of the whole run.
        learning_rate: Peak, after the warm-up.
        batch_size: Windows of one optimiser step.
        accumulation: Micro-batches of one step; changes memory and padding, not the gradient.
        warmup_steps: Steps of linear warm-up.
        schedule: ``linear`` (to 0), ``cosine`` (to 0) or ``constant`` after the warm-up.
        weight_decay: Of AdamW.
        max_grad_norm: Gradients are scaled down to this norm.
        log_every: Steps between rows of the log.
        log_parts: Whether rows of the log have both parts of the language-modelling loss at their step and the
            norms of their gradients (`objective.measure_parts`), null at a stop nobody could foresee. It costs a
            forward and two backward passes per row and changes nothing in what is learned.
        evaluate_every: Steps between validations, and one after the last step; 0: never.
        checkpoint_every: Steps between checkpoints, and one at the end; 0: only at the end.
        keep_checkpoints: So many of the newest checkpoints stay.
        patience: Validations in a row without improvement that end the run; 0: none does.
        metric: Key of what ``validate`` returns; larger is better.
        seed: Of data order and dropout.
        order: ``rows``: windows in random order. ``chains``: the windows of one user (`examples.chains`) follow
            each other, users in random order; more of a micro-batch is shared and its gradient is noisier.
        packing: Whether tokens that rows of a micro-batch begin with alike run once (`packing`); without dropout
            it changes nothing but speed and the last digits.
        gradient_checkpointing: Whether a layer's activations are computed again in the backward pass instead of
            kept: less memory for more time (one more forward pass, and what all rows begin with runs in each
            packed sequence); without dropout the same gradients.
        time_limit_s: Seconds of one call of `train`, checked after each step.

    Raises:
        UserError: A value out of range.
    """

    steps: int
    learning_rate: float
    batch_size: int = 16
    accumulation: int = 1
    warmup_steps: int = 20
    schedule: str = "linear"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    log_every: int = 25
    log_parts: bool = False
    evaluate_every: int = 0
    checkpoint_every: int = 0
    keep_checkpoints: int = 2
    patience: int = 0
    metric: str = "NDCG@10"
    seed: int = 0
    order: str = "rows"
    packing: bool = True
    gradient_checkpointing: bool = False
    time_limit_s: float | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        for name in ("steps", "batch_size", "accumulation", "log_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise UserError(f"wanted {name} of at least 1, got {getattr(self, name)}")
        if not (self.learning_rate > 0 and self.max_grad_norm > 0):
            got = f"{self.learning_rate} and {self.max_grad_norm}"
            raise UserError(f"wanted learning_rate and max_grad_norm > 0, got {got}")
        if self.batch_size % self.accumulation:
            got = f"{self.batch_size} and {self.accumulation}"
            raise UserError(f"wanted a batch_size that is a multiple of accumulation, got {got}")
        if self.schedule not in SCHEDULES:
            raise UserError(f"wanted schedule among {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if self.order not in ORDERS:
            raise UserError(f"wanted order among {', '.join(ORDERS)}, got {self.order!r}; choose one of them")
        if self.patience and not self.evaluate_every:
            raise UserError("patience counts validations; set evaluate_every > 0 or patience = 0")

    def check_validate(self, validate: Validate | None) -> None:
        """UserError when there are validations and nothing to validate with."""
        if self.evaluate_every and validate is None:
            raise UserError(
                "evaluate_every > 0 needs something to validate with; give validate, or set it to 0"
            )

    def share(self, n_processes: int) -> int:
        """Windows of one micro-batch in each of some processes.

        Raises:
            UserError: They cannot be dealt out evenly.
        """
        if self.batch_size % (self.accumulation * n_processes):
            raise UserError(
                f"wanted a batch_size that is a multiple of accumulation * processes, got {self.batch_size} and "
                f"{self.accumulation} * {n_processes}; change one of them"
            )
        return self.batch_size // (self.accumulation * n_processes)


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        steps_done: Optimiser steps, those before a resume included.
        stopped: ``steps``, ``patience``, ``time limit`` or ``interrupted``.
        best_step: Step of the best validation; None without validations.
        best_metric: Its metric.
        seconds: Wall time, that before a resume included.
        history: The rows of ``log.jsonl``.
    """

    steps_done: int
    stopped: str
    best_step: int | None
    best_metric: float | None
    seconds: float
    history: list[dict[str, Any]]


class Course:
    """The state of one run that does not depend on what is learned.

    Attributes:
        stopped: Why it ended; None while it goes on.
        best: ``step``, ``metric`` and ``value`` of the best validation; None before the first.
        waited: Validations since the best one.
        judged: Step of the last validation, -1 before the first.
        history: The rows of ``log.jsonl``.
        asked_to_stop: Set by a signal.
    """

    def __init__(self, config: TrainConfig, out: Path, validate: Validate | None) -> None:
        self.config, self.out, self.validate = config, out, validate
        self.stopped: str | None = None
        self.best: dict[str, Any] | None = None
        self.waited, self.judged = 0, -1
        self.earlier_seconds, self.started = 0.0, time.monotonic()
        self.history: list[dict[str, Any]] = []
        self.asked_to_stop = threading.Event()

    @property
    def seconds(self) -> float:
        """Wall time so far, that before a resume included."""
        return self.earlier_seconds + time.monotonic() - self.started

    def validates_at(self, step: int) -> bool:
        """Whether there is a validation after a step."""
        every = self.config.evaluate_every
        return every > 0 and (step % every == 0 or step >= self.config.steps)

    def logs_at(self, step: int) -> bool:
        """Whether there is a row of the log after a step, wherever the run is stopped."""
        return step % self.config.log_every == 0 or step >= self.config.steps or self.validates_at(step)

    def saves_at(self, step: int) -> bool:
        """Whether there is a checkpoint after a step."""
        every = self.config.checkpoint_every
        return self.stopped is not None or (every > 0 and step % every == 0)

    def judges_late(self, step: int) -> bool:
        """Whether the last step of a run that ended at its time limit is still to be validated.

        Ask after the checkpoint was written, so that a resumed run does not know of that validation.
        """
        return self.config.evaluate_every > 0 and self.stopped == "time limit" and self.judged != step

    def see(self, step: int) -> None:
        """Find out whether the run ends after this step: at its last one, asked to, or at its time limit."""
        limit = self.config.time_limit_s
        late = limit is not None and time.monotonic() - self.started >= limit
        # What any process was told goes for all.
        asked, at_limit = zip(*processes.gather([self.asked_to_stop.is_set(), late]), strict=True)
        if step >= self.config.steps:
            self.stopped = "steps"
        elif any(asked):
            self.stopped = "interrupted"
        elif any(at_limit):
            self.stopped = "time limit"

    def write_row(self, row: dict[str, Any]) -> None:
        """Add one line to ``log.jsonl`` and to the history.

        Raises:
            UserError: Its loss is not finite.
        """
        if not math.isfinite(row.get("loss") or 0.0):
            raise UserError(f"the loss is {row['loss']} around step {row['step']}; lower the learning rate")
        row = processes.on_first(lambda: row)
        self.history.append(row)
        if not processes.is_first():
            return
        with (self.out / LOG).open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(row) + "\n")

    def judge(self, model: Any, step: int, device: torch.device) -> dict[str, float]:
        """Validate, keep the weights if they are the best, and see whether patience is at its end.

        Raises:
            UserError: Validation does not give the metric that decides.
        """
        self.judged, state = step, random_state(device)
        model.eval()
        with torch.no_grad():
            values = processes.on_first(lambda: self._metrics(model))
        set_random_state(state, device)  # looking must not change what is learned
        self.write_row({"step": step, "valid": values})
        name = self.config.metric
        if name not in values:
            raise UserError(
                f"wanted the metric {name}, validation gives {', '.join(values)}; choose one of them"
            )
        if self.best is None or values[name] > self.best["value"]:
            best = self.best = {"step": step, "metric": name, "value": values[name]}
            self.waited = 0
            processes.on_first(lambda: keep_best(model, self.out, best))
        else:
            self.waited += 1
        if self.stopped is None and 0 < self.config.patience <= self.waited:
            self.stopped = "patience"
        return values

    def _metrics(self, model: Any) -> dict[str, float]:
        assert self.validate is not None
        return {name: float(value) for name, value in self.validate(model).items()}

    def identity(self, learned: Mapping[str, Any]) -> dict[str, Any]:
        """What a resumed run must share with the run that wrote the checkpoint, as JSON values.

        The number of processes is not in it: it decides nothing that is learned.

        Args:
            learned: What model, loss and data are.
        """
        shared = {name: value for name, value in asdict(self.config).items() if name not in FREE}
        return dict(json.loads(json.dumps(shared | dict(learned))))

    def save(
        self, model: Any, step: int, learned: Mapping[str, Any], state: dict[str, Any], files: dict[str, Any]
    ) -> None:
        """Write ``checkpoint-N`` whole or not at all, then remove the oldest; for the first process.

        Args:
            model: Its trained tensors are written.
            step: N.
            learned: As in `identity`.
            state: JSON values that the run wants back.
            files: Names to what ``torch.save`` writes under them.
        """
        state = state | {name: getattr(self, name) for name in ("stopped", "seconds", "best", "waited")}
        with atomic_folder(self.out / f"checkpoint-{step}") as folder:
            save_trained(model, folder / WEIGHTS)
            for name, content in files.items():
                torch.save(content, folder / name)
            if self.best is not None:
                link(self.out / BEST / WEIGHTS, folder / BEST_WEIGHTS)
            write_json(folder / STATE, state | {"step": step, "identity": self.identity(learned)})
        for _, old in checkpoints(self.out)[: -self.config.keep_checkpoints]:
            remove(old)

    def take_up(self, model: Any, checkpoint: Path, learned: Mapping[str, Any]) -> dict[str, Any]:
        """Continue from a checkpoint: weights, log and what is counted here; returns its ``state``.

        Raises:
            UserError: The checkpoint is of another run.
        """
        state: dict[str, Any] = read_json(checkpoint / STATE)
        ours, theirs = self.identity(learned), state["identity"]
        other = [name for name in ours if theirs.get(name) != ours[name]]
        if other:
            raise UserError(
                f"wanted to resume with {other[0]} = {theirs.get(other[0])} as in {checkpoint}, got "
                f"{ours[other[0]]}; give the same settings and data, or start anew"
            )
        ended = state["stopped"] == "steps" or 0 < self.config.patience <= state["waited"]
        self.stopped = state["stopped"] if ended else None
        self.best, self.waited, self.earlier_seconds = state["best"], state["waited"], state["seconds"]
        load_trained(model, checkpoint / WEIGHTS)
        self.history = processes.on_first(
            lambda: restore_folder(self.out, checkpoint, self.best, state["step"])
        )
        return state

    def result(self, model: Any, step: int, seconds: float) -> TrainResult:
        """How it ended; ``model`` gets the weights of the best validation, where there was one."""
        if self.best is not None:
            load_trained(model, self.out / BEST / WEIGHTS)
        model.eval()
        best = self.best or {"step": None, "value": None}
        return TrainResult(step, str(self.stopped), best["step"], best["value"], seconds, self.history)
