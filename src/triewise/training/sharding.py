"""Weights that are spread over the processes while they are trained (FSDP2), and whole wherever else they are used.

What is trained is a twin of the model: the same modules, whose weights are DTensors of torch's ``fully_shard``. The
model itself is empty meanwhile. Its weights come back in the first process to be validated or kept, and in every
process at the end; so whatever holds the model, a recommender for one, knows nothing of shards. Each block of the
model is a unit that is gathered for its own forward and backward; embedding, final norm and head are one more, which
stays gathered from the forward to the end of the backward pass, so that the loss may read the head by hand.

Weights are gathered, and gradients added up, in the dtype of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from triewise.errors import UserError
from triewise.models import causal_lm, twin
from triewise.progress import note
from triewise.training import processes


def shardable_twin(model: Any) -> Any:
    """The modules of a model once more, with its weights, for `Shards`.

    Raises:
        UserError: Some weights are quantised.
    """
    if not all(p.is_floating_point() for p in model.parameters()):
        raise UserError(
            "wanted floating-point weights under FSDP, got a quantised backbone; drop backbone.quantisation, or launch "
            "without --use_fsdp"
        )
    return twin(model)


class Shards:
    """The weights of a model, spread over the processes.

    Args:
        model: The model; it is empty from now on.
        module: What is trained, an `objective.TitleLoss` around `shardable_twin` of ``model``.

    Attributes:
        model: The model.
        twin: Its modules with this process's part of each weight.
    """

    def __init__(self, model: Any, module: Any) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.model, self.twin = model, module.model
        mesh = init_device_mesh(model.device.type, (processes.count(),))
        kinds = set(getattr(causal_lm(model), "_no_split_modules", None) or ())
        blocks = [name for name, m in self.twin.named_modules() if type(m).__name__ in kinds]
        if not blocks:
            note("warning: no blocks of this model are known; all its weights are gathered at once")
        for name in reversed(blocks):  # a block inside another one before that one
            fully_shard(self.twin.get_submodule(name), mesh=mesh)
            _empty(model.get_submodule(name))
        fully_shard(module, mesh=mesh, reshard_after_forward=False)
        _empty(model)

    @contextmanager
    def whole(self, everywhere: bool = False) -> Iterator[None]:
        """A block with the weights in the model, of the first process or of all; every process has to enter it."""
        self.put_back(everywhere or processes.is_first())
        try:
            yield
        finally:
            _empty(self.model)

    @torch.no_grad()
    def put_back(self, here: bool = True) -> None:
        """Gather the weights, and put them into the model of those processes that say so; all have to call it."""
        for ours, part in zip(self.model.parameters(), self.twin.parameters(), strict=True):
            gathered = part.full_tensor()
            if here:
                ours.data = gathered

    def finite(self) -> bool:
        """Whether what is trained is finite, in every process; all have to call it."""
        parts = (p for p in self.twin.parameters() if p.requires_grad)
        ours = all(bool(part.to_local().isfinite().all()) for part in parts)
        return all(finite for (finite,) in processes.gather([ours]))

    def save(self, folder: Path, optimizer: Any) -> Path:
        """Write what is trained of the model, and the optimiser's state: each process its part.

        Args:
            folder: A folder that all processes see.
            optimizer: As the Trainer holds it.

        Returns:
            ``folder``.

        Raises:
            Exception: What failed in one process is raised in all; an OSError where a disk is full.
        """
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.state_dict_saver import save

        try:
            save(self._state(optimizer), checkpoint_id=folder)
        except CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from None
        return folder

    def load(self, folder: Path, optimizer: Any = None) -> None:
        """Continue from what `save` wrote, in any number of processes: with the model, or with its optimiser."""
        from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict
        from torch.distributed.checkpoint.state_dict_loader import load

        state = self._state(optimizer)
        state.pop("optimizer" if optimizer is None else "model", None)
        load(state, checkpoint_id=folder)
        options = _trained_only()
        if optimizer is None:
            set_model_state_dict(self.twin, state["model"], options=options)
        else:
            set_optimizer_state_dict(self.twin, optimizer.optimizer, state["optimizer"], options=options)

    def _state(self, optimizer: Any) -> dict[str, Any]:
        """What is trained, and the optimiser's state, by the names of the model's weights."""
        from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

        options = _trained_only()
        state: dict[str, Any] = {"model": get_model_state_dict(self.twin, options=options)}
        if optimizer is not None:
            # `optimizer.optimizer`: torch's own, without what accelerate put around it.
            state["optimizer"] = get_optimizer_state_dict(self.twin, optimizer.optimizer, options=options)
        return state


def _trained_only() -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(ignore_frozen_params=True, strict=False)


def _empty(module: nn.Module) -> None:
    """Let go of the weights of a module."""
    for p in module.parameters():
        p.data = p.new_empty(0)
