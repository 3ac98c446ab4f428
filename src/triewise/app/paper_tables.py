"""Tables and figures of papers as data: which recipes their rows are, what the papers print, and how ours compare.

A definition is ``TABLE.toml`` beside this file. A number that is not known to us is left out, and said to be not
recorded.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from typing import Any, Literal

import numpy as np

from triewise.recipe import Recipe, load_recipe

Scale = Literal["paper", "small"]
SCALES: tuple[Scale, ...] = ("paper", "small")
NOT_RECORDED = "the paper's number is not recorded"
SHOWN_METRICS = ("NDCG@10", "HR@10")
DRAWS = 20_000


@dataclass(frozen=True)
class RowPlan:
    """How a row of a table is made, at one scale.

    Attributes:
        name: Of the row.
        title: What it is called.
        recipe: Name of the recipe it starts from.
        changes: ``key=value`` changes that make the row of it.
        key: The key that validation rows choose.
        values: Its values, the recipe's own first.
        needs: A key whose value is the folder of a run of another recipe, trained first.
        missing: Why it cannot be run, where it cannot.
        against: The row over which its gain is stated; empty: that of the table.
    """

    name: str
    title: str
    recipe: str = ""
    changes: tuple[str, ...] = ()
    key: str = "training.learning_rate"
    values: tuple[Any, ...] = ()
    needs: Mapping[str, str] = field(default_factory=dict)
    missing: str = ""
    against: str = ""


@dataclass(frozen=True)
class PaperTable:
    """A table at one scale.

    Attributes:
        name: ``msl-table-6``.
        rows: By name.
        against: The row with which all are compared.
        title: What it shows; empty for tables of our own.
        source: Paper and place.
        claim: What the paper says about it.
        measure: ``accuracy``: metrics of rankings; ``deviation``: of a metric over seeds, in per cent of its mean;
            ``seconds``: of a training, as a multiple of the row ``against``; others: statistics of data or of lists.
        supports: Whether rows that write titles are ranked with the probabilities of both supports.
        backbone: Of the paper's numbers, part of a model's name.
        data: Source of the paper's rows, where none is given.
        metrics: What the numbers are.
        numbers: Data set -> row -> numbers, one for each of ``metrics``; a missing one is NaN.
        items: Of the paper's data sets, by which those of other times or filters are told from them.
        statistics: Names of `triewise.reports.PLACES` that belong to the table.
    """

    name: str
    rows: Mapping[str, RowPlan]
    against: str
    title: str = ""
    source: str = ""
    claim: str = ""
    measure: str = "accuracy"
    supports: bool = False
    backbone: str = ""
    data: str = ""
    metrics: tuple[str, ...] = SHOWN_METRICS
    numbers: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)
    items: Mapping[str, int] = field(default_factory=dict)
    statistics: tuple[str, ...] = ()

    @cached_property
    def published(self) -> bool:
        """Whether it is of a paper."""
        return bool(self.source)

    def base(self, row: str) -> str:
        """Name of the row over which a row's gain is stated."""
        return self.rows[row].against or self.against

    def number(self, row: str, data: str, metric: str = "NDCG@10") -> float | None:
        """What the paper prints for a row on a data set; None where that is not recorded."""
        if metric not in self.metrics:
            return None
        known = self.numbers.get(data, {}).get(row, ())
        value = known[self.metrics.index(metric)] if known else float("nan")
        return None if np.isnan(value) else float(value)

    def gains(self, row: str, data: str, n_items: int, metric: str = "NDCG@10") -> list[float]:
        """How far a row is above the one it is stated over in the paper, as a share of it.

        One number; on data that the paper does not have, by their name or their number of items, one for each that it
        has.
        """
        ours = data in self.numbers and self.items.get(data, n_items) == n_items
        pairs = [
            (self.number(row, d, metric), self.number(self.base(row), d, metric))
            for d in ([data] if ours else self.numbers)
        ]
        return [a / b - 1 for a, b in pairs if a is not None and b is not None]


def table_names() -> tuple[str, ...]:
    """All tables that there are, ``ledger`` first."""
    files = [file.name for file in resources.files("triewise.app").iterdir() if file.name.endswith(".toml")]
    return tuple(sorted((name.removesuffix(".toml") for name in files), key=lambda n: (n != "ledger", n)))


def read_table(name: str, scale: Scale = "paper") -> PaperTable:
    """The definition of a table, with the recipes of one scale."""
    file = resources.files("triewise.app") / f"{name}.toml"
    known: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))
    rows = {row: _row(name, row, each, scale) for row, each in known.pop("rows").items()}
    tuples: dict[str, Any] = {n: tuple(known.pop(n)) for n in ("metrics", "statistics") if n in known}
    return PaperTable(name=name, rows=rows, **tuples, **known)


def _row(table: str, name: str, known: Mapping[str, Any], scale: Scale) -> RowPlan:
    """What is said of a row, and of it at this scale, together; a row may do without one scale."""
    each = {**known, **known.get(scale, {})}
    if any(other in known for other in SCALES) and scale not in known:
        each["missing"] = f"not at the scale {scale!r}"
    if each.get("missing"):
        return RowPlan(
            name, each.get("title", name), missing=each["missing"], against=each.get("against", "")
        )
    recipe = each.get("recipe") or (f"papers/msl-table-5/{name}" if scale in known else f"{table}/{name}")
    made: Recipe = load_recipe(recipe)
    factors = each.get("factors", (1, 0.5, 2) if scale == "small" else (1,))
    values = each.get("values") or [made.training.learning_rate * factor for factor in factors]
    return RowPlan(
        name,
        each.get("title") or made.title,
        recipe,
        tuple(each.get("changes", ())),
        each.get("key", RowPlan.key),
        tuple(values),
        each.get("needs", {}),
        against=each.get("against", ""),
    )


def data_name(source: str) -> str:
    """A data set as the numbers have it: the last part of its source without pipeline and plural.

    >>> data_name("msl:data/amazon_office"), data_name("d3:raw/amazon_games_d3"), data_name("ml-100k")
    ('office', 'game', 'ml-100k')
    """
    place = source.replace("\\", "/").rstrip("/").rpartition("/")[2].rpartition(":")[2].lower()
    words = [
        word for word in place.replace("-", "_").split("_") if word not in ("amazon", "d3", "msl", "2014")
    ]
    return ("-".join(words) or place).rstrip("s")


def verdict(number: float | None, low: float, high: float) -> str:
    """Where ours, an interval, lies beside a paper's number: within, above or below it, or that there is none.

    >>> verdict(0.3, 0.2, 0.4), verdict(0.1, 0.2, 0.4), verdict(0.5, 0.2, 0.4)
    ('within', 'above', 'below')
    >>> verdict(None, 0.2, 0.4)
    "the paper's number is not recorded"
    """
    if number is None:
        return NOT_RECORDED
    if np.isnan(low) or np.isnan(high):
        return "ours has no interval"
    return "above" if low > number else "below" if high < number else "within"


@dataclass(frozen=True)
class Beside:
    """A number of ours beside the paper's.

    Attributes:
        what: ``NDCG@10, trie``, ``NDCG@10 over LML, trie``, ...
        ours: NaN where there is none.
        low: Of its 95 % interval.
        high: Of its 95 % interval.
        paper: The paper's number; None where it is not recorded.
        verdict: `verdict`, or why there is none.
        gain: Whether it is a share by which a row is above another one.
        sets: Of how many data sets of the paper its number is the mean.
    """

    what: str
    ours: float
    low: float
    high: float
    paper: float | None
    verdict: str
    gain: bool = False
    sets: int = 1

    def cells(self) -> tuple[str, str, str, str]:
        """What, ours with its interval, the paper's number, the verdict."""
        shown = "{:+.1%}" if self.gain else "{:.4f}" if abs(self.ours) < 1 else "{:.2f}"
        ours = "" if np.isnan(self.ours) else shown.format(self.ours)
        if ours and not np.isnan(self.low):
            ours += f" [{shown.format(self.low)}, {shown.format(self.high)}]"
        paper = "" if self.paper is None else shown.format(self.paper)
        return (
            self.what,
            ours,
            f"{paper}, mean of its {self.sets} data sets" if self.sets > 1 else paper,
            self.verdict,
        )


def deviation(values: Sequence[float]) -> tuple[float, float, float]:
    """Standard deviation of a metric over seeds in per cent of its mean, and its 95 % interval if seeds are normal.

    ``s sqrt((n - 1) / q)`` with quantiles q of chi-squared with n - 1 degrees of freedom, by `DRAWS` draws.

    >>> [round(float(v), 1) for v in deviation([0.9, 1.0, 1.1])]
    [10.0, 5.2, 63.1]
    """
    n, mean = len(values), float(np.mean(values))
    if n < 2 or not mean:
        return (float("nan"),) * 3
    s = 100 * float(np.std(values, ddof=1)) / mean
    drawn = np.random.default_rng(0).chisquare(n - 1, DRAWS)
    low, high = (s * ((n - 1) / np.quantile(drawn, q)) ** 0.5 for q in (0.975, 0.025))
    return s, float(low), float(high)
