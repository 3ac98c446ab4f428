"""Recommend by writing the title of the next item along the catalogue's prefix tree.

``triewise.load("runs/x")`` gives a trained recommender; everything else is in the rooms: ``triewise.trie``,
``triewise.losses``, ``triewise.engine``, ``triewise.search`` and so on. Importing this package loads neither
torch nor transformers.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from triewise.errors import UserError

if TYPE_CHECKING:
    from triewise.generative import GenerativeRecommender
    from triewise.sequential import SequentialRecommender

__all__ = ["UserError", "load"]
__version__ = "0.1.0"

# transformers imports bitsandbytes wherever it is installed, and that speaks up at import and at every forward.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def load(
    run: str | Path,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    base: str | Path | None = None,
    trust_remote_code: bool = False,
) -> GenerativeRecommender | SequentialRecommender:
    """Load a recommender from a run folder, a folder of ``save_pretrained``, or the Hugging Face hub.

    Args:
        run: A folder, or a hub id such as ``"name/repository"``.
        revision: Commit, branch or tag on the hub.
        device: ``auto`` or a torch device.
        dtype: ``auto`` or a torch dtype's name.
        base: Folder of the base model under a saved adapter, where it is no longer at its old place.
        trust_remote_code: Execute code that comes with the language model.

    Raises:
        UserError: Not a recommender, or its parts do not belong together.
    """
    from triewise.files import read_json
    from triewise.generative import MANIFEST, GenerativeRecommender, local_folder

    run = local_folder(run, revision)
    if read_json(run / MANIFEST).get("kind") == "sequential":
        from triewise.sequential import SequentialRecommender

        return SequentialRecommender.from_pretrained(run, device=device)
    return GenerativeRecommender.from_pretrained(
        run,
        device=device,
        dtype=dtype,
        base=base,
        trust_remote_code=trust_remote_code,
    )
