"""Progress of long work, always on stderr: a rich bar on a terminal, one line a minute elsewhere.

Of several processes of one run the first one speaks.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator

from triewise.plain import clean

SECONDS_BETWEEN_LINES = 60.0
_bars = True


def note(text: str) -> None:
    """Print one line to stderr; what others wrote in it is cleaned."""
    if is_first_process():
        print(clean(text), file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress(what: str, total: int, unit: str = "") -> Iterator[Callable[..., None]]:
    """Show how far a loop is; yields ``advance(n=1, detail="")``.

    Args:
        what: What is being done, for example ``"ranking msl"``.
        total: Number of units in all.
        unit: Their name, for example ``"users"``.
    """
    if _bars and sys.stderr.isatty() and is_first_process():
        with _bar(clean(what), total, unit) as move:
            yield move
        return
    started = last = time.monotonic()
    done = 0

    def advance(n: int = 1, detail: str = "") -> None:
        nonlocal last, done
        done += n
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES:
            last = now
            left = (now - started) / max(done, 1) * (total - done)
            note(f"{what}: {done}/{total} {unit} {detail}".rstrip() + f", about {left:.0f} s left")

    note(f"{what}: {total} {unit}".rstrip())
    yield advance
    note(f"{what}: {done}/{total} {unit}".rstrip() + f" in {time.monotonic() - started:.0f} s")


def in_lines() -> None:
    """Lines on a terminal too, from now on: for processes that work side by side."""
    global _bars
    _bars = False


def is_first_process() -> bool:
    """Whether this is the first of the processes that `torchrun` started, or the only one."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def _bar(what: str, total: int, unit: str) -> Iterator[Callable[..., None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
    )
    with Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[detail]}"),
                  console=Console(stderr=True)) as bar:  # fmt: skip
        task = bar.add_task(what, total=total, detail="")
        yield lambda n=1, detail="": bar.update(task, advance=n, detail=detail)
