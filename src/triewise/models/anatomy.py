"""The parts of a causal language model: body, head, windows, masks, and the device and dtype it runs in.

Shape key: V vocabulary, D width, C some tokens, B rows, Q queries, K keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
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
    inner: nn.Module = causal_lm(model).base_model
    return inner


def text_body(model: Any) -> nn.Module:
    """The part of the body that reads text: without the vision and audio towers beside it."""
    lm = causal_lm(model)
    inner: nn.Module = lm.get_decoder()
    # Of some models the attribute `decoder` is the head.
    return lm.base_model if inner is lm.get_output_embeddings() else inner


def head_weight(model: Any) -> Tensor:
    """(V, D) weight of the output head (tied or not)."""
    weight: Tensor = causal_lm(model).get_output_embeddings().weight
    return weight


def head_bias(model: Any) -> Tensor | None:
    """(V,) bias of the output head, or None."""
    return getattr(causal_lm(model).get_output_embeddings(), "bias", None)


def n_inputs(model: Any) -> int:
    """Every id that the input embedding resolves lies below: the vocabulary, and slots where it has some."""
    return int(getattr(causal_lm(model).get_input_embeddings(), "n_ids", head_weight(model).shape[0]))


def sample_ids(model: Any, n: int) -> Tensor:
    """Token ids (1, n), int64, from all over the vocabulary, on the model's device: a text for probes."""
    weight = head_weight(model)
    return torch.linspace(0.1, 0.9, n, device=weight.device).mul(weight.shape[0]).long()[None]


@contextmanager
def probing(model: Any, training: bool = False) -> Iterator[Any]:
    """The model in evaluation or training mode for a while; random numbers drawn meanwhile leave the others alone."""
    before, device = model.training, head_weight(model).device
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield model.train(training)
    finally:
        model.train(before)


def takes_masks(model: Any) -> bool:
    """Whether its attention implementation takes a mask of our own."""
    return causal_lm(model).config._attn_implementation in ("sdpa", "eager")


def own_mask(model: Any, mask: Tensor) -> Tensor:
    """A boolean mask (B, 1, Q, K) of what each query sees, as the model wants it: additive for eager attention."""
    if causal_lm(model).config._attn_implementation == "sdpa":
        return mask
    kind = head_weight(model).dtype
    return torch.zeros(mask.shape, dtype=kind, device=mask.device).masked_fill(~mask, torch.finfo(kind).min)


def cache_of(layers: Iterable[tuple[Tensor, Tensor]] = ()) -> Any:
    """A cache of transformers that holds keys and values (B, H, S, D) of each layer."""
    from transformers import DynamicCache

    held = list(layers)
    return DynamicCache(held) if held else DynamicCache()


def is_recurrent(model: Any) -> bool:
    """Whether some layers are not attention."""
    kinds = getattr(_text_config(model), "layer_types", None) or []
    return any("attention" not in kind or "linear" in kind for kind in kinds)


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


def shortest_window(model: Any) -> int | None:
    """Tokens the shortest-sighted attention layer sees, or None when all layers see everything."""
    config = _text_config(model)
    kinds = getattr(config, "layer_types", None)
    named = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    sizes = [int(size) for size in named if size]
    everywhere = kinds is not None and all(kind == "full_attention" for kind in kinds)
    if everywhere or getattr(config, "use_sliding_window", True) is False or not sizes:
        return None
    return min(sizes)


def _text_config(model: Any) -> Any:
    return causal_lm(model).config.get_text_config(decoder=True)


def head_rows(weight: Tensor, tokens: Tensor) -> Tensor:
    """Rows (C, D) of a head (V, D) that belong to some tokens (C,), int64, distinct: an ``index_select``.

    On a CPU the gradient of a trained head is not filled with zeros: the system hands out zeroed memory, and only
    what the rows touch is written. A tied head gains less: the gradient of the embedding is added to its own.
    """
    if weight.requires_grad and type(weight) in (Tensor, torch.nn.Parameter) and weight.device.type == "cpu":
        rows: Tensor = _HeadRows.apply(weight, tokens)  # type: ignore[no-untyped-call]
        return rows
    return weight.index_select(0, tokens)


class _HeadRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.shape = weight.shape
        return weight.index_select(0, tokens)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (tokens,) = ctx.saved_tensors
        # torch.zeros writes its zeros; those of numpy are pages that nobody has touched.
        zeros = np.zeros(math.prod(ctx.shape) * gradient.element_size(), dtype=np.uint8)
        whole = torch.from_numpy(zeros).view(gradient.dtype).view(ctx.shape)
        return whole.index_copy_(0, tokens, gradient), None
