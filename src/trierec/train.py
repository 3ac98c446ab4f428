"""Training: a ``transformers.Trainer`` that owns the normaliser, the data order and its checkpoints.

What is wrapped and called is one thin module, `TitleLoss`: body, hidden states at the target positions, head,
loss. A run folder holds, while training, ``log.jsonl`` (one JSON object a line), ``checkpoint-N/`` (whole or
absent) and ``best/`` (the weights with the best validation metric). A resumed run ends with the weights of an
uninterrupted one; on a CPU with the same number of threads and processes they are equal bit by bit.

In several processes (`torchrun`, ``accelerate launch``; DDP) each micro-batch is dealt out: P processes take B / P
windows each, at the same time. Divisor, adaptive temperature and log are those of all of them, so that the number
of processes changes nothing but rounding and dropout. The first one writes, prints and validates.

Shape key: B batch, L tokens, D width, V vocabulary, M target positions.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from trierec import processes
from trierec.checkpoints import (
    BEST,
    BEST_WEIGHTS,
    LOG,
    STATE,
    WEIGHTS,
    checkpoints,
    clear,
    keep_best,
    link,
    load_trained,
    random_state,
    remove,
    restore_folder,
    save_trained,
    set_random_state,
    signals_set,
)
from trierec.contrast import Contrast
from trierec.errors import UserError
from trierec.examples import Examples, chains, schedule
from trierec.files import atomic_folder, read_json, write_json
from trierec.forward import PARTS, Meter, MicroBatches, TitleLoss, measure_parts
from trierec.losses import AdaptiveTemperature, Objective
from trierec.packing import packing_works
from trierec.preferences import Preferences
from trierec.progress import progress

SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
ORDERS = ("rows", "chains")
# A resumed run may change these: they decide when to look and when to stop, not what is computed.
FREE = ("log_every", "log_parts", "checkpoint_every", "keep_checkpoints", "patience", "time_limit_s")

Validate = Callable[[Any], dict[str, float]]
Learned = Objective | Contrast | Preferences


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
            norms of their gradients (`forward.measure_parts`), null at a stop nobody could foresee. It costs a
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


def train(
    model: Any,
    examples: Examples,
    objective: Learned,
    config: TrainConfig,
    out: Path,
    *,
    validate: Validate | None = None,
    resume: bool = False,
    title: str = "",
) -> TrainResult:
    """Train ``model`` in place.

    The weights it ends with are the last ones, or, where ``evaluate_every`` > 0, those of the best
    validation. A first Ctrl-C or SIGTERM finishes the step, writes a checkpoint and returns; a second one
    acts at once.

    Each of several processes calls it with the same arguments; ``out`` is one folder that all of them see. It
    returns the same in each, and each ends with the same weights.

    Args:
        model: A causal LM of transformers, on its device.
        examples: What is learned from.
        objective: The loss: of titles, with a contrast (CFT), or a preference (S-DPO). An adaptive temperature
            in it moves, once a micro-batch.
        config: Budget and optimiser.
        out: Folder for the log, checkpoints and best weights.
        validate: From the model to metrics; called every ``evaluate_every`` steps.
        resume: Go on from the newest whole checkpoint in ``out``, or from the start where there is none;
            ``model`` and ``objective`` as they were when the run was started. False: start anew; what an
            earlier run left in ``out`` is removed.
        title: What the progress line calls this run.

    Raises:
        UserError: ``evaluate_every`` without ``validate``, a checkpoint of another run, a batch that
            cannot be dealt out to the processes, one of which has died, a metric that ``validate`` does not
            give, or a loss that is not finite.
    """
    if config.evaluate_every and validate is None:
        raise UserError("evaluate_every > 0 needs something to validate with; give validate, or set it to 0")
    processes.start()
    config.share(processes.count())
    with processes.together():
        return _train(model, examples, objective, config, out, validate, resume, title)


def _train(
    model: Any,
    examples: Examples,
    objective: Learned,
    config: TrainConfig,
    out: Path,
    validate: Validate | None,
    resume: bool,
    title: str,
) -> TrainResult:
    checkpoint = processes.on_first(lambda: clear(out, resume))
    trainer = TrieTrainer(
        model, examples, objective, config, out, validate if config.evaluate_every else None
    )
    if checkpoint is not None:
        trainer.take_up(checkpoint)
    left = config.steps - trainer.first_step
    if trainer.stopped is None:
        with (
            signals_set(trainer.asked_to_stop),
            progress(title or "training", left, "steps") as trainer.on_progress,
        ):
            trainer.train()
        if trainer.stopped == "time limit" and trainer.judged != trainer.state.global_step:
            trainer.evaluate()  # after the checkpoint, so that a resumed run does not know of it
    if trainer.best is not None:
        load_trained(model, out / BEST / WEIGHTS)
    model.eval()
    best = trainer.best or {"step": None, "value": None}
    return TrainResult(
        steps_done=max(trainer.state.global_step, trainer.first_step),
        stopped=str(trainer.stopped),
        best_step=best["step"],
        best_metric=best["value"],
        seconds=trainer.seconds if trainer.state.global_step else trainer.earlier_seconds,
        history=trainer.history,
    )


class TrieTrainer(Trainer):  # type: ignore[misc]  # transformers has no types
    """A `transformers.Trainer` for a `TitleLoss`; `train` makes and drives it.

    Overridden: the data (a fixed order), the normaliser (that of the whole accumulated batch), the loss, and
    what is logged, evaluated and saved. The Trainer keeps optimiser, schedule, clipping, devices and
    callbacks.
    """

    # Read by transformers >= 5.20; older ones ask ``accepts_loss_kwargs`` of the model.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
        examples: Examples,
        objective: Learned,
        config: TrainConfig,
        out: Path,
        validate: Validate | None = None,
    ) -> None:
        module = _module(model, objective, examples)
        super().__init__(module, _arguments(model, config, out))
        self.lm, self.examples, self.objective, self.config = model, examples, objective, config
        self.out, self.validate = out, validate
        self.titles: Any = getattr(module, "titles", module)
        self.packing = config.packing and self.titles.by_hand and packs(model, examples)
        self.checkpoint: Path | None = None
        self.first_step = 0
        self.rows = np.zeros((0, 0), dtype=np.int64)  # windows of each micro-batch that is left
        self.stopped: str | None = None
        self.best: dict[str, Any] | None = None
        self.waited = 0  # validations since the best one
        self.judged = -1  # step of the last validation
        self.earlier_seconds, self.started = 0.0, time.monotonic()
        self.meter = Meter(torch.zeros(4, device=self.args.device))
        self.parts: dict[str, float | None] = {}  # of the step that runs now
        self.history: list[dict[str, Any]] = []
        self.asked_to_stop = threading.Event()
        self.on_progress: Callable[..., None] = lambda n=1, detail="": None
        self.detail = ""
        self.add_callback(_Conductor(self))

    @property
    def seconds(self) -> float:
        """Wall time so far, that before a resume included."""
        return self.earlier_seconds + time.monotonic() - self.started

    def get_train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """This process's part of the micro-batches that are left; nothing is read to be skipped."""
        config, size = self.config, self.examples.size
        chain = chains(self.examples.windows) if config.order == "chains" else None
        order = schedule(len(size), config.batch_size, config.steps, config.seed, chain)[self.first_step :]
        if chain is None:
            # Within a step by length: a micro-batch is padded to its longest; the step's gradient stays the same.
            order = np.take_along_axis(order, np.argsort(size[order], axis=1, kind="stable"), axis=1)
        # The same micro-batches for any number of processes; each takes neighbours.
        self.rows = processes.part(order.reshape(-1, config.batch_size // config.accumulation))
        left = _batches(self.examples, self.objective, self.rows, self.packing)
        # Its own generator: the loader must not draw from the one that dropout uses.
        return DataLoader(left, batch_size=None, generator=torch.Generator())

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The micro-batches of one optimiser step, and the divisor that all of them share."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        if self.config.log_parts:
            self.parts = dict.fromkeys(PARTS) | self.parts_of_next_step()
        ours = math.fsum(batch.pop("contribution") for batch in batches)
        total = math.fsum(theirs for (theirs,) in processes.gather([ours]))
        return batches, float(self.objective.divisor(torch.tensor(total, dtype=torch.float64)))

    def parts_of_next_step(self) -> dict[str, float]:
        """What ``log_parts`` adds to the row of the step that is about to begin; nothing where it has none."""
        step, n = self.state.global_step, self.config.accumulation
        if not self.logs_at(step + 1):
            return {}
        rows = self.rows[(step - self.first_step) * n :][:n]
        # Trie support leaves forced tokens out, but invalid tokens cost something there too.
        batches = MicroBatches(self.examples, Objective("vocabulary"), rows)
        state = random_state(self.args.device)
        with self.meter.pause(), self.compute_loss_context_manager():
            self.model.train()
            inputs = (self._prepare_inputs(batches[i]) for i in range(len(rows)))
            parts = measure_parts(self.titles, inputs)
            set_random_state(state, self.args.device)  # looking must not change what is learned
        return parts

    def wishes(self) -> tuple[bool, bool]:
        """Whether any process was asked to stop, and whether any is at its time limit."""
        limit = self.config.time_limit_s
        late = limit is not None and time.monotonic() - self.started >= limit
        asked, at_limit = zip(*processes.gather([self.asked_to_stop.is_set(), late]), strict=True)
        return any(asked), any(at_limit)

    def validates_at(self, step: int) -> bool:
        """Whether there is a validation after a step."""
        every = self.config.evaluate_every
        return every > 0 and (step % every == 0 or step >= self.config.steps)

    def logs_at(self, step: int) -> bool:
        """Whether there is a row of the log after a step, wherever the run is stopped."""
        return step % self.config.log_every == 0 or step >= self.config.steps or self.validates_at(step)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This micro-batch's part of the step's loss: its sum over the divisor of `get_batch_samples`.

        Times the number of processes: DDP and FSDP take the mean of their gradients, and the sum is wanted.
        """
        counts = inputs.pop("counts")
        outputs = model(**inputs)
        loss = outputs["loss"] / num_items_in_batch
        self.meter.add(loss, outputs["sums"], counts)
        loss = loss * processes.count()
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write a row about the steps since the last one."""
        if "loss" not in logs:
            return
        step, values = self.state.global_step, self.meter.row()
        if not math.isfinite(values["loss"] or 0.0):
            raise UserError(f"the loss is {values['loss']} around step {step}; lower the learning rate")
        row = {
            "temperature": self.objective.tau,
            "learning_rate": logs["learning_rate"],
            "grad_norm": float(logs["grad_norm"]),
            "epoch": step * self.config.batch_size / len(self.examples),
            "seconds": self.seconds,
        }
        self.detail = f"loss {values['loss']:.3f}"
        self.write_row({"step": step, **values, **row, **self.parts})

    def write_row(self, row: dict[str, Any]) -> None:
        """Add one line to ``log.jsonl`` and to the history."""
        row = processes.on_first(lambda: row)
        self.history.append(row)
        if not processes.is_first():
            return
        with (self.out / LOG).open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(row) + "\n")

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Validate, keep the weights if they are the best, and see whether patience is at its end."""
        self.control.should_evaluate = False
        if self.validate is None:
            return {}
        self.judged, state = self.state.global_step, random_state(self.args.device)
        with self.meter.pause(), torch.no_grad():
            self.lm.eval()
            values = processes.on_first(self.metrics)
            set_random_state(state, self.args.device)  # looking must not change what is learned
        self.write_row({"step": self.judged, "valid": values})
        name = self.config.metric
        if name not in values:
            raise UserError(
                f"wanted the metric {name}, validation gives {', '.join(values)}; choose one of them"
            )
        if self.best is None or values[name] > self.best["value"]:
            self.best, self.waited = {"step": self.judged, "metric": name, "value": values[name]}, 0
            with self.meter.pause():
                processes.on_first(lambda: keep_best(self.lm, self.out, self.best or {}))
        else:
            self.waited += 1
        if self.stopped is None and 0 < self.config.patience <= self.waited:
            self.stopped = "patience"
            self.control.should_save = self.control.should_training_stop = True
        return values

    def metrics(self) -> dict[str, float]:
        """What ``validate`` says of the weights as they are."""
        assert self.validate is not None
        return {name: float(value) for name, value in self.validate(self.lm).items()}

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share with the run that wrote the checkpoint, as JSON values.

        The number of processes is not in it: it decides nothing that is learned.
        """
        shared = {name: value for name, value in asdict(self.config).items() if name not in FREE}
        shared["objective"] = self.objective.settings()
        shared["trained parameters"] = sum(p.numel() for p in self.lm.parameters() if p.requires_grad)
        shared["examples"] = self.examples.fingerprint()
        return dict(json.loads(json.dumps(shared)))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write ``checkpoint-N`` whole or not at all, then remove the oldest."""
        step, t = self.state.global_step, self.objective.temperature
        with self.meter.pause():
            state = {
                "step": step,
                **{name: getattr(self, name) for name in ("stopped", "seconds", "best", "waited")},
                "temperature": t.state_dict() if isinstance(t, AdaptiveTemperature) else None,
                "identity": self.identity(),
                "meter": self.meter.state_dict(),
            }
            random_states = processes.gather_objects(random_state(self.args.device))
            processes.on_first(lambda: self.write_checkpoint(state, random_states))

    def write_checkpoint(self, state: dict[str, Any], random_states: list[dict[str, Any]]) -> None:
        """The files of a checkpoint; ``random_states`` has one of each process."""
        with atomic_folder(self.out / f"checkpoint-{state['step']}") as folder:
            save_trained(self.lm, folder / WEIGHTS)
            torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")
            torch.save(self.lr_scheduler.state_dict(), folder / "scheduler.pt")
            for i, numbers in enumerate(random_states):
                torch.save(numbers, folder / _random_file(i))
            if self.best is not None:
                link(self.out / BEST / WEIGHTS, folder / BEST_WEIGHTS)
            write_json(folder / STATE, state)
        for _, old in checkpoints(self.out)[: -self.config.keep_checkpoints]:
            remove(old)

    def take_up(self, checkpoint: Path) -> None:
        """Continue from a checkpoint: all but what `restore` sets once the optimiser exists.

        Raises:
            UserError: The checkpoint is of another run.
        """
        state = read_json(checkpoint / STATE)
        ours, theirs = self.identity(), state["identity"]
        other = [name for name in ours if theirs.get(name) != ours[name]]
        if other:
            raise UserError(
                f"wanted to resume with {other[0]} = {theirs.get(other[0])} as in {checkpoint}, got "
                f"{ours[other[0]]}; give the same settings and data, or start anew"
            )
        self.checkpoint, self.first_step = checkpoint, int(state["step"])
        ended = state["stopped"] == "steps" or 0 < self.config.patience <= state["waited"]
        self.stopped = state["stopped"] if ended else None
        self.best, self.waited, self.earlier_seconds = state["best"], state["waited"], state["seconds"]
        if isinstance(self.objective.temperature, AdaptiveTemperature):
            self.objective.temperature.load_state_dict(state["temperature"])
        if processes.is_first():  # its sums are those of all processes
            self.meter.load_state_dict(state["meter"])
        load_trained(self.lm, checkpoint / WEIGHTS)
        self.history = processes.on_first(
            lambda: restore_folder(self.out, checkpoint, self.best, self.first_step)
        )

    def restore(self) -> None:
        """The part of a resume that needs the optimiser; the last thing before the first step."""
        if self.checkpoint is not None:
            load = functools.partial(torch.load, map_location="cpu", weights_only=True)
            self.optimizer.load_state_dict(load(self.checkpoint / "optimizer.pt"))
            self.lr_scheduler.load_state_dict(load(self.checkpoint / "scheduler.pt"))
            self.state.global_step = self.first_step
        file = (self.checkpoint or self.out) / _random_file(processes.rank())
        if self.checkpoint is not None and file.is_file():
            set_random_state(load(file), self.args.device)
        elif not processes.is_first():  # its own dropout, where no checkpoint has one for it
            drawn = np.random.SeedSequence([self.config.seed, processes.rank(), self.first_step])
            torch.manual_seed(int(drawn.generate_state(1)[0]))
        self.meter.since = time.monotonic()


def packs(model: Any, examples: Examples) -> bool:
    """Whether rows of these examples may be packed for this model; those of several targets share nothing."""
    if int((examples.windows.items.lengths - examples.windows.n_context).max(initial=0)) > 1:
        return False
    longest = examples.prompts.max_tokens + int(examples.trie.depth.max())
    return packing_works(model, np.unique(examples.trie.token[1:]), longest)


class _Conductor(TrainerCallback):  # type: ignore[misc]
    """Says after each step what the Trainer does next: log, validate, save, stop."""

    def __init__(self, trainer: TrieTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.restore()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, config, step = self.trainer, self.trainer.config, state.global_step
        trainer.meter.counts["steps"] += 1
        asked, late = trainer.wishes()
        if step >= config.steps:
            trainer.stopped = "steps"
        elif asked:
            trainer.stopped = "interrupted"
        elif late:
            trainer.stopped = "time limit"
        stop = trainer.stopped is not None
        control.should_log = stop or trainer.logs_at(step)
        control.should_evaluate = trainer.validates_at(step)
        control.should_save = stop or (config.checkpoint_every > 0 and step % config.checkpoint_every == 0)
        control.should_training_stop = stop
        trainer.on_progress(1, trainer.detail)


def _random_file(process: int) -> str:
    return f"rng-{process}.pt" if process else "rng.pt"


def _module(model: Any, objective: Learned, examples: Examples) -> nn.Module:
    """What is wrapped and called."""
    if isinstance(objective, Objective):
        return TitleLoss(model, objective, examples.trie)
    return objective.module(model, examples.trie)


def _batches(examples: Examples, objective: Learned, rows: Any, packing: bool) -> Dataset[dict[str, Any]]:
    """Its arguments, micro-batch after micro-batch."""
    if isinstance(objective, Objective):
        return MicroBatches(examples, objective, rows, packing)
    return objective.batches(examples, rows, packing)


def _arguments(model: Any, config: TrainConfig, out: Path) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=config.steps,
        per_device_train_batch_size=config.share(processes.count()),
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type=SCHEDULES[config.schedule],
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        optim="adamw_torch" if model.device.type == "mps" else "adamw_torch_fused",
        use_cpu=model.device.type == "cpu",
        logging_strategy="no",
        eval_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_nan_inf_filter=False,  # it would wait for the device at every step
        ddp_find_unused_parameters=False,
    )
    arguments._n_gpu = min(
        arguments.n_gpu, 1
    )  # else the Trainer wraps the model in DataParallel where it sees more
    return arguments
