"""One way to a recommender: a run folder, a folder of ``save_pretrained``, or the hub."""

from __future__ import annotations

from pathlib import Path

from triewise.files import read_json
from triewise.recipe import Recipe, load_recipe
from triewise.recommenders.saved import MANIFEST, SavedRecommender, local_folder


def load(
    run: str | Path,
    *,
    revision: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    base: str | Path | None = None,
    merge_adapter: bool | None = None,
    trust_remote_code: bool = False,
) -> SavedRecommender:
    """Load a recommender from a run folder, a folder of ``save_pretrained``, or the Hugging Face hub.

    Args:
        run: A folder, or a hub id such as ``"name/repository"``.
        revision: Commit, branch or tag on the hub.
        device: ``auto`` or a torch device; None: what the recipe of the run says, else ``auto``.
        dtype: ``auto`` or a torch dtype's name; None as for ``device``.
        base: Folder of the base model under a saved adapter, where it is no longer at its old place.
        merge_adapter: Whether an adapter is folded into its base, which decodes faster; None: as the recipe of the run
            says, by default yes but into a 4bit base. Without a recipe it stays apart.
        trust_remote_code: Execute code that comes with the language model. No recipe's word is taken for it.

    Raises:
        UserError: Not a recommender, or its parts do not belong together.
    """
    folder = local_folder(run, revision)
    kind = read_json(folder / MANIFEST).get("kind")
    recipe = load_recipe(folder / "recipe.toml") if (folder / "recipe.toml").is_file() else None
    if kind == "sequential":
        from triewise.recommenders.sequential import SequentialRecommender

        made_on = None if recipe is None or recipe.sequential is None else recipe.sequential.device
        return SequentialRecommender.from_pretrained(folder, device=device or made_on or "auto")
    from triewise.recommenders.generative import GenerativeRecommender

    backbone = None if recipe is None else recipe.backbone
    recommender = GenerativeRecommender.from_pretrained(
        folder,
        device=device or (backbone.device if backbone else "auto"),
        dtype=dtype or (backbone.dtype if backbone else "auto"),
        base=base,
        trust_remote_code=trust_remote_code,
    )
    merge = _merges(recipe, recommender.backbone.origin) if merge_adapter is None else merge_adapter
    return recommender.merged() if merge and recommender.backbone.adapted else recommender


def _merges(recipe: Recipe | None, origin: dict[str, object]) -> bool:
    """Whether an adapter is folded into its base where the caller does not say.

    Over a 4bit base it would take the memory that quantisation was to save. So it does over an 8bit one, but there
    layers round their inputs together, and the scores of a user depend on who shares the batch.
    """
    if recipe is None:
        return False
    chosen = recipe.evaluation.merge_adapter
    return origin.get("quantisation") != "4bit" if chosen is None else chosen
