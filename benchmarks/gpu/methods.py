"""Part: five training methods on amazon_office with a small real model, under two kinds of supervision.

``smollm2-135m-q4`` (4-bit weights, dequantised), trained in full: float32 weights under bfloat16 autocast. All methods
of one supervision take the same number of steps, as many as the time allows and at most three epochs; ranking is in
float32, exact and with ten beams, over all test rows, nothing excluded.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np

from benchmarks.gpu.data import Options, dataset
from benchmarks.gpu.report import Report, Row, peak_gb, timed
from triewise.app.assemble import learner_of
from triewise.data import Dataset
from triewise.ranking import SHOWN, evaluate
from triewise.recipe import Recipe, parse_recipe
from triewise.training.trainer import TrieTrainer

METHODS: dict[str, Row] = {
    "LML": {"support": "vocabulary"},
    "MSL": {"support": "trie"},
    "MSL + IGD": {"support": "trie", "weight": "igd", "beta": 0.2},
    "IGD": {"support": "vocabulary", "weight": "igd", "beta": 0.2},
    "MSL + ATS": {"support": "trie", "temperature": "adaptive", "normaliser": "decisions"},
}
# Every title of a window is a target, or the last one: template, rows of a step, share of the time.
SUPERVISIONS = {"every": ("plain", 32, 0.55), "last": ("msl", 64, 0.45)}
EPOCHS, RATE = 3, 3e-4
TRIAL = 8  # steps that are timed
# Fewer methods, the first ones, where less than this were left for each; no fewer than two.
LEAST_EPOCHS = 0.5
SPARE = 4.0  # seconds for what is not foreseen
USERS = 128  # of a forward when ranking


def run(report: Report, options: Options) -> None:
    """Supervision after supervision, method after method."""
    with mock.patch.object(TrieTrainer, "_save_checkpoint", lambda *args: None):  # nobody resumes these
        _run(report, options)


def _run(report: Report, options: Options) -> None:
    data = dataset(options, "amazon_office")
    report.value["settings"] = {"rate": RATE, "methods": METHODS, "train_rows": data.train.n_rows}
    plans: Row = {}
    for i, (supervision, (_, _, share)) in enumerate(SUPERVISIONS.items()):
        seconds = report.left() - SPARE if i else (report.left() - SPARE) * share
        trial = partial(_trial, data, options, supervision, seconds, plans)
        if not report.run(f"{supervision} trial", trial, needs_s=0.5 if options.tiny else 15):
            continue
        for method in list(METHODS)[: plans[supervision]["methods"]]:
            work = partial(_method, report, data, options, supervision, method, plans[supervision])
            needs = 0.5 if options.tiny else plans[supervision]["seconds_of_a_method"] * 0.7
            report.run(f"{supervision} {method}", work, needs_s=needs)
    report.value["table"] = [
        {"run": name, **row["summary"]} for name, row in report.value["sections"].items() if "summary" in row
    ]
    report.save()


def _recipe(options: Options, supervision: str, method: str, steps: int) -> Recipe:
    template, rows, _ = SUPERVISIONS[supervision]
    backbone: Row = {"name": "smollm2-135m-q4", "dtype": "float32", "max_tokens": 512}
    if options.tiny:
        backbone = {"name": "tiny", "tiny": {"vocabulary": 400, "width": 32, "layers": 1}}
    return parse_recipe(
        {
            "name": f"{supervision}-{method.replace(' + ', '-')}",
            "data": {"source": "msl:amazon_office", "max_history": 10},
            "backbone": {**backbone, "template": template, "device": str(options.device)},
            "objective": METHODS[method],
            "training": {
                "supervision": supervision,
                "steps": steps,
                "learning_rate": RATE,
                "batch_size": 8 if options.tiny else rows,
                "accumulation": 1 if options.tiny else 2,
                "warmup_steps": max(1, steps // 20),
                "schedule": "cosine",
                "log_every": max(1, steps // 5),
            },
            "evaluation": {"batch_users": USERS},
        },
        "the suite",
    )


def _trial(data: Dataset, options: Options, supervision: str, seconds: float, plans: Row, row: Row) -> None:
    """How many steps each method gets: those of the slowest one are timed, and a ranking too."""
    trial = 1 if options.tiny else TRIAL
    recipe = _recipe(options, supervision, "LML", trial)
    loading, learner = timed(partial(learner_of, recipe, data), options.device)
    rows = recipe.training.batch_size
    with tempfile.TemporaryDirectory() as out:
        work = partial(learner.fit, Path(out))
        timed(work, options.device)
        training, _ = timed(work, options.device)
    some = data.test.take(np.arange(min(256, data.test.n_rows)))
    ranking = 0.0
    for search, depth in (("exact", 10), ("beam", 10)):
        recommender = learner.recommender.with_settings(search=search)
        evaluate(recommender, some.take(np.arange(min(64, some.n_rows))), name="trial", depth=depth)
        spent, _ = timed(partial(evaluate, recommender, some, name="trial", depth=depth), options.device)
        ranking += spent * data.test.n_rows / some.n_rows
    step, windows = training / trial, int(learner.facts["windows"])
    epoch = -(-windows // rows)
    budget = seconds - loading - 2 * training - 2 * ranking * some.n_rows / data.test.n_rows
    for methods in range(len(METHODS), 1, -1):
        steps = int(max(4, min(EPOCHS * epoch, (budget / methods - loading - ranking) / step)))
        if steps >= LEAST_EPOCHS * epoch:
            break
    steps = min(steps, 3) if options.tiny else steps
    plans[supervision] = {
        "methods": (3 if supervision == "every" else 2) if options.tiny else methods,
        "steps": steps,
        "epochs": steps / epoch,
        "seconds_of_a_method": loading + ranking + steps * step,
    }
    row |= plans[supervision] | {"step_ms": 1e3 * step, "ranking_s": ranking, "loading_s": loading}
    row |= {"windows": windows, "steps_of_an_epoch": epoch, "seconds_given": seconds}


def _method(
    report: Report, data: Dataset, options: Options, supervision: str, method: str, plan: Row, row: Row
) -> None:
    recipe = _recipe(options, supervision, method, plan["steps"])
    loading, learner = timed(partial(learner_of, recipe, data), options.device)
    peak_gb(options.device, reset=True)
    with tempfile.TemporaryDirectory() as out:
        training, result = timed(partial(learner.fit, Path(out), title=recipe.name), options.device)
    row |= {"steps": plan["steps"], "epochs": plan["epochs"], "loading_s": loading, "training_s": training}
    row |= {"peak_gb": peak_gb(options.device), "log": result.history, "stopped": result.stopped}
    report.save()
    summary: Row = {"epochs": plan["epochs"]}
    for search, depth in (("exact", 10), ("beam", 10)):
        found = evaluate(
            learner.recommender.with_settings(search=search),
            data.test,
            name=f"{method} ({search})",
            depth=depth,
            train_targets=learner.recommender.counts,
        ).metrics
        keep = ("warm", "cold", "certified", "counters", "timing", "n_users")
        row[search] = {m: [found[m], *found["intervals"][m]] for m in SHOWN} | {
            k: found[k] for k in keep if k in found
        }
        summary |= {f"{search} {m}": found[m] for m in ("HR@10", "NDCG@10")}
    row["summary"] = summary
