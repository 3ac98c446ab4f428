"""Workers that build batches: the same batches, nothing left behind, one line when one dies."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.process_child import OBJECTIVES, single_targets, weighted_examples
from tests.token_worlds import cycle_world, make_prompts, make_split
from tests.train_child import adaptive_run, small_model
from triewise.errors import UserError
from triewise.settings import TrainingSettings
from triewise.tokens import Trie, zero_gain
from triewise.training import Examples, Objective, ahead, make_windows, train
from triewise.training.ahead import Ahead, default_workers
from triewise.training.objective import MicroBatches, TitleLoss
from triewise.training.trainer import TrieTrainer

CPU = torch.device("cpu")
ROWS = np.random.default_rng(0).permutation(24).reshape(6, 4)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),  # on few cores
]


@pytest.fixture(autouse=True)
def no_worker_is_left() -> Any:
    yield
    assert not multiprocessing.active_children()


def equal(ours: Any, theirs: Any) -> bool:
    assert ours.keys() == theirs.keys()
    tensors = {name for name, value in ours.items() if isinstance(value, torch.Tensor)}
    assert all(ours[n].dtype == theirs[n].dtype and torch.equal(ours[n], theirs[n]) for n in tensors)
    return {n: ours[n] for n in ours.keys() - tensors} == {n: theirs[n] for n in ours.keys() - tensors}


def crowded() -> Examples:
    """Prompts of few tokens, which lose titles."""
    full = cycle_world()
    sequences = [full.prompts.title_tokens[i].tolist() for i in range(12)]
    rows = [(str(u), [u % 12, (u + 1) % 12, (u + 2) % 12], (u + 3) % 12) for u in range(24)]
    prompts = make_prompts(sequences, max_tokens=7)
    trie = Trie.from_sequences(sequences)
    windows = make_windows(make_split(rows), "last", prompts)
    return Examples(windows, prompts, trie, None, zero_gain(trie, np.ones(12, np.int64)))


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("name", ["lml", "msl-ats", "cft", "sdpo"])
def test_batches_are_the_same_for_any_number_of_workers(name: str, workers: int, tmp_path: Path) -> None:
    examples = single_targets() if name == "sdpo" else weighted_examples()
    batches = OBJECTIVES[name](tmp_path).batches(examples, ROWS, True)
    loader = Ahead(batches, CPU, workers)
    found = list(loader)
    loader.close()
    assert len(found) == len(loader) == 6
    assert all(equal(found[i], batches[i]) for i in range(6))


@pytest.mark.parametrize(
    "name", sorted(set(OBJECTIVES) - {"flower"})
)  # its batches ask the model that is trained
def test_what_workers_are_given_travels_between_processes(name: str, tmp_path: Path) -> None:
    """As where Python starts anew (Windows, macOS): no tensor of a device goes along."""
    examples = single_targets() if name == "sdpo" else weighted_examples()
    examples.trie.to("meta")
    learned = OBJECTIVES[name](tmp_path)
    if learned.objective.is_adaptive:
        learned.objective.temperature.on(torch.device("cpu"))
    batches = learned.batches(examples, ROWS, True)
    there = pickle.loads(pickle.dumps(batches))
    assert all(equal(there[i], batches[i]) for i in range(6))
    assert not there.examples.trie._on_device and examples.trie._on_device
    assert there.objective.settings() == batches.objective.settings()
    assert there.objective.tau == batches.objective.tau


@pytest.mark.slow
def test_a_worker_that_starts_anew_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_method", lambda: "spawn")
    batches = MicroBatches(weighted_examples(), Objective(), ROWS)
    loader = Ahead(batches, CPU, 1)
    assert loader.multiprocessing_context.get_start_method() == "spawn"
    assert all(equal(item, batches[i]) for i, item in enumerate(loader))
    loader.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_dropped_titles_are_counted_once_and_when_they_are_used(workers: int) -> None:
    examples = crowded()
    batches = MicroBatches(examples, Objective(), ROWS)
    loader = Ahead(batches, CPU, workers)
    counted = []
    for _ in loader:
        counted.append((examples.prompts.dropped.titles, examples.prompts.dropped.prompts))
    loader.close()
    assert counted == [(4 * i, 4 * i) for i in range(1, 7)]


def test_a_mistake_of_the_user_is_told_as_without_workers() -> None:
    examples = crowded()
    object.__setattr__(examples.prompts, "max_tokens", 0)
    loader = Ahead(MicroBatches(examples, Objective(), ROWS), CPU, 2)
    with pytest.raises(
        UserError, match="^wanted a prompt of at most 0 tokens, the instruction alone has 1; raise"
    ):
        list(loader)
    loader.close()


def run(out: Path, workers: int, **changes: Any) -> Any:
    budget = {"steps": 6, "learning_rate": 3e-3, "batch_size": 4, "log_every": 2, "workers": workers}
    settings = TrainingSettings(**(budget | changes))
    model = small_model(dropout=0.3)
    result = train(model, crowded(), Objective("vocabulary"), settings, out)
    return [p.detach() for p in model.parameters()], result


def test_a_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    none, whole = run(tmp_path / "none", 0, log_parts=True)
    two, with_two = run(tmp_path / "two", 2, log_parts=True)
    assert all(map(torch.equal, none, two))
    assert [row["loss"] for row in whole.history] == [row["loss"] for row in with_two.history]


def test_a_run_that_is_stopped_goes_on_with_another_number(tmp_path: Path) -> None:
    model, _ = adaptive_run(tmp_path / "whole")
    adaptive_run(tmp_path / "parted", workers=2, time_limit_s=1e-6)
    resumed, result = adaptive_run(tmp_path / "parted", workers=1, resume=True)
    assert result.stopped == "steps"
    assert all(map(torch.equal, model.parameters(), resumed.parameters()))


def test_a_killed_worker_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = MicroBatches.__getitem__

    def killed(self: MicroBatches, index: int) -> Any:
        if index == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, index)

    monkeypatch.setattr(MicroBatches, "__getitem__", killed)
    with pytest.raises(
        UserError, match=r"^a process that builds batches has ended: DataLoader worker .*--resume$"
    ):
        run(tmp_path, 2)


def test_ctrl_c_goes_to_all_processes_and_the_step_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal sends it to workers too; a second one acts at once, and they end all the same."""
    original, calls = TitleLoss.forward, 0

    def forward(self: TitleLoss, **batch: Any) -> Any:
        nonlocal calls
        calls += 1
        children = [child.pid for child in multiprocessing.active_children()]
        assert len(children) == 2
        if calls in (3, 7):
            for pid in (*children, os.getpid()):
                os.kill(pid, signal.SIGINT)
        if calls == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, **batch)

    monkeypatch.setattr(TitleLoss, "forward", forward)
    _, result = run(tmp_path / "first", 2, accumulation=2)
    assert (result.stopped, result.steps_done) == ("interrupted", 2)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "second", 2, accumulation=2)
    assert calls == 7


def test_batches_for_cuda_are_pinned_and_copied_without_waiting(tmp_path: Path) -> None:
    trainer = TrieTrainer(small_model(), cycle_world(), Objective(), TrainingSettings(), tmp_path)
    assert not trainer.get_train_dataloader().pin_memory
    trainer.args.__dict__["_setup_devices"] = torch.device("cuda:1")
    assert trainer.get_train_dataloader().pin_memory
    asked = []

    class Spy(torch.Tensor):
        def to(self, *args: Any, **kwargs: Any) -> Any:
            asked.append((args, kwargs))
            return self

    trainer._prepare_inputs({"input_ids": torch.zeros(1).as_subclass(Spy), "n_edges": 1})
    assert asked == [((torch.device("cuda:1"),), {"non_blocking": True})]


def test_default_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda:1")
    monkeypatch.setattr(ahead.os, "sched_getaffinity", lambda pid: range(16), raising=False)
    monkeypatch.setattr(
        ahead, "multiprocessing", SimpleNamespace(get_all_start_methods=lambda: ["spawn", "fork"])
    )
    assert [default_workers(torch.device(d)) for d in ("cpu", "mps", "meta")] == [0, 0, 0]
    assert default_workers(cuda) == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert default_workers(cuda) == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert default_workers(cuda) == 0
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setattr(ahead, "multiprocessing", SimpleNamespace(get_all_start_methods=lambda: ["spawn"]))
    assert default_workers(cuda) == 0
