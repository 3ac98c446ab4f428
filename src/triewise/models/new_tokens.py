"""New tokens of a model: names in its tokenizer, rows in its embedding and in its head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from triewise.models.checks import grow

if TYPE_CHECKING:
    from triewise.arrays import Ints


@torch.no_grad()
def add_tokens(model: Any, tokenizer: Any, names: Sequence[str], like: Sequence[Ints]) -> list[int]:
    """Add special tokens, which text never becomes; those that the tokenizer has already stay as they are.

    Args:
        model: A causal LM without adapter; it gets rows where it has too few.
        tokenizer: Its tokenizer.
        names: Of the tokens.
        like: For each, the tokens the mean of whose rows it starts as.

    Returns:
        The ids of the tokens.
    """
    from tokenizers import AddedToken

    known = tokenizer.get_vocab().keys() & names
    added = [AddedToken(name, special=True, normalized=False) for name in names if name not in known]
    tokenizer.add_tokens(added, special_tokens=True)
    grow(model, tokenizer)
    ids: list[int] = tokenizer.convert_tokens_to_ids(list(names))
    head = model.get_output_embeddings()
    parts = (model.get_input_embeddings().weight, head.weight, getattr(head, "bias", None))
    for rows in {id(part): part for part in parts if part is not None}.values():  # tied ones once
        for name, token, some in zip(names, ids, like, strict=True):
            if name not in known:
                rows[token] = (
                    rows[torch.from_numpy(some).long().to(rows.device)].float().mean(0).to(rows.dtype)
                )
    return ids
