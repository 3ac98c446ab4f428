"""How much faster is an epoch of SASRec on shifted sequences than with one row per prefix?

    python benchmarks/sequential.py [--length L] [--users N] [--rounds R] [--batch T] [--quick]

MovieLens 1M, leave-one-out; the training rows of the first N users, histories of at most L items. Both formulations
have the same targets (checked) and the same loss, cross-entropy over all items, at the same number of targets a step.
`shifted` puts each sequence through the encoder once and takes every item after the first as a target; `prefix` has a
row for each target. They alternate in one process, a whole epoch of each per round, after a warm-up; the seconds are
those of making batches, forward, backward and the optimiser. What differs: a target's history is the L items before
it with one row per prefix, and 1 to L of them in a shifted sequence.

The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from benchmarks._command import parsed  # noqa: E402
from benchmarks._data import SYNTHETIC, prepared  # noqa: E402
from triewise.models import SequentialModel  # noqa: E402
from triewise.settings import SequentialSettings  # noqa: E402
from triewise.training import Sequences, make_windows, target_counts  # noqa: E402
from triewise.training.item_tasks import item_loss, shifted_task, task_loss  # noqa: E402

SASREC = SequentialSettings(encoder="sasrec")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="ml-1m")
    parser.add_argument("--length", type=int, default=40)
    parser.add_argument("--users", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1024, help="targets of a step, about")
    parser.add_argument("--threads", type=int, default=1)
    options = parsed(parser, data=SYNTHETIC, users=5, rounds=1)
    torch.set_num_threads(options.threads)
    dataset = prepared(options.data, max_history=options.length)
    train, n_items = dataset.train, dataset.catalog.n_items
    users = list(dict.fromkeys(train.user_id.tolist()))[: options.users]
    rows = train.take(np.flatnonzero(np.isin(train.user_id.astype(str), users)))
    windows = {way: make_windows(rows, name) for way, name in (("shifted", "every"), ("prefix", "last"))}
    counts = [target_counts(found, n_items) for found in windows.values()]
    n_targets = int(counts[0].sum())
    same = bool((counts[0] == counts[1]).all())
    assert same, "both formulations must have the same targets"
    seconds: dict[str, list[float]] = {"shifted": [], "prefix": []}
    losses = {}
    for round_ in range(options.rounds):
        for way, found in windows.items():
            model = SequentialModel(SASREC, n_items, options.length, seed=round_)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            data = Sequences.from_windows(found)
            per_step = max(round(options.batch * len(found) / n_targets), 1)
            order = np.random.default_rng(round_).permutation(len(found))
            epoch(model, optimizer, data, order[: 2 * per_step], per_step)  # warm-up
            started = time.perf_counter()
            losses[way] = epoch(model, optimizer, data, order, per_step)
            seconds[way].append(time.perf_counter() - started)
            print(f"round {round_} {way}: {seconds[way][-1]:.2f} s", file=sys.stderr)
    ratios = np.array(seconds["prefix"]) / np.array(seconds["shifted"])
    found_facts = {
        "ratio": round(float(np.median(ratios)), 2),
        "ratio_min": round(float(ratios.min()), 2),
        "ratio_max": round(float(ratios.max()), 2),
        **{f"{way}_seconds": round(float(np.median(s)), 3) for way, s in seconds.items()},
        **{f"{way}_rows": len(found) for way, found in windows.items()},
        **{f"{way}_loss": round(loss, 4) for way, loss in losses.items()},
        "targets": n_targets,
        "same_targets": same,
        "users": options.users,
        "items": n_items,
        "length": options.length,
        "threads": options.threads,
    }
    print(json.dumps(found_facts))


def epoch(
    model: SequentialModel,
    optimizer: torch.optim.Optimizer,
    data: Sequences,
    order: np.ndarray,
    per_step: int,
) -> float:
    """One pass over the windows in ``order``; the mean loss of its steps."""
    losses, rng = [], np.random.default_rng(0)
    loss_of = item_loss(model, SASREC, np.zeros(model.n_items, dtype=np.int64))
    model.train()
    for start in range(0, len(order), per_step):
        loss = task_loss(model, shifted_task(data, order[start : start + per_step]), loss_of, rng)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return float(torch.stack(losses).mean())


if __name__ == "__main__":
    main()
