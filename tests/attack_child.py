"""Calls of the command line in this process or in forked ones, which may be killed before their n-th file change."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers.models.qwen2.modeling_qwen2
import transformers.trainer  # noqa: F401

import triewise.app.runs
import triewise.cli
import triewise.reports.report

CHANGES = ("replace", "rename", "unlink", "remove", "mkdir", "rmdir", "link", "fsync")
SECONDS = 120.0  # a command that takes longer hangs
HANGS, KILLED = "hangs", -signal.SIGKILL


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        code: Exit status; ``KILLED`` where it was killed.
        out: What it printed.
        err: And on stderr.
        trace: The traceback it ended with; empty for none.
        changes: File changes that it made.
    """

    code: int
    out: str = ""
    err: str = ""
    trace: str = ""
    changes: int = 0

    @property
    def told(self) -> bool:
        """Whether it ended with a user's mistake: status 2 and one line."""
        lines = [line for line in self.err.splitlines() if line.startswith("error")]
        return self.code == 2 and len(lines) == 1 and self.err.rstrip().endswith(lines[0])


def call(*words: str) -> Outcome:
    """A command of ``triewise`` in this process."""
    out, err = io.StringIO(), io.StringIO()
    code, trace, before = 0, "", sys.argv
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            sys.argv = ["triewise", *words]
            triewise.cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        code, trace = 1, traceback.format_exc()
    finally:
        sys.argv = before
    return Outcome(code, out.getvalue(), err.getvalue(), trace)


class Children:
    """Forked processes that have imported everything; what they call is the command line."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["tests.attack_child"])
        multiprocessing.forkserver.ensure_running()  # here, where this module can be imported

    def start(
        self, *words: str, kill_at: int = 0, limit: int = 0, delay: float = 0.0
    ) -> Callable[[], Outcome]:
        """Start a command; what is given back waits for it.

        Args:
            words: Of the command.
            kill_at: The file change before which it is killed; 0: it is not.
            limit: Bytes that a file may have, as on a full disk; 0: any number.
            delay: Seconds to wait before.
        """
        ours, theirs = self.context.Pipe(duplex=False)
        child = self.context.Process(target=_run, args=(theirs, words, kill_at, limit, delay, os.getcwd()))
        child.start()
        theirs.close()

        def wait() -> Outcome:
            found = Outcome(KILLED)
            if ours.poll(SECONDS):
                with contextlib.suppress(EOFError):
                    found = ours.recv()
            else:
                child.kill()
                found = Outcome(1, trace=HANGS)
            child.join()
            return found

        return wait


def _run(pipe: Any, words: tuple[str, ...], kill_at: int, limit: int, delay: float, place: str) -> None:
    os.chdir(place)
    torch.set_num_threads(1)
    time.sleep(delay)
    if limit:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    counted = _count_changes(kill_at)
    found = call(*words)
    pipe.send(Outcome(found.code, found.out, found.err, found.trace, counted()))


def _count_changes(kill_at: int) -> Callable[[], int]:
    """Count what changes files in this process, and kill it before one of these changes."""
    n, here = 0, str(Path.cwd())

    def counting(original: Callable[..., Any], of_a_path: bool) -> Callable[..., Any]:
        def change(*args: Any, **options: Any) -> Any:
            nonlocal n
            if not of_a_path or options.get("dir_fd") is not None or _is_in(args[0], here):
                n += 1
                if n == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **options)

        return change

    for name in CHANGES:
        setattr(os, name, counting(getattr(os, name), name != "fsync"))
    return lambda: n


def _is_in(path: Any, folder: str) -> bool:
    return isinstance(path, str | os.PathLike) and os.path.abspath(path).startswith(folder)
