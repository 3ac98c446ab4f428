"""The head of a causal language model by hand: rows of its weight, then a factor and a soft cap.

Whoever needs the logits of a few tokens, or of a few positions, multiplies hidden states with what is needed of the
head. Some models do more to their logits; what can be told by two numbers is found in the config and measured.

Shape key: V vocabulary, D width, C some tokens, R positions.
"""

from __future__ import annotations

import itertools
import math
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from triewise.models.anatomy import body, causal_lm, head_weight, probing, text_config

LOGIT_BLOCK = 1 << 24  # logits of the whole vocabulary that are held at one time
CAST_BLOCK = (
    1 << 21
)  # numbers of a half-precision head that are held in float32 at one time: they fit into a cache
LOUD = 256.0  # logits of a probe: a cap far above what ordinary text reaches is seen there
# What configs call a cap or a factor: final_logit_softcapping, logits_soft_cap, logit_scale, logits_scaling, ...
_SPEAKS_OF_LOGITS = r"logit\w*(cap|scal|mult)|(lm_head|output|logit\w*)_multiplier"


@dataclass(frozen=True)
class Head:
    r"""How a model's logits come of its last hidden state h.

    .. math:: z = c \tanh(f (W h + b) / c)

    Attributes:
        factor: The number f.
        cap: The number c; None: no tanh.
    """

    factor: float = 1.0
    cap: float | None = None

    def logits(self, model: Any, hidden: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Logits (..., V) of hidden states (..., D), or (..., C) of some tokens (C,), in the dtype of the weights."""
        weight, bias = _rows(model, tokens)
        if not is_precise(weight.dtype):
            hidden = hidden.to(weight.dtype)  # some bodies (Mamba) give float32 whatever they are in
        return self._shaped(nn.functional.linear(hidden, weight, bias))

    def scores(self, model: Any, hidden: Tensor, tokens: Tensor | None = None) -> Tensor:
        """The same in float32, products of half-precision weights included; for decoding."""
        return self._shaped(_product(hidden, *_rows(model, tokens)))

    def log_totals(self, model: Any, hidden: Tensor) -> Tensor:
        """Log-sum-exp of `scores` over the vocabulary, (R,), of hidden states (R, D); in blocks."""
        weight, bias = _rows(model)
        parts: list[tuple[Tensor, Tensor | None]] = [(weight, bias)]
        if _is_cast(hidden, weight):
            columns = max(1, CAST_BLOCK // weight.shape[1])
            biases = itertools.repeat(None) if bias is None else torch.split(bias, columns)
            parts = list(zip(torch.split(weight, columns), biases, strict=False))
        totals = []
        for some in torch.split(hidden, max(1, LOGIT_BLOCK // len(weight))):
            of_parts = [self._shaped(_product(some, *part)).logsumexp(1) for part in parts]
            totals.append(of_parts[0] if len(of_parts) == 1 else torch.stack(of_parts).logsumexp(0))
        return torch.cat(totals)

    def _shaped(self, product: Tensor) -> Tensor:
        if self.factor != 1:
            product = product * self.factor
        if self.cap is not None:
            product = (product.float() / self.cap).tanh() * self.cap
        return product


def _rows(model: Any, tokens: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Weight (V, D) and bias (V,) of the head, or those of some tokens."""
    layer = causal_lm(model).get_output_embeddings()
    bias: Tensor | None = getattr(layer, "bias", None)
    if tokens is None:
        return layer.weight, bias
    bias = None if bias is None else bias.index_select(0, tokens)
    rows = head_rows(head_weight(model), tokens)
    learned = getattr(layer, "token_adapter", None)
    return rows if learned is None else _with_learned(rows, tokens, learned), bias


def _with_learned(rows: Tensor, tokens: Tensor, learned: Any) -> Tensor:
    """Rows (C, D) of tokens (C,) as PEFT's adapter of some tokens has them; without waiting for the device."""
    for name in [] if learned.disable_adapters or learned.merged else learned.active_adapters:
        known, order = torch.tensor(learned.token_indices[name], device=tokens.device).sort()
        place = torch.searchsorted(known, tokens).clamp(max=len(known) - 1)
        own = learned.trainable_tokens_delta[name][order[place]].to(rows.dtype)
        rows = torch.where((known[place] == tokens)[:, None], own, rows)
    return rows


def is_precise(dtype: torch.dtype) -> bool:
    """Whether sums in a dtype need no more digits."""
    return dtype in (torch.float32, torch.float64)


def _is_cast(hidden: Tensor, weight: Tensor) -> bool:
    """Whether a product in float32 needs its operands cast: a GPU keeps the sums of half-precision products itself."""
    if is_precise(weight.dtype):
        return False
    return not (weight.is_cuda and hidden.dtype == weight.dtype and hasattr(torch.ops.aten.mm, "dtype"))


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Hidden states (..., D) times rows (C, D), plus bias: float32 (..., C), nothing of it rounded to fewer digits."""
    if is_precise(weight.dtype):
        return nn.functional.linear(hidden, weight, bias).float()
    bias = None if bias is None else bias.float()
    if _is_cast(hidden, weight):
        return nn.functional.linear(hidden.float(), weight.float(), bias)
    flat: Tensor = torch.mm(hidden.flatten(0, -2), weight.t(), out_dtype=torch.float32)
    product = flat.view(*hidden.shape[:-1], len(weight))
    return product if bias is None else product + bias


@torch.no_grad()
def hand_head(model: Any) -> Head | None:
    """The head that gives the model's own logits; None where no factor and cap do, and its own forward has to be used.

    Compared on three tokens, as they are and so loud that no cap stays hidden: what reaches the model's head is
    multiplied. On average logits may be off by 3e-4 of their size, in half precision by 1e-2 (rounding makes 2e-3).
    """
    with probing(model):
        weight = head_weight(model)
        ids = torch.tensor([[0, 1, 2]], device=weight.device) % weight.shape[0]
        try:
            hidden = body(model)(input_ids=ids, use_cache=False).last_hidden_state
            largest = float(Head().scores(model, hidden).abs().max())
            # A power of two: nothing is rounded otherwise than it was.
            louder = 2.0 ** math.ceil(math.log2(max(1.0, LOUD / max(1e-3, largest))))
            pairs = [(hidden * by, _own_logits(model, ids, by)) for by in sorted({1.0, louder})]
        except (AttributeError, TypeError, RuntimeError):  # a state that is not as wide as the head, for one
            return None
    return next((head for head in _candidates(model) if _gives(head, model, pairs)), None)


def _gives(head: Head, model: Any, pairs: list[tuple[Tensor, Tensor]]) -> bool:
    """Whether a head makes the wanted logits of hidden states: all of them, and closer still on average."""
    limit = 3e-4 if is_precise(head_weight(model).dtype) else 1e-2
    for hidden, wanted in pairs:
        found = head.scores(model, hidden)
        if found.shape != wanted.shape:
            return False
        off = found - wanted
        near = off.abs().max() <= 3 * limit * wanted.abs().max().clamp(min=1)
        if not bool(near & (off.norm() <= limit * wanted.norm())):
            return False
    return True


def _own_logits(model: Any, ids: Tensor, louder: float) -> Tensor:
    """The model's logits of some tokens, float32, as if what reaches its head were ``louder`` times as large.

    Only in this thread: another one may be decoding with the same model.
    """
    here = threading.get_ident()

    def raised(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return (given[0] * louder, *given[1:]) if threading.get_ident() == here else given

    hook = causal_lm(model).get_output_embeddings().register_forward_pre_hook(raised)
    try:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
        return logits.float()
    finally:
        hook.remove()


def _candidates(model: Any) -> Iterator[Head]:
    """Heads that the config speaks of, the plain one first; which of them it is, and which way a factor is meant."""
    config = text_config(model)
    known = {name: getattr(config, name, None) for name in dir(config) if re.search(_SPEAKS_OF_LOGITS, name)}
    numbers = {
        n: float(x) for n, x in known.items() if isinstance(x, int | float) and not isinstance(x, bool) and x
    }
    if getattr(config, "dim_model_base", None):  # MiniCPM
        numbers["dim_model_base"] = config.hidden_size / config.dim_model_base
    caps = [x for name, x in numbers.items() if "cap" in name]
    factors = [f for name, x in numbers.items() if "cap" not in name for f in (x, 1 / x)]
    for cap, factor in itertools.product([None, *caps], [1.0, *factors]):
        yield Head(factor, cap)


def head_rows(weight: Tensor, tokens: Tensor) -> Tensor:
    """Rows (C, D) of a head (V, D) that belong to some tokens (C,), int64, distinct: an ``index_select``.

    On a CPU the gradient of a trained head is not filled with zeros: the system hands out zeroed memory, and only
    what the rows touch is written. A tied head gains less: the gradient of the embedding is added to its own.
    """
    trained = weight.requires_grad and torch.is_grad_enabled()
    if trained and type(weight) in (Tensor, torch.nn.Parameter) and weight.device.type == "cpu":
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
