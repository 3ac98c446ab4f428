"""The GPU suite on the CPU with shapes as small as they can be: every part runs to its end and nothing fails."""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path

import pytest
import torch

from triewise.files import read_json

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu import __main__ as suite  # noqa: E402
from benchmarks.gpu.data import Options  # noqa: E402
from benchmarks.gpu.report import Report, stops  # noqa: E402


@pytest.mark.filterwarnings("ignore")  # of third parties, and of the Trainer beside a real one
@pytest.mark.parametrize("part", list(suite.PARTS))
def test_a_part_runs_dry(part: str, tmp_path: Path) -> None:
    report = Report(part, tmp_path / "out", 1000.0, torch.device("cpu"), {"dry_run": True})
    options = Options(None, True, torch.device("cpu"), tmp_path / "scratch")
    importlib.import_module(f"benchmarks.gpu.{part}").run(report, options)
    found = read_json(tmp_path / "out" / f"{part}.json")
    assert found["sections"] and not found["skipped"]
    assert {name: row["error"] for name, row in found["sections"].items() if "error" in row} == {}
    if part == "smoke":
        assert found["agrees"] and not found["disagreements"]
    if part == "methods":
        assert len(found["table"]) == 5


def test_a_section_that_fails_is_recorded_and_the_next_goes_on(tmp_path: Path) -> None:
    report = Report("part", tmp_path, 100.0, torch.device("cpu"), {})

    def fails(row: dict[str, object]) -> None:
        row["before"] = float("nan")
        raise ZeroDivisionError("on purpose")

    assert not report.run("first", fails)
    assert report.run("second", lambda row: row.update(x=1))
    assert not report.run("third", lambda row: None, needs_s=101)
    found = read_json(tmp_path / "part.json")
    assert "ZeroDivisionError: on purpose" in found["sections"]["first"]["error"]
    assert found["sections"]["first"]["before"] == "nan"
    assert found["sections"]["second"]["x"] == 1 and found["skipped"] == ["third"]


def test_waits_are_counted_by_place(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with stops(torch.device("cuda:0")) as places:
        for said in ("called a synchronizing CUDA operation",) * 3 + ("something else",):
            warnings.warn(said, stacklevel=1)
    assert modes == ["warn", "default"]
    [(place, times)] = places.items()
    assert "test_gpu_suite.py:" in place and times == 3
    with stops(torch.device("cpu")) as places:
        pass
    assert places == {} and len(modes) == 2


@pytest.mark.slow
def test_the_command_runs_its_parts_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ["--out", str(tmp_path), "--dry-run", "--minutes", "4", "--parts", "codes", "training"]
    monkeypatch.setattr(sys, "argv", ["gpu", *chosen, "--device", "cpu"])
    assert suite.main() == 0
    said = capsys.readouterr().out
    assert all(f"{part}: " in said for part in ("codes", "training"))
    assert said.count("failed: [], skipped: []") == 2
