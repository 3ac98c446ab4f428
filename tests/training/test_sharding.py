from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.process_child import Launch, free_port, whole_run
from tests.sharding_child import CASES, FEW, SHARDED, each_case, go_on, killed, larger, stop_and_go
from tests.train_child import small_model
from tests.training.test_processes import RECIPE, close, keep_until, same
from tests.worlds import write_msl_folder
from triewise.app import evaluate_run
from triewise.errors import UserError
from triewise.files import TEMPORARY
from triewise.training import processes
from triewise.training.checkpoints import SHARDS, WEIGHTS, checkpoints, remove
from triewise.training.sharding import shardable_twin


@pytest.fixture(scope="module")
def launch() -> Launch:
    return Launch(**SHARDED)


# --- one process against two that share the weights -------------------------------------------------------------------


Runs = Callable[[tuple[str, ...]], tuple[Any, Any, Any]]
SLOW = tuple(name for name in CASES if name not in FEW)


@pytest.fixture(scope="module")
def one_and_two(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """What some cases give in one process and in each of two."""

    @functools.cache
    def run(names: tuple[str, ...]) -> tuple[Any, Any, Any]:
        torch.set_num_threads(1)
        one = each_case(names, tmp_path_factory.mktemp("one"))
        first, second = launch(functools.partial(each_case, names), tmp_path_factory.mktemp("two"))
        return one, first, second

    return run


@pytest.mark.parametrize("name", [*FEW, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_each_process_trains_a_half_and_the_gradients_are_those_of_one(name: str, one_and_two: Runs) -> None:
    one, *two = (found[name] for found in one_and_two(FEW if name in FEW else SLOW))
    assert one["share"] == [1.0] * 3
    loose = 2e-2 if "bfloat16" in name else 1e-5
    assert sum(found["share"][0] for found in two) == pytest.approx(1)
    for found in two:
        assert found["share"] == pytest.approx([0.5] * 3, abs=0.05)
        assert found["tau"] == pytest.approx(one["tau"], rel=loose)
        assert found["gradients"][0].keys() == one["gradients"][0].keys() == found["gradients"][2].keys()
        for key, gradient in one["gradients"][0].items():
            off = (found["gradients"][0][key] - gradient).norm()
            assert off <= loose * gradient.norm() + 1e-9, (key, off / gradient.norm())
        for key, weight in one["weights"].items():
            if not key.endswith(
                "c_attn.bias"
            ):  # that of the keys has no gradient but rounding, which Adam enlarges
                torch.testing.assert_close(found["weights"][key], weight, rtol=0, atol=loose)
        for ours, theirs in zip(found["log"], one["log"], strict=True):
            assert ours.keys() == theirs.keys()
            for key in ours.keys() - {"seconds", "tokens_per_second", "tokens_per_place"}:
                assert ours[key] == pytest.approx(theirs[key], rel=max(loose, 1e-5), abs=1e-6), key


# --- stopping and going on --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def runs(launch: Launch, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What each of two processes finds."""
    first, second = launch(stop_and_go, folder)
    return first, second


def test_validation_best_weights_and_log_are_those_of_one_process(
    runs: tuple[dict[str, Any], dict[str, Any]], folder: Path
) -> None:
    torch.set_num_threads(1)
    alone = whole_run(folder / "alone", dropout=0.0)
    for found in (runs[0]["plain"], runs[1]["plain"]):
        assert found["result"] == alone["result"]
        close(found["log"], alone["log"])
        assert same(found["weights"], runs[0]["plain"]["weights"])
    best = load_file(folder / "plain" / "best" / WEIGHTS)
    assert best.keys() == load_file(folder / "alone" / "best" / WEIGHTS).keys()
    assert all(torch.equal(runs[1]["plain"]["weights"][key], best[key]) for key in best)


def test_a_checkpoint_is_a_file_of_each_process_and_a_resumed_run_is_exact(
    runs: tuple[dict[str, Any], dict[str, Any]], folder: Path
) -> None:
    for found in runs:
        assert found["stopped"]["result"][:2] == (7, "interrupted")
        assert found["resumed"]["result"] == found["whole"]["result"]
        assert same(found["resumed"]["weights"], found["whole"]["weights"]), "dropout included"
        assert same(found["ended"]["weights"], found["whole"]["weights"]), "no step is left to take"
    assert [step for step, _ in checkpoints(folder / "stopped")] == [4, 7, 8, 12]
    files = {path.name for path in (folder / "stopped" / "checkpoint-7" / SHARDS).iterdir()}
    assert files == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    assert not list(folder.glob(f"[!f]*/{TEMPORARY}*"))
    assert not checkpoints(folder / "nan"), "a weight of the second process was none"
    assert [step for step, _ in checkpoints(folder / "full")] == [4], (
        "a full disk is one line in both processes"
    )


def test_a_process_killed_while_it_writes_leaves_the_checkpoint_before(
    launch: Launch, tmp_path: Path, runs: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    launch(killed, tmp_path, killed=1)
    assert [step for step, _ in checkpoints(tmp_path)] == [4]
    assert list(tmp_path.glob(f"{TEMPORARY}checkpoint-8*"))
    for found, whole in zip(launch(go_on, tmp_path), runs, strict=True):
        assert same(found["weights"], whole["whole"]["weights"])
    assert not list(tmp_path.glob(f"{TEMPORARY}*"))


@pytest.mark.slow
def test_another_number_of_processes_goes_on(launch: Launch, tmp_path: Path) -> None:
    whole = launch(larger, tmp_path / "a")
    keep_until(8, tmp_path / "a", tmp_path / "b")
    for found in launch(larger, tmp_path / "b", count=4):
        close(found["log"], whole[0]["log"])
        for key, weight in whole[0]["weights"].items():
            torch.testing.assert_close(found["weights"][key], weight, rtol=0, atol=1e-5)


def test_whole_weights_and_shards_do_not_go_on_from_each_other(
    runs: tuple[dict[str, Any], dict[str, Any]], folder: Path
) -> None:
    line = r"wanted to resume .*checkpoint-4 with FSDP, as it was written, got a launch without it; change it"
    keep_until(4, folder / "plain", folder / "spread")
    with pytest.raises(UserError, match=line):
        whole_run(folder / "spread", resume=True, dropout=0.0)


# --- one process alone ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("VERSION", None, r"wanted FSDP_VERSION = 2, got 1; add --fsdp_version 2"),
        ("OFFLOAD_PARAMS", "True", r"wanted FSDP_OFFLOAD_PARAMS = false, got true; launch without"),
        ("ACTIVATION_CHECKPOINTING", "true", r"got true; set training.gradient_checkpointing = true instead"),
    ],
)
def test_what_of_the_launchers_fsdp_is_refused(
    name: str, value: str | None, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, given in SHARDED.items():
        monkeypatch.setenv(key, given)
    monkeypatch.delenv(f"FSDP_{name}", raising=False)
    if value is not None:
        monkeypatch.setenv(f"FSDP_{name}", value)
    with pytest.raises(UserError, match=line):
        processes.start()


def test_one_process_has_nothing_to_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_launched_with_fsdp", False)
    for key, given in SHARDED.items():
        monkeypatch.setenv(key, given)
    processes.start()
    assert "ACCELERATE_USE_FSDP" not in os.environ, "transformers and accelerate see none of it"
    assert not processes.sharded()


def test_a_quantised_backbone_is_refused() -> None:
    model = small_model()
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(20, 8, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UserError, match="wanted floating-point weights under FSDP, got a quantised backbone"):
        shardable_twin(model)


# --- on the command line ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_accelerate_launch_a_resume_and_an_evaluation_that_knows_nothing_of_it(tmp_path: Path) -> None:
    raw = write_msl_folder(tmp_path / "amazon_office")
    recipe, out = tmp_path / "two.toml", tmp_path / "out"
    text = RECIPE.format(raw=raw.as_posix(), prepared=(tmp_path / "p").as_posix())
    recipe.write_text(text + "evaluate_every = 20\n", "utf-8")
    launcher = ["accelerate.commands.launch", "--num_processes", "2", "--main_process_port", str(free_port())]
    launcher += ["--use_fsdp", "--fsdp_version", "2"]
    for words in ([], ["--resume"]):
        command = [*launcher, "-m", "triewise", "train", str(recipe), "--out", str(out), *words]
        done = subprocess.run([sys.executable, "-m", *command], text=True, capture_output=True, timeout=200)
        assert done.returncode == 0, done.stderr
        assert "60 steps in" in done.stdout
        for step, path in checkpoints(out):
            if step > 40 and not words:
                remove(path)
    record = json.loads((out / "run.json").read_text("utf-8"))
    assert (record["processes"], record["sharding"]) == (2, "FSDP2")
    assert evaluate_run(out).metrics["HR@10"] >= 0
