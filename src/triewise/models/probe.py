"""Does this model respect our mask and our positions? Asked once, before a fast path is used.

Decoding and packing push tokens of several branches through one forward, under a mask and positions of our own, and
multiply hidden states with rows of the head. Some models do otherwise, most of them silently. What their config says
is read first. Then the fast path is measured against plain forwards of single rows. The yardstick is the model's own
rounding: the same rows in a padded batch, with input embeddings that are rounded otherwise. That the measurement would
see a fault is shown by faults that are made on purpose, in the same code. Why a model is refused is one phrase, for the
caller's warning; None: nothing speaks against it.

Shape key: G groups of states, S states of a group, D width, U some tokens; B rows, Q queries, K keys.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from triewise.models.anatomy import (
    body,
    cache_of,
    causal_lm,
    head_weight,
    own_mask,
    sample_ids,
    takes_masks,
)
from triewise.models.lengths import counts_places, is_recurrent, rope_switch, shortest_window, unknown_window

NOISES = 3.0  # so many times its rounding may a fast path be off
FAR = 2.0  # so many times what is accepted must faults be off that are made on purpose
HARMLESS = 1e-5  # nats; accepted whatever the rounding
TEXTS = 3  # texts that are tried: an expert more or less is chosen here and there, and some texts show little
_FAILURES = (ValueError, TypeError, AttributeError, RuntimeError, IndexError)


@dataclass(frozen=True)
class Measured:
    """Hidden states (G, S, D) of the same tokens, after the final norm.

    Attributes:
        plain: Of plain forwards, row by row.
        rounded: Of plain forwards of all rows in a batch whose input embeddings were rounded otherwise.
        fast: By the fast path.
        faulty: By the fast path with each fault of `FAULTS`.
    """

    plain: Tensor
    rounded: Tensor
    fast: Tensor
    faulty: Mapping[str, Tensor]

    @classmethod
    def of(
        cls, model: Any, plain: Tensor, batch: Callable[[], Tensor], fast: Callable[[], Tensor]
    ) -> Measured:
        """From the states of plain forwards, and what gives those of the batch and of the fast path."""
        with _rounded_otherwise(model):
            rounded = batch()
        sound, faulty = fast(), {}
        for name in FAULTS:
            with faulty_forwards(model, name):
                faulty[name] = fast()
        return cls(plain, rounded, sound, faulty)


def refusal(
    model: Any,
    longest: int = 0,
    measure: Callable[[int], Measured] | None = None,
    what: str = "states",
    *,
    shortest: int = 0,
    places: int = 0,
    room: int | None = None,
) -> str | None:
    """What the config, or else a measurement, says against a fast path.

    Args:
        model: A causal LM.
        longest: Tokens of the longest path, counted from a prompt's first token.
        measure: Runs the fast path and plain forwards on the same tokens, chosen by a seed; the model is in evaluation
            mode meanwhile.
        what: Name of what is compared, plural.
        shortest: Tokens of the shortest prompt or row that shares a forward with others.
        places: Largest number of places, of a cache or packed sequence, that lie in one forward.
        room: What `place_limit` says.
    """
    window, switch = shortest_window(model), rope_switch(model)
    if not takes_masks(model):
        return "its attention implementation takes no mask of our own"
    if is_recurrent(model):
        return "it has layers that are not attention"
    if counts_places(model):
        return "its attention is biased by distance in places (ALiBi)"
    if window is not None and window < longest:
        return f"its attention window of {window} tokens is shorter than the longest path of {longest}"
    if room is not None and room < places:
        return f"its attention counts places up to {room}, of which there may be {places}"
    if switch is not None and switch.side(shortest, longest) == 1:
        return f"its RoPE changes with the length above {switch.tokens} tokens, and the longest path has {longest}"
    return None if measure is None else _misfit(model, measure, what)


@torch.no_grad()
def _misfit(model: Any, measure: Callable[[int], Measured], what: str) -> str | None:
    training, reason = model.training, None
    model.eval()
    try:
        for seed in range(TEXTS):
            reason, sure = _judged(model, measure(seed), what)
            if sure:
                break
    except _FAILURES as error:
        return f"it does not take our cache or mask ({type(error).__name__})"
    finally:
        model.train(training)
    return reason


def _judged(model: Any, found: Measured, what: str) -> tuple[str | None, bool]:
    """Whether the fast path is off by no more than rounding, and faults by far more; whether that is sure."""
    weight_UD = head_weight(model)[sample_ids(model, 64)[0]].float()
    weight_UD = weight_UD - weight_UD.mean(0)  # what is added to all logits is nothing to a softmax

    def logits(states: Tensor) -> Tensor:
        return states.float() @ weight_UD.T

    def off(states: Tensor) -> float:
        """Nats, root mean square over tokens: the median state of the group that is worst."""
        gap = (logits(states) - logits(found.plain)).square().mean(-1).sqrt()
        return float(gap.median(dim=1).values.max())

    size = float(logits(found.plain).square().mean().sqrt())
    rounding, gap = off(found.rounded), off(found.fast)
    accepted = max(NOISES * rounding, 2 * torch.finfo(found.plain.dtype).eps * size, HARMLESS)
    if not gap <= accepted:
        return f"{what} are off by {gap:.2g} nats, rounding by {rounding:.2g}", gap > FAR * accepted
    # What changes too little to be seen, such as positions in a model that has none, does no harm; but not everything.
    faults = [off(states) for states in found.faulty.values()]
    if size > HARMLESS and 2 * sum(fault >= FAR * accepted for fault in faults) < len(faults):
        return f"faults made on purpose cannot be told from its rounding of {rounding:.2g} nats", False
    return None, True


@contextmanager
def _rounded_otherwise(model: Any) -> Iterator[None]:
    """Input embeddings of this thread's forwards are off by half a unit of their last place, at random."""
    here, generator = threading.get_ident(), torch.Generator().manual_seed(0)

    def shake(module: nn.Module, given: Any, states: Tensor) -> Tensor:
        if threading.get_ident() != here:
            return states
        kind = torch.promote_types(states.dtype, torch.float32)
        noise = torch.randn(states.shape, generator=generator, dtype=kind).to(states.device)
        return (states.to(kind) * (1 + torch.finfo(states.dtype).eps / 2 * noise)).to(states.dtype)

    handle = causal_lm(model).get_input_embeddings().register_forward_hook(shake)
    try:
        yield
    finally:
        handle.remove()


def _shifted(sees: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    return sees, position + 1


def _cut(sees: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    nth = sees.cumsum(-1)
    return sees & (nth > nth[..., -1:] // 2), position


def _before(sees: Tensor) -> Tensor:
    """(Q, K) whether a key lies before a query, or is it."""
    n_queries, n_keys = sees.shape[2:]
    return torch.ones(n_queries, n_keys, dtype=torch.bool, device=sees.device).tril(n_keys - n_queries)


def _ignored(sees: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    return _before(sees).expand(sees.shape), position


def _leaking(sees: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    hidden = _before(sees) & ~sees
    newest = hidden.sum(-1, keepdim=True) - hidden.cumsum(-1) < 4
    return sees | (hidden & newest), position


# What goes wrong in a forward under a mask of our own, from what is seen (B, 1, Q, K) and positions (B, Q).
FAULTS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "positions off by one": _shifted,
    "the older half of a path out of sight": _cut,
    "all branches in sight": _ignored,
    "four tokens of another branch in sight": _leaking,
}


@contextmanager
def faulty_forwards(model: Any, fault: str) -> Iterator[None]:
    """This thread's forwards under a mask of our own have a fault of `FAULTS`."""
    here = threading.get_ident()

    def spoil(module: nn.Module, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        mask = given.get("attention_mask")
        if mask is None or mask.dim() != 4 or threading.get_ident() != here:
            return None
        sees, position = FAULTS[fault](mask if mask.dtype == torch.bool else mask == 0, given["position_ids"])
        return args, {**given, "attention_mask": own_mask(model, sees), "position_ids": position}

    handle = body(model).register_forward_pre_hook(spoil, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def place_limit(model: Any) -> int | None:
    """Places of a forward up to which a model is to be trusted, or None: any number.

    A window of a name that is not known and a mask of fixed size may count places (GPT-Neo's do), or what is seen, or
    not be used at all. Tried: a token whose keys lie behind so many hidden places, and right behind them.
    """
    squares = [b.shape[-1] for b in body(model).buffers() if b.dim() > 1 and b.shape[-1] == b.shape[-2]]
    ends = sorted({end for end in (unknown_window(model), *squares) if end is not None})
    return next((end for end in ends if not _sees_behind(model, end)), None) if takes_masks(model) else None


def _sees_behind(model: Any, hidden: int) -> bool:
    """Whether keys behind so many hidden places are seen as if they were near."""
    run, ids, n = body(model), sample_ids(model, 9), 8

    def state(seen: int, places: int) -> Tensor:
        cache = cache_of((_longer(k, places), _longer(v, places)) for k, v in layers)
        mask = torch.zeros(1, 1, 1, n + places + 1, dtype=torch.bool, device=ids.device)
        mask[..., :seen] = mask[..., -1:] = True
        position = torch.full_like(ids[:, n:], n)
        given = {"attention_mask": own_mask(model, mask), "position_ids": position}
        made: Tensor = run(
            input_ids=ids[:, n:], past_key_values=cache, use_cache=True, **given
        ).last_hidden_state
        return made.float()

    try:
        cached = run(input_ids=ids[:, :n], past_key_values=cache_of(), use_cache=True).past_key_values
        layers = [(layer.keys, layer.values) for layer in cached.layers]
        near, nothing, far = state(n, 0), state(0, 0), state(n, hidden)
    except _FAILURES:
        return False
    return bool((far - near).norm() < (nothing - near).norm() / 4)


def _longer(keys: Tensor, places: int) -> Tensor:
    return torch.cat([keys, keys[:, :, -1:].expand(-1, -1, places, -1)], dim=2)
