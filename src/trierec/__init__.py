"""Recommend by writing the title of the next item along the catalogue's prefix tree.

``trierec.load("runs/x")`` gives a trained recommender; everything else is in the rooms: ``trierec.trie``,
``trierec.losses``, ``trierec.engine``, ``trierec.search`` and so on. Importing this package loads neither
torch nor transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trierec.errors import UserError

if TYPE_CHECKING:
    from trierec.generative import GenerativeRecommender

__all__ = ["UserError", "load"]
__version__ = "0.1.0"


def load(run: str | Path, *, device: str = "auto", dtype: str = "auto") -> GenerativeRecommender:
    """Load the recommender of a run folder.

    Args:
        run: A folder that ``trierec train`` wrote.
        device: ``auto`` or a torch device.
        dtype: ``auto`` or a torch dtype's name.

    Raises:
        UserError: Not a run folder, or its parts do not belong together.
    """
    from trierec.generative import load_recommender

    return load_recommender(run, device=device, dtype=dtype)
