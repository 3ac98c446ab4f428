"""What a model's config says about lengths: windows, distances counted by place, RoPE that looks at the longest row.

A path is what a token sees: prompt and title up to it. A place is a position in a cache or a packed sequence, where
tokens of other paths lie in between; a model that counts places takes other branches for distance.

Shape key: B rows, L tokens of a row.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from triewise.models.anatomy import body, causal_lm, text_config

_MASKED = ("sliding_window", "attention_chunk_size")  # windows that transformers puts into its masks
_NAMES_WINDOW = re.compile(r"window|local")
_NAMES_ELSE = re.compile(r"^(num|n|use)_|layer|pattern|expert|freq|theta|base|rank|head|kernel|skip")
_EVERYTHING = {"full_attention", "attention", "global"}
_TURN = threading.RLock()


def is_recurrent(model: Any) -> bool:
    """Whether some layers are not attention."""
    kinds = getattr(text_config(model), "layer_types", None)
    if not kinds:
        return bool(getattr(causal_lm(model), "_is_stateful", False))
    return any("attention" not in kind or "linear" in kind for kind in kinds)


def shortest_window(model: Any) -> int | None:
    """Tokens of a path that the shortest-sighted layer sees, or None: all."""
    config = text_config(model)
    if _sees_everything(config) or getattr(config, "use_sliding_window", True) is False:
        return None
    masked = min(_sizes(getattr(config, name, None) for name in _MASKED), default=None)
    return unknown_window(model) if masked is None else masked


def unknown_window(model: Any) -> int | None:
    """A window of a name that transformers does not put into its masks (GPT-Neo's ``window_size``), or None.

    What it counts is not known; where there is one of the usual names beside it, that one is meant.
    """
    config = text_config(model)
    if _sees_everything(config) or list(_sizes(getattr(config, name, None) for name in _MASKED)):
        return None
    named = (
        v for k, v in _settings(config.to_dict()) if _NAMES_WINDOW.search(k) and not _NAMES_ELSE.search(k)
    )
    return min(_sizes(named), default=None)


def counts_places(model: Any) -> bool:
    """Whether attention is biased by distance in places (ALiBi)."""
    said = _settings(text_config(model).to_dict())
    named = any((re.fullmatch(r"(use_)?alibi", key) and value) or value == "alibi" for key, value in said)
    return named or any("alibi" in name for name in dir(type(body(model))))


@dataclass(frozen=True)
class RopeSwitch:
    """RoPE whose frequencies depend on the longest row of a forward.

    Attributes:
        tokens: Rows of at most so many tokens have the usual ones.
        each: Whether every length above has its own (dynamic NTK), or all have the same (longrope).
    """

    tokens: int
    each: bool

    def alike(self, length: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Row numbers, those together that have the same frequencies, of rows with these lengths (B,)."""
        kind = np.where(length <= self.tokens, 0, length if self.each else 1)
        return [np.flatnonzero(kind == one) for one in np.unique(kind)]

    def side(self, shortest: int, longest: int) -> int:
        """0: paths of such lengths have the usual frequencies; 2: they share others; 1: neither."""
        return 0 if longest <= self.tokens else 1 if self.each or shortest <= self.tokens else 2


def rope_switch(model: Any) -> RopeSwitch | None:
    """Where RoPE changes with the length, for all layers or some; None where it does not."""
    config = text_config(model)
    said = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(said, Mapping):
        return None
    found = []
    for one in (said, *(part for part in said.values() if isinstance(part, Mapping))):
        kind = str(one.get("rope_type") or one.get("type") or "")
        whole = getattr(config, "max_position_embeddings", None)
        if "dynamic" in kind:
            found.append(RopeSwitch(int(whole or 0), True))
        elif kind in ("longrope", "su"):
            before = getattr(config, "original_max_position_embeddings", None)
            found.append(
                RopeSwitch(int(one.get("original_max_position_embeddings") or before or whole or 0), False)
            )
    each = any(switch.each for switch in found)
    return RopeSwitch(min(switch.tokens for switch in found), each) if found else None


def as_if_alone(model: Any, run: Callable[[Tensor], Tensor], ids: Tensor, length: Tensor) -> Tensor:
    """What a forward without mask makes of padded rows, each with the frequencies that it has by itself.

    Args:
        model: A causal LM; most have the same frequencies for all rows, which then share one forward.
        run: Rows (b, l) to states or logits (b, l, X).
        ids: int64 (B, L), padded on the right; columns behind the last that is needed may be left out.
        length: (B,), tokens of each row by itself.

    Returns:
        (B, L, X).
    """
    switch = rope_switch(model)
    if switch is None:
        return run(ids)
    groups, made = switch.alike(length.cpu().numpy()), []
    for rows in groups:
        own = ids[torch.from_numpy(rows).to(ids.device)]
        width = int(length[torch.from_numpy(rows).to(length.device)].max())
        own = torch.nn.functional.pad(own[:, :width], (0, max(0, width - own.shape[1])))
        with _TURN:
            _forget(model)
            part = run(own)[:, : ids.shape[1]]
        made.append(torch.nn.functional.pad(part, (0, 0, 0, ids.shape[1] - part.shape[1])))
    back = torch.from_numpy(np.argsort(np.concatenate(groups))).to(ids.device)
    return torch.cat(made)[back]


def take_turns(model: Any) -> None:
    """Let one thread at a time through RoPE that changes with the length: it keeps its frequencies in the module."""
    for module, _, kind in _ropes(model):
        if ("dynamic" in kind or kind == "longrope") and _begin not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_begin)
            module.register_forward_hook(_end, always_call=True)


def _begin(*_: Any) -> None:
    _TURN.acquire()


def _end(*_: Any) -> None:
    _TURN.release()


def _ropes(model: Any) -> Iterator[tuple[Any, str | None, str]]:
    """Modules that have RoPE, and of each the layers it is for, where it says so, and its kind."""
    for module in model.modules():
        kinds: Any = getattr(module, "rope_type", {})
        for name, kind in ({None: kinds} if isinstance(kinds, str) else dict(kinds)).items():
            yield module, name, kind


def _forget(model: Any) -> None:
    """Dynamic RoPE keeps the frequencies of the longest row so far: one position takes the usual ones back."""
    for module, name, kind in _ropes(model):
        if "dynamic" in kind:
            one = torch.zeros(1, 1, device=next(module.buffers()).device)
            module(one[None], one.long(), **({} if name is None else {"layer_type": name}))


def _sees_everything(config: Any) -> bool:
    """Whether the config lists its layers and each sees all that is before it."""
    kinds: Any = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    return bool(kinds) and all(kind in _EVERYTHING for kind in kinds)


def _settings(said: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """All settings of a config, those of its parts too."""
    for key, value in said.items():
        if isinstance(value, Mapping):
            yield from _settings({str(k): v for k, v in value.items()})
        else:
            yield key, value


def _sizes(values: Any) -> Iterator[int]:
    """The positive whole numbers among values and lists of values."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from _sizes(value)
        elif isinstance(value, int) and not isinstance(value, bool) and value > 0:
            yield value
