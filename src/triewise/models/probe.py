"""Does this model respect our mask and our positions? Asked once, before a fast path is used.

Decoding and packing push tokens of several branches through one forward, under a mask and positions of our own.
Some models do otherwise, most of them silently. What their config says is read here; for the rest a fast path measures
itself against plain forwards, and the judgement is made here. Why a model is refused is one phrase, for the caller's
warning; None: nothing speaks against it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from triewise.models.anatomy import head_weight, is_recurrent, shortest_window, takes_masks
from triewise.models.head import is_precise

LEAK = 1e-4  # of the size of the numbers; a branch that sees no other one changes nothing at all, in any precision


@dataclass(frozen=True)
class Measured:
    """What a fast path gave on branches that share a beginning.

    Attributes:
        plain: float32, what plain forwards give: hidden states or log-probabilities.
        fast: The same numbers by the fast path.
        leak: Largest change by a change in another branch, relative to the size of the numbers.
    """

    plain: Tensor
    fast: Tensor
    leak: float


def refusal(
    model: Any, longest: int = 0, measure: Callable[[], Measured] | None = None, what: str = "numbers"
) -> str | None:
    """What the config, or else a measurement, says against a fast path.

    Args:
        model: A causal LM.
        longest: Tokens of the longest path, counted from a prompt's first token.
        measure: Runs the fast path and plain forwards on the same tokens; the model is in evaluation mode meanwhile.
        what: Name of the numbers that are compared, plural.
    """
    window = shortest_window(model)
    if not takes_masks(model):
        return "its attention implementation takes no mask of our own"
    if is_recurrent(model):
        return "it has layers that are not attention"
    if window is not None and window < longest:
        return f"its attention window of {window} tokens is shorter than the longest path of {longest}"
    return None if measure is None else _misfit(model, measure, what)


def _misfit(model: Any, measure: Callable[[], Measured], what: str) -> str | None:
    training = model.training
    model.eval()
    try:
        measured = measure()
    except (ValueError, TypeError, AttributeError, RuntimeError, IndexError) as error:
        return f"it does not take our cache or mask ({type(error).__name__})"
    finally:
        model.train(training)
    if measured.leak > LEAK:
        return f"a branch changes another one by {measured.leak:.2g}: its mask is not respected"
    # Relative to the size of the numbers: a sound 135M model in float32 is off by 4e-3 at -30 nats on either path,
    # against float64, and in bfloat16 by more than a tenth of a nat. Wrong positions or windows: about 1.
    gap = relative(measured.fast, measured.plain)
    return None if gap <= (1e-3 if _is_precise(model) else 0.1) else f"{what} are off by {gap:.2g}"


def relative(given: Tensor, wanted: Tensor) -> float:
    """Largest difference, relative to the largest of the wanted numbers."""
    return float((given - wanted).abs().max() / wanted.abs().max().clamp(min=1e-9))


def _is_precise(model: Any) -> bool:
    return is_precise(head_weight(model).dtype)
