"""A six-item catalogue drawn as a tree, where real data is, and a record of the errors that tests provoke."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from triewise.errors import UserError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

# root ─ 1 ─ 2 ─ 0            item 0
#      │   ├ 3 ─ 0            items 1 and 4 (equal titles)
#      │   └ 3 ─ 5 ─ 0        item 2
#      ├ 4 ─ 4 ─ 0            item 3: forced after its first token
#      └ 0                    item 5: an empty title, only the terminator
SIX = [[1, 2, 0], [1, 3, 0], [1, 3, 5, 0], [4, 4, 0], [1, 3, 0], [0]]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small matrices: threads cost more than they give, and one thread makes sums repeatable."""
    import torch

    torch.set_num_threads(1)


def shared(name: str) -> Path:
    """A folder of real data, or a skip that says why."""
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"real data set {name} is not beside the project (wanted {folder})")
    return folder


@dataclass
class Run:
    """What this run of the tests has seen.

    Attributes:
        raised: For each (module, line) that made a UserError, what it said.
        files: Test files with a test that runs, or that was left out as slow.
        is_part: Tests were left out that are not slow.
    """

    raised: dict[tuple[str, int], set[str]] = field(default_factory=lambda: defaultdict(set))
    files: set[Path] = field(default_factory=set)
    is_part: bool = False

    def is_whole(self, session: pytest.Session) -> bool:
        """Whether every test of every file, slow ones apart, has run and none failed."""
        config = session.config
        chosen = self.is_part or any("::" in argument for argument in config.args)
        return (
            not chosen
            and not hasattr(config, "workerinput")  # pytest-xdist: this process runs a share of the tests
            and not session.testsfailed
            and self.files == set(Path(__file__).parent.rglob("test_*.py"))
        )


RUN = pytest.StashKey[Run]()
LAST = "test_every_error_is_provoked_by_a_test"


def pytest_configure(config: pytest.Config) -> None:
    """Record every UserError of the session with the line that made it."""
    run = config.stash[RUN] = Run()

    def record(error: UserError, *args: Any) -> None:
        maker = sys._getframe(1)
        run.raised[maker.f_globals.get("__name__", ""), maker.f_lineno].add(str(args[0]) if args else "")
        ValueError.__init__(error, *args)

    plain = UserError.__init__
    UserError.__init__ = record  # type: ignore[method-assign]
    config.add_cleanup(lambda: setattr(UserError, "__init__", plain))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the test that reads the record at the end."""
    items.sort(key=lambda item: item.name == LAST)
    config.stash[RUN].files |= {item.path for item in items}


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    """Slow tests may be left out of a whole run, others not."""
    for item in items:
        run = item.config.stash[RUN]
        run.files.add(item.path)
        run.is_part |= item.get_closest_marker("slow") is None


# ---------------------------------------------------------------- several processes: pytest -n 2
@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Take up what a worker of pytest-xdist has seen."""
    run, seen = node.config.stash[RUN], getattr(node, "workeroutput", {}).get("run")
    if seen is None:
        return
    for module, line, said in seen["raised"]:
        run.raised[module, line] |= set(said)
    run.files |= {Path(file) for file in seen["files"]}
    run.is_part |= seen["is_part"]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker tells what it has seen; the process above them asks what the last test would ask."""
    config, run = session.config, session.config.stash[RUN]
    if hasattr(config, "workerinput"):
        raised = [
            (module, line, [text.encode("utf-8", "replace").decode() for text in said])
            for (module, line), said in run.raised.items()
        ]
        files = sorted(map(str, run.files))
        config.workeroutput["run"] = {"raised": raised, "files": files, "is_part": run.is_part}
    elif getattr(config.option, "numprocesses", None) and run.is_whole(session):
        from tests.test_errors import unprovoked

        if silent := unprovoked(run.raised):
            config.get_terminal_writer().line(
                "\nFAILED errors that no test provokes; write a test for each:\n"
                + "\n".join(map(str, silent))
            )
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
