"""Tables of many runs, made with one command: every row tuned alike, repeated with several seeds, compared with one.

``OUT/ROW/trial-N`` are trainings with seed 0 and one value of the row's key, judged on validation rows; the best one
and ``OUT/ROW/seed-N`` are judged on test rows. Values that change nothing but the ranking share one training. A folder
of the wanted recipe and the same data is never trained or ranked again, so a table that was interrupted goes on where
it was. Tables of papers have the paper's number beside ours, see `paper_tables`.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from triewise.app.compare import RANKED, Repeats
from triewise.app.folders import consented, describe_data, open_data, open_run, trained_data
from triewise.app.paper_tables import (
    SCALES,
    Beside,
    PaperTable,
    RowPlan,
    Scale,
    data_name,
    read_table,
    table_names,
)
from triewise.app.runs import evaluate_run, train_run
from triewise.app.tabulating import METRIC, SUPPORTS, ReproducedTable, TableRow, Wish, judged, write_table
from triewise.errors import Diverged, UserError
from triewise.files import read_json, sha256_file, write_json, write_text
from triewise.progress import note
from triewise.ranking import Evaluation, load_evaluation
from triewise.recipe import OF_LANGUAGE_MODELS, Recipe, dump_recipe, load_recipe, run_recipe

TRIAL = "trial.json"
_SECTIONS = ("backbone.", "identifier.", "objective.", "hybrid.")
_TOLD_BY = ("objective", "identifier", "hybrid", "evaluation")  # sections by which rows differ
_UNUSED = (  # beginnings of changes that a sequential run has no use for
    *_SECTIONS,
    *(f"{section}.{key}" for section, keys in OF_LANGUAGE_MODELS.items() for key in keys),
)


def reproduce_table(
    table: str,
    out: Path,
    *,
    data: str | None = None,
    steps: int | None = None,
    seeds: int = 3,
    rows: Sequence[str] = (),
    trials: int | None = None,
    changes: Sequence[str] = (),
    scale: Scale = "paper",
    backbone: str | None = None,
    resume: bool = True,
    trust_remote_code: bool = False,
) -> ReproducedTable:
    """Train, choose, repeat, rank and compare; writes ``TABLE.md`` and ``report.html`` into ``out``.

    Args:
        table: ``ledger``, every token loss, or a table or figure of a paper, see `table_names`.
        out: Folder of all runs. What is there already is used where it is the same.
        data: Source of all rows; None: the paper's, and ml-100k for the ledger and at the small scale. Published splits
            (``msl:``, ``d3:``) are taken with histories of 10 and without exclusions, as their papers do.
        steps: Of each training; None: as the recipes say.
        seeds: Trainings of each row with the chosen value, seed 0 first.
        rows: Names of rows; none: all.
        trials: Values of each row that are tried, the recipe's own first; None: all.
        changes: Further ``key=value`` changes of every recipe.
        scale: ``paper``: the authors' models and settings; ``small``: the same rows of a model that a CPU trains.
        backbone: The language model of all rows that have one, instead of the recipes'.
        resume: Whether runs that are in ``out`` may be used again.
        trust_remote_code: Execute code that comes with the language model; changes can ask for it, not grant it.

    Raises:
        UserError: No such table or row, a change of a key that a row tunes (only that row would ignore it) or of the
            seed, more trials than a row has values, runs in a folder that are not to be used again, or code that is not
            granted. What goes wrong in a row is its text.
    """
    if table not in table_names():
        raise UserError(f"wanted a table among {', '.join(table_names())}, got {table!r}")
    if scale not in SCALES:
        raise UserError(f"wanted a scale among {', '.join(SCALES)}, got {scale!r}")
    known = read_table(table, scale)
    _check(known, rows, seeds, trials, changes)
    if not resume and next(out.glob("*/*/run.json"), None):
        raise UserError(f"{out} holds runs of a table; choose another --out, or leave --no-resume out")
    data = data or (known.data if scale == "paper" else "") or "ml-100k"
    common = _common(known, out, data, steps, backbone) + list(changes)
    asked = [change for change in common if change.strip().startswith("backbone.")]
    asking = load_recipe(known.rows[known.against].recipe, asked)
    if consented(asking, trust_remote_code, f"the table {table}"):
        common += ["backbone.trust_remote_code=true"]  # a recipe that asks has it granted from here on
    wish = Wish(known, scale, out, data_name(data), tuple(common), seeds, trials)
    found: list[TableRow] = []
    for plan in [known.rows[name] for name in rows or known.rows]:
        found.append(_made(wish, plan))
        so_far = write_table(wish, tuple(found), data)
    return so_far


def _made(wish: Wish, plan: RowPlan) -> TableRow:
    """A row, or why there is none; one that fails does not take the others with it."""
    if plan.missing:
        return TableRow(plan.name, plan.title, failed=plan.missing)
    try:
        return (_counted if wish.table.measure == "zero-gain" else _row)(wish, plan)
    except Exception as error:
        note(f"{plan.title} failed: {error}")
        return TableRow(plan.name, plan.title, failed=" ".join(str(error).split()) or type(error).__name__)


def _common(table: PaperTable, out: Path, data: str, steps: int | None, backbone: str | None) -> list[str]:
    """Changes of the recipes of all rows."""
    common = [f"data.source={data}"]
    if table.published:  # recipes name folders of their own
        common.append(f"data.folder={(out / 'prepared').absolute().as_posix()}")
    if data.startswith(("msl:", "d3:")):
        common += ["data.max_history=10", "evaluation.exclude=none"]
    elif data.startswith("steam:"):  # the rows of IGD's script
        common += ["data.pipeline=igd-steam", "data.max_history=10", "evaluation.exclude=none"]
    elif table.published:
        common.append("data.max_history=20")
    common += [f"training.steps={steps}"] if steps else []
    return common + ([f"backbone.name={backbone}"] if backbone else [])


def _check(
    table: PaperTable, rows: Sequence[str], seeds: int, trials: int | None, changes: Sequence[str]
) -> None:
    """UserError where a wish cannot be met, or would not be fair."""
    unknown = [name for name in rows if name not in table.rows]
    if unknown:
        raise UserError(f"wanted rows among {', '.join(table.rows)}, got {unknown[0]!r}")
    asked = [table.rows[name] for name in rows or table.rows if not table.rows[name].missing]
    tuned = {plan.key: plan.name for plan in asked}
    fixed = next((change for change in changes if change.partition("=")[0].strip() in tuned), None)
    if fixed is not None:
        name = tuned[fixed.partition("=")[0].strip()]
        raise UserError(
            f"wanted changes of what no row tunes, got {fixed!r}, which {name} chooses; leave {name} out"
        )
    seed = next((change for change in changes if change.partition("=")[0].strip() == "seed"), None)
    if seed is not None:
        raise UserError(
            f"wanted seeds from 0 on, as many as --seeds says, got the change {seed!r}; leave it out"
        )
    recipes = [load_recipe(p.recipe, [*p.changes, *(f"{key}=." for key in p.needs)]) for p in asked]
    writers = [recipe for recipe in recipes if recipe.sequential is None]
    for change in changes:
        key = change.partition("=")[0].strip()
        told = {str(recipe.value_of(key)) for recipe in writers} if key.startswith(_TOLD_BY) else set()
        if len(told) > 1:
            raise UserError(
                f"wanted changes of what all rows have in common, got {change!r}, where they have "
                f"{' and '.join(sorted(told))}; leave it out"
            )
    most = max(len(plan.values) for plan in table.rows.values())
    if not 1 <= (trials or most) <= most or seeds < 1:
        raise UserError(f"wanted 1 to {most} trials and at least one seed, got {trials} and {seeds}")


def _row(wish: Wish, plan: RowPlan) -> TableRow:
    """Choose a value on validation rows, repeat it, rank test rows."""
    folder, common = wish.out / plan.name, _fitting(wish.common, load_recipe(plan.recipe))
    changes = [*plan.changes, *common, *_needed(plan.needs, wish.out, wish.common)]
    tried: list[tuple[float, int, Recipe, Path]] = []
    diverged: list[Diverged] = []
    trained: dict[str, tuple[Path, Recipe]] = {}  # one for all values that only say how to rank
    for n, value in enumerate(plan.values[: wish.trials]):
        recipe = load_recipe(plan.recipe, [*changes, f"{plan.key}={value}", "seed=0"])
        run, learned = trained.setdefault(_learned(recipe), (folder / f"trial-{n}", recipe))
        file = run / (TRIAL if learned is recipe else f"trial-{value:g}.json")
        try:
            tried.append((_on_validation(learned, recipe, run, file), -n, recipe, run))
        except Diverged as error:  # anything else is no fault of the value: without it another one would win
            note(f"{plan.title} with {plan.key} = {value:g} is left out: {error}")
            diverged.append(error)
    if not tried:
        raise diverged[0]
    _, best, recipe, first = max(tried, key=lambda one: one[:2])  # ties: the one that comes first
    learned = trained[_learned(recipe)][1]
    runs = [first if seed == 0 else folder / f"seed-{seed}" for seed in range(wish.seeds)]
    evaluations, others = [], []
    for seed, run in enumerate(runs):
        _trained(learned.changed(f"seed={seed}"), run)
        if wish.table.supports and recipe.sequential is None:
            others.append(replace(_with_other_support(wish, run, recipe), name=plan.title))
        evaluations.append(replace(_on_test(wish, run, recipe), name=plan.title))
    metrics = [evaluation.metrics for evaluation in evaluations]
    beams = f"pruned@{recipe.evaluation.beams}"
    with_beams = all("beam" in m for m in metrics)
    times = tuple(float(read_json(run / "run.json")["timing"]["seconds"]) for run in runs)
    return TableRow(
        plan.name,
        plan.title,
        f"{plan.key.partition('.')[2]} = {plan.values[-best]:g}"
        + (f" ({len(diverged)} of {len(diverged) + len(tried)} values diverged)" if diverged else ""),
        len(plan.values[: wish.trials]),
        _together(plan.title, evaluations),
        {n: float(np.mean([m["beam"][n] for m in metrics])) for n in ("HR@10", "NDCG@10") if with_beams},
        float(np.mean([m[beams] if with_beams else np.nan for m in metrics])),
        float(np.mean(times)),
        runs=tuple(runs),
        other=_together(plan.title, others) if others else None,
        recipe=recipe,
        times=times,
    )


def _counted(wish: Wish, plan: RowPlan) -> TableRow:
    """The share of target tokens without gain, counted in the training rows; no model is run."""
    recipe = load_recipe(plan.recipe, [*plan.changes, *wish.common])
    dataset = open_data(recipe)
    facts = describe_data(dataset.folder, recipe.backbone.name, recipe.backbone.template)
    share, paper = 100 * facts["zero_gain_share"], wish.table.number(plan.name, wish.data, "zero-gain")
    told = f"zero-gain tokens of {recipe.backbone.name}'s tokenizer, %"
    exact = round(share, 2)  # as many digits as the paper prints
    said = judged(replace(wish, n_items=dataset.catalog.n_items), recipe, paper, exact, exact)
    one = Beside(told, share, exact, exact, paper, said)
    return TableRow(plan.name, plan.title, findings=(one,), recipe=recipe)


def _together(title: str, runs: Sequence[Evaluation]) -> Evaluation | Repeats:
    return runs[0] if len(runs) == 1 else Repeats(title, tuple(runs))


def _learned(recipe: Recipe) -> str:
    """What of a recipe a training depends on."""
    return dump_recipe(recipe.model_copy(update={"evaluation": type(recipe.evaluation)()}))


def _fitting(changes: Sequence[str], recipe: Recipe) -> list[str]:
    """Those of the changes that a recipe has a use for."""
    return [c for c in changes if recipe.sequential is None or not c.strip().startswith(_UNUSED)]


def _needed(needs: Mapping[str, str], out: Path, common: Sequence[str]) -> list[str]:
    """Changes that name the runs a row starts from or is taught by, each trained once."""
    changes = []
    for key, name in needs.items():
        plain = load_recipe(name)
        recipe = load_recipe(name, _fitting(common, plain))
        if recipe.training.steps > plain.training.steps:
            recipe = recipe.changed(f"training.steps={plain.training.steps}")
        run = out / "needed" / name.replace("/", "-")
        _trained(recipe, run)
        changes.append(f"{key}={run.absolute().as_posix()}")
    return changes


def _trained(recipe: Recipe, run: Path) -> None:
    """A run of exactly this recipe: the one that is there, gone on with where it was interrupted, or a new one."""
    there = (run / "run.json").is_file() and _is_of(run, recipe)
    if there and read_json(run / "run.json")["status"] == "trained":
        if _same_data(run):
            return
        there = False
    if not there:
        for file in run.glob("trial*.json"):
            file.unlink()
    trust = recipe.backbone.trust_remote_code
    result = train_run(recipe, run, resume=there, overwrite=not there, trust_remote_code=trust)
    if result.stopped == "interrupted":
        raise KeyboardInterrupt


def _is_of(run: Path, recipe: Recipe) -> bool:
    """Whether a run was made by a recipe, also where an older version wrote it, with fewer keys."""
    with contextlib.suppress(UserError, OSError):
        return run_recipe(run) == recipe
    return False


def _same_data(run: Path) -> bool:
    """Whether a run's data are still what it was trained on."""
    try:
        trained_data(run, open_run(run)[1])
    except UserError as error:
        note(f"{error}; trained again")
        return False
    return True


def _on_validation(learned: Recipe, recipe: Recipe, run: Path, file: Path) -> float:
    """What a trial reaches on validation rows."""
    _trained(learned, run)
    with contextlib.suppress(KeyError, TypeError, ValueError):  # there is none, or a damaged one
        return float(read_json(file)[METRIC])
    reached = float(_ranked(run, recipe, {"split": "valid"}).metrics[METRIC])
    write_json(file, {METRIC: reached})
    return reached


def _on_test(wish: Wish, run: Path, recipe: Recipe) -> Evaluation:
    """The run on test rows: as its recipe says at the paper's scale, else ranked exactly, and how ten beams do."""
    exact = recipe.sequential is None and not (wish.table.published and wish.scale == "paper")
    search = "exact" if exact and recipe.evaluation.search == "beam" else recipe.evaluation.search
    changes = {"split": "test", "pruned": exact, "search": search, "choose": ()}
    if (run / "metrics.json").is_file():
        known, asked = load_evaluation(run), recipe.evaluation.model_dump() | changes
        same = all(
            known.metrics[key] == asked[key] for key in RANKED if key in known.metrics and key in asked
        )
        if known.metrics["split"] == "test" and same and (not exact or "beam" in known.metrics):
            return known
    return _ranked(run, recipe, changes if recipe.sequential is None else {"split": "test"})


def _with_other_support(wish: Wish, run: Path, recipe: Recipe) -> Evaluation:
    """The run on test rows with probabilities normalised over the other support, kept beside the run."""
    support = SUPPORTS[recipe.evaluation.support]
    place, changes = (
        run.with_name(f"{run.name}-{support}"),
        {"split": "test", "support": support, "choose": ()},
    )
    asked = recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update=changes)})
    of = f"{sha256_file(run / 'run.json')}\n{asked.evaluation.model_dump_json()}\n"
    if (place / "of.txt").is_file() and (place / "of.txt").read_text("utf-8") == of:
        return load_evaluation(place)
    shutil.rmtree(place, ignore_errors=True)
    found = _ranked(run, recipe, changes)
    found.save(place)
    write_text(place / "of.txt", of)
    return found


def _ranked(run: Path, recipe: Recipe, changes: Mapping[str, Any]) -> Evaluation:
    settings = recipe.evaluation.model_copy(update=changes)
    return evaluate_run(run, settings, trust_remote_code=recipe.backbone.trust_remote_code)
