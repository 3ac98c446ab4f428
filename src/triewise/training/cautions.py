"""What is known before a training starts and would be noticed a week later: one line each.

Two things need no line, because they cannot be here: a title off the trie (one trie holds every item of the
catalogue, and a split knows items of the catalogue alone), and a prompt, trie or counts of another training (their
hashes are compared when a recommender is loaded and when a run is evaluated, and a difference is an error).

Dimension key: N trie nodes, W windows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from triewise.tokens import Dropped, Prompts, Trie, zero_gain

if TYPE_CHECKING:
    from triewise.objectives import ObjectiveSettings
    from triewise.training.windows import Windows

LONGEST = 256  # prompts that are made to see whether they lose titles


def training_warnings(
    objective: ObjectiveSettings, prompts: Prompts, trie: Trie, windows: Windows, counts: NDArray[np.int64]
) -> Iterator[str]:
    """The lines that apply, for stderr.

    Args:
        objective: The objective of the recipe.
        prompts: Histories to prompt ids.
        trie: Of all titles.
        windows: What is learned from.
        counts: (I,) training targets of each item.
    """
    yield from prompts.readback.warnings()
    if beta_is_idle(objective, trie, counts):
        what = "only the normaliser" if objective.normaliser == "weights" else "nothing"
        yield (
            f"warning: objective.beta changes {what}: in trie support a forced token has no loss, and here every "
            "token without gain is forced"
        )
    if pads_with_terminator(prompts.tokenizer):
        yield (
            "warning: the tokenizer's padding token is its terminator; nothing is padded with it here, but code that "
            "takes padding out of the labels never learns where a title ends"
        )
    short = prompts_that_lose_titles(windows, prompts)
    if short:
        more = "at least " if short == LONGEST else ""
        yield (
            f"warning: {more}{short} of {len(windows)} training prompts are longer than {prompts.max_tokens} tokens "
            "and lose their oldest titles; raise backbone.max_tokens or lower data.max_history"
        )


def beta_is_idle(objective: ObjectiveSettings, trie: Trie, counts: NDArray[np.int64]) -> bool:
    """Whether IGD's beta weighs nothing but tokens without loss.

    In trie support that is so unless items that are never a target make a choice of a token that has no gain.
    """
    if objective.weight != "igd" or objective.support != "trie" or objective.beta == 1:
        return False
    chosen = trie.branching[trie.parent] & (trie.subtree_count(counts) > 0)
    chosen[0] = False
    return not (zero_gain(trie, counts) & chosen).any()


def pads_with_terminator(tokenizer: Any) -> bool:
    """Whether a tokenizer has one token for padding and for the end of a title."""
    return tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id


def prompts_that_lose_titles(windows: Windows, prompts: Prompts) -> int:
    """How many of the `LONGEST` prompts, by the tokens of their titles, are too long; windows of one target only.

    Windows with several targets are fitted when they are made, and say what that costs.
    """
    items, context = windows.items, windows.n_context.astype(np.int64)
    if (items.lengths - context > 1).any():
        return 0
    end = np.concatenate(([0], np.cumsum(prompts.title_tokens.lengths[items.values])))
    start = items.offsets[:-1]
    size = end[start + context] - end[start]
    counting = replace(prompts, dropped=Dropped())  # these prompts are not used
    for w in np.argsort(-size, kind="stable")[:LONGEST]:
        counting.encode(items.values[start[w] : start[w] + context[w]].tolist())
    return counting.dropped.prompts
