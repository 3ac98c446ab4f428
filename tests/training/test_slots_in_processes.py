from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.sharding_child import SHARDED
from tests.slot_child import hybrid_run
from tests.training.test_processes import Launch
from triewise.training.curriculum import are_hybrid


@pytest.mark.parametrize("environment", [{}, SHARDED], ids=["ddp", "fsdp"])
def test_two_processes_train_slots_as_one_does(environment: dict[str, str], tmp_path: Path) -> None:
    """Some steps are text alone, and some mix both: projections without a gradient keep nobody waiting."""
    kinds = are_hybrid(np.random.default_rng([1, 2]).random(16), 24).reshape(8, 2)
    assert (~kinds).all(1).any() and kinds.any()
    torch.set_num_threads(1)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one = hybrid_run(tmp_path / "one")
    first, second = Launch(**environment)(hybrid_run, tmp_path / "two")
    assert first["loss"] == pytest.approx(one["loss"], rel=1e-5)
    for name, weight in one["weights"].items():
        torch.testing.assert_close(first["weights"][name], weight, rtol=1e-4, atol=1e-6)
        assert torch.equal(first["weights"][name], second["weights"][name])
