"""DLLM2Rec from the teacher's run to its student's: the files between them, and what the student gains."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import triewise
from triewise.app import changed_evaluation, evaluate_run, teach, teaching, train_run
from triewise.cli import main
from triewise.data import load_dataset
from triewise.errors import UserError
from triewise.files import read_json, write_json
from triewise.recipe import Recipe, parse_recipe
from triewise.training import Teacher

N_ITEMS, N_TRAIN, N_TEST = 24, 900, 200
SHAPE = {"width": 16, "blocks": 1, "heads": 1, "dropout": 0.1}
TINY = {"vocabulary": 300, "width": 16, "layers": 1, "heads": 2, "feed_forward": 32}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each item has a favourite that follows with probability .5 in train, always in valid and test; else any item."""
    folder = tmp_path_factory.mktemp("raw") / "office"
    folder.mkdir()
    rng = np.random.default_rng(0)
    favourite = rng.permutation(N_ITEMS)
    titles = {str(i + 1): f"{['Red', 'Blue', 'Green'][i % 3]} thing {i}" for i in range(N_ITEMS)}
    (folder / "id2name4Rec.json").write_text(json.dumps(titles), encoding="utf-8")
    for name, n_rows in (("train", N_TRAIN), ("valid", N_TEST), ("test", N_TEST)):
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["user_id", "item_ids", "timestamp"])
            for row in range(n_rows):
                history = rng.integers(N_ITEMS, size=int(rng.integers(1, 5)))
                noisy = name == "train" and rng.random() < 0.5
                target = rng.integers(N_ITEMS) if noisy else favourite[history[-1]]
                writer.writerow([row, str([int(i) + 1 for i in (*history, target)]), 1000 + row])
    return folder


def recipe(world: Path, name: str, **sections: dict[str, Any]) -> Recipe:
    values: dict[str, Any] = {
        "name": name,
        "data": {"source": f"msl:{world}", "folder": str(world.parent / "prepared"), "max_history": 5},
        "training": {"steps": 150, "batch_size": 64, "learning_rate": 1e-2},
    }
    if "backbone" not in sections:
        values["sequential"] = {"encoder": "sasrec", **SHAPE}
    for section, changes in sections.items():
        values[section] = values.get(section, {}) | changes
    return parse_recipe(values, "test")


def taught(run: Path, out: Path, k: int = 10, **changes: Any) -> dict[str, Any]:
    return teach(run, out, changed_evaluation(run, [f"evaluation.{n}={v}" for n, v in changes.items()]), k)


@pytest.fixture(scope="module")
def teacher(world: Path) -> Path:
    """A sequential model that learned from all rows, and what it says of them."""
    run = world.parent / "teacher"
    train_run(recipe(world, "teacher", sequential={"positions": "newest"}, training={"steps": 250}), run)
    taught(run, world.parent / "taught")
    return world.parent / "taught"


@pytest.fixture(scope="module")
def words(world: Path) -> Path:
    """A language model, a little trained."""
    run = world.parent / "words"
    train_run(recipe(world, "words", backbone={"tiny": TINY}, training={"steps": 5}), run)
    return run


STUDENT = {"loss": "bce", "negatives_outside": "history", "positions": "newest"}
FEW = {"sample": 72, "steps": 120}


def student(
    world: Path, out: Path, teacher: Path | None, training: dict[str, Any] = FEW, **enhance: Any
) -> Path:
    sections: dict[str, dict[str, Any]] = {"sequential": STUDENT, "training": training}
    if teacher is not None:
        sections["enhance"] = {"kind": "dllm2rec", "teacher": str(teacher), **enhance}
    train_run(recipe(world, "student", **sections), out)
    return out


def hit_rate(run: Path) -> float:
    return float(evaluate_run(run).metrics["HR@1"])


# ---------------------------------------------------------------- the student
def test_a_student_of_a_better_teacher_ends_above_itself_without(
    world: Path, teacher: Path, tmp_path: Path
) -> None:
    """Of 24 items it sees 3 rows each, half of them noise; the teacher saw 37 and knows each favourite."""
    alone = hit_rate(student(world, tmp_path / "alone", None))
    rankings = hit_rate(student(world, tmp_path / "rankings", teacher, ed_weight=0.0, gamma_position=1.0))
    both = hit_rate(student(world, tmp_path / "both", teacher, gamma_position=1.0))
    assert hit_rate(world.parent / "teacher") > 0.9
    assert rankings > alone + 0.1
    assert both > alone + 0.1


def test_without_its_weights_it_is_the_plain_model_bit_for_bit(
    world: Path, teacher: Path, tmp_path: Path
) -> None:
    few = FEW | {"steps": 20}
    student(world, tmp_path / "plain", None, few)
    student(world, tmp_path / "zero", teacher, few, lam=0.0, ed_weight=0.0)
    plain, zero = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("plain", "zero"))
    assert plain.keys() == zero.keys()
    assert all(plain[name].equal(zero[name]) for name in plain)
    for name in ("plain", "zero"):
        evaluate_run(tmp_path / name)
    first, second = ((tmp_path / name / "predictions.parquet").read_bytes() for name in ("plain", "zero"))
    assert first == second
    assert set(read_json(tmp_path / "zero" / "run.json")["hashes"]) == {
        "data",
        "sequences",
        "counts",
        "teacher",
    }


def test_it_is_saved_with_the_teachers_vectors_and_pads_and_drops_nothing(
    world: Path, teacher: Path, tmp_path: Path
) -> None:
    """Padding has the vector 0, so W z + c is c there, which must reach no state; dropout is off when it ranks."""
    run = student(world, tmp_path / "run", teacher, {"steps": 3, "evaluate_every": 3}, ed_weight=2.0)
    loaded: Any = triewise.load(run)
    vectors = Teacher.load(teacher).vectors
    assert loaded.model.offset.vectors[1:-1].numpy() == pytest.approx(vectors)
    assert not loaded.model.offset.vectors[[0, -1]].any()
    loaded.save_pretrained(tmp_path / "again")
    again: Any = triewise.load(tmp_path / "again")
    histories = [[0, 1], [2], []]
    wanted = loaded.item_scores(histories)
    assert (again.item_scores(histories) == wanted).all()
    alone = np.concatenate([loaded.item_scores([history]) for history in histories])
    assert alone == pytest.approx(wanted, abs=1e-5)
    with torch.no_grad():
        loaded.model.offset.linear.weight.zero_()
    assert np.abs(loaded.item_scores(histories) - wanted).max() > 1e-3
    loaded.model.train()
    assert (loaded.item_scores(histories) == loaded.item_scores(histories)).all()


def test_the_best_step_is_chosen_on_validation_rows_and_a_resumed_student_ends_alike(
    world: Path, teacher: Path, tmp_path: Path
) -> None:
    training = {"steps": 20, "evaluate_every": 5, "patience": 3, "checkpoint_every": 5}
    whole = student(world, tmp_path / "whole", teacher, training)
    assert read_json(whole / "run.json")["training"]["best_metric"] is not None
    student(world, tmp_path / "parts", teacher, training | {"time_limit_s": 1e-9})
    student_recipe = recipe(
        world,
        "student",
        sequential=STUDENT,
        training=training,
        enhance={"kind": "dllm2rec", "teacher": str(teacher)},
    )
    train_run(student_recipe, tmp_path / "parts", resume=True)
    first, second = (load_file(run / "model" / "model.safetensors") for run in (whole, tmp_path / "parts"))
    assert all(first[name].equal(second[name]) for name in first)


@pytest.mark.parametrize("quirks", [{"negative": "coded"}, {"dros_rows": "crossed"}, {"top": 3}])
def test_every_form_trains(world: Path, teacher: Path, tmp_path: Path, quirks: dict[str, Any]) -> None:
    sections = {
        "sequential": STUDENT | {"dros_alpha": 0.5, "encoder": "gru4rec"},
        "training": {"steps": 3},
        "enhance": {"kind": "dllm2rec", "teacher": str(teacher), **quirks},
    }
    assert train_run(recipe(world, "student", **sections), tmp_path / "run").steps_done == 3


# ---------------------------------------------------------------- the teacher
def test_a_language_model_teaches(words: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """Its distances are nats behind the first, its vectors those of titles; short rankings end in -1."""
    out, dataset = tmp_path / "taught", load_dataset(words.parent / "prepared")
    words_typed = [
        "triewise",
        "teach",
        str(words),
        "--out",
        str(out),
        "-k",
        "30",
        "--search",
        "exact",
        "--json",
    ]
    monkeypatch.setattr("sys.argv", words_typed)
    with pytest.raises(SystemExit, match="0"):
        main()
    assert json.loads(capsys.readouterr().out)["rows"] == N_TRAIN
    found, recommender = Teacher.load(out), triewise.load(words)
    ranking = recommender.recommend(list(dataset.train.history)[:40], N_ITEMS)
    assert found.items.shape == (N_TRAIN, 30)
    assert found.items[:40, :5].tolist() == ranking.items[:, :5].tolist()
    assert (found.items[:, N_ITEMS:] == -1).all()
    assert np.isinf(found.distances[:, N_ITEMS:]).all()
    assert found.distances[:40, :N_ITEMS] == pytest.approx(ranking.scores[:, :1] - ranking.scores, abs=1e-4)
    assert found.vectors.shape == (N_ITEMS, TINY["width"])
    assert found.facts["hashes"].keys() == {"data", "catalogue", "rows", "run"}
    assert found.facts["settings"]["search"] == "exact"


def test_a_killed_teacher_goes_on_to_the_same_files(
    words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teaching, "ROWS_OF_A_PART", 200)
    taught(words, tmp_path / "whole", search="exact")
    asked: list[int] = []
    original = teaching._ranked

    def killed(recommender: Any, history: Any, *rest: Any) -> Any:
        asked.append(len(history))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return original(recommender, history, *rest)

    monkeypatch.setattr(teaching, "_ranked", killed)
    with pytest.raises(KeyboardInterrupt):
        taught(words, tmp_path / "parts", search="exact")
    with pytest.raises(UserError, match="has not ranked all rows; go on with: triewise teach .*words --out"):
        Teacher.load(tmp_path / "parts")
    with pytest.raises(UserError, match="holds a teacher with other k than this one"):
        taught(words, tmp_path / "parts", 5, search="exact")
    taught(words, tmp_path / "parts", search="exact")
    assert asked == [200, 200, 200, 200, 200, 100], "two parts were there already"
    files = sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "parts").iterdir())
    for name in files:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes(), name
    taught(words, tmp_path / "parts", search="exact")
    assert len(asked) == 6, "a whole teacher is left alone"


def test_what_a_student_refuses(world: Path, teacher: Path, tmp_path: Path) -> None:
    def change(**facts: Any) -> Path:
        folder = tmp_path / "changed"
        folder.mkdir(exist_ok=True)
        for file in teacher.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        write_json(folder / "teacher.json", read_json(teacher / "teacher.json") | facts)
        return folder

    hashes = read_json(teacher / "teacher.json")["hashes"]
    for part in ("data", "catalogue", "rows"):
        with pytest.raises(UserError, match=f"the {part} of the teacher .* is not that of .*prepared"):
            student(world, tmp_path / "run", change(hashes=hashes | {part: "0"}))
    with pytest.raises(UserError, match="was trained on the validation rows, by which its student is chosen"):
        student(world, tmp_path / "run", change(trained_on="train+valid"))
    with pytest.raises(UserError, match=r"wanted enhance.top of at most 10, .*; teach with -k 11"):
        student(world, tmp_path / "run", teacher, top=11)
    with pytest.raises(UserError, match="wanted a new folder for the teacher, but .* holds something else"):
        taught(world.parent / "teacher", world)
    enhance = {"enhance": {"kind": "dllm2rec", "teacher": "x"}}
    for sections, problem in (
        ({"backbone": {"name": "tiny"}}, r"\[enhance\] needs a \[sequential\] encoder that reads forwards"),
        (
            {"sequential": {"encoder": "bert4rec", "loss": "cloze"}},
            r"\[enhance\] needs a \[sequential\] encoder",
        ),
        (
            {"training": {"supervision": "every"}},
            "rows of train, one target each; set training.supervision = 'last'",
        ),
        (
            {"training": {"rows": "train+valid"}},
            "rows of train, one target each; set training.rows = 'train'",
        ),
        (
            {"enhance": {"gamma_position": 0, "gamma_confidence": 0, "gamma_consistency": 0}},
            "lam > 0 needs one of",
        ),
        ({"enhance": {"kind": "x"}}, "enhance.kind"),
    ):
        merged = {name: {**enhance.get(name, {}), **sections.get(name, {})} for name in {*enhance, *sections}}
        with pytest.raises(UserError, match=problem):
            recipe(world, "refused", **merged)


def test_a_resumed_student_has_its_teacher(world: Path, words: Path, teacher: Path, tmp_path: Path) -> None:
    """Another teacher in the same folder is noticed."""
    folder = tmp_path / "taught"
    folder.mkdir()
    for file in teacher.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    student(world, tmp_path / "run", folder, {"steps": 4, "time_limit_s": 1e-9})
    for file in folder.iterdir():
        file.unlink()
    taught(words, folder)
    chosen = recipe(
        world,
        "student",
        sequential=STUDENT,
        training={"steps": 4},
        enhance={"kind": "dllm2rec", "teacher": str(folder)},
    )
    with pytest.raises(UserError, match="the teacher changed since"):
        train_run(chosen, tmp_path / "run", resume=True)
