"""A saved recommender as a folder that stands on its own, and where such folders come from."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from triewise.data import Catalog
from triewise.errors import UserError
from triewise.files import atomic_path
from triewise.models import download

FORMAT = 1
MANIFEST = "recommender.json"  # written last: where it is, the rest is whole
FILES = ("catalog.parquet", "trie.npz", "model")
CARD = "README.md"


def save_catalog(catalog: Catalog, counts: NDArray[np.int64], path: Path) -> None:
    """Write a catalogue with the training targets of each item."""
    with atomic_path(path) as temporary:
        catalog.to_frame(counts.astype(np.int32)).write_parquet(temporary)


def local_folder(name: Path | str, revision: str | None) -> Path:
    """The folder itself, or the downloaded one of a hub id."""
    if Path(name).is_dir():
        return Path(name)
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(
            f"wanted a run folder with a trained recommender, but {name} is no folder; train one first"
        )
    patterns = [MANIFEST, CARD, *(f for f in FILES if f != "model"), "model/*"]
    return download(name, revision, patterns)
