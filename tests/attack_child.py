"""Calls of the command line in this process or in forked ones, which may be killed before their n-th file change."""

from __future__ import annotations

import contextlib
import gc
import io
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers.models.qwen2.modeling_qwen2
import transformers.models.qwen2.tokenization_qwen2
import transformers.trainer  # noqa: F401

import triewise.app.compare
import triewise.app.runs
import triewise.cli
import triewise.reports.report
import triewise.reports.terminal

CHANGES = ("replace", "rename", "unlink", "remove", "mkdir", "rmdir", "link", "fsync")
SECONDS = 120.0  # a command that takes longer hangs
HELD = 20.0  # one that is stopped goes on by itself, so that none waits for it for ever
HANGS, KILLED = "hangs", -signal.SIGKILL
gc.freeze()  # each training collects garbage: half of its time, if it looks through all that is imported


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

    def start(self, *words: str, kill_at: int = 0, stop_at: int = 0, limit: int = 0) -> Running:
        """Start a command.

        Args:
            words: Of the command.
            kill_at: The file change before which it is killed; 0: it is not.
            stop_at: The file change before which it waits for `Running.go`; 0: it does not.
            limit: Bytes that a file may have, as on a full disk; 0: any number.
        """
        ours, theirs = self.context.Pipe()
        child = self.context.Process(target=_run, args=(theirs, words, kill_at, stop_at, limit, os.getcwd()))
        child.start()
        theirs.close()
        return Running(child, ours)


@dataclass(frozen=True)
class Running:
    """A command in a process of its own, and the pipe to it."""

    child: Any
    pipe: Any

    def reach(self) -> None:
        """Wait until it stops."""
        assert self.pipe.poll(SECONDS)
        assert self.pipe.recv() is None, "it ended before that change"

    def go(self) -> None:
        """Let it go on."""
        with contextlib.suppress(OSError):
            self.pipe.send(None)

    def wait(self) -> Outcome:
        """How it ended."""
        found = Outcome(KILLED)
        if self.pipe.poll(SECONDS):
            with contextlib.suppress(EOFError):
                found = self.pipe.recv()
        else:
            self.child.kill()
            found = Outcome(1, trace=HANGS)
        self.child.join()
        return found


def _run(pipe: Any, words: tuple[str, ...], kill_at: int, stop_at: int, limit: int, place: str) -> None:
    os.chdir(place)
    torch.set_num_threads(1)
    if limit:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    def stop() -> None:
        pipe.send(None)
        pipe.poll(HELD)

    counted = _count_changes({kill_at: lambda: os.kill(os.getpid(), signal.SIGKILL), stop_at: stop})
    found = call(*words)
    pipe.send(Outcome(found.code, found.out, found.err, found.trace, counted()))


def _count_changes(before: dict[int, Callable[[], None]]) -> Callable[[], int]:
    """Count what changes files in this process, and do something before the n-th of these changes."""
    n, here = 0, str(Path.cwd())

    def counting(original: Callable[..., Any], of_a_path: bool) -> Callable[..., Any]:
        def change(*args: Any, **options: Any) -> Any:
            nonlocal n
            if not of_a_path or options.get("dir_fd") is not None or _is_in(args[0], here):
                n += 1
                if n in before:
                    before[n]()
            return original(*args, **options)

        return change

    for name in CHANGES:
        setattr(os, name, counting(getattr(os, name), name != "fsync"))
    return lambda: n


def _is_in(path: Any, folder: str) -> bool:
    return isinstance(path, str | os.PathLike) and os.path.abspath(path).startswith(folder)
