"""A language model as a recommender: the contract, saving, loading, and parts that do not belong together."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import triewise
from tests import model_families, worlds
from tests.tiny_models import tiny_model
from tests.worlds import HISTORIES
from triewise.errors import UserError
from triewise.files import read_json, write_json
from triewise.models import Backbone
from triewise.ranking import Groups, MostPopular
from triewise.recommenders import GenerativeRecommender
from triewise.testing import RecommenderContract
from triewise.tokens import Trie, build_prompts, single_start


class TestGenerative(RecommenderContract):
    @staticmethod
    def make() -> GenerativeRecommender:
        return worlds.recommender(batch_users=3)


class TestGenerativeInVocabularySupport(RecommenderContract):
    @staticmethod
    def make() -> GenerativeRecommender:
        return worlds.recommender(support="vocabulary", seed=1)


class TestGenerativeWithBeams(RecommenderContract):
    @staticmethod
    def make() -> GenerativeRecommender:
        return worlds.recommender(search="beam", batch_users=2)


class TestGenerativeWithBeamsInVocabularySupport(RecommenderContract):
    @staticmethod
    def make() -> GenerativeRecommender:
        return worlds.recommender(search="beam", support="vocabulary", length_penalty=1.0, alpha=0.2, seed=1)


class TestGenerativeExact(RecommenderContract):
    @staticmethod
    def make() -> GenerativeRecommender:
        return worlds.recommender(search="exact", batch_users=2, seed=2)


class TestMostPopular(RecommenderContract):
    @staticmethod
    def make() -> MostPopular:
        counts = np.array([3, 1, 4, 1, 5, 9, 2, 6, 8])
        return MostPopular(Groups.from_labels(worlds.catalog().group, counts), counts)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GenerativeRecommender]:
    recommender = worlds.recommender()
    folder = tmp_path_factory.mktemp("saved") / "run"
    recommender.save_pretrained(folder)
    return folder, recommender


def test_probabilities_of_all_groups_sum_to_one(saved: tuple[Path, GenerativeRecommender]) -> None:
    scores = saved[1].recommend(HISTORIES, k=None).scores.astype(float)
    assert np.exp(scores).sum(1) == pytest.approx(np.ones(4), abs=1e-5)


def test_moved_and_loaded_in_a_fresh_process_it_ranks_the_same(
    saved: tuple[Path, GenerativeRecommender], tmp_path: Path
) -> None:
    folder, recommender = saved
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    code = (
        "import sys, json, torch, triewise; torch.set_num_threads(1)\n"
        f"r = triewise.load(sys.argv[1]).recommend({HISTORIES}, k=5)\n"
        "print(json.dumps([r.items.tolist(), r.scores.tolist()]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(moved)], capture_output=True, text=True, check=True
    )
    items, scores = json.loads(done.stdout)
    wanted = recommender.recommend(HISTORIES, k=5)
    assert items == wanted.items.tolist()
    assert np.array(scores) == pytest.approx(wanted.scores, abs=1e-6)


def test_the_saved_model_is_an_ordinary_checkpoint_with_the_same_tokenizer(
    saved: tuple[Path, GenerativeRecommender],
) -> None:
    """AutoTokenizer picks a class by model type; a tokenizer with other rules would silently change."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, recommender = saved
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    for title, ids in zip(recommender.catalog.title, recommender.prompts.title_tokens, strict=True):
        assert tokenizer(title, split_special_tokens=True)["input_ids"] == ids.tolist()[:-1]
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    for name, parameter in recommender.backbone.model.named_parameters():
        assert model.get_parameter(name).equal(parameter)


def test_parts_that_do_not_belong_together_are_refused(
    saved: tuple[Path, GenerativeRecommender], tmp_path: Path
) -> None:
    def copy(name: str, hashed: bool = False) -> Path:
        shutil.copytree(saved[0], tmp_path / name)
        if not hashed:  # as folders were saved before their files were hashed
            manifest = read_json(tmp_path / name / "recommender.json")
            del manifest["sha256"]
            write_json(tmp_path / name / "recommender.json", manifest)
        return tmp_path / name

    folder = copy("trie")
    Trie.from_sequences([[1, 2], [3, 2]]).save(folder / "trie.npz")
    with pytest.raises(UserError, match="the trie of .* is not the one this model was trained with"):
        triewise.load(folder)
    folder = copy("tokenizer")
    worlds.backbone(worlds.TITLES[:3]).tokenizer.save_pretrained(folder / "model")
    with pytest.raises(UserError, match="the prompt of .* is not the one this model was trained with"):
        triewise.load(folder)
    folder = copy("weights", hashed=True)
    worlds.backbone(seed=1).model.save_pretrained(folder / "model")
    with pytest.raises(
        UserError, match=r"model.safetensors is not the file that was written .*; restore it, or"
    ):
        triewise.load(folder)
    folder = copy("more", hashed=True)
    (folder / "model" / "chat_template.jinja").write_text("x", encoding="utf-8")
    with pytest.raises(
        UserError, match=r"chat_template.jinja was not written with the files beside it; remove it"
    ):
        triewise.load(folder)
    folder = copy("absent", hashed=True)
    (folder / "model" / "tokenizer.json").unlink()
    with pytest.raises(
        UserError, match=r"wanted .*tokenizer.json, which is missing; restore it, or train again"
    ):
        triewise.load(folder)
    folder = copy("search", hashed=True)
    manifest = folder / "recommender.json"
    manifest.write_text(manifest.read_text("utf-8").replace('"alpha": 0.0', '"alpha": 0.5'), "utf-8")
    with pytest.raises(UserError, match="was changed after it was written .its seal does not hold."):
        triewise.load(folder)
    folder = copy("format")
    (folder / "recommender.json").write_text('{"format": 99}', encoding="utf-8")
    with pytest.raises(UserError, match="of format 1 in .*, got kind generative of format 99"):
        triewise.load(folder)
    folder = copy("half")
    (folder / "recommender.json").unlink()
    with pytest.raises(UserError, match="recommender.json, which does not exist"):
        triewise.load(folder)
    with pytest.raises(UserError, match="is no folder; train one first"):
        triewise.load(tmp_path / "nowhere")


@pytest.mark.parametrize("template", ["plain", "msl"])
def test_prompts_of_a_folder_start_as_they_did_when_it_was_saved(template: str, tmp_path: Path) -> None:
    """GLM's tokenizer puts two tokens in front; a folder of before has one start token or none, and says nothing."""
    tokenizer, titles = model_families.tokenizer("prefixed"), worlds.catalog(worlds.TITLES[:4])
    front = tokenizer("")["input_ids"]
    for name, start in (("old", single_start(tokenizer, template, False)), ("new", None)):
        prompts = build_prompts(tokenizer, titles, template, max_history=5, start=start)
        trie = Trie.from_sequences((prompts.title_tokens.values, prompts.title_tokens.offsets))
        backbone = Backbone(tiny_model("llama", vocabulary=len(tokenizer)), tokenizer, "llama", {})
        made = GenerativeRecommender(backbone, titles, prompts, trie, np.ones(4, dtype=np.int64))
        made.save_pretrained(tmp_path / name)
        manifest = read_json(tmp_path / name / "recommender.json")
        if name == "old":
            del manifest["prompt"]["start"]
            write_json(tmp_path / name / "recommender.json", manifest)
        loaded = triewise.load(tmp_path / name, device="cpu")
        ids = loaded.prompts.encode([0, 1])
        assert ids == prompts.encode([0, 1])
        assert (ids[: len(front)] == front) is (name == "new")
        found = loaded.recommend([[0, 1], [2]], k=None)
        assert found.scores == pytest.approx(made.recommend([[0, 1], [2]], k=None).scores, abs=1e-5)
    del manifest["prompt"]["start"]
    write_json(tmp_path / "new" / "recommender.json", manifest)
    with pytest.raises(UserError, match="the prompt of .* is not the one this model was trained with"):
        triewise.load(tmp_path / "new", device="cpu")


def test_search_settings_that_do_not_exist_are_refused() -> None:
    with pytest.raises(
        UserError, match="wanted search among beam, exact, catalogue, grounding, got 'greedy'"
    ):
        worlds.recommender(search="greedy").recommend([[0]])
    with pytest.raises(UserError, match="scope = 'step' needs search = 'beam'"):
        worlds.recommender(scope="step").recommend([[0]])


def test_scores_of_candidates_are_those_of_the_ranking(saved: tuple[Path, GenerativeRecommender]) -> None:
    recommender = saved[1]
    ranking = recommender.recommend(HISTORIES, k=None)
    found = recommender.with_settings(batch_users=3).score(HISTORIES, ranking.items.tolist())
    assert found == pytest.approx(ranking.scores, abs=1e-4)
    with pytest.raises(UserError, match="wanted candidates lists for 4 users, got 1"):
        recommender.score(HISTORIES, [[0]])
