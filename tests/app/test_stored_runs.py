"""Run folders written before the package was renamed are loaded, and rank as they did."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from triewise import load, load_dataset, load_recipe
from triewise.app import changed_evaluation, evaluate_run, report_runs
from triewise.cli import main
from triewise.files import read_json
from triewise.ranking import load_evaluation

STORED = Path(__file__).parent / "stored_runs"
RUNS = ("generative", "adapter", "sequential")
TOLERANCE = 1e-5


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy as the working folder, in which the relative folders of the runs hold."""
    shutil.copytree(STORED, tmp_path / "stored")
    monkeypatch.chdir(tmp_path / "stored")
    return tmp_path / "stored"


@pytest.mark.parametrize("name", RUNS)
def test_an_old_run_ranks_as_it_did(here: Path, name: str) -> None:
    assert read_json(here / name / "run.json")["versions"]["trierec"], "made under the old name"
    old, test = load_evaluation(here / name), load_dataset(here / "prepared").test
    assert test.seen is not None
    ranking = load(here / name).recommend(list(test.history), old.items.shape[1], list(test.seen))
    assert ranking.items.tolist() == old.items.tolist()
    np.testing.assert_allclose(ranking.scores, old.scores, atol=TOLERANCE)


@pytest.mark.parametrize("name", RUNS)
def test_an_old_run_is_evaluated_as_it_was(here: Path, name: str) -> None:
    old, new = load_evaluation(here / name), evaluate_run(Path(name))
    assert new.items.tolist() == old.items.tolist()
    assert new.rank.tolist() == old.rank.tolist()
    np.testing.assert_allclose(new.scores, old.scores, atol=TOLERANCE)
    assert new.metrics["intervals"] == old.metrics["intervals"]
    assert "made with trierec 0.1.0, torch" in (here / name / "README.md").read_text(encoding="utf-8")


def test_an_old_run_decodes_with_alpha_as_it_did(here: Path) -> None:
    """Then the gain was scaled over all siblings; a run of today that says nothing takes the trained ones."""
    manifest, recipe = here / "generative" / "recommender.json", here / "generative" / "recipe.toml"
    assert "gain_over" not in manifest.read_text(encoding="utf-8") + recipe.read_text(encoding="utf-8")
    old: Any = load(here / "generative")
    assert (
        old.gain_over == changed_evaluation(here / "generative", ["evaluation.alpha=0.4"]).gain_over == "all"
    )
    assert load_recipe("demo/msl").evaluation.gain_over == "trained"
    assert "gain_over" not in old.used
    assert old.with_settings(alpha=0.4).used["gain_over"] == "all"


def test_old_runs_are_reported(here: Path) -> None:
    report_runs([Path(name) for name in RUNS], here / "report.html")
    assert "Stored SASRec" in (here / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", RUNS)
def test_an_old_run_recommends_what_it_did(
    here: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["recommend", name, "--history", "Blue ink", "--history", "Ruler", "-k", "5", "--json"]
    monkeypatch.setattr("sys.argv", ["triewise", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    found = json.loads(capsys.readouterr().out)["recommendations"]
    old = read_json(STORED / "recommended.json")[name]
    assert [line["item_id"] for line in found] == [line["item_id"] for line in old]
    assert [line["title"] for line in found] == [line["title"] for line in old]
    np.testing.assert_allclose(
        [line["score"] for line in found], [line["score"] for line in old], atol=TOLERANCE
    )


def test_what_is_stored_says_nothing_about_the_machine() -> None:
    for run in RUNS:
        facts = read_json(STORED / run / "run.json")
        assert facts["data"]["folder"] == "prepared"
        assert "/" not in facts["command"]
