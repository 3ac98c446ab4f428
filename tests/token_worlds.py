"""Catalogues of token sequences, splits and prompts made by hand, without data files or tokenizers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from triewise.arrays import Ragged
from triewise.data import Split
from triewise.tokens import Prompts, Trie, zero_gain
from triewise.training import Examples, make_windows, target_counts

Row = tuple[str | None, list[int], int]  # user, history, target


def make_split(rows: Sequence[Row]) -> Split:
    """A split without times."""
    return Split(
        user_id=np.array([user for user, _, _ in rows], dtype=object),
        history=Ragged.from_lists([history for _, history, _ in rows]),
        target=np.array([target for _, _, target in rows], dtype=np.int32),
        timestamp=np.full(len(rows), -1, dtype=np.int64),
    )


class _ByHand(Prompts):
    """Prompts without a tokenizer that could be hashed."""

    hash = "by hand"  # type: ignore[assignment]


def make_prompts(
    sequences: Sequence[Sequence[int]], template: str = "plain", max_tokens: int = 1024
) -> Prompts:
    """Plain prompts of titles that are token sequences already; token 1 starts each prompt."""
    return _ByHand(
        tokenizer=None,
        title=tuple(str(s) for s in sequences),
        template=template,
        title_tokens=Ragged.from_lists(sequences),
        bos=(1,),
        before=(),
        after=(),
        lead="",
        max_history=20,
        max_tokens=max_tokens,
        n_items=len(sequences),
        settings={},
    )


def cycle_world(n_items: int = 12, n_users: int = 24, length: int = 5) -> Examples:
    """Item i is always followed by item i + 1: what comes next can be learned without error."""
    sequences = [[2 + i % 4, 6 + i, 0] for i in range(n_items)]
    starts = np.random.default_rng(0).integers(0, n_items, n_users)
    rows: list[Row] = [
        (str(u), [(int(s) + j) % n_items for j in range(length)], (int(s) + length) % n_items)
        for u, s in enumerate(starts)
    ]
    prompts, trie = make_prompts(sequences), Trie.from_sequences(sequences)
    windows = make_windows(make_split(rows), "every", prompts)
    return Examples(windows, prompts, trie, None, zero_gain(trie, target_counts(windows, n_items)))
