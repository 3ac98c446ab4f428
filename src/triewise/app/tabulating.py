"""What a table of many runs says: its text, its page, and each number of ours beside the paper's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from triewise.app.compare import Repeats, comparisons, row
from triewise.app.folders import data_of, open_run, trie_of
from triewise.app.paper_tables import SHOWN_METRICS, Beside, PaperTable, Scale, deviation, verdict
from triewise.app.studying import studied_runs
from triewise.files import write_text
from triewise.ranking import gain_interval, interval
from triewise.reports import (
    Comparison,
    Report,
    Row,
    StudiedRun,
    first_word_repetition,
    item_score_entropy,
    make_statistics,
    write_report,
)

if TYPE_CHECKING:
    from triewise.ranking import Evaluation
    from triewise.recipe import Recipe

METRIC = "NDCG@10"  # of validation, by which a row's value is chosen
LISTED = 10  # titles of a list that the papers look at
SUPPORTS = {"trie": "vocabulary", "vocabulary": "trie"}


@dataclass(frozen=True)
class TableRow:
    """One line of a table.

    Attributes:
        name: Of its recipe.
        title: What it is called.
        chosen: The key that was tuned, and its best value.
        tried: How many of its values were.
        evaluation: Its runs on test rows, ranked exactly; None where it failed.
        beam: Means over seeds of what ten beams find.
        pruned: How often they drop the true title.
        seconds: Mean time of a training.
        failed: Why there is nothing.
        runs: Folders of its runs.
        other: Its runs ranked with the probabilities of the other support; None where that was not asked for.
        recipe: What was chosen.
        times: Seconds of each training.
        findings: Ours beside the paper's numbers.
    """

    name: str
    title: str
    chosen: str = ""
    tried: int = 1
    evaluation: Evaluation | Repeats | None = None
    beam: dict[str, float] = field(default_factory=dict)
    pruned: float = float("nan")
    seconds: float = float("nan")
    failed: str = ""
    runs: tuple[Path, ...] = ()
    other: Evaluation | Repeats | None = None
    recipe: Recipe | None = None
    times: tuple[float, ...] = ()
    findings: tuple[Beside, ...] = ()


@dataclass(frozen=True)
class ReproducedTable:
    """What `reproduce_table` makes; ``differences`` are those of each row to the one all are compared with."""

    rows: tuple[TableRow, ...]
    differences: dict[str, dict[str, Comparison]]
    text: str
    html: Path | None

    def as_json(self) -> dict[str, Any]:
        """JSON values; a number that there is not is null."""
        found = {
            r.name: {"failed": r.failed}
            if r.failed
            else {"findings": [vars(one) for one in r.findings]}
            if r.evaluation is None
            else {
                "chosen": r.chosen,
                "metrics": row(r.evaluation).metrics,
                "differences": {n: vars(c) for n, c in self.differences.get(r.name, {}).items()},
                "beam": r.beam,
                "pruned@10": r.pruned,
                "seconds": r.seconds,
                **({"findings": [vars(one) for one in r.findings]} if r.findings else {}),
            }
            for r in self.rows
        }
        return {name: _known(each) for name, each in found.items()}


@dataclass(frozen=True)
class Wish:
    """What all rows of a table have in common."""

    table: PaperTable
    scale: Scale
    out: Path
    data: str
    common: tuple[str, ...]
    seeds: int
    trials: int | None
    n_items: int = 0


def _known(value: Any) -> Any:
    """JSON values with None for NaN and infinite ones."""
    if isinstance(value, dict):
        return {name: _known(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_known(each) for each in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def write_table(wish: Wish, rows: tuple[TableRow, ...], data: str) -> ReproducedTable:
    """The table as text, and a page of it in a report."""
    table, first = wish.table, next((r.runs[0] for r in rows if r.evaluation is not None), None)
    if first is not None:
        wish = replace(wish, n_items=data_of(first, open_run(first)[1]).catalog.n_items)
    ranked = {r.name: r for r in rows if r.evaluation is not None}
    base = ranked.get(table.against)
    differences = {
        r.name: {c.metric: c for c in comparisons([r.evaluation, base.evaluation])}
        for r in rows
        if base is not None and base.evaluation is not None and r.evaluation is not None and r is not base
    }
    if table.published:
        bases = {name: ranked.get(table.base(name)) for name in ranked}
        rows = tuple(
            replace(r, findings=r.findings or tuple(_findings(wish, r, bases.get(r.name)))) for r in rows
        )
    heads, lines = _beside(rows) if table.published else _own(rows, differences, table.against)
    shown = [heads, ["---"] * len(heads), *lines]
    cells = ([cell.replace("|", "\\|") for cell in line] for line in shown)
    text = "\n".join(f"| {' | '.join(line)} |" for line in cells) + "\n"
    if table.published:
        text = f"{table.title}. {table.source}.\n\nThe paper: {table.claim}\n\n{text}"
    write_text(wish.out / f"{table.name}.md", text)
    done = [r for r in rows if r.evaluation is not None]
    html = wish.out / "report.html" if done else None
    if html:
        ordered = sorted(done, key=lambda r: r.name != table.against)
        failed = [
            f"{r.title} {'not run' if table.published else 'failed'}: {r.failed}" for r in rows if r.failed
        ]
        record = open_run(ordered[0].runs[0])[1]
        how = "as the authors rank" if table.published and wish.scale == "paper" else "ranked exactly"
        report = Report(
            title=f"{table.title or table.name}: {len(rows)} {'rows' if table.published else 'losses'} on {data}",
            subtitle=f"One value of each row chosen on validation rows, out of {_tried(done)}; test rows {how}. "
            "pruned@10: share of users whose true title ten beams drop.",
            rows=tuple(_shown(r) for r in ordered),
            comparisons=tuple(c for each in differences.values() for c in each.values()),
            notes=(*_said(table, rows), *failed),
            provenance=record["versions"] | {"commit": record["commit"] or "installed package"},
            statistics=make_statistics(table.statistics, _studied(table, done)),
        )
        write_report(html, report)
    return ReproducedTable(rows, differences, text, html)


def _tried(rows: Sequence[TableRow]) -> str:
    """How many values rows had to choose from, in words."""
    fewest, most = (end(r.tried for r in rows) for end in (min, max))
    return f"{most} each" if fewest == most else f"{fewest} to {most}, so not out of equally many"


def _studied(table: PaperTable, rows: Sequence[TableRow]) -> list[StudiedRun]:
    """The first run of each row, and for what is said of seeds the others too."""
    most = None if "seeds" in table.statistics else 1
    runs = {
        run: f"{r.title}, seed {n}" if n else r.title for r in rows for n, run in enumerate(r.runs[:most])
    }
    return studied_runs(list(runs), list(runs.values()))


def _findings(wish: Wish, r: TableRow, base: TableRow | None) -> Iterator[Beside]:
    """Ours beside the paper's, of a row that was run."""
    if r.evaluation is None or r.recipe is None:
        return
    table = wish.table
    if table.measure == "deviation":
        runs = r.evaluation.runs if isinstance(r.evaluation, Repeats) else (r.evaluation,)
        ours = deviation([run.metrics[METRIC] for run in runs])
        paper = table.number(r.name, wish.data, "deviation")
        said = judged(wish, r.recipe, paper, *ours[1:]) if len(runs) > 1 else "wanted at least two seeds"
        yield Beside(f"deviation of {METRIC} over {len(runs)} seeds, %", *ours, paper, said)
    elif table.measure == "seconds" and base is not None and base is not r:
        times = [
            a / max(b, 0.1) for a, b in zip(r.times, base.times, strict=False)
        ]  # told in tenths of a second
        paper = table.number(r.name, "all", "seconds")
        low, high = (min(times), max(times)) if len(times) > 1 else (float("nan"),) * 2
        what = f"time of training, times that of {base.title} (range over seeds)"
        yield Beside(what, float(np.mean(times)), low, high, paper, judged(wish, r.recipe, paper, low, high))
    elif table.measure == "repetition":
        yield from _listed(wish, r)
    for metric in [m for m in SHOWN_METRICS if m == METRIC or m in table.metrics]:
        yield from _accuracy(wish, r, base, metric)


def judged(wish: Wish, recipe: Recipe, paper: float | None, low: float, high: float) -> str:
    """`verdict`, or why a paper's number is of something else than what was run."""
    table, sequential = wish.table, recipe.sequential is not None
    items = table.items.get(wish.data, wish.n_items)
    if paper is None:
        return verdict(None, low, high)
    if items != wish.n_items:
        return f"of {items:,} items, here {wish.n_items:,}: not comparable"
    if not sequential and table.backbone not in recipe.backbone.name.lower():
        return f"of {table.backbone}: not comparable"
    if wish.scale != "paper":
        return "of other settings: not comparable"
    return verdict(paper, low, high)


def _listed(wish: Wish, r: TableRow) -> Iterator[Beside]:
    """How alike the titles are that a user gets, and how even their scores."""
    assert r.evaluation is not None and r.recipe is not None
    trie = trie_of(r.runs[0])
    runs = r.evaluation.runs if isinstance(r.evaluation, Repeats) else (r.evaluation,)
    of_users = {
        "repetition": [first_word_repetition(trie, run.items[:, :LISTED]) for run in runs],
        "entropy": [item_score_entropy(run.scores[:, :LISTED]) for run in runs],
    }
    names = {"repetition": "repetition of first words", "entropy": "entropy of scores, bits"}
    for measure, each in of_users.items():
        values = np.mean(each, axis=0)
        low, high = interval(values, seed=0)
        paper = wish.table.number(r.name, wish.data, measure)
        said = judged(wish, r.recipe, paper, low, high)
        yield Beside(names[measure], float(values.mean()), low, high, paper, said)


def _accuracy(wish: Wish, r: TableRow, base: TableRow | None, metric: str) -> Iterator[Beside]:
    """A metric of a row, and how far it is above the row all are compared with, for each support."""
    assert r.evaluation is not None and r.recipe is not None
    table, sequential = wish.table, r.recipe.sequential is not None
    paper = table.number(r.name, wish.data, metric)
    gains = table.gains(r.name, wish.data, wish.n_items, metric)
    gained = float(np.mean(gains)) if gains else None
    own = r.recipe.evaluation.support
    for support, found in ((own, r.evaluation), (SUPPORTS[own], r.other)):
        if found is None:
            continue
        named = metric if sequential else f"{metric}, {support}"
        line = row(found)
        said = judged(wish, r.recipe, paper, *line.intervals[metric])
        yield Beside(named, line.metrics[metric], *line.intervals[metric], paper, said)
        against = None if base is None or base is r else _of_support(base, support)
        if against is None or base is None:
            continue
        a, b = (one.per_user(metric) for one in (found, against))
        low, high = gain_interval(a, b)
        share = float(a.mean() / b.mean() - 1) if b.any() else float("nan")
        said = verdict(gained, low, high) if b.any() else "nothing to divide by"
        yield Beside(f"{named}, over {base.title}", share, low, high, gained, said, True, max(len(gains), 1))


def _of_support(r: TableRow, support: str) -> Evaluation | Repeats | None:
    """A row ranked with the probabilities of one support; a row over item ids as it is."""
    if r.recipe is None or r.recipe.sequential is not None or r.recipe.evaluation.support == support:
        return r.evaluation
    return r.other


def _beside(rows: Sequence[TableRow]) -> tuple[list[str], list[list[str]]]:
    """A table of a paper: a line for each number."""
    heads = ["row", "chosen on validation", "what", "ours [95 %]", "paper", "verdict"]
    lines = []
    for r in rows:
        if r.failed:
            lines.append([r.title, "", "", "", "", f"not run: {r.failed}"])
        lines += [[r.title, r.chosen, *one.cells()] for one in r.findings]
    return heads, lines


def _own(
    rows: Sequence[TableRow], differences: Mapping[str, Mapping[str, Comparison]], against: str
) -> tuple[list[str], list[list[str]]]:
    """A table of our own: a line for each row."""
    minus = f"minus {against} [95 %]"
    heads = ["loss", "chosen on validation", "NDCG@10", minus, "HR@10", minus]
    return [*heads, "NDCG@10, ten beams", "pruned@10", "training, s"], [
        _line(r, differences.get(r.name, {})) for r in rows
    ]


def _said(table: PaperTable, rows: Sequence[TableRow]) -> Iterator[str]:
    """The verdicts as sentences."""
    if table.published:
        yield f"{table.source}: {table.claim}"
    for r in rows:
        for one in r.findings:
            what, ours, paper, said = one.cells()
            beside = f", the paper {paper}" if paper else ""
            yield f"{r.title}, {what}: {ours or 'none'}{beside}; {said}"


def _shown(r: TableRow) -> Row:
    """A line of the report."""
    assert r.evaluation is not None
    line = row(r.evaluation, f"{r.chosen}; trained in {r.seconds:.0f} s")
    beams = {"pruned@10": r.pruned} if r.beam else {}
    more = {**beams, **{f"{n}, ten beams": value for n, value in r.beam.items()}}
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
