"""What each of several processes runs in `test_sharding.py`: trainings whose weights are spread (FSDP2)."""

from __future__ import annotations

import dataclasses
import functools
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.process_child import (
    CONFIG,
    OBJECTIVES,
    Seen,
    at_forward,
    ats,
    kill,
    learned,
    single_targets,
    weighted_examples,
    whole_run,
)
from tests.tiny_models import tiny_model
from tests.token_worlds import cycle_world
from tests.train_child import CONFIG as WHOLE, some_metric
from triewise.errors import UserError
from triewise.models.adapters import add_lora
from triewise.settings import LoraSettings, TrainingSettings
from triewise.tokens import zero_gain
from triewise.training import Examples, Objective, processes, target_counts, train
from triewise.training.trainer import TrieTrainer

SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@dataclasses.dataclass
class Case:
    """A short training."""

    objective: str = "msl-ats"
    model: Callable[[], Any] = learned
    examples: Callable[[], Examples] = weighted_examples
    packed: bool = False
    autocast: bool = False
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


def instructed() -> Examples:
    """One target a window, behind an instruction that all prompts begin with."""
    plain = single_targets()
    prompts = dataclasses.replace(plain.prompts, bos=(1, *range(3, 15)))
    gain = zero_gain(plain.trie, target_counts(plain.windows, 12))
    return Examples(plain.windows, prompts, plain.trie, None, gain)


def adapted(dtype: torch.dtype) -> Any:
    return add_lora(tiny_model("qwen2", vocabulary=20).to(dtype), LoraSettings(rank=2, dropout=0.0), seed=0)


def blockless() -> Any:
    model = learned()
    model._no_split_modules = None
    return model


untied = functools.partial(tiny_model, "llama", vocabulary=20)
gpt2 = functools.partial(tiny_model, "gpt2", vocabulary=20, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
CASES = {
    **{
        name: Case(name)
        for name in ("lml", "igd", "msl-ats", "msl-ats-exact-all", "msl-ats-token", "msl-sum", "cft", "soft")
    },
    "sdpo": Case("sdpo", examples=single_targets),
    "untied": Case(model=untied),
    "gpt2": Case("igd", gpt2),
    "packed": Case(examples=instructed, packed=True),
    "packed untied lml": Case("lml", untied, instructed, packed=True),
    "packed, activations again": Case(
        examples=instructed, packed=True, settings={"gradient_checkpointing": True}
    ),
    "no blocks": Case(model=blockless),
    "clipped": Case(settings={"max_grad_norm": 1e-3}),
    "one micro-batch, both parts": Case("lml", settings={"accumulation": 1, "log_parts": True}),
    "bfloat16": Case("lml", autocast=True),
    "lora": Case(model=functools.partial(adapted, torch.float32)),
    "lora over bfloat16": Case(model=functools.partial(adapted, torch.bfloat16)),
}
FEW = ("igd", "cft", "soft", "packed untied lml", "one micro-batch, both parts", "lora")


class Spread(Seen):
    """Also how the weights lie while they are trained."""

    def __init__(self, objective: Any, plain: Any) -> None:
        super().__init__(objective)
        self.plain, self.share = plain, []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        super().on_pre_optimizer_step(args, state, control, model, **kwargs)
        held = [p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in model.parameters()]
        spread = {isinstance(p, DTensor) for p in model.parameters()}
        assert len(spread) == 1
        assert sum(p.numel() for p in self.plain.parameters()) == 0 or spread == {False}
        self.share.append(sum(held) / sum(p.numel() for p in model.parameters()))


def each_case(names: tuple[str, ...], out: Path) -> dict[str, Any]:
    """Gradients, temperatures, last weights, log and share of the weights of a short run of some cases."""
    found = {}
    for name in names:
        case = CASES[name]
        objective = OBJECTIVES[case.objective](out)
        model = case.model()
        seen = Spread(objective, model)
        config = TrainingSettings(**(CONFIG | {"steps": 3, "log_parts": False} | case.settings))
        trainer = TrieTrainer(model, case.examples(), objective, config, out / name, autocast=case.autocast)
        trainer.add_callback(seen)
        result = trainer.run.conduct(trainer.go_on, trainer.take_steps, False, "")
        assert trainer.packing or not case.packed
        found[name] = {
            "gradients": seen.gradients,
            "tau": seen.tau,
            "share": seen.share,
            "weights": {n: p.detach() for n, p in model.named_parameters()},
            "log": result.history,
        }
    return found


def stop_and_go(out: Path) -> dict[str, Any]:
    """An uninterrupted run, one stopped by a signal to the second process and taken up, one without dropout."""
    found = {"whole": whole_run(out / "whole"), "plain": whole_run(out / "plain", dropout=0.0)}
    if not processes.is_first():
        at_forward(2 * 7 - 1, lambda: kill(signal.SIGTERM))
    found["stopped"] = whole_run(out / "stopped")
    found["resumed"] = whole_run(out / "stopped", resume=True)
    found["ended"] = whole_run(out / "stopped", resume=True)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="not finite after step 4"):
        patch.setattr(TrieTrainer, "_save_checkpoint", with_a_nan(TrieTrainer._save_checkpoint))
        whole_run(out / "nan")
    at_second_shard(full_disk)
    with pytest.raises(UserError, match="checkpoint-8: no space left"):
        whole_run(out / "full")
    return found


def with_a_nan(save: Callable[..., None]) -> Callable[..., None]:
    """The same after a weight of the second process has become nan."""

    def changed(trainer: TrieTrainer, *args: Any) -> None:
        if not processes.is_first():
            next(p for p in trainer.run.shards.twin.parameters()).to_local().view(-1)[0] = torch.nan
        save(trainer, *args)

    return torch.no_grad()(changed)


def full_disk(path: Path) -> None:
    """As a disk that is full says so."""
    raise OSError(28, "No space left on device")


def half_a_file(path: Path) -> None:
    """As a kill leaves it."""
    path.write_bytes(b"half a file")
    kill(signal.SIGKILL)


def at_second_shard(call: Callable[[Path], None]) -> None:
    """Do something where the second process writes its second shard from now on."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    write, calls = FileSystemWriter.write_data, 0

    def write_data(self: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2 and not processes.is_first():
            call(Path(self.path) / "__1_0.distcp")
        return write(self, *args)

    FileSystemWriter.write_data = write_data  # type: ignore[method-assign]


def killed(out: Path) -> None:
    """The second process is killed while its shard of the second checkpoint is written."""
    at_second_shard(half_a_file)
    with pytest.raises(UserError, match="cannot reach the other processes: one of them has ended"):
        whole_run(out)


def go_on(out: Path) -> dict[str, Any]:
    """Take up what is there."""
    return whole_run(out, resume=True)


def larger(out: Path) -> dict[str, Any]:
    """A run whose batches can be dealt out to four processes, taken up where there is something."""
    config = TrainingSettings(**(vars(WHOLE) | {"batch_size": 8, "keep_checkpoints": 9}))
    model = learned()
    result = train(
        model, cycle_world(), Objective(temperature=ats()), config, out, validate=some_metric, resume=True
    )
    return {"weights": dict(model.state_dict()), "log": result.history}
