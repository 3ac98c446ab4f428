"""D3's assistant: hand cases for every search, both kinds of recommender, what is refused, saved and chosen."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from triewise.app.answer import answer

import triewise
from tests import worlds
from tests.worlds import HISTORIES
from triewise.app import changed_evaluation, evaluate_run, report_runs, train_run
from triewise.cli import main
from triewise.errors import UserError
from triewise.files import read_json
from triewise.models import SequentialModel
from triewise.ranking import Groups, ItemLists, Ranking, rank_items
from triewise.recipe import Recipe, parse_recipe
from triewise.recommenders import GenerativeRecommender, SequentialRecommender, choose_search, choose_weight
from triewise.recommenders.assistants import by_group, log_probabilities, title_log_probabilities
from triewise.recommenders.search_choice import choose_gamma
from triewise.serving import answer
from triewise.settings import EncoderSettings
from triewise.testing import RecommenderContract

# Titles 3 and 4 are equal: the better of them, 6, counts once. Together 36.
MASS = np.array([1.0, 2.0, 3.0, 4.0, 6.0, 5.0, 7.0, 8.0, 4.0])
SHARE = np.array([1, 2, 3, 6, 5, 7, 8, 4]) / 36  # of the eight titles


@dataclass(frozen=True)
class Known:
    """Everybody gets item i with a probability in proportion to its mass."""

    groups: Groups
    mass: np.ndarray

    def item_scores(self, histories: ItemLists) -> np.ndarray:
        return np.tile(np.log(self.mass), (len(histories), 1)).astype(np.float32)

    def recommend(self, histories: ItemLists, k: Any = 10, exclude: Any = None, allow: Any = None) -> Ranking:
        return rank_items(self, histories, k, exclude, allow)


def known(mass: np.ndarray = MASS) -> Known:
    return Known(Groups.from_labels(worlds.catalog().group, np.arange(9)), mass)


def sequential(**changes: Any) -> SequentialRecommender:
    shape = EncoderSettings(encoder="gru4rec", width=8, blocks=1, heads=2, dropout=0.0, head="linear")
    return SequentialRecommender(SequentialModel(shape, 9, 5, 1), worlds.catalog(), np.arange(9), **changes)


class TestAssisted(RecommenderContract):
    @staticmethod
    def make() -> GenerativeRecommender:
        return worlds.recommender(assistant=known(), assistant_weight=0.4, batch_users=3)


class TestAssistedWithBeamsInVocabularySupport(RecommenderContract):
    @staticmethod
    def make() -> GenerativeRecommender:
        return worlds.recommender(
            assistant=known(), assistant_weight=0.4, search="beam", beams=10, support="vocabulary"
        )


class TestAssistedGrounding(RecommenderContract):
    @staticmethod
    def make() -> GenerativeRecommender:
        return worlds.recommender(assistant=known(), search="grounding", gamma=2.0, text_tokens=6)


class TestAssistedSequential(RecommenderContract):
    @staticmethod
    def make() -> SequentialRecommender:
        return sequential(assistant=known(), assistant_weight=0.4)


def test_the_shares_are_those_of_titles() -> None:
    found = log_probabilities(known(), [[0], []])
    assert found.shape == (2, 9)
    assert np.exp(found[0]) == pytest.approx([*SHARE[:3], 0, 6 / 36, *SHARE[4:]], abs=1e-6)
    model = worlds.recommender(length_penalty=1.0, alpha=0.2, search="beam")
    plain = worlds.recommender().recommend(HISTORIES, None)
    assert np.exp(log_probabilities(model, HISTORIES)).sum(1) == pytest.approx(np.ones(4))
    assert by_group(plain, model.groups) == pytest.approx(
        title_log_probabilities(model, HISTORIES, model.groups), abs=1e-5
    )


@pytest.mark.parametrize("support", ["trie", "vocabulary"])
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_every_search_weighs_model_and_assistant_alike(support: str, penalty: float) -> None:
    alone = worlds.recommender(support=support, length_penalty=penalty)
    groups, length = alone.groups, alone.trie.depth[np.unique(alone.trie.leaf)]
    own = by_group(alone.recommend(HISTORIES, None), groups)
    share = np.log(np.bincount(groups.of_item, np.where(np.arange(9) == 3, 0, MASS)) / 36)
    for a in (0.0, 0.3, 1.0):
        wanted = a * own + (1 - a) * share / length**penalty
        for search in ("catalogue", "exact", "beam"):
            assisted = alone.with_settings(
                search=search, beams=10, assistant=known(), assistant_weight=a, batch_users=3
            )
            ranking = assisted.recommend(HISTORIES, 8)
            assert by_group(ranking, groups) == pytest.approx(wanted, abs=2e-4)
            assert ranking.certified.all()
        both = assisted.parts(HISTORIES)
        assert a * both[0] + (1 - a) * both[1] == pytest.approx(wanted, abs=2e-4)
    at_zero = alone.with_settings(length_penalty=0.0, assistant=known(), assistant_weight=0.0)
    first = np.argsort(-share, kind="stable")[:3]
    assert groups.of_item[at_zero.recommend([[0]], 3).items[0]].tolist() == first.tolist()
    at_one = alone.with_settings(assistant=known(), assistant_weight=1.0).recommend(HISTORIES, 8)
    assert (at_one.scores == alone.recommend(HISTORIES, 8).scores).all()


def test_a_sequential_model_is_assisted_and_assists() -> None:
    model, titles = sequential(), worlds.recommender()
    groups = model.groups
    own = model.own_scores(HISTORIES).astype(float)
    own = np.delete(own, 3, 1) if (own[:, 4] > own[:, 3]).all() else np.delete(own, 4, 1)
    own -= np.log(np.exp(own).sum(1, keepdims=True))  # softmax over titles, by first member
    said = by_group(titles.recommend(HISTORIES, None), groups)
    for a in (0.0, 0.3):
        assisted = model.with_settings(assistant=titles, assistant_weight=a)
        assert by_group(assisted.recommend(HISTORIES, None), groups) == pytest.approx(
            a * own + (1 - a) * said, abs=1e-4
        )
        other = titles.with_settings(assistant=model, assistant_weight=a)
        assert by_group(other.recommend(HISTORIES, None), groups) == pytest.approx(
            a * said + (1 - a) * own, abs=1e-4
        )
    unasked = model.with_settings(assistant=titles, assistant_weight=1.0)
    assert (unasked.item_scores(HISTORIES) == model.item_scores(HISTORIES)).all()
    # What assists speaks for itself: its own assistant is not asked.
    chain = titles.with_settings(assistant=assisted, assistant_weight=0.3)
    assert by_group(chain.recommend(HISTORIES, None), groups) == pytest.approx(
        by_group(other.recommend(HISTORIES, None), groups), abs=1e-4
    )


def test_grounding_injects_the_assistant() -> None:
    recommender = worlds.recommender(search="grounding", gamma=3.0, text_tokens=6, assistant=known())
    share = np.log(SHARE)
    unit = (share - share.min()) / (share.max() - share.min())
    order = [recommender.groups.of_item[i] for i in (0, 1, 2, 3, 5, 6, 7, 8)]
    assert recommender.grounded.weights([[0]])[0][order] == pytest.approx(unit, abs=1e-6)
    assert recommender.used["gamma"] == 3.0
    assert (recommender.used["assistant"], "assistant_weight" in recommender.used) == ("Known", False)
    gamma, _ = choose_gamma(recommender.grounded, worlds.split([[0], [1]], [6, 7]))
    assert 0 <= gamma <= 99


def test_what_cannot_assist_is_refused(tmp_path: Path) -> None:
    titles = worlds.TITLES
    with pytest.raises(UserError, match=r"the same catalogue of 9 items, got one of 9 others"):
        worlds.recommender(assistant=worlds.recommender((*titles[:-1], "Heat")), assistant_weight=0.5)
    with pytest.raises(UserError, match="the same catalogue of 9 items, got one of 3 others"):
        sequential(assistant=worlds.recommender(titles[:3]), assistant_weight=0.5)
    with pytest.raises(UserError, match=r"wanted assistant_weight in \[0, 1\], got 2"):
        sequential(assistant=known(), assistant_weight=2)
    with pytest.raises(UserError, match="assistant_weight < 1 needs an assistant"):
        sequential(assistant_weight=0.5)
    with pytest.raises(UserError, match="scores every item, got a GroundedRecommender"):
        worlds.recommender(assistant=worlds.recommender().grounded, assistant_weight=0.5).recommend([[0]])
    with pytest.raises(UserError, match="got one in memory; save it, and give the one"):
        sequential(assistant=known(), assistant_weight=0.5).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="whose assistant stays on this machine"):
        worlds.recommender(assistant=known(), assistant_weight=0.5).push_to_hub("a/b")


@pytest.mark.parametrize("kind", ["generative", "sequential"])
def test_a_saved_recommender_names_its_assistant(kind: str, tmp_path: Path) -> None:
    models = {"generative": worlds.recommender(), "sequential": sequential()}
    helper = models.pop("sequential" if kind == "generative" else "generative")
    helper.save_pretrained(tmp_path / "helper")
    alone = models[kind]
    assisted = alone.with_settings(assistant=triewise.load(tmp_path / "helper"), assistant_weight=0.25)
    assisted.save_pretrained(tmp_path / "run")
    manifest = read_json(tmp_path / "run" / "recommender.json")
    assert (manifest["assistant"], manifest["assistant_weight"]) == (str(tmp_path / "helper"), 0.25)
    loaded = triewise.load(tmp_path / "run")
    assert loaded.recommend(HISTORIES, 5).scores == pytest.approx(
        assisted.recommend(HISTORIES, 5).scores, abs=1e-4
    )
    shutil.move(tmp_path / "helper", tmp_path / "away")
    with pytest.raises(UserError, match="wanted the assistant of .*, which is no folder; bring it back"):
        triewise.load(tmp_path / "run")
    unassisted = triewise.load(tmp_path / "run", assistant=False)
    assert unassisted.recommend(HISTORIES, 5).scores == pytest.approx(
        alone.recommend(HISTORIES, 5).scores, abs=1e-4
    )


def test_the_weight_is_chosen_on_validation_rows() -> None:
    # The assistant knows that everybody takes one title; of equally good weights the larger one is chosen.
    target = int(worlds.recommender().recommend([[0, 1]], None).items[0, -1])
    valid = worlds.split([[0, 1], [2], [5, 6], [4]], [target] * 4)
    knows = known(np.where(np.arange(9) == target, 1e6, 1.0))
    recommender = worlds.recommender(assistant=knows, assistant_weight=0.5)
    weight, choice = choose_weight(recommender, valid)
    values = {}
    for a in np.arange(11) / 10:
        ranking = recommender.with_settings(assistant_weight=a).recommend(list(valid.history), None)
        place = (ranking.items == target).argmax(1)
        values[f"{a:g}"] = float((1 / np.log2(place + 2)).mean())
    assert choice["tried"] == pytest.approx(values)
    assert (choice["by"], choice["rows"], weight) == (
        "NDCG@10",
        4,
        max(a / 10 for a in range(11) if values[f"{a / 10:g}"] == 1),
    )
    assert 0 < weight < 1
    same = recommender.with_settings(assistant=worlds.recommender())
    assert choose_weight(same, valid)[0] == 1.0
    with pytest.raises(UserError, match="assistant_weight = 'choose' needs validation rows"):
        choose_weight(recommender, worlds.split([], []))


def recipe(cycle: Path, name: str, **sections: Any) -> Recipe:
    values: dict[str, Any] = {
        "name": name,
        "data": {"source": f"msl:{cycle}", "folder": str(cycle.parent / "prepared"), "max_history": 6},
        "training": {"supervision": "every", "steps": 20, "batch_size": 16, "learning_rate": 1e-2},
    }
    for section, changes in sections.items():
        values[section] = values.get(section, {}) | changes
    return parse_recipe(values, "test")


TINY = {"tiny": {"vocabulary": 300, "width": 16, "layers": 1, "heads": 2, "feed_forward": 32}}
GRU = {"encoder": "gru4rec", "width": 16}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Raw data, a trained language model and a trained sequential one."""
    root = tmp_path_factory.mktemp("assist")
    cycle = worlds.write_msl_folder(root / "office", n_users=10)
    train_run(recipe(cycle, "words", backbone=TINY), root / "words")
    train_run(recipe(cycle, "items", sequential=GRU), root / "items")
    return cycle, root / "words", root / "items"


def test_evaluate_chooses_and_records(runs: tuple[Path, Path, Path], capsys: Any, monkeypatch: Any) -> None:
    _, words, items = runs
    for run, helper in ((words, items), (items, words)):
        settings = changed_evaluation(run, [f"evaluation.assistant={helper}"])
        metrics = evaluate_run(run, settings).metrics
        tried = metrics["chosen_weight"]["tried"]
        assert max(tried, key=lambda a: (tried[a], float(a))) == f"{metrics['assistant_weight']:g}"
        assert (metrics["assistant"], metrics["chosen_weight"]["rows"]) == (str(helper), 10)
        card = (run / "README.md").read_text(encoding="utf-8")
        assert f"assistant = {helper.name}" in card.replace("\\", "")
        assert str(helper) not in card
    report = report_runs([words, items], words / "report.html")
    assert "; assisted by items, own weight " in report.rows[0].note
    given = changed_evaluation(items, [f"evaluation.assistant={words}", "evaluation.assistant_weight=1"])
    unasked = evaluate_run(items, given)
    alone = evaluate_run(items)
    assert (unasked.rank == alone.rank).all()
    assert "chosen_weight" not in unasked.metrics
    searches = [f"evaluation.assistant={items}", "evaluation.choose=['exact', 'grounding']"]
    both = evaluate_run(words, changed_evaluation(words, [*searches, "evaluation.text_tokens=6"])).metrics
    assert {"chosen", "chosen_weight"} <= set(both)
    with pytest.raises(UserError, match="the same catalogue"):
        worlds.recommender(assistant=triewise.load(items), assistant_weight=0.5)
    evaluate_run(words)


def test_a_run_whose_recipe_has_an_assistant(
    runs: tuple[Path, Path, Path], tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    cycle, words, items = runs
    monkeypatch.chdir(items.parent)  # a relative folder counts from here, and is absolute from then on
    made = recipe(cycle, "helped", sequential=GRU, evaluation={"assistant": "words"})
    train_run(made, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert f'assistant = "{words}"' in (tmp_path / "run" / "recipe.toml").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="is chosen when it is evaluated; run: triewise evaluate"):
        triewise.load(tmp_path / "run")
    metrics = evaluate_run(tmp_path / "run").metrics
    loaded = triewise.load(tmp_path / "run")
    assert loaded.used == {
        "search": "catalogue",
        "support": "items",
        "assistant": str(words),
        "assistant_weight": metrics["assistant_weight"],
    }
    monkeypatch.setattr("sys.argv", ["triewise", "recommend", "run", "--history", "Red", "-k", "2"])
    with pytest.raises(SystemExit, match="0"):
        main()
    shown = capsys.readouterr().out
    best = loaded.recommend([[loaded.catalog.index("Red")]], 2, "history")
    assert all(title in shown for title in best.titles(loaded.catalog)[0])
    with pytest.raises(UserError, match="wanted a run folder, but .*nowhere has no run.json"):
        train_run(recipe(cycle, "x", sequential=GRU, evaluation={"assistant": "nowhere"}), tmp_path / "x")


def test_who_saw_the_validation_rows_chooses_nothing(runs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    cycle, words, _ = runs
    final = {"rows": "train+valid", "steps": 1}
    train_run(recipe(cycle, "final", sequential=GRU, training=final), tmp_path / "final")
    for change in ("assistant_weight='choose'", "split='valid'"):
        settings = changed_evaluation(
            words,
            [
                f"evaluation.assistant={tmp_path / 'final'}",
                "evaluation.assistant_weight=0.5",
                f"evaluation.{change}",
            ],
        )
        with pytest.raises(UserError, match="the assistant .* was trained on the validation rows"):
            evaluate_run(words, settings)
    given = changed_evaluation(
        words, [f"evaluation.assistant={tmp_path / 'final'}", "evaluation.assistant_weight=0.5"]
    )
    assert evaluate_run(words, given).metrics["assistant_weight"] == 0.5
    evaluate_run(words)


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        (
            {"evaluation": {"assistant_weight": 1.5}},
            r"evaluation.assistant_weight: .* less than or equal to 1, got 1.5",
        ),
        (
            {"evaluation": {"assistant": "x"}, "training": {"rows": "train+valid"}},
            "evaluation.assistant_weight looks at the validation rows",
        ),
    ],
)
def test_what_a_recipe_may_not_ask(sections: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=problem):
        recipe(tmp_path, "x", **sections)


def test_a_sequential_model_has_no_search_and_no_tokens() -> None:
    settings = recipe(Path("x"), "x").evaluation.model_copy(update={"choose": ("beam",)})
    with pytest.raises(UserError, match="a sequential model scores every item: wanted no search"):
        choose_search(sequential(), worlds.split([[0]], [1]), settings)
    with pytest.raises(UserError, match="which scores items and writes no titles; leave explain out"):
        answer(sequential(), [["Alien (1979)"]], explain=True)
