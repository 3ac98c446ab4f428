"""The one exception that stands for a user's mistake, and the kind of it that a search for settings goes on after."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path


class UserError(ValueError):
    """Something the caller can put right; the message is one line.

    The line says what was wanted, what came, and what to do. The command line prints it without a traceback
    and exits with status 2; from Python it is an ordinary ``ValueError``.
    """


class Diverged(UserError):
    """A loss or weights that are not finite: what is tuned was too large, and another value may do."""


@contextlib.contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """A block that reads a file or a folder and makes something of it: whatever goes wrong there is about that file.

    Nothing else stands in such a block, or a fault of ours would be taken for a damaged file. What the system refuses
    stays as it is: it names the file and the reason.

    Raises:
        UserError: The file is damaged.
    """
    try:
        yield
    except BaseException as error:
        refused = isinstance(error, OSError) and error.filename is not None
        # Faults in Rust code are no Exception; that of a device has its own remedies.
        is_fault = isinstance(error, Exception) or type(error).__name__ == "PanicException"
        if (
            refused
            or not is_fault
            or isinstance(error, UserError)
            or type(error).__name__ == "OutOfMemoryError"
        ):
            raise
        raise UserError(f"{path} is damaged ({_fault(error)}); restore it or make it again") from error


def _fault(error: BaseException) -> str:
    """What went wrong in a file: place and problem where pydantic found it, else the kind of error and its words."""
    if hasattr(error, "errors"):
        problem = error.errors()[0]
        return f"{'.'.join(map(str, problem['loc'])) or 'all of it'}: {problem['msg']}"
    return f"{type(error).__name__}: {first_line(error)}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, with the next where it ends in a colon; its type where it has none."""
    first, *rest = [line.strip() for line in str(error).splitlines() if line.strip()] or [
        type(error).__name__
    ]
    return f"{first} {rest[0]}" if rest and first.endswith(":") else first
