"""Folders that runs live in: prepared data, trained runs, and what was installed when they were made."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict

from triewise.data import (
    Dataset,
    changed_raw_files,
    data_hash,
    load_dataset,
    new_raw_file,
    prepare,
    said_of_ties,
    settings_of,
)
from triewise.errors import UserError
from triewise.files import Shape, read_json, read_record
from triewise.models import load_tokenizer
from triewise.progress import note
from triewise.recipe import Recipe, run_recipe
from triewise.recommenders import IDENTIFIER, TRIE, SequentialRecommender
from triewise.reports import compared, describe
from triewise.tokens import Identifier, Prompts, Trie, build_prompts, read_identifier


def open_data(recipe: Recipe) -> Dataset:
    """The prepared folder of a recipe; prepared first where it is absent."""
    name = recipe.data.source.replace(":", "-").replace("/", "-").strip("-.")
    folder = recipe.data.folder or Path("data", name)
    choices = recipe.data.model_dump(exclude={"source", "folder"})
    if (folder / "dataset.json").is_file():
        dataset = load_dataset(folder)
        wanted = {"source": recipe.data.source} | settings_of(recipe.data.source, **choices)
        found = {"k_core": 0} | dataset.info["settings"] | {"source": dataset.info["source"]}
        if any(found[name] != wanted[name] for name in ("source", "max_history")):
            raise UserError(
                f"{folder} was prepared from {found['source']} with histories of {found['max_history']}, the recipe "
                f"wants {wanted['source']} and {wanted['max_history']}; give another data.folder or prepare it again"
            )
        keys = [*wanted, *(name for name in found if name not in wanted)]
        default = {name: info.default for name, info in type(recipe.data).model_fields.items()}
        other = [name for name in keys if found.get(name, default[name]) != wanted.get(name, default[name])]
        if other:
            had, asked = (values.get(other[0], default[other[0]]) for values in (found, wanted))
            raise UserError(
                f"{folder} was prepared with {other[0]} = {had!r}, the recipe wants {asked!r}; "
                "give another data.folder or prepare it again"
            )
        changed = changed_raw_files(dataset)
        if changed:
            raise UserError(
                f"{folder} was prepared from another {changed[0]} than {recipe.data.source} has now; prepare it again, "
                "or give another data.folder"
            )
        new = new_raw_file(dataset, recipe.data)
        if new is not None:
            raise UserError(
                f"{folder} was prepared without {new}, which {recipe.data.source} has now and would read; prepare it "
                "again, or give another data.folder"
            )
        return dataset
    note(f"preparing {recipe.data.source} in {folder}")
    return prepare(recipe.data.source, folder, **choices)


def describe_data(
    folder: Path, tokenizer: str = "tiny", template: str | None = None, identifiers: Sequence[Path] = ()
) -> dict[str, Any]:
    """`triewise.reports.describe` of a prepared folder; every training row's target counts once.

    What the tokenizer does to titles is said on stderr, see `triewise.tokens.readback`.

    Args:
        folder: The prepared folder.
        tokenizer: As `load_backbone` takes a name.
        template: Prompt template; None: ``plain`` for ``tiny``, else ``msl``.
        identifiers: Files of codes, or runs with codes, to compare with titles; see `triewise.reports.compared`.
    """
    dataset, prompts, trie, counts = titles_of(folder, tokenizer, template)
    for line in prompts.readback.warnings():
        note(line)
    facts: dict[str, Any] = describe(dataset, prompts, trie, counts)
    if ties := said_of_ties(dataset.info):
        facts["ties"] = ties[0]
    if not identifiers:
        return facts
    coded = {path.name: read_codes(path, dataset).sequences for path in identifiers}
    return facts | compared({"title": trie} | {n: Trie.from_sequences(s) for n, s in coded.items()}, counts)


def titles_of(
    folder: Path, tokenizer: str, template: str | None
) -> tuple[Dataset, Prompts, Trie, NDArray[np.int64]]:
    """Data, prompts, trie and training targets (I,) of a prepared folder; arguments as of `describe_data`."""
    dataset = load_dataset(folder)
    template = template or ("plain" if tokenizer == "tiny" else "msl")
    tokens = load_tokenizer(tokenizer, titles=dataset.catalog.title)
    prompts = build_prompts(tokens, dataset.catalog, template, dataset.info["noun"], dataset.info["verb"])
    trie = Trie.from_sequences((prompts.title_tokens.values, prompts.title_tokens.offsets))
    return dataset, prompts, trie, np.bincount(dataset.train.target, minlength=dataset.catalog.n_items)


def read_codes(place: Path, dataset: Dataset, titled: bool = False) -> Identifier:
    """The codes in a file, or of a run; see `triewise.tokens.read_identifier`."""
    return read_identifier(place / IDENTIFIER if place.is_dir() else place, dataset.catalog, titled)


def what_was_prepared(dataset: Dataset) -> dict[str, Any]:
    """Counts, repairs and findings of a prepared folder, by what a person reads."""
    info = dataset.info
    findings = [finding for finding in info["lint"] if finding["count"]]
    return {
        "folder": str(dataset.folder),
        **info["counts"],
        **{f"repaired: {name}": n for name, n in info["repairs"].items()},
        **{f"lint: {f['name']}": f"{f['count']:,} of {f['of']:,}; {f['example']}" for f in findings},
        **({"notes": "; ".join(info["notes"])} if info["notes"] else {}),
    }


class _Source(Shape):
    folder: str
    source: str
    relative: str | None = None


class _Hashes(Shape):
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, str]
    data: str


class _Status(Shape):
    status: str


class StartedRun(_Status):
    """What ``run.json`` says from the first step on."""

    hashes: _Hashes
    data: _Source
    versions: dict[str, str]
    commit: str | None
    machine: str
    command: str
    parameters: int


class _Training(Shape):
    steps: int
    stopped: str
    best_step: int | None
    best_metric: float | None


class EndedRun(StartedRun):
    """What it says when the training has ended."""

    training: _Training
    timing: dict[str, float]


def open_run(run: Path) -> tuple[Recipe, dict[str, Any]]:
    """Recipe and ``run.json`` of a run folder; UserError when it is not one or its training has not ended."""
    if not (run / "run.json").is_file():
        raise UserError(
            f"wanted a run folder, but {run} has no run.json; give the folder that triewise train wrote"
        )
    if read_json(run / "run.json", _Status)["status"] not in ENDED:
        raise UserError(
            f"the training in {run} has not ended; go on with: "
            f"triewise train {run / 'recipe.toml'} --resume --out {run}"
        )
    read_record(run)
    return run_recipe(run), read_json(run / "run.json", EndedRun)


@contextlib.contextmanager
def where_writable(folder: Path, what: str) -> Iterator[None]:
    """A block that writes in a folder what can be done without; a line where that cannot be."""
    try:
        yield
    except OSError as error:
        note(f"{folder} cannot be written ({error.strerror}): {what} is not kept there")


def trie_of(run: Path) -> Trie:
    """The trie of a run, without its model."""
    return Trie.load(run / TRIE)


def way(run: Path, folder: Path) -> str | None:
    """How a folder is reached from a run folder; None where there is no way, as between drives of Windows."""
    with contextlib.suppress(ValueError):
        return Path(os.path.relpath(folder.resolve(), run.resolve())).as_posix()
    return None


def data_of(run: Path, record: dict[str, Any]) -> Dataset:
    """The data of a run: found from the run folder, since both may have been moved together, else at its old place.

    Raises:
        UserError: It is in neither place, or is not what was prepared.
    """
    place, relative = Path(record["data"]["folder"]), record["data"].get("relative")
    started = run.resolve().parent if run.name == BEFORE else run.resolve()  # the folder that the way is from
    near = place if relative is None else Path(os.path.normpath(started / relative))
    if (near / "dataset.json").is_file():
        dataset = load_dataset(near)
        if near == place or data_hash(dataset) == record["hashes"]["data"]:
            return dataset
    if near != place and not place.is_dir():
        raise UserError(
            f"the data of {run} is neither in {near} nor in {place}; bring it there, or prepare it again"
        )
    return load_dataset(place)


def trained_data(run: Path, record: dict[str, Any]) -> Dataset:
    """`data_of`; UserError where it is no longer what the run was trained on."""
    dataset = data_of(run, record)
    if record["hashes"]["data"] != data_hash(dataset):
        raise UserError(
            f"the data in {dataset.folder} changed since {run} was trained; prepare the same data or train again"
        )
    return dataset


def consented(recipe: Recipe, given: bool, where: Path | str) -> bool:
    """Whether code that comes with a language model may run: as this call says, and never as a folder says.

    Raises:
        UserError: The recipe asks for it, and this call does not grant it.
    """
    if recipe.backbone.trust_remote_code and not given:
        raise UserError(
            f"{where} asks to run code that comes with {recipe.backbone.name!r}; add --trust-remote-code "
            "(trust_remote_code=True) where you trust it, or take backbone.trust_remote_code out of the recipe"
        )
    return given


def open_partner(run: Path, who: str, recipe: Recipe, dataset: Dataset) -> Recipe:
    """The recipe of a run that a new one learns from, after its rows were compared.

    Args:
        run: Its folder.
        who: What it is to the new one, for the error line: ``the teacher``.
        recipe: Of the new one.
        dataset: Of the new one.

    Raises:
        UserError: No run, trained on other rows, or on the validation rows by which the new one is chosen.
    """
    theirs, record = open_run(run)
    if record["hashes"]["data"] != data_hash(dataset):
        raise UserError(
            f"{who} {run} was trained on other rows than those of {dataset.folder}; give both the same data, split and "
            "data.max_history"
        )
    if theirs.training.rows != "train" and recipe.training.rows == "train":
        raise UserError(
            f"{who} {run} was trained on the validation rows; give one trained on train, or set training.rows = "
            "'train+valid' here too"
        )
    return theirs


def open_sequential(run: Path, recipe: Recipe, dataset: Dataset) -> SequentialRecommender:
    """The sequential run whose item vectors are read, on the CPU; UserError as `open_partner`, or a language model."""
    if open_partner(run, "the run of the item vectors", recipe, dataset).sequential is None:
        raise UserError(
            f"wanted a sequential run for its item vectors, got the language model {run}; give one with a [sequential]"
        )
    return SequentialRecommender.from_pretrained(run, device="cpu")


BEFORE = "before"  # in a run folder that is overwritten: the run that was there
ENDED = ("trained", "stopped")  # what ``run.json`` says of a run that can be used


PACKAGES = ("triewise", "torch", "transformers", "numpy", "polars", "tokenizers")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages results depend on."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str:
    """What is installed; a package that is found on the path alone, as this one may be, has no version."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "source tree"


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
