"""A six-item catalogue drawn as a tree, a tiny random language model, and where real data is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

# root ─ 1 ─ 2 ─ 0            item 0
#      │   ├ 3 ─ 0            items 1 and 4 (equal titles)
#      │   └ 3 ─ 5 ─ 0        item 2
#      ├ 4 ─ 4 ─ 0            item 3: forced after its first token
#      └ 0                    item 5: an empty title, only the terminator
SIX = [[1, 2, 0], [1, 3, 0], [1, 3, 5, 0], [4, 4, 0], [1, 3, 0], [0]]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small matrices: threads cost more than they give, and one thread makes sums repeatable."""
    import torch

    torch.set_num_threads(1)


def shared(name: str) -> Path:
    """A folder of real data, or a skip that says why."""
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"real data set {name} is not beside the project (wanted {folder})")
    return folder
