"""Hybrids from recipe to ranking, in a world where titles say nothing and order decides."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file

import triewise
from tests.slot_worlds import HYBRID, ITEMS, KINDS, WORDS, write_order_world
from triewise.app import evaluate_run, train_run
from triewise.errors import UserError
from triewise.files import read_json
from triewise.models import slots_of
from triewise.models.item_slots import projection
from triewise.recipe import parse_recipe
from triewise.training.checkpoints import remove
from triewise.training.curriculum import are_hybrid

FEW = ("training.steps=6", "training.log_every=2", "evaluation.users=20", "hybrid.alignment.steps=3")


class World:
    """The world, and runs in it by name."""

    def __init__(self, folder: Path, **shape: int) -> None:
        self.folder, self.raw = folder, write_order_world(folder / "raw", **shape)

    def train(self, text: str, name: str, *changes: str, kind: str = "llara", **how: Any) -> Path:
        values = {"raw": self.raw, "prepared": self.folder / "prepared", "kind": kind}
        values["items"] = self.folder / "items"
        recipe = parse_recipe(tomllib.loads(text.format(**values)), name, changes)
        train_run(recipe, self.folder / name, **how)
        return self.folder / name

    def hr1(self, run: Path) -> float:
        """HR@1 on the test rows."""
        evaluate_run(run)
        return float((pl.read_parquet(run / "predictions.parquet")["rank"] == 0).mean())  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    made = World(tmp_path_factory.mktemp("order"))
    assert made.hr1(made.train(ITEMS, "items")) > 0.95
    return made


@pytest.fixture(scope="module")
def text_alone(world: World) -> tuple[Path, float]:
    """A model that reads titles, and its HR@1: the base of adapters, and what hybrids are compared with."""
    run = world.train(WORDS, "words")
    return run, world.hr1(run)


def shuffled(world: World, run: Path) -> float:
    """HR@1 where every slot shows the vector of some other item, and users are those of other items."""
    made: Any = triewise.load(run)
    slots = slots_of(made.backbone.model)
    assert slots is not None
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(slots.table)))
    slots.table.copy_(slots.table[order].clone())
    if slots.ids.histories is not None:
        rows = slots.ids.histories.encoder.items.weight
        rows[1:-1] = rows[1:-1][order].clone()
    test = pl.read_parquet(world.folder / "prepared" / "test.parquet")
    first = made.recommend(test["history"].to_list(), 1).items[:, 0]
    return float((first == test["target"].to_numpy()).mean())


def test_llara_learns_from_slots_what_text_alone_cannot(world: World, text_alone: tuple[Path, float]) -> None:
    run = world.train(WORDS + HYBRID, "llara", "hybrid.curriculum=0")
    found = world.hr1(run)
    assert found >= 0.9  # 1 is the best possible
    assert found >= 2 * text_alone[1]
    assert shuffled(world, run) < 0.3  # one of eight hubs by chance


@pytest.mark.slow
def test_llara_with_an_adapter_on_a_model_of_text(world: World, text_alone: tuple[Path, float]) -> None:
    adapter = ("backbone.lora.rank=8", "backbone.lora.dropout=0", "training.learning_rate=1e-2")
    base = (f"backbone.name={text_alone[0] / 'model'}", "backbone.template=plain")
    run = world.train(WORDS + HYBRID, "lora", "hybrid.curriculum=0", *adapter, *base)
    assert world.hr1(run) >= 0.9
    assert world.hr1(run) >= 2 * text_alone[1]
    assert shuffled(world, run) < 0.3
    assert triewise.load(run).used["adapter"] == "merged"


ALIGNED = ("hybrid.alignment.steps=200", "hybrid.alignment.learning_rate=3e-3")


def test_a_llmrec_learns_from_codes_and_users_what_text_alone_cannot(
    world: World, text_alone: tuple[Path, float]
) -> None:
    run = world.train(WORDS + HYBRID, "a-llmrec", *ALIGNED, kind="a-llmrec")
    found = world.hr1(run)
    assert found >= 0.9
    assert found >= 2 * text_alone[1]
    assert shuffled(world, run) < 0.3


@pytest.mark.slow
def test_a_llmrec_under_a_frozen_language_model(world: World, text_alone: tuple[Path, float]) -> None:
    """Only the projections are trained, as its authors do."""
    base = (f"backbone.name={text_alone[0] / 'model'}", "backbone.template=plain", "hybrid.frozen=true")
    run = world.train(WORDS + HYBRID, "frozen", *ALIGNED, *base, "training.steps=160", kind="a-llmrec")
    assert world.hr1(run) >= 2 * text_alone[1]
    assert shuffled(world, run) < 0.3


# --- everything else, in a small world and a few steps ----------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    made = World(tmp_path_factory.mktemp("small"), n_hubs=3, n_guides=8, n_rows=60)
    made.train(ITEMS, "items", "training.steps=3")
    return made


OBJECTIVES = {
    "lml": ("objective.support=vocabulary",),
    "msl": ("objective.temperature=1.5",),
    "msl-ats": ("objective.temperature=adaptive", "objective.normaliser=decisions"),
    "igd": ("objective.support=vocabulary", "objective.weight=igd", "evaluation.alpha=0.2"),
    "cft": ("objective.support=vocabulary", "objective.contrast.strength=0.1"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_method_and_loss_are_independent(small: World, kind: str, objective: str) -> None:
    run = small.train(WORDS + HYBRID, f"{kind}-{objective}", *FEW, *OBJECTIVES[objective], kind=kind)
    evaluate_run(run)
    record = read_json(run / "run.json")
    assert record["status"] == "trained" and record["origin"]["hybrid"] == kind
    loaded = triewise.load(run)
    assert loaded.recommend([[0, 4]], 3, exclude="history").items.shape == (1, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_s_dpo_goes_on_from_a_hybrid(small: World, kind: str) -> None:
    """Its projections are those of the reference, trained on; the vectors of items stay."""
    first = small.train(WORDS + HYBRID, f"{kind}-reference", *FEW, "objective.support=vocabulary", kind=kind)
    preference = ("objective.preference.negatives=2", f"objective.preference.reference={first}")
    changes = (*FEW, "hybrid.curriculum=0", "objective.support=vocabulary", *preference)
    second = small.train(WORDS + HYBRID, f"{kind}-sdpo", *changes, kind=kind)
    slots: list[Any] = [slots_of(triewise.load(run).backbone.model) for run in (first, second)]
    other = next(name for name in KINDS if name != kind)
    with pytest.raises(UserError, match=f"wanted hybrid.kind = '{kind}'"):
        small.train(WORDS + HYBRID, "refused", *changes, kind=other)
    with pytest.raises(UserError, match=f"wanted hybrid.kind = '{kind}', .* got None"):
        small.train(WORDS, "refused", *FEW[:3], f"backbone.name={first / 'model'}", "backbone.template=plain")
    assert torch.equal(slots[0].table, slots[1].table)
    assert not torch.equal(slots[0].item[0].weight, slots[1].item[0].weight)


def test_text_alone_leaves_the_projections_alone(small: World) -> None:
    """A curriculum that has hardly begun: its first micro-batches are text, whatever the optimiser decays."""
    seed = next(s for s in range(99) if not are_hybrid(np.random.default_rng([s, 2]).random(8), 8)[:2].any())
    changes = (
        "training.steps=8",
        "training.checkpoint_every=2",
        "training.keep_checkpoints=9",
        f"seed={seed}",
    )
    run = small.train(WORDS + HYBRID, "text-only", *FEW, *changes, "training.weight_decay=0.1")
    first, last = (load_file(run / f"checkpoint-{step}" / "weights.safetensors") for step in (2, 8))
    slots: Any = slots_of(triewise.load(run).backbone.model)
    torch.manual_seed(seed)
    before = projection(slots.table.shape[1], slots.weight.shape[1]).state_dict()
    for name, tensor in before.items():
        key = f"model.embed_tokens.item.{name}"
        assert torch.equal(first[key], tensor)
        assert not torch.equal(last[key], tensor)


def test_a_frozen_language_model_stays_as_it_is(small: World) -> None:
    text = small.train(WORDS, "text", *FEW[:3])
    base = (f"backbone.name={text / 'model'}", "backbone.template=plain", "hybrid.frozen=true")
    run = small.train(WORDS + HYBRID, "frozen", *FEW, *base, "hybrid.curriculum=0")
    before, after = (triewise.load(folder).backbone.model for folder in (text, run))
    assert torch.equal(before.lm_head.weight, after.lm_head.weight)
    record = read_json(run / "run.json")
    slots: Any = slots_of(after)
    assert record["trained_parameters"] == sum(p.numel() for p in slots.item.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_uninterrupted_one(small: World, kind: str) -> None:
    """The same micro-batches are hybrid, and the same projections come out."""
    how = (*FEW, "training.checkpoint_every=2", "training.keep_checkpoints=9", "hybrid.curriculum=0.9")
    whole = small.train(WORDS + HYBRID, f"{kind}-whole", *how, kind=kind)
    cut = small.train(WORDS + HYBRID, f"{kind}-cut", *how, kind=kind)
    for step in (4, 6):
        remove(cut / f"checkpoint-{step}")
    small.train(WORDS + HYBRID, f"{kind}-cut", *how, kind=kind, resume=True)
    for name in ("item_slots.safetensors", "model.safetensors"):
        ours, theirs = (load_file(run / "model" / name) for run in (whole, cut))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_does_not_go_on_with_other_item_vectors(small: World, kind: str) -> None:
    """Its projections were learned for those of its start."""
    items = small.train(ITEMS, f"items-of-{kind}", "training.steps=2")
    how = (*FEW, f"hybrid.items={items}", "hybrid.curriculum=0", "training.checkpoint_every=2")
    small.train(WORDS + HYBRID, f"{kind}-begun", *how, "training.time_limit_s=1e-9", kind=kind)
    small.train(ITEMS, items.name, "training.steps=2", "seed=1", overwrite=True)
    with pytest.raises(UserError, match="the items changed since .*-begun was started; restore it"):
        small.train(WORDS + HYBRID, f"{kind}-begun", *how, kind=kind, resume=True)


def test_the_alignment_is_made_once(small: World, capfd: pytest.CaptureFixture[str]) -> None:
    """Its file is read again by a run that goes on, and replaced where its inputs are others."""
    how = (*FEW, "training.checkpoint_every=3")
    run = small.train(WORDS + HYBRID, "aligned", *how, kind="a-llmrec")
    said = "alignment of items and titles: 3 steps"
    assert said in capfd.readouterr().err
    before = load_file(run / "alignment.safetensors")["codes"]
    small.train(WORDS + HYBRID, "aligned", *how, kind="a-llmrec", resume=True)
    assert said not in capfd.readouterr().err
    slots: Any = slots_of(triewise.load(run).backbone.model)
    assert torch.equal(slots.table, before) and before.min() > 0
    changed = (*how, "hybrid.alignment.text_weight=0.9")
    small.train(WORDS + HYBRID, "aligned", *changed, kind="a-llmrec", overwrite=True)
    assert said in capfd.readouterr().err
    assert not torch.equal(load_file(run / "alignment.safetensors")["codes"], before)


def test_gradient_checkpointing_changes_nothing(small: World) -> None:
    runs = [
        small.train(WORDS + HYBRID, f"again-{on}", *FEW, f"training.gradient_checkpointing={on}")
        for on in ("false", "true")
    ]
    ours, theirs = (load_file(run / "model" / "item_slots.safetensors") for run in runs)
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=1e-5)


def test_recipes_that_cannot_be_meant_are_refused(small: World) -> None:
    with pytest.raises(UserError, match="'a-llmrec' needs training.supervision = 'last'"):
        small.train(WORDS + HYBRID, "refused", "training.supervision=every", kind="a-llmrec")
    with pytest.raises(UserError, match="hybrid.curriculum"):
        small.train(WORDS + HYBRID, "refused", "hybrid.curriculum=2")
    with pytest.raises(UserError, match="trains no adapter"):
        small.train(WORDS + HYBRID, "refused", "hybrid.frozen=true", "backbone.lora.rank=2")
    with pytest.raises(UserError, match="learns nothing from text alone: set hybrid.curriculum = 0"):
        small.train(WORDS + HYBRID, "refused", "hybrid.frozen=true")
    compared = ("objective.preference.negatives=2", "objective.preference.reference=x")
    with pytest.raises(UserError, match="S-DPO always reads item vectors: set hybrid.curriculum = 0"):
        small.train(WORDS + HYBRID, "refused", *compared)
    with pytest.raises(UserError, match="has no use for hybrid"):
        small.train(ITEMS + HYBRID, "refused")


def test_item_vectors_of_another_run_are_refused(small: World, world: World) -> None:
    def with_items(items: Path, *changes: str) -> None:
        small.train(WORDS + HYBRID, "refused", f"hybrid.items={items}", *changes)

    with pytest.raises(
        UserError, match="wanted a sequential run for its item vectors, got the language model"
    ):
        with_items(small.train(WORDS, "no-items", *FEW[:3]))
    with pytest.raises(UserError, match="the run of the item vectors .* was trained on other rows"):
        with_items(world.folder / "items")
    seen = small.train(ITEMS, "seen", "training.steps=2", "training.rows=train+valid")
    with pytest.raises(UserError, match="the run of the item vectors .* was trained on the validation rows"):
        with_items(seen)
    with_items(seen, *FEW, "training.rows=train+valid")
