"""The ledger: rows tuned alike, resumed, compared; what fails is a line and not the end."""

from __future__ import annotations

import json
import math
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from tests.worlds import write_msl_folder
from triewise import locks
from triewise.app import evaluate_run, open_run, row
from triewise.app.paper_tables import SCALES, Beside, deviation, read_table, table_names, verdict
from triewise.app.reproduce import TableRow, _common, _is_of, reproduce_table as reproduce
from triewise.app.runs import train_run
from triewise.app.tabulating import Wish, _findings, _known, _tried, judged
from triewise.cli import app
from triewise.data import load_dataset
from triewise.errors import Diverged, UserError
from triewise.files import read_json
from triewise.locks import one_writer
from triewise.ranking import gain_interval, load_evaluation
from triewise.recipe import dump_recipe, load_recipe, recipe_folder
from triewise.reports import item_score_entropy

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

    def fail(recipe: Any, run: Path, **how: Any) -> Any:
        if run.parent.name == "pos" or run.name == "trial-0":
            raise Diverged("the loss is\nnot finite | nan")
        return train_run(recipe, run, **how)

    monkeypatch.setattr("triewise.app.reproduce.train_run", fail)
    made = reproduce("ledger", tmp_path, **ask)
    assert made.rows[0].chosen == "learning_rate = 0.002 (1 of 2 values diverged)"
    assert made.rows[1] == TableRow("pos", "Pos", failed="the loss is not finite | nan")
    assert "| Pos | failed: the loss is not finite \\| nan |" in made.text, "no more cells than heads"
    assert made.as_json()["pos"] == {"failed": "the loss is not finite | nan"}
    monkeypatch.setattr("triewise.app.reproduce.train_run", lambda *args, **how: 1 / 0)
    none = reproduce("ledger", tmp_path / "none", **ask)
    assert none.html is None and none.rows[0].failed == "division by zero"


def test_what_is_no_fault_of_a_value_fails_its_row(
    world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that another process writes in, or a full disk: else a value wins because the others were left out."""
    ask = world | {"seeds": 1, "rows": ["msl"], "trials": 2}
    with one_writer(tmp_path / "msl" / "trial-0"), monkeypatch.context() as patch:
        patch.setattr(locks, "_held", {})  # as of another process
        (failed,) = reproduce("ledger", tmp_path, **ask).rows
    assert "another triewise process" in failed.failed and not failed.chosen
    (made,) = reproduce("ledger", tmp_path, **ask).rows
    assert not made.failed
    for damaged in ("", "{}", '{"NDCG@10": "much"}', '{"NDCG@10": null}'):
        (tmp_path / "msl" / "trial-1" / "trial.json").write_text(damaged, encoding="utf-8")
        (again,) = reproduce("ledger", tmp_path, **ask).rows
        assert (again.failed, again.chosen) == ("", made.chosen), "a damaged judgement is made again"


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
    # A row over item ids has no beams, and one seed no deviation: numbers that there are not are null.
    asked = ["reproduce", "igd-table-2", "--scale", "small", "--rows", "sasrec", *asked[2:]]
    asked[asked.index("--out") + 1] = str(tmp_path / "ids")
    done = CliRunner().invoke(app, [*asked, "--trials", "1", *changes[2:], "--json"])
    assert done.exit_code == 0, done.output
    sasrec = json.loads(done.stdout)["sasrec"]
    assert sasrec["pruned@10"] is None and sasrec["findings"][0]["ours"] is not None


@pytest.mark.parametrize(
    ("ask", "line"),
    [
        ({"table": "msl-table-9"}, "wanted a table among ledger, igd-table-1, .*, got 'msl-table-9'"),
        ({"scale": "large"}, "wanted a scale among paper, small, got 'large'"),
        ({"rows": ["msl", "ipo"]}, "wanted rows among msl, .*, got 'ipo'"),
        (
            {"changes": ["training.learning_rate=0.02"], "rows": ["msl", "pos"]},
            "got 'training.learning_rate=0.02', which msl chooses; leave msl out",
        ),
        (
            {"changes": ["seed = 5"]},
            "wanted seeds from 0 on, as many as --seeds says, got the change 'seed = 5'",
        ),
        (
            {"changes": ["objective.support=trie"], "rows": ["msl", "lml"]},
            "wanted changes of what all rows have in common, got 'objective.support=trie', where they have trie and "
            "vocabulary; leave it out",
        ),
        (
            {"table": "igd-table-7", "scale": "small", "changes": ["evaluation.alpha = 0.3"]},
            "got 'evaluation.alpha = 0.3', where they have 0.0 and 0.4; leave it out",
        ),
        ({"trials": 9}, "wanted 1 to 3 trials and at least one seed, got 9 and 3"),
    ],
)
def test_wrong_wishes(ask: dict[str, Any], line: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=line):
        reproduce(ask.pop("table", "ledger"), tmp_path, **ask)


# ---------------------------------------------------------------- tables of papers
PUBLISHED = [name for name in table_names() if name != "ledger"]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("table", PUBLISHED)
def test_every_row_of_a_paper_is_a_recipe_that_can_be_read(table: str, scale: Any) -> None:
    known = read_table(table, scale)
    assert known.published and known.claim and known.against in known.rows
    assert len({plan.title for plan in known.rows.values()}) == len(known.rows)
    for data, numbers in known.numbers.items():
        assert set(numbers) <= set(known.rows), data
        assert all(len(each) == len(known.metrics) for each in numbers.values()), data
    for plan in known.rows.values():
        if plan.missing:
            continue
        assert plan.values and (plan.key, plan.recipe) != ("", "")
        for value in plan.values:
            needed = [f"{key}=somewhere" for key in plan.needs]
            load_recipe(plan.recipe, [*plan.changes, *needed, f"{plan.key}={value}"])
        for needed_recipe in plan.needs.values():
            load_recipe(needed_recipe)
    of_small = [len(plan.values) for plan in known.rows.values() if not plan.missing]
    if scale == "small" and table != "msl-table-6":  # whose plain MSL is the row that is not tuned
        assert len(set(of_small)) == 1, "equally many trials a row"


def test_numbers_are_those_of_the_notes_and_gains_are_shares_of_the_row_against() -> None:
    known = read_table("msl-table-6", "small")
    assert known.number("msl-ats", "office") == 0.0438 and known.number("msl-ats", "office", "HR@10") is None
    assert known.number("msl-ats", "ml-100k") is None
    assert known.gains("msl-ats", "office", 2414) == pytest.approx([0.0438 / 0.0220 - 1])
    every = [0.0288 / 0.0182 - 1, 0.0172 / 0.0137 - 1, 0.0120 / 0.0073 - 1, 0.0438 / 0.0220 - 1]
    for data, n_items in (("ml-100k", 1682), ("office", 3459)):  # the second: its name, but another cut
        assert known.gains("msl-ats", data, n_items) == pytest.approx(every), (
            "data the paper has not: all of its"
        )
    mean = Beside("over LML", 0.1, 0.0, 0.2, 0.5, "below", gain=True, sets=4)
    assert (
        mean.cells()[2] == "+50.0%, mean of its 4 data sets" and replace(mean, sets=1).cells()[2] == "+50.0%"
    )
    igd = read_table("igd-table-2")
    assert igd.number("d3-pos", "toy") == 0.0702 and igd.number("d3-pos", "toy", "HR@10") is None
    assert igd.number("d3-cft", "toy") is None and igd.gains("d3-cft", "toy", 11252) == []


def test_gains_of_a_backbone_are_over_its_own_lml() -> None:
    known = read_table("msl-table-5")
    assert known.gains("llara-msl", "office", 2414) == pytest.approx([0.0417 / 0.0204 - 1])
    assert known.gains("a-llmrec-msl", "office", 2414) == pytest.approx([0.0388 / 0.0219 - 1])
    assert known.gains("bigrec-msl", "office", 2414) == pytest.approx([0.0438 / 0.0220 - 1])
    # what the paper claims in the mean is over the better loss of the same backbone
    best = [
        known.number(f"{backbone}-msl", data)
        / max(known.number(f"{backbone}-{loss}", data) for loss in ("lml", "s-dpo"))
        - 1
        for backbone in ("bigrec", "llara", "a-llmrec")
        for data in known.numbers
    ]
    assert len(best) == 12 and np.mean(best) == pytest.approx(0.4224, abs=5e-4)


def test_a_verdict_says_where_an_interval_lies() -> None:
    """The last are the control: what is said of one side would be wrong of the other."""
    assert verdict(0.30, 0.28, 0.32) == "within"
    assert verdict(0.28, 0.28, 0.32) == verdict(0.32, 0.28, 0.32) == "within"
    assert verdict(0.27, 0.28, 0.32) == "above" and verdict(0.33, 0.28, 0.32) == "below"
    assert verdict(None, 0.28, 0.32) == "the paper's number is not recorded"
    assert verdict(0.3, float("nan"), float("nan")) == "ours has no interval"
    for number in (0.27, 0.33):
        assert verdict(number, 0.28, 0.32) != "within" and verdict(number, -0.32, -0.28) == "below"


def test_numbers_of_something_else_are_not_judged() -> None:
    """Another data set, another model and other settings are said; the same three are judged."""
    recipe, small = load_recipe("papers/msl-llama3-8b"), load_recipe("ledger/msl-ats")
    wish = Wish(read_table("msl-table-6"), "paper", Path(), "office", (), 1, None, n_items=2414)
    assert judged(wish, recipe, 0.0438, 0.04, 0.05) == "within"
    assert judged(wish, recipe, 0.0438, 0.02, 0.03) == "below"
    assert judged(wish, small, 0.0438, 0.04, 0.05) == "of llama-3-8b: not comparable"
    assert judged(replace(wish, n_items=20), recipe, 0.0438, 0.04, 0.05).startswith("of 2,414 items, here 20")
    assert judged(wish, small, None, 0.04, 0.05) == "the paper's number is not recorded"
    large = small.changed("backbone.name=meta-llama/Meta-Llama-3-8B")
    said = judged(replace(wish, scale="small"), large, 0.0438, 0.04, 0.05)
    assert said == "of other settings: not comparable", "the same model by another recipe"
    sasrec, table = load_recipe("papers/msl-table-5/sasrec"), read_table("msl-table-5")
    assert judged(replace(wish, table=table), sasrec, 0.0183, 0.01, 0.02) == "within"
    assert (
        judged(replace(wish, scale="small"), sasrec, 0.0183, 0.01, 0.02)
        == "of other settings: not comparable"
    )


def test_the_deviation_over_seeds_covers_the_true_one() -> None:
    """Of 200 tables of three normal seeds with a deviation of 10 %, the interval misses it about one time in twenty."""
    rng = np.random.default_rng(0)
    missed = 0
    for _ in range(200):
        s, low, high = deviation(rng.normal(1, 0.1, 3).tolist())
        assert low < s < high
        missed += not low <= 10 <= high
    assert 2 <= missed <= 22
    assert all(math.isnan(value) for value in deviation([0.3]))


def test_a_table_of_a_paper_has_its_number_beside_ours_in_both_supports(
    world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = [change for change in world["changes"] if not change.startswith("data.folder")]
    ask = world | {"changes": changes, "seeds": 2, "rows": ["lml", "msl-ats"], "trials": 2, "scale": "small"}
    made = reproduce("msl-table-6", tmp_path, **ask)
    lml, ats = made.rows
    assert not lml.failed and not ats.failed, (lml.failed, ats.failed)
    found = {one.what: one for one in ats.findings}
    assert list(found) == [
        "NDCG@10, trie",
        "NDCG@10, trie, over LML",
        "NDCG@10, vocabulary",
        "NDCG@10, vocabulary, over LML",
    ]
    assert found["NDCG@10, trie"].paper == 0.0438
    n = load_dataset(tmp_path / "prepared").catalog.n_items
    assert found["NDCG@10, trie"].verdict == f"of 2,414 items, here {n}: not comparable"
    difference, gain = made.differences["msl-ats"]["NDCG@10"], found["NDCG@10, trie, over LML"]
    assert lml.evaluation is not None and ats.evaluation is not None
    assert gain.ours == pytest.approx(difference.difference / row(lml.evaluation).metrics["NDCG@10"])
    assert (gain.low, gain.high) == gain_interval(*(r.evaluation.per_user("NDCG@10") for r in (ats, lml)))
    assert _known({"a": [math.inf, math.nan, 0.5]}) == {"a": [None, None, 0.5]}, (
        "a gain over nothing has no JSON"
    )
    assert gain.sets == 4 and gain.verdict == verdict(gain.paper, gain.low, gain.high)
    assert "mean of its 4 data sets" in made.text
    for name in ("trial-0", "seed-1"):
        folders = [p for p in (tmp_path / "lml").iterdir() if p.name.endswith("-vocabulary")]
        assert len(folders) == 2 and name
    other = load_evaluation(folders[0]).metrics
    assert other["support"] == "vocabulary" and other["split"] == "test"
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "chosen on validation rows, out of 2 each; test rows ranked exactly" in page
    assert _tried([TableRow("a", "A"), TableRow("b", "B", tried=3)]) == "1 to 3, so not out of equally many"
    assert "Table 6" in page and "not comparable" in page and "Masking alone" in page
    assert "| MSL + ATS | adaptive.eta = " in made.text

    def never(*args: Any, **how: Any) -> None:
        raise AssertionError("trained or ranked again")

    with monkeypatch.context() as patch:
        patch.setattr("triewise.app.reproduce.train_run", never)
        patch.setattr("triewise.app.reproduce.evaluate_run", never)
        assert reproduce("msl-table-6", tmp_path, **ask).text == made.text
    assert made.as_json()["msl-ats"]["findings"][0]["what"] == "NDCG@10, trie"
    with pytest.raises(
        UserError, match="holds runs of a table; choose another --out, or leave --no-resume out"
    ):
        reproduce("msl-table-6", tmp_path, **ask, resume=False)


def test_a_run_of_an_older_version_is_of_the_same_recipe(world: dict[str, Any], tmp_path: Path) -> None:
    """It wrote fewer keys; a key that says something else makes it another run."""
    recipe = load_recipe("ledger/msl")
    assert not _is_of(tmp_path, recipe)
    text = dump_recipe(recipe)
    assert "soft_share = 0.5\n" in text
    (tmp_path / "recipe.toml").write_text(text.replace("soft_share = 0.5\n", ""), encoding="utf-8")
    assert _is_of(tmp_path, recipe) and not _is_of(tmp_path, recipe.changed("objective.soft_share=0.4"))
    (tmp_path / "recipe.toml").write_text("steps = [", encoding="utf-8")
    assert not _is_of(tmp_path, recipe)


def test_values_that_only_rank_share_one_training(world: dict[str, Any], tmp_path: Path) -> None:
    changes = [change for change in world["changes"] if not change.startswith("data.folder")]
    ask = world | {"changes": changes, "seeds": 1, "rows": ["no-training"], "scale": "small"}
    made = reproduce("igd-table-3", tmp_path, **ask)
    assert not made.rows[0].failed and made.rows[0].chosen.startswith("alpha = ")
    assert [p.parent.name for p in (tmp_path / "no-training").glob("*/run.json")] == ["trial-0"]
    assert len(list((tmp_path / "no-training" / "trial-0").glob("trial*.json"))) == 3
    chosen = float(made.rows[0].chosen.partition("= ")[2])
    assert load_evaluation(tmp_path / "no-training" / "trial-0").metrics["alpha"] == chosen


def test_a_table_that_was_killed_repeats_nothing(
    world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in its second row: what is done is neither trained nor ranked again, what is not is, once."""
    changes = [change for change in world["changes"] if not change.startswith("data.folder")]
    ask = world | {"changes": changes, "seeds": 1, "rows": ["lml", "msl"], "trials": 1, "scale": "small"}
    done: list[str] = []

    def train(recipe: Any, run: Path, **how: Any) -> Any:
        if "msl" in run.parts and not done.count("killed"):
            done.append("killed")
            raise KeyboardInterrupt
        done.append(f"{run.parent.name}/{run.name}")
        return train_run(recipe, run, **how)

    monkeypatch.setattr("triewise.app.reproduce.train_run", train)
    with pytest.raises(KeyboardInterrupt):
        reproduce("msl-table-6", tmp_path, **ask)
    made = reproduce("msl-table-6", tmp_path, **ask)
    assert done == ["lml/trial-0", "killed", "msl/trial-0"] and not any(r.failed for r in made.rows)
    prepared = tmp_path / "prepared" / "train.parquet"
    pl.read_parquet(prepared).head(40).write_parquet(prepared)  # other data under the same recipe
    (tmp_path / "prepared" / "dataset.json").touch()
    again = reproduce("msl-table-6", tmp_path, **ask)
    assert again.rows[0].failed or len(done) > 3, "runs of other data are no runs of this table"


def test_what_is_not_run_says_why(world: dict[str, Any], tmp_path: Path) -> None:
    made = reproduce("msl-table-5", tmp_path, data=world["data"], rows=["dllm2rec"], scale="small")
    assert "triewise teach" in made.rows[0].failed and made.html is None
    assert "| not run: its teacher's files are written first" in made.text
    assert made.as_json() == {"dllm2rec": {"failed": made.rows[0].failed}}


def test_a_table_of_shares_is_counted(world: dict[str, Any], tmp_path: Path) -> None:
    made = reproduce(
        "igd-table-1", tmp_path, data=world["data"], scale="small", changes=["backbone.tiny.vocabulary=300"]
    )
    assert not made.rows[0].failed, made.rows[0].failed
    (found,) = made.rows[0].findings
    assert 0 < found.ours < 100 and found.verdict == "the paper's number is not recorded"
    assert made.as_json()["titles"]["findings"][0]["ours"] == found.ours


def test_repetition_and_entropy_of_lists_stand_beside_the_papers(
    world: dict[str, Any], tmp_path: Path
) -> None:
    changes = [change for change in world["changes"] if not change.startswith("data.folder")]
    ask = world | {
        "changes": [*changes, "evaluation.k=12"],  # longer lists than the paper's ten
        "seeds": 1,
        "rows": ["alpha-0", "alpha-0-4"],
        "trials": 1,
        "scale": "small",
    }
    made = reproduce("igd-table-7", tmp_path, **ask)
    assert not any(r.failed for r in made.rows), [r.failed for r in made.rows]
    found = made.rows[1].findings[:2]
    assert [one.what for one in found] == ["repetition of first words", "entropy of scores, bits"]
    assert all(one.low <= one.ours + 1e-9 and one.ours <= one.high + 1e-9 for one in found)
    assert 0 < found[0].ours <= 1
    assert found[1].ours == pytest.approx(item_score_entropy(made.rows[1].evaluation.scores[:, :10]).mean())  # type: ignore[union-attr]


def test_time_and_deviation_of_seeds_stand_beside_the_papers(world: dict[str, Any], tmp_path: Path) -> None:
    changes = [change for change in world["changes"] if not change.startswith("data.folder")]
    ask = world | {"changes": changes, "seeds": 2, "rows": ["msl-ats", "lml"], "trials": 1, "scale": "small"}
    times = reproduce("msl-figure-7", tmp_path, **ask)
    first = times.rows[1].findings[0]
    assert (
        first.what.startswith("time of training, times that of MSL + ATS")
        and first.low <= first.ours <= first.high
    )
    spread = reproduce("msl-table-3", tmp_path, **ask)
    each = [run.metrics["NDCG@10"] for run in spread.rows[0].evaluation.runs]  # type: ignore[union-attr]
    assert spread.rows[0].findings[0].ours == pytest.approx(deviation(each)[0])
    assert "seeds</figcaption>" in (tmp_path / "report.html").read_text("utf-8").replace("seeds.<", "seeds<")
    toys = Wish(read_table("msl-table-3", "small"), "small", Path(), "toy", (), 2, None, n_items=11758)
    said = next(iter(_findings(toys, spread.rows[0], None)))
    assert (said.paper, said.verdict) == (2.0, "of llama-3-8b: not comparable")


def test_steam_is_prepared_by_the_rules_of_the_paper(tmp_path: Path) -> None:
    known = read_table("igd-table-6")
    recipe = load_recipe(known.rows["igd"].recipe, _common(known, tmp_path, known.data, None, None))
    assert (recipe.data.pipeline, recipe.data.max_history, recipe.data.k_core) == ("igd-steam", 10, 5)
    assert (recipe.data.split, recipe.evaluation.exclude) == ("time-growing", "none")
