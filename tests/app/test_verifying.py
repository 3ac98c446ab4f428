"""What a folder is and whether it is whole; what is seen of exchanged files; what an overwritten run leaves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import triewise
from tests.attack_child import call
from tests.worlds import recommender, write_msl_folder
from triewise.app import evaluate_run, report_runs, teach, train_run, verify
from triewise.app.folders import BEFORE
from triewise.errors import UserError
from triewise.files import read_json, write_json
from triewise.ranking import load_evaluation
from triewise.recipe import Recipe, parse_recipe
from triewise.training import Stop


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    place = tmp_path_factory.mktemp("raw")
    values = {
        "name": "sasrec",
        "data": {
            "source": f"msl:{write_msl_folder(place / 'office')}",
            "folder": str(place / "prepared"),
            "max_history": 6,
        },
        "sequential": {"encoder": "sasrec", "width": 8, "blocks": 1},
        "training": {
            **{"supervision": "every", "steps": 4, "batch_size": 8, "checkpoint_every": 1},
            **{"evaluate_every": 2, "valid_users": 4, "keep_checkpoints": 2},
        },
        "evaluation": {"users": 20},
    }
    return parse_recipe(values, "test")


@pytest.fixture(scope="module")
def run(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    train_run(recipe, folder)
    evaluate_run(folder)
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def test_what_a_folder_is(recipe: Recipe, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = verify(run)
    assert (seen.kind, seen.whole) == ("a run, trained and evaluated", True)
    wanted = "run.json, recipe, log, data, recommender, evaluation, checkpoint-3, checkpoint-4, best weights"
    assert set(wanted.split(", ")) <= set(seen.parts)
    assert recipe.data.folder is not None
    assert (verify(recipe.data.folder).kind, verify(recipe.data.folder).whole) == ("prepared data", True)
    recommender().save_pretrained(tmp_path / "saved")
    assert (verify(tmp_path / "saved").kind, verify(tmp_path / "saved").whole) == ("a recommender", True)
    teach(run, tmp_path / "teacher", recipe.evaluation, k=3)
    assert (verify(tmp_path / "teacher").kind, verify(tmp_path / "teacher").whole) == ("a teacher", True)
    vectors = next((tmp_path / "teacher").glob("*.npy"))
    flip(vectors)
    assert "is not the file that was written" in "".join(verify(tmp_path / "teacher").parts.values())
    (tmp_path / "cache" / "ml-100k").mkdir(parents=True)
    write_json(tmp_path / "cache" / "models" / "smollm2-135m-q4" / "origin.json", {"files": {}}, sealed=True)
    seen = verify(tmp_path / "cache")
    assert (seen.kind, seen.whole) == ("the cache", False)
    assert seen.parts["smollm2-135m-q4"] == ""
    assert "the cached ml-100k in" in seen.parts["ml-100k"]
    with pytest.raises(
        UserError, match="wanted prepared data, a run, a recommender, a teacher, a batch or the cache, but"
    ):
        verify(tmp_path)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model/model.safetensors", "recommender"),
        ("model/config.json", "recommender"),
        ("catalog.parquet", "recommender"),
        ("recommender.json", "recommender"),
        ("recipe.toml", "recipe"),
        ("log.jsonl", "log"),
        ("run.json", "run.json"),
        ("predictions.parquet", "evaluation"),
        ("metrics.json", "evaluation"),
        ("checkpoint-4/optimizer.pt", "checkpoint-4"),
        ("checkpoint-4/rng.pt", "checkpoint-4"),
        ("best/weights.safetensors", "best weights"),
    ],
)
def test_a_flipped_bit_is_seen_on_the_command_line(copy: Path, name: str, part: str) -> None:
    flip(copy / name)
    found = call("verify", str(copy))
    assert found.code == 2 and part in found.out
    found = call("verify", str(copy), "--json")
    told = json.loads(found.out)
    assert found.code == 2 and told["parts"][part] and not told["whole"]


def test_changed_data_and_a_damaged_run_before_are_seen(recipe: Recipe, copy: Path, tmp_path: Path) -> None:
    shutil.copytree(copy, copy / BEFORE)
    flip(copy / BEFORE / "catalog.parquet")
    record = read_json(copy / "run.json")
    record["hashes"]["data"] = "0" * 64
    write_json(copy / "run.json", record, sealed=True)
    parts = verify(copy).parts
    assert "catalog.parquet is not the file that was written" in parts["the run before"]
    assert f"changed since {copy} was trained; prepare the same data or train again" in parts["data"]
    with pytest.raises(UserError, match="changed since .* was trained"):
        report_runs([copy], tmp_path / "report.html")
    with pytest.raises(
        UserError, match="wanted a folder for the teacher, but .* is a file; choose another --out"
    ):
        teach(copy, copy / "run.json", recipe.evaluation)


def test_a_model_of_another_run_is_seen(recipe: Recipe, copy: Path, tmp_path: Path) -> None:
    """Whole in itself, with another recommender.json, but not what run.json tells of."""
    train_run(recipe.model_copy(update={"seed": 1}), tmp_path / "other")
    for name in ("model", "recommender.json"):
        shutil.rmtree(copy / name) if (copy / name).is_dir() else (copy / name).unlink()
        shutil.move(tmp_path / "other" / name, copy / name)
    for use in (triewise.load, evaluate_run, lambda run: report_runs([run], run / "x.html")):
        with pytest.raises(UserError, match=r"recommender.json is not the file that was written"):
            use(copy)


def test_a_resume_writes_a_damaged_model_again(recipe: Recipe, copy: Path) -> None:
    before = (copy / "model" / "model.safetensors").read_bytes()
    flip(copy / "model" / "model.safetensors")
    train_run(recipe, copy, resume=True)
    assert (copy / "model" / "model.safetensors").read_bytes() == before
    assert verify(copy).whole


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.pt", "rng.pt", "state.json"])
def test_a_damaged_checkpoint_is_not_gone_on_with(recipe: Recipe, copy: Path, name: str) -> None:
    flip(copy / "checkpoint-4" / name)
    with pytest.raises(UserError, match=rf"checkpoint-4/{name}"):
        train_run(recipe, copy, resume=True)
    shutil.rmtree(copy / "checkpoint-4")
    train_run(recipe, copy, resume=True)
    assert verify(copy).whole


def test_a_checkpoint_too_many_is_removed(recipe: Recipe, copy: Path) -> None:
    """As a kill between a checkpoint and the rotation leaves it."""
    shutil.copytree(copy / "checkpoint-3", copy / "checkpoint-2")
    train_run(recipe, copy, resume=True)
    assert sorted(path.name for path in copy.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


def test_an_overwritten_run_stays_till_the_new_one_has_ended(
    recipe: Recipe, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, before = recipe.model_copy(update={"seed": 1}), load_evaluation(copy)

    def refuse(*args: Any) -> Any:
        raise UserError("the loss is not finite")

    for _ in range(2):  # what is kept is the run that had ended, not the one that failed
        with monkeypatch.context() as patch:
            patch.setattr("triewise.training.state.TrainingState.save", refuse)
            with pytest.raises(UserError, match="the loss is not finite"):
                train_run(other, copy, overwrite=True)
        assert (load_evaluation(copy / BEFORE).items == before.items).all()
        assert triewise.load(copy / BEFORE).recommend([[0]], k=1).items.shape == (1, 1)
        seen = verify(copy)
        assert (seen.kind, seen.whole) == ("a run, training", True)
        with pytest.raises(UserError, match=r"the training in .* has not ended"):
            evaluate_run(copy)
        with pytest.raises(UserError, match=r"has not ended, so there is no recommender yet; wait for it"):
            triewise.load(copy)
    train_run(other, copy, overwrite=True)
    assert not (copy / BEFORE).exists()
    assert read_json(copy / "run.json")["seed"] == 1
    assert verify(copy).kind == "a run, trained"


def test_a_project_that_was_moved_is_whole(recipe: Recipe, tmp_path: Path) -> None:
    """With its data and the run that was there before, whose old places are gone."""
    data = recipe.data.model_copy(update={"folder": tmp_path / "here" / "data"})
    run, there = tmp_path / "here" / "runs" / "a", tmp_path / "there"
    train_run(recipe.model_copy(update={"data": data}), run)
    shutil.copytree(run, run / BEFORE)
    (tmp_path / "here").rename(there)
    run = there / "runs" / "a"
    assert verify(run).parts["data"] == verify(run).parts["the run before"] == ""
    evaluate_run(run / BEFORE)
    (there / "data").rename(there / "elsewhere")
    assert "bring it there, or prepare it again" in verify(run).parts["data"]


def test_a_sequential_run_has_no_use_for_trust(recipe: Recipe, tmp_path: Path) -> None:
    train_run(recipe, tmp_path / "run", trust_remote_code=True)
    assert verify(tmp_path / "run").whole


@pytest.mark.parametrize("again", [{"overwrite": True}, {"resume": True}, {}])
def test_a_run_that_was_starting_is_started_again(recipe: Recipe, copy: Path, again: dict[str, bool]) -> None:
    record = {"format": 1, "status": "starting"}
    write_json(copy / "run.json", record, sealed=True)
    (copy / "recipe.toml").unlink()
    train_run(recipe, copy, **again)
    assert verify(copy).whole


def test_old_folders_say_once_what_is_not_checked(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("run.json", "recommender.json", "metrics.json"):
        without = {"sha256", "files", "log"}
        write_json(copy / name, {k: v for k, v in read_json(copy / name).items() if k not in without})
    report_runs([copy], copy / "report.html")
    evaluate_run(copy)
    assert capsys.readouterr().err.count("was written before files were hashed") == 1


def test_a_stopped_trial_keeps_nothing_of_before(
    recipe: Recipe, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(model: Any) -> dict[str, float]:
        raise Stop("pruned", {"NDCG@10": 0.1})

    monkeypatch.setattr("triewise.app.runs.validator", lambda *args: stop)
    train_run(recipe, copy, overwrite=True)
    assert verify(copy).kind == "a run, stopped"
    assert not (copy / BEFORE).exists()
