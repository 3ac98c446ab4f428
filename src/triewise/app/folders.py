"""Folders that runs live in: prepared data, trained runs, and what was installed when they were made."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

from triewise.data import Dataset, load_dataset, prepare, settings_of
from triewise.errors import UserError
from triewise.files import read_json
from triewise.progress import note
from triewise.recipe import Recipe, load_recipe
from triewise.recommenders import GenerativeRecommender, SequentialRecommender


def open_data(recipe: Recipe) -> Dataset:
    """The prepared folder of a recipe; prepared first where it is absent."""
    folder = recipe.data.folder or Path("data") / recipe.data.source.replace(":", "-").replace(
        "/", "-"
    ).strip("-.")
    choices = recipe.data.model_dump(include={"max_history", "clean", "k_core", "split"})
    if (folder / "dataset.json").is_file():
        dataset = load_dataset(folder)
        wanted = {"source": recipe.data.source} | settings_of(recipe.data.source, **choices)
        found = {"k_core": 0} | dataset.info["settings"] | {"source": dataset.info["source"]}
        if any(found[name] != wanted[name] for name in ("source", "max_history")):
            raise UserError(
                f"{folder} was prepared from {found['source']} with histories of {found['max_history']}, the recipe "
                f"wants {wanted['source']} and {wanted['max_history']}; give another data.folder or prepare it again"
            )
        other = [name for name in wanted if found[name] != wanted[name]]
        if other:
            raise UserError(
                f"{folder} was prepared with {other[0]} = {found[other[0]]!r}, the recipe wants {wanted[other[0]]!r}; "
                "give another data.folder or prepare it again"
            )
        return dataset
    note(f"preparing {recipe.data.source} in {folder}")
    return prepare(recipe.data.source, folder, **choices)


def open_run(run: Path) -> tuple[Recipe, dict[str, Any]]:
    """Recipe and ``run.json`` of a run folder; UserError when it is not one or its training has not ended."""
    if not (run / "run.json").is_file():
        raise UserError(
            f"wanted a run folder, but {run} has no run.json; give the folder that triewise train wrote"
        )
    facts = read_json(run / "run.json")
    if facts.get("status") != "trained":
        raise UserError(
            f"the training in {run} has not ended; go on with: "
            f"triewise train {run / 'recipe.toml'} --resume --out {run}"
        )
    return load_recipe(run / "recipe.toml"), facts


PACKAGES = ("triewise", "torch", "transformers", "numpy", "polars", "tokenizers")


def load_run(run: Path, recipe: Recipe) -> GenerativeRecommender | SequentialRecommender:
    """The recommender of a run with the device, dtype and trust of its recipe, and its adapter merged or not."""
    if recipe.sequential is not None:
        return SequentialRecommender.from_pretrained(run, device=recipe.sequential.device)
    settings = recipe.backbone
    recommender = GenerativeRecommender.from_pretrained(
        run, device=settings.device, dtype=settings.dtype, trust_remote_code=settings.trust_remote_code
    )
    merge = recipe.evaluation.merge_adapter
    if merge is None:
        # Over a 4bit base it would take the memory that quantisation was to save. So it does over an 8bit one, but
        # there layers round their inputs together, and the scores of a user depend on who shares the batch.
        merge = recommender.backbone.origin.get("quantisation") != "4bit"
    return recommender.merged() if merge and recommender.backbone.adapted else recommender


def versions() -> dict[str, str]:
    """Versions of Python and of the packages results depend on."""
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in PACKAGES
    }


def n_threads() -> int:
    """Threads that torch computes with."""
    import torch

    return torch.get_num_threads()


def commit_of_source() -> str | None:
    """Commit of the source tree this package is run from, with ``+`` when it has changes; None when installed."""
    root = Path(__file__).parents[3]
    if not (root / "pyproject.toml").is_file():
        return None
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        head = subprocess.run(command, cwd=root, capture_output=True, text=True)
    except OSError:
        return None
    return head.stdout.strip() or None
