"""The main job on real data: MovieLens 100K, small models that write titles or codes, SASRec, ranking, a report.

Two models are trained side by side, each with half of the threads, and ranked as soon as they are trained: threads
that wait for each other lose most where a machine has other work. What shows more than the main rows comes last, with
half of the steps and as far as the time allows.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triewise.app.compare import report_runs
from triewise.app.folders import open_data
from triewise.app.runs import evaluate_run, train_run
from triewise.progress import in_lines, note
from triewise.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from triewise.reports import Report

LIMIT_S = 600.0
RESERVE_S = 90.0  # for ranking the main rows, comparing and drawing
QUICK = ("training.steps=40", "training.warmup_steps=5", "evaluation.users=100")
QUICK_LIMIT_S = 60.0
QUICK_RESERVE_S = 25.0
REPORT_S = 20.0  # what comparing and drawing take of the reserve
LANES = 2
# Recipe, run folder, the key that names SASRec's run, and how long a step takes beside one of MSL.
FURTHER = (
    ("ml-100k/msl-soft", "msl-taught", "objective.soft_targets", 1.2),
    ("ml-100k/msl-codes", "msl-codes", "identifier.items", 0.6),
)


@dataclass(frozen=True)
class DemoResult:
    """What the demo made, and the titles of the rows that there was no time for."""

    report: Report
    html: Path
    seconds: float
    quick: bool
    left_out: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "rows": {row.name: row.metrics for row in self.report.rows},
            "comparisons": [vars(comparison) for comparison in self.report.comparisons],
            "report": str(self.html),
            "seconds": round(self.seconds, 1),
            "left_out": list(self.left_out),
        }


def run_demo(out: Path = Path("runs/demo"), *, quick: bool = False, seed: int = 0) -> DemoResult:
    """Fetch ml-100k, train small models, rank the catalogue for every test user, write ``report.html``.

    Steps are fixed in the recipes. MSL, LML and SASRec (``demo/msl``, ``demo/lml``, ``demo/sasrec``) are always there:
    their training stops early where the time limit (10 minutes, 1 for ``quick``) would be passed, and the report says
    so. MSL taught by SASRec and MSL over codes of its item vectors have half the steps of their recipes and begin only
    where they are expected to end in time; a line says which are left out.

    Args:
        out: Folder of the run folders and the report.
        quick: Few steps and 100 users, for a first look and for CI.
        seed: Seed of all runs.
    """
    started = time.time()
    limit, reserve = (QUICK_LIMIT_S, QUICK_RESERVE_S) if quick else (LIMIT_S, RESERVE_S)
    changes = [f"seed={seed}", *(QUICK if quick else ())]
    msl, lml, sasrec = (load_recipe(f"demo/{name}", changes) for name in ("msl", "lml", "sasrec"))
    dataset = open_data(msl)
    note(
        f"ml-100k: {dataset.test.n_rows} users, {dataset.catalog.n_items} items; leave-one-out: each user's last item "
        "is the test, the one before validation; items already seen are excluded from rankings"
    )
    runs, left_out = [out / recipe.name for recipe in (msl, lml, sasrec)], []
    end = started + limit - reserve
    with _lanes() as pool:
        words = pool.submit(_row, msl, runs[0], end)
        pool.submit(_row, sasrec, runs[2], started + (limit - reserve) / 3).result()
        running: list[Future[tuple[float, float]]] = [pool.submit(_row, lml, runs[1], end)]
        training_s, ranking_s = words.result()
        end = started + limit - REPORT_S - ranking_s
        for name, folder, teacher, share in FURTHER:
            recipe = load_recipe(name, [f"name={folder}", f"{teacher}={json.dumps(str(runs[2]))}"])
            recipe = recipe.changed(f"training.steps={recipe.training.steps // 2}", *changes)
            if sum(not row.done() for row in running) == LANES:
                wait([row for row in running if not row.done()], return_when=FIRST_COMPLETED)
            expected = share * training_s * recipe.training.steps / msl.training.steps
            if time.time() + expected > end:
                left_out.append(recipe.title or name)
                said = f"{time.time() - started:.0f} of {limit:.0f} s have passed: {left_out[-1]} is left out"
                note(f"{said}; triewise run demo/sasrec, then triewise run {name} make it")
                continue
            runs.append(out / folder)
            running.append(pool.submit(_row, recipe, runs[-1], end))
        for row in running:
            row.result()
    html = out / "report.html"
    result = DemoResult(report_runs(runs, html), html, time.time() - started, quick, tuple(left_out))
    if result.seconds > limit:
        note(
            f"the demo took {result.seconds:.0f} s in the place of {limit:.0f}: this machine is slow, or busy"
        )
    return result


@contextmanager
def _lanes() -> Iterator[ProcessPoolExecutor]:
    """Processes that make rows; after an error or Ctrl-C none that waits is begun."""
    pool = ProcessPoolExecutor(LANES, multiprocessing.get_context("spawn"), _share_threads)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _share_threads() -> None:
    """In each process: its part of the threads, and lines in the place of bars, which would overwrite each other."""
    import torch

    torch.set_num_threads(max(1, torch.get_num_threads() // LANES))
    in_lines()


def _row(recipe: Recipe, run: Path, end: float) -> tuple[float, float]:
    """Train and rank; seconds of both. ``end``: by when training has to stop, as of ``time.time``."""
    began = time.time()
    result = train_run(recipe.changed(f"training.time_limit_s={max(end - began, 1.0)}"), run, overwrite=True)
    if result.stopped == "interrupted":
        raise KeyboardInterrupt
    trained = time.time()
    evaluate_run(run)
    return trained - began, time.time() - trained
