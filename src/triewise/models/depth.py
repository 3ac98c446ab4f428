"""Part of a language model's layers: the first few of a pre-trained one, and which of them are trained.

A model with fewer layers is made by its config before its weights are read, so that whatever a family derives from
the number of layers is right from the start, and the rest of the checkpoint is never in memory.
"""

from __future__ import annotations

import contextlib
import copy
import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from triewise.errors import UserError
from triewise.models.anatomy import causal_lm, probing, sample_ids, text_body, text_config

# What an embedding or a layer takes from the number of all: vectors for each layer (Gemma 3n, Gemma 4); two layers of
# the cache for each of the model (LongCat).
_OF_ALL = ("hidden_size_per_layer_input", "num_layers")


def first_layers(name: str, config: Any, n: int) -> Any:
    """A config of the first n layers, then the last norm and the head (SLMRec, arXiv:2405.17890).

    Lists with an entry for each layer, such as ``layer_types``, lose the entries of those that are left out.

    Args:
        name: What the user asked for.
        config: Of the whole model; it stays as it is.
        n: Layers that are kept, > 0.

    Raises:
        UserError: The model has fewer layers, or its layers depend on how many there are.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    depth = getattr(text, "num_hidden_layers", None)
    if not isinstance(depth, int) or n > depth:
        raise UserError(f"wanted backbone.layers of at most {depth}, the layers of {name!r}, got {n}")
    if any(getattr(text, key, None) not in (None, 0, depth) for key in _OF_ALL):
        raise UserError(
            f"wanted backbone.layers for a family whose layers stand for themselves, got {name!r} ({text.model_type}); "
            "leave it out, or choose another model"
        )
    names = {key for key, value in vars(text).items() if isinstance(value, list) and len(value) == depth}
    text.num_hidden_layers = n
    if getattr(text, "num_blocks", None) == depth:  # xLSTM counts by this one
        text.num_blocks = n
    for key in names:
        setattr(text, key, getattr(text, key)[:n])
    if hasattr(text, "scale_depth"):  # MiniCPM divides it by the root of the number of layers
        text.scale_depth *= math.sqrt(n / depth)
    return config


def of_first_layers(keys: Iterable[str], n: int) -> list[str]:
    """Names of weights without those of layers from number n on."""
    return [key for key in keys if all(int(number) < n for number in re.findall(r"\.(\d+)\.", key))]


def layers_of(model: Any) -> nn.ModuleList:
    """The layers of the part that reads text, in their order.

    Raises:
        UserError: They are in no list of their own.
    """
    n = text_config(model).num_hidden_layers
    found = [m for m in text_body(model).modules() if isinstance(m, nn.ModuleList) and len(m) == n]
    if not found:
        raise UserError(
            f"wanted a model with one list of its {n} layers for training.freeze, got "
            f"{type(causal_lm(model)).__name__}; set it to 0"
        )
    return found[0]


def freeze_first(model: Any, n: int) -> None:
    """Freeze the first n layers and all that runs before them, embeddings too; a head that is tied to those as well.

    Raises:
        UserError: No layer would be left to train.
    """
    if not n:
        return
    layers = layers_of(model)
    if n >= len(layers):
        raise UserError(
            f"wanted training.freeze below {len(layers)}, the layers of the model, got {n}; leave one to train"
        )
    begun: list[nn.Module] = []

    def stop(*_: Any) -> None:
        raise Reached

    hooks = [
        m.register_forward_pre_hook(lambda m, _: begun.append(m))
        for m in model.modules()
        if m is not layers[n]
    ]
    hooks.append(layers[n].register_forward_pre_hook(stop))
    try:
        with torch.no_grad(), probing(model), contextlib.suppress(Reached):
            model(input_ids=sample_ids(model, 8), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    outer = {id(p) for p in layers[n:].parameters()}
    for module in begun:  # of those that hold the later layers only what is their own
        own = module.parameters(recurse=layers[n] not in set(module.modules()))
        for parameter in own:
            if id(parameter) not in outer:
                parameter.requires_grad_(False)


class Reached(Exception):
    """Raised where a forward has come far enough."""
