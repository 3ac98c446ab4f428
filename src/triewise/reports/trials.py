"""One page about the trials of a study: the best so far, what mattered, every trial as a line through its values."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from triewise.reports.figures import WIDTH, elide, escape, round_ticks, scale, svg

AXIS = 92  # between two axes of the parallel coordinates
_NARROW = "max-width:30rem"  # alone on a wide page its type would be too large
STATES = {"complete": "c0", "pruned": "c1"}


@dataclass(frozen=True)
class TrialShown:
    """One trial.

    Attributes:
        number: From 1.
        state: complete, pruned, fail or running.
        value: Its metric; of a pruned one the last; None where it has none.
        values: Key to value.
        course: Steps and metrics of its validations.
    """

    number: int
    state: str
    value: float | None
    values: Mapping[str, Any]
    course: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class StepOfTrials:
    """The trials of one step.

    Attributes:
        name: Of the step.
        keys: What was chosen.
        log: Keys that were drawn on a logarithmic scale.
        trials: In the order in which they were begun.
        importance: Share of each key in how the metric varies; empty where that is not known.
        best: Number of the best trial; None: none has ended.
    """

    name: str
    keys: tuple[str, ...]
    log: frozenset[str]
    trials: tuple[TrialShown, ...]
    importance: Mapping[str, float]
    best: int | None


def trials_page(title: str, metric: str, users: int, steps: Sequence[StepOfTrials]) -> str:
    """The page, HTML.

    Args:
        title: Of the recipe.
        metric: What is compared.
        users: At most so many validation rows.
        steps: In their order.
    """
    said = f"{metric} on at most {users:,} validation rows; test rows were not looked at."
    parts = [f'<header><h1>Tuning of {escape(title)}</h1><p class="sub">{escape(said)}</p></header>']
    parts += [f"<section><h2>{escape(step.name)}</h2>{_step(step, metric)}</section>" for step in steps]
    template = resources.files("triewise.reports").joinpath("report.html").read_text(encoding="utf-8")
    page, rest = template.split("{title}")
    return page + escape(f"Tuning of {title}") + rest.replace("{body}", "\n".join(parts))


def _step(step: StepOfTrials, metric: str) -> str:
    if not step.trials:
        return "<p>No trial yet.</p>"
    number = {s: sum(t.state == s for t in step.trials) for s in ("complete", "pruned", "fail", "running")}
    words = ("ended", "stopped early", "impossible", "under way")
    counts = [f"{n} {word}" for n, word in zip(number.values(), words, strict=True) if n]
    best = next((t for t in step.trials if t.number == step.best), None)
    said = f"Of {len(step.trials)} trial{'s' * (len(step.trials) > 1)}: {', '.join(counts)}."
    if best is not None and best.value is not None:
        chosen = ", ".join(f"{key} = {_shown(value)}" for key, value in best.values.items())
        said = f"Best is trial {best.number} with {metric} {best.value:.4f}: {chosen}. {said}"
    panels = _best_so_far(step, metric) + _importance(step.importance)
    figure = (
        f'<figure><div class="panels">{panels}</div><figcaption>Dots: trials in the order in which they were begun, '
        "orange ones stopped early. Line: the best until then.</figcaption></figure>"
    )
    lines = _scroll(f"Values of the trials of {step.name}", _parallel(step, metric))
    ways = (
        f"<figure>{lines}<figcaption>Each line is a trial, from the value of each key to its {escape(metric)}; the "
        "better, the stronger.</figcaption></figure>"
    )
    return f'<p class="summary">{escape(said)}</p>{figure}{ways}{_table(step, metric)}'


def _valued(step: StepOfTrials) -> list[tuple[TrialShown, float]]:
    return [(t, t.value) for t in step.trials if t.value is not None]


def _best_so_far(step: StepOfTrials, metric: str) -> str:
    valued = _valued(step)
    if not valued:
        return ""
    values, last = [value for _, value in valued], step.trials[-1].number
    ticks = round_ticks(min(values), max(values))
    x, y = scale(1, max(last, 2), 52, 384), scale(ticks[0], ticks[-1], 186, 34)
    marks = [_text(0, 16, f"{metric} of each trial", "head")]
    for tick in ticks:
        marks.append(
            f'<path class="grid" d="M48 {y(tick):.1f}H390"/>{_text(44, y(tick) + 4, f"{tick:g}", "tick end")}'
        )
    for number in dict.fromkeys((1, (1 + last) // 2, last)):
        marks.append(_text(x(number), 203, str(number), "tick mid"))
    path, best = [], -math.inf
    for trial, value in valued:
        if trial.state == "complete" and value > best:
            path += [] if best == -math.inf else [f"H{x(trial.number):.1f}"]
            path.append(
                f"{'M' + format(x(trial.number), '.1f') + ' ' if best == -math.inf else 'V'}{y(value):.1f}"
            )
            best = value
    if path:
        marks.append(f'<path class="c0 line" d="{"".join(path)}H{x(last):.1f}"/>')
    marks += [
        f'<circle class="{STATES.get(t.state, "c1")} dot" cx="{x(t.number):.1f}" cy="{y(v):.1f}" r="4"/>'
        for t, v in valued
    ]
    said = "; ".join(f"trial {t.number} {v:.4f}" for t, v in valued)
    return svg(WIDTH, 212, f"{metric} of each trial: {said}", "".join(marks), _NARROW)


def _importance(importance: Mapping[str, float]) -> str:
    if not importance:
        return ""
    marks, y = [_text(0, 16, "Share of each key in how it varies", "head")], 20.0
    for key, share in importance.items():
        y += 38
        marks.append(_text(0, y - 6, elide(key, 44), "lab"))
        marks.append(
            f'<rect class="decide" x="0" y="{y:.0f}" width="{max(330 * share, 1):.1f}" height="12"/>'
        )
        marks.append(_text(6 + 330 * share, y + 10, f"{100 * share:.0f} %", "tick"))
    said = ", ".join(f"{key} {100 * share:.0f} %" for key, share in importance.items())
    return svg(WIDTH, y + 24, f"Importance: {said}", "".join(marks), _NARROW)


def _parallel(step: StepOfTrials, metric: str) -> str:
    """A vertical axis for each key and one for the metric; as wide as they need."""
    valued = sorted(_valued(step), key=lambda pair: pair[1])
    if not valued:
        return ""
    low, high = valued[0][1], valued[-1][1]
    axes = [_axis(key, key in step.log, [t.values.get(key) for t, _ in valued]) for key in step.keys]
    axes.append(_axis(metric, False, [value for _, value in valued]))
    gap = max(AXIS, (WIDTH - 100) / (len(axes) - 1))
    marks, wide = [], 50 + gap * (len(axes) - 1) + 60
    for row, (trial, value) in enumerate(valued):
        points = [f"{50 + gap * i:.1f} {axis.at[row]:.1f}" for i, axis in enumerate(axes)]
        strength = 0.25 + 0.75 * (value - low) / ((high - low) or 1)
        css = "c2" if trial.number == step.best else STATES.get(trial.state, "c1")
        marks.append(f'<path class="{css} line" style="opacity:{strength:.2f}" d="M{"L".join(points)}"/>')
    for i, axis in enumerate(axes):
        x = 50 + gap * i
        marks.append(f'<path class="zero" d="M{x:.1f} 34V194"/>')
        *section, name = axis.name.rpartition(".")
        marks.append(
            _text(x, 12, elide(section[0], 15), "tick mid") + _text(x, 26, elide(name, 15), "lab mid")
        )
        marks += [_text(x + 5, y + 4, elide(label, 11), "head tick") for label, y in axis.labels]
    style = f"width:{wide:.0f}px;max-width:none" if wide > WIDTH + 10 else _NARROW
    said = "; ".join(
        f"trial {t.number}: {', '.join(f'{k} {_shown(v)}' for k, v in t.values.items())}, {metric} {value:.4f}"
        for t, value in reversed(valued)
    )
    return svg(wide, 206, f"Values of the trials: {said}", "".join(marks), style)


@dataclass(frozen=True)
class _Axis:
    name: str
    at: list[float]  # where each trial crosses it
    labels: list[tuple[str, float]]


def _axis(name: str, log: bool, values: Sequence[Any]) -> _Axis:
    """Numbers on a scale; other values, evenly, in the order of their text."""
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if numeric:
        place = math.log if log else float
        low, high = min(values), max(values)
        if low < high:
            y = scale(place(low), place(high), 188, 42)
            return _Axis(
                name, [y(place(v)) for v in values], [(f"{v:.4g}", y(place(v))) for v in (low, high)]
            )
    kinds = sorted({_shown(v) for v in values})
    y = scale(0, max(len(kinds) - 1, 1), 188, 42)
    labels = [(kind, y(i) if len(kinds) > 1 else 115.0) for i, kind in enumerate(kinds)]
    return _Axis(name, [dict(labels)[_shown(v)] for v in values], labels)


def _table(step: StepOfTrials, metric: str) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("trial", metric, *step.keys))
    rows = []
    for trial in sorted(step.trials, key=lambda t: -math.inf if t.value is None else t.value, reverse=True):
        value = "–" if trial.value is None else f"{trial.value:.4f}"
        state = {"complete": "", "fail": "impossible", "running": "under way"}.get(
            trial.state, "stopped early"
        )
        if trial.state == "pruned" and trial.course:
            state += f" at step {trial.course[-1][0]:,}"
        shown = f"<b>{value}</b>" if trial.number == step.best else value
        cells = [shown + (f"<small>{escape(state)}</small>" if state else "")]
        cells += [escape(_shown(trial.values.get(key))) for key in step.keys]
        rows.append(
            f'<tr><th scope="row">{trial.number}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return _scroll(f"Trials of {step.name}", table)


def _scroll(label: str, wide: str) -> str:
    return f'<div class="scroll" tabindex="0" role="group" aria-label="{escape(label)}">{wide}</div>'


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def _text(x: float, y: float, text: str, css: str) -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'
