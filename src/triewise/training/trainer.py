"""Training: a ``transformers.Trainer`` that owns the normaliser, the data order and its checkpoints.

What is wrapped and called is one thin module, `TitleLoss`: body, hidden states at the target positions, head,
loss. A resumed run ends with the weights of an uninterrupted one; on a CPU with the same number of threads and
processes they are equal bit by bit.

In several processes (`torchrun`, ``accelerate launch``; DDP) each micro-batch is dealt out: P processes take B / P
windows each, at the same time. Divisor, adaptive temperature and log are those of all of them, so that the number
of processes changes nothing but rounding and dropout. The first one writes, prints and validates. Where the launcher
asks for FSDP2, each has a part of the weights: see `sharding`.

Shape key: B batch, L tokens, D width, V vocabulary, M target positions.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import AutocastKwargs
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.training_args import ParallelMode

from triewise.models import check_model, compute_again, freeze_first, rope_switch, shortest_window, slots_of
from triewise.settings import TrainingSettings
from triewise.tokens import Dropped
from triewise.training import processes
from triewise.training.ahead import Ahead, all_workers_alive, default_workers
from triewise.training.checkpoints import (
    SHARDS,
    load_state,
    random_file,
    random_state,
    seed_others,
    set_random_state,
)
from triewise.training.frozen import kept_states
from triewise.training.meter import PARTS, Meter, measure_parts
from triewise.training.objective import Learned, MicroBatches, Objective
from triewise.training.packing import packing_works
from triewise.training.rates import floor_cosine
from triewise.training.sharding import Shards, shardable_twin
from triewise.training.state import BY_ITSELF, TrainingState, TrainResult, Validate, Watch
from triewise.training.temperature import AdaptiveTemperature
from triewise.training.windows import batch_order, chains

if TYPE_CHECKING:
    from triewise.settings import TrainingSettings
    from triewise.training.examples import Examples

LONG_ROWS = 64  # histories that are read for the length at which packing is probed
_THEIR_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


def train(
    model: Any,
    examples: Examples,
    objective: Learned,
    settings: TrainingSettings,
    out: Path,
    *,
    seed: int = 0,
    autocast: bool = False,
    validate: Validate | None = None,
    resume: bool = False,
    title: str = "",
    watch: Watch | None = None,
    facts: Mapping[str, Any] | None = None,
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
        settings: Budget and optimiser.
        out: Folder for the log, checkpoints and best weights.
        seed: Of data order and dropout.
        autocast: Whether forwards compute in bfloat16; weights, gradients and the optimiser stay as they are.
        validate: From the model to metrics; called every ``evaluate_every`` steps. It may raise `state.Stop`.
        resume: Go on from the newest whole checkpoint in ``out``, or from the start where there is none;
            ``model`` and ``objective`` as they were when the run was started. False: start anew; what an
            earlier run left in ``out`` is removed.
        title: What the progress line calls this run.
        watch: Told each row of the log; a reason that it gives after a validation ends the run as a `Stop` does.
        facts: Hyper-parameters for `training.report_to`; None: those that a resumed run must share.

    Raises:
        UserError: ``evaluate_every`` without ``validate``, a checkpoint of another run, a batch that cannot be dealt
            out to the processes, one of which has died, or a worker, a metric that ``validate`` does not give, a loss
            that is not finite, frozen layers whose states cannot be kept, or a model that `check_model` refuses.
    """
    processes.start()
    with processes.together():
        check_model(model, examples.prompts.tokenizer)
        trainer = TrieTrainer(model, examples, objective, settings, out, seed, validate, autocast)
        result = trainer.run.conduct(trainer.go_on, trainer.take_steps, resume, title, watch, facts)
        if settings.gradient_checkpointing:
            compute_again(model, False)
        return result


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
        settings: TrainingSettings,
        out: Path,
        seed: int = 0,
        validate: Validate | None = None,
        autocast: bool = False,
    ) -> None:
        freeze_first(model, settings.freeze)
        trained = shardable_twin(model) if processes.sharded() else model
        self.titles = objective.module(trained, examples.trie)
        super().__init__(self.titles, _arguments(model, settings, seed, out, autocast))
        self.lm, self.examples, self.learned, self.settings = model, examples, objective, settings
        learned = {
            "objective": objective.settings(),
            "trained parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "examples": examples.fingerprint(),
            **({"autocast": "bfloat16"} if autocast else {}),
        }
        self.run = TrainingState(model, self.args.device, learned, settings, seed, out, validate)
        if settings.gradient_checkpointing:
            compute_again(trained, True)
        self.titles.kept = None
        if self.titles.by_hand:
            self.titles.kept = kept_states(model, examples, settings, out, processes.count() == 1)
        packing = settings.packing and self.titles.by_hand and self.titles.kept is None
        self.packing = packing and packs(model, examples, self.titles.many_rows)
        self.loader: Ahead | None = None
        if processes.sharded():
            self.run.shards = Shards(model, self.titles)
            _leave_alone(self.accelerator)
        self.checkpoint: Path | None = None
        self.first_step = 0
        self.rows = np.zeros((0, 0), dtype=np.int64)  # windows of each micro-batch that is left
        self.meter = Meter(torch.zeros(4, device=self.args.device))
        self.parts: dict[str, float | None] = {}  # of the step that runs now
        self.advance: Callable[..., None] = lambda n=1, detail="": None
        self.detail = ""
        self.add_callback(_Conductor(self))

    def take_steps(self, advance: Callable[..., None]) -> None:
        """All steps that are left; ``advance`` of `progress` is told of each."""
        self.advance = advance
        with all_workers_alive(), self.titles.kept or contextlib.nullcontext():
            try:
                self.train()
            finally:
                if self.loader is not None:
                    self.loader.close()
        if self.titles.kept is not None and self.run.stopped in BY_ITSELF:
            self.titles.kept.ended()

    def get_train_dataloader(self) -> Ahead:
        """This process's part of the micro-batches that are left; nothing is read to be skipped."""
        settings, size = self.settings, self.examples.size
        chain = chains(self.examples.windows) if settings.order == "chains" else None
        order = batch_order(len(size), settings.batch_size, settings.steps, self.run.seed, chain)
        order = order[self.first_step :]
        if chain is None:
            # Within a step by length: a micro-batch is padded to its longest; the step's gradient stays the same.
            order = np.take_along_axis(order, np.argsort(size[order], axis=1, kind="stable"), axis=1)
        # The same micro-batches for any number of processes; each takes neighbours.
        self.rows = processes.part(order.reshape(-1, settings.batch_size // settings.accumulation))
        left = self.learned.batches(self.examples, self.rows, self.packing)
        left.numbered = self.titles.kept is not None
        workers = settings.workers
        if workers is None:
            workers = 0 if left.asks_a_model else default_workers(self.args.device)
        self.loader = Ahead(left, self.args.device, workers)
        return self.loader

    def _prepare_input(self, data: Any) -> Any:
        """To the device; nothing waits for a copy from pinned memory."""
        if isinstance(data, torch.Tensor):
            return data.to(self.args.device, non_blocking=self.args.device.type == "cuda")
        return super()._prepare_input(data)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The micro-batches of one optimiser step, and the divisor that all of them share."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        if self.settings.log_parts:
            self.parts = dict.fromkeys(PARTS) | self.parts_of_next_step()
        # ``pairs``: what the second part of a loss (Flower's) is a mean over.
        ours = [math.fsum(batch.pop(name, 0) for batch in batches) for name in ("contribution", "pairs")]
        total, pairs = (math.fsum(values) for values in zip(*processes.gather(ours), strict=True))
        divisor = float(self.learned.divisor(torch.tensor(total, dtype=torch.float64)))
        if pairs:
            batches = [batch | {"pair_weight": divisor / pairs} for batch in batches]
        return batches, divisor

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The course of the learning rate."""
        settings = self.settings
        if settings.schedule != "cosine-floor":
            return super().create_scheduler(num_training_steps, optimizer)
        share = functools.partial(floor_cosine, steps=settings.steps, warmup=settings.warmup_steps)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, share)
        return self.lr_scheduler

    def parts_of_next_step(self) -> dict[str, float]:
        """What ``log_parts`` adds to the row of the step that is about to begin; nothing where it has none."""
        step, n = self.state.global_step, self.settings.accumulation
        if not self.run.logs_at(step + 1):
            return {}
        rows = self.rows[(step - self.first_step) * n :][:n]
        # Trie support leaves forced tokens out, but invalid tokens cost something there too.
        batches = MicroBatches(self.examples, Objective("vocabulary"), rows)
        state, shards = random_state(self.args.device), self.run.shards
        whole = shards.whole(everywhere=True) if shards else contextlib.nullcontext()
        with self.meter.pause(), self.compute_loss_context_manager(), whole:
            titles = self.learned.module(self.lm, self.examples.trie) if shards else self.titles
            titles.train()
            parts = measure_parts(titles, [self._prepare_inputs(batches[i]) for i in range(len(rows))])
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
            "temperature": self.learned.objective.tau,
            "learning_rate": logs["learning_rate"],
            "grad_norm": float(logs["grad_norm"]),
            "epoch": step * self.settings.batch_size / len(self.examples),
            "seconds": self.run.seconds,
        }
        self.run.write_row({"step": step, **values, **row, **self.parts})
        self.detail = f"loss {values['loss']:.3f}"

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Validate; where that ends the run, a checkpoint comes next."""
        self.control.should_evaluate = False
        with self.meter.pause():
            values = self.run.validate()
        if self.run.stopped is not None:
            self.control.should_save = self.control.should_training_stop = True
        return values

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write ``checkpoint-N`` whole or not at all, then remove the oldest."""
        t = self.learned.objective.temperature
        with self.meter.pause():
            state = {
                "temperature": t.state_dict() if isinstance(t, AdaptiveTemperature) else None,
                "meter": self.meter.state_dict(),
            }
            files = {"scheduler.pt": self.lr_scheduler.state_dict()}
            shards = self.run.save_shards(self.optimizer)
            if shards is None:
                files["optimizer.pt"] = self.optimizer.state_dict()
            random_states = processes.gather_objects(random_state(self.args.device))
            files |= {random_file(i): numbers for i, numbers in enumerate(random_states)}
            processes.on_first(lambda: self.run.save(state, files, shards))
        if self.titles.kept is not None:
            self.titles.kept.save()

    def go_on(self, checkpoint: Path) -> None:
        """Continue from a checkpoint: all but what `restore` sets once the optimiser exists."""
        self.run.resume(checkpoint, self._take)
        self.checkpoint, self.first_step = checkpoint, self.run.step

    def _take(self, state: dict[str, Any]) -> None:
        t = self.learned.objective.temperature
        if isinstance(t, AdaptiveTemperature):
            t.load_state_dict(state["temperature"])
        if processes.is_first():  # its sums are those of all processes
            self.meter.load_state_dict(state["meter"])

    def restore(self) -> None:
        """The part of a resume that needs the optimiser; the last thing before the first step."""
        file = None
        if self.checkpoint is not None:
            if self.run.shards is None:
                load_state(self.checkpoint / "optimizer.pt", self.optimizer.load_state_dict)
            else:
                self.run.shards.load(self.checkpoint / SHARDS, self.optimizer)
            load_state(self.checkpoint / "scheduler.pt", self.lr_scheduler.load_state_dict)
            self.state.global_step = self.first_step
            file = self.checkpoint / random_file(processes.rank())
        if file is not None and file.is_file():
            load_state(file, functools.partial(set_random_state, device=self.args.device))
        else:
            seed_others(self.run.seed, self.first_step)
        self.meter.since = time.monotonic()


def packs(model: Any, examples: Examples, many_rows: bool = False) -> bool:
    """Whether rows of these examples may be packed for this model; those of several targets share nothing.

    Unless ``many_rows``: each becomes several rows.
    """
    if (
        not many_rows
        and int((examples.windows.items.lengths - examples.windows.n_context).max(initial=0)) > 1
    ):
        return False
    return packing_works(model, np.unique(examples.trie.token[1:]), _longest_row(model, examples))


def _longest_row(model: Any, examples: Examples) -> int:
    """Tokens of the longest prompt with the longest title behind it.

    All prompts are made where the model has a limit that matters, else only those of the histories with most text.
    """
    windows, prompts = examples.windows, replace(examples.prompts, dropped=Dropped())
    title, most = int(examples.trie.depth.max()), np.argsort(-examples.size, kind="stable")
    window, switch = shortest_window(model), rope_switch(model)
    limit = min(window or 1 << 62, switch.tokens if switch else 1 << 62)
    most = most[:LONG_ROWS] if limit >= prompts.max_tokens + title else most
    start = windows.items.offsets[most]
    n_before = windows.items.lengths[most] - 1
    contexts = (windows.items.values[s : s + n] for s, n in zip(start, n_before, strict=True))
    return max(len(prompts.encode(context.tolist())) for context in contexts) + title


class _Conductor(TrainerCallback):  # type: ignore[misc]
    """Says after each step what the Trainer does next: log, validate, save, stop."""

    def __init__(self, trainer: TrieTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.restore()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, run, step = self.trainer, self.trainer.run, state.global_step
        trainer.meter.counts["steps"] += 1
        run.check_stop(step)
        control.should_training_stop = run.stopped is not None
        control.should_log = control.should_training_stop or run.logs_at(step)
        control.should_evaluate = run.validates_at(step)
        control.should_save = run.saves
        trainer.advance(1, trainer.detail)


def _leave_alone(accelerator: Any) -> None:
    """Let accelerate wrap autocast around a sharded module and nothing else.

    Without a cache of casts: it would hold all weights in bfloat16 till a forward ends.
    """
    prepare = accelerator.prepare_model
    accelerator.prepare_model = lambda model, **_: prepare(
        model, device_placement=False, evaluation_mode=True
    )
    accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)


def _arguments(
    model: Any, settings: TrainingSettings, seed: int, out: Path, autocast: bool
) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=settings.steps,
        per_device_train_batch_size=processes.share(settings),
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=_THEIR_SCHEDULES.get(settings.schedule, "constant"),
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        seed=seed,
        bf16=autocast,
        optim="adamw_torch" if model.device.type in ("mps", "meta") else "adamw_torch_fused",
        use_cpu=model.device.type in ("cpu", "meta"),
        logging_strategy="no",
        eval_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_nan_inf_filter=False,  # it would wait for the device at every step
        ddp_find_unused_parameters=slots_of(model) is not None,  # projections, in batches of text alone
    )
    # Else the Trainer wraps the model in DataParallel where it sees more.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    if arguments.parallel_mode != ParallelMode.DISTRIBUTED:  # else each process has its own device
        _stay(arguments, model.device)
    return arguments


def _stay(arguments: TrainingArguments, device: torch.device) -> None:
    """Train on the device that the model is on: transformers takes the first one of its kind."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    arguments.__dict__["_setup_devices"] = device  # what the property `device` has kept
    arguments.distributed_state.device = device  # accelerate's, of which there is one
