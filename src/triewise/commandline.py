"""What every command needs: its options, how a result is printed, how a mistake is told.

Results go to stdout, progress to stderr; a user's mistake is one line and exit status 2.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from triewise.errors import UserError
from triewise.plain import clean, json_line
from triewise.progress import is_first_process, note

app = typer.Typer(
    name="triewise",
    help="Recommend by writing the next item's title along the catalogue's prefix tree.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


INTERRUPTED = 130
# The base of every usage error, wherever this version of typer keeps it.
USAGE_ERROR: Any = typer.BadParameter.__mro__[1]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
Changes = Annotated[
    list[str] | None, typer.Option("--set", help="Change one key: --set training.steps=100 (repeatable).")
]
Run = Annotated[Path, typer.Argument(help="A run folder.")]
Search = Annotated[
    str | None, typer.Option(help="beam, exact, catalogue or grounding; default as the run's recipe says.")
]
RecipeName = Annotated[
    str, typer.Argument(help="A recipe file, or the name of one that comes with triewise.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")]
KeepHistory = Annotated[bool, typer.Option("--keep-history", help="Titles of a history may be returned.")]
Allow = Annotated[
    Path | None,
    typer.Option("--allow", help="Text file of raw item ids, one a line: only these are returned."),
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Execute code that comes with the language model.")
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Start anew; the run that is there stays in OUT/before till the new one ends."
    ),
]


def main() -> None:
    """Entry point: user errors are one line on stderr and exit status 2, an interrupt is 130."""
    # Else Python looks through all of torch for cycles before it ends: a second and more.
    atexit.register(gc.freeze)
    for stream in (sys.stdout, sys.stderr):
        # A Windows console in a legacy code page would stop at the first odd title.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        _check_words(sys.argv)
        status = app(sys.argv[1:] or ["--help"], standalone_mode=False)
        if (
            status == INTERRUPTED
        ):  # as typer says that Ctrl-C was pressed, or a command that a training was stopped
            raise KeyboardInterrupt
    except UserError as error:
        _complain(str(error))
    except USAGE_ERROR as error:
        _complain(f"{error.format_message()} (triewise COMMAND --help lists the options)")
    except OSError as error:
        _complain(f"{error.strerror or error}: {error.filename or 'no file named'}")
    except (KeyboardInterrupt, typer.Abort) as stop:
        if isinstance(stop.__cause__, EOFError):  # typer takes it for the end of what is typed in
            raise stop.__cause__ from None
        note("interrupted")
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("polars", "safetensors", "safetensors_rust"):
            raise
        _complain(f"a file cannot be read ({error}); restore it or make it again")
    raise SystemExit(status or 0)


def _check_words(words: list[str]) -> None:
    """Refuse what cannot be written into the files of a run, which are UTF-8."""
    for word in words:
        if re.search("[\ud800-\udfff]", word):
            raise UserError(
                f"wanted UTF-8 on the command line, got {word!r}; rename that file or correct the word"
            )


def _complain(message: str) -> NoReturn:
    """Print one line and end with the exit status of a user's mistake."""
    who = "error" if is_first_process() else f"error in process {os.environ.get('RANK')}"
    print(f"{who}: {clean(' '.join(message.split()))}", file=sys.stderr)
    raise SystemExit(2) from None


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """Imports make much that stays and no garbage; looking for some meanwhile takes half a second."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def console() -> Any:
    """A terminal on stdout."""
    from rich.console import Console

    return Console()


def say(text: object, err: bool = False) -> None:
    """Print one line, in which what others wrote is cleaned."""
    typer.echo(clean(text), err=err)


def print_json(value: Any) -> None:
    """Print one JSON object on stdout."""
    print(json_line(value))
