"""Runs over codes: where codes come from, what is trained, saved and ranked, and what is refused."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import triewise
from tests import worlds
from tests.conftest import shared
from triewise.app import evaluate_run, report_runs, train_run
from triewise.app.assemble import Assembly, assemble
from triewise.app.folders import open_data
from triewise.cli import app
from triewise.errors import UserError
from triewise.files import read_json, write_json
from triewise.models import head_weight
from triewise.models.new_tokens import add_tokens
from triewise.recipe import Recipe, load_recipe, parse_recipe
from triewise.recommenders import IDENTIFIER, GenerativeRecommender
from triewise.tokens import read_identifier

TINY = {"vocabulary": 300, "width": 16, "heads": 2, "feed_forward": 32}
LORA = {"rank": 2, "dropout": 0.0}


def recipe(raw: Path, **sections: Any) -> Recipe:
    """A language model over codes; ``backbone`` and the like are merged into what is there."""
    values: dict[str, Any] = {
        "name": "small",
        "data": {"source": f"msl:{raw.as_posix()}", "folder": raw.with_name("prepared").as_posix()},
        "backbone": {"device": "cpu", "tiny": TINY},
        "identifier": {"kind": "codes", "levels": [3, 3]},
        "training": {"steps": 3, "log_every": 1, "learning_rate": 1e-2},
        "evaluation": {"users": 6},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return parse_recipe(values, "test")


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return worlds.write_msl_folder(tmp_path_factory.mktemp("codes") / "office")


def sequential(raw: Path, **training: Any) -> Recipe:
    return parse_recipe(
        {
            "name": "items",
            "data": {"source": f"msl:{raw.as_posix()}", "folder": raw.with_name("prepared").as_posix()},
            "sequential": {"encoder": "sasrec", "width": 8, "device": "cpu"},
            "training": {"steps": 3} | training,
        },
        "test",
    )


@pytest.fixture(scope="module")
def items(raw: Path) -> Path:
    train_run(sequential(raw), raw.with_name("items"))
    return raw.with_name("items")


def assembled(recipe: Recipe) -> Assembly:
    return assemble(recipe, open_data(recipe))


def codes(recipe: Recipe) -> tuple[tuple[str, ...], ...]:
    identifier = assembled(recipe).prompts.identifier
    assert identifier is not None
    return identifier.codes


def test_sources_of_codes(raw: Path, items: Path) -> None:
    """Every source gives each title codes of its own, and the same ones again."""
    made = {}
    for source in ({}, {"vectors": "svd", "width": 4}, {"items": str(items)}, {"vectors": "tiny"}):
        made[str(source)] = codes(recipe(raw, identifier=source))
        assert codes(recipe(raw, identifier=source)) == made[str(source)]
        assert len(set(made[str(source)])) == 12
    assert len(set(made.values())) == 4
    grouped = assembled(recipe(raw, identifier={"levels": [2], "collisions": "group"}))
    assert grouped.trie.n_groups == 2


def test_a_row_starts_as_the_mean_of_the_titles_of_its_items(raw: Path) -> None:
    parts = assembled(recipe(raw))
    plain = assembled(recipe(raw, identifier={"kind": "title", "levels": None}))
    tokenizer, rows = parts.backbone.tokenizer, head_weight(parts.backbone.model)
    torch.testing.assert_close(rows[: len(plain.backbone.tokenizer)], head_weight(plain.backbone.model))
    identifier = parts.prompts.identifier
    assert identifier is not None
    for name in identifier.names:
        titles = [
            row[:-1]
            for row, own in zip(plain.prompts.title_tokens, identifier.codes, strict=True)
            if name in own
        ]
        wanted = rows[torch.from_numpy(np.concatenate(titles)).long()].mean(0)
        torch.testing.assert_close(rows[tokenizer.convert_tokens_to_ids(name)], wanted)


@pytest.mark.parametrize("kind", ["codes", "codes+title"])
@pytest.mark.parametrize("lora", [False, True])
def test_a_run_is_trained_saved_and_loaded(raw: Path, kind: str, lora: bool, tmp_path: Path) -> None:
    run = tmp_path / "run"
    made = recipe(raw, identifier={"kind": kind}, backbone={"lora": LORA} if lora else {})
    train_run(made, run)
    metrics = evaluate_run(run).metrics
    exact = evaluate_run(run, made.evaluation.model_copy(update={"search": "exact"})).metrics
    assert [exact[name] for name in ("HR@10", "NDCG@10")] == [metrics[name] for name in ("HR@10", "NDCG@10")]
    loaded = triewise.load(run, merge_adapter=False)
    assert isinstance(loaded, GenerativeRecommender)
    assert loaded.prompts.identifier == read_identifier(
        run / IDENTIFIER, loaded.catalog, kind == "codes+title"
    )
    histories = [[0, 1, 2], [5], []]
    wanted = loaded.recommend(histories, None)
    assert sorted(wanted.items[0].tolist()) == list(range(12))
    np.testing.assert_allclose(np.exp(wanted.scores).sum(1), 1, rtol=1e-5)
    assert set(wanted.titles(loaded.catalog)[0]) == set(loaded.catalog.title)
    loaded.save_pretrained(tmp_path / "again")
    for other in (triewise.load(tmp_path / "again"), triewise.load(run, merge_adapter=True)):
        found = other.recommend(histories, None)
        np.testing.assert_array_equal(found.items, wanted.items)
        np.testing.assert_allclose(found.scores, wanted.scores, atol=1e-4)
    (shown,) = loaded.explain([0, 1], [3])
    assert [token.text for token in shown.tokens][:2] == list(loaded.prompts.identifier.codes[3][:2])
    shown_title = "".join(token.text for token in shown.tokens).rpartition(">")[2]
    assert shown_title == (shown.title if kind == "codes+title" else "")
    table = read_json(run / "identifier.json")
    table[loaded.catalog.item_id[0]] = table[loaded.catalog.item_id[1]]
    write_json(run / "identifier.json", table)
    with pytest.raises(UserError, match="identifier.json is not the file that was written"):
        triewise.load(run)


@pytest.mark.parametrize("tied", [True, False])
def test_beside_lora_only_new_rows_change(raw: Path, tied: bool, tmp_path: Path) -> None:
    """Of embedding and head; the head by hand is the model's own after training too."""
    base = worlds.backbone(tuple(open_data(recipe(raw)).catalog.title))
    if not tied:
        base.model.config.tie_word_embeddings = False
        base.model.lm_head.weight = torch.nn.Parameter(base.model.lm_head.weight.detach().clone().mul_(0.5))
    base.save(tmp_path / "base")
    made = recipe(raw, backbone={"name": str(tmp_path / "base"), "template": "plain", "lora": LORA})
    parts = assembled(made)
    n_words = len(base.tokenizer)
    learned = [n for n, p in parts.backbone.model.named_parameters() if p.requires_grad and ".lora_" not in n]
    assert len(learned) == (1 if tied else 2)
    train_run(made, tmp_path / "run")
    loaded = triewise.load(tmp_path / "run", merge_adapter=False)
    assert isinstance(loaded, GenerativeRecommender)
    model, merged = loaded.backbone.model, loaded.merged().backbone.model
    names = loaded.prompts.identifier.names  # type: ignore[union-attr]
    assert loaded.backbone.tokenizer.convert_tokens_to_ids(names[0]) >= n_words
    for part in ("get_input_embeddings", "get_output_embeddings"):
        before = getattr(parts.backbone.model.get_base_model(), part)().weight
        after, whole = (getattr(m, part)().weight for m in (model.get_base_model(), merged))
        torch.testing.assert_close(after[:n_words], before[:n_words], rtol=0, atol=0)
        torch.testing.assert_close(after, whole)
        assert (after[n_words:] != before[n_words:]).any(1).all()
    engine = loaded.engine
    assert engine.head is not None
    ids = torch.tensor([loaded.prompts.encode([0, 1])])
    with torch.no_grad():
        out = model(input_ids=ids, output_hidden_states=True)
        some = torch.tensor([n_words + 1, 3, n_words])
        by_hand = engine.head.scores(model, out.hidden_states[-1][0, -1], some)
    torch.testing.assert_close(by_hand, out.logits[0, -1, some])


def test_objectives_teachers_and_assistants(raw: Path, items: Path, tmp_path: Path) -> None:
    for name, section in (
        ("ats", {"identifier": {"levels": [6, 2]}, "objective": {"temperature": "adaptive"}}),
        ("igd", {"objective": {"weight": "igd", "support": "vocabulary"}}),
        ("taught", {"objective": {"soft_targets": str(items)}}),
        ("every", {"training": {"supervision": "every"}, "evaluation": {"alpha": 0.2, "search": "beam"}}),
        ("assisted", {"evaluation": {"assistant": str(items), "assistant_weight": 0.5, "search": "exact"}}),
        ("msl", {"backbone": {"template": "msl"}}),
    ):
        train_run(recipe(raw, **section), tmp_path / name)
        assert 0 <= evaluate_run(tmp_path / name).metrics["HR@10"] <= 1
    preference = {"negatives": 2, "reference": str(tmp_path / "msl")}
    pupil = recipe(
        raw, backbone={"template": "msl"}, objective={"preference": preference, "support": "vocabulary"}
    )
    train_run(pupil, tmp_path / "preferences")
    assert read_json(tmp_path / "preferences" / "identifier.json") == read_json(
        tmp_path / "msl" / "identifier.json"
    )
    with pytest.raises(UserError, match=r"wanted the \[identifier\] of the reference .*msl, got another one"):
        assembled(pupil.changed("identifier.kind=codes+title"))
    coded = triewise.load(tmp_path / "msl")
    assert coded.item_vectors().shape == (12, 16)
    with pytest.raises(
        UserError, match="grounding compares free texts with titles, got a model that writes codes"
    ):
        coded.with_settings(search="grounding").recommend([[1]])


@pytest.mark.parametrize("kind", ["codes", "codes+title"])
def test_what_people_read_of_codes_has_titles(raw: Path, kind: str, tmp_path: Path) -> None:
    """The page, the answers in a terminal, and what is said of codes that titles share."""
    made = recipe(raw, identifier={"kind": kind, "levels": [2], "collisions": "group"})
    train_run(made, tmp_path / "run")
    evaluate_run(tmp_path / "run")
    report, titled = report_runs([tmp_path / "run"], tmp_path / "page.html"), kind == "codes+title"
    assert report.facts["shared_titles"] == (0 if titled else 12)
    shown = report.examples[0].recommendations[0]
    end = f"{escape(shown.tokens[0].text)}</span>"
    assert titled or f"{end} {escape(shown.title)}</bdi>" in (tmp_path / "page.html").read_text("utf-8")
    words = ["recommend", str(tmp_path / "run"), "--history", "Red", "-k", "1"]
    said = CliRunner().invoke(app, [*words, "--explain"]).stdout.splitlines()[0]
    title = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)["recommendations"][0]["title"]
    assert said.replace("[", "").replace("]", "").endswith(title)
    card = (tmp_path / "run" / "README.md").read_text("utf-8")
    assert f"write the {kind.replace('+', ' and ')} of the next item" in card


def test_titles_that_share_codes_share_their_probability(raw: Path, tmp_path: Path) -> None:
    """So that as teacher or assistant they do not forbid all titles but one of those with the same codes."""
    grouped = {"levels": [2], "collisions": "group"}
    train_run(recipe(raw, identifier=grouped), tmp_path / "grouped")
    coarse = triewise.load(tmp_path / "grouped")
    assert isinstance(coarse, GenerativeRecommender)
    log_p = coarse.log_probabilities([[0, 1]])[0]
    scores = coarse.recommend([[0, 1]], None)
    for item, score in zip(scores.items[0], scores.scores[0], strict=True):
        members = coarse.groups.of_item == coarse.groups.of_item[item]
        np.testing.assert_allclose(np.exp(log_p[members]), np.exp(score) / members.sum(), rtol=1e-5)
    np.testing.assert_allclose(np.exp(log_p).sum(), 1)


def test_codes_that_are_given(raw: Path, items: Path, tmp_path: Path) -> None:
    train_run(recipe(raw), tmp_path / "run")
    wanted = read_identifier(tmp_path / "run" / IDENTIFIER, open_data(recipe(raw)).catalog)
    given = recipe(raw, identifier={"levels": None, "file": str(tmp_path / "run")})
    assert codes(given) == wanted.codes
    train_run(recipe(raw, identifier={"kind": "title", "levels": None}), tmp_path / "run", overwrite=True)
    assert not (tmp_path / "run" / "identifier.json").exists()


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"identifier": {"kind": "title"}}, "codes are made where kind = 'codes' or 'codes.title'"),
        ({"identifier": {"items": "a", "file": "b"}}, "items and file are two sources of codes; use one"),
        ({"hybrid": {"kind": "llara", "items": "a"}}, "puts item vectors behind titles; set identifier.kind"),
        (
            {"evaluation": {"search": "grounding"}},
            "grounding compares free texts with titles; set identifier.kind",
        ),
        ({"identifier": {"levels": [1]}}, "identifier.levels"),
    ],
)
def test_recipes_that_cannot_be_meant_are_refused(raw: Path, sections: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        recipe(raw, **sections)


def test_item_vectors_of_another_run_are_refused(raw: Path, items: Path, tmp_path: Path) -> None:
    train_run(recipe(raw), tmp_path / "words")
    with pytest.raises(
        UserError, match="wanted a sequential run for its item vectors, got the language model"
    ):
        assembled(recipe(raw, identifier={"items": str(tmp_path / "words")}))
    other = worlds.write_msl_folder(tmp_path / "other" / "office", seed=1)
    with pytest.raises(UserError, match="the run of the item vectors .* was trained on other rows"):
        assembled(recipe(other, identifier={"items": str(items)}))
    train_run(sequential(raw, rows="train+valid"), tmp_path / "knows")
    with pytest.raises(UserError, match="the run of the item vectors .* was trained on the validation rows"):
        assembled(recipe(raw, identifier={"items": str(tmp_path / "knows")}))


def test_tokens_that_are_there_stay_as_they_are() -> None:
    made = worlds.backbone()
    ids = add_tokens(made.model, made.tokenizer, ["<a_0>", "<b_0>"], [np.array([5, 6]), np.array([7])])
    rows = head_weight(made.model).clone()
    torch.testing.assert_close(rows[ids[0]], rows[[5, 6]].mean(0))
    again = add_tokens(made.model, made.tokenizer, ["<b_0>", "<c_0>"], [np.array([9]), np.array([9])])
    assert again[0] == ids[1]
    assert head_weight(made.model)[: len(rows)].equal(rows)


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_codes_over_a_quantised_base(raw: Path, kind: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tiny = TINY | {"width": 64, "feed_forward": 64}
    made = recipe(raw, backbone={"quantisation": kind, "lora": LORA, "tiny": tiny})
    train_run(made, tmp_path / "run")
    assert 0 <= evaluate_run(tmp_path / "run").metrics["HR@10"] <= 1


@pytest.mark.slow
def test_the_recipe_of_letters_codes(tmp_path: Path) -> None:
    """Two steps and three users of it, on its data."""
    index = shared("letter_instruments") / "Instruments.index.json.gz"
    changes = (
        "training.steps=2",
        "training.warmup_steps=1",
        "training.evaluate_every=0",
        "training.patience=0",
    )
    places = (
        f"data.source=codes:{index.parent.as_posix()}",
        f"data.folder={(tmp_path / 'prepared').as_posix()}",
        f"identifier.file={index.as_posix()}",
    )
    made = load_recipe("letter/msl-codes", [*changes, *places, "evaluation.users=3"])
    train_run(made, tmp_path / "run")
    metrics = evaluate_run(tmp_path / "run").metrics
    assert metrics["n_users"] == 3 and metrics["exclude"] == "none"
    loaded = triewise.load(tmp_path / "run")
    assert loaded.groups.n_groups == 9897
