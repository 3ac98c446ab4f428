"""How are the families of language models decoded, packed and adapted, and is any of them silently wrong?

    python -m benchmarks.families [--only NAME ...] [--dtype float32 bfloat16] [--jobs N] [--write docs/models.md]

Tiny random models of `tests/model_families.py` go through the questions of `tests/family_checks.py`; nothing is
downloaded. The tables go to stdout, with --write into that file between its two marks, and the last line of stdout is
one JSON object: how many cells there are and which are faults. A fault has the code that `KNOWN_FAULTS` gives it, or
says that it is new; what is known and was not found is listed as well. About two seconds a family and dtype.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from tests.family_checks import (  # noqa: E402
    CASES,
    COLUMNS,
    DTYPES,
    Cell,
    check,
    check_case,
    check_refused,
    dataset,
)
from tests.model_families import FAMILIES, KNOWN_FAULTS, REFUSED, family  # noqa: E402

from benchmarks._command import parsed  # noqa: E402

BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"
ANY, CASE = "any", "case"  # in the place of a dtype: models that are to be refused, and one thing each
OUTCOME = "outcome"

Task = tuple[str, str]  # family and dtype
Found = dict[str, Cell]


def main() -> None:
    """Check, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=[*FAMILIES, *REFUSED, *CASES], metavar="NAME")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--write", type=Path, help="file whose tables are replaced")
    options = parsed(parser, only=["llama", "bert"], dtype=["float32"])
    if options.write and (options.only or set(options.dtype) != set(DTYPES)):
        parser.error("--write wants all families and dtypes; leave out --only and --dtype")
    started = time.monotonic()
    names = options.only or [*FAMILIES, *REFUSED, *CASES]
    tasks = [(n, d) for d in options.dtype for n in names if n in FAMILIES]
    tasks += [(n, ANY) for n in names if n in REFUSED]
    tasks += [(n, CASE) for n in names if n in CASES]
    found: dict[Task, Found] = {}
    for task, cells in zip(tasks, answers(tasks, options.jobs), strict=True):
        found[task] = cells
        faults = [f"{column} {cell}" for column, cell in cells.items() if cell.fault]
        print(
            f"{len(found)}/{len(tasks)} {' '.join(task)}: {'; '.join(faults) or 'ok'}",
            file=sys.stderr,
            flush=True,
        )
    text = "\n".join(lines(found))
    print(text)
    if options.write:
        replace_part(options.write, text)
    print(json.dumps(summary(found) | {"seconds": round(time.monotonic() - started)}))


def answers(tasks: Sequence[Task], jobs: int) -> Iterator[Found]:
    """The cells of each task, in order."""
    if jobs == 1:
        yield from map(answer, tasks)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(answer, tasks)


def answer(task: Task) -> Found:
    """The cells of a family in a dtype."""
    import torch

    torch.set_num_threads(1)
    name, dtype = task
    with tempfile.TemporaryDirectory() as scratch:
        if dtype == CASE:
            return {OUTCOME: check_case(name, Path(scratch, "work"))}
        data = dataset(Path(scratch, "data"))
        if dtype == ANY:
            return {OUTCOME: check_refused(name, data, Path(scratch, "work"))}
        return check(name, dtype, data, Path(scratch, "work"))


def lines(found: dict[Task, Found]) -> Iterator[str]:
    """The tables as Markdown, with the versions they are of."""
    yield versions()
    reasons: dict[str, int] = {}
    for dtype in DTYPES:
        tasks = [task for task in found if task[1] == dtype]
        if not tasks:
            continue
        yield f"\n### {dtype}\n"
        yield from row(["family", "kind", *COLUMNS])
        yield from row(["---"] * (2 + len(COLUMNS)))
        for task in tasks:
            cells = [shown(task, column, cell, reasons) for column, cell in found[task].items()]
            yield from row([f"`{task[0]}`", family(task[0]).kind, *cells])
    if reasons:
        yield "\nReasons:\n"
        yield from (f"{number}. {reason}" for reason, number in reasons.items())
    for kind, heading in ((ANY, "Models that must be refused"), (CASE, "One thing each")):
        tasks = [task for task in found if task[1] == kind]
        if tasks:
            yield f"\n### {heading}\n"
            yield from row(["what", "what happens"])
            yield from row(["---"] * 2)
        for task in tasks:
            what = f"`{task[0]}`: {family(task[0]).kind}" if kind == ANY else task[0]
            yield from row([what, shown(task, OUTCOME, found[task][OUTCOME], {})])


def row(cells: Iterable[str]) -> Iterator[str]:
    """One line of a table."""
    yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def shown(task: Task, column: str, cell: Cell, reasons: dict[str, int]) -> str:
    """A cell as the table has it: its fault with the code, and its reason as a number."""
    if not cell.fault:
        number = f" [{reasons.setdefault(general(cell.reason), len(reasons) + 1)}]" if cell.reason else ""
        return " ".join(part for part in (cell.text + number, cell.numbers) if part)
    code = KNOWN_FAULTS.get((*task, column), "new")
    return " ".join(part for part in (f"**{cell.fault}** {code}:", cell.text, cell.numbers) if part)


def general(reason: str) -> str:
    """A reason without the numbers of one model."""
    return re.sub(r"\d+(\.\d+)?(e[+-]?\d+)?", "N", reason)


def versions() -> str:
    """What the tables were made with."""
    import peft
    import torch
    import transformers

    packages = ", ".join(f"{m.__name__} {m.__version__}" for m in (torch, transformers, peft))
    return f"Made with {packages}, Python {platform.python_version()}, on a CPU with one thread."


def summary(found: dict[Task, Found]) -> dict[str, object]:
    """Numbers of cells and the faults among them, known, new, and known but not found."""
    faults = {
        (*task, column) for task, cells in found.items() for column, cell in cells.items() if cell.fault
    }
    asked = {(*task, column) for task, cells in found.items() for column in cells}
    names = lambda keys: sorted(" ".join(key) for key in keys)  # noqa: E731
    return {
        "families": len({task[0] for task in found}),
        "cells": len(asked),
        "known": len(faults & set(KNOWN_FAULTS)),
        "new": names(faults - set(KNOWN_FAULTS)),
        "gone": names(set(KNOWN_FAULTS) & asked - faults),
    }


def replace_part(file: Path, text: str) -> None:
    """Put the tables between the two marks of a file."""
    before, begin, rest = file.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        sys.exit(f"wanted the marks {BEGIN} and {END} in {file}")
    file.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
