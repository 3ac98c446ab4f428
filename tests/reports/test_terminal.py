"""What a person reads at a terminal or in a file."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from dataclasses import replace

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from tests.reports.test_report import NASTY, example, rows
from triewise.reports import Comparison, print_examples, print_facts, print_rows
from triewise.reports.explanation import Recommendation, Token

COMPARISONS = (
    Comparison("MSL", "LML", "HR@10", 0.031, 0.009, 0.053),
    Comparison("MSL", "most popular", "NDCG@10", -0.001, -0.02, 0.02),
)


@pytest.fixture
def file() -> Console:
    """What a pipe is: 80 columns, no colours."""
    return Console(file=io.StringIO(), width=80, color_system=None)


@pytest.fixture
def terminal() -> Console:
    return Console(
        file=io.StringIO(),
        width=80,
        force_terminal=True,
        color_system="standard",
        legacy_windows=False,
        _environ={},
    )


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_rows_and_comparisons(file: Console) -> None:
    print_rows(rows(), COMPARISONS, file)
    lines = printed(file).splitlines()
    assert lines[0].split() == ["method", "HR@5", "HR@10", "NDCG@5", "NDCG@10"]
    assert lines[2].split() == ["MSL", "0.074", "0.149", "0.038", "0.077"]
    assert lines[3].split() == ["775", "steps", "0.054-0.094", "0.129-0.169", "0.018-0.058", "0.057-0.097"]
    assert lines[-2] == "MSL - LML: HR@10 +0.031 (+0.009 to +0.053), excludes zero"
    assert lines[-1] == "MSL - most popular: NDCG@10 -0.001 (-0.020 to +0.020), includes zero"


def test_seeds_coverage_popularity_and_significance(file: Console) -> None:
    seeds = replace(rows()[0], deviations={"HR@10": 0.004})
    more = replace(
        rows()[1], more={"HR@1": 0.02, "coverage@10": 0.5}, by_popularity={"0": (1200, 0.01), "1-4": (5, 0.2)}
    )
    compared = [Comparison("MSL", "LML", "HR@10", 0.031, 0.009, 0.053, p) for p in (0.0412, 0.0001)]
    print_rows([seeds, more], compared, file)
    lines = printed(file).splitlines()
    assert lines[2].split() == ["MSL", "0.074", "0.149±0.004", "0.038", "0.077"]
    second = next(i for i, line in enumerate(lines) if i and line.startswith("method"))
    assert lines[second].split() == ["method", "HR@1", "cover", "0", "1-4"]
    assert lines[second + 2].split() == ["MSL", "-", "-", "-", "-"]
    assert lines[second + 3].split() == ["LML", "0.020", "0.500", "0.010", "0.200"]
    assert "cover: share of titles in anybody's first ten" in lines
    assert "training interactions of the true next title (1,200, 5 users)" in " ".join(lines)
    assert "±: standard deviation over seeds" in lines
    assert lines[-2].endswith("(+0.009 to +0.053), excludes zero, p = 0.041")
    assert lines[-1].endswith("(+0.009 to +0.053), excludes zero, p < 0.001")
    assert max(map(len, lines)) <= 80


def test_rows_without_intervals_or_with_missing_metrics(file: Console) -> None:
    print_rows([rows()[2]], (), file)
    assert "interval" not in printed(file)
    print_rows([rows()[0], type(rows()[0])("b", {"HR@10": 0.5}, {})], (), file)
    assert "-" in printed(file).splitlines()[-2].split()


def test_examples_in_a_file_have_brackets(file: Console) -> None:
    print_examples((example(),), file)
    text = printed(file)
    assert "User 7, MSL\n  history, 3 titles before these\n    title 3\n" in text
    assert "  true next title, place 1 of the ranking\n    Star Wars\n" in text
    assert "    1.    24 %  [Star] [W]ars  <- true next title\n" in text
    assert "    2.   1.6 %  [Star][end]\n" in text
    assert f"[{NASTY}]\n" in text
    assert text.endswith("\n[brackets]: tokens that decided; all others were forced by the catalogue\n")
    assert "\x1b" not in text


def test_examples_on_a_terminal_have_colours_instead(terminal: Console) -> None:
    print_examples((example(),), terminal)
    text = printed(terminal)
    assert "\x1b[1;36mStar\x1b[0m" in text
    assert "[Star]" not in text and "[brackets]" not in text


def test_short_and_empty_histories(file: Console) -> None:
    print_examples((example(history=("one",), target_rank=-1), example(history=(), recommendations=())), file)
    text = printed(file)
    assert "  history\n    one\n" in text
    assert "  history: nothing\n" in text
    assert "true next title, not ranked" in text


def test_no_examples_print_nothing(file: Console) -> None:
    print_examples((), file)
    assert printed(file) == ""


@pytest.mark.parametrize(
    "title", ["[bold]x[/bold]", "[/]", ":smile:", "[red]", "a\\[b", "http://x [link=y]z"]
)
def test_titles_are_printed_literally(file: Console, title: str) -> None:
    token = Token(title, math.log(0.5), 1, 0.0)
    found = Recommendation(0, title, math.log(0.5), (token, Token("", 0.0, 1, 0.0)), False)
    print_examples((example(title, title, method=title, history=(title,), recommendations=(found,)),), file)
    print_facts({title: title}, file)
    print_rows(
        [type(rows()[0])(title, {"HR@10": 0.5}, {}, title)],
        [Comparison(title, title, "HR@10", 0, 0, 0)],
        file,
    )
    assert printed(file).count(title) == 4 + 1 + 2 + 2 + 2


@pytest.mark.parametrize("kind", ["file", "terminal"])
def test_nothing_is_wider_than_80_columns(request: pytest.FixtureRequest, kind: str) -> None:
    console = request.getfixturevalue(kind)
    long = "A title that goes on and on " * 8
    wide, solid = "千と千尋の神隠し" * 12, "x" * 200
    print_examples((example(solid, long, history=(long, wide, solid)),), console)
    print_rows(
        [type(r)(long, r.metrics, r.intervals, long) for r in rows()],
        [Comparison(long, solid, "HR@10", 0, 0, 0)],
        console,
    )
    print_facts({"users": 3, long: solid}, console)
    assert all(cell_len(Text.from_ansi(line).plain) <= 80 for line in printed(console).splitlines())
    assert "x" * 60 in printed(console)


def test_control_characters_never_reach_the_terminal(terminal: Console, file: Console) -> None:
    bad = "a\x1b[2Jb\x07c\nd\ud800"
    for console in (file, terminal):
        print_examples((example(bad, bad, history=(bad,), recommendations=()),), console)
        print_facts({bad: bad}, console)
        assert "\x1b[2J" not in printed(console) and "\x07" not in printed(console)
        printed(console).encode("utf-8")
    assert "a\N{REPLACEMENT CHARACTER}[2Jb\N{REPLACEMENT CHARACTER}c d\N{REPLACEMENT CHARACTER}" in printed(
        file
    )


def test_facts_are_aligned(file: Console) -> None:
    print_facts({"users": 943, "forced_share": 0.7251, "folder": "data/ml-100k"}, file)
    assert printed(file) == (
        "users                           943\n"
        "forced tokens (no alternative)  72.5 %\n"
        "folder                          data/ml-100k\n"
    )


def test_stdout_is_the_default_and_a_pipe_has_no_colours() -> None:
    code = (
        "from tests.reports.test_terminal import *\n"
        "print_rows(rows(), COMPARISONS); print_examples((example(),)); print_facts({'users': 1})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=None)
    text = done.stdout.decode("utf-8")
    assert "\x1b" not in text and "[Star]" in text and "users" in text
    assert all(cell_len(line) <= 80 for line in text.splitlines())
