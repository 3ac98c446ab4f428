"""One way to a recommender: a run folder, a folder of ``save_pretrained``, or the hub."""

from __future__ import annotations

from pathlib import Path

from triewise.files import read_json
from triewise.recommenders.generative import GenerativeRecommender
from triewise.recommenders.saved import MANIFEST, local_folder
from triewise.recommenders.sequential import SequentialRecommender


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
    run = local_folder(run, revision)
    if read_json(run / MANIFEST).get("kind") == "sequential":
        return SequentialRecommender.from_pretrained(run, device=device)
    return GenerativeRecommender.from_pretrained(
        run,
        device=device,
        dtype=dtype,
        base=base,
        trust_remote_code=trust_remote_code,
    )
