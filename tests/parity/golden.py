"""Files of numbers computed with the authors' code, where they lie beside the project: ``../shared/golden``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
TOLERANCE = 1e-6  # of values that were computed in float64


def piece(method: str, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs and outputs of one piece of ``METHOD.json``, as tensors (float64, int64) or numbers.

    A tensor with a rule is ``scale sin(freq i + phase) + shift`` at its flat index i.
    """
    file = GOLDEN / f"{method}.json"
    if not file.is_file():
        pytest.skip(f"no {method}.json in ../shared/golden")
    found = json.loads(file.read_text(encoding="utf-8"))["pieces"][name]
    return {key: _value(v) for key, v in found["inputs"].items()}, {
        key: _value(v) for key, v in found["outputs"].items()
    }


def _value(given: Any) -> Any:
    if isinstance(given, dict) and "rule" in given:
        rule, shape = given["rule"], given["shape"]
        flat = np.arange(int(np.prod(shape)), dtype=np.float64)
        made = rule["scale"] * np.sin(rule["freq"] * flat + rule["phase"]) + rule["shift"]
        tensor = torch.from_numpy(made.reshape(shape))
        if "values" in given:
            close(tensor, given["values"])
        return tensor
    if isinstance(given, dict) and "values" in given:
        return torch.tensor(
            given["values"], dtype=torch.float64 if _holds_floats(given["values"]) else torch.int64
        )
    ragged = isinstance(given, list) and len({len(v) for v in given if isinstance(v, list)}) > 1
    return torch.tensor(given, dtype=torch.float64) if isinstance(given, list) and not ragged else given


def _holds_floats(values: Any) -> bool:
    return any(map(_holds_floats, values)) if isinstance(values, list) else isinstance(values, float)


def close(found: torch.Tensor, wanted: Any, tolerance: float = TOLERANCE) -> None:
    """Assert that two tensors agree to an absolute tolerance."""
    wanted = wanted if isinstance(wanted, torch.Tensor) else torch.tensor(wanted, dtype=torch.float64)
    torch.testing.assert_close(found.detach().double(), wanted.double(), atol=tolerance, rtol=0)
