"""How far a training run has come: its budget, log, best validation and checkpoints, and what ends it.

A run folder holds, while training, ``log.jsonl`` (one JSON object a line), ``checkpoint-N/`` (whole or absent) and
``best/`` (the weights with the best validation metric). What is learned, language model or encoder of items, is
no business of this room; in several processes the first one writes and validates, and all know the outcome.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from triewise.errors import Diverged, UserError, reading
from triewise.files import TEMPORARY, Hashed, Shape, atomic_folder, file_hashes, remove, write_json, writes
from triewise.models import load_trained, save_trained
from triewise.progress import progress
from triewise.training import processes
from triewise.training.checkpoints import (
    BEST,
    BEST_WEIGHTS,
    LOG,
    SHARDS,
    STATE,
    WEIGHTS,
    best_weights,
    checkpoints,
    keep_best,
    link,
    random_state,
    read_state,
    restore_folder,
    resume_point,
    set_random_state,
    signals_set,
)
from triewise.training.tracking import tracked

if TYPE_CHECKING:
    from triewise.settings import TrainingSettings
    from triewise.training.sharding import Shards

# A resumed run may change these: they decide when to look, when to stop and what memory it takes, not what is computed.
MAY_CHANGE = {
    *("log_every", "log_parts", "checkpoint_every", "keep_checkpoints", "patience", "time_limit_s"),
    *("gradient_checkpointing", "workers", "report_to", "keep_states"),
}
BY_ITSELF = ("steps", "patience", "time limit")  # how a run ends that nobody stopped
_OF_THE_DATA = {
    "supervision",
    "rows",
    "sample",
    "valid_users",
    "freeze",
}  # what is learned and validated shows them
Validate = Callable[[Any], Mapping[str, float]]
# Told each row of the log; what it says of one with ``valid`` ends the run as a `Stop` does, None goes on.
Watch = Callable[[Mapping[str, Any]], str | None]


class Stop(Exception):
    """Raised by a ``validate``: the run ends as one that is interrupted does, with a checkpoint.

    Args:
        reason: What `TrainResult.stopped` says.
        metrics: What this validation found, to be logged and compared with the best; None: nothing.
    """

    def __init__(self, reason: str, metrics: Mapping[str, float] | None = None) -> None:
        super().__init__(reason)
        self.reason, self.metrics = reason, metrics or {}


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        steps_done: Optimiser steps, those before a resume included.
        stopped: One of ``BY_ITSELF``, ``interrupted`` or the reason of a `Stop`.
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


class _Best(Shape):
    step: int
    metric: str
    value: float


class _State(Hashed):
    """What is read of ``state.json``, beside what the run of its kind wants back."""

    stopped: str | None
    seconds: float
    best: _Best | None
    waited: int
    step: int
    identity: dict[str, Any]


class TrainingState:
    """The state of one run that does not depend on what is learned.

    Args:
        model: What is validated, and whose trained tensors are kept.
        device: Where it is.
        learned: What model, loss and data are, as JSON values: a checkpoint of others is refused.
        settings: Budget and optimiser.
        seed: Of data order and dropout.
        out: The run folder.
        validate: From the model to metrics.

    Attributes:
        identity: What a resumed run must share with the run that wrote the checkpoint. The number of processes is not
            in it: it decides nothing that is learned.
        step: Optimiser steps done.
        stopped: Why it ended; None while it goes on.
        best: ``step``, ``metric`` and ``value`` of the best validation; None before the first.
        waited: Validations since the best one.
        validated: Step of the last validation, -1 before the first.
        history: The rows of ``log.jsonl``.
        asked_to_stop: Set by a signal.
        shards: The weights, where they are spread over the processes and not in the model.
        watch: What is told of each row, while steps are taken.
        said: What it said of the last one.

    Raises:
        UserError: ``evaluate_every`` > 0 and nothing to validate with.
    """

    def __init__(
        self,
        model: Any,
        device: torch.device,
        learned: Mapping[str, Any],
        settings: TrainingSettings,
        seed: int,
        out: Path,
        validate: Validate | None,
    ) -> None:
        if settings.evaluate_every and validate is None:
            raise UserError(
                "evaluate_every > 0 needs something to validate with; give validate, or set it to 0"
            )
        self.model, self.device, self.settings, self.seed, self.out = model, device, settings, seed, out
        self.validator = validate
        shared = settings.model_dump(exclude=MAY_CHANGE | _OF_THE_DATA) | {"seed": seed, **learned}
        self.identity: dict[str, Any] = json.loads(json.dumps(shared))
        self.step = 0
        self.stopped: str | None = None
        self.best: dict[str, Any] | None = None
        self.waited, self.validated = 0, -1
        self.earlier_seconds, self.started = 0.0, time.monotonic()
        self.history: list[dict[str, Any]] = []
        self.asked_to_stop = threading.Event()
        self.shards: Shards | None = None
        self.watch: Watch | None = None
        self.said: str | None = None

    def conduct(
        self,
        go_on: Callable[[Path], None],
        take_steps: Callable[[Callable[..., None]], None],
        resume: bool,
        title: str,
        watch: Watch | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> TrainResult:
        """A run from its start, or from its newest whole checkpoint, to its end.

        Args:
            go_on: Continues from a checkpoint; it calls `resume`.
            take_steps: Takes steps until `stopped` says why not; it is given ``advance`` of `progress`.
            resume: As of `trainer.train`.
            title: As of `trainer.train`.
            watch: As of `trainer.train`.
            facts: As of `trainer.train`.

        Returns:
            How it ended; the model has the weights of the best validation, where there was one.
        """
        checkpoint = processes.on_first(lambda: resume_point(self.out, resume))
        if checkpoint is not None:
            go_on(checkpoint)
        seconds = self.earlier_seconds
        if self.stopped is None:
            left = self.settings.steps - self.step
            with (
                signals_set(self.asked_to_stop),
                tracked(
                    self.settings.report_to if processes.is_first() else (),
                    self.out,
                    title,
                    facts or self.identity,
                    watch,
                    self.step,
                ) as self.watch,
                progress(title or "training", left, "steps") as advance,
            ):
                take_steps(advance)
            self.watch = watch
            # After the checkpoint was written, so that a resumed run does not know of this validation.
            late = self.settings.evaluate_every > 0 and self.stopped == "time limit"
            if late and self.validated != self.step:
                self.validate()
            seconds = self.seconds
        if self.shards is not None:
            self.shards.put_back()
        if self.best is not None:
            load_trained(self.model, processes.on_first(lambda: best_weights(self.out)))
        self.model.eval()
        best = self.best or {"step": None, "value": None}
        return TrainResult(self.step, str(self.stopped), best["step"], best["value"], seconds, self.history)

    @property
    def seconds(self) -> float:
        """Wall time so far, that before a resume included."""
        return self.earlier_seconds + time.monotonic() - self.started

    def validates_at(self, step: int) -> bool:
        """Whether there is a validation after a step."""
        every = self.settings.evaluate_every
        return every > 0 and (step % every == 0 or step >= self.settings.steps)

    def logs_at(self, step: int) -> bool:
        """Whether there is a row of the log after a step, wherever the run is stopped."""
        settings = self.settings
        return step % settings.log_every == 0 or step >= settings.steps or self.validates_at(step)

    @property
    def saves(self) -> bool:
        """Whether there is a checkpoint after this step."""
        every = self.settings.checkpoint_every
        return self.stopped is not None or (every > 0 and self.step % every == 0)

    def check_stop(self, step: int) -> None:
        """Count a step, and find out whether it was the last: by its number, asked to, or at its time limit."""
        self.step, limit = step, self.settings.time_limit_s
        late = limit is not None and time.monotonic() - self.started >= limit
        # What any process was told goes for all.
        asked, at_limit = zip(*processes.gather([self.asked_to_stop.is_set(), late]), strict=True)
        if step >= self.settings.steps:
            self.stopped = "steps"
        elif any(asked):
            self.stopped = "interrupted"
        elif any(at_limit):
            self.stopped = "time limit"

    def write_row(self, row: dict[str, Any]) -> None:
        """Add one line to ``log.jsonl`` and to the history, and tell `watch` of it.

        Raises:
            Diverged: Its loss is not finite.
        """
        if not math.isfinite(row.get("loss") or 0.0):
            raise Diverged(f"the loss is {row['loss']} around step {row['step']}; lower the learning rate")
        row = processes.on_first(lambda: row)
        self.history.append(row)
        if not processes.is_first():
            return
        log = self.out / LOG
        with writes(log), log.open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(row) + "\n")
        self.said = None if self.watch is None else self.watch(row)

    def validate(self) -> dict[str, float]:
        """Validate, keep the weights if they are the best, and see whether patience or a `Stop` ends the run.

        Raises:
            UserError: Validation does not give the metric that decides.
        """
        self.validated, state = self.step, random_state(self.device)
        self.model.eval()
        with self.shards.whole() if self.shards else contextlib.nullcontext():
            with torch.no_grad():
                values, reason = processes.on_first(self._metrics)
            set_random_state(state, self.device)  # looking must not change what is learned
            if values or reason is None:
                self.write_row({"step": self.step, "valid": values})
                self._compare(values)
                reason = reason or processes.on_first(lambda: self.said)
        if self.stopped is None and reason is not None:
            self.stopped = reason
        if self.stopped is None and 0 < self.settings.patience <= self.waited:
            self.stopped = "patience"
        return values

    def _metrics(self) -> tuple[dict[str, float], str | None]:
        assert self.validator is not None
        reason = None
        try:
            metrics = self.validator(self.model)
        except Stop as stop:
            metrics, reason = stop.metrics, stop.reason
        return {name: float(value) for name, value in metrics.items()}, reason

    def _compare(self, values: dict[str, float]) -> None:
        name = self.settings.metric
        if name not in values:
            raise UserError(
                f"wanted the metric {name}, validation gives {', '.join(values)}; choose one of them"
            )
        self.waited += 1
        if self.best is None or values[name] > self.best["value"]:
            best = self.best = {"step": self.step, "metric": name, "value": values[name]}
            self.waited = 0
            self.check_weights()
            processes.on_first(lambda: keep_best(self.model, self.out, best))

    def save_shards(self, optimizer: Any) -> Path | None:
        """Write what is spread over the processes beside the checkpoint it will be a part of; None: nothing is."""
        if self.shards is None:
            return None
        self.check_weights()
        with writes(self.out / f"checkpoint-{self.step}"):
            return self.shards.save(self.out / f"{TEMPORARY}checkpoint-{self.step}.{SHARDS}", optimizer)

    def check_weights(self) -> None:
        """Refuse to keep weights that are not finite; where they are spread over processes, all have to call it.

        Raises:
            Diverged: Some are not, in this process or in another one.
        """
        if self.shards is not None:
            finite = self.shards.finite()
        else:
            finite = all(bool(p.isfinite().all()) for p in self.model.parameters() if p.requires_grad)
        if not finite:
            raise Diverged(f"weights are not finite after step {self.step}; lower the learning rate")

    def save(self, state: dict[str, Any], files: dict[str, Any], shards: Path | None = None) -> None:
        """Write ``checkpoint-N`` whole or not at all, then remove the oldest; for the first process.

        Args:
            state: JSON values that the run wants back.
            files: Names to what ``torch.save`` writes under them.
            shards: A folder that holds the weights already, and becomes a part of the checkpoint.

        Raises:
            Diverged: Loss or weights are not finite.
        """
        try:
            json.dumps(state, allow_nan=False)
        except ValueError:
            raise Diverged(
                f"the loss is nan or infinite around step {self.step}; lower the learning rate"
            ) from None
        if shards is None:  # `save_shards` has looked at them
            self.check_weights()
        ours = ("stopped", "seconds", "best", "waited", "step", "identity")
        with atomic_folder(self.out / f"checkpoint-{self.step}") as folder:
            if shards is None:
                save_trained(self.model, folder / WEIGHTS)
            else:
                os.replace(shards, folder / SHARDS)
            for name, content in files.items():
                torch.save(content, folder / name)
            if self.best is not None:
                link(self.out / BEST / WEIGHTS, folder / BEST_WEIGHTS)
            state |= {name: getattr(self, name) for name in ours} | {"sha256": file_hashes(folder)}
            write_json(folder / STATE, state, sealed=True)
        self._rotate()

    def _rotate(self) -> None:
        """Remove all but the newest checkpoints."""
        for _, old in checkpoints(self.out)[: -self.settings.keep_checkpoints]:
            remove(old)

    def resume(self, checkpoint: Path, take: Callable[[dict[str, Any]], None]) -> None:
        """Continue from a checkpoint: weights, log and what is counted here; ``take`` is given its ``state``.

        Raises:
            UserError: The checkpoint is of another run, or its weights are spread and those here not, or reversed.
        """
        state: dict[str, Any] = processes.on_first(lambda: read_state(checkpoint, _State))
        ours, theirs = self.identity, state["identity"]
        other = [name for name in ours if theirs.get(name) != ours[name]]
        if other:
            raise UserError(
                f"wanted to resume with {other[0]} = {theirs.get(other[0])} as in {checkpoint}, got "
                f"{ours[other[0]]}; give the same settings and data, or start anew"
            )
        ended = state["stopped"] == "steps" or 0 < self.settings.patience <= state["waited"]
        self.stopped = state["stopped"] if ended else None
        self.step, self.earlier_seconds = int(state["step"]), state["seconds"]
        self.best, self.waited = state["best"], state["waited"]
        if (checkpoint / SHARDS).is_dir() != (self.shards is not None):
            here, there = ("with", "without") if self.shards else ("without", "with")
            raise UserError(
                f"wanted to resume {checkpoint} {there} FSDP, as it was written, got a launch {here} it; change it, or "
                "start anew"
            )
        if self.shards is None:
            load_trained(self.model, checkpoint / WEIGHTS)
        else:
            self.shards.load(checkpoint / SHARDS)
        self.history = processes.on_first(lambda: restore_folder(self.out, checkpoint, self.best, self.step))
        processes.on_first(self._rotate)  # a kill may have come before it
        with reading(checkpoint / STATE):
            take(state)
