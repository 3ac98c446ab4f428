"""The trained tensors of a model as a file."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from triewise.errors import UserError, reading


def trained(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: parameters that have a gradient, shared ones once, and saved buffers."""
    saved = model.state_dict().keys()
    tensors: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    tensors |= {name: b for name, b in model.named_buffers() if name in saved}
    return {name: t.detach().cpu().contiguous() for name, t in tensors.items()}


def save_trained(model: nn.Module, path: Path) -> None:
    """Write what training changes as one safetensors file."""
    save_file(trained(model), path)


def load_trained(model: nn.Module, path: Path) -> None:
    """Put the tensors of `save_trained` into a model.

    Raises:
        UserError: They are those of another model.
    """
    with reading(path):
        tensors = load_file(path)
    if tensors.keys() != trained(model).keys():
        raise UserError(
            f"wanted the weights of this model in {path}, got those of another; start the training anew"
        )
    with reading(path):
        model.load_state_dict(tensors, strict=False)
