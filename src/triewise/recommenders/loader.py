"""One way to a recommender: a run folder, a folder of ``save_pretrained``, or the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from triewise.errors import UserError
from triewise.files import Shape, read_json, read_record
from triewise.recipe import Recipe, run_recipe
from triewise.recommenders.saved import MANIFEST, Manifest, SavedRecommender, local_folder


class _Chosen(Shape):
    assistant: str = ""
    assistant_weight: float = Field(1.0, ge=0, le=1)


def load(
    run: str | Path,
    *,
    revision: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    base: str | Path | None = None,
    merge_adapter: bool | None = None,
    assistant: bool = True,
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
        assistant: Whether to bring the assistant that the run's recipe or a saved recommender names; False: alone.
        trust_remote_code: Execute code that comes with the language model. No recipe's word is taken for it.

    Raises:
        UserError: Not a recommender, its parts do not belong together, or its assistant is not there.
    """
    folder = local_folder(run, revision)
    _check_run(folder)
    manifest = read_json(folder / MANIFEST, Manifest)
    recipe = run_recipe(folder) if (folder / "recipe.toml").is_file() else None
    # Asked first: models take time to load.
    named = _assistant(folder, manifest, recipe) if assistant else None
    if manifest.get("kind") == "sequential":
        from triewise.recommenders.sequential import SequentialRecommender

        made_on = recipe.sequential.device if recipe is not None and recipe.sequential is not None else "auto"
        recommender: SavedRecommender = SequentialRecommender.from_pretrained(
            folder, device=device or made_on
        )
    else:
        from triewise.recommenders.generative import GenerativeRecommender

        made = ("auto", "auto") if recipe is None else (recipe.backbone.device, recipe.backbone.dtype)
        words = GenerativeRecommender.from_pretrained(
            folder,
            device=device or made[0],
            dtype=dtype or made[1],
            base=base,
            trust_remote_code=trust_remote_code,
        )
        merge = _merges(recipe, words.backbone.origin) if merge_adapter is None else merge_adapter
        recommender = words.merged() if merge and words.backbone.adapted else words
    if named is None:
        return recommender
    helper = load(named[0], device=device, assistant=False, trust_remote_code=trust_remote_code)
    return recommender.with_settings(assistant=helper, assistant_weight=named[1])


def _check_run(folder: Path) -> None:
    """UserError where a folder is a run without a recommender, or one that was damaged."""
    if not (folder / "run.json").is_file():
        return
    read_record(folder)
    if not (folder / MANIFEST).is_file():
        raise UserError(
            f"the training in {folder} has not ended, so there is no recommender yet; wait for it, or go on with: "
            f"triewise train {folder / 'recipe.toml'} --resume --out {folder}"
        )


def _merges(recipe: Recipe | None, origin: dict[str, object]) -> bool:
    """Whether an adapter is folded into its base where the caller does not say.

    Over a 4bit base it would take the memory that quantisation was to save. So it does over an 8bit one, but there
    layers round their inputs together, and the scores of a user depend on who shares the batch.
    """
    if recipe is None:
        return False
    chosen = recipe.evaluation.merge_adapter
    return origin.get("quantisation") != "4bit" if chosen is None else chosen


def _assistant(folder: Path, manifest: dict[str, Any], recipe: Recipe | None) -> tuple[Path, float] | None:
    """Folder of the assistant and weight of the model: as saved, as the recipe says, or as chosen in an evaluation."""
    chosen = manifest if "assistant" in manifest else {}
    if not chosen and recipe is not None and recipe.evaluation.assistant is not None:
        wanted, weight = str(recipe.evaluation.assistant), recipe.evaluation.assistant_weight
        chosen = {"assistant": wanted, "assistant_weight": weight}
        if weight == "choose":
            metrics = folder / "metrics.json"
            chosen = read_json(metrics, _Chosen) if metrics.is_file() else {}
            if chosen.get("assistant") != wanted:
                raise UserError(
                    f"the weight of the assistant of {folder} is chosen when it is evaluated; run: triewise evaluate "
                    f"{folder}"
                )
    if not chosen:
        return None
    place = Path(chosen["assistant"])
    if not place.is_dir():
        raise UserError(
            f"wanted the assistant of {folder} in {place}, which is no folder; bring it back, or load the recommender "
            "with assistant=False"
        )
    return place, float(chosen.get("assistant_weight", 1.0))
