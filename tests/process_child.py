"""Starts several processes, and what each of them runs in `test_processes.py`."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import socket
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from tests.token_worlds import cycle_world
from tests.train_child import CONFIG as WHOLE, small_model, some_metric
from triewise.arrays import Ragged
from triewise.decoding import TrieEngine, sample
from triewise.errors import UserError
from triewise.models import freeze_unused
from triewise.objectives import FlowSettings
from triewise.settings import TrainingSettings
from triewise.tokens import binary_weights, zero_gain
from triewise.training import (
    AdaptiveTemperature,
    Contrast,
    Examples,
    Flow,
    Objective,
    Preferences,
    SoftTargets,
    along_titles,
    draw_rejected,
    history_prior,
    kept_reference,
    processes,
    target_counts,
    train,
)
from triewise.training.objective import MicroBatches, TitleLoss
from triewise.training.trainer import TrieTrainer

STEPS = 5
CONFIG = {
    "steps": STEPS,
    "learning_rate": 3e-3,
    "batch_size": 8,
    "accumulation": 2,
    "warmup_steps": 2,
    "log_every": 1,
    "log_parts": True,
}


def ats(**choices: Any) -> AdaptiveTemperature:
    return AdaptiveTemperature(0.5, momentum=0.5, clamp=(0.1, 5.0), **choices)


def preferences(out: Path) -> Preferences:
    """S-DPO against two titles; the reference is scored by all processes together."""
    examples = single_targets()
    rejected = draw_rejected(examples.windows, examples.trie.leaf, 2, seed=0)
    inputs = (out / "reference.npz", learned(), examples, rejected, "vocabulary", 5)
    reference, key = kept_reference(*inputs)
    again, _ = kept_reference(*inputs)
    assert (again == reference).all()
    return Preferences(rejected, reference, beta=0.5, reference_key=key)


OBJECTIVES: dict[str, Callable[[Path], Any]] = {
    "lml": lambda out: Objective("vocabulary"),
    "igd": lambda out: Objective("vocabulary", normaliser="decisions"),
    "msl-ats": lambda out: Objective(temperature=ats(), normaliser="decisions"),
    "msl-ats-minus-all": lambda out: Objective(temperature=ats(root="minus", rows="all")),
    "msl-ats-exact-all": lambda out: Objective(temperature=ats(root="exact", rows="all")),
    "msl-ats-token": lambda out: Objective(temperature=ats(scope="token")),
    "msl-sum": lambda out: Objective("trie", 1.3, "sum"),
    "cft": lambda out: Contrast(Objective("vocabulary"), 0.3),
    "sdpo": preferences,
    "soft": lambda out: SoftTargets(Objective("trie", 1.3), by_last_item, 0.4),
    "flower": lambda out: flower(),
}


def flower() -> Flow:
    """Flower, with weights that are let draw by `each_objective`."""
    trie, settings = weighted_examples().trie, FlowSettings(strength=0.7, scores=Path("none"))
    config, prior = TrainingSettings(**CONFIG), history_prior(trie, np.arange(12) % 5)
    return Flow(
        Objective("vocabulary"), settings, config, prior, lambda *_: np.zeros(0, np.int32), by_last_item
    )


def by_last_item(rows: Ragged, n_context: NDArray[np.int64]) -> NDArray[np.float64]:
    """A teacher of 12 titles: the nearer behind the last item, the likelier."""
    last = [row[n - 1 : -1] for row, n in zip(rows, n_context.tolist(), strict=True)]
    p = 0.5 ** ((np.arange(12) - np.concatenate(last)[:, None]) % 12)
    return np.log(p / p.sum(1, keepdims=True))


def weighted_examples() -> Examples:
    """IGD weights and titles of unequal length, so that the parts of a micro-batch have unequal sums of weights."""
    plain = cycle_world()
    counts = target_counts(plain.windows, 12)
    counts[::3] = 0
    weight = along_titles(plain.trie, binary_weights(plain.trie, counts, 0.2))
    plain.windows.n_context[::2] = 3
    return Examples(plain.windows, plain.prompts, plain.trie, weight, zero_gain(plain.trie, counts))


def single_targets() -> Examples:
    """The same world with one target a window."""
    examples = cycle_world()
    examples.windows.n_context[:] = examples.windows.items.lengths - 1
    return examples


@functools.cache
def _after_some_steps() -> dict[str, torch.Tensor]:
    model, examples = small_model().train(), weighted_examples()
    module = TitleLoss(model, Objective("trie"), examples.trie)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = MicroBatches(examples, module.objective, np.arange(24)[None])[0]
    del batch["counts"], batch["contribution"]
    for _ in range(12):
        optimizer.zero_grad()
        module(**batch)["loss"].backward()
        optimizer.step()
    return model.state_dict()


def learned(dropout: float = 0.0) -> Any:
    """A model that knows a little: its targets are above the mean, so that an adaptive temperature has a root."""
    model = small_model(dropout)
    model.load_state_dict(_after_some_steps())
    return model


class Seen(TrainerCallback):  # type: ignore[misc]
    """Gradients as the optimiser gets them, and the temperature, step by step."""

    def __init__(self, objective: Any) -> None:
        self.objective, self.gradients, self.tau = objective, [], []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        named = model.model.named_parameters()
        self.gradients.append({n: full(p.grad) for n, p in named if p.requires_grad})
        self.tau.append(self.objective.objective.tau)


def each_objective(out: Path) -> dict[str, Any]:
    """Gradients, temperatures, last weights and log of a short run of each objective."""
    found = {}
    for name, make in OBJECTIVES.items():
        model, objective = learned(), make(out)
        if isinstance(objective, Flow):
            engine = TrieEngine(model, weighted_examples().trie)
            objective = replace(objective, sample=functools.partial(sample, engine))
        seen = Seen(objective)
        config = TrainingSettings(**CONFIG)
        (out / name).mkdir(exist_ok=True)
        examples = single_targets() if name == "sdpo" else weighted_examples()
        trainer = TrieTrainer(model, examples, objective, config, out / name)
        trainer.add_callback(seen)
        trainer.train()
        found[name] = {
            "gradients": seen.gradients,
            "tau": seen.tau,
            "weights": {n: p.detach() for n, p in model.named_parameters()},
            "log": trainer.run.history,
            "reference": getattr(objective, "reference", None),
        }
    return found


def whole_run(out: Path, resume: bool = False, dropout: float = 0.3, workers: int = 0) -> dict[str, Any]:
    """A run with adaptive temperature, validation and checkpoints; what it leaves."""
    model = learned(dropout)
    objective = Objective(temperature=ats())
    config = TrainingSettings(**(vars(WHOLE) | {"keep_checkpoints": 9, "workers": workers}))
    how = {"validate": some_metric, "resume": resume}
    result = train(model, cycle_world(), objective, config, out, **how)
    return {
        "result": (result.steps_done, result.stopped, result.best_step),
        "weights": {name: p.detach() for name, p in model.named_parameters()},
        "log": result.history,
    }


def at_forward(count: int, call: Callable[[], Any]) -> None:
    """Do something at the n-th forward of this process from now on."""
    original, calls = TitleLoss.forward, 0

    def forward(self: TitleLoss, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            call()
        return original(self, *args, **kwargs)

    TitleLoss.forward = forward  # type: ignore[method-assign]


def kill(number: signal.Signals) -> None:
    """Send this process a signal."""
    os.kill(os.getpid(), number)


def stop_and_go(out: Path) -> dict[str, Any]:
    """An uninterrupted run, one stopped by a signal to the second process and taken up, one begun by one process."""
    found = {"whole": whole_run(out / "whole"), "plain": whole_run(out / "plain", dropout=0.0)}
    if not processes.is_first():
        at_forward(2 * 7 - 1, lambda: kill(signal.SIGTERM))
    found["stopped"] = whole_run(out / "stopped")
    found["resumed"] = whole_run(out / "stopped", resume=True, workers=1)  # each builds its own rows
    found["from one"] = whole_run(out / "from one", resume=True, dropout=0.0)
    found["tower"] = [with_tower(out / f"tower {frozen}", frozen) for frozen in (True, False)]
    found["errors"] = {}
    for name, validate in (("metric", lambda model: {"MAP": 1.0}), ("validate", refuse)):
        try:
            config = TrainingSettings(**(vars(WHOLE) | {"evaluate_every": 1}))
            train(small_model(), cycle_world(), Objective(), config, out / name, validate=validate)
        except UserError as error:
            found["errors"][name] = str(error)
    return found


def with_tower(out: Path, frozen: bool) -> str:
    """How a run of a model ends that has weights which no text reaches."""
    model = small_model()
    model.tower = torch.nn.Linear(16, 16)
    if frozen:
        freeze_unused(model)
    try:
        settings = TrainingSettings(**(CONFIG | {"log_parts": False}))
        return train(model, cycle_world(), Objective(), settings, out).stopped
    except RuntimeError as error:
        return str(error)


def refuse(model: Any) -> dict[str, float]:
    """What fails where it is called, which is in the first process."""
    raise UserError(f"refused in process {processes.rank()}")


def killed(out: Path) -> None:
    """The second process is killed in the seventh step."""
    learned()  # its forwards are not counted
    if not processes.is_first():
        at_forward(2 * 7 - 1, lambda: kill(signal.SIGKILL))
    with pytest.raises(UserError, match="cannot reach the other processes: one of them has ended"):
        whole_run(out)


def go_on(out: Path) -> dict[str, Any]:
    """Take up what is there."""
    return whole_run(out, resume=True)


def sharded(out: Path, shard: bool = True) -> dict[str, Any]:
    """Two steps of a `TitleLoss` under torch's own ``fully_shard``: losses, gradients, temperature, last weights.

    With ``shard`` False the same in one process.
    """
    found = {}
    for name in ("igd", "msl-ats", "msl-ats-exact-all"):
        model, objective, examples = learned().train(), OBJECTIVES[name](out), weighted_examples()
        module = TitleLoss(model, objective, examples.trie)
        if shard:
            for layer in model.model.layers:
                fully_shard(layer)
            fully_shard(module)
            assert all(isinstance(p, DTensor) for p in module.parameters())
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
        rows = np.argsort(examples.size[:16], kind="stable").reshape(2, 8)
        batches = MicroBatches(examples, objective, processes.part(rows))
        steps = []
        for batch in (batches[0], batches[1]):
            del batch["counts"]
            total = sum(theirs for (theirs,) in processes.gather([batch.pop("contribution")]))
            loss = module(**batch)["loss"] / objective.divisor(torch.tensor(total))
            (loss * processes.count()).backward()
            whole = sum(theirs for (theirs,) in processes.gather([loss.item()]))
            gradients = {n: full(p.grad) for n, p in module.named_parameters()}
            steps.append({"loss": whole, "gradients": gradients, "tau": objective.tau})
            optimizer.step()
            optimizer.zero_grad()
        assert not shard or all(isinstance(p, DTensor) for p in module.parameters())
        found[name] = {"steps": steps, "weights": {n: full(p.detach()) for n, p in module.named_parameters()}}
    return found


def full(tensor: Any) -> Any:
    """A sharded tensor put together; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Launch:
    """Starts a job of this module, or of one like it, in several processes that meet over gloo.

    Args:
        environment: What the launcher sets besides.
    """

    def __init__(self, **environment: str) -> None:
        self.environment = environment
        self.forks = multiprocessing.get_context("forkserver")
        self.forks.set_forkserver_preload(["tests.process_child", "transformers.models.qwen2.modeling_qwen2"])

    def __call__(self, job: Callable[[Path], Any], out: Path, killed: int = 0, count: int = 2) -> list[Any]:
        """What the job returns in each process; so many of them, the last ones, are killed."""
        port = free_port()
        children = [
            self.forks.Process(target=in_processes, args=(job, str(out), port, rank, count, self.environment))
            for rank in range(count)
        ]
        for child in children:
            child.start()
        for child in children:
            child.join(120)
        ended = [0] * (count - killed) + [-signal.SIGKILL] * killed
        assert [child.exitcode for child in children] == ended
        return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(count - killed)]


def in_processes(
    job: Callable[[Path], Any], out: str, port: int, rank: int, count: int, environment: dict[str, str]
) -> None:
    """Run a job as one of ``count`` processes; what it returns is saved as ``RANK.pt``."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    os.environ |= environment | {
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
    }
    processes.start()
    found = job(Path(out))
    torch.save(found, Path(out) / f"{rank}.pt")
    processes.finish()
