"""Part: one training step of published shapes, ours against a plain `transformers.Trainer`.

Both sides: float32 weights under bfloat16 autocast, AdamW (fused), the language-modelling loss over target titles on
the same rows, 64 of them a step. The plain side pads each row and takes its own loss over all positions.
"""

from __future__ import annotations

import contextlib
import gc
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainingArguments

from benchmarks.gpu.data import Options, dataset, prompts_of
from benchmarks.gpu.report import Report, Row, ceilings, peak_gb, stops, synchronise
from benchmarks.gpu.shapes import build, shape_of
from benchmarks.train_step import InOrder, PlainRows, collate
from triewise.settings import TrainingSettings
from triewise.tokens import zero_gain
from triewise.training import Examples, Objective, make_windows, target_counts
from triewise.training.objective import MicroBatches
from triewise.training.trainer import TrieTrainer
from triewise.training.windows import batch_order, chains

# Shape, data, order, and rows of a forward of ours: office rows share less, and 64 of them would not fit.
CASES = (
    *(("1.5B", "games", "chains", 64), ("0.5B", "games", "chains", 64), ("135M", "office", "rows", 64)),
    *(("135M", "games", "chains", 64), ("0.5B", "office", "rows", 16), ("1.5B", "office", "rows", 16)),
)
NAMES = {"games": ("amazon_games_d3", "d3"), "office": ("amazon_office", "msl")}
ROWS, PLAIN_ROWS = 64, 16  # of a step; of a forward of the plain side
WARM, STEPS, PLAIN_STEPS = 2, 6, 3


class Clock(TrainerCallback):
    """Seconds of each optimiser step, launched work included, and where one that is not timed waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.steps = device, list[float]()
        self.stops: dict[str, int] = {}
        self.watched = contextlib.ExitStack()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        synchronise(self.device)
        self.since = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        synchronise(self.device)
        self.steps.append(time.perf_counter() - self.since)
        self.watched.close()
        if len(self.steps) == WARM - 1:  # from the batches of the next step on to its end
            self.stops = self.watched.enter_context(stops(self.device))


def run(report: Report, options: Options) -> None:
    """Most valuable first."""
    rates: Row = {}

    def measure_device(row: Row) -> None:
        rates.update(ceilings(options.device, options.half, 256 if options.tiny else 8192))
        row |= rates

    report.run("device", measure_device)
    known: dict[str, Examples] = {}
    for shape, data, order, together in CASES[1:3] if options.tiny else CASES:
        if data not in known:
            report.run(f"{data} rows", partial(_rows, options, data, known), needs_s=1)
        if data in known:
            work = partial(_case, report, options, shape, known[data], order, together, rates)
            report.run(f"{shape} {data}", work, needs_s=1 if options.tiny else 12)


def _rows(options: Options, data: str, known: dict[str, Examples], row: Row) -> None:
    name, template = NAMES[data]
    given = dataset(options, name)
    prompts, trie = prompts_of(options, given, template)
    windows = make_windows(given.train, "last", prompts)
    gain = zero_gain(trie, target_counts(windows, given.catalog.n_items))
    known[data] = Examples(windows, prompts, trie, None, gain)
    row |= {"windows": len(windows), "titles": trie.n_groups}


def _case(
    report: Report,
    options: Options,
    name: str,
    examples: Examples,
    order: str,
    together: int,
    rates: Row,
    row: Row,
) -> None:
    shape = shape_of(name, options.tiny, len(examples.prompts.tokenizer))
    rows, at_once = (8, 4) if options.tiny else (ROWS, PLAIN_ROWS)
    model = build(shape, options.device, torch.float32)
    row |= {"parameters": model.num_parameters(), "rows": rows, "order": order}
    chain = chains(examples.windows) if order == "chains" else None
    plan = batch_order(len(examples), rows, WARM + STEPS, 0, chain)
    # The plain side last: its Trainer leaves the model's forward under autocast.
    for side, support in (("ours", "vocabulary"), ("ours_trie", "trie"), ("plain", "")):
        if side != "ours" and report.left() < (0.0 if options.tiny else 6.0):
            row.setdefault("left_out", []).append(side)
            continue
        peak_gb(options.device, reset=True)
        before = torch.cuda.memory_allocated(options.device) / 1e9 if options.device.type == "cuda" else None
        if side == "plain":
            found = _plain(model, examples, plan[: WARM + PLAIN_STEPS], at_once, options)
        else:
            found = _ours(model, examples, plan, support, order, ROWS // together, options)
        seconds = float(np.median(found.pop("steps")[WARM:]))
        head_rows = found["places"] if side == "plain" else found["head_rows"]
        flops = 3 * shape.flops(found["places"], found["places"] / max(found["sequences"], 1) / 2, head_rows)
        row[side] = found | {
            "step_ms": 1e3 * seconds,
            "rows_per_second": rows / seconds,
            "tokens_per_second": found["tokens"] / seconds,
            "peak_gb": peak_gb(options.device),
            "gb_before": before,
            "share_of_matrix_rate": flops / seconds / rates.get("flops_per_second", float("inf")),
        }
        report.save()
        gc.collect()  # the Trainer and its optimiser are a circle
        if options.device.type == "cuda":
            torch.cuda.empty_cache()
    for side in ("ours", "ours_trie"):
        if side in row and "plain" in row:
            row[f"{side}_over_plain"] = row[side]["rows_per_second"] / row["plain"]["rows_per_second"]


def _plain(model: Any, examples: Examples, order: np.ndarray, at_once: int, options: Options) -> Row:
    clock = Clock(options.device)
    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            output_dir=out,
            max_steps=len(order),
            per_device_train_batch_size=at_once,
            gradient_accumulation_steps=order.shape[1] // at_once,
            learning_rate=1e-5,
            use_cpu=options.device.type == "cpu",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            optim="adamw_torch_fused",
        )
        rows = PlainRows(examples, order.reshape(-1))
        trainer = InOrder(model, arguments, data_collator=collate, train_dataset=rows, callbacks=[clock])
        trainer.train()
        mixed = str(trainer.accelerator.mixed_precision)
    sizes = [len(rows[i]["input_ids"]) for i in range(rows.order.size)]
    parts = np.array(sizes).reshape(-1, at_once)
    places = parts.max(1).sum() * at_once / len(order)
    return {
        "steps": clock.steps,
        "stops": {"count": sum(clock.stops.values()), "places": clock.stops},
        "precision": mixed,
        "places": places,
        "tokens": sum(sizes) / len(order),
        "sequences": order.shape[1],
    }


def _ours(
    model: Any,
    examples: Examples,
    order: np.ndarray,
    support: str,
    kind: str,
    accumulation: int,
    options: Options,
) -> Row:
    clock, objective, trie = Clock(options.device), Objective(support), support == "trie"
    config = TrainingSettings(
        steps=len(order),
        learning_rate=1e-5,
        batch_size=order.shape[1],
        accumulation=accumulation,
        order=kind,
        log_every=10_000,
    )
    with tempfile.TemporaryDirectory() as out:
        trainer = TrieTrainer(model, examples, objective, config, Path(out))
        trainer._save_checkpoint = lambda *args: None  # both sides write nothing
        trainer.add_callback(clock)
        trainer.take_steps(lambda *args: None)
        mixed, packing, loss = (
            str(trainer.accelerator.mixed_precision),
            trainer.packing,
            trainer.run.history[-1],
        )
    started = time.perf_counter()
    parts = MicroBatches(examples, objective, trainer.rows, packing)
    batches = [parts[i] for i in range(len(parts))]
    made = (time.perf_counter() - started) / len(order)
    return {
        "steps": clock.steps,
        "precision": mixed,
        "packing": packing,
        "loss": loss["loss"],
        "stops": {"count": sum(clock.stops.values()), "places": clock.stops},  # of one step; the aim is 0
        "workers": 0 if trainer.loader is None else trainer.loader.num_workers,
        "making_a_batch_ms": 1e3 * made,  # on the CPU, inside the step's time where there are no workers
        "rows_of_a_forward": order.shape[1] // accumulation,
        "places": sum(b["counts"]["places"] for b in batches) / len(order),
        "tokens": sum(b["counts"]["tokens"] for b in batches) / len(order),
        "sequences": sum(len(b["input_ids"]) for b in batches) / len(order),
        # A third more: blocks of vocabulary logits are computed again in the backward pass.
        "head_rows": 4 / 3 * sum(len(b["target"]) for b in batches) / len(order) if not trie else 0.0,
    }
