"""Frozen layers and their states on disk: the same losses, each window through the frozen layers once, or one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model_families import quiet, save
from tests.tiny_models import tiny_model
from tests.token_worlds import cycle_world
from tests.train_child import small_model
from tests.worlds import write_msl_folder
from triewise.app import train_run
from triewise.errors import UserError
from triewise.models import load_backbone
from triewise.models.depth import freeze_first
from triewise.recipe import load_recipe
from triewise.settings import LoraSettings, TrainingSettings
from triewise.training import Objective, train
from triewise.training.frozen import KeptStates, kept_states


def settings(**changes: Any) -> TrainingSettings:
    given = {
        "steps": 12,
        "batch_size": 4,
        "log_every": 1,
        "warmup_steps": 1,
        "learning_rate": 3e-3,
        "freeze": 1,
    }
    return TrainingSettings(**{**given, "packing": False, **changes})


def losses(result: Any) -> list[float]:
    return [row["loss"] for row in result.history]


def run(out: Path, model: Any = None, support: str = "trie", **changes: Any) -> tuple[Any, Any, Any]:
    model = small_model() if model is None else model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    return train(model, cycle_world(), Objective(support), settings(**changes), out), model, before


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> list[KeptStates]:
    made: list[KeptStates] = []
    really = KeptStates.__enter__

    def enter(self: KeptStates) -> KeptStates:
        made.append(self)
        return really(self)

    monkeypatch.setattr(KeptStates, "__enter__", enter)
    return made


@pytest.mark.parametrize("support", ["trie", "vocabulary"])
def test_kept_states_change_no_loss_and_are_computed_once(
    support: str, tmp_path: Path, stores: list[Any]
) -> None:
    kept, model, before = run(tmp_path / "a", support=support)
    plain, other, _ = run(tmp_path / "b", support=support, keep_states=False)
    assert losses(kept) == pytest.approx(losses(plain), abs=1e-6)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    [store] = stores
    assert 0 < store.computed <= len(cycle_world()) and not (tmp_path / "a" / "states").exists()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(name.startswith(("model.layers.1.", "model.norm")) for name in moved)


@pytest.mark.parametrize("name", ["gemma3_text", "olmo2", "gpt_neox"])
def test_families_whose_layers_are_called_otherwise(name: str, tmp_path: Path, stores: list[Any]) -> None:
    with quiet():
        folder = str(save(name, tmp_path / "m"))
        made = [
            run(tmp_path / str(k), load_backbone(folder, device="cpu").model, keep_states=k)[0]
            for k in (True, False)
        ]
    assert losses(made[0]) == pytest.approx(losses(made[1]), abs=1e-5) and len(stores) == 1


def test_an_adapter_is_trained_above_the_frozen_layers_alone(tmp_path: Path, stores: list[Any]) -> None:
    with quiet():
        folder = str(save("llama", tmp_path / "m"))
        model = load_backbone(folder, device="cpu", lora=LoraSettings(rank=2, dropout=0.0)).model
        kept, _, before = run(tmp_path / "a", model)
        twin = load_backbone(folder, device="cpu", lora=LoraSettings(rank=2, dropout=0.0)).model
        plain = run(tmp_path / "b", twin, keep_states=False)[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all("lora_" in name and ".layers.1." in name for name in moved)
    assert losses(kept) == pytest.approx(losses(plain), abs=1e-6) and stores


def test_a_stopped_run_goes_on_with_the_states_it_had(tmp_path: Path, stores: list[Any]) -> None:
    whole = run(tmp_path / "whole")[0]
    model, limited = small_model(), settings(evaluate_every=6)
    first = train(
        model,
        cycle_world(),
        Objective(),
        limited,
        tmp_path / "a",
        validate=lambda m: {"NDCG@10": 0.0},
        watch=lambda row: "stop",
    )
    assert first.stopped == "stop" and (tmp_path / "a" / "states" / "index.npz").is_file()
    again = train(
        small_model(),
        cycle_world(),
        Objective(),
        limited,
        tmp_path / "a",
        validate=lambda m: {"NDCG@10": 0.0},
        resume=True,
    )
    rows = [row["loss"] for row in again.history if "loss" in row]
    assert rows == pytest.approx(losses(whole), abs=1e-6)
    assert stores[1].computed + stores[2].computed == stores[0].computed, "none is computed twice"
    assert not (tmp_path / "a" / "states").exists()


def test_what_cannot_be_kept_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match="states can be kept, got dropout below; set training.keep_states = false"
    ):
        run(tmp_path / "a", small_model(dropout=0.5))
    assert run(tmp_path / "a", small_model(dropout=0.5), keep_states=False)[0].steps_done == 12
    with pytest.raises(UserError, match="wanted training.freeze below 2, the layers of the model, got 2"):
        run(tmp_path / "b", freeze=2)
    with pytest.raises(ValueError, match="gradient_checkpointing runs layers again: set keep_states = false"):
        settings(gradient_checkpointing=True)
    with pytest.raises(UserError, match="got several processes"):
        kept_states(small_model(), cycle_world(), settings(), tmp_path, alone=False)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 10}))
    with pytest.raises(
        UserError, match=r"would take 0.0 GB, and .* has 0.0 GB free; set training.keep_states = false"
    ):
        run(tmp_path / "c")


def test_layers_in_no_list_are_one_line() -> None:
    model = tiny_model("gpt2")
    model.transformer.h = torch.nn.Sequential(*model.transformer.h)
    with pytest.raises(
        UserError, match="wanted a model with one list of its 2 layers for training.freeze, got GPT2"
    ):
        freeze_first(model, 1)


def test_a_recipe_with_frozen_layers_says_how_much_is_trained(tmp_path: Path) -> None:
    raw = write_msl_folder(tmp_path / "raw")
    changes = [
        f"data.source=msl:{raw}",
        f"data.folder={tmp_path / 'data'}",
        "backbone.device=cpu",
        "training.freeze=1",
    ]
    changes += [f"backbone.tiny.{key}" for key in ("vocabulary=300", "width=16", "layers=2", "heads=2")]
    changes += [
        "training.steps=3",
        "training.batch_size=80",
        "evaluation.exclude=none",
        "training.accumulation=1",
    ]
    recipe = load_recipe("demo/msl", changes)
    assert train_run(recipe, tmp_path / "run").steps_done == 3
    from triewise.files import read_json

    record = read_json(tmp_path / "run" / "run.json")
    assert 0 < record["trained_parameters"] < record["parameters"]
    with pytest.raises(
        UserError, match="item vectors and codes are learned below all layers: set training.freeze = 0"
    ):
        recipe.changed("identifier.kind=codes")
