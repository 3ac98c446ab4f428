"""Free text to nearest titles: the contract, plain recomputations, what gamma may and may not do."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from tests import model_families, worlds
from tests.reference import grounding as reference
from tests.tiny_models import tiny_model
from tests.worlds import HISTORIES, write_msl_folder
from triewise import load
from triewise.app import evaluate_run, train_run
from triewise.app.compare import collect
from triewise.errors import UserError
from triewise.files import read_json
from triewise.models import Backbone
from triewise.models.adapters import add_lora
from triewise.recipe import Recipe, parse_recipe
from triewise.recommenders import GenerativeRecommender, GroundedRecommender
from triewise.recommenders.grounding import generate, inject, last_states
from triewise.recommenders.search_choice import choose_gamma
from triewise.settings import LoraSettings
from triewise.testing import RecommenderContract


class TestGrounding(RecommenderContract):
    @staticmethod
    def make() -> GenerativeRecommender:
        return worlds.recommender(search="grounding", text_tokens=6, batch_users=3)


class TestGroundingWithPopularity(RecommenderContract):
    @staticmethod
    def make() -> GenerativeRecommender:
        return worlds.recommender(search="grounding", text_tokens=6, text_beams=1, gamma=2.0, seed=1)


@pytest.fixture(scope="module")
def grounded() -> GroundedRecommender:
    recommender = worlds.recommender(search="grounding", text_tokens=6, text_beams=1)
    recommender.backbone.model.requires_grad_(False)
    return recommender.grounded


def test_it_equals_a_loop_over_texts_and_titles(grounded: GroundedRecommender) -> None:
    model, tokenizer = grounded.backbone.model, grounded.backbone.tokenizer
    distance = grounded.distances(HISTORIES)
    for b, history in enumerate(HISTORIES):
        prompt = grounded.prompts.encode(history)
        text = tokenizer.decode(reference.greedy(model, prompt, tokenizer.eos_token_id, 6))
        start = list(grounded.prompts.bos)
        here = reference.embedding(model, start + grounded.prompts.encode_texts([text])[0])
        for i, title in enumerate(grounded.prompts.title_tokens):
            there = reference.embedding(model, start + title.tolist()[:-1])
            wanted = float((here - there).norm())
            assert distance[b, grounded.groups.of_item[i]] == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("template", ["plain", "msl", "d3"])
def test_a_text_that_is_a_title_is_that_title(template: str) -> None:
    """The frame of the template comes off again, also around a title with quotes of its own."""
    recommender = worlds.recommender(template=template)
    prompts = recommender.prompts
    for title, ids in zip(prompts.title, prompts.title_tokens, strict=True):
        assert prompts.read_titles([ids.tolist()[:-1]]) == [title]
    grounded = recommender.grounded
    texts = last_states(
        grounded.backbone.model,
        [[*prompts.bos, *ids] for ids in prompts.encode_texts(list(prompts.title))],
    )
    distance = torch.cdist(texts, grounded.title_embeddings())
    assert distance.argmin(1).tolist() == grounded.groups.of_item.tolist()


def test_padding_and_company_change_no_text(grounded: GroundedRecommender) -> None:
    prompts = [grounded.prompts.encode(h) for h in [*HISTORIES, [6] * 5]]
    for beams in (1, 3):
        together = generate(grounded.backbone, prompts, beams, 6)
        assert together == [generate(grounded.backbone, [p], beams, 6)[0] for p in prompts]
    states = last_states(grounded.backbone.model, prompts)
    alone = torch.cat([last_states(grounded.backbone.model, [p]) for p in prompts])
    torch.testing.assert_close(states, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
def test_padding_and_company_change_no_text_of_other_models(kind: str) -> None:
    model = tiny_model(kind)
    backbone = Backbone(model, SimpleNamespace(eos_token_id=0), kind, {})
    prompts = [[1, 5, 6, 7], [1, 2], [1, 8, 9, 4, 5, 6, 7, 8]]
    together = generate(backbone, prompts, 3, 6)
    assert together == [generate(backbone, [p], 3, 6)[0] for p in prompts]
    alone = torch.cat([last_states(model, [p]) for p in prompts])
    torch.testing.assert_close(last_states(model, prompts), alone, atol=1e-4, rtol=1e-4)


def test_embeddings_are_as_wide_as_what_the_body_gives() -> None:
    """OPT-350m's are narrower than its layers."""
    model = model_families.build("opt_350m")
    assert model.config.hidden_size == 32
    prompts = [[1, 5, 6, 7], [1, 2], [1, 8, 9, 4, 5, 6, 7, 8]]
    found = last_states(model, prompts)
    assert found.shape == (3, 16)
    torch.testing.assert_close(
        found, torch.cat([last_states(model, [p]) for p in prompts]), atol=1e-5, rtol=1e-4
    )
    assert last_states(model, []).shape == (0, 16)


def test_texts_beyond_the_positions_of_a_model_are_one_line() -> None:
    """As in decoding; what ends at the last position is written and embedded."""
    model = tiny_model("gpt2")  # 256 positions
    backbone = Backbone(model, SimpleNamespace(eos_token_id=0), "gpt2", {})
    short, long = [1] * 249, [1] * 250
    assert len(generate(backbone, [short, [1, 2]], 2, 8)) == 2
    assert last_states(model, [[1] * 256]).shape == (1, 32)
    wanted = (
        r"within the model's 256 positions, got a prompt of 250 tokens and up to 8 of text; lower text_tokens"
    )
    with pytest.raises(UserError, match=wanted):
        generate(backbone, [[1, 2], long], 2, 8)
    with pytest.raises(UserError, match=r"256 positions, got a text of 257 tokens; lower"):
        last_states(model, [[1], [1] * 257])


def test_an_adapter_writes_and_embeds() -> None:
    """With weights that do something it is another model than its base, and the same as merged."""
    recommender = worlds.recommender(search="grounding", text_tokens=6)
    base = recommender.backbone
    adapted = add_lora(copy.deepcopy(base.model), LoraSettings(rank=2), seed=0)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    apart = replace(recommender, backbone=replace(base, model=adapted.eval()))
    scores = apart.recommend(HISTORIES, k=None).scores
    assert apart.merged().recommend(HISTORIES, k=None).scores == pytest.approx(scores, abs=1e-3)
    assert not np.allclose(recommender.recommend(HISTORIES, k=None).scores, scores, atol=1e-2)


def test_generation_settings_of_the_model_have_no_effect(grounded: GroundedRecommender) -> None:
    from transformers import GenerationConfig

    model = grounded.backbone.model
    prompts = [grounded.prompts.encode(h) for h in HISTORIES]
    wanted = generate(grounded.backbone, prompts, 2, 6)
    shipped = GenerationConfig(
        do_sample=True,
        temperature=9.0,
        top_k=3,
        repetition_penalty=4.0,
        min_new_tokens=6,
        bad_words_ids=[[5]],
    )
    before, model.generation_config = model.generation_config, shipped
    try:
        assert generate(grounded.backbone, prompts, 2, 6) == wanted
        assert model.generation_config is shipped, "and it is put back"
    finally:
        model.generation_config = before


rows = st.lists(st.floats(0, 100, width=16), min_size=2, max_size=12)


@given(st.data(), rows, st.floats(0, 99))
def test_gamma_zero_keeps_the_order_and_the_nearest_stays_first(
    data: st.DataObject, row: list[float], gamma: float
) -> None:
    distance = np.array([row])
    weight = np.array(data.draw(st.lists(st.floats(0, 1), min_size=len(row), max_size=len(row))))
    assert np.argsort(inject(distance, weight, 0.0), kind="stable").tolist() == (
        np.argsort(distance, kind="stable").tolist()
    )
    injected = inject(distance, weight, gamma)[0]
    assert injected[np.argmin(row)] == 0 == injected.min()
    assert set(np.flatnonzero(injected == 0)) == set(np.flatnonzero(distance[0] == distance.min()))
    if min(row) < max(row):
        assert injected.tolist() == pytest.approx(reference.injected(row, weight.tolist(), gamma))


def test_titles_are_embedded_once_while_no_weight_is_trained(
    grounded: GroundedRecommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = replace(grounded, kept={})
    first = fresh.recommend(HISTORIES).counters
    again = replace(fresh, gamma=1.0).recommend(HISTORIES).counters
    title_tokens = (
        grounded.prompts.title_tokens.lengths
    )  # with the terminator, which stands for the start token here
    of_titles = sum(int(title_tokens[np.flatnonzero(grounded.groups.of_item == g)[0]]) for g in range(8))
    assert first["prompt_tokens"] - again["prompt_tokens"] == of_titles
    trained = worlds.recommender(search="grounding", text_tokens=2, text_beams=1)
    before = trained.recommend([[0]], k=None)
    with torch.no_grad():
        trained.backbone.model.get_input_embeddings().weight.mul_(0.5)
    after = trained.recommend([[0]], k=None)
    assert not np.array_equal(before.scores, after.scores)
    assert not trained.grounded.kept


def test_the_work_is_counted_where_it_happens(grounded: GroundedRecommender) -> None:
    prompts = [grounded.prompts.encode(h) for h in HISTORIES]
    texts = grounded.write(HISTORIES)
    two = replace(grounded, beams=2).recommend(HISTORIES).counters
    embedded = sum(len(grounded.prompts.bos) + len(ids) for ids in grounded.prompts.encode_texts(texts))
    counters = grounded.recommend(HISTORIES).counters
    assert counters["prompt_tokens"] == sum(map(len, prompts)) + embedded
    assert 0 < counters["tree_tokens"] <= 5 * len(HISTORIES)  # the last token of six is not run
    assert counters["token_forwards"] == counters["prompt_tokens"] + counters["tree_tokens"]
    assert two["tree_tokens"] > counters["tree_tokens"]


class _Collaborator:
    def __init__(self, scores: np.ndarray) -> None:
        self.scores = scores

    def item_scores(self, histories: object) -> np.ndarray:
        return self.scores


def test_another_recommender_gives_the_weights(grounded: GroundedRecommender) -> None:
    scores = np.array([[0.0, 2, 4, 1, 3, 0, 0, 0, 0], [5.0] * 9])
    both = replace(grounded, collaborator=_Collaborator(scores), gamma=50.0)
    weight = both.weights(HISTORIES[:2])
    of = grounded.groups.of_item
    assert weight[0, of[[0, 1, 2, 3, 4]]].tolist() == [0, 0.5, 1, 0.75, 0.75]
    assert (weight[1] == 0).all(), "equal scores say nothing"
    ranking, plain = both.recommend(HISTORIES[:2], k=None), grounded.recommend(HISTORIES[:2], k=None)
    assert ranking.items[:, 0].tolist() == plain.items[:, 0].tolist()
    assert 2 in ranking.items[0, :2]
    assert ranking.items[1].tolist() == plain.items[1].tolist()
    with pytest.raises(UserError, match="wanted finite scores of 9 items for 1 users from the collaborator"):
        both.recommend([[0]])
    with pytest.raises(
        UserError, match="wanted at least 1 beam and 1 token and a finite gamma >= 0, got 0, 6"
    ):
        replace(grounded, beams=0).recommend([[0]])


def test_the_chosen_gamma_is_the_best_of_the_grid(grounded: GroundedRecommender) -> None:
    """Judged by ranking again with every gamma that it could have been."""
    from triewise.ranking import evaluate

    rows = worlds.split([*HISTORIES, [8], [1]], [8, 7, 3, 6, 8, 5])
    for exclude, allow in (("none", None), ("history", [3, 5, 6, 8])):
        gamma, value = choose_gamma(grounded, rows, exclude, allow)
        reached = {
            g: evaluate(
                replace(grounded, gamma=float(g)),
                rows,
                name="x",
                split_name="valid",
                exclude=exclude,
                allow=allow,
            ).metrics["NDCG@10"]
            for g in (0, 1, 5, 99, gamma)
        }
        assert value == pytest.approx(max(reached.values()))
        assert reached[gamma] == pytest.approx(value)


# ---------------------------------------------------------------- run folders
@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained until it knows the cycle of titles, so that its free text is the next title."""
    folder = tmp_path_factory.mktemp("grounding")
    values = {
        "name": "lml",
        "title": "LML",
        "data": {
            "source": f"msl:{write_msl_folder(folder / 'raw')}",
            "folder": str(folder / "data"),
            "max_history": 6,
        },
        "backbone": {"tiny": {"vocabulary": 300, "width": 32, "layers": 2, "heads": 2, "feed_forward": 64}},
        "objective": {"support": "vocabulary"},
        "training": {"supervision": "every", "steps": 80, "batch_size": 32, "learning_rate": 1e-2},
        "evaluation": {"search": "grounding", "text_tokens": 12},
    }
    train_run(parse_recipe(values, "test"), folder / "run")
    return folder / "run"


def test_a_known_world_is_answered(run: Path) -> None:
    found = evaluate_run(run)
    assert found.metrics["HR@1"] >= 0.9
    assert found.certified.all()
    shown = {
        name: found.metrics[name] for name in ("search", "support", "text_beams", "text_tokens", "gamma")
    }
    assert shown == {
        "search": "grounding",
        "support": "none",
        "text_beams": 4,
        "text_tokens": 12,
        "gamma": 0.0,
    }
    assert "beams" not in found.metrics
    assert "titles ranked for each by the distance to a free text" in collect([run]).subtitle
    assert "search = grounding, support = none" in (run / "README.md").read_text(encoding="utf-8")
    assert load(run).search == "grounding"


def test_search_and_gamma_are_chosen_on_validation_rows(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = recipe_of(run).evaluation.model_copy(update={"choose": ("beam", "grounding"), "users": 12})
    found = evaluate_run(run, settings)
    chosen = read_json(run / "metrics.json")["chosen"]
    assert (chosen["by"], chosen["rows"], list(chosen["tried"])) == ("NDCG@10", 12, ["beam", "grounding"])
    best = max(chosen["tried"], key=lambda name: chosen["tried"][name]["NDCG@10"])
    assert found.metrics["search"] == best
    assert found.name.startswith(f"LML ({best}")
    assert f"{best} is chosen on 12 validation rows by NDCG@10: beam " in capsys.readouterr().err
    one = evaluate_run(run, settings.model_copy(update={"choose": ("grounding",)}))
    assert (one.name, one.metrics["gamma"]) == ("LML (grounding, gamma 0)", 0.0)


def test_nothing_to_choose_on(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from triewise.data import load_dataset

    def without_validation(folder: Path) -> object:
        data = load_dataset(folder)
        return replace(data, valid=data.valid.take(np.arange(0)))

    monkeypatch.setattr("triewise.app.folders.load_dataset", without_validation)
    settings = recipe_of(run).evaluation.model_copy(update={"choose": ("grounding",)})
    with pytest.raises(UserError, match="evaluation.choose needs validation rows"):
        evaluate_run(run, settings)


@pytest.mark.parametrize(
    ("evaluation", "training", "message"),
    [
        ({"search": "grounding", "against_exact": True}, {}, "grounding is no search along the trie"),
        ({"choose": ["beam"], "k": 20}, {}, "beams must be at least k, got 10 beams for k = 20"),
        (
            {"search": "beam", "scope": "step", "choose": ["grounding", "beam"]},
            {},
            r"scope = 'step' needs the beam search: choose = \['beam'\] or none",
        ),
        (
            {"choose": ["grounding"]},
            {"rows": "train+valid"},
            "evaluation.choose looks at the validation rows",
        ),
    ],
)
def test_settings_that_do_not_go_together(evaluation: dict, training: dict, message: str) -> None:
    values = {"name": "x", "data": {"source": "ml-100k"}, "evaluation": evaluation, "training": training}
    with pytest.raises(UserError, match=message):
        parse_recipe(values, "test")


def recipe_of(run: Path) -> Recipe:
    from triewise.app import open_run

    return open_run(run)[0]
