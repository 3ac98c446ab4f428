"""A sequential model that several processes train: the same weights everywhere, and those of one process."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.process_child import Launch
from triewise.arrays import Ragged
from triewise.models import SequentialModel
from triewise.settings import SequentialSettings, TrainingSettings
from triewise.training import Sequences, Windows, fit, processes

N_ITEMS, STEPS = 12, 6


def sequences() -> Sequences:
    """Forty walks round a cycle of twelve items, of different lengths."""
    rows = [[(start + i) % N_ITEMS for i in range(3 + start % 5)] for start in range(40)]
    context = np.ones(len(rows), dtype=np.int32)
    return Sequences.from_windows(Windows(Ragged.from_lists(rows), context))


def trained(out: Path, stop: int | None = None, **choices: Any) -> dict[str, Any]:
    """Weights after some steps, those of a run that is gone on with where ``stop`` says after how many."""
    settings = SequentialSettings(**{"encoder": "sasrec", "width": 8, "blocks": 1, "dropout": 0.0} | choices)
    values = {"steps": STEPS, "batch_size": 8, "learning_rate": 1e-2, "warmup_steps": 0, "log_every": 2}
    counts = np.ones(N_ITEMS, dtype=np.int64)
    for limit in (stop, None) if stop else (None,):
        model = SequentialModel(settings, N_ITEMS, 8, seed=3)
        asked = values | ({"checkpoint_every": stop, "time_limit_s": 1e-9} if limit else {})
        how: dict[str, Any] = {"seed": 5, "resume": stop is not None and limit is None}
        result = fit(model, sequences(), counts, settings, TrainingSettings(**asked), out / "run", **how)
    return {"weights": model.state_dict(), "log": result.history, "count": processes.count()}


@pytest.fixture(scope="module")
def launch() -> Launch:
    return Launch()


@pytest.mark.parametrize("choices", [{}, {"encoder": "lrurec"}], ids=["sasrec", "lrurec"])
def test_two_processes_learn_what_one_does(launch: Launch, tmp_path: Path, choices: dict[str, Any]) -> None:
    one = trained(tmp_path / "one", **choices)
    two = launch(functools.partial(trained, **choices), tmp_path)
    assert [each["count"] for each in two] == [2, 2]
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two[0]["weights"][name], weight, atol=1e-3, rtol=1e-3)
        assert torch.equal(two[0]["weights"][name], two[1]["weights"][name])
    assert [row["loss"] for row in two[0]["log"]] == pytest.approx(
        [row["loss"] for row in one["log"]], rel=1e-4
    )


def test_two_processes_go_on_where_they_stopped(launch: Launch, tmp_path: Path) -> None:
    choices = {"dropout": 0.3, "loss": "bce"}
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = launch(functools.partial(trained, **choices), tmp_path / "whole")
    parts = launch(functools.partial(trained, stop=1, **choices), tmp_path / "parts")
    for name, weight in whole[0]["weights"].items():
        assert torch.equal(parts[0]["weights"][name], weight)
        assert torch.equal(parts[1]["weights"][name], weight)
