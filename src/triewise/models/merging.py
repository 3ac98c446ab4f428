"""Adapters folded into their base, and taken off it; a quantised base brought back to full precision.

Merging never quantises again: the base is brought back to full precision, then the adapter is added, so merged and
unmerged scores agree. Not so over an ``8bit`` base: its layers round their inputs too, and which columns are spared
depends on the whole batch (LLM.int8()), so unmerged scores of one user depend on the users beside it. Evaluation
merges there.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from triewise.errors import UserError, first_line

PEFT_FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError, LookupError)


def is_adapted(model: Any) -> bool:
    """Whether the model is an adapter around a base."""
    return hasattr(model, "get_base_model")


def is_quantised(model: Any) -> bool:
    """Whether some layer of the model holds 8-bit or 4-bit weights."""
    return any(is_packed(module) for module in model.modules())


def is_packed(module: nn.Module) -> bool:
    """Whether this is a quantised layer of bitsandbytes, not PEFT's layer of the same name around it."""
    return type(module).__name__ in ("Linear4bit", "Linear8bitLt") and not hasattr(module, "base_layer")


def twin(model: Any) -> Any:
    """A copy of the modules that shares all weights."""
    # The tensors are handed to deepcopy as copied already, so only modules are copied.
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def without_adapter(model: Any) -> Any:
    """The model under an adapter as a model of its own, which shares all weights; the given one stays as it is."""
    plain = twin(model)
    if is_adapted(plain):
        plain = plain.unload()
        plain.__dict__.pop("peft_config", None)
    return plain


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and layer of everything that PEFT has put around a layer's weights, outer ones first."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    yield from ((name, m) for name, m in model.named_modules() if isinstance(m, BaseTunerLayer))


def merged(model: Any) -> Any:
    """A plain causal LM in full precision with the adapter folded in.

    The given model stays as it is. Weights that neither an adapter nor quantisation touches are shared with it; the
    others are new, so for a quantised base this needs the memory of a full-size model. Beside that, one layer's
    change is held at a time, in float32.

    Raises:
        UserError: PEFT cannot fold this adapter in.
    """
    plain, full = twin(model), {}
    if is_adapted(model):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # embeddings that are no longer tied: the config says so afterwards
                for name, layer in adapted_layers(plain.get_base_model()):
                    packed = is_packed(layer.get_base_layer())
                    if packed:
                        full[name] = _unpacked(layer)
                        layer.merged_adapters = list(layer.active_adapters)
                    else:
                        fold(layer)
                plain = plain.merge_and_unload()  # what is left: whole modules, trained tokens
        except PEFT_FAILURES as error:
            raise UserError(
                f"the adapter cannot be folded into its base ({type(error).__name__}: {first_line(error)}); evaluate "
                "with evaluation.merge_adapter = false"
            ) from error
        plain.__dict__.pop("peft_config", None)
        _freeze_apart(plain)
    if is_quantised(plain):
        _unpack(plain, full)
    return plain.eval()


def fold(layer: Any) -> None:
    """PEFT's own merge into new weights of the base layer; the sum is taken in float32, then rounded once."""
    base, only = layer.get_base_layer(), getattr(layer, "parameter_name", None)
    kept = {}
    for name, weight in base.named_parameters(recurse=False):
        if only in (None, name) and weight.is_floating_point():
            kept[name] = weight.dtype
            wide = torch.promote_types(weight.dtype, torch.float32)
            setattr(base, name, _frozen(weight.detach().to(wide, copy=True)))
    layer.merge()
    for name, dtype in kept.items():
        setattr(base, name, _frozen(getattr(base, name).detach().to(dtype)))


def _freeze_apart(plain: nn.Module) -> None:
    """Give a merged model weights of its own, frozen, where it shares them with an adapter that is trained."""
    known: dict[int, nn.Parameter] = {}
    for module in plain.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight.requires_grad:
                own = known.setdefault(id(weight), _frozen(weight.detach().clone()))
                setattr(module, name, own)


def _unpacked(layer: Any) -> Tensor:
    """The float32 weight of a quantised layer with its adapter; transposed as the packed one is."""
    from peft.utils.integrations import dequantize_module_weight

    weight: Tensor = dequantize_module_weight(layer.get_base_layer()).detach().float()
    for name in layer.active_adapters:
        if getattr(layer, "lora_variant", {}).get(name) is not None or not hasattr(layer, "get_delta_weight"):
            raise NotImplementedError("only plain LoRA is folded into a quantised base")
        weight = weight + layer.get_delta_weight(name).detach().float()
    return weight


def _unpack(model: Any, full: dict[str, Tensor]) -> None:
    """Bring a quantised model to full precision; some weights are given, in float32."""
    from peft.utils.integrations import dequantize_module_weight
    from transformers.pytorch_utils import Conv1D

    config = copy.deepcopy(model.config)
    del config.quantization_config
    with torch.device("meta"):
        architecture = type(model)(config)
    dtype = model.get_output_embeddings().weight.dtype
    for name, packed in [(name, m) for name, m in model.named_modules() if is_packed(m)]:
        weight = (full.pop(name) if name in full else dequantize_module_weight(packed).detach().float()).to(
            dtype
        )
        layer = architecture.get_submodule(name)
        # GPT-2 keeps its layers transposed; bitsandbytes does not.
        layer.weight = _frozen(weight.T.contiguous() if isinstance(layer, Conv1D) else weight)
        layer.bias = packed.bias
        model.set_submodule(name, layer)
    model.hf_quantizer, model.config = None, config
    model.is_quantized = model.is_loaded_in_4bit = model.is_loaded_in_8bit = False


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)
