"""What a table or figure of a paper is here: numbers, a drawing, and one sentence that says what they show.

`PLACES` is the one list of them. What is drawn of runs and data is in ``token_statistics`` and ``run_statistics``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from triewise.reports.figures import escape

if TYPE_CHECKING:
    import polars as pl

    from triewise.arrays import Float64, Int64
    from triewise.ranking import Evaluation
    from triewise.recipe import Recipe
    from triewise.tokens import Trie

COLOURS = 6
ROWS = 24  # of a table that are shown on the page
# name -> what it is called, and where in the papers it stands
PLACES: dict[str, tuple[str, tuple[str, ...]]] = {
    "zero-gain": ("Tokens that decide nothing", ("igd-table-1",)),
    "token-losses": ("Losses of both token groups", ("igd-figure-2", "igd-figure-5", "igd-figure-7")),
    "prefix-entropy": (
        "Prefix entropy, predictions − truth",
        ("igd-figure-3", "igd-figure-6", "igd-figure-8"),
    ),
    "gain-probability": ("Gain and log-probability", ("igd-figure-4",)),
    "repetition": ("Repetition and entropy of the first ten", ("igd-table-7",)),
    "alpha": ("Weights in training and in decoding", ("igd-table-3", "igd-appendix-h")),
    "beta": ("Accuracy by the weight of zero-gain tokens", ("igd-table-8", "igd-appendix-h")),
    "lml-parts": ("Both parts of the language-modelling loss", ("msl-figure-3", "msl-figure-4")),
    "gradient-weight": ("Gradient weight w", ("msl-figure-5",)),
    "temperature": ("Accuracy by temperature", ("msl-figure-6",)),
    "accuracy-time": ("Accuracy by training time", ("msl-figure-7",)),
    "logits": ("Logits of valid tokens", ("msl-figure-8",)),
    "seeds": ("Deviation over seeds", ("msl-table-3",)),
    "valid-tokens": ("Valid next tokens", ("msl-table-4",)),
    "ablation": ("What the loss is made of", ("msl-table-6",)),
    "trie-time": ("Time of the trie", ("msl-table-7",)),
}


@dataclass(frozen=True)
class Statistic:
    """A table or figure of a paper, of the runs and data at hand.

    Attributes:
        name: A key of `PLACES`.
        table: Its numbers, a row for each.
        sentence: What they show here.
        panels: SVG drawings; none where the table says it all.
    """

    name: str
    table: pl.DataFrame
    sentence: str
    panels: tuple[str, ...] = ()


@dataclass(frozen=True)
class StudiedRun:
    """A run as statistics see it.

    Attributes:
        name: What it is called.
        recipe: What it was trained with.
        log: Rows of its ``log.jsonl``.
        seconds: Of its training.
        steps: Of its training.
        evaluation: On test rows; None where it has none.
        measured: Tables of what its model had to be run for, by name; see ``app.measuring``.
    """

    name: str
    recipe: Recipe
    log: Sequence[Mapping[str, Any]] = ()
    seconds: float = 0.0
    steps: int = 0
    evaluation: Evaluation | None = None
    measured: Mapping[str, pl.DataFrame] = field(default_factory=dict)


@dataclass(frozen=True)
class StudiedData:
    """Prepared data as a tokenizer reads their titles.

    Attributes:
        name: What it is called.
        facts: What `describe` says of it.
        trie: Of its titles.
        counts: (I,) training targets of each item.
        seconds: What was timed, and how long it took.
    """

    name: str
    facts: Mapping[str, Any]
    trie: Trie
    counts: Int64
    seconds: Mapping[str, float] = field(default_factory=dict)


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour class for each name, those of a report whose first rows have these names."""
    return {name: f"c{i % COLOURS}" for i, name in enumerate(dict.fromkeys(names))}


def number(value: float, sign: str = "") -> str:
    """Three digits behind the point, four below a tenth, with a minus that is as wide as a plus."""
    return f"{value:{sign}.{4 if 0 < abs(value) < 0.1 else 3}f}".replace("-", "−")


def times(ratio: float) -> str:
    """A ratio with two digits, without an exponent."""
    return f"{ratio:.2g}" if ratio < 99.5 else f"{ratio:,.0f}"


def spread(low: float, high: float, sign: str = "") -> str:
    """A 95 % interval in brackets."""
    return f"(95\xa0% interval {number(low, sign)} to {number(high, sign)})"


def verdict(low: float, high: float, more: str, less: str, none: str) -> str:
    """Which of three words an interval stands for."""
    return more if low > 0 else less if high < 0 else none


def points(table: pl.DataFrame, *columns: str) -> Float64:
    """Columns of a table as an array (P, C), sorted by the first."""
    return table.select(columns).sort(columns[0]).to_numpy().astype(np.float64)


def statistics_section(found: Sequence[Statistic]) -> str:
    """HTML of some statistics: drawings, else the table, with heading and sentence."""
    parts = []
    for one in found:
        title, places = PLACES[one.name]
        heading = f"<h3>{escape(title)} <span>{escape(spoken(places))}</span></h3>"
        shown = f'<div class="panels">{"".join(one.panels)}</div>' if any(one.panels) else _table(one)
        parts.append(f"<figure>{heading}{shown}<figcaption>{escape(one.sentence)}</figcaption></figure>")
    return "".join(parts)


def spoken(places: Sequence[str]) -> str:
    """Where something stands in the papers, in words."""
    said = [place.split("-", 1) for place in places]
    kinds = list(dict.fromkeys((paper, rest.split("-")[0]) for paper, rest in said))
    parts = []
    for paper, kind in kinds:
        of = [rest.split("-")[1].upper() for p, rest in said if (p, rest.split("-")[0]) == (paper, kind)]
        listed = f"{', '.join(of[:-1])} and {of[-1]}" if len(of) > 1 else of[0]
        parts.append(f"{paper.upper()} {kind}{'s' if len(of) > 1 else ''} {listed}")
    return "; ".join(parts)


def _table(one: Statistic) -> str:
    names = one.table.columns
    head = "".join(f'<th scope="col">{escape(name.replace("_", " "))}</th>' for name in names)
    rows = [
        f'<tr><th scope="row">{cells[0]}</th>{"".join(f"<td>{cell}</td>" for cell in cells[1:])}</tr>'
        for cells in ([escape(_cell(value)) for value in row] for row in one.table.head(ROWS).iter_rows())
    ]
    body = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    label = escape(PLACES[one.name][0])
    return f'<div class="scroll" tabindex="0" role="group" aria-label="{label}">{body}</div>'


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}".replace("-", "−")
    return f"{value:,}" if isinstance(value, int) else str(value)
