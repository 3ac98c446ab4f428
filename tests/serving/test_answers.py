"""Titles or ids in, titles with scores and tokens out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import worlds
from triewise import load
from triewise.app import folders
from triewise.cli import main
from triewise.errors import UserError
from triewise.ranking import Groups, MostPopular
from triewise.recommenders import GenerativeRecommender, load as load_anything
from triewise.recommenders.search_choice import choose_gamma
from triewise.reports import addressed
from triewise.serving import answer


@pytest.fixture(scope="module")
def recommender() -> GenerativeRecommender:
    return worlds.recommender()


def test_titles_in_titles_out(recommender: GenerativeRecommender) -> None:
    histories = [["Alien (1979)", "Alien 4"], ["Brazil (1985)"], []]
    answers = answer(recommender, histories, k=4, exclude=["two\nlines"])
    ranking = recommender.recommend([[0], [3], []], 4, [[0, 8], [3, 4, 8], [8]])
    assert [[r.title for r in a.recommendations] for a in answers.of_each] == ranking.titles(
        recommender.catalog
    )
    assert [[r.score for r in a.recommendations] for a in answers.of_each] == ranking.scores.tolist()
    assert [a.unknown for a in answers.of_each] == [("Alien 4",), (), ()]
    assert answers.of_each[0].as_json()["unknown"] == ["Alien 4"]
    assert all(a.certified for a in answers.of_each)
    assert "tied" not in answers.of_each[0].as_json()
    recommender.engine.tolerance = 50.0  # what half precision would measure
    rounded = answer(recommender, histories, k=4, exclude=["two\nlines"]).of_each
    recommender.engine.tolerance = None
    assert [a.as_json()["tied"] for a in rounded] == [4, 4, 4]
    assert answers.counters == ranking.counters
    by_id = answer(recommender, [["raw-0"], ["raw-3"], []], k=4, by="id", exclude=["raw-8"])
    assert [a.recommendations for a in by_id.of_each] == [a.recommendations for a in answers.of_each]


def test_filters(recommender: GenerativeRecommender) -> None:
    kept = answer(recommender, [["Alien (1979)"]], k=9, keep_history=True).of_each[0].recommendations
    assert {r.title for r in kept} == set(worlds.TITLES)
    only = answer(recommender, [["Alien (1979)"]], k=9, allow=[0, 1, 4]).of_each[0].recommendations
    assert {r.item for r in only} == {1, 4}
    with pytest.raises(UserError, match=r"got 'Alien'; the nearest are 'Alien \(1979\)'"):
        answer(recommender, [["Alien"]], strict=True)
    with pytest.raises(UserError, match="got 'Nothing'"):
        answer(recommender, [[]], exclude=["Nothing"])
    with pytest.raises(UserError, match=r"wanted an item id of the catalogue \(9 items\), got 'raw-9'"):
        answer(recommender, [["raw-9"]], by="id", strict=True)


def test_tokens_that_decided(recommender: GenerativeRecommender) -> None:
    told = answer(recommender, [["Alien (1979)"]], k=8, explain=True).of_each[0].recommendations
    for recommended in told:
        tokens = recommended.as_json()["tokens"]
        assert "".join(token["text"] for token in tokens) == recommended.title
        assert math.log(math.prod(t["probability"] for t in tokens)) == pytest.approx(
            recommended.score, abs=1e-4
        )
        assert all(token["probability"] == 1 for token in tokens if not token["decided"])
        assert any(token["decided"] for token in tokens)


def test_the_command_marks_what_decided(
    recommender: GenerativeRecommender, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    recommender.save_pretrained(tmp_path / "run")
    words = ["--history", "Brazil (1985)", "-k", "3", "--explain"]
    monkeypatch.setattr("sys.argv", ["triewise", "recommend", str(tmp_path / "run"), *words])
    with pytest.raises(SystemExit, match="0"):
        main()
    *lines, legend = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all("[" in line for line in lines)
    assert legend.startswith("[brackets]: tokens that decided")


def test_a_ranking_names_only_what_is_there(recommender: GenerativeRecommender) -> None:
    ranking = recommender.recommend([[0], [0]], 3, allow=[[1], []])
    assert ranking.titles(recommender.catalog) == [["Aliens (1986)"], []]


@pytest.mark.parametrize("name", ["runs/typo", "./typo", "../typo", "~/typo", "a/b/c", "runs\\typo", "typo"])
def test_what_looks_like_a_path_is_never_asked_of_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("triewise.recommenders.saved.download", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match="is no folder; train one first"):
        load(name)


def test_a_hub_id_is_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    worlds.recommender().save_pretrained(tmp_path / "snapshot")
    monkeypatch.setattr("triewise.recommenders.saved.download", lambda *_: tmp_path / "snapshot")
    assert load("someone/something").catalog.n_items == 9


def test_a_run_folder_is_loaded_as_its_recipe_says(tmp_path: Path) -> None:
    recommender = worlds.recommender()
    recommender.save_pretrained(tmp_path)
    text = 'name = "x"\n[data]\nsource = "ml-100k"\n[backbone]\ndtype = "bfloat16"\ndevice = "cpu"\n'
    (tmp_path / "recipe.toml").write_text(text, encoding="utf-8")
    assert str(load(tmp_path).backbone.model.dtype) == "torch.bfloat16"
    assert str(load(tmp_path, dtype="float32").backbone.model.dtype) == "torch.float32"
    assert load is load_anything


def test_what_the_users_had_must_be_known_where_it_is_excluded() -> None:
    with pytest.raises(UserError, match="exclude = 'seen' needs everything a user had before"):
        choose_gamma(worlds.recommender().grounded, worlds.split([[0]], [1]), "seen")


def test_a_source_tree_without_an_install_has_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "triewise":
            raise folders.importlib.metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr("importlib.metadata.version", version)
    assert (folders.versions()["triewise"], folders.versions()["torch"]) == ("source tree", "1")


def test_a_card_of_the_package_under_its_former_name_is_addressed_too() -> None:
    card = 'import trierec\n\nrecommender = trierec.load("runs/x")\n'
    assert addressed(card, "a/b") == 'import triewise\n\nrecommender = triewise.load("a/b")\n'


def test_a_small_recommender_needs_no_more_than_groups_and_recommend() -> None:
    popular = MostPopular(Groups.from_labels(worlds.catalog().group), np.arange(9))
    assert popular.recommend([[0]], 1).titles(worlds.catalog()) == [["two\nlines"]]
