"""The ledger: rows tuned alike, resumed, compared; what fails is a line and not the end."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.worlds import write_msl_folder
from triewise.app import evaluate_run, open_run
from triewise.app.reproduce import TableRow, reproduce_table as reproduce
from triewise.cli import app
from triewise.errors import UserError
from triewise.files import read_json
from triewise.ranking import load_evaluation
from triewise.recipe import load_recipe, recipe_folder

TINY = {"vocabulary": 300, "width": 16, "heads": 2, "feed_forward": 32}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    raw = write_msl_folder(tmp_path_factory.mktemp("ledger") / "office")
    few = [f"backbone.tiny.{key}={value}" for key, value in TINY.items()]
    changes = [f"data.folder={raw.with_name('prepared').as_posix()}", "evaluation.users=20", *few]
    return {"data": f"msl:{raw.as_posix()}", "steps": 3, "changes": [*changes, "training.batch_size=4"]}


def definition() -> dict[str, Any]:
    file = Path(__file__).parents[2] / "src" / "triewise" / "app" / "ledger.toml"
    return tomllib.loads(file.read_text(encoding="utf-8"))


def test_every_recipe_has_a_row_and_all_are_tuned_alike() -> None:
    rows = definition()["rows"]
    assert set(rows) == {file.stem for file in (recipe_folder() / "ledger").glob("*.toml")}
    assert {len(set(each["values"])) for each in rows.values()} == {3}
    assert definition()["against"] in rows
    titles = set()
    for name, each in rows.items():
        recipe = load_recipe(f"ledger/{name}")
        titles.add(recipe.title)
        value: Any = recipe
        for part in each["key"].split("."):
            value = getattr(value, part)
        assert value == each["values"][0], "the recipe's own comes first"
        for other in each["values"]:
            load_recipe(f"ledger/{name}", [f"{each['key']}={other}"])
        for key, needed in each.get("needs", {}).items():
            load_recipe(needed)
            load_recipe(f"ledger/{name}", [f"{key}=somewhere"])
    assert len(titles) == len(rows)


def test_bear_differs_from_its_control_in_nothing_but_bear() -> None:
    """Else what the divisor does would be taken for what BEAR does."""
    for bear, control in (("bear-described", "msl"), ("bear-coded", "msl-decisions")):
        ours, plain = (
            load_recipe(f"ledger/{name}").model_dump(exclude={"name", "title"}) for name in (bear, control)
        )
        ours["objective"]["bear"] = plain["objective"]["bear"]
        assert ours == plain


def test_two_rows_and_what_is_finished_is_not_run_again(
    world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = world | {"seeds": 2, "rows": ["msl", "bear-described"], "trials": 2}
    first = reproduce("ledger", tmp_path, **ask)
    assert [r.name for r in first.rows] == ["msl", "bear-described"] and not any(r.failed for r in first.rows)
    bear = first.rows[1]
    best = max(
        range(2), key=lambda n: (read_json(tmp_path / f"bear-described/trial-{n}/trial.json")["NDCG@10"], -n)
    )
    assert bear.chosen == f"bear.strength = {(0.25, 1.0)[best]:g}"
    for seed, run in enumerate((f"trial-{best}", "seed-1")):
        recipe = open_run(tmp_path / "bear-described" / run)[0]
        assert (recipe.seed, recipe.objective.bear.strength) == (seed, (0.25, 1.0)[best])
        metrics = load_evaluation(tmp_path / "bear-described" / run).metrics
        assert metrics["split"] == "test" and 0 <= metrics["pruned@10"] <= 1
        assert "pruned@10" not in metrics["beam"]
    assert set(first.differences) == {"bear-described"}
    assert first.differences["bear-described"]["NDCG@10"].b == "MSL"
    assert (tmp_path / "ledger.md").read_text(
        "utf-8"
    ) == first.text and "| BEAR (described) | bear.str" in first.text
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "pruned@10" in page and "BEAR (described)" in page

    def never(*args: Any, **how: Any) -> None:
        raise AssertionError("trained or ranked again")

    with monkeypatch.context() as patch:
        patch.setattr("triewise.app.reproduce.train_run", never)
        patch.setattr("triewise.app.reproduce.evaluate_run", never)
        assert reproduce("ledger", tmp_path, **ask).text == first.text
        changed = reproduce("ledger", tmp_path, **(ask | {"steps": 4}))
        assert all("trained or ranked again" in r.failed for r in changed.rows)
    other = reproduce("ledger", tmp_path, **(ask | {"steps": 4, "seeds": 1}))
    assert open_run(tmp_path / "msl" / "trial-0")[1]["training"]["steps"] == 4
    assert not any(r.failed for r in other.rows)


def test_an_interrupted_table_goes_on(
    world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while its second trial is judged, it runs only what is left."""
    ask = world | {"seeds": 1, "rows": ["msl"], "trials": 2}
    whole = reproduce("ledger", tmp_path / "whole", **ask)

    def stop(run: Path, *args: Any, **how: Any) -> Any:
        if run.name == "trial-1":
            raise KeyboardInterrupt
        return evaluate_run(run, *args, **how)

    with monkeypatch.context() as patch:
        patch.setattr("triewise.app.reproduce.evaluate_run", stop)
        with pytest.raises(KeyboardInterrupt):
            reproduce("ledger", tmp_path / "parted", **ask)
    with monkeypatch.context() as patch:
        patch.setattr("triewise.app.reproduce.train_run", lambda *args, **how: 1 / 0)  # both are trained
        parted = reproduce("ledger", tmp_path / "parted", **ask)
    assert parted.rows[0].failed == ""
    cells = [t.text.splitlines()[-1].split(" | ")[:-1] for t in (whole, parted)]  # without the time
    assert cells[0] == cells[1]


def test_what_a_row_needs_is_trained_once(world: dict[str, Any], tmp_path: Path) -> None:
    of_models = ["identifier.kind=codes", "training.accumulation=2", "evaluation.search=beam"]
    sasrec = [*world["changes"], "training.learning_rate=1e-3", *of_models]
    made = reproduce(
        "ledger", tmp_path, **(world | {"changes": sasrec}), seeds=1, rows=["tca4rec", "s-dpo"], trials=1
    )
    assert [r.failed for r in made.rows] == ["", ""]
    assert open_run(tmp_path / "needed" / "demo-sasrec")[0].sequential is not None
    reference = open_run(tmp_path / "s-dpo" / "trial-0")[0].objective.preference.reference
    assert reference == (tmp_path / "needed" / "ledger-lml").absolute()
    assert not made.differences  # nothing to compare with


def test_code_of_a_model_runs_where_the_command_says_so(world: dict[str, Any], tmp_path: Path) -> None:
    asks = {"changes": [*world["changes"], "backbone.trust_remote_code=true"]}
    ask = world | {"seeds": 1, "rows": ["msl"], "trials": 1}
    with pytest.raises(UserError, match="the table ledger asks to run code .*--trust-remote-code"):
        reproduce("ledger", tmp_path, **(ask | asks))
    made = reproduce("ledger", tmp_path, **ask, trust_remote_code=True)
    assert not made.rows[0].failed and open_run(tmp_path / "msl" / "trial-0")[0].backbone.trust_remote_code


def test_a_row_that_fails_is_a_line(
    world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One trial that fails is one trial less; a row of which all fail says why, and the others go on."""
    ask = world | {"seeds": 1, "rows": ["msl", "pos"], "trials": 2}
    from triewise.app.runs import train_run

    def fail(recipe: Any, run: Path, **how: Any) -> Any:
        if run.parent.name == "pos" or run.name == "trial-0":
            raise UserError("the loss is\nnot finite")
        return train_run(recipe, run, **how)

    monkeypatch.setattr("triewise.app.reproduce.train_run", fail)
    made = reproduce("ledger", tmp_path, **ask)
    assert made.rows[0].chosen == "learning_rate = 0.002"
    assert made.rows[1] == TableRow("pos", "Pos", failed="the loss is not finite")
    assert "| Pos | failed: the loss is not finite |" in made.text
    assert made.as_json()["pos"] == {"failed": "the loss is not finite"}
    monkeypatch.setattr("triewise.app.reproduce.train_run", lambda *args, **how: 1 / 0)
    none = reproduce("ledger", tmp_path / "none", **ask)
    assert none.html is None and none.rows[0].failed == "division by zero"


def test_the_command(world: dict[str, Any], tmp_path: Path) -> None:
    changes = [word for change in world["changes"] for word in ("--set", change)]
    asked = [
        "reproduce",
        "ledger",
        "--out",
        str(tmp_path),
        "--data",
        world["data"],
        "--steps",
        "2",
        "--seeds",
        "1",
    ]
    done = CliRunner().invoke(app, [*asked, "--rows", "msl, lml", "--trials", "1", *changes, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert set(found) == {"msl", "lml", "report"} and found["lml"]["differences"]["HR@10"]["a"] == "LML"
    again = CliRunner().invoke(app, [*asked, "--rows", "msl, lml", "--trials", "1", *changes])
    assert again.stdout.startswith("| loss | chosen on validation | NDCG@10 | minus msl [95 %]")


@pytest.mark.parametrize(
    ("ask", "line"),
    [
        ({"table": "msl-table-9"}, "wanted a table among ledger, got 'msl-table-9'"),
        ({"rows": ["msl", "ipo"]}, "wanted rows among msl, .*, got 'ipo'"),
        (
            {"changes": ["training.learning_rate=0.02"], "rows": ["msl", "pos"]},
            "got 'training.learning_rate=0.02', which msl chooses; leave msl out",
        ),
        ({"trials": 9}, "wanted 1 to 3 trials and at least one seed, got 9 and 3"),
    ],
)
def test_wrong_wishes(ask: dict[str, Any], line: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=line):
        reproduce(ask.pop("table", "ledger"), tmp_path, **ask)
