from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.process_child import (
    OBJECTIVES,
    STEPS,
    Launch,
    each_objective,
    free_port,
    go_on,
    killed,
    sharded,
    stop_and_go,
    whole_run,
)
from tests.worlds import write_msl_folder
from triewise.errors import UserError
from triewise.settings import TrainingSettings
from triewise.training import processes
from triewise.training.checkpoints import WEIGHTS, checkpoints, remove

TIMES = ("seconds", "tokens_per_second")
RECIPE = """
name = "two"
[data]
source = "msl:{raw}"
folder = "{prepared}"
[backbone]
name = "tiny"
tiny = {{vocabulary = 300, width = 16, layers = 2, heads = 2, feed_forward = 32}}
[objective]
temperature = "adaptive"
[objective.adaptive]
eta = 0.5
[training]
steps = 60
batch_size = 8
accumulation = 2
learning_rate = 1e-3
checkpoint_every = 10
"""


@pytest.fixture(scope="module")
def launch() -> Launch:
    return Launch()


def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


# --- one process against two ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_and_two(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    torch.set_num_threads(1)
    one = each_objective(tmp_path_factory.mktemp("one"))
    return one, *launch(each_objective, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_processes_have_the_curves_of_one(name: str, one_and_two: tuple[Any, Any, Any]) -> None:
    """Loss, both parts, gradient norm and temperature of every step, from other paddings of the same windows."""
    one, two, _ = (found[name]["log"] for found in one_and_two)
    assert len(one) == len(two) == STEPS
    for ours, theirs in zip(untimed(one), untimed(two), strict=True):
        assert ours.keys() == theirs.keys()
        if name in ("cft", "sdpo"):  # what their passes share depends on the windows of a process
            ours = {key: value for key, value in ours.items() if key != "tokens_per_place"}
        for key in ours:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-7), key


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_and_weights_are_equal_on_both_and_those_of_one(
    name: str, one_and_two: tuple[Any, Any, Any]
) -> None:
    one, first, second = (found[name] for found in one_and_two)
    assert first["tau"] == second["tau"]
    if "ats" in name:
        assert len(set(first["tau"])) == STEPS and min(first["tau"]) > 0.11 and max(first["tau"]) < 4.9
    for step in range(STEPS):
        for key in one["gradients"][step]:
            ours, theirs = first["gradients"][step][key], second["gradients"][step][key]
            assert torch.equal(ours, theirs), (step, key)
    for key, gradient in one["gradients"][0].items():
        torch.testing.assert_close(first["gradients"][0][key], gradient, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(first["weights"][key], second["weights"][key]) for key in one["weights"])
    for key, weight in one["weights"].items():
        torch.testing.assert_close(first["weights"][key], weight, rtol=0, atol=1e-4)


def test_processes_score_the_reference_of_preferences_together(one_and_two: tuple[Any, Any, Any]) -> None:
    one, first, second = (found["sdpo"]["reference"] for found in one_and_two)
    assert (first == second).all()
    assert first == pytest.approx(one, rel=1e-5)
    assert (one < 0).all()


def test_only_the_first_process_writes_the_log(one_and_two: tuple[Any, Any, Any]) -> None:
    logs = [found["lml"]["log"] for found in one_and_two[1:]]
    assert logs[0] == logs[1], "with the times of the first"


# --- stopping and going on --------------------------------------------------------------------------------------------


def close(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """The same rows to 1e-5."""
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for one, other in zip(untimed(ours), untimed(theirs), strict=True):
        assert one.keys() == other.keys()
        for key in one:
            assert one[key] == pytest.approx(other[key], rel=1e-5, abs=1e-7), key


def keep_until(step: int, source: Path, target: Path) -> None:
    """A run folder as a kill behind one of its checkpoints leaves it."""
    shutil.copytree(source, target)
    for later, path in checkpoints(target):
        if later > step:
            remove(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    """The run of one process without dropout."""
    found = whole_run(folder / "alone", dropout=0.0)
    keep_until(4, folder / "alone", folder / "from one")
    return found


@pytest.fixture(scope="module")
def runs(launch: Launch, folder: Path, alone: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What each of two processes finds."""
    first, second = launch(stop_and_go, folder)
    return first, second


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_validation_log_and_best_weights_are_those_of_one_process(
    runs: tuple[dict[str, Any], dict[str, Any]], alone: dict[str, Any]
) -> None:
    for found in (runs[0]["plain"], runs[1]["plain"]):
        assert found["result"] == alone["result"]
        close(found["log"], alone["log"])
        assert same(found["weights"], runs[0]["plain"]["weights"])


def test_a_signal_to_one_process_stops_both_after_the_step_and_a_resume_goes_on(
    runs: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    for found in runs:
        assert found["stopped"]["result"][:2] == (7, "interrupted")
        assert found["resumed"]["result"] == found["whole"]["result"]
        assert same(found["resumed"]["weights"], found["whole"]["weights"]), "dropout included"
        stop = [row for row in untimed(found["resumed"]["log"]) if row["step"] != 7]
        assert [row["step"] for row in stop] == [row["step"] for row in found["whole"]["log"]]
    assert runs[0]["whole"]["log"] == runs[1]["whole"]["log"]
    assert same(runs[0]["whole"]["weights"], runs[1]["whole"]["weights"])


def test_another_number_of_processes_goes_on_with_the_same_data_and_normaliser(
    runs: tuple[dict[str, Any], dict[str, Any]], alone: dict[str, Any], folder: Path
) -> None:
    """Checkpoint 4 lies between two rows of the log: the sums since row 3 are carried over too."""
    close(runs[0]["from one"]["log"], alone["log"])
    keep_until(4, folder / "plain", folder / "from two")
    close(whole_run(folder / "from two", resume=True, dropout=0.0)["log"], alone["log"])


def test_an_error_of_the_first_process_is_told_to_all(runs: tuple[dict[str, Any], dict[str, Any]]) -> None:
    for found in runs:
        assert found["errors"]["validate"] == "refused in process 0"
        assert found["errors"]["metric"].startswith("wanted the metric NDCG@10, validation gives MAP")


def test_weights_that_no_text_reaches_are_waited_for_unless_they_are_frozen(
    runs: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    for found in runs:
        frozen, waited_for = found["tower"]
        assert frozen == "steps"
        assert waited_for.startswith("Expected to have finished reduction in the prior iteration")


def test_a_killed_process_ends_the_others_with_one_line_and_the_run_goes_on(
    launch: Launch, tmp_path: Path, runs: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    launch(killed, tmp_path, killed=1)
    assert [step for step, _ in checkpoints(tmp_path)] == [4]
    for found, whole in zip(launch(go_on, tmp_path), runs, strict=True):
        assert same(found["weights"], whole["whole"]["weights"])
        close(found["log"], whole["whole"]["log"])  # the sums of the log were added up at the checkpoint


@pytest.mark.slow
def test_torchrun_on_the_command_line_a_kill_and_what_is_left(tmp_path: Path) -> None:
    """The first process alone prints and writes; ``kill -9`` of the second ends all, and the rest is resumed."""
    raw = write_msl_folder(tmp_path / "amazon_office")
    recipe = tmp_path / "two.toml"
    recipe.write_text(RECIPE.format(raw=raw.as_posix(), prepared=(tmp_path / "p").as_posix()), "utf-8")

    def start(out: str, *words: str) -> subprocess.Popen[str]:
        launcher = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
        command = [*launcher, "-m", "triewise", "train", str(recipe), "--out", str(tmp_path / out), *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([sys.executable, "-m", *command], text=True, **pipes)

    def last(out: str) -> dict[str, Any]:
        return load_file(tmp_path / out / "checkpoint-60" / WEIGHTS)

    whole = start("whole")
    output, errors = whole.communicate(timeout=120)
    assert whole.returncode == 0, errors
    assert output.count("\n") == 1 and "60 steps in" in output
    assert errors.count("preparing") == 1
    assert json.loads((tmp_path / "whole" / "run.json").read_text("utf-8"))["processes"] == 2

    parted = start("parted")
    while not checkpoints(tmp_path / "parted"):
        assert parted.poll() is None, parted.communicate()
        time.sleep(0.02)
    children = {child.environ().get("RANK"): child for child in psutil.Process(parted.pid).children()}
    children["1"].kill()
    _, errors = parted.communicate(timeout=60)
    assert parted.returncode != 0
    assert "error: cannot reach the other processes: one of them has ended" in errors
    assert 0 < checkpoints(tmp_path / "parted")[-1][0] < 60
    resumed = start("parted", "--resume")
    _, errors = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, errors
    assert same(last("parted"), last("whole"))


# --- FSDP2 ------------------------------------------------------------------------------------------------------------


def test_a_sharded_loss_module_has_the_losses_and_gradients_of_a_whole_one(
    launch: Launch, tmp_path: Path
) -> None:
    one = sharded(tmp_path, shard=False)
    for two in launch(sharded, tmp_path):
        for name in one:
            for ours, theirs in zip(two[name]["steps"], one[name]["steps"], strict=True):
                assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
                assert ours["tau"] == pytest.approx(theirs["tau"], rel=1e-5)
                for key in theirs["gradients"]:
                    found, expected = ours["gradients"][key], theirs["gradients"][key]
                    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
            for key, weight in one[name]["weights"].items():
                torch.testing.assert_close(two[name]["weights"][key], weight, rtol=0, atol=1e-5)


# --- one process alone ------------------------------------------------------------------------------------------------


def test_batches_that_cannot_be_dealt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = TrainingSettings(batch_size=12, accumulation=2)
    for n, rows in ((1, 6), (2, 3), (3, 2), (6, 1)):
        monkeypatch.setattr(processes, "count", lambda n=n: n)
        assert processes.share(settings) == rows
    monkeypatch.setattr(processes, "count", lambda: 4)
    line = (
        r"wanted a batch_size that is a multiple of accumulation \* processes, got 12 and 2 \* 4; change one"
    )
    with pytest.raises(UserError, match=line):
        processes.share(settings)


def test_deepspeed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="wanted DDP or FSDP2, got DeepSpeed; launch with --use_fsdp"):
        processes.start()


def test_a_lost_process_is_one_line_and_other_errors_stay() -> None:
    with pytest.raises(UserError, match="cannot reach the other processes"), processes.together():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:5] Connection closed by peer [127.0.0.1]:1")
    with pytest.raises(RuntimeError, match="out of memory"), processes.together():
        raise RuntimeError("out of memory")
