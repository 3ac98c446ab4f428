"""The parts of a causal language model: body, head, windows, masks, and the device and dtype it runs in.

Shape key: V vocabulary, D width, C some tokens, B rows, Q queries, K keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from triewise.errors import UserError, first_line


def resolve_device(device: str) -> torch.device:
    """``auto`` to the best device at hand; UserError for a device torch does not know."""
    if device == "auto":
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(best)
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"wanted a device such as auto, cpu, cuda or mps that works here, got {device!r}: {first_line(error)}"
        ) from None
    return chosen


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """``auto`` to bfloat16 on a CUDA device that computes in it (a T4 only emulates it), else float32."""
    if dtype == "auto":
        real = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if real else torch.float32
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in kinds:
        raise UserError(f"wanted a dtype among auto, {', '.join(kinds)}, got {dtype!r}")
    return kinds[dtype]


def training_dtype(dtype: str, device: torch.device) -> tuple[str, bool]:
    """In which dtype weights are loaded that are all trained, and whether forwards run under bfloat16 autocast.

    A step of the optimiser is lost where weights have few digits: at a learning rate of 2e-5 bfloat16 weights move a
    fifth of what float32 ones do, and norms never. So they are float32, and ``bfloat16`` is what is computed in.

    Raises:
        UserError: float16, whose gradients would need a scaler.
    """
    if dtype == "float16":
        raise UserError(
            "wanted backbone.dtype auto, float32 or bfloat16 to train every weight, got 'float16', in which small "
            "gradients vanish; change it, or set backbone.lora.rank > 0"
        )
    return "float32", resolve_dtype(dtype, device) == torch.bfloat16


def causal_lm(model: Any) -> Any:
    """The causal LM itself, without an adapter's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def body(model: Any) -> nn.Module:
    """The model below its head: ids (or a cache) in, ``last_hidden_state`` after the final norm out."""
    lm = causal_lm(model)
    inner: nn.Module = lm.base_model
    if inner is lm:  # of Llama 4 the name of the body is not that of its attribute
        parts = [part for part in lm.children() if hasattr(part, "base_model")]
        inner = parts[0] if len(parts) == 1 else lm
    return inner


def text_body(model: Any) -> nn.Module:
    """The part of the body that reads text: without the vision and audio towers beside it."""
    lm = causal_lm(model)
    inner: nn.Module = lm.get_decoder()
    # Of some models the attribute `decoder` is the head.
    return body(lm) if inner in (lm, lm.get_output_embeddings()) else inner


def head_weight(model: Any) -> Tensor:
    """(V, D) weight of the output head (tied or not), without what an adapter has learned of some tokens."""
    layer = causal_lm(model).get_output_embeddings()
    # PEFT's own attribute would copy the whole head at each call.
    weight: Tensor = (
        layer.token_adapter.base_layer.weight if hasattr(layer, "token_adapter") else layer.weight
    )
    return weight


def n_inputs(model: Any) -> int:
    """Every id that the input embedding resolves lies below: the vocabulary, and slots where it has some."""
    return int(getattr(causal_lm(model).get_input_embeddings(), "n_ids", head_weight(model).shape[0]))


def sample_ids(model: Any, n: int) -> Tensor:
    """Token ids (1, n), int64, from all over the vocabulary, on the model's device: a text for probes."""
    weight = head_weight(model)
    return torch.linspace(0.1, 0.9, n, device=weight.device).mul(weight.shape[0]).long()[None]


@contextmanager
def probing(model: Any, training: bool = False) -> Iterator[Any]:
    """The model in evaluation or training mode for a while; random numbers drawn meanwhile leave the others alone.

    Buffers keep their precision: CTRL's forward casts its table of positions to that of the weights.
    """
    before, device = model.training, head_weight(model).device
    kept = [(m, name, buffer) for m in model.modules() for name, buffer in m.named_buffers(recurse=False)]
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield model.train(training)
    finally:
        model.train(before)
        for module, name, buffer in kept:
            if getattr(module, name).dtype != buffer.dtype:
                setattr(module, name, buffer)


def takes_masks(model: Any) -> bool:
    """Whether its attention implementation takes a mask of our own."""
    return causal_lm(model).config._attn_implementation in ("sdpa", "eager")


def own_mask(model: Any, mask: Tensor) -> Tensor:
    """A boolean mask (B, 1, Q, K) of what each query sees, as the model wants it: additive for eager attention."""
    if causal_lm(model).config._attn_implementation == "sdpa":
        return mask
    kind = head_weight(model).dtype
    return torch.zeros(mask.shape, dtype=kind, device=mask.device).masked_fill(~mask, torch.finfo(kind).min)


@contextmanager
def whole_rows() -> Iterator[None]:
    """Forwards without a mask take each row for one sequence meanwhile, as they do anyway, and do not ask the device.

    Else transformers looks for several sequences in a row, by its positions, and some models for padding that they
    might warn of; both wait for the answer.
    """
    from transformers import PreTrainedModel, masking_utils

    asks: list[tuple[Any, str]] = [
        (masking_utils, "find_packed_sequence_indices"),
        (PreTrainedModel, "warn_if_padding_and_no_attention_mask"),
    ]
    before = [getattr(owner, name, None) for owner, name in asks]
    for owner, name in asks:
        setattr(owner, name, lambda *args: None)
    try:
        yield
    finally:
        for (owner, name), function in zip(asks, before, strict=True):
            setattr(owner, name, function)


def cache_of(layers: Iterable[tuple[Tensor, Tensor]] = ()) -> Any:
    """A cache of transformers that holds keys and values (B, H, S, D) of each layer."""
    from transformers import DynamicCache

    held = list(layers)
    return DynamicCache(held) if held else DynamicCache()


def compute_again(model: Any, on: bool) -> None:
    """Switch gradient checkpointing on or off: layers then keep no activations for the backward pass.

    Raises:
        UserError: The model has none.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise UserError(
            f"wanted a model with gradient checkpointing, got {type(model).__name__}, which has none; set "
            "training.gradient_checkpointing = false"
        )
    # transformers >= 5.23 says activation where older ones say gradient.
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    switch = getattr(model, f"{name}_checkpointing_{'enable' if on else 'disable'}")
    switch(*([{"use_reentrant": False}] if on else []))


def computes_again(model: Any) -> bool:
    """Whether layers of a model that is being trained keep no activations; such layers take no cache."""
    return bool(model.training) and any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def text_config(model: Any) -> Any:
    """The config of the part that reads text."""
    return causal_lm(model).config.get_text_config(decoder=True)
