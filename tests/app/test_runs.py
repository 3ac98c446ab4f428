"""Run folders: train, evaluate, compare, resume; what is refused and why."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.worlds import write_msl_folder
from triewise import load
from triewise.app import comparisons, evaluate_run, open_run, train_run
from triewise.app.assemble import assemble
from triewise.app.compare import collect
from triewise.app.exploring import example_rows
from triewise.app.folders import open_data
from triewise.decoding import rank_catalogue
from triewise.errors import UserError
from triewise.files import read_json, write_json, write_text
from triewise.ranking import load_evaluation
from triewise.recipe import Recipe, dump_recipe, parse_recipe
from triewise.tokens import zero_gain
from triewise.training import Examples, Objective, Stop, train


@pytest.fixture(scope="module")
def cycle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_msl_folder(tmp_path_factory.mktemp("raw") / "office")


def recipe(cycle: Path, name: str = "msl", **sections: dict) -> Recipe:
    """Everybody walks round a cycle of 12 titles, so a learner can be right every time."""
    values = {
        "name": name,
        "data": {"source": f"msl:{cycle}", "folder": str(cycle.parent / "prepared"), "max_history": 6},
        "backbone": {"tiny": {"vocabulary": 300, "width": 32, "layers": 2, "heads": 2, "feed_forward": 64}},
        "training": {
            "supervision": "every",
            "steps": 150,
            "batch_size": 32,
            "learning_rate": 1e-2,
            "log_every": 50,
        },
    }
    for section, changes in sections.items():
        values[section] = values.get(section, {}) | changes
    return parse_recipe(values, "test")


@pytest.fixture(scope="module")
def runs(cycle: Path) -> tuple[Path, Path]:
    """One trained and evaluated run with MSL, one with LML."""
    folders = cycle.parent / "msl", cycle.parent / "lml"
    for folder, support in zip(folders, ("trie", "vocabulary"), strict=True):
        train_run(recipe(cycle, folder.name, objective={"support": support}), folder)
        evaluate_run(folder)
    return folders


def test_a_known_world_is_learned(runs: tuple[Path, Path]) -> None:
    """The best possible HR@1 is 1; a learner must reach 90 % of it."""
    for run in runs:
        assert read_json(run / "metrics.json")["HR@1"] >= 0.9


def test_a_run_folder_has_what_it_promises(runs: tuple[Path, Path]) -> None:
    names = ["recipe.toml", "run.json", "model", "trie.npz", "catalog.parquet", "log.jsonl"]
    names += ["recommender.json", "metrics.json", "predictions.parquet"]
    assert not [name for name in names if not (runs[0] / name).exists()]
    facts = read_json(runs[0] / "run.json")
    assert facts["status"] == "trained"
    assert set(facts["hashes"]) == {"data", "prompt", "trie", "counts"}
    assert set(facts["versions"]) >= {"python", "torch", "transformers", "triewise"}
    rows = [json.loads(line) for line in (runs[0] / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [50, 100, 150]
    assert {"loss_zero_gain", "loss_positive_gain", "temperature", "w"} <= set(rows[0])


def test_a_run_that_was_stopped_says_so_and_at_which_step(
    cycle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a search over settings prunes a trial: the weights are there, and nobody takes them for the whole run's."""
    ends: list[Exception] = [Stop("pruned", {"NDCG@10": 0.1})]

    def validate(model: Any) -> dict[str, float]:
        if ends:
            raise ends.pop()
        return {"NDCG@10": 0.2}

    monkeypatch.setattr("triewise.app.runs.validator", lambda *args: validate)
    settings = recipe(cycle, "pruned", training={"steps": 8, "evaluate_every": 2})
    train_run(settings, tmp_path / "run")
    record = read_json(tmp_path / "run" / "run.json")
    assert (record["status"], record["training"]["stopped"], record["training"]["steps"]) == (
        *("stopped", "pruned"),
        2,
    )
    evaluate_run(tmp_path / "run")
    sentence = "pruned stopped early (pruned), after 2 steps: more steps may change its numbers."
    assert sentence in collect([tmp_path / "run"]).notes
    train_run(settings, tmp_path / "run", resume=True)
    record = read_json(tmp_path / "run" / "run.json")
    assert (record["status"], record["training"]["steps"]) == ("trained", 8)


def test_how_often_beams_drop_the_true_title(runs: tuple[Path, Path]) -> None:
    """Beside an exact ranking the same as alone, and what is dropped is no hit."""
    settings = open_run(runs[0])[0].evaluation
    assert "pruned@10" not in evaluate_run(runs[0]).metrics
    beside = evaluate_run(runs[0], settings.model_copy(update={"pruned": True}))
    alone = evaluate_run(runs[0], settings.model_copy(update={"search": "beam"}))
    assert beside.metrics["pruned@10"] == alone.metrics["pruned@10"] <= 1 - alone.metrics["HR@10"]
    assert beside.metrics["beam"]["NDCG@10"] == alone.metrics["NDCG@10"]
    assert "pruned" not in alone.metrics and "beam" not in alone.metrics
    few = settings.model_copy(update={"search": "beam", "beams": 12})
    assert evaluate_run(runs[0], few).metrics["pruned@12"] == 0, "as many beams as titles"
    evaluate_run(runs[0])


def test_beams_and_filters_in_an_evaluation(runs: tuple[Path, Path], tmp_path: Path) -> None:
    settings = open_run(runs[0])[0].evaluation
    exact = evaluate_run(runs[0])
    beam = evaluate_run(
        runs[0], settings.model_copy(update={"search": "beam", "beams": 12, "against_exact": True})
    )
    against = beam.metrics["against_exact"]
    assert against["users_with_all"] >= beam.certified.sum()
    assert against["missed_share"] == pytest.approx(
        np.mean([np.isin(e, b, invert=True).mean() for e, b in zip(exact.items, beam.items, strict=True)]),
        abs=1e-6,
    )
    assert against["metrics"]["HR@10"] == pytest.approx(exact.metrics["HR@10"])
    assert (beam.metrics["search"], beam.metrics["beams"]) == ("beam", 12)
    certified = beam.certified
    assert certified.any()
    assert beam.items[certified].tolist() == exact.items[certified].tolist()
    assert read_json(runs[0] / "metrics.json")["counters"]["token_forwards"] > 0
    ids = tmp_path / "stock.txt"
    ids.write_text("1\n\n3\n5\n", encoding="utf-8")
    for search in ("catalogue", "beam"):
        some = evaluate_run(runs[0], settings.model_copy(update={"search": search, "allow": ids}))
        assert set(some.items.ravel().tolist()) == {-1, 0, 2, 4}
        assert (some.rank[~np.isin(some.target, [0, 2, 4])] == -1).all()
    report = collect([runs[0]])
    assert "beam search with 10 beams" in report.subtitle
    assert "only the items of stock.txt are returned" in report.subtitle
    with pytest.raises(UserError, match="evaluated with allow = "):
        comparisons([some, exact])
    ids.write_text("1\nnone\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"got 'none' \(1 unknown ids\)"):
        evaluate_run(runs[0], settings.model_copy(update={"allow": ids}))
    with pytest.raises(UserError, match="wanted a file of item ids in .*nowhere"):
        evaluate_run(runs[0], settings.model_copy(update={"allow": tmp_path / "nowhere"}))
    evaluate_run(runs[0])


def test_lemma_1_bounds_the_ranking_by_the_losses(runs: tuple[Path, Path]) -> None:
    """MSL's Lemma 1: -ln NDCG of the full ranking by P_valid <= MSL <= LML, for every test user."""
    from triewise.data import load_dataset
    from triewise.decoding import TrieEngine

    rec = load(runs[1])
    test = load_dataset(Path(read_json(runs[1] / "run.json")["data"]["folder"])).test
    prompts = [rec.prompts.encode(history) for history in test.history]
    target_group = rec.groups.of_item[test.target]
    nll = {}
    for support in ("trie", "vocabulary"):
        ranking = rank_catalogue(TrieEngine(rec.backbone.model, rec.trie, support), prompts)
        match = rec.groups.of_item[ranking.items] == target_group[:, None]
        nll[support] = -ranking.scores[match]
        if support == "trie":
            negative_log_ndcg = np.log(np.log2(match.argmax(1) + 2))
    assert (negative_log_ndcg <= nll["trie"] + 1e-4).all()
    assert (nll["trie"] <= nll["vocabulary"] + 1e-4).all()


def test_the_same_recipe_gives_the_same_bytes(cycle: Path, runs: tuple[Path, Path], tmp_path: Path) -> None:
    again = tmp_path / "again"
    train_run(recipe(cycle), again)
    evaluate_run(again)
    assert (again / "predictions.parquet").read_bytes() == (runs[0] / "predictions.parquet").read_bytes()
    one, other = (read_json(run / "metrics.json") for run in (again, runs[0]))
    one.pop("timing"), other.pop("timing")
    assert one == other


def test_an_evaluation_is_read_back(runs: tuple[Path, Path]) -> None:
    evaluation = load_evaluation(runs[0])
    assert evaluation.per_user("HR@10").mean() == pytest.approx(evaluation.metrics["HR@10"])
    found = comparisons([evaluation, load_evaluation(runs[1])])
    assert [(c.a, c.b, c.metric) for c in found] == [("msl", "lml", "HR@10"), ("msl", "lml", "NDCG@10")]
    assert all(c.low <= c.difference <= c.high for c in found)


def test_other_settings_of_one_model(runs: tuple[Path, Path]) -> None:
    loaded, _ = open_run(runs[0])
    settings = loaded.evaluation.model_copy(update={"support": "vocabulary", "users": 7, "split": "valid"})
    metrics = evaluate_run(runs[0], settings).metrics
    assert (metrics["support"], metrics["n_users"], metrics["split"]) == ("vocabulary", 7, "valid")
    evaluate_run(runs[0])


def test_length_penalty_and_alpha_are_one_key_away(runs: tuple[Path, Path]) -> None:
    loaded, _ = open_run(runs[0])
    settings = loaded.evaluation.model_copy(update={"length_penalty": 1.0, "alpha": 0.4})
    other = evaluate_run(runs[0], settings)
    assert (other.metrics["length_penalty"], other.metrics["alpha"]) == (1.0, 0.4)
    plain = evaluate_run(runs[0])
    assert not np.array_equal(other.scores, plain.scores)


def test_a_resumed_run_may_report_and_stop_differently(cycle: Path, tmp_path: Path) -> None:
    train_run(recipe(cycle, training={"steps": 4, "time_limit_s": 1e-9}), tmp_path / "run")
    result = train_run(recipe(cycle, training={"steps": 4}), tmp_path / "run", resume=True)
    assert (result.steps_done, result.stopped) == (4, "steps")


def test_files_of_others_are_left_alone(cycle: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").write_text("precious", encoding="utf-8")
    with pytest.raises(UserError, match="wanted a new or empty folder for the run, but .* holds model"):
        train_run(recipe(cycle), tmp_path)
    assert (tmp_path / "model" / "mine").read_text(encoding="utf-8") == "precious"


def test_a_failed_overwrite_leaves_the_old_run_whole(cycle: Path, runs: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match="nowhere"):
        bad = recipe(cycle, data={"source": "msl:nowhere", "folder": str(cycle.parent / "none")})
        train_run(bad, runs[0], overwrite=True)
    assert load(runs[0]).recommend([[0]], k=1).items.shape == (1, 1)
    assert load_evaluation(runs[0]).metrics["name"] == "msl"


def test_more_training_takes_the_old_metrics_away(cycle: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_run(recipe(cycle, training={"steps": 4, "time_limit_s": 1e-9}), run)
    evaluate_run(run)
    train_run(recipe(cycle, training={"steps": 4}), run, resume=True)
    assert not (run / "metrics.json").exists()
    evaluate_run(run)
    train_run(recipe(cycle, training={"steps": 4}), run, resume=True)
    assert (run / "metrics.json").exists(), "nothing was trained, so they still speak of these weights"


def test_only_like_is_compared_with_like(cycle: Path, runs: tuple[Path, Path]) -> None:
    settings = open_run(runs[0])[0].evaluation.model_copy(update={"exclude": "history"})
    other = evaluate_run(runs[0], settings)
    with pytest.raises(
        UserError, match="was evaluated with exclude = 'none' and msl with 'history'; evaluate both alike"
    ):
        comparisons([load_evaluation(runs[1]), other])
    popular = collect([runs[0]]).rows[-1]
    evaluate_run(runs[0])
    assert popular.metrics != collect([runs[0]]).rows[-1].metrics


def test_a_report_is_collected(runs: tuple[Path, Path]) -> None:
    report = collect(list(runs))
    assert [row.name for row in report.rows] == ["msl", "lml", "item-kNN", "most popular"]
    assert set(report.curves) == {"msl", "lml"}
    assert len(report.examples) == 3
    for example in report.examples:
        for found in example.recommendations:
            assert "".join(token.text for token in found.tokens) == found.title


def test_runs_that_differ_in_the_seed_alone_are_one_row(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """Mean and deviation over seeds; users are compared by their mean over the runs."""
    first, again = runs[0], tmp_path / "again"
    shutil.copytree(runs[1], again)  # other weights stand for another seed
    one = open_run(first)[0]
    training = one.training.model_copy(update={"time_limit_s": 1e3, "log_every": 7, "workers": 1})
    other = one.model_copy(update={"seed": 1, "name": "again", "training": training})
    write_text(again / "recipe.toml", dump_recipe(other))
    write_json(again / "run.json", {k: v for k, v in read_json(again / "run.json").items() if k != "files"})
    report = collect([first, again, runs[1]])
    several, alone = report.rows[:2]
    each = [load_evaluation(folder).metrics["NDCG@10"] for folder in (first, again)]
    assert (several.name, alone.name, len(report.rows)) == ("msl", "lml", 4)
    assert several.note.endswith("; 2 seeds")
    assert several.metrics["NDCG@10"] == pytest.approx(np.mean(each))
    assert several.deviations["NDCG@10"] == pytest.approx(np.std(each, ddof=1))
    low, high = several.intervals["NDCG@10"]
    assert low <= several.metrics["NDCG@10"] <= high
    assert not alone.deviations
    assert list(report.curves) == ["msl", "msl, seed 1", "lml"]
    c = report.comparisons[0]
    assert c.difference == pytest.approx(several.metrics[c.metric] - alone.metrics[c.metric])
    ranked = read_json(again / "metrics.json") | {"search": "beam", "support": "vocabulary"}
    write_json(again / "metrics.json", ranked)
    apart = collect([first, again], popular=False)
    assert len(apart.rows) == 2, "ranked in another way it is no second seed"
    assert "beam, vocabulary support" in apart.rows[1].note and "beam" not in apart.rows[0].note
    assert "exactly where a row says nothing else" in apart.subtitle
    twice = collect([first, first], popular=False)
    assert [len(r.deviations) for r in twice.rows] == [0, 0], "one run given twice is no second seed"


def test_example_rows_are_chosen_by_rule() -> None:
    class Fake:
        rank = np.array([30, 200, 3, -1, 0])
        items = np.zeros((5, 10))

    assert example_rows(Fake()) == [2, 0, 1]  # type: ignore[arg-type]


def test_validation_early_stopping_and_the_final_fit(cycle: Path, tmp_path: Path) -> None:
    small = {"steps": 12, "evaluate_every": 4, "patience": 1, "valid_users": 10, "learning_rate": 1e-9}
    result = train_run(recipe(cycle, training=small), tmp_path / "a")
    assert (result.stopped, result.steps_done, result.best_step) == ("patience", 8, 4)
    both = train_run(recipe(cycle, training={"steps": 2, "rows": "train+valid"}), tmp_path / "b")
    assert both.steps_done == 2
    facts = [read_json(tmp_path / name / "run.json") for name in "ab"]
    assert facts[1]["targets"] > facts[0]["targets"]


@pytest.mark.parametrize(
    "objective",
    [
        {"support": "trie", "temperature": "adaptive", "normaliser": "decisions"},
        {"support": "vocabulary", "weight": "igd", "beta": 0.2},
        {"support": "trie", "weight": "igd", "beta": 0.2, "temperature": 2.0},
    ],
    ids=["msl+ats", "igd", "msl+igd"],
)
def test_every_objective_trains_from_a_recipe(cycle: Path, tmp_path: Path, objective: dict) -> None:
    brief = {"steps": 30, "log_every": 10}
    result = train_run(recipe(cycle, objective=objective, training=brief), tmp_path / "run")
    losses = [row["loss"] for row in result.history if "loss" in row]
    assert losses[-1] < losses[0]


def test_instruction_prompts_train_with_the_last_title_as_target(cycle: Path, tmp_path: Path) -> None:
    changed = recipe(cycle, backbone={"template": "msl"}, training={"supervision": "last", "steps": 2})
    assert train_run(changed, tmp_path / "run").steps_done == 2
    assert load(tmp_path / "run").recommend([[0, 1]], k=3).items.shape == (1, 3)


def test_what_is_refused(cycle: Path, runs: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="already holds a run; choose another --out, or add --resume or --overwrite"
    ):
        train_run(recipe(cycle), runs[0])
    with pytest.raises(UserError, match="was started with another recipe"):
        train_run(recipe(cycle, training={"steps": 5}), runs[0], resume=True)
    with pytest.raises(
        UserError, match="was prepared from msl:.* with histories of 6, the recipe wants msl:.* and 5"
    ):
        train_run(recipe(cycle, data={"max_history": 5}), tmp_path / "other")
    with pytest.raises(UserError, match="exclude = 'seen' needs everything a user had before"):
        evaluate_run(runs[0], recipe(cycle, evaluation={"exclude": "seen"}).evaluation)
    assert not (tmp_path / "other").exists()
    with pytest.raises(UserError, match="has no run.json"):
        open_run(tmp_path)
    (tmp_path / "run.json").write_text('{"status": "training"}', encoding="utf-8")
    with pytest.raises(UserError, match="has not ended; go on with: triewise train"):
        open_run(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        train_run(recipe(cycle), tmp_path / "run.json")


def test_full_training_in_bfloat16_moves_the_weights_as_float32_does(cycle: Path, tmp_path: Path) -> None:
    """Weights stay float32 under autocast; bfloat16 weights, the control, lose most of so small steps."""
    moved = {}
    for dtype in ("float32", "bfloat16", "weights"):
        small = {
            "steps": 60,
            "learning_rate": 2e-5,
            "batch_size": 8,
            "warmup_steps": 0,
            "schedule": "constant",
        }
        chosen = recipe(cycle, training=small, backbone={"dtype": dtype if dtype != "weights" else "float32"})
        parts = assemble(chosen, open_data(chosen))
        model = parts.backbone.model
        assert parts.autocast is (dtype == "bfloat16")
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        if dtype == "weights":
            model.to(torch.bfloat16)
        before = [p.detach().clone() for p in model.parameters()]
        gain = zero_gain(parts.trie, parts.counts)
        examples = Examples(parts.windows, parts.prompts, parts.trie, None, gain)
        train(model, examples, Objective(), chosen.training, tmp_path / dtype, autocast=parts.autocast)
        moved[dtype] = np.array(
            [float((p.detach() - old).abs().sum()) for p, old in zip(model.parameters(), before, strict=True)]
        )
    assert moved["bfloat16"].sum() == pytest.approx(moved["float32"].sum(), rel=0.05)
    assert (moved["bfloat16"] > 0).all()
    assert moved["weights"].sum() < 0.5 * moved["float32"].sum() and (moved["weights"] == 0).any()


def test_full_training_in_float16_is_refused(cycle: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="float32 or bfloat16 to train every weight, got 'float16'"):
        train_run(recipe(cycle, backbone={"dtype": "float16"}), tmp_path / "run")
