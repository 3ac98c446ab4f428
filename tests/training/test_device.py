"""Training on another device than the CPU, without one: meta tensors have no values; what waits for one fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback

from tests.process_child import OBJECTIVES, single_targets, weighted_examples
from tests.tiny_models import tiny_model
from tests.train_child import small_model
from triewise.models import Head, whole_rows
from triewise.settings import TrainingSettings
from triewise.training import Objective, trainer as trainer_module
from triewise.training.checkpoints import random_state, set_random_state
from triewise.training.objective import TitleLoss
from triewise.training.trainer import TrieTrainer

aten = torch.ops.aten
# Their result, or the shape of it, is read by the host.
WAITS = {
    *(aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero, aten.bincount),
    *(aten._unique2, aten.unique_dim, aten.unique_consecutive),
}


class WaitedError(Exception):
    """An operation that waits for its device, or that mixes two devices."""


class NoWaiting(TorchDispatchMode):
    """Refuses what would stop the host until a GPU is done, on whatever device it runs here."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [t for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)]
        packet = func.overloadpacket
        by_mask = packet in (aten.index, aten.index_put, aten.index_put_) and any(
            t.dtype == torch.bool for t in tree_leaves(args[1]) if t is not None
        )
        unsized = packet is aten.repeat_interleave and (kwargs or {}).get("output_size") is None
        if packet in WAITS or by_mask or unsized:
            raise WaitedError(str(func))
        if len({t.device for t in tensors if t.dim()}) > 1:
            raise WaitedError(f"{func} on several devices")
        return func(*args, **(kwargs or {}))


class EnoughError(Exception):
    """Ends a training before it writes a row of the log, which has to wait."""


class Watched(TrieTrainer):
    """Two whole steps of the real Trainer, in which nothing may wait; no row of the log."""

    def get_batch_samples(self, *args: Any) -> Any:
        if self.state.global_step == 2:
            raise EnoughError
        return super().get_batch_samples(*args)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        with NoWaiting():
            return super().compute_loss(*args, **kwargs)


class Gradients(TrainerCallback):  # type: ignore[misc]
    """Where the gradients are that the optimiser is given."""

    def __init__(self) -> None:
        self.devices = set[str]()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        self.devices |= {p.grad.device.type for p in model.parameters()}


def two_steps(
    objective: Any,
    examples: Any,
    out: Path,
    packing: bool,
    dtype: torch.dtype = torch.float32,
    kind: str = "",
) -> None:
    """Train on the meta device: a mistake is a RuntimeError of torch, or a `WaitedError`."""
    settings = TrainingSettings(steps=4, batch_size=8, accumulation=2, log_every=100, packing=packing)
    model = tiny_model(kind) if kind else small_model(dropout=0.1)
    trainer = Watched(model.to("meta", dtype=dtype), examples, objective, settings, out)
    seen = Gradients()
    trainer.add_callback(seen)
    with pytest.raises(EnoughError):
        trainer.train()
    state = [value for values in trainer.optimizer.state.values() for value in values.values()]
    assert trainer.packing == packing and seen.devices == {"meta"}
    assert {t.device.type for t in state if t.dim()} == {"meta"}, (
        "the optimiser's counts of steps are numbers"
    )
    assert trainer.meter.sums.device.type == trainer._tr_loss.device.type == "meta"


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes compare numbers, which meta tensors do not have; they are run before training, not in a step."""
    monkeypatch.setattr("triewise.training.objective.hand_head", lambda model: Head())
    monkeypatch.setattr(trainer_module, "packs", lambda model, examples, many_rows: True)


@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize(
    "name", sorted(set(OBJECTIVES) - {"flower"})
)  # which draws from the model between steps
def test_a_step_leaves_nothing_on_the_cpu_and_waits_for_nothing(
    name: str, packing: bool, blind: None, tmp_path: Path
) -> None:
    examples = single_targets() if name == "sdpo" else weighted_examples()
    two_steps(OBJECTIVES[name](tmp_path), examples, tmp_path, packing)


@pytest.mark.parametrize(
    ("kind", "packing"), [("llama", False), ("gpt2", False), ("gemma3", False), ("", False), ("", True)]
)
def test_neither_does_one_in_half_precision_of_other_families(
    kind: str, packing: bool, blind: None, tmp_path: Path
) -> None:
    objective = OBJECTIVES["msl-ats" if kind else "msl-ats-token"](tmp_path)
    two_steps(objective, weighted_examples(), tmp_path, packing, torch.bfloat16, kind)


def by_mask(loss: Tensor) -> Tensor:
    return loss[loss > 0]


@pytest.mark.parametrize(
    "wait",
    [
        lambda loss: loss * loss.item(),
        lambda loss: loss if loss > 0 else -loss,
        lambda loss: loss[None][loss[None] > 0].sum(),
        lambda loss: loss + torch.ones(3).index_select(0, (loss[None] > 0).long()).sum(),
        lambda loss: (loss + torch.ones(3)).sum(),
    ],
    ids=["item", "if", "mask", "index of another device", "tensor of another device"],
)
def test_the_check_finds_what_waits(
    wait: Callable[[Tensor], Tensor], blind: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original = TitleLoss.forward

    def forward(self: TitleLoss, **batch: Any) -> Any:
        found = original(self, **batch)
        return found | {"loss": wait(found["loss"])}

    monkeypatch.setattr(TitleLoss, "forward", forward)
    with pytest.raises((RuntimeError, WaitedError)):
        two_steps(Objective("vocabulary"), weighted_examples(), tmp_path, packing=True)


@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("name", ["igd", "msl-ats", "msl-ats-exact-all", "msl-ats-token", "cft", "sdpo"])
def test_under_autocast_nothing_waits_either(name: str, packing: bool, tmp_path: Path) -> None:
    """Autocast knows no meta device: the same operations are watched where there are numbers."""
    examples = single_targets() if name == "sdpo" else weighted_examples()
    objective, model = OBJECTIVES[name](tmp_path), small_model().train()
    module = objective.module(model, examples.trie)
    batch = objective.batches(examples, np.arange(8)[None], packing)[0]
    del batch["counts"], batch["contribution"]
    with NoWaiting():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = module(**batch)
        outputs["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(WaitedError), NoWaiting():
        outputs["loss"].item()


def test_rows_taken_for_one_sequence_each_give_the_same_states() -> None:
    ids = torch.randint(2, 30, (3, 11))
    for kind in ("qwen2", "gpt2", "gemma3"):
        model = tiny_model(kind)
        expected = model(input_ids=ids, use_cache=False).logits
        with whole_rows(), NoWaiting():
            found = model(input_ids=ids, use_cache=False).logits
        assert torch.equal(found, expected)
        with pytest.raises(WaitedError), NoWaiting():  # afterwards it is as before
            model(input_ids=ids, use_cache=False)


# --- which device -----------------------------------------------------------------------------------------------------


def test_the_second_gpu_is_trained_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    second = torch.device("cuda:1")
    try:
        arguments = trainer_module._arguments(
            SimpleNamespace(device=second, get_input_embeddings=lambda: None),
            TrainingSettings(),
            0,
            tmp_path,
            False,
        )
        assert arguments.device == PartialState().device == second, "the Trainer's and accelerate's"
        assert arguments.n_gpu <= 1 and chosen == [second]
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_random_numbers_are_those_of_the_device_that_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    states = {torch.device("cuda", i): torch.tensor([i]) for i in range(2)}
    fake = SimpleNamespace(get_rng_state=states.__getitem__, set_rng_state=lambda s, d: states.update({d: s}))
    monkeypatch.setattr(torch, "get_device_module", lambda device: fake)
    second = torch.device("cuda:1")
    kept = random_state(second)
    assert kept["device"].tolist() == [1]
    states[second] = torch.tensor([7])
    set_random_state(kept, second)
    assert [s.tolist() for s in states.values()] == [[0], [1]]
