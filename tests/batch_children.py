"""Workers of a batch that do not do what they should; a module of its own, so that their processes start fast."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from triewise.serving import batch_workers


def dying_once(line: Any, task: Any, n: int) -> None:
    """A worker that is killed while it makes part 2 for the first time."""
    make, mark = batch_workers.make_part, Path(os.environ["TRIEWISE_TEST_KILL"])

    def made(task: Any, recommender: Any, part: int) -> None:
        if part == 2 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        make(task, recommender, part)

    batch_workers.make_part = made
    batch_workers._serve(line, task, n)


def dying(line: Any, task: Any, n: int) -> None:
    """A worker that ends with its first part."""
    if n == 0:
        line.recv()
        os._exit(3)
    time.sleep(60)


def failing(line: Any, task: Any, n: int) -> None:
    """A worker with a fault of ours."""
    line.recv()
    line.send((None, "no luck"))


def mistaken(line: Any, task: Any, n: int) -> None:
    """A worker that meets a user's mistake."""
    line.recv()
    line.send(("a mistake", None))
