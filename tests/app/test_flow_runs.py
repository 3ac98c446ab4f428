"""Runs of Flower: resumed as if they had not stopped, scored by another run, told of what is in no history."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import worlds
from tests.app.test_taught_runs import TINY, recipe as taught
from tests.training.test_trainer import untimed
from triewise.app import train_run
from triewise.app.assemble import assemble
from triewise.app.folders import open_data
from triewise.app.guided import guide_of
from triewise.errors import UserError
from triewise.models import Backbone
from triewise.recipe import Recipe, parse_recipe
from triewise.training import Flow, Objective


def recipe(raw: Path, flow: dict[str, Any], **sections: Any) -> Recipe:
    plain = taught(raw).model_dump(mode="json", exclude_none=True, exclude={"sequential"})
    training = plain["training"] | {"packing": True} | sections.pop("training", {})
    kind = {"backbone": {"device": "cpu", "tiny": TINY}, "objective": {"support": "vocabulary", "flow": flow}}
    return parse_recipe(plain | kind | {"training": training} | sections, "test")


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return worlds.write_msl_folder(tmp_path_factory.mktemp("flow") / "office")


@pytest.fixture(scope="module")
def scores(raw: Path) -> str:
    train_run(taught(raw), raw.with_name("sasrec"))
    return str(raw.with_name("sasrec"))


@pytest.mark.parametrize("template", ["plain", "msl"])
def test_a_run_is_resumed_as_if_it_had_not_stopped(
    raw: Path, scores: str, template: str, tmp_path: Path
) -> None:
    """With dropout, accumulation and draws from the weights of the moment."""
    flow = {"scores": scores, "strength": 0.9}
    backbone = {"device": "cpu", "tiny": TINY | {"dropout": 0.3}, "template": template}
    how: dict[str, Any] = {"batch_size": 8, "accumulation": 2, "steps": 4}
    whole = train_run(recipe(raw, flow, training=how, backbone=backbone), tmp_path / "whole")
    stopped = recipe(raw, flow, training=how | {"time_limit_s": 1e-6}, backbone=backbone)
    train_run(stopped, tmp_path / "parted")
    resumed = train_run(recipe(raw, flow, training=how, backbone=backbone), tmp_path / "parted", resume=True)
    assert len(untimed(whole.history)) == 4
    assert untimed(resumed.history)[1:] == untimed(whole.history)[1:]


def test_every_title_as_a_target_and_a_reward_without_scores(raw: Path, tmp_path: Path) -> None:
    result = train_run(recipe(raw, {"reward": "logp"}, training={"supervision": "every"}), tmp_path / "every")
    assert np.isfinite(result.history[-1]["loss"])


def test_targets_in_no_history_are_counted_and_drawn(
    raw: Path, scores: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = recipe(raw, {"scores": scores})
    dataset = open_data(made)
    rows = dataset.train
    never = np.flatnonzero(np.bincount(rows.target, minlength=12))[:2]
    rows.history.values[np.isin(rows.history.values, never)] = 5
    parts = assemble(made, dataset)
    assert isinstance(parts.backbone, Backbone)
    guide = guide_of(made, dataset, parts, rows)
    said = capsys.readouterr().err
    assert "objective.flow: 2 of 12 titles that are targets stand in no history, such as 'Red'" in said
    assert guide is not None
    flow = guide(Objective("vocabulary"))
    assert isinstance(flow, Flow)
    below = [flow.prior[parts.trie.path_to(int(parts.trie.leaf[i]))].sum() for i in never]
    assert all(-20 < log_q < -15 for log_q in below)
    parts.backbone.model.train()
    prompts = [parts.prompts.encode([int(i)]) for i in range(12)] * 8
    drawn = flow.sample(prompts, np.random.default_rng(0).random((96, int(parts.trie.depth.max()))))
    assert set(never.tolist()) <= set(drawn.tolist())
    assert parts.backbone.model.training


def test_who_may_not_score(raw: Path, tmp_path: Path) -> None:
    train_run(taught(raw, training={"rows": "train+valid"}), tmp_path / "knows")
    with pytest.raises(UserError, match="the teacher .* was trained on the validation rows"):
        train_run(recipe(raw, {"scores": str(tmp_path / "knows")}), tmp_path / "a")
