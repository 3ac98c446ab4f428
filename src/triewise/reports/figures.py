"""Figures as SVG text: dots with whiskers, curves, bars, and decoding paths through the trie.

Written by hand so that their text is text, their colours follow the reader's light or dark setting, and the
same numbers give the same bytes. Colours and type come from classes that the page styles. Each figure is
400 units wide, so that it reads well on a phone and beside another on a laptop. Titles are untrusted text:
every string goes through `escape`.
"""

from __future__ import annotations

import html
import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from triewise.plain import legible
from triewise.reports.description import percent
from triewise.reports.explanation import Branch, Recommendation, decoding_tree, pieces

WIDTH = 400
ROW = 66  # height of one title in a drawn tree
BOLD = 1.07  # bold text is so much wider
POSITIONS = 24  # bars of the forced share
Dot = tuple[str, str, float, tuple[float, float] | None]  # name, colour class, value, interval


def dot_panel(groups: Mapping[str, Sequence[Dot]]) -> str:
    """Dots with whiskers on one axis that contains 0, one below the other under each heading."""
    ends = [v for rows in groups.values() for *_, value, interval in rows for v in (value, *(interval or ()))]
    ticks = round_ticks(min(0.0, *ends), max(0.0, *ends))
    left = min(
        190.0, 18 + max(text_width(elide(name, 22), 12.5) for rows in groups.values() for name, *_ in rows)
    )
    x = scale(ticks[0], ticks[-1], left, 378)
    marks, said, y = [], [], 8.0
    for heading, rows in groups.items():
        y += 20
        marks.append(_text(0, y, heading, "head"))
        for name, css, value, interval in rows:
            y += 23
            low, high = interval or (value, value)
            marks.append(
                f'{_text(8, y + 4, elide(name, 22), "lab")}<path class="{css} whisk" d="M{x(low):.1f} '
                f'{y:.0f}H{x(high):.1f}"/><circle class="{css} dot" cx="{x(value):.1f}" cy="{y:.0f}" r="5"/>'
            )
            spread = f" ({low:.3f} to {high:.3f})" if interval else ""
            said.append(f"{heading}, {name}: {value:.3f}{spread}")
        y += 8
    axis = "".join(
        f'<path class="{"zero" if t == 0 else "grid"}" d="M{x(t):.1f} 12V{y + 4:.0f}"/>'
        f"{_text(x(t), y + 19, f'{t:g}', 'tick mid')}"
        for t in ticks
    )
    return svg(WIDTH, y + 26, "; ".join(said), axis + "".join(marks))


def curve_panel(title: str, lines: Mapping[str, NDArray[np.float64]], colour: Mapping[str, str]) -> str:
    """Lines over training steps, each named at its end; empty without lines, and where all of them lie on zero.

    Args:
        title: What is drawn.
        lines: (P, 2) steps and values of each run; a run without points is left out.
        colour: Colour class of each run.
    """
    lines = {name: points for name, points in lines.items() if len(points)}
    if not any(points[:, 1].any() for points in lines.values()):
        return ""
    last, top = (max(float(points[:, i].max()) for points in lines.values()) for i in (0, 1))
    ticks, steps = round_ticks(0.0, top), [t for t in round_ticks(0.0, last) if t <= last]
    right = 390 - max(text_width(elide(name, 16), 12.5) * BOLD for name in lines)
    x, y = scale(0.0, max(last, 1.0), 40, right), scale(0.0, ticks[-1], 186, 34)
    marks = [_text(0, 16, title, "head")]
    marks += [_level(40, right, y(t), f"{t:g}", t == 0) for t in ticks]
    marks += [_text(x(t), 203, f"{t:g}", "tick mid") for t in steps]
    free = 0.0
    for name, points in sorted(lines.items(), key=lambda line: y(line[1][-1, 1])):
        path = "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in points)
        end = free = max(y(points[-1, 1]) + 4, free + 14)
        marks.append(f'<path class="{colour[name]} line" d="M{path}"/>')
        if len(points) == 1:
            marks.append(f'<circle class="{colour[name]} dot" cx="{x(last):.1f}" cy="{end - 4:.1f}" r="4"/>')
        marks.append(_text(right + 6, end, elide(name, 16), f"{colour[name]} name"))
    said = [
        f"{name} from {p[0, 1]:.3g} to {p[-1, 1]:.3g} at step {p[-1, 0]:.0f}" for name, p in lines.items()
    ]
    return svg(WIDTH, 212, f"{title}: {'; '.join(said)}", "".join(marks))


def series_panel(
    title: str, across: str, lines: Mapping[str, NDArray[np.float64]], colour: Mapping[str, str]
) -> str:
    """Numbers against other numbers, where either may be negative, with the intervals that are known.

    Args:
        title: What is drawn.
        across: What the horizontal axis is.
        lines: (P, 2) places and values of each name, or (P, 4) with the ends of an interval behind them; places ascend.
            A line of one point is a dot with its name beside it. One without points is left out.
        colour: Colour class of each name.
    """
    lines = {name: points for name, points in lines.items() if len(points)}
    if not lines:
        return ""
    places, values = (
        np.concatenate([p[:, part].ravel() for p in lines.values()]) for part in (0, slice(1, None))
    )
    low, high = float(values.min()), float(values.max())
    ticks = round_ticks(0.0 if 0 < low < high / 2 else low, 0.0 if low / 2 < high < 0 else high)
    first, last = float(places.min()), float(places.max())
    beside = all(len(points) == 1 for points in lines.values())
    steps = [
        t for t in round_ticks(0.0 if 0 < first < last / 2 else first, last) if beside or first <= t <= last
    ]
    widest = max(text_width(elide(name, 16), 12.5) * BOLD for name in lines)
    right = 380.0 if beside else 390 - widest
    ends = (steps[0], steps[-1]) if beside else (first, max(last, first + 1e-9))
    x, y = scale(*ends, 44, right), scale(ticks[0], ticks[-1], 186, 34)
    marks = [_text(0, 16, title, "head"), _text(right, 219, across, "lab end")]
    marks += [_level(44, right, y(t), f"{t:g}", t == 0) for t in ticks]
    marks += [_text(x(t), 203, f"{t:g}", "tick mid") for t in steps]
    ordered = sorted(lines.items(), key=lambda line: y(line[1][-1, 1]))
    for place, (name, points) in zip(_apart([y(p[-1, 1]) + 4 for _, p in ordered]), ordered, strict=True):
        css, at = colour[name], x(float(points[-1, 0]))
        marks.append(_series(points, css, x, y))
        turned = beside and at + widest > 380
        start = at - 9 if turned else at + 9 if beside else right + 6
        marks.append(_text(start, place, elide(name, 16), f"{css} name{' end' if turned else ''}"))
    said = [
        f"{name} from {p[0, 1]:.3g} at {p[0, 0]:.3g} to {p[-1, 1]:.3g} at {p[-1, 0]:.3g}"
        for name, p in lines.items()
    ]
    return svg(WIDTH, 226, f"{title} against {across}: {'; '.join(said)}", "".join(marks))


def _apart(heights: Sequence[float]) -> list[float]:
    """Ascending heights of lines of text, moved so that none covers another and the last is inside the drawing."""
    found = list(heights)
    for i in range(1, len(found)):
        found[i] = max(found[i], found[i - 1] + 14)
    for i in range(len(found) - 1, -1, -1):
        found[i] = min(found[i], found[i + 1] - 14 if i + 1 < len(found) else 196)
    return found


def _series(
    points: NDArray[np.float64], css: str, x: Callable[[float], float], y: Callable[[float], float]
) -> str:
    """A line with its dots where they are few, and its intervals: whiskers of few points, a band of many."""
    marks = []
    if points.shape[1] > 2 and len(points) > 12:
        around = [*((a, high) for a, _, _, high in points), *((a, low) for a, _, low, _ in points[::-1])]
        outline = "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in around)
        marks.append(f'<path class="{css} band" d="M{outline}Z"/>')
    elif points.shape[1] > 2:
        marks += [
            f'<path class="{css} whisk" d="M{x(a):.1f} {y(b):.1f}V{y(c):.1f}"/>' for a, _, b, c in points
        ]
    if len(points) > 1:
        path = "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in points[:, :2])
        marks.append(f'<path class="{css} line" d="M{path}"/>')
    if len(points) <= 12:
        marks += [
            f'<circle class="{css} dot" cx="{x(a):.1f}" cy="{y(b):.1f}" r="3.5"/>' for a, b in points[:, :2]
        ]
    return "".join(marks)


def forced_bars(share: NDArray[np.float64], weight: NDArray[np.float64]) -> str:
    """A bar per position in the title: as high as titles are that long, grey as far as they are forced.

    Args:
        share: (T,) share of forced tokens at each position, in [0, 1].
        weight: (T,) share of all target tokens at each position.
    """
    n = min(len(share), POSITIONS)
    height, slot = weight[:n] / weight.max() * 150, 350 / n
    marks = [_text(0, 16, "titles with a token at this position, %", "head")]
    marks += [_level(36, 390, 180 - 150 * t, f"{100 * t:.0f}", t == 0) for t in (0.0, 0.5, 1.0)]
    for t in range(n):
        left, grey = 38 + t * slot, height[t] * share[t]
        at = f'x="{left:.1f}" width="{slot - 2:.1f}"'
        marks.append(f'<rect class="forced" {at} y="{180 - grey:.1f}" height="{grey:.1f}"/>')
        marks.append(f'<rect class="decide" {at} y="{180 - height[t]:.1f}" height="{height[t] - grey:.1f}"/>')
        if n <= 16 or t % 2 == 0:
            marks.append(_text(left + slot / 2 - 1, 195, str(t + 1), "tick mid"))
    marks.append(_text(390, 211, "position in the title", "lab end"))
    said = ", ".join(f"position {t + 1} {percent(share[t])}" for t in range(n) if weight[t] > 0)
    return svg(WIDTH, 217, f"Share of forced tokens: {said}", "".join(marks))


def tree_drawing(found: Sequence[Recommendation]) -> str:
    """The paths of one or more titles, best first, through the trie, from left to right; as wide as they need."""
    plot = _TreePlot({place for place, r in enumerate(found) if r.is_target})
    root = decoding_tree(found)
    rows = plot.grow(root, plot.edge(root, -10.0, -10.0, 0) if root.forced else 2.0, 0)
    column = max(x for x, *_ in plot.leaves) + 18
    for x, y, place in plot.leaves:
        hit = place in plot.hits
        css, word = ("hit", "  true next") if hit else ("", "")
        label = f"{place + 1}.  {percent(math.exp(found[place].score))}{word}"
        plot.marks.append(
            f'<path class="lead" d="M{x + 7:.0f} {y:.0f}H{column - 5:.0f}"/><circle class="{css}" '
            f'cx="{x:.0f}" cy="{y:.0f}" r="4.5"/>{_text(column, y + 4, label, css)}'
        )
    said = []
    for place, r in enumerate(found, 1):
        decisions = (
            f"“{p.text.strip() or 'end'}” {percent(math.exp(p.log_p))} of {p.n_valid:,}"
            for p in pieces(r.tokens)
            if p.decides
        )
        said.append(f"{place}. {r.title}, {percent(math.exp(r.score))}: {', '.join(decisions)}")
    wide = column + (170 if plot.hits else 90)
    body = "".join(plot.lines + plot.marks)
    return svg(wide, rows * ROW + 2, f"Decoding paths: {'; '.join(said)}", body, f"width:{wide:.0f}px")


class _TreePlot:
    """Lays out a decoding tree: the best-ranked title of a node straight ahead, the others in rows below."""

    def __init__(self, hits: set[int]) -> None:
        self.hits = hits
        self.lines: list[str] = []
        self.marks: list[str] = []
        self.leaves: list[tuple[float, float, int]] = []

    def grow(self, branch: Branch, x: float, row: int) -> int:
        """Draw what follows the edge that ended at x; returns the next free row."""
        y = _row_y(row)
        if not branch.children:
            self.leaves.append((x, y, branch.rank))
            return row + 1
        number = f"{branch.n_valid:,}"
        half = text_width(number, 11.5) / 2 + 6
        trunk, free = x + half, row
        for child in branch.children:
            free = self.grow(child, self.edge(child, trunk, trunk + half, free, y), free)
        end = _row_y(free - 1) + 27
        self.lines.append(f'<path class="stub" d="M{trunk:.1f} {y + 10:.0f}V{end:.0f}h5"/>')
        self.marks.append(
            f"{_text(trunk + 8, end + 4, f'other {percent(branch.rest)}', 'tick')}"
            f'<rect class="box" x="{x:.1f}" y="{y - 10:.0f}" width="{2 * half:.1f}" height="20" rx="10"/>'
            f"{_text(trunk, y + 4, number, 'count mid')}"
        )
        return free

    def edge(self, branch: Branch, trunk: float, ahead: float, row: int, above: float | None = None) -> float:
        """Draw the edge of a branch, from a node's box or down from its trunk; returns where it ends.

        Args:
            branch: The edge and what follows.
            trunk: Where the lines of a node leave it downwards.
            ahead: Where the one in the node's own row starts.
            row: Row of the edge.
            above: Height of the node; None for the beginning that all titles share.
        """
        y, start = _row_y(row), ahead + 14
        forced = elide(branch.forced.rstrip(), 30)
        chosen = branch.text.lstrip() or ("␣" if branch.text else "")
        chosen = chosen or ("" if above is None else "(end)")
        below = "" if above is None else percent(math.exp(branch.log_p))
        if branch.forced_log_p < -1e-4:
            below += f" × {percent(math.exp(branch.forced_log_p))}"
        wide = text_width(chosen, 13.5) * BOLD + text_width(forced, 13.5)
        end = start + max(wide, text_width(below, 11.5), 44.0) + 8
        straight = above is None or above == y
        turn = f"M{ahead:.1f} {y:.0f}" if straight else f"M{trunk:.1f} {above:.0f}V{y - 9:.0f}q0 9 9 9"
        kind = "hit" if self._holds_hit(branch) else "way"
        thick = 1.2 + 4.8 * math.exp(branch.log_p / 2)
        self.lines.append(f'<path class="{kind}" d="{turn}H{end:.1f}" stroke-width="{thick:.1f}"/>')
        self.marks.append(
            f'<text class="lab" x="{start:.1f}" y="{y - 8:.0f}"><tspan class="chosen">{escape(chosen)}'
            f"</tspan>{escape(forced)}</text>{_text(start, y + 16, below, 'prob')}"
        )
        return end

    def _holds_hit(self, branch: Branch) -> bool:
        return branch.rank in self.hits or any(self._holds_hit(child) for child in branch.children)


def svg(width: float, height: float, said: str, body: str, style: str = "") -> str:
    """An SVG element with its text alternative."""
    shape = f'viewBox="0 0 {width:.0f} {height:.0f}"' + (f' style="{style}"' if style else "")
    return f'<svg role="img" aria-label="{escape(said)}" {shape}>{body}</svg>'


def escape(text: object) -> str:
    """Safe as HTML text and in quoted attributes; what no HTML file may hold becomes U+FFFD."""
    return html.escape(legible(str(text)))


def elide(text: str, n: int) -> str:
    """At most n characters, the middle left out."""
    return text if len(text) <= n else f"{text[: n * 2 // 3]}…{text[1 - n // 3 :]}"


def text_width(text: str, size: float) -> float:
    """Estimated width in pixels in a sans-serif face of some size, rather too wide than too narrow."""
    return size * sum(map(_em, text))


def scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """The linear map that takes low to start and high to end."""
    return lambda value: start + (end - start) * (value - low) / (high - low)


def round_ticks(low: float, high: float) -> list[float]:
    """Round numbers that cover low to high in four to six steps."""
    raw = max(high - low, 1e-9) / 4
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(s * unit for s in (1, 2, 2.5, 5, 10) if s * unit >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def _text(x: float, y: float, text: str, css: str) -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _level(left: float, right: float, y: float, label: str, zero: bool) -> str:
    line = f'<path class="{"zero" if zero else "grid"}" d="M{left:.0f} {y:.1f}H{right:.0f}"/>'
    return line + _text(left - 6, y + 4, label, "tick end")


def _row_y(row: int) -> float:
    return 30.0 + row * ROW


def _em(c: str) -> float:
    """Width of a character in units of the type size."""
    if unicodedata.category(c) in ("Mn", "Me", "Cf"):
        return 0.0
    if unicodedata.east_asian_width(c) in "WF":
        return 1.1
    return 0.34 if c in " .,:;'’!|()[]ijltfrI-" else 0.9 if c in "mwMW@%" else 0.72 if c.isupper() else 0.61
