"""The numbers of a report for people at a terminal, on stdout, readable at 80 columns.

Titles are untrusted text and printed as they are: nothing in them is taken for markup, and control characters
never reach the terminal. Where there is no colour (a file, a pipe), brackets say what colour and bold would.
Every function prints to its ``console``, by default to stdout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from triewise.plain import clean as clean
from triewise.reports.description import fact_lines, percent
from triewise.reports.explanation import Example, Recommendation, pieces
from triewise.reports.report import RECENT, Comparison, Row, digits, more_columns, shown_metrics

NARROWEST = 20  # columns that a wrapped text gets at least
WIDEST_NAME = 40  # of a fact; its value stands beside it


def print_rows(
    rows: Sequence[Row], comparisons: Sequence[Comparison], console: Console | None = None
) -> None:
    """Print a table of methods, each metric with its 95 % interval, and a line per comparison."""
    console, names, places = console or Console(), shown_metrics(rows), digits(rows)
    table = _table(names)
    for row in rows:
        first = Text(clean(row.name), style="bold")
        if row.note:
            first.append(f"\n{clean(row.note)}", style="not bold dim")
        table.add_row(first, *(_cell(row, name, places) for name in names))
    console.print(table)
    _print_more(rows, console)
    if any(row.deviations for row in rows):
        _hang(console, "", Text("±: standard deviation over seeds", style="dim"))
    if comparisons or any(row.intervals for row in rows):
        _hang(console, "", Text("small print and parentheses: 95 % interval over users", style="dim"))
    for c in comparisons:
        line = Text(f"{clean(c.a)} - {clean(c.b)}: {clean(c.metric)} ")
        line.append(f"{c.difference:+.{places}f}", style="bold")
        _hang(console, "", line.append(f" ({c.low:+.{places}f} to {c.high:+.{places}f}), {c.verdict}"))


def print_examples(examples: Sequence[Example], console: Console | None = None) -> None:
    """Print users with history, true next title and recommendations, the deciding tokens marked."""
    if not examples:
        return
    console = console or Console()
    coloured = console.color_system is not None
    for example in examples:
        earlier = len(example.history) - RECENT
        before = f", {earlier} titles before these" if earlier > 0 else "" if example.history else ": nothing"
        console.print()
        _hang(console, "", Text(f"User {clean(example.user)}, {clean(example.method)}", style="bold"))
        _hang(console, "  ", Text(f"history{before}"))
        for title in example.history[-RECENT:]:
            _hang(console, "    ", Text(clean(title)))
        _hang(console, "  ", Text(f"true next title, {example.place}"))
        _hang(console, "    ", Text(clean(example.target), style="bold"))
        _hang(console, "  ", Text("recommended"))
        for n, recommended in enumerate(example.recommendations, 1):
            probability = percent(math.exp(recommended.score)).replace("\xa0", " ")
            _hang(console, f"    {n}. {probability:>7}  ", _marked(recommended, coloured))
    console.print()
    _hang(console, "", _legend(coloured))


def print_recommendations(
    titles: Sequence[tuple[str, float, Recommendation | None]], console: Console | None = None
) -> None:
    """Print titles, best first, with place and score; the deciding tokens are marked where they are not None."""
    console = console or Console()
    coloured = console.color_system is not None
    for place, (title, score, why) in enumerate(titles, 1):
        marked = Text(clean(title)) if why is None else _marked(why, coloured)
        console.print(Text.assemble(f"{place:>3}  {score:8.3f}  ", marked), soft_wrap=True)
    if any(why is not None for _, _, why in titles):
        console.print(_legend(coloured), soft_wrap=True)


def print_facts(facts: Mapping[str, Any], console: Console | None = None) -> None:
    """Print names and values of `describe`, or any others, one a line, aligned."""
    console = console or Console()
    lines = [(clean(name), clean(value)) for name, value in fact_lines(facts)]
    wide = min(max((len(name) for name, _ in lines), default=0), WIDEST_NAME)
    for name, value in lines:
        if len(name) > wide:
            _hang(console, "", Text(name))
            name = ""
        _hang(console, f"{name:<{wide}}  ", Text(value, style="bold"))


def _print_more(rows: Sequence[Row], console: Console) -> None:
    """A second table: other cuts, coverage, and hits by popularity of the target."""
    names, sizes, values = more_columns(rows, but="NDCG@20")
    if not names and not sizes:
        return
    table = _table([name.replace("coverage@10", "cover") for name in (*names, *sizes)])
    for row, cells in zip(rows, values, strict=True):
        table.add_row(Text(clean(row.name), style="bold"), *(cell or "-" for cell in cells))
    console.print()
    console.print(table)
    if "coverage@10" in names:
        _hang(console, "", Text("cover: share of titles in anybody's first ten", style="dim"))
    if sizes:
        users = ", ".join(f"{n:,}" for n in sizes.values())
        said = f"HR@10 by training interactions of the true next title ({users} users)"
        _hang(console, "", Text(f"{clean(' '.join(sizes))}: {said}", style="dim"))


def _table(columns: Sequence[str]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 2, 0, 0), show_edge=False, pad_edge=False)
    table.add_column("method", overflow="fold")
    for name in columns:
        table.add_column(Text(clean(name)), justify="right", no_wrap=True)
    return table


def _cell(row: Row, name: str, places: int) -> Text:
    if name not in row.metrics:
        return Text("-")
    cell = Text(f"{row.metrics[name]:.{places}f}")
    if name in row.deviations:
        cell.append(f"±{row.deviations[name]:.{places}f}")
    if name in row.intervals:
        low, high = row.intervals[name]
        cell.append(f"\n{low:.{places}f}-{high:.{places}f}", style="dim")
    return cell


def _marked(recommended: Recommendation, coloured: bool) -> Text:
    """A title whose deciding tokens are bold, or in brackets where there is no colour."""
    text = Text()
    for piece in pieces(recommended.tokens):
        word = clean(piece.text)
        if not piece.decides:
            text.append(word, style="dim")
            continue
        bare = word.lstrip() or word or "end"
        text.append(word.removesuffix(bare))
        text.append(bare if coloured else f"[{bare}]", style="bold cyan" if word else "italic cyan")
    if recommended.coded:
        text.append(f"  {clean(recommended.title)}")
    if recommended.is_target:
        text.append("  <- true next title", style="bold green")
    return text


def _legend(coloured: bool) -> Text:
    mark = Text("bold", style="bold cyan") if coloured else Text("[brackets]")
    said = ": tokens that decided; all others were forced by the catalogue"
    return mark.append(said, style="not bold default")


def _hang(console: Console, prefix: str, text: Text) -> None:
    """Print a text after a prefix; wrapped lines start below its first character."""
    width = max(console.width - len(prefix), NARROWEST)
    for n, line in enumerate(text.wrap(console, width, overflow="fold") or [Text()]):
        line.rstrip()
        before = prefix if n == 0 else " " * len(prefix)
        console.print(Text.assemble(before, line), soft_wrap=True)
