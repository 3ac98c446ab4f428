"""One writer a folder, and what is left of killed ones."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from triewise.errors import UserError
from triewise.files import atomic_folder, short
from triewise.locks import LOCK, one_writer, strangers

TOLD = r"another triewise process \(pid {pid}\) writes in .*; wait for it, or choose another --out"


def hold(folder: str, beside: bool, pipe: Any) -> None:
    with one_writer(Path(folder), beside=beside):
        pipe.send(os.getpid())
        pipe.recv()


class Holder:
    """Another process that holds the lock of a folder."""

    def __init__(self, folder: Path, beside: bool = False) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=hold, args=(str(folder), beside, theirs))
        self.process.start()
        self.pid = self.pipe.recv()

    def end(self, how: signal.Signals | None = None) -> None:
        """Let it go on to its end, or kill it."""
        if how is None:
            self.pipe.send(None)
        else:
            os.kill(self.pid, how)
        self.process.join()


@pytest.mark.parametrize("beside", [False, True])
def test_a_second_writer_is_told_who_is_there(tmp_path: Path, beside: bool) -> None:
    folder = tmp_path / "new" / "run"
    other = Holder(folder, beside)
    for _ in range(2):
        with pytest.raises(UserError, match=TOLD.format(pid=other.pid)), one_writer(folder, beside=beside):
            pass
    other.end()
    with one_writer(folder, beside=beside), one_writer(folder, beside=beside):
        assert not strangers(folder)
    assert not (tmp_path / "new").exists(), "it was made for the lock, and nothing was written"


@pytest.mark.skipif(sys.platform == "win32", reason="there is no kill -9")
def test_a_killed_writer_holds_nothing_and_its_leftovers_go(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("x", encoding="utf-8")
    other = Holder(tmp_path)
    (tmp_path / f".tmp-{other.pid}-a.json").write_text("half", encoding="utf-8")
    (tmp_path / ".tmp-model.old").mkdir()
    (tmp_path / ".tmp-model.old" / "w").write_text("old", encoding="utf-8")
    other.end(signal.SIGKILL)
    assert (tmp_path / LOCK).exists()
    assert strangers(tmp_path) == ["kept"]
    with one_writer(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK, "kept", "model"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "model"]


def test_the_longest_name_has_room_for_its_lock_and_its_leftovers(tmp_path: Path) -> None:
    folder = tmp_path / ("d" * 255)
    for text in ("old", "new"):
        with one_writer(folder, beside=True), atomic_folder(folder) as temporary:
            (temporary / "file").write_text(text, encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    folder.rename(tmp_path / f".tmp-{short(folder.name)}.old")
    (tmp_path / f".tmp-12-{short(folder.name)}").mkdir()
    with one_writer(folder, beside=True):
        assert (folder / "file").read_text(encoding="utf-8") == "new", "a kill between two renames"
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_a_lock_file_without_its_process_is_no_obstacle(tmp_path: Path) -> None:
    """As after a crash of the machine: the file is there, with the number of a process that may be another one now."""
    (tmp_path / LOCK).write_text(str(os.getppid()), encoding="ascii")
    with one_writer(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="signals are others there")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_who_waits_can_be_stopped_and_leaves_the_lock_alone(tmp_path: Path, how: signal.Signals) -> None:
    other = Holder(tmp_path)
    waiting = multiprocessing.get_context("spawn").Process(target=wait_for, args=(str(tmp_path),))
    waiting.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "waits").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    os.kill(waiting.pid or 0, how)
    waiting.join(30)
    assert waiting.exitcode == (3 if how == signal.SIGINT else -how)
    with pytest.raises(UserError, match=TOLD.format(pid=other.pid)), one_writer(tmp_path):
        pass
    other.end()
    with one_writer(tmp_path):
        pass


def wait_for(folder: str) -> None:
    (Path(folder) / "waits").touch()
    try:
        with one_writer(Path(folder), wait=True):
            raise AssertionError("another one holds it")
    except KeyboardInterrupt:
        sys.exit(3)


def test_beside_a_folder_only_its_own_leftovers_go(tmp_path: Path) -> None:
    for name in (".tmp-12-data", ".tmp-12-other-data", ".tmp-data2"):
        (tmp_path / name).mkdir()
    with one_writer(tmp_path / "data", beside=True):
        assert sorted(p.name for p in tmp_path.iterdir()) == [
            ".data.lock",
            ".tmp-12-other-data",
            ".tmp-data2",
        ]


def test_of_several_processes_of_a_run_the_first_one_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Holder(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with one_writer(tmp_path):
        pass
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="another triewise process"), one_writer(tmp_path):
        pass
    other.end()


def test_a_forked_process_does_not_hold_it_on(tmp_path: Path) -> None:
    """Workers may outlive a killed training for seconds."""
    if not hasattr(os, "register_at_fork"):
        pytest.skip("there is no fork")
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    parent = context.Process(target=fork_and_hold, args=(str(tmp_path), theirs))
    parent.start()
    pipe.recv()
    parent.kill()
    parent.join()
    with one_writer(tmp_path):
        pipe.send("the forked process may end")


def fork_and_hold(folder: str, pipe: Any) -> None:
    with one_writer(Path(folder)):
        if os.fork() == 0:
            pipe.send("forked")
            pipe.recv()
            os._exit(0)
        signal.pause()


def test_a_folder_that_may_not_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with (
        pytest.raises(UserError, match=r"cannot write .*: .*; choose another folder"),
        one_writer(tmp_path / "file"),
    ):
        pass
