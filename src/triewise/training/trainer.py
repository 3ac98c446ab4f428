"""Training: a ``transformers.Trainer`` that owns the normaliser, the data order and its checkpoints.

What is wrapped and called is one thin module, `TitleLoss`: body, hidden states at the target positions, head,
loss. A resumed run ends with the weights of an uninterrupted one; on a CPU with the same number of threads and
processes they are equal bit by bit.

In several processes (`torchrun`, ``accelerate launch``; DDP) each micro-batch is dealt out: P processes take B / P
windows each, at the same time. Divisor, adaptive temperature and log are those of all of them, so that the number
of processes changes nothing but rounding and dropout. The first one writes, prints and validates.

Shape key: B batch, L tokens, D width, V vocabulary, M target positions.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from triewise.models import compute_again
from triewise.progress import progress
from triewise.training import processes
from triewise.training.checkpoints import clear, random_state, set_random_state, signals_set
from triewise.training.contrast import Contrast
from triewise.training.examples import Examples
from triewise.training.objective import PARTS, Meter, MicroBatches, TitleLoss, measure_parts
from triewise.training.losses import Objective
from triewise.training.packing import packing_works
from triewise.training.preferences import Preferences
from triewise.training.state import Course, TrainConfig, TrainResult, Validate
from triewise.training.temperature import AdaptiveTemperature
from triewise.training.windows import chains, schedule

_THEIR_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
Learned = Objective | Contrast | Preferences


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
    config.check_validate(validate)
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
    course, left = trainer.course, config.steps - trainer.first_step
    if course.stopped is None:
        with (
            signals_set(course.asked_to_stop),
            progress(title or "training", left, "steps") as trainer.on_progress,
        ):
            trainer.train()
        if course.judges_late(trainer.state.global_step):
            trainer.evaluate()
    if config.gradient_checkpointing:
        compute_again(model, False)
    step = trainer.state.global_step
    return course.result(
        model, max(step, trainer.first_step), course.seconds if step else course.earlier_seconds
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
        self.course = Course(config, out, validate)
        self.titles: Any = getattr(module, "titles", module)
        if config.gradient_checkpointing:
            compute_again(model, True)
        self.packing = config.packing and self.titles.by_hand and packs(model, examples)
        self.checkpoint: Path | None = None
        self.first_step = 0
        self.rows = np.zeros((0, 0), dtype=np.int64)  # windows of each micro-batch that is left
        self.meter = Meter(torch.zeros(4, device=self.args.device))
        self.parts: dict[str, float | None] = {}  # of the step that runs now
        self.on_progress: Callable[..., None] = lambda n=1, detail="": None
        self.detail = ""
        self.add_callback(_Conductor(self))

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
        if not self.course.logs_at(step + 1):
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
        row = {
            "temperature": self.objective.tau,
            "learning_rate": logs["learning_rate"],
            "grad_norm": float(logs["grad_norm"]),
            "epoch": step * self.config.batch_size / len(self.examples),
            "seconds": self.course.seconds,
        }
        self.course.write_row({"step": step, **values, **row, **self.parts})
        self.detail = f"loss {values['loss']:.3f}"

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Validate, keep the weights if they are the best, and see whether patience is at its end."""
        self.control.should_evaluate = False
        if self.course.validate is None:
            return {}
        with self.meter.pause():
            values = self.course.judge(self.lm, self.state.global_step, self.args.device)
        if self.course.stopped == "patience":
            self.control.should_save = self.control.should_training_stop = True
        return values

    def learned(self) -> dict[str, Any]:
        """What a checkpoint is of; a run with anything else cannot go on from it."""
        return {
            "objective": self.objective.settings(),
            "trained parameters": sum(p.numel() for p in self.lm.parameters() if p.requires_grad),
            "examples": self.examples.fingerprint(),
        }

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write ``checkpoint-N`` whole or not at all, then remove the oldest."""
        step, t = self.state.global_step, self.objective.temperature
        with self.meter.pause():
            state = {
                "temperature": t.state_dict() if isinstance(t, AdaptiveTemperature) else None,
                "meter": self.meter.state_dict(),
            }
            files = {
                "optimizer.pt": self.optimizer.state_dict(),
                "scheduler.pt": self.lr_scheduler.state_dict(),
            }
            random_states = processes.gather_objects(random_state(self.args.device))
            files |= {_random_file(i): numbers for i, numbers in enumerate(random_states)}
            processes.on_first(lambda: self.course.save(self.lm, step, self.learned(), state, files))

    def take_up(self, checkpoint: Path) -> None:
        """Continue from a checkpoint: all but what `restore` sets once the optimiser exists.

        Raises:
            UserError: The checkpoint is of another run.
        """
        state = self.course.take_up(self.lm, checkpoint, self.learned())
        self.checkpoint, self.first_step = checkpoint, int(state["step"])
        if isinstance(self.objective.temperature, AdaptiveTemperature):
            self.objective.temperature.load_state_dict(state["temperature"])
        if processes.is_first():  # its sums are those of all processes
            self.meter.load_state_dict(state["meter"])

    def restore(self) -> None:
        """The part of a resume that needs the optimiser; the last thing before the first step."""
        state = None
        if self.checkpoint is not None:
            load = functools.partial(torch.load, map_location="cpu", weights_only=True)
            self.optimizer.load_state_dict(load(self.checkpoint / "optimizer.pt"))
            self.lr_scheduler.load_state_dict(load(self.checkpoint / "scheduler.pt"))
            self.state.global_step = self.first_step
            file = self.checkpoint / _random_file(processes.rank())
            state = load(file) if file.is_file() else None
        if state is not None:
            set_random_state(state, self.args.device)
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
        trainer, course, step = self.trainer, self.trainer.course, state.global_step
        trainer.meter.counts["steps"] += 1
        course.see(step)
        control.should_training_stop = course.stopped is not None
        control.should_log = control.should_training_stop or course.logs_at(step)
        control.should_evaluate = course.validates_at(step)
        control.should_save = course.saves_at(step)
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
        lr_scheduler_type=_THEIR_SCHEDULES[config.schedule],
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
