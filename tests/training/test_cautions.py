"""Lines that save a week: said before a training starts, and only then when they are true."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import triewise
from tests import worlds
from tests.model_families import tokenizer
from tests.sealing import sealed_again
from tests.worlds import write_msl_folder
from triewise.app import evaluate_run, train_run
from triewise.errors import UserError
from triewise.files import read_json, write_json
from triewise.objectives import ObjectiveSettings
from triewise.recipe import Recipe, parse_recipe
from triewise.tokens import Trie, binary_weights, build_prompts, zero_gain
from triewise.training import Examples, along_titles, make_windows, target_counts, training_warnings
from triewise.training.cautions import beta_is_idle, prompts_that_lose_titles

TITLES = [[1, 2, 9], [1, 3, 9], [1, 3, 5, 9], [7, 8, 9]]
IGD = ObjectiveSettings(weight="igd", beta=0.1)


@pytest.mark.parametrize(
    ("counts", "idle"),
    [
        ([4, 2, 1, 1], True),
        ([4, 2, 0, 1], False),  # behind 1 3 the terminator is a choice without gain: item 2 is cold
        ([4, 0, 0, 1], False),
        ([4, 2, 1, 0], False),
    ],
)
def test_beta_is_idle_where_no_item_is_cold(counts: list[int], idle: bool) -> None:
    """Judged by the weights themselves: whether one that is not 1 stands where several tokens are valid."""
    trie, c = Trie.from_sequences(TITLES), np.array(counts)
    assert beta_is_idle(IGD, trie, c) is idle
    weight = binary_weights(trie, c, IGD.beta)
    target = [trie.walk(title) for title, n in zip(TITLES, counts, strict=True) if n]
    moved = [weight[n] for path in target for m, n in pairwise(path) if trie.branching[m]]
    assert idle is all(w == 1 for w in moved)


def test_beta_is_not_idle_in_vocabulary_support_or_where_it_is_one() -> None:
    trie, counts = Trie.from_sequences(TITLES), np.array([4, 2, 1, 1])
    for changes in (
        {"support": "vocabulary"},
        {"weight": "igd-linear"},
        {"weight": "uniform"},
        {"beta": 1.0},
    ):
        assert not beta_is_idle(IGD.model_copy(update=changes), trie, counts)


def said(objective: ObjectiveSettings | None = None, **changes: Any) -> list[str]:
    """Lines for the rows 0 1 -> 0, 2 3 -> 5 and 5 6 7 8 -> 6 in the template ``msl``."""
    rec = worlds.recommender(template="msl")
    prompts = build_prompts(rec.backbone.tokenizer, rec.catalog, "msl", **changes)
    windows = make_windows(worlds.split([[0, 1], [2, 3], [5, 6, 7, 8]], [0, 5, 6]), "last")
    counts = target_counts(windows, 9)
    return list(training_warnings(objective or ObjectiveSettings(), prompts, rec.trie, windows, counts))


def test_nothing_is_said_without_a_reason() -> None:
    assert said() == []
    assert said(IGD) == [], (
        "of the titles that begin with Alien only one is a target, so beta weighs a choice"
    )


def test_titles_that_the_tokenizer_makes_equal_are_said() -> None:
    """Each kind once, with number and example; see tests/tokens/test_readback.py."""
    prompts = build_prompts(tokenizer("words"), worlds.catalog(("Silver River", "silver RIVER", "tide")))
    trie = Trie.from_sequences((prompts.title_tokens.values, prompts.title_tokens.offsets))
    windows = make_windows(worlds.split([[0, 1]], [2]), "last")
    equal, changed = training_warnings(
        ObjectiveSettings(), prompts, trie, windows, np.ones(3, dtype=np.int64)
    )
    assert equal.startswith(
        "warning: 2 titles share their tokens with another title: 'Silver River' and 'silver"
    )
    assert changed.startswith(
        "warning: 2 titles are not read back: 'Silver River' comes back as 'silver river'"
    )


def test_what_beta_changes_is_said() -> None:
    rec = worlds.recommender()
    windows = make_windows(worlds.split([[1]] * 9, list(range(9))), "last")
    for normaliser, what in (("weights", "only the normaliser"), ("decisions", "nothing")):
        objective = IGD.model_copy(update={"normaliser": normaliser})
        [line] = training_warnings(objective, rec.prompts, rec.trie, windows, np.ones(9, dtype=np.int64))
        assert line.startswith(
            f"warning: objective.beta changes {what}: in trie support a forced token has no loss"
        )


def test_a_padding_token_that_is_the_terminator_is_named_and_harms_nothing() -> None:
    rec = worlds.recommender()
    rec.backbone.tokenizer.pad_token = rec.backbone.tokenizer.eos_token
    prompts = build_prompts(rec.backbone.tokenizer, rec.catalog, max_history=5)
    windows = make_windows(worlds.split([[0, 1, 2, 3], [2]], [2, 5]), "last")
    [line] = training_warnings(ObjectiveSettings(), prompts, rec.trie, windows, rec.counts)
    assert line.startswith(
        "warning: the tokenizer's padding token is its terminator; nothing is padded with it here"
    )
    batch = Examples(windows, prompts, rec.trie, None, zero_gain(rec.trie, rec.counts)).batch([0, 1])
    end = rec.backbone.tokenizer.eos_token_id
    assert (batch.target == end).sum() == 2, "both terminators are learned"
    assert (batch.weight == 1).all()


def test_titles_that_prompts_will_lose_are_counted_before_training() -> None:
    rec = worlds.recommender(template="msl")
    rows = [[0, 1], [2, 3], [5, 6, 7, 8]]
    length = [len(rec.prompts.encode(row)) for row in rows]
    for limit, n in ((max(length), 0), (max(length) - 1, 1), (min(length) - 1, 3)):
        lines = said(max_tokens=limit)
        assert len(lines) == (n > 0)
        assert not n or f"warning: {n} of 3 training prompts are longer than {limit} tokens" in lines[0]
    windows = make_windows(worlds.split(rows, [2, 5, 0]), "last")
    prompts = replace(rec.prompts, max_tokens=max(length) - 1)
    assert prompts_that_lose_titles(windows, prompts) == 1
    assert prompts.n_dropped == 0, "prompts that were only counted are not in the count"


def test_of_many_long_prompts_so_many_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triewise.training.cautions.LONGEST", 2)
    shortest = min(len(worlds.recommender(template="msl").prompts.encode(row)) for row in ([0, 1], [2, 3]))
    assert "warning: at least 2 of 3 training prompts" in said(max_tokens=shortest - 1)[0]


@pytest.mark.parametrize("template", ["plain", "msl", "d3"])
def test_no_title_can_be_off_the_trie(template: str) -> None:
    """Targets and histories are items, and each item's title is a path, whatever it spells."""
    rec = worlds.recommender(template=template)
    for item, ids in enumerate(rec.prompts.title_tokens):
        assert rec.trie.walk(ids.tolist())[-1] == rec.trie.leaf[item]
    weight = along_titles(rec.trie, rec.trie.token)
    assert weight.tolist() == rec.prompts.title_tokens.values.tolist()


# ---------------------------------------------------------------- what a training and its decoding must share
@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("cautions")
    values = {
        "name": "small",
        "data": {"source": f"msl:{write_msl_folder(folder / 'raw', 6)}", "folder": str(folder / "data")},
        "backbone": {"tiny": {"vocabulary": 300, "width": 16, "layers": 1, "heads": 2, "feed_forward": 32}},
        "objective": {"weight": "igd"},
        "training": {"steps": 1},
    }
    return parse_recipe(values, "small")


@pytest.fixture(scope="module")
def run(recipe: Recipe) -> Path:
    assert recipe.data.folder is not None
    out = recipe.data.folder.parent / "run"
    train_run(recipe, out)
    return out


def test_a_training_says_so_before_it_starts(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_run(recipe, tmp_path / "run")
    lines = capsys.readouterr().err.splitlines()
    said_at = next(i for i, line in enumerate(lines) if "objective.beta changes only the normaliser" in line)
    assert said_at < next(i for i, line in enumerate(lines) if line.startswith("small: 1 steps"))


def test_counts_of_another_training_are_refused(run: Path, tmp_path: Path) -> None:
    """They decide the gain of IGD-decoding and which item stands for equal titles."""
    assert set(read_json(run / "recommender.json")["hashes"]) == {"prompt", "trie", "counts"}
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("run.json"))
    catalog = pl.read_parquet(run / "catalog.parquet")
    catalog.with_columns(train_targets=pl.col("train_targets") + 1).write_parquet(
        tmp_path / "run/catalog.parquet"
    )
    sealed_again(tmp_path / "run")
    with pytest.raises(UserError, match="the counts of .* is not the one this model was trained with"):
        triewise.load(tmp_path / "run")


def test_a_prompt_of_another_template_is_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("run.json"))
    prompt = read_json(run / "recommender.json")["prompt"]
    sealed_again(tmp_path / "run", prompt=prompt | {"max_history": 1})
    with pytest.raises(UserError, match="the prompt of .* is not the one this model was trained with"):
        triewise.load(tmp_path / "run")


def test_the_recommender_of_another_run_is_refused(run: Path, recipe: Recipe, tmp_path: Path) -> None:
    """Whole in itself, but not what run.json tells of."""
    other = recipe.model_copy(update={"training": recipe.training.model_copy(update={"sample": 7})})
    train_run(other, tmp_path / "run")
    shutil.copy(run / "run.json", tmp_path / "run" / "run.json")
    with pytest.raises(UserError, match=r"recipe.toml is not the file that was written"):
        evaluate_run(tmp_path / "run")
    record = {name: value for name, value in read_json(run / "run.json").items() if name != "files"}
    write_json(tmp_path / "run" / "run.json", record)  # as before files were hashed
    with pytest.raises(UserError, match="the counts of the recommender in .* is not the one of its training"):
        evaluate_run(tmp_path / "run")
