"""Tables of many runs, made with one command: every row tuned alike, repeated with several seeds, compared with one.

``OUT/ROW/trial-N`` are trainings with seed 0 and one value of the row's key, judged on validation rows; the best one
and ``OUT/ROW/seed-N`` are judged on test rows, exactly and with ten beams. A folder of the wanted recipe is never
trained or ranked again, so a table that was interrupted goes on where it was.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from triewise.app.compare import Repeats, comparisons, row
from triewise.app.folders import consented, open_run
from triewise.app.runs import evaluate_run, train_run
from triewise.errors import UserError
from triewise.files import read_json, write_json, write_text
from triewise.progress import note
from triewise.ranking import Evaluation, load_evaluation
from triewise.recipe import OF_LANGUAGE_MODELS, Recipe, dump_recipe, load_recipe
from triewise.reports import Comparison, Report, Row, write_report

TABLES = ("ledger",)
METRIC = "NDCG@10"  # of validation, by which a row's value is chosen
TRIAL = "trial.json"
_SECTIONS = ("backbone.", "identifier.", "objective.", "hybrid.")
_UNUSED = (  # beginnings of changes that a sequential run has no use for
    *_SECTIONS,
    *(f"{section}.{key}" for section, keys in OF_LANGUAGE_MODELS.items() for key in keys),
)


@dataclass(frozen=True)
class TableRow:
    """One line of a table.

    Attributes:
        name: Of its recipe.
        title: What it is called.
        chosen: The key that was tuned, and its best value.
        evaluation: Its runs on test rows, ranked exactly; None where it failed.
        beam: Means over seeds of what ten beams find.
        pruned: How often they drop the true title.
        seconds: Mean time of a training.
        failed: Why there is nothing.
        run: Folder of its first run.
    """

    name: str
    title: str
    chosen: str = ""
    evaluation: Evaluation | Repeats | None = None
    beam: dict[str, float] = field(default_factory=dict)
    pruned: float = float("nan")
    seconds: float = float("nan")
    failed: str = ""
    run: Path = Path()


@dataclass(frozen=True)
class ReproducedTable:
    """What `reproduce_table` makes; ``differences`` are those of each row to the one all are compared with."""

    rows: tuple[TableRow, ...]
    differences: dict[str, dict[str, Comparison]]
    text: str
    html: Path | None

    def as_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            r.name: {"failed": r.failed}
            if r.evaluation is None
            else {
                "chosen": r.chosen,
                "metrics": row(r.evaluation).metrics,
                "differences": {n: vars(c) for n, c in self.differences.get(r.name, {}).items()},
                "beam": r.beam,
                "pruned@10": r.pruned,
                "seconds": r.seconds,
            }
            for r in self.rows
        }


def reproduce_table(
    table: str,
    out: Path,
    *,
    data: str = "ml-100k",
    steps: int | None = None,
    seeds: int = 3,
    rows: Sequence[str] = (),
    trials: int | None = None,
    changes: Sequence[str] = (),
    trust_remote_code: bool = False,
) -> ReproducedTable:
    """Train, choose, repeat, rank and compare; writes ``TABLE.md`` and ``report.html`` into ``out``.

    Args:
        table: ``ledger``, every token loss.
        out: Folder of all runs. What is there already is used where it is the same.
        data: Source of all rows. Published splits (``msl:``, ``d3:``) are taken with histories of 10 and without
            exclusions, as their papers do.
        steps: Of each training; None: as the recipes say.
        seeds: Trainings of each row with the chosen value, seed 0 first.
        rows: Names of rows; none: all.
        trials: Values of each row that are tried, the recipe's own first; None: all.
        changes: Further ``key=value`` changes of every recipe.
        trust_remote_code: Execute code that comes with the language model; changes can ask for it, not grant it.

    Raises:
        UserError: No such table or row, a change of a key that a row tunes (only that row would ignore it), more trials
            than a row has values, or code that is not granted. What goes wrong in a row is its text.
    """
    if table not in TABLES:
        raise UserError(f"wanted a table among {', '.join(TABLES)}, got {table!r}")
    definition = tomllib.loads(
        (resources.files("triewise.app") / f"{table}.toml").read_text(encoding="utf-8")
    )
    known: dict[str, dict[str, Any]] = definition["rows"]
    most = _check(known, rows, seeds, trials, changes)
    published = data.startswith(("msl:", "d3:"))
    common = [
        f"data.source={data}",
        *(["data.max_history=10", "evaluation.exclude=none"] if published else []),
    ]
    common += [f"training.steps={steps}"] if steps else []
    common += changes
    asked = [change for change in changes if change.strip().startswith("backbone.")]
    asking = load_recipe(f"{table}/{definition['against']}", asked)
    if consented(asking, trust_remote_code, f"the table {table}"):
        common += ["backbone.trust_remote_code=true"]  # a recipe that asks has it granted from here on
    found: list[TableRow] = []
    for name in rows or known:
        title = load_recipe(f"{table}/{name}").title
        try:
            each = known[name] | {"values": known[name]["values"][: trials or most]}
            found.append(_row(table, name, title, each, out, common, seeds))
        except Exception as error:  # one row that fails does not take the others with it
            note(f"{title} failed: {error}")
            found.append(TableRow(name, title, failed=" ".join(str(error).split()) or type(error).__name__))
        made = _written(table, tuple(found), definition["against"], out, data)
    return made


def _check(
    known: Mapping[str, Any], rows: Sequence[str], seeds: int, trials: int | None, changes: Sequence[str]
) -> int:
    """How many values each row has; UserError where the wish cannot be met, or would not be fair."""
    unknown = [name for name in rows if name not in known]
    if unknown:
        raise UserError(f"wanted rows among {', '.join(known)}, got {unknown[0]!r}")
    tuned = {known[name]["key"]: name for name in rows or known}
    fixed = next((change for change in changes if change.partition("=")[0].strip() in tuned), None)
    if fixed is not None:
        name = tuned[fixed.partition("=")[0].strip()]
        raise UserError(
            f"wanted changes of what no row tunes, got {fixed!r}, which {name} chooses; leave {name} out"
        )
    most = min(len(each["values"]) for each in known.values())
    if not 1 <= (trials or most) <= most or seeds < 1:
        raise UserError(f"wanted 1 to {most} trials and at least one seed, got {trials} and {seeds}")
    return most


def _row(
    table: str, name: str, title: str, each: Mapping[str, Any], out: Path, common: Sequence[str], seeds: int
) -> TableRow:
    """Choose a value on validation rows, repeat it, rank test rows."""
    changes = [*common, *_needed(each.get("needs", {}), out, common)]
    tried: list[tuple[float, int, Recipe]] = []
    diverged: list[UserError] = []
    for n, value in enumerate(each["values"]):
        recipe = load_recipe(f"{table}/{name}", [*changes, f"{each['key']}={value}", "seed=0"])
        try:
            tried.append((_on_validation(recipe, out / name / f"trial-{n}"), -n, recipe))
        except UserError as error:
            diverged.append(error)
    if not tried:
        raise diverged[0]
    _, best, recipe = max(tried, key=lambda one: one[:2])  # ties: the one that comes first
    runs = [out / name / (f"trial-{-best}" if seed == 0 else f"seed-{seed}") for seed in range(seeds)]
    evaluations = []
    for seed, run in enumerate(runs):
        _trained(recipe.changed(f"seed={seed}"), run)
        evaluations.append(replace(_on_test(run, recipe), name=title))
    metrics = [evaluation.metrics for evaluation in evaluations]
    beams = recipe.evaluation.beams
    return TableRow(
        name,
        title,
        f"{each['key'].partition('.')[2]} = {each['values'][-best]:g}",
        evaluations[0] if seeds == 1 else Repeats(title, tuple(evaluations)),
        {n: float(np.mean([m["beam"][n] for m in metrics])) for n in ("HR@10", "NDCG@10")},
        float(np.mean([m[f"pruned@{beams}"] for m in metrics])),
        float(np.mean([read_json(run / "run.json")["timing"]["seconds"] for run in runs])),
        run=runs[0],
    )


def _needed(needs: Mapping[str, str], out: Path, common: Sequence[str]) -> list[str]:
    """Changes that name the runs a row starts from or is taught by, each trained once."""
    changes = []
    for key, name in needs.items():
        plain = load_recipe(name)
        own = [c for c in common if plain.sequential is None or not c.strip().startswith(_UNUSED)]
        recipe = load_recipe(name, own)
        if recipe.training.steps > plain.training.steps:
            recipe = recipe.changed(f"training.steps={plain.training.steps}")
        run = out / "needed" / name.replace("/", "-")
        _trained(recipe, run)
        changes.append(f"{key}={run.absolute().as_posix()}")
    return changes


def _trained(recipe: Recipe, run: Path) -> None:
    """A run of exactly this recipe: the one that is there, gone on with where it was interrupted, or a new one."""
    same = (run / "recipe.toml").is_file() and (run / "recipe.toml").read_text("utf-8") == dump_recipe(recipe)
    there = same and (run / "run.json").is_file()
    if there and read_json(run / "run.json")["status"] == "trained":
        return
    if not there:
        (run / TRIAL).unlink(missing_ok=True)
    trust = recipe.backbone.trust_remote_code
    result = train_run(recipe, run, resume=there, overwrite=not there, trust_remote_code=trust)
    if result.stopped == "interrupted":
        raise KeyboardInterrupt


def _on_validation(recipe: Recipe, run: Path) -> float:
    """What a trial reaches on validation rows."""
    _trained(recipe, run)
    if not (run / TRIAL).is_file():
        judged = _ranked(run, recipe, {"split": "valid"})
        write_json(run / TRIAL, {METRIC: judged.metrics[METRIC]})
    return float(read_json(run / TRIAL)[METRIC])


def _on_test(run: Path, recipe: Recipe) -> Evaluation:
    """The run on test rows, ranked exactly, and how ten beams do."""
    if (run / "metrics.json").is_file():
        known = load_evaluation(run)
        if known.metrics["split"] == "test" and "beam" in known.metrics:
            return known
    search = "exact" if recipe.evaluation.search == "beam" else recipe.evaluation.search
    return _ranked(run, recipe, {"split": "test", "pruned": True, "search": search, "choose": ()})


def _ranked(run: Path, recipe: Recipe, changes: Mapping[str, Any]) -> Evaluation:
    settings = recipe.evaluation.model_copy(update=changes)
    return evaluate_run(run, settings, trust_remote_code=recipe.backbone.trust_remote_code)


def _written(table: str, rows: tuple[TableRow, ...], against: str, out: Path, data: str) -> ReproducedTable:
    """The table as text, and a page of it in a report."""
    done = {r.name: r.evaluation for r in rows if r.evaluation is not None}
    base = done.get(against)
    differences = {
        name: {c.metric: c for c in comparisons([evaluation, base])}
        for name, evaluation in done.items()
        if base is not None and name != against
    }
    minus = f"minus {against} [95 %]"
    heads = ["loss", "chosen on validation", "NDCG@10", minus, "HR@10", minus]
    heads += ["NDCG@10, ten beams", "pruned@10", "training, s"]
    lines = [heads, ["---"] * len(heads), *(_line(r, differences.get(r.name, {})) for r in rows)]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
    write_text(out / f"{table}.md", text)
    html = out / "report.html" if done else None
    if html:
        ordered = sorted((r for r in rows if r.evaluation is not None), key=lambda r: r.name != against)
        shown = [_shown(r) for r in ordered]
        failed = [f"{r.title} failed: {r.failed}" for r in rows if r.failed]
        first = open_run(ordered[0].run)[1]
        report = Report(
            title=f"{table}: {len(rows)} losses on {data}",
            subtitle="One value of each row chosen on validation rows, out of equally many; test rows ranked exactly. "
            "pruned@10: share of users whose true title ten beams drop.",
            rows=tuple(shown),
            comparisons=tuple(c for each in differences.values() for c in each.values()),
            notes=tuple(failed),
            provenance=first["versions"] | {"commit": first["commit"] or "installed package"},
        )
        write_report(html, report)
    return ReproducedTable(rows, differences, text, html)


def _shown(r: TableRow) -> Row:
    """A line of the report."""
    assert r.evaluation is not None
    line = row(r.evaluation, f"{r.chosen}; trained in {r.seconds:.0f} s")
    more = {"pruned@10": r.pruned, **{f"{n}, ten beams": value for n, value in r.beam.items()}}
    return replace(line, more=more | line.more)


def _line(r: TableRow, differences: Mapping[str, Comparison]) -> list[str]:
    """A line of the text."""
    if r.evaluation is None:
        return [r.title, f"failed: {r.failed}", *[""] * 7]
    shown, cells = row(r.evaluation), [r.title, r.chosen]
    for name in ("NDCG@10", "HR@10"):
        spread = f" ± {shown.deviations[name]:.4f}" if name in shown.deviations else ""
        c = differences.get(name)
        cells += [
            f"{shown.metrics[name]:.4f}{spread}",
            "" if c is None else f"{c.difference:+.4f} [{c.low:+.4f}, {c.high:+.4f}]",
        ]
    return [*cells, f"{r.beam['NDCG@10']:.4f}", f"{r.pruned:.3f}", f"{r.seconds:.0f}"]
