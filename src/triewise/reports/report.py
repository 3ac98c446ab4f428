"""One self-contained HTML page about a few runs: no other file, the same bytes for the same input.

A section whose numbers are missing is left out. Titles are untrusted text: every string goes through
`escape`, and the page forbids requests, and scripts but that of `explorer`, which nothing else depends on.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from triewise.files import write_text
from triewise.reports.description import fact_lines, percent
from triewise.reports.explanation import Example, Recommendation, Token, pieces
from triewise.reports.explorer import Explorer, explorer_section, look, script_policy
from triewise.reports.figures import POSITIONS, Dot, curve_panel, dot_panel, escape, forced_bars, tree_drawing
from triewise.reports.statistics import Statistic, colours, statistics_section

# The field's four; other metrics are shown only where none of these is.
METRICS = ("HR@5", "HR@10", "NDCG@5", "NDCG@10")
SHADES = (0.9, 0.5, 0.2, 0.05)  # probabilities that separate the five shades of deciding tokens
TREES = 2  # users whose paths are drawn
RECENT = 5  # titles of a history that are shown at once
POINTS = 300  # of a training curve
WORDS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 10: "ten", 20: "twenty"}
_HERE = resources.files("triewise.reports")
NOTES: dict[str, str] = tomllib.loads(_HERE.joinpath("report.toml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Row:
    """One line of the metrics table.

    Attributes:
        name: Name of the method.
        metrics: Values by name, for example ``HR@10``.
        intervals: Their 95 % intervals (low, high), where known.
        note: A few words under the name.
        seconds: Wall time of the evaluation.
        deviations: Standard deviations of the metrics over seeds; the metrics are means then.
        more: Further values, by name: other cuts and coverage.
        by_popularity: Users and HR@10 of targets with so many training interactions, by bucket.
    """

    name: str
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    note: str = ""
    seconds: float | None = None
    deviations: dict[str, float] = field(default_factory=dict)
    more: dict[str, float] = field(default_factory=dict)
    by_popularity: dict[str, tuple[int, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Method a against method b, user by user: mean difference a - b of a metric and its 95 % interval.

    ``p`` is that of the paired randomisation test, None where it is not known.
    """

    a: str
    b: str
    metric: str
    difference: float
    low: float
    high: float
    p: float | None = None

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero."""
        return self.low > 0 or self.high < 0

    @property
    def verdict(self) -> str:
        """What the interval says about zero, in words."""
        said = "excludes zero" if self.excludes_zero else "includes zero"
        return (
            said if self.p is None else f"{said}, p {'<' if self.p < 0.001 else '='} {max(self.p, 0.001):.3f}"
        )


@dataclass(frozen=True)
class Report:
    """Everything a report shows. What is empty leaves its section out.

    Attributes:
        title: Heading of the page.
        subtitle: How it was measured, in a sentence.
        rows: The methods, the one the report is about first.
        comparisons: Paired differences.
        curves: Rows of ``log.jsonl`` by name of the run; a run named as a method has its colour.
        facts: Numbers of `triewise.reports.description.describe`.
        forced: What `triewise.reports.description.forced_by_position` gives.
        examples: Users; the decoding paths of the first two are drawn.
        explorer: Users to look up.
        statistics: Of the papers' tables and figures.
        notes: Sentences on the method.
        provenance: Versions, commit, seeds, hashes, command.
    """

    title: str
    subtitle: str
    rows: tuple[Row, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    curves: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    forced: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None
    examples: tuple[Example, ...] = ()
    explorer: Explorer | None = None
    statistics: tuple[Statistic, ...] = ()
    notes: tuple[str, ...] = ()
    provenance: dict[str, str] = field(default_factory=dict)


def write_report(path: Path, report: Report) -> None:
    """Write the page, whole or not at all."""
    colour = colours([*(row.name for row in report.rows), *report.curves])
    head = f'<h1>{escape(report.title)}</h1><p class="sub">{escape(report.subtitle)}</p>{_summary(report)}'
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    origins = [(name, f"<code>{escape(value)}</code>") for name, value in report.provenance.items()]
    explorer = report.explorer
    sections = (
        ("Who finds the next title?", _metrics(report, colour)),
        ("How the training went", _training(report.curves, colour)),
        _catalogue(report),
        ("What users get", _examples(report.examples)),
        ("", explorer_section(explorer, colour, NOTES["explorer"]) if explorer else ""),
        ("Figures of the papers", statistics_section(report.statistics)),
        ("Notes", f"<ul>{notes}</ul>" if notes else ""),
        ("Where this comes from", _definitions(origins)),
    )
    parts = [
        f"<section><h2>{escape(heading)}</h2>{part}</section>" if heading else part
        for heading, part in sections
        if part
    ]
    policy = script_policy() if explorer else ""
    body = "\n".join([f"<header>{head}</header>", *parts])
    page, rest = _HERE.joinpath("report.html").read_text(encoding="utf-8").split("{title}")
    page, rest = page.replace("{scripts}", policy), rest.replace("{look}", look("css"))
    write_text(path, page + escape(report.title) + rest.replace("{body}", body))


def shown_metrics(rows: Sequence[Row]) -> list[str]:
    """Names of the metrics that a table has columns for."""
    known = dict.fromkeys(name for row in rows for name in row.metrics)
    return [name for name in METRICS if name in known] or list(known)


def digits(rows: Sequence[Row]) -> int:
    """Behind the point of metrics: three, and four where none reaches a tenth, as with large catalogues."""
    return 3 if max((value for row in rows for value in row.metrics.values()), default=1.0) >= 0.1 else 4


def _summary(report: Report) -> str:
    metrics = shown_metrics(report.rows)
    if not metrics:
        return ""
    main = "HR@10" if "HR@10" in metrics else metrics[0]
    rows = sorted((row for row in report.rows if main in row.metrics), key=lambda row: -row.metrics[main])
    titles = f", out of {report.facts['titles']:,} titles" if report.facts.get("titles") else ""
    n = len(report.rows)
    about = f"compares {WORDS.get(n, n)} ways to" if n > 1 else f"shows how well {report.rows[0].name} can"
    what = f"This page {about} recommend the title a user takes next{titles}."
    pairs = _differences([c for c in report.comparisons if c.metric == main], main, digits(report.rows))
    chance = "Intervals cover the choice of users, not the randomness of training."
    spread = chance if rows[0].intervals else ""
    text = f"{escape(what)} <b>{escape(_best(rows, main))}</b> {escape(pairs)} {escape(spread)}"
    return f'<p class="summary">{text.strip()}</p>'


def _said(metric: str, value: float, places: int, sign: str = "") -> str:
    """A value of a metric as sentences have it: shares of users in percent, differences with a ``+``."""
    percent = metric.startswith("HR@")
    text = f"{100 * value:{sign}.{places - 2}f}" if percent else f"{value:{sign}.{places}f}"
    return text.replace("-", "−") if sign else text


def _best(ranked: Sequence[Row], metric: str) -> str:
    """Who is ahead, in words; a tie is named as such."""
    k = int(metric[3:]) if metric.startswith("HR@") else 0
    unit = "\xa0%" if k else ""
    places = digits(ranked)
    values = [f"{_said(metric, row.metrics[metric], places)}{unit}" for row in ranked]
    leaders = [row.name for row in ranked if row.metrics[metric] == ranked[0].metrics[metric]]
    what = f"the true next title is among the first {WORDS.get(k, k)} for {values[0]} of the users"
    sentence = what if k else f"{metric} is {values[0]}"
    if metric in ranked[0].intervals:
        low, high = (_said(metric, end, places) for end in ranked[0].intervals[metric])
        sentence += f" (95\xa0% interval {low} to {high}{unit})"
    against = [f"{value} for {row.name}" for value, row in zip(values, ranked, strict=True)][len(leaders) :]
    sentence += f", against {' and '.join(against[:3])}." if against else "."
    if len(ranked) == 1:
        return sentence[0].upper() + sentence[1:]
    return f"{' and '.join(leaders)} {'are level' if len(leaders) > 1 else 'scores highest'}: {sentence}"


def _differences(comparisons: Sequence[Comparison], metric: str, places: int) -> str:
    """Paired differences of one metric in words, and what their intervals say."""
    points = " points" if metric.startswith("HR@") else ""
    sentences = []
    for name in dict.fromkeys(c.a for c in comparisons):
        clauses = [
            f"{_said(metric, abs(c.difference), places)}{points} {'below' if c.difference < 0 else 'above'} that of "
            f"{c.b} (95\xa0% interval {_said(metric, c.low, places, '+')} to {_said(metric, c.high, places, '+')})"
            for c in comparisons
            if c.a == name
        ]
        sentences.append(f"Compared user by user, {metric} of {name} is {' and '.join(clauses)}.")
    settled, one = {c.excludes_zero for c in comparisons}, len(comparisons) == 1
    if settled == {True}:
        begin = "The interval excludes" if one else "These intervals exclude"
        sentences.append(f"{begin} zero: this is unlikely to be only the luck of which users were tested.")
    elif settled == {False}:
        begin = "The interval includes" if one else "These intervals include"
        sentences.append(f"{begin} zero: these users do not settle which is better.")
    elif settled:
        sentences.append("Where an interval includes zero, these users do not settle which is better.")
    return " ".join(sentences)


def _metrics(report: Report, colour: Mapping[str, str]) -> str:
    names = shown_metrics(report.rows)
    if not names:
        return ""
    places = digits(report.rows)
    best = {name: max(row.metrics.get(name, -math.inf) for row in report.rows) for name in names}
    rows = []
    for row in report.rows:
        spread = {n: f" ± {deviation:.{places}f}" for n, deviation in row.deviations.items()}
        cells = dict.fromkeys(names, "–")
        for n, value in row.metrics.items():
            cells[n] = _cell(
                value, row.intervals.get(n), f".{places}f", spread.get(n, ""), value == best.get(n)
            )
        rows.append((_row_head(row, colour), [cells[n] for n in names]))
    table = f'{_table("method", names, rows)}<p class="note">{NOTES["metrics"]}</p>'
    return (
        table
        + _paired(report.comparisons, places)
        + _dots(report, names, colour)
        + _more(report.rows, colour)
    )


def more_columns(
    rows: Sequence[Row], but: str = ""
) -> tuple[list[str], dict[str, int], list[list[str | None]]]:
    """Other cuts and coverage ``but`` one, and hits by popularity of the target.

    Returns:
        Names of the cuts, users by bucket of popularity, and the values of each row: cuts, then buckets.
    """
    names = list(dict.fromkeys(name for row in rows for name in row.more if name != but))
    sizes = {bucket: n for row in rows for bucket, (n, _) in row.by_popularity.items()}
    known = [row.more | {b: value for b, (_, value) in row.by_popularity.items()} for row in rows]
    wanted, places = [*names, *sizes], digits(rows)
    return names, sizes, [[f"{each[n]:.{places}f}" if n in each else None for n in wanted] for each in known]


def _more(rows: Sequence[Row], colour: Mapping[str, str]) -> str:
    names, sizes, values = more_columns(rows)
    if not names and not sizes:
        return ""
    lines = [
        (_key(row, colour), [cell or "–" for cell in cells]) for row, cells in zip(rows, values, strict=True)
    ]
    heads = [f"{bucket} seen ({n:,} users)" for bucket, n in sizes.items()]
    return f'{_table("method", [*names, *heads], lines)}<p class="note">{NOTES["more"]}</p>'


def _paired(comparisons: Sequence[Comparison], places: int) -> str:
    metrics = list(dict.fromkeys(c.metric for c in comparisons))
    cells = {
        (c.a, c.b, c.metric): _cell(c.difference, (c.low, c.high), f"+.{places}f", word=c.verdict)
        for c in comparisons
    }
    pairs = dict.fromkeys((c.a, c.b) for c in comparisons)
    rows = [(escape(f"{a} − {b}"), [cells.get((a, b, m), "–") for m in metrics]) for a, b in pairs]
    return _table("user by user", metrics, rows) if rows else ""


def _table(corner: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in (corner, *columns))
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for first, cells in rows
    )
    return _scroll("Table", f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")


def _scroll(label: str, wide: str) -> str:
    return f'<div class="scroll" tabindex="0" role="group" aria-label="{escape(label)}">{wide}</div>'


def _cell(
    value: float,
    interval: tuple[float, float] | None,
    form: str,
    spread: str = "",
    best: bool = False,
    word: str = "",
) -> str:
    shown, *ends = (format(number, form).replace("-", "−") for number in (value, *(interval or ())))
    shown = f"<b>{shown}{spread}</b>" if best else shown + spread
    small = f"<small>{ends[0]} <wbr>to\xa0{ends[1]}</small>" if ends else ""
    return shown + small + (f"<small>{word}</small>" if word else "")


def _key(row: Row, colour: Mapping[str, str]) -> str:
    return f'<i class="key {colour[row.name]}"></i>{escape(row.name)}'


def _row_head(row: Row, colour: Mapping[str, str]) -> str:
    seconds = row.seconds
    took = "" if seconds is None else f"ranked in {seconds:.{1 if seconds < 10 else 0}f}\xa0s"
    note = "; ".join(part for part in (row.note, took) if part)
    return _key(row, colour) + (f"<small>{escape(note)}</small>" if note else "")


def _dots(report: Report, names: Sequence[str], colour: Mapping[str, str]) -> str:
    """Dots with whiskers: a panel for each kind of metric, and one for the paired differences."""
    panels: dict[str, dict[str, list[Dot]]] = {}
    for name in names:
        rows = [row for row in report.rows if name in row.metrics]
        dots = [(r.name, colour[r.name], r.metrics[name], r.intervals.get(name)) for r in rows]
        panels.setdefault(name.partition("@")[0], {})[name] = dots
    for c in report.comparisons:
        line = (f"{c.a} − {c.b}", colour.get(c.a, "c0"), c.difference, (c.low, c.high))
        pairs = panels.setdefault("user by user", {})
        pairs.setdefault(f"{c.metric}, user by user", []).append(line)
    caption = "Dot: mean over users. Line: its 95\xa0% interval. Further right is better."
    if report.comparisons:
        caption += " User by user: a difference whose line does not touch 0 is unlikely to be only luck."
    return _figure("".join(dot_panel(groups) for groups in panels.values()), caption)


def _training(curves: Mapping[str, list[dict[str, Any]]], colour: Mapping[str, str]) -> str:
    measured = dict.fromkeys(key for rows in curves.values() for row in rows for key in row.get("valid", {}))
    watched = next((name for name in ("NDCG@10", "HR@10", *measured) if name in measured), "")
    valid = {run: [row["valid"] | row for row in rows if "valid" in row] for run, rows in curves.items()}
    panels = [
        curve_panel(title, {run: _series(rows, key, varies) for run, rows in logs.items()}, colour)
        for key, title, varies, logs in (
            ("loss", "Training loss", False, curves),
            ("loss_positive_gain", "Loss of tokens that decide", False, curves),
            ("loss_zero_gain", "Loss of zero-gain tokens", False, curves),
            ("temperature", "Temperature", True, curves),
            ("w", "Gradient weight w", True, curves),
            (watched, f"Validation {watched}", False, valid),
        )
    ]
    return _figure("".join(panels), NOTES["curves"]) if any(panels) else ""


def _series(rows: Iterable[Mapping[str, Any]], key: str, varies: bool) -> NDArray[np.float64]:
    """(P, 2) steps and finite values, at most POINTS means; empty where what should vary does not."""
    pairs = [(row.get("step"), row.get(key)) for row in rows]
    numbers = [pair for pair in pairs if all(isinstance(v, int | float) and math.isfinite(v) for v in pair)]
    points = np.array(numbers, dtype=np.float64).reshape(-1, 2)
    if not len(points) or (varies and np.ptp(points[:, 1]) < 1e-9):
        return points[:0]
    return np.array([block.mean(axis=0) for block in np.array_split(points, min(len(points), POINTS))])


def _catalogue(report: Report) -> tuple[str, str]:
    facts = _definitions((name, escape(value)) for name, value in fact_lines(report.facts))
    if report.forced is None or not np.sum(report.forced[1]) > 0:
        return "The data", facts
    share, weight = (np.asarray(part, dtype=np.float64) for part in report.forced)
    weight = weight / weight.sum()
    later = float(weight[POSITIONS:].sum())
    caption = (
        f"{percent(float((share * weight).sum()))} of all target tokens are forced (grey); only the others "
        "decide which title it becomes (colour). A bar's height: the share of target titles this long."
    )
    if later:
        caption += f" Positions after {POSITIONS} hold {percent(later)} of the tokens and are not drawn."
    figure = _figure(forced_bars(share, weight), caption)
    body = f'<p>{NOTES["choice"]}</p><div class="panels">{figure}{facts}</div>'
    return "How much of a title is a choice?", body


def _examples(examples: Sequence[Example]) -> str:
    if not examples:
        return ""
    drawn: list[str] = []
    cards = []
    for example in examples:
        draw = len(drawn) < TREES and example.user not in drawn and bool(example.recommendations)
        drawn += [example.user] if draw else []
        cards.append(_card(example, draw))
    ranges = ("over 90", "50 to 90", "20 to 50", "5 to 20", "under 5")
    legend = " ".join(f'<span class="d{i}">{r}\xa0%</span>' for i, r in enumerate(ranges, 1))
    shades = f'<p class="legend">Probability of a decision: {legend} <span class="f">forced</span></p>'
    return f"<p>{NOTES['users']}</p>{shades}{''.join(cards)}"


def _card(example: Example, draw: bool) -> str:
    titles = [f"<li><bdi>{escape(title)}</bdi></li>" for title in example.history]
    earlier, recent = titles[:-RECENT], "".join(titles[-RECENT:])
    chips = f'<ol class="chips">{"".join(earlier)}</ol>'
    more = f"<details><summary>{len(earlier)} earlier</summary>{chips}</details>" if earlier else ""
    got = "".join(_recommended(place, r) for place, r in enumerate(example.recommendations, 1))
    return (
        f"<article><h3>User {escape(example.user)} <span>{escape(example.method)}</span></h3>"
        f'<h4>History, oldest first</h4>{more}<ol class="chips">{recent or "<li>nothing yet</li>"}</ol>'
        f'<h4>True next title</h4><p class="next"><bdi>{escape(example.target)}</bdi> <span>{example.place}</span>'
        f'</p><h4>Recommended</h4><ol class="recs">{got or "<li>nothing</li>"}</ol>'
        f"{_paths(example) if draw else ''}</article>"
    )


def _recommended(place: int, found: Recommendation) -> str:
    spans = "".join(_span(piece) for piece in pieces(found.tokens))
    spans += f" {escape(found.title)}" if found.coded else ""
    mark = "<em>✓ true next title</em>" if found.is_target else ""
    probability = escape(percent(math.exp(found.score)))
    return f"<li><b>{place}</b><bdi>{spans}</bdi>{mark}<span>{probability}</span></li>"


def _span(piece: Token) -> str:
    if not piece.decides:
        return f'<span class="f">{escape(piece.text)}</span>' if piece.text else ""
    probability = math.exp(piece.log_p)
    shade = 1 + sum(probability < edge for edge in SHADES)
    ways = f"{percent(probability)}, one of {piece.n_valid:,} ways to go on"
    hint = f"{ways}; −ln p = {-piece.log_p:.2f}, gain = {piece.gain:.4f} nats"
    word = piece.text.lstrip() or piece.text
    shown = escape(word) if word else '<i class="stop" role="img" aria-label="end of the title"></i>'
    space = piece.text.removesuffix(word)
    return f'{escape(space)}<span class="d{shade}" title="{escape(hint)}">{shown}</span>'


def _paths(example: Example) -> str:
    found = example.recommendations
    caption = NOTES["paths"]
    if any(not token.decides and token.log_p < -1e-4 for r in found for token in r.tokens):
        caption += " Here tokens that leave the catalogue have a probability too (vocabulary support)."
    if not any(r.is_target for r in found):
        caption += f" The true next title, {example.target}, is not among them."
    drawing = _scroll(f"Decoding paths of user {example.user}; scrolls sideways", tree_drawing(found))
    return f'<figure class="tree">{drawing}<figcaption>{escape(caption)}</figcaption></figure>'


def _definitions(pairs: Iterable[tuple[str, str]]) -> str:
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{value}</dd>" for name, value in pairs)
    return f"<dl>{listed}</dl>" if listed else ""


def _figure(panels: str, caption: str) -> str:
    return f'<figure><div class="panels">{panels}</div><figcaption>{escape(caption)}</figcaption></figure>'
