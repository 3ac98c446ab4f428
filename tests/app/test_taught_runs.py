"""Runs whose targets are softened by another run, and who may teach."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import worlds
from tests.training.test_trainer import untimed
from triewise.app import train_run
from triewise.arrays import Ragged
from triewise.errors import UserError
from triewise.models import SequentialModel
from triewise.recipe import Recipe, parse_recipe
from triewise.recommenders import SequentialRecommender
from triewise.recommenders.assistants import TitleTeacher, beginnings
from triewise.settings import EncoderSettings

TINY = {"vocabulary": 300, "width": 16, "heads": 2, "feed_forward": 32}


def recipe(raw: Path, teacher: Path | None = None, **sections: Any) -> Recipe:
    training = {"steps": 3, "log_every": 1} | sections.pop("training", {})
    data = {"source": f"msl:{raw.as_posix()}", "folder": raw.with_name("prepared").as_posix()}
    data |= sections.pop("data", {})
    if teacher is None:
        kind: dict[str, Any] = {"sequential": {"encoder": "sasrec", "width": 8, "device": "cpu"}}
    else:
        objective = {"soft_targets": str(teacher)} | sections.pop("objective", {})
        kind = {"backbone": {"device": "cpu", "tiny": TINY}, "objective": objective}
    return parse_recipe(
        {"name": "small", "data": data, "training": training, "evaluation": {"users": 4}} | kind | sections,
        "test",
    )


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return worlds.write_msl_folder(tmp_path_factory.mktemp("taught") / "office")


@pytest.fixture(scope="module")
def teacher(raw: Path) -> Path:
    train_run(recipe(raw), raw.with_name("teacher"))
    return raw.with_name("teacher")


def test_a_taught_run_is_resumed_as_if_it_had_not_stopped(raw: Path, teacher: Path, tmp_path: Path) -> None:
    whole = train_run(recipe(raw, teacher), tmp_path / "whole")
    train_run(recipe(raw, teacher, training={"time_limit_s": 1e-6}), tmp_path / "parted")
    resumed = train_run(recipe(raw, teacher), tmp_path / "parted", resume=True)
    assert untimed(resumed.history)[1:] == untimed(whole.history)[1:]
    plain = train_run(recipe(raw, teacher, objective={"soft_alpha": 0.0}), tmp_path / "plain")
    assert plain.history[0]["loss"] != whole.history[0]["loss"]


def test_over_the_tree_other_things_are_learned(raw: Path, teacher: Path, tmp_path: Path) -> None:
    """Unless the teacher has no weight: then it is the plain run, number by number."""
    learned = {}
    for name, changes in (
        ("path", {}),
        ("tree", {"soft_scope": "tree"}),
        ("all", {"soft_scope": "tree", "soft_share": 1.0}),
        ("none", {"soft_scope": "tree", "soft_alpha": 0.0}),
    ):
        learned[name] = train_run(recipe(raw, teacher, objective=changes), tmp_path / name).history
    values = recipe(raw, teacher).model_dump(mode="json", exclude_none=True)
    plain = parse_recipe(values | {"objective": {}}, "test")
    learned["plain"] = train_run(plain, tmp_path / "plain").history
    losses = {name: [entry.get("loss") for entry in history] for name, history in learned.items()}
    assert losses["none"] == losses["plain"]
    assert len({str(losses[name]) for name in ("path", "tree", "all", "none")}) == 4


def test_a_language_model_may_teach(raw: Path, teacher: Path, tmp_path: Path) -> None:
    train_run(recipe(raw, teacher), tmp_path / "words")
    result = train_run(
        recipe(raw, tmp_path / "words", objective={"support": "vocabulary"}), tmp_path / "pupil"
    )
    assert np.isfinite(result.history[-1]["loss"])


def test_who_may_not_teach(raw: Path, teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"wanted a run folder, but .* has no run.json"):
        train_run(recipe(raw, tmp_path / "nobody"), tmp_path / "a")
    train_run(recipe(raw, training={"rows": "train+valid"}), tmp_path / "knows")
    with pytest.raises(
        UserError, match="the teacher .* was trained on the validation rows; give one trained on"
    ):
        train_run(recipe(raw, tmp_path / "knows"), tmp_path / "b")
    train_run(
        recipe(raw, tmp_path / "knows", training={"rows": "train+valid", "steps": 1}), tmp_path / "both"
    )
    other = worlds.write_msl_folder(tmp_path / "other" / "office", seed=1)
    with pytest.raises(UserError, match="the teacher .* was trained on other rows than those of"):
        train_run(recipe(other, teacher), tmp_path / "c")


@pytest.mark.parametrize("positions", ["oldest", "newest"])
@pytest.mark.parametrize("encoder", ["gru4rec", "sasrec", "bert4rec", "lrurec"])
def test_reading_a_window_once_is_reading_every_beginning(
    encoder: str, positions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows with and without context; a row that is longer than the model reads is read beginning by beginning."""
    shape = EncoderSettings(encoder=encoder, width=8, dropout=0.3, positions=positions, position_std=1.0)
    model = SequentialRecommender(SequentialModel(shape, 9, 5, 1), worlds.catalog(), np.arange(9))
    for lists in ([[1, 2, 3, 0, 5, 8], [4, 0], [7]], [[1, 2, 3, 0, 5, 8, 1, 2], [4, 0]]):
        rows, n_context = Ragged.from_lists(lists), np.array([2, 1, 0][: len(lists)])
        before = [r.tolist() for r in beginnings(rows, n_context)]
        wanted = [
            row[:n] for row, first in zip(lists, n_context, strict=True) for n in range(first, len(row))
        ]
        assert before == wanted
        found = TitleTeacher(model)(rows, n_context)
        np.testing.assert_allclose(found, model.log_probabilities(before), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(np.exp(found).sum(1), 1, rtol=1e-6)
