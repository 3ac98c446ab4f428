"""What a training step costs: rows packed and logits where they count, against a plain ``transformers.Trainer``.

Both sides train the same model on the same rows in the same batches with the language-modelling loss over target
titles (or, with ``--support trie``, ours uses the softmax over valid tokens, which the plain side does not have). The
plain side is the usual recipe: one padded row a window, labels of -100 on the prompt, the model's own loss over all
positions. Gradients are compared first; then steps of both alternate, and the first of each round is left out.

    python benchmarks/train_step.py [--data games|office|books] [--model tiny|smollm2-135m-q4] [--quick]

The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from benchmarks._command import parsed  # noqa: E402
from benchmarks._data import SHARED, SYNTHETIC, prepared  # noqa: E402
from triewise.models import load_backbone  # noqa: E402
from triewise.settings import TrainingSettings  # noqa: E402
from triewise.tokens import Trie, build_prompts, zero_gain  # noqa: E402
from triewise.training import Examples, Objective, make_windows, target_counts  # noqa: E402
from triewise.training.objective import MicroBatches, TitleLoss  # noqa: E402
from triewise.training.trainer import TrieTrainer  # noqa: E402
from triewise.training.windows import batch_order, chains  # noqa: E402

SOURCES = {
    "games": f"d3:{SHARED / 'amazon_games_d3'}",
    "office": f"msl:{SHARED / 'amazon_office'}",
    "books": f"msl:{SHARED / 'amazon_books'}",
    SYNTHETIC: SYNTHETIC,
}
TEMPLATE = {"games": "d3", "office": "msl", "books": "msl", SYNTHETIC: "plain"}


def load(data: str, model: str) -> tuple[Any, Examples]:
    """A model and the training rows of a data set, with histories of ten titles."""
    dataset = prepared(SOURCES[data])
    rows, catalog, info = dataset.train, dataset.catalog, dataset.info
    backbone = load_backbone(model, titles=catalog.title, seed=0)
    prompts = build_prompts(
        backbone.tokenizer, catalog, TEMPLATE[data], info["noun"], info["verb"], max_history=10
    )
    trie = Trie.from_sequences((prompts.title_tokens.values, prompts.title_tokens.offsets))
    windows = make_windows(rows, "last", prompts)
    gain = zero_gain(trie, target_counts(windows, catalog.n_items))
    return backbone.model, Examples(windows, prompts, trie, None, gain)


class PlainRows(torch.utils.data.Dataset[dict[str, list[int]]]):
    """One window a row, as tutorials do it: ids, and labels that leave the prompt out."""

    def __init__(self, examples: Examples, order: np.ndarray) -> None:
        self.examples, self.order = examples, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        row = self.examples.windows.items[int(self.order[index])]
        prompt = self.examples.prompts.encode(row[:-1].tolist())
        title = self.examples.prompts.title_tokens[int(row[-1])].tolist()
        return {"input_ids": [*prompt, *title], "labels": [-100] * len(prompt) + title}


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pad on the right to the longest row, with an attention mask."""
    width = max(len(row["input_ids"]) for row in rows)

    def padded(values: list[int], fill: int) -> list[int]:
        return values + [fill] * (width - len(values))

    return {
        "input_ids": torch.tensor([padded(row["input_ids"], 0) for row in rows]),
        "labels": torch.tensor([padded(row["labels"], -100) for row in rows]),
        "attention_mask": torch.tensor([padded([1] * len(row["input_ids"]), 0) for row in rows]),
    }


class Clock(TrainerCallback):
    """Seconds of each optimiser step."""

    def __init__(self) -> None:
        self.steps: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.since = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        self.steps.append(time.perf_counter() - self.since)


class InOrder(Trainer):
    """The plain Trainer on rows in the order they are given."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def plain_steps(model: Any, examples: Examples, order: np.ndarray, at_once: int, out: Path) -> list[float]:
    """Seconds of each step of the plain side, ``at_once`` rows a forward and the rest accumulated."""
    clock = Clock()
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=len(order),
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=order.shape[1] // at_once,
        learning_rate=1e-5,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        optim="adamw_torch_fused",
    )
    rows = PlainRows(examples, order.reshape(-1))
    InOrder(model, arguments, data_collator=collate, train_dataset=rows, callbacks=[clock]).train()
    return clock.steps


def our_steps(
    model: Any, examples: Examples, settings: TrainingSettings, support: str, out: Path
) -> list[float]:
    """Seconds of each step of ours."""
    clock = Clock()
    trainer = TrieTrainer(model, examples, Objective(support), settings, out)
    trainer._save_checkpoint = lambda *args: None  # both sides write nothing
    trainer.add_callback(clock)
    trainer.train()
    return clock.steps


def gradient_gap(model: Any, examples: Examples, order: np.ndarray) -> float:
    """Largest relative difference of a parameter's gradient on some rows (1, B), both sides, the same loss."""
    module = TitleLoss(model, Objective("vocabulary"), examples.trie).train()
    batch = MicroBatches(examples, module.objective, order, packing=True)[0]
    total, _ = batch.pop("contribution"), batch.pop("counts")
    model.zero_grad()
    (module(**batch)["loss"] / total).backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    rows = PlainRows(examples, order[0])
    model(**collate([rows[i] for i in range(len(rows))])).loss.backward()
    gaps = [
        float((ours[name] - p.grad).norm() / p.grad.norm().clamp(min=1e-12))
        for name, p in model.named_parameters()
        if p.grad is not None
    ]
    model.zero_grad()
    return max(gaps)


def factor(examples: Examples, order: np.ndarray) -> dict[str, float]:
    """Tokens of padded rows, and of rows without padding, for each place of the packed micro-batches."""
    places = padded = tokens = 0
    for rows in order:
        batch = examples.batch(rows)
        packed = MicroBatches(examples, Objective("vocabulary"), rows[None], packing=True)[0]
        places += packed["input_ids"].numel() + len(packed.get("prefix_ids", ()))
        padded, tokens = padded + batch.input_ids.size, tokens + batch.n_tokens
    return {"against_padded": round(padded / places, 3), "against_unpadded": round(tokens / places, 3)}


def _peak(side: str, options: argparse.Namespace, queue: Any) -> None:
    torch.set_num_threads(options.threads)
    model, examples = load(options.data, options.model)
    order, settings = plan(examples, options, 1)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak of loading
    with tempfile.TemporaryDirectory() as out:
        if side == "plain":
            plain_steps(model, examples, order, options.plain_rows, Path(out))
        else:
            our_steps(model, examples, settings, options.support, Path(out))
    queue.put(_resident("VmHWM") - before)


def _resident(name: str) -> int:
    """Bytes of resident memory: ``VmRSS`` now, ``VmHWM`` at its peak."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(text.split(f"{name}:")[1].split()[0]) * 1024


def peak_bytes(side: str, options: argparse.Namespace) -> int:
    """How far the resident memory of a fresh process rises over one step, optimiser included (Linux)."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak, args=(side, options, queue))
    process.start()
    result = int(queue.get(timeout=550))
    process.join()
    return result


def plan(examples: Examples, options: argparse.Namespace, steps: int) -> tuple[np.ndarray, TrainingSettings]:
    """The same order for both sides: whole users, or rows at random."""
    chain = chains(examples.windows) if options.order == "chains" else None
    settings = TrainingSettings(
        steps=steps,
        learning_rate=1e-5,
        batch_size=options.rows,
        order=options.order,
        log_every=1000,
        gradient_checkpointing=options.gradient_checkpointing,
    )
    return batch_order(len(examples), options.rows, steps, 0, chain), settings


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=SOURCES, default="games")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--order", choices=("chains", "rows"), default=None, help="default: chains for games")
    parser.add_argument("--support", choices=("vocabulary", "trie"), default="vocabulary")
    parser.add_argument("--rows", type=int, default=32, help="rows of one step")
    parser.add_argument(
        "--plain-rows", type=int, help="rows of a forward of the plain side, the rest is accumulated"
    )
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--gradient-checkpointing", action="store_true", help="of ours")
    parser.add_argument("--no-memory", action="store_true", help="leave the peak memory out")
    options = parsed(parser, data=SYNTHETIC, rows=8, steps=2, rounds=1, no_memory=True)
    options.order = options.order or ("chains" if options.data == "games" else "rows")
    options.plain_rows = options.rows if options.plain_rows is None else options.plain_rows
    if options.plain_rows < 1 or options.rows % options.plain_rows:
        parser.error("--rows must be a multiple of --plain-rows, and that at least 1")
    torch.set_num_threads(options.threads)
    model, examples = load(options.data, options.model)
    order, settings = plan(examples, options, options.steps + 1)
    gap = gradient_gap(model, examples, order[:1, : options.plain_rows])
    assert gap < 1e-3, f"gradients differ by {gap:.2g}"
    print(f"gradients: largest relative difference {gap:.2g}", file=sys.stderr)
    seconds: dict[str, list[float]] = {"plain": [], "ours": []}
    with tempfile.TemporaryDirectory() as out:
        for _ in range(options.rounds):
            seconds["plain"] += plain_steps(model, examples, order, options.plain_rows, Path(out))[1:]
            seconds["ours"] += our_steps(model, examples, settings, options.support, Path(out))[1:]
    rng = np.random.default_rng(0)
    a, b = (np.array(seconds[side]) for side in ("plain", "ours"))
    draws = rng.integers(0, len(a), (2000, len(a)))
    low, high = np.quantile(a[draws].sum(1) / b[draws].sum(1), (0.025, 0.975))
    many = plan(examples, options, 40)[0]
    result: dict[str, Any] = {
        "benchmark": "train_step",
        "same_gradients": True,
        "gradient_gap": gap,
        "speedup": round(float(a.sum() / b.sum()), 2),
        "interval": [round(float(low), 2), round(float(high), 2)],
        "rows_per_second": {side: round(options.rows * len(s) / sum(s), 2) for side, s in seconds.items()},
        "packing": factor(examples, many),
        "rows": options.rows,
        "plain_rows": options.plain_rows,
        "model": options.model,
        "data": options.data,
        "order": options.order,
        "support": options.support,
        "gradient_checkpointing": options.gradient_checkpointing,
        "vocabulary": int(model.get_output_embeddings().weight.shape[0]),
        "threads": options.threads,
    }
    if not options.no_memory and Path("/proc/self/clear_refs").exists():
        peaks = {side: peak_bytes(side, options) for side in ("plain", "ours")}
        result |= {"peak_bytes": peaks, "memory_ratio": round(peaks["plain"] / max(peaks["ours"], 1), 2)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
