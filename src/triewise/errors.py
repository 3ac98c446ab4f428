"""The one exception that stands for a user's mistake."""

from __future__ import annotations


class UserError(ValueError):
    """Something the caller can put right; the message is one line.

    The line says what was wanted, what came, and what to do. The command line prints it without a traceback
    and exits with status 2; from Python it is an ordinary ``ValueError``.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
