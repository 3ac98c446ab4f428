"""Numbers that the authors' code of LLaRA and A-LLMRec gives, beside the project."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import SHARED


class Piece:
    """Inputs and outputs of one part of a method; a tensor with a rule is made by it."""

    def __init__(self, piece: dict[str, Any]) -> None:
        self.inputs, self.outputs = piece["inputs"], piece["outputs"]

    def __getitem__(self, name: str) -> Any:
        """An input; tensors in float64, or int64 where they are whole numbers without a rule."""
        value = self.inputs[name]
        if not isinstance(value, dict):
            return value
        shape, rule = value["shape"], value.get("rule")
        if rule is None:
            return torch.tensor(value["values"]).reshape(shape)
        i = np.arange(int(np.prod(shape)))
        numbers = rule["scale"] * np.sin(rule["freq"] * i + rule["phase"]) + rule["shift"]
        return torch.from_numpy(numbers.reshape(shape))

    def close(self, ours: Tensor | float, name: str, tolerance: float = 1e-6) -> None:
        """Whether an output is ours."""
        theirs = torch.tensor(self.outputs[name], dtype=torch.float64)
        torch.testing.assert_close(torch.as_tensor(ours).double(), theirs, rtol=0, atol=tolerance)


def piece(method: str, name: str) -> Piece:
    """One piece of a method's file, or a skip that says why."""
    file = Path(SHARED).parent / "golden" / f"{method}.json"
    if not file.is_file():
        pytest.skip(f"the numbers of {method} are not beside the project (wanted {file})")
    return Piece(json.loads(file.read_text(encoding="utf-8"))["pieces"][name])


def fill(module: torch.nn.Module, *tensors: Tensor) -> torch.nn.Module:
    """A module in float64 whose parameters, in their order, are some tensors."""
    module = module.double()
    with torch.no_grad():
        for parameter, tensor in zip(module.parameters(), tensors, strict=True):
            parameter.copy_(tensor)
    return module
