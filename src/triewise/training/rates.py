"""A course of the learning rate that transformers does not have."""

from __future__ import annotations

import math

LOW = 0.01


def floor_cosine(step: int, steps: int, warmup: int) -> float:
    """Share of the peak at a step (the first is 0): a line from a hundredth, then half a wave down to a hundredth.

    Source: the code of LLaRA. The wave is counted from step 0, so the peak itself is never reached.
    """
    if step < warmup:
        return LOW + (1 - LOW) * step / warmup
    return LOW + (1 - LOW) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
