"""Sequential models as recipes: run folders, reports beside language models, and what a recipe may not ask."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import triewise
from tests.worlds import write_msl_folder
from triewise.app import evaluate_run, report_runs, train_run
from triewise.cli import main
from triewise.errors import UserError
from triewise.files import read_json, write_json
from triewise.recipe import Recipe, dump_recipe, load_recipe, parse_recipe
from triewise.recommenders import SequentialRecommender


@pytest.fixture(scope="module")
def cycle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_msl_folder(tmp_path_factory.mktemp("raw") / "office")


def recipe(cycle: Path, name: str = "sasrec", **sections: dict[str, Any]) -> Recipe:
    """Everybody walks round a cycle of 12 titles."""
    values: dict[str, Any] = {
        "name": name,
        "title": name,
        "data": {"source": f"msl:{cycle}", "folder": str(cycle.parent / "prepared"), "max_history": 6},
        "sequential": {"encoder": "sasrec", "width": 16, "blocks": 1, "dropout": 0.1},
        "training": {"supervision": "every", "steps": 120, "batch_size": 32, "learning_rate": 1e-2},
    }
    for section, changes in sections.items():
        values[section] = values.get(section, {}) | changes
    return parse_recipe(values, "test")


@pytest.fixture(scope="module")
def run(cycle: Path) -> Path:
    folder = cycle.parent / "sasrec"
    train_run(recipe(cycle, training={"evaluate_every": 60}), folder)
    evaluate_run(folder)
    return folder


def test_a_run_folder_has_what_it_promises(run: Path) -> None:
    names = ["recipe.toml", "run.json", "model", "catalog.parquet", "log.jsonl", "recommender.json"]
    assert not [n for n in [*names, "metrics.json", "predictions.parquet"] if not (run / n).exists()]
    facts, metrics = read_json(run / "run.json"), read_json(run / "metrics.json")
    assert facts["status"] == "trained"
    assert set(facts["hashes"]) == {"data", "sequences", "counts"}
    assert facts["training"]["best_step"] in (60, 120)
    assert metrics["HR@1"] >= 0.9, "the best possible is 1"
    assert (metrics["search"], metrics["support"]) == ("catalogue", "items")
    card = (run / "README.md").read_text(encoding="utf-8")
    assert "A sequential recommender" in card
    assert "language model" not in card
    assert "log-probabilities" not in card


def test_it_is_loaded_and_asked_like_any_other(run: Path, capsys: Any, monkeypatch: Any) -> None:
    recommender = triewise.load(run)
    assert isinstance(recommender, SequentialRecommender)
    red = recommender.catalog.index("Red")
    assert recommender.catalog.title[recommender.recommend([[red]], k=1).items[0, 0]] == "Red Dawn"
    monkeypatch.setattr("sys.argv", ["triewise", "recommend", str(run), "--history", "Red", "-k", "2"])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert "Red Dawn" in capsys.readouterr().out.splitlines()[0]


def test_a_run_of_the_package_under_its_former_name_is_evaluated(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    record = read_json(run / "run.json")
    record["versions"]["trierec"] = record["versions"].pop("triewise")
    write_json(tmp_path / "run" / "run.json", record)
    assert (evaluate_run(tmp_path / "run").rank == evaluate_run(run).rank).all()
    assert "made with trierec" in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")


def test_a_report_beside_a_language_model(run: Path, cycle: Path, tmp_path: Path) -> None:
    report = report_runs([run], tmp_path / "alone.html")
    assert [row.name for row in report.rows] == ["sasrec", "item-kNN", "most popular"]
    tiny = {"vocabulary": 300, "width": 16, "layers": 1, "heads": 2, "feed_forward": 32}
    values = recipe(cycle, "msl", training={"steps": 2}).model_dump(mode="json", exclude_none=True)
    values.pop("sequential")
    train_run(parse_recipe(values | {"backbone": {"tiny": tiny}}, "test"), tmp_path / "msl")
    evaluate_run(tmp_path / "msl")
    both = report_runs([run, tmp_path / "msl"], tmp_path / "both.html")
    assert [row.name for row in both.rows][:2] == ["sasrec", "msl"]
    assert both.facts, "what is said of titles is that of the model that writes them"


def test_the_same_recipe_gives_the_same_bytes_and_resumes(cycle: Path, tmp_path: Path) -> None:
    chosen = recipe(cycle, training={"steps": 10})
    for name in ("a", "b"):
        train_run(chosen, tmp_path / name)
        evaluate_run(tmp_path / name)
    first, second = ((tmp_path / name / "predictions.parquet").read_bytes() for name in ("a", "b"))
    assert first == second
    limited = recipe(cycle, training={"steps": 10, "time_limit_s": 1e-9})
    assert train_run(limited, tmp_path / "c").steps_done == 1
    assert train_run(chosen, tmp_path / "c", resume=True).steps_done == 10
    evaluate_run(tmp_path / "c")
    assert (tmp_path / "c" / "predictions.parquet").read_bytes() == first


def test_a_recipe_survives_being_written(cycle: Path, tmp_path: Path) -> None:
    chosen = recipe(cycle, sequential={"loss": "bce", "dros_alpha": 0.5})
    (tmp_path / "recipe.toml").write_text(dump_recipe(chosen), encoding="utf-8")
    assert load_recipe(tmp_path / "recipe.toml") == chosen


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"backbone": {"name": "tiny"}}, r"\[sequential\] has no use for backbone; leave it out"),
        ({"objective": {"support": "trie"}}, r"\[sequential\] has no use for objective"),
        ({"evaluation": {"search": "exact"}}, r"\[sequential\] has no use for evaluation.search"),
        ({"training": {"log_parts": True}}, r"\[sequential\] has no use for training.log_parts"),
        ({"sequential": {"half_life_days": 9}}, "half_life_days needs training.supervision = 'last'"),
        ({"sequential": {"encoder": "bert4rec"}}, "sequential: loss = 'cloze' and encoder = 'bert4rec' need"),
        ({"sequential": {"heads": 3}}, "sequential: width must be a multiple of heads, got 16 and 3"),
        ({"sequential": {"widht": 3}}, "unknown key 'sequential.widht'; did you mean 'sequential.width'"),
    ],
)
def test_what_a_recipe_may_not_ask(cycle: Path, sections: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        recipe(cycle, **sections)


def test_older_rows_weigh_less(cycle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("triewise.app.assemble.Sequences.from_windows", _spy(seen))
    half = recipe(cycle, training={"steps": 1, "supervision": "last"}, sequential={"half_life_days": 1e-3})
    train_run(half, tmp_path / "half")
    age = (1000 + 199) - np.arange(1000, 1200)
    assert seen[0] == pytest.approx(0.5 ** (age / 86.4))


def _spy(seen: list[Any]) -> Any:
    from triewise.training import Sequences

    make = Sequences.from_windows

    def spy(windows: Any, weight: Any = None) -> Any:
        seen.append(weight)
        return make(windows, weight)

    return spy


def test_weights_by_age_need_times(cycle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    import triewise.app.runs

    def without_times(chosen: Recipe) -> Any:
        data = opened(chosen)
        return replace(data, train=replace(data.train, timestamp=np.full(data.train.n_rows, -1)))

    opened = triewise.app.runs.open_data
    monkeypatch.setattr("triewise.app.runs.open_data", without_times)
    half = recipe(cycle, training={"supervision": "last"}, sequential={"half_life_days": 3})
    with pytest.raises(UserError, match="half_life_days needs the time of every training row"):
        train_run(half, tmp_path / "run")


def test_rows_that_were_learned_from_are_no_test(run: Path, cycle: Path, tmp_path: Path) -> None:
    both = tmp_path / "both"
    train_run(recipe(cycle, training={"rows": "train+valid", "steps": 2}), both)
    with pytest.raises(UserError, match="was trained on the validation rows; evaluate it with --split test"):
        evaluate_run(both, recipe(cycle, evaluation={"split": "valid"}).evaluation)
    evaluate_run(both)
    report_runs([run, both], tmp_path / "report.html")
    assert "trained on train+valid" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_heads_matter_to_encoders_with_heads(cycle: Path) -> None:
    sizes = {"width": 15, "heads": 2}
    recipe(cycle, sequential={"encoder": "gru4rec", **sizes})
    with pytest.raises(UserError, match="width must be a multiple of heads, got 15 and 2"):
        recipe(cycle, sequential={"encoder": "sasrec", **sizes})
