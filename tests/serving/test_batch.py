"""Batches: the same bytes whoever makes them, whatever is killed; every row told."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import polars as pl
import pytest
import torch

from tests import batch_children, worlds
from triewise import load
from triewise.app import verify
from triewise.cli import main
from triewise.errors import UserError
from triewise.files import file_names, read_json, sha256_file
from triewise.serving import answer, batch_workers, recommend_file
from triewise.serving.batch import _job
from triewise.serving.batch_input import Source, cut, read_part
from triewise.serving.batch_parts import Task, make_part
from triewise.serving.batch_workers import RayWorker, _device_of, made_parts

HISTORIES = [list(worlds.TITLES[i : i + n]) for i in range(9) for n in (0, 1, 3)]
USERS = [(f"u{n}", titles) for n, titles in enumerate(HISTORIES)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "saved"
    worlds.recommender(template="msl").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def users(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("users") / "users.parquet"
    pl.DataFrame(
        {"user_id": [user for user, _ in USERS], "titles": [titles for _, titles in USERS]}
    ).write_parquet(file, row_group_size=5)
    return file


@pytest.fixture(scope="module")
def whole(run: Path, users: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Hashes of the parts that one process makes without interruption."""
    out = tmp_path_factory.mktemp("whole") / "out"
    recommend_file(run, users, out, 4, rows=4, workers=1)
    return parts(out)


def parts(out: Path) -> dict[str, str]:
    return {name: sha256_file(out / name) for name in file_names(out) if name.startswith("part-")}


def test_every_user_gets_what_recommend_gives(run: Path, users: Path, tmp_path: Path) -> None:
    done = recommend_file(run, users, tmp_path / "out", 4, rows=10, workers=1)
    assert (done["users"], done["rows"], done["column"]) == (27, 27, "titles")
    assert done["bad_rows"] == {"count": 0, "named": []}
    assert sorted(file_names(tmp_path / "out")) == [
        "job.json",
        "manifest.json",
        "part-000000.parquet",
        "part-000001.parquet",
        "part-000002.parquet",
    ]
    assert done["sha256"] == parts(tmp_path / "out")
    assert read_json(tmp_path / "out" / "manifest.json") == done
    rows = pl.concat([pl.read_parquet(tmp_path / "out" / name) for name in done["sha256"]])
    assert rows.columns == ["user_id", "items", "titles", "scores", "certified"]
    assert rows["user_id"].to_list() == [user for user, _ in USERS]
    recommender = load(run)
    for row, (_, titles) in zip(rows.iter_rows(named=True), USERS, strict=True):
        wanted = answer(recommender, [titles], 4).of_each[0]
        assert row["items"] == [r.item_id for r in wanted.recommendations]
        assert row["titles"] == [r.title for r in wanted.recommendations]
        assert row["scores"] == pytest.approx([r.score for r in wanted.recommendations], abs=1e-4)
        assert row["certified"] == wanted.certified
    with pytest.raises(UserError, match="holds a batch already; go on with --resume"):
        recommend_file(run, users, tmp_path / "out", 4, rows=10, workers=1)
    assert recommend_file(run, users, tmp_path / "out", 4, rows=10, workers=1, resume=True) == done
    assert (verify(tmp_path / "out").kind, verify(tmp_path / "out").whole) == ("a batch", True)
    (tmp_path / "out" / "part-000001.parquet").write_bytes(b"damaged")
    wrong = [name for name, text in verify(tmp_path / "out").parts.items() if text]
    assert wrong == ["manifest.json", "part-000001.parquet"]
    with pytest.raises(UserError, match="is not the file that was written .* remove it and .*manifest.json"):
        recommend_file(run, users, tmp_path / "out", 4, rows=10, workers=1, resume=True)
    for name in ("part-000001.parquet", "manifest.json"):
        (tmp_path / "out" / name).unlink()
    seen = verify(tmp_path / "out")
    assert (list(seen.parts), seen.whole) == (
        ["job.json", "part-000000.parquet", "part-000002.parquet"],
        True,
    )
    again = recommend_file(run, users, tmp_path / "out", 4, rows=10, workers=1, resume=True)
    assert again["sha256"] == done["sha256"]


def test_neither_the_order_nor_threads_change_a_byte(
    run: Path, users: Path, whole: Any, tmp_path: Path
) -> None:
    """The parts of an `msl` model share an instruction, which an engine keeps from call to call."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for order in ([6, 5, 4, 3, 2, 1, 0], [3, 0, 6, 1, 5, 2, 4]):
            out = tmp_path / "".join(map(str, order))
            out.mkdir()
            task = task_of(run, users, out)
            assert list(made_parts(task, order, "local", 1)) == order
            assert parts(out) == whole
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def task_of(run: Path, users: Path, out: Path) -> Task:
    """What `recommend_file` hands to its engine for the batch of `whole`."""
    job = _job(run, users, 4, None, k=4, search=None, keep_history=False)
    digest = hashlib.sha256(json.dumps(job).encode()).hexdigest()
    return Task(run, out, cut(users, 4), 4, None, False, None, False, digest)


def test_processes_give_the_same_bytes_and_a_killed_one_loses_nothing(
    run: Path, users: Path, whole: Any, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv("TRIEWISE_TEST_KILL", str(tmp_path / "killed"))
    monkeypatch.setattr("triewise.serving.batch_workers._serve", batch_children.dying_once)
    done = recommend_file(run, users, tmp_path / "out", 4, rows=4, workers=2)
    assert done["sha256"] == whole
    assert (tmp_path / "killed").is_file()
    assert "a worker ended with status -9; its part" in capsys.readouterr().err


def test_a_part_that_kills_its_workers_is_told(
    run: Path, users: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr("triewise.serving.batch_workers._serve", batch_children.dying)
    with pytest.raises(
        UserError, match="part 0 has ended 3 workers .the last with status 3.: is there enough"
    ):
        recommend_file(run, users, tmp_path / "out", 4, rows=20, workers=2)
    monkeypatch.setattr("triewise.serving.batch_workers._serve", batch_children.failing)
    with pytest.raises(RuntimeError, match="in a worker of the batch:\nno luck"):
        recommend_file(run, users, tmp_path / "out", 4, rows=20, workers=2, resume=True)
    monkeypatch.setattr("triewise.serving.batch_workers._serve", batch_children.mistaken)
    with pytest.raises(UserError, match="a mistake"):
        recommend_file(run, users, tmp_path / "out", 4, rows=20, workers=2, resume=True)


def test_what_a_process_was_killed_at_is_gone_on_with(
    run: Path, users: Path, whole: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "triewise", "batch", str(run), "--input", str(users), "--out", str(out)]
    command += ["-k", "4", "--rows", "4", "--workers", "1", "--resume"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until = time.monotonic() + 300
    while len(parts(out)) < 2 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    process.kill()
    process.communicate()
    there = parts(out)
    assert there.items() <= whole.items()
    before = {name: (out / name).stat().st_mtime_ns for name in there}
    (out / ".tmp-1-part-000009.parquet").write_bytes(b"half")
    done = recommend_file(run, users, out, 4, rows=4, workers=1, resume=True)
    assert done["sha256"] == whole
    assert {name: (out / name).stat().st_mtime_ns for name in there} == before  # not made again
    assert {path.name for path in out.iterdir()} == {*whole, "job.json", "manifest.json"}


def test_a_batch_of_something_else_is_not_gone_on_with(run: Path, users: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    recommend_file(run, users, out, 4, rows=20, workers=1)
    for changed, what in (
        ({"k": 5}, "k .4, now 5"),
        ({"rows": 5}, "rows_of_a_part"),
        ({"search": "beam"}, "search"),
    ):
        how: dict[str, Any] = {"k": 4, "rows": 20, "workers": 1, "resume": True} | changed
        with pytest.raises(UserError, match=f"holds a batch with another {what}"):
            recommend_file(run, users, out, **how)
    other = tmp_path / "other.parquet"
    pl.read_parquet(users).reverse().write_parquet(other)
    with pytest.raises(UserError, match="holds a batch with another input"):
        recommend_file(run, other, out, 4, rows=20, workers=1, resume=True)
    other_out = tmp_path / "other"
    recommend_file(run, other, other_out, 4, rows=20, workers=1)
    for name in ("manifest.json", "job.json"):
        (out / name).unlink()
    with pytest.raises(UserError, match="wanted a new folder for the batch, but .* holds something else"):
        recommend_file(run, users, out, 4, rows=20, workers=1)
    recommend_file(run, users, tmp_path / "third", 4, rows=20, workers=1)
    (tmp_path / "third" / "part-000001.parquet").write_bytes((other_out / "part-000001.parquet").read_bytes())
    task = replace(task_of(run, users, tmp_path / "third"), job="x")
    with pytest.raises(UserError, match="is of another batch than this one"):
        task.facts(1)
    file = tmp_path / "third" / "part-000000.parquet"
    said = pl.read_parquet_metadata(file)["triewise"]
    pl.read_parquet(file).reverse().write_parquet(file, metadata={"triewise": said})
    sound = task_of(run, users, tmp_path / "third")
    sound = replace(sound, job=json.loads(said)["job"])
    assert sound.facts(0) is not None
    with pytest.raises(UserError, match="its rows are others than were written"):
        sound.facts(0, look=True)
    (tmp_path / "third" / "part-000001.parquet").write_bytes(b"damaged")
    with pytest.raises(UserError, match="part-000001.parquet is damaged"):
        task.facts(1)


LINES = [
    b'{"user_id": 7, "ids": ["raw-0", "raw-3"]}',
    b'{"user_id": "a", "ids": []}',
    b"{broken",
    b"",
    b"[1]",
    b'{"user_id": null, "ids": []}',
    b'{"user_id": "b", "titles": ["Alien (1979)"]}',
    b'{"user_id": "c", "ids": ["raw-1", null]}',
    b'{"user_id": "d", "ids": "raw-1"}',
    b'{"user_id": "\xff", "ids": []}',
    b'{"user_id": "e", "ids": ["raw-1", "gone", "raw-8"], "more": 1}\r',
    b'{"user_id": true, "ids": []}',
    b'{"user_id": "\\ud83c\\udfac", "ids": []}',
    b'{"user_id": "\\ud83c", "ids": []}',
    b'{"user_id": "f", "ids": ["\\uDC00"]}',
    b'{"user_id": ["\\ud83c"], "ids": []}',
]


@pytest.mark.parametrize("end", [b"", b"\n"])
@pytest.mark.parametrize("rows", [1, 5, 100])
def test_bad_rows_are_told(run: Path, tmp_path: Path, end: bytes, rows: int) -> None:
    file = tmp_path / "users.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + b"\n".join(LINES) + end)
    done = recommend_file(run, file, tmp_path / "out", 3, rows=rows, workers=1)
    assert (done["rows"], done["users"], done["column"]) == (16, 4, "ids")
    told = {one["row"]: one["problem"] for one in done["bad_rows"]["named"]}
    assert done["bad_rows"]["count"] == len(told) == 12
    assert told[2].startswith("no JSON: ")
    assert told[3].startswith("no JSON: ")
    assert told[4] == "[1] is no object"
    assert told[5] == "user_id is null, neither text nor a whole number"
    assert told[6] == "ids is null, no list"
    assert told[7] == "ids holds null, which is no id"
    assert told[8] == 'ids is "raw-1", no list'
    assert "utf-8" in told[9]
    assert told[11].startswith("user_id is true")
    assert all("surrogates not allowed" in told[row] for row in (13, 14, 15))
    assert done["unknown"] == {"count": 1, "named": ["gone"]}
    made = pl.concat([pl.read_parquet(tmp_path / "out" / name) for name in done["sha256"]])
    assert made["user_id"].to_list() == ["7", "a", "e", "\U0001f3ac"]
    assert not set(made["items"][0]) & {"raw-0", "raw-3", "raw-4"}


def test_parquet_rows_and_small_buffers(run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    file = tmp_path / "users.parquet"
    frame = pl.DataFrame({"user_id": [1, None, 3], "ids": [["raw-1"], ["raw-2"], None]})
    frame.write_parquet(file)
    done = recommend_file(run, file, tmp_path / "out", 3, workers=1)
    assert [one["row"] for one in done["bad_rows"]["named"]] == [1, 2]
    monkeypatch.setattr("triewise.serving.batch_input.CHUNK", 7)
    lines = tmp_path / "users.jsonl"
    for n in range(1, 12):
        lines.write_bytes(b'{"user_id": 1, "ids": []}\n' * n)
        for rows in (1, 2, 3, 20):
            source = cut(lines, rows)
            read = [len(read_part(source, part).user_id) for part in range(source.n_parts)]
            assert (sum(read), source.n_rows, max(read)) == (n, n, min(rows, n))


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("none.parquet", None, "wanted a file of users, but .* is none"),
        ("users.csv", b"x", "wanted users in a file that ends in .parquet or .jsonl"),
        ("users.parquet", b"x", "users.parquet is damaged"),
        ("users.jsonl", b"", "wanted user_id and one of titles, ids in .*, got nothing"),
        ("users.jsonl", b'{"user_id": 1}\n', "wanted user_id and one of titles, ids in .*, got user_id"),
        ("users.jsonl", b'{"user_id": 1, "ids": [], "titles": []}', "wanted user_id and one of titles, ids"),
        ("empty.parquet", None, "wanted at least one user in .*, got none"),
    ],
)
def test_a_file_that_has_no_users(run: Path, tmp_path: Path, name: str, content: Any, line: str) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    elif name == "empty.parquet":
        pl.DataFrame(
            {"user_id": [], "ids": []}, schema={"user_id": pl.Int64, "ids": pl.List(pl.String)}
        ).write_parquet(file)
    with pytest.raises(UserError, match=line):
        recommend_file(run, file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_settings_that_cannot_be(run: Path, users: Path, tmp_path: Path, monkeypatch: Any) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="has no recommender.json; train one"):
        recommend_file(tmp_path, users, out)
    with pytest.raises(UserError, match="wanted k of at least 1, got 0"):
        recommend_file(run, users, out, 0)
    with pytest.raises(UserError, match="wanted an engine among local, ray, got 'spark'"):
        recommend_file(run, users, out, engine="spark")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"engine 'ray' needs Ray: pip install 'triewise\[ray\]'"):
        recommend_file(run, users, out, engine="ray", resume=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear", encoding="utf-8")
    with pytest.raises(UserError, match="holds something else"):
        recommend_file(run, users, tmp_path / "mine")


def test_the_command(run: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    file, allow = tmp_path / "users.jsonl", tmp_path / "allow.txt"
    file.write_bytes(b"\n".join(LINES))
    allow.write_text("raw-0\nraw-2\nraw-8\n", encoding="utf-8")
    command = ["triewise", "batch", str(run), "--input", str(file), "--out", str(tmp_path / "out")]
    command += ["--workers", "1", "--allow", str(allow), "--keep-history", "--search", "beam"]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit, match="0"):
        main()
    told = capsys.readouterr()
    assert told.out == f"{tmp_path / 'out'}: 4 users in 1 parts\n"
    assert "12 rows are no users: row 2: no JSON" in told.err
    assert "1 unknown ids, such as 'gone', were left out" in told.err
    made = pl.read_parquet(tmp_path / "out" / "part-000000.parquet")
    assert [sorted(row) for row in made["items"].to_list()] == [["raw-0", "raw-2", "raw-8"]] * 4
    monkeypatch.setattr("sys.argv", [*command, "--resume", "--json"])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert json.loads(capsys.readouterr().out)["users"] == 4


def test_what_may_be_returned_is_read_once(
    run: Path, users: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow, read = tmp_path / "allow.txt", []
    allow.write_text("raw-0\nraw-2\n", encoding="utf-8")
    from triewise.data import allowed_items

    monkeypatch.setattr("triewise.data.allowed_items", lambda *of: read.append(of) or allowed_items(*of))
    done = recommend_file(run, users, tmp_path / "out", 2, rows=10, workers=1, allow=allow)
    assert len(done["sha256"]) == 3 and len(read) == 1


def test_an_interrupt_can_be_gone_on_with(
    run: Path, users: Path, whole: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    def interrupted(task: Any, recommender: Any, part: int) -> None:
        if part == 3:
            raise KeyboardInterrupt
        make_part(task, recommender, part)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("triewise.serving.batch_workers.make_part", interrupted)
        recommend_file(run, users, tmp_path / "out", 4, rows=4, workers=1)
    assert len(parts(tmp_path / "out")) == 3
    done = recommend_file(run, users, tmp_path / "out", 4, rows=4, workers=1, resume=True)
    assert done["sha256"] == whole


def test_a_full_disk_is_told(run: Path, users: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with (
        monkeypatch.context() as patched,
        pytest.raises(UserError, match="no space left; free some and go on"),
    ):
        patched.setattr(Path, "write_bytes", full)
        recommend_file(run, users, tmp_path / "out", 4, rows=4, workers=1)
    assert file_names(tmp_path / "out") == ["job.json"]


def test_workers_take_turns_on_the_devices() -> None:
    assert [_device_of(n, None) for n in range(3)] == ["0", "1", "2"]
    assert [_device_of(n, "4,7") for n in range(3)] == ["4", "7", "4"]


@pytest.mark.parametrize(("devices", "taken"), [(0, [0, 1, 2, 3, 4]), (2, [0, 1, 0, 1, 0])])
def test_more_workers_than_devices_take_turns(devices: int, taken: list[int], monkeypatch: Any) -> None:
    context = MagicMock()
    context.Pipe.side_effect = lambda: (MagicMock(), MagicMock())
    monkeypatch.setattr(batch_workers.multiprocessing, "get_context", lambda kind: context)
    monkeypatch.setattr(batch_workers, "n_devices", lambda: devices)
    for n in range(5):
        batch_workers._hired(MagicMock(), n)
    assert [call.kwargs["args"][2] for call in context.Process.call_args_list] == taken


def test_what_an_actor_says_is_told(run: Path, users: Path, tmp_path: Path, monkeypatch: Any) -> None:
    fake = MagicMock()
    fake.exceptions.RayTaskError = RayTaskError
    rows = fake.data.from_items.return_value.map_batches.return_value.iter_rows
    rows.return_value = iter([{"part": 0}])
    monkeypatch.setitem(sys.modules, "ray", fake)
    assert list(made_parts(task_of(run, users, tmp_path), [0], "ray", 2)) == [0]
    for cause, kind in ((UserError("no space left"), UserError), (KeyError("x"), RayTaskError)):
        rows.side_effect = RayTaskError(cause)
        with pytest.raises(kind):
            list(made_parts(task_of(run, users, tmp_path), [0], "ray", 2))
    actor = RayWorker(task_of(run, users, tmp_path))
    assert actor({"part": np.array([0, 6])})["part"].tolist() == [0, 6]
    assert list(parts(tmp_path)) == ["part-000000.parquet", "part-000006.parquet"]


class RayTaskError(Exception):
    """What Ray wraps an actor's error in."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


@pytest.fixture(scope="module")
def ray() -> Any:
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield ray
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_ray_gives_the_same_bytes_and_a_killed_actor_loses_nothing(
    ray: Any, run: Path, users: Path, whole: Any, tmp_path: Path
) -> None:
    assert recommend_file(run, users, tmp_path / "a", 4, rows=4, engine="ray", workers=2)["sha256"] == whole
    mark = tmp_path / "killed"
    task = task_of(run, users, tmp_path / "b")
    (tmp_path / "b").mkdir()
    object.__setattr__(task, "source", KillingSource(**vars(task.source), mark=mark))
    assert sorted(made_parts(task, range(7), "ray", 2)) == list(range(7))
    assert mark.is_file()
    assert parts(tmp_path / "b") == whole


@dataclass(frozen=True)
class KillingSource(Source):
    """Users whose part 2 kills the process that is about to read it, once."""

    mark: Path = Path()

    @property
    def by(self) -> Any:
        if not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().by
