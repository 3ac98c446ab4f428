"""The main job on real data: MovieLens 100K, a small model trained with MSL and LML, SASRec, ranking, a report."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triewise.app.compare import report_runs
from triewise.app.folders import open_data
from triewise.app.runs import evaluate_run, train_run
from triewise.progress import note
from triewise.recipe import load_recipe

if TYPE_CHECKING:
    from triewise.reports import Report

LIMIT_S = 600.0
RESERVE_S = 90.0  # for ranking, comparing and drawing after the last training
QUICK = ("training.steps=40", "training.warmup_steps=5", "evaluation.users=100")
QUICK_LIMIT_S = 60.0
QUICK_RESERVE_S = 25.0


@dataclass(frozen=True)
class DemoResult:
    """What the demo made."""

    report: Report
    html: Path
    seconds: float
    quick: bool

    def as_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "rows": {row.name: row.metrics for row in self.report.rows},
            "comparisons": [vars(comparison) for comparison in self.report.comparisons],
            "report": str(self.html),
            "seconds": round(self.seconds, 1),
        }


def run_demo(out: Path = Path("runs/demo"), *, quick: bool = False, seed: int = 0) -> DemoResult:
    """Fetch ml-100k, train MSL, LML and SASRec, rank the catalogue for every test user, write ``report.html``.

    Steps are fixed in the recipes ``demo/msl``, ``demo/lml`` and ``demo/sasrec``. Training stops early where the
    time limit (10 minutes, 1 for ``quick``) would be passed, and the report says so.

    Args:
        out: Folder of the run folders and the report.
        quick: Few steps and 100 users, for a first look and for CI.
        seed: Seed of all runs.
    """
    started = time.monotonic()
    limit, reserve = (QUICK_LIMIT_S, QUICK_RESERVE_S) if quick else (LIMIT_S, RESERVE_S)
    changes = [f"seed={seed}", *(QUICK if quick else ())]
    recipes = [load_recipe(f"demo/{name}", changes) for name in ("msl", "lml", "sasrec")]
    dataset = open_data(recipes[0])
    note(
        f"ml-100k: {dataset.test.n_rows} users, {dataset.catalog.n_items} items; leave-one-out: each user's last item "
        "is the test, the one before validation; items already seen are excluded from rankings"
    )
    runs = [out / recipe.name for recipe in recipes]
    # The shortest first (SASRec, MSL, LML): what each leaves of its share of the time is there for the longer ones.
    pairs = list(zip(recipes, runs, strict=True))
    for i, (recipe, run) in enumerate((pairs[2], pairs[0], pairs[1])):
        left = limit - reserve - (time.monotonic() - started)
        limited = recipe.changed(f"training.time_limit_s={max(left / (len(runs) - i), 1.0)}")
        result = train_run(limited, run, overwrite=True)
        if result.stopped == "interrupted":
            raise KeyboardInterrupt
    for run in runs:
        evaluate_run(run)
    html = out / "report.html"
    return DemoResult(report_runs(runs, html), html, time.monotonic() - started, quick)
