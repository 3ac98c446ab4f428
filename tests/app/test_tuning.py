"""Tuning: what a space may hold, trials that survive a kill, two processes on one study, decoding untrained."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import triewise.app.tuning as tuning
from tests.worlds import write_msl_folder
from triewise import locks
from triewise.app import Tuned, train_run, tune
from triewise.app.compare import _row_note
from triewise.app.space import Range, read_space
from triewise.cli import app
from triewise.errors import UserError
from triewise.recipe import Recipe, load_recipe

PLAN = """
[[step]]
name = "learn"
trials = 3
[step.space]
"training.learning_rate" = { low = 1e-3, high = 3e-2, log = true }

[[step]]
name = "decode"
[step.space.evaluation]
alpha = [0.0, 1.0]
"""
TINY = ("vocabulary=300", "width=16", "layers=1", "heads=2", "feed_forward=32")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    torch.set_num_threads(1)
    raw = write_msl_folder(tmp_path_factory.mktemp("tuning") / "office")
    given = [f"data.source=msl:{raw}", f"data.folder={raw.with_name('prepared')}", "evaluation.exclude=none"]
    given += [f"backbone.tiny.{key}" for key in TINY] + ["backbone.device=cpu", "training.valid_users=20"]
    given += ["training.steps=6", "training.evaluate_every=2", "training.checkpoint_every=2"]
    return load_recipe("demo/msl", [*given, "training.batch_size=8", "objective.weight=igd"])


def written(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "space.toml"
    file.write_text(text, encoding="utf-8")
    return file


def trials_of(
    out: Path, step: str = "learn"
) -> list[tuple[str, dict[str, Any], float | None, dict[int, float]]]:
    import optuna

    study = optuna.load_study(study_name=step, storage=f"sqlite:///{out / 'study.db'}")
    return [(t.state.name, t.params, t.value, dict(t.intermediate_values)) for t in study.get_trials()]


@pytest.fixture(scope="module")
def whole(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tuned, list[str]]:
    """A study from beginning to end, and which runs were trained."""
    folder, trained = tmp_path_factory.mktemp("whole"), []
    patch = pytest.MonkeyPatch()
    really = tuning.train_run

    def counted(recipe: Recipe, out: Path, **how: Any) -> Any:
        trained.append(out.name)
        return really(recipe, out, **how)

    patch.setattr(tuning, "train_run", counted)
    made = tune(recipe, written(folder, PLAN), 5, folder / "study")
    patch.undo()
    return folder / "study", made, trained


def test_a_plan_trains_each_trial_once_and_decodes_with_the_best(whole, recipe: Recipe) -> None:
    out, made, trained = whole
    assert trained == ["learn-1", "learn-2", "learn-3"]
    learn, decode = made.steps
    assert (learn["complete"], decode["complete"], made.interrupted) == (3, 2, False)
    rows = trials_of(out)
    assert rows[0][1] == {"training.learning_rate": recipe.training.learning_rate}, (
        "the recipe's own comes first"
    )
    best = max(range(3), key=lambda i: (rows[i][2], -i))
    assert learn["best"]["trial"] == best and learn["best"]["value"] == rows[best][2]
    assert [
        name for name in ("learn-1", "learn-2", "learn-3") if (out / "trials" / name / "model").is_dir()
    ] == [f"learn-{best + 1}"]
    # With alpha = 0 the decoding step ranks as the validations of the training did.
    assert trials_of(out, "decode")[0][2] == rows[best][2]
    text = (out / "best.toml").read_text(encoding="utf-8")
    assert text.startswith(
        "# Chosen by triewise tune: by NDCG@10 on at most 20 validation rows, never on test rows."
    )
    chosen = load_recipe(out / "best.toml")
    assert chosen == recipe.changed(
        f"training.learning_rate={learn['best']['values']['training.learning_rate']}",
        f"evaluation.alpha={decode['best']['values']['evaluation.alpha']}",
    )
    page = (out / "trials.html").read_text(encoding="utf-8")
    assert "Best is trial" in page and "<script" not in page


def test_no_trial_looks_at_a_test_row(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A data set whose test targets are others gives the same study."""
    from triewise.app.folders import open_data
    from triewise.data import Dataset

    dataset = open_data(recipe)
    assert isinstance(dataset, Dataset) and len(dataset.test.target)
    seen: list[str] = []
    import triewise.app.runs as runs

    really = runs.evaluate

    def spied(recommender: Any, split: Any, **how: Any) -> Any:
        seen.append(how["split_name"])
        return really(recommender, split, **how)

    monkeypatch.setattr(runs, "evaluate", spied)
    plan = PLAN.replace("trials = 3", "trials = 1")
    tune(recipe.changed("training.steps=2"), written(tmp_path, plan), 1, tmp_path / "study")
    assert set(seen) == {"valid"}


def killed(recipe: Recipe, space: Path, out: Path) -> None:
    """A study whose process is killed after the second validation of its second trial."""
    really = tuning.train_run

    def train_run(recipe: Recipe, folder: Path, *, watch: Any, **how: Any) -> Any:
        def last_words(row: dict[str, Any]) -> str | None:
            said: str | None = watch(row)
            if folder.name == "learn-2" and row["step"] >= 4 and "valid" in row:
                os.kill(os.getpid(), signal.SIGKILL)
            return said

        return really(recipe, folder, watch=last_words, **how)

    tuning.train_run = train_run  # type: ignore[assignment]
    tune(recipe, space, 5, out)


@pytest.mark.skipif(sys.platform != "linux", reason="signals")
def test_a_killed_study_goes_on_where_it_was_and_loses_no_trial(
    whole, recipe: Recipe, tmp_path: Path
) -> None:
    space, out = written(tmp_path, PLAN), tmp_path / "study"
    child = multiprocessing.get_context("spawn").Process(target=killed, args=(recipe, space, out))
    child.start()
    child.join(300)
    assert child.exitcode == -signal.SIGKILL
    rows = trials_of(out)
    assert [state for state, *_ in rows] == ["COMPLETE", "RUNNING"]
    assert set(rows[1][3]) == {2, 4} and list((out / "trials" / "learn-2").glob("checkpoint-2"))
    with pytest.raises(UserError, match="already holds a study; choose another --out, or add --resume"):
        tune(recipe, space, 5, out)
    made = tune(recipe, space, 5, out, resume=True)
    assert trials_of(out) == trials_of(whole[0]) and made.steps == whole[1].steps
    assert (out / "best.toml").read_bytes() == (whole[0] / "best.toml").read_bytes()
    log = [json.loads(line) for line in (out / "trials" / "learn-2" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log if "valid" in row] == [2, 4, 6]
    # All is made: another call finds nothing to do.
    assert tune(recipe, space, 5, out, resume=True) == made


def shared(recipe: Recipe, space: Path, out: Path) -> None:
    really = tuning._Study._make

    def make(self: Any, step: Any, trial: Any, values: Any) -> bool:
        (out / f"by-{os.getpid()}-{step.name}-{trial.number}").touch()
        waited = time.monotonic() + 200
        while len({path.name.split("-")[1] for path in out.glob("by-*")}) < 2 and time.monotonic() < waited:
            time.sleep(0.05)  # else one may have made all before the other has begun
        return really(self, step, trial, values)

    tuning._Study._make = make  # type: ignore[method-assign]
    tuning.POLL = 0.1
    tune(recipe, space, 6, out, resume=True)


@pytest.mark.skipif(sys.platform != "linux", reason="signals")
def test_two_processes_share_a_study(recipe: Recipe, tmp_path: Path) -> None:
    space, out = written(tmp_path, PLAN.replace("trials = 3", "trials = 4")), tmp_path / "study"
    recipe = recipe.changed("training.steps=2")
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=shared, args=(recipe, space, out)) for _ in range(2)]
    for child in both:
        child.start()
        time.sleep(0.05)
    for child in both:
        child.join(500)
    assert [child.exitcode for child in both] == [0, 0]
    for step, n in (("learn", 4), ("decode", 2)):
        rows = trials_of(out, step)
        assert len(rows) == n and {row[0] for row in rows} <= {"COMPLETE", "PRUNED"}
        made = [path.name.split("-") for path in out.glob(f"by-*-{step}-*")]
        assert sorted(int(number) for *_, number in made) == list(range(n)), "each by one process"
        if step == "learn":
            assert {pid for _, pid, *_ in made} == {str(child.pid) for child in both}
    assert load_recipe(out / "best.toml").name == recipe.name


def test_an_interrupt_ends_the_call_and_the_trial_goes_on_later(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space, out = written(tmp_path, PLAN.replace("trials = 3", "trials = 1")), tmp_path / "study"
    really, told = tuning.train_run, []

    def stopped(recipe: Recipe, folder: Path, *, watch: Any, **how: Any) -> Any:
        def press(row: dict[str, Any]) -> str | None:
            if row["step"] == 2 and not told:
                told.append(os.kill(os.getpid(), signal.SIGINT))
            return watch(row) and None

        return really(recipe, folder, watch=press, **how)

    monkeypatch.setattr(tuning, "train_run", stopped)
    (file := tmp_path / "recipe.toml").write_text(
        __import__("triewise").recipe.dump_recipe(recipe), encoding="utf-8"
    )
    words = ["tune", str(file), "--space", str(space), "--trials", "1", "--out", str(out)]
    first = CliRunner().invoke(app, words)
    assert first.exit_code == 0 or first.exit_code == 130, first.output
    assert "go on with the same command and --resume" in first.output and trials_of(out)[0][0] == "RUNNING"
    second = CliRunner().invoke(app, [*words, "--resume", "--json"])
    assert second.exit_code == 0
    facts = json.loads(second.stdout.strip().splitlines()[-1])
    assert (facts["steps"][0]["trials"], facts["steps"][0]["complete"]) == (1, 1)
    assert facts["best"] == str(out / "best.toml")


def test_a_sequential_model_is_tuned_too_and_values_that_were_tried_cost_nothing(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "sasrec.toml"
    file.write_text(
        f'name = "sasrec"\n[data]\nsource = "{recipe.data.source}"\nfolder = "{recipe.data.folder}"\n[sequential]\n'
        'encoder = "sasrec"\nwidth = 8\ndevice = "cpu"\n[training]\nsteps = 4\nbatch_size = 8\nvalid_users = 10\n',
        encoding="utf-8",
    )
    text = '[space]\n"sequential.width" = { low = 4, high = 8, step = 4 }\n"sequential.heads" = [2, 4]\n'
    made = tune(load_recipe(file), written(tmp_path, text), 4, tmp_path / "study")
    [step] = made.steps
    assert (step["trials"], step["complete"]) == (4, 4)
    assert set(step["best"]["values"]) == {"sequential.width", "sequential.heads"}
    capsys.readouterr()


def test_a_first_step_of_decoding_trains_the_recipe_once(recipe: Recipe, tmp_path: Path) -> None:
    text = '[space]\n"evaluation.alpha" = [0.0, 0.5]\n'
    made = tune(recipe.changed("training.steps=2"), written(tmp_path, text), 9, tmp_path / "study")
    assert [path.name for path in (tmp_path / "study" / "trials").iterdir()] == ["base"]
    assert made.steps[0]["trials"] == made.steps[0]["complete"] == 2, "no more than there are"


@pytest.mark.filterwarnings("ignore:this model is decoded on the plain")
def test_a_trial_that_cannot_be_is_told_and_the_others_go_on(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = '[space]\n"training.learning_rate" = [1e-2, 1e30]\n'
    made = tune(recipe.changed("training.learning_rate=1e-2"), written(tmp_path, text), 2, tmp_path / "study")
    assert (made.steps[0]["complete"], made.steps[0]["fail"]) == (1, 1)
    assert "warning: all, trial 2 cannot be: " in capsys.readouterr().err
    text = '[space]\n"training.learning_rate" = [1e29, 1e30]\n'
    with pytest.raises(UserError, match="no trial of the step all came to an end"):
        tune(recipe, written(tmp_path / "b", text), 2, tmp_path / "none")


WRONG = {
    "x = 1": "wanted [[step]] tables or one [space]",
    '[space]\n"training.lerning_rate" = [1e-3]': "unknown key 'training.lerning_rate'; did you mean",
    '[space]\n"training.steps" = ["many"]': "training.steps: Input should be a valid integer",
    '[space]\n"training.learning_rate" = { low = -1.0, high = 1e-3 }': "Input should be greater than 0",
    '[space]\n"training.learning_rate" = { low = 1e-2, high = 1e-3 }': "wanted a list of choices or { low, high }",
    '[space]\n"training.learning_rate" = { low = 0.0, high = 1.0, log = true }': "wanted a list of choices or { low",
    '[space]\n"training.learning_rate" = { low = "a", high = 1.0 }': "wanted a list of choices or { low, high }",
    '[space]\n"training.learning_rate" = 1e-3': "wanted a list of choices or { low, high } with log or step",
    '[space]\n"evaluation.split" = ["valid", "test"]': "evaluation.split decides what a trial is learned from",
    '[space]\n"data.max_history" = [5, 10]': "has to be the same for all; leave it out of the space",
    '[[step]]\nname = "a b"\n[step.space]\nx = [1]': "wanted a step with a name of letters and digits",
    "[[step]]\ntrials = 0\n[step.space]\nx = [1]": "if at all, trials > 0",
    '[[step]]\nname = "a"\n[step.space]\n"training.steps" = [1]\n[[step]]\nname = "a"\n[step.space]\n'
    '"training.steps" = [1]': "wanted steps of different names",
    '[space]\n"training.steps" = [2020-01-01]': "training.steps: Input should be a valid integer",
    "[[step]]\n[step.space.objective]": "wanted a step with a name of letters and digits, its space",
    "[space": "wanted UTF-8 TOML",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_space_that_cannot_be_is_one_line(text: str, recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UserError) as problem:
        read_space(written(tmp_path, text), recipe)
    assert WRONG[text] in str(problem.value) and "\n" not in str(problem.value)


def test_codes_that_titles_share_are_not_tuned(recipe: Recipe, tmp_path: Path) -> None:
    """A hit is one of the titles of a code: of two codes in all the first ten would hold every title."""
    coded = recipe.changed("identifier.kind=codes")
    levels, collisions = (
        written(tmp_path / name, f"[space]\n{text}\n")
        for name, text in (
            ("a", '"identifier.levels" = [[2], [4, 4]]'),
            ("b", '"identifier.collisions" = ["level", "group"]'),
        )
    )
    assert read_space(levels, coded)
    for space, of in ((levels, coded.changed("identifier.collisions=group")), (collisions, coded)):
        with pytest.raises(
            UserError, match="identifier.* decides what a trial is learned from or measured by"
        ):
            read_space(space, of)
    record = {"parameters": 1, "timing": {"seconds": 1.0}, "training": {"steps": 1}}
    ranked = {"search": "exact", "support": "trie"}
    assert "count as one" not in _row_note(coded, record, ranked)
    assert "titles of equal codes count as one" in _row_note(
        coded.changed("identifier.collisions=group"), record, ranked
    )


def test_the_recipe_as_it_is_comes_first_where_a_range_holds_it(recipe: Recipe, tmp_path: Path) -> None:
    """The batch of 8 is the second of four values; half steps between whole ends are numbers of any kind."""
    assert Range(4, 16, step=4).holds(8) and not Range(4, 16, step=4).holds(9)
    assert Range(0.1, 0.5, step=0.1).holds(0.3) and not Range(0, 1).holds(0.5)
    assert not Range(1, 2, step=0.5).whole and Range(1, 2, step=0.5).holds(1.5)
    text = '[space]\n"training.batch_size" = { low = 4, high = 16, step = 4 }\n'
    tune(recipe.changed("training.steps=2"), written(tmp_path, text), 1, tmp_path / "study")
    assert trials_of(tmp_path / "study", "all")[0][1] == {"training.batch_size": 8}


def test_a_trial_that_ended_before_its_lock_was_free_is_not_made_again(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process ends its trial between our look at what is running and the lock."""
    from optuna.distributions import FloatDistribution

    space, out = written(tmp_path, PLAN), tmp_path / "study"
    study = tuning._Study(tuning._optuna(), recipe, read_space(space, recipe), 3, out, False)
    study.begin(space, False)
    step, of = study.plan[0], study.studies["learn"]
    of.tell(of.ask({"training.learning_rate": FloatDistribution(1e-3, 3e-2, log=True)}), 0.5)
    really, stale = study._running, [of.get_trials()]
    monkeypatch.setattr(study, "_running", lambda of: stale.pop() if stale else really(of))
    with contextlib.ExitStack() as held:
        claimed = study._claim(step, held)
    assert claimed is not None and claimed[0].number == 1


def test_a_step_is_closed_when_a_later_one_was_begun(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """More trials of it could have another best than that with which the later one was measured."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    space = written(tmp_path, PLAN.replace("trials = 3\n", ""))
    study = tuning._Study(tuning._optuna(), recipe, read_space(space, recipe), 5, tmp_path / "study", False)
    study.begin(space, False)
    learn, decode = study.plan
    of = study.studies["learn"]
    of.tell(of.ask({"training.learning_rate": FloatDistribution(1e-3, 3e-2, log=True)}), 0.5)
    with contextlib.ExitStack() as held:
        assert study._claim(learn, held) is not None
    assert "stays as it is" not in capsys.readouterr().err
    study.studies["decode"].tell(
        study.studies["decode"].ask({"evaluation.alpha": CategoricalDistribution(["0.0", "1.0"])}), 0.5
    )
    of.tell(1, 0.4)
    with contextlib.ExitStack() as held:
        assert study._claim(learn, held) is None and study._claim(decode, held) is not None
    assert "learn stays as it is: decode was begun with the best of its 2 trials" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_no_other_process(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was waited for without end."""
    monkeypatch.setattr(tuning.time, "sleep", lambda seconds: pytest.fail("it waits"))
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "trials").write_text("a file")
    with pytest.raises(UserError, match="cannot write .*base: Not a directory; choose another folder"):
        tune(recipe, written(tmp_path, '[space]\n"evaluation.alpha" = [0.0, 0.5]\n'), 1, tmp_path / "study")


def test_an_assistant_that_saw_the_validation_rows_chooses_nothing(recipe: Recipe, tmp_path: Path) -> None:
    both = ["training.rows=train+valid", "training.evaluate_every=0", "training.steps=2"]
    train_run(recipe.changed(*both), tmp_path / "helper")
    text = '[space]\n"evaluation.assistant_weight" = [0.3, 0.7]\n'
    helped = recipe.changed(f"evaluation.assistant={tmp_path / 'helper'}", "training.steps=2")
    with pytest.raises(UserError, match="was trained on the validation rows, which are looked at here"):
        tune(helped, written(tmp_path, text), 2, tmp_path / "study")


def test_a_study_of_an_older_version_goes_on(whole, recipe: Recipe, tmp_path: Path) -> None:
    """It wrote fewer keys into recipe.toml."""
    shutil.copytree(whole[0], tmp_path / "study")
    old = tmp_path / "study" / "recipe.toml"
    text = old.read_text(encoding="utf-8")
    old.write_text(text.replace("soft_share = 0.5\n", ""), encoding="utf-8")
    assert tune(recipe, written(tmp_path, PLAN), 5, tmp_path / "study", resume=True).steps == whole[1].steps
    assert old.read_text(encoding="utf-8") == text


@pytest.mark.filterwarnings("ignore:this model is decoded on the plain")
def test_folders_are_tidied_by_one_process_at_a_time(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else one removes a file that another is about to remove, and its call ends with an error."""
    out, locked, really = tmp_path / "study", list[bool](), tuning._tidy

    def tidy(folder: Path) -> None:
        locked.append(any(file.parent == out.resolve() for file in locks._held))
        really(folder)

    monkeypatch.setattr(tuning, "_tidy", tidy)
    text = '[space]\n"training.learning_rate" = [1e-2, 1e30]\n'  # one ends, one cannot be
    tune(recipe.changed("training.learning_rate=1e-2"), written(tmp_path, text), 2, out)
    assert locked and all(locked)


def test_the_folder_of_a_run_is_left_alone(whole, recipe: Recipe, tmp_path: Path) -> None:
    run = next((whole[0] / "trials").glob("learn-*"))
    assert (run / "recipe.toml").is_file() and not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    for name in ("recipe.toml", "run.json"):
        (tmp_path / "run" / name).write_bytes((run / name).read_bytes())
    with pytest.raises(UserError, match="holds a run, whose recipe a study would replace; choose another"):
        tune(recipe.changed("seed=7"), written(tmp_path, PLAN), 1, tmp_path / "run")
    assert (tmp_path / "run" / "recipe.toml").read_bytes() == (run / "recipe.toml").read_bytes()


def test_a_study_of_another_space_and_a_missing_package_are_one_line(
    whole, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = written(tmp_path, PLAN.replace("3e-2", "2e-2"))
    with pytest.raises(UserError, match=r"has another space.toml than this call"):
        tune(recipe, other, 5, whole[0], resume=True)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"triewise tune needs Optuna; run: pip install 'triewise\[tune\]'"):
        tune(recipe, other, 5, tmp_path / "x")
    assert not (tmp_path / "x").exists()
