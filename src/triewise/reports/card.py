"""The model card: a Markdown page about a recommender, with a header that the Hugging Face hub reads.

It says what was learned from, how, how good it is, how to use it and whom to cite. It is made to be shared: paths
of this machine are cut to their last part, and titles are escaped, so they stay text whatever they contain.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from triewise.recipe import Recipe, dump_recipe

# Titles, authors and identifiers as on arXiv; the venues as the authors name them.
# Titles, authors and identifiers as on arXiv; the venues as the authors name them.
_PAPERS = resources.files("triewise.reports").joinpath("papers.bib").read_text(encoding="utf-8").strip()
MSL_BIBTEX, IGD_BIBTEX = _PAPERS.split("\n\n")


@dataclass(frozen=True)
class CardFacts:
    """What a card is made of; the last four are there when a recipe was trained and evaluated.

    Attributes:
        name: Heading.
        n_items: Items of the catalogue.
        example: A title of the catalogue, for the usage example.
        origin: `Backbone.origin`, without paths.
        settings: How the recommender searches: search, support, length penalty, ...; ``metrics`` has what was used.
        recipe: What was done.
        data: ``dataset.json``.
        run: ``run.json``.
        metrics: ``metrics.json``.
    """

    name: str
    n_items: int
    example: str
    origin: Mapping[str, Any]
    settings: Mapping[str, Any]
    recipe: Recipe | None = None
    data: Mapping[str, Any] | None = None
    run: Mapping[str, Any] | None = None
    metrics: Mapping[str, Any] | None = None


def model_card(facts: CardFacts, where: str = ".") -> str:
    """The card as Markdown with a YAML header; ``where`` is the folder or hub id in the usage example."""
    written = "title" if facts.recipe is None else facts.recipe.identifier.kind.replace("+", " and ")
    kind = (
        f"A sequential recommender: a model over item ids that scores all {facts.n_items:,} items."
        if _of_ids(facts)
        else f"A recommender that lets a language model write the {written} of the next item, along the prefix tree of "
        f"{facts.n_items:,} items."
    )
    follows = "Training and ranking follow, as far as the recipe says so, these two papers:"
    parts = [
        f"---\n{_header(facts)}\n---\n\n# {escape(facts.name)}",
        f"{kind} Made with triewise.",
        _usage(facts, where),
        _data(facts),
        _model(facts),
        _results(facts),
        _recipe(facts),
        _limits(facts),
        "" if _of_ids(facts) else f"## Citing\n\n{follows}\n\n{fenced(_PAPERS, 'bibtex')}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def addressed(card: str, repo_id: str, license: str | None = None) -> str:
    """A card for another place: the usage example loads ``repo_id``, the header names the licence.

    Cards written before the package got its name have another usage example.
    """
    load = r'(?:triewise|trierec)\.load\("[^"\n]*"\)'
    card = re.sub("^import (?:triewise|trierec)$", "import triewise", card, count=1, flags=re.M)
    card = re.sub(load, lambda _: f'triewise.load("{repo_id}")', card, count=1)
    if license and card.startswith("---\n"):
        card = f"---\nlicense: {json.dumps(license)}\n" + card.removeprefix("---\n")
    return card


def escape(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>()#+|~$&!])", r"\\\1", " ".join(text.split()))


def without_folders(text: str) -> str:
    """The last part of an absolute path, also behind ``msl:`` or ``d3:``; any other text as it is."""
    prefix, path = re.fullmatch(r"(\w{2,}:)?(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
    here = PurePosixPath(path).is_absolute() or PureWindowsPath(path).is_absolute()
    # Windows knows both separators.
    return f"{prefix or ''}{PureWindowsPath(path).name}" if here or path.startswith(("~", "..")) else text


def fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any row of backticks in it."""
    fence = "`" * max([3, *(len(row) + 1 for row in re.findall("`+", text))])
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _header(facts: CardFacts) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    origin, source, metrics, results = facts.origin, _source(facts), facts.metrics, None
    if metrics is not None and source is not None:
        results = [
            EvalResult(
                task_type="recommendation",
                task_name="Next-item recommendation",
                dataset_type=source,
                dataset_name=source,
                dataset_split=metrics["split"],
                metric_type=metric.lower(),
                metric_name=metric,
                metric_value=round(metrics[metric], 6),
            )
            for metric in metrics["intervals"]
        ]
    on_hub = origin.get("repository") and "place" not in origin and "sha256_source" not in origin
    return ModelCardData(
        library_name="triewise",
        tags=["recommendation", "sequential-recommendation", "generative-recommendation", "triewise"],
        base_model=origin["repository"] if on_hub else None,
        base_model_relation=("adapter" if _adapter(origin) else "finetune") if on_hub else None,
        datasets=None if source is None else [source],
        model_name=facts.name,
        eval_results=results,
    ).to_yaml()


def _adapter(origin: Mapping[str, Any]) -> bool:
    return "lora" in origin and not origin.get("merged")


def _of_ids(facts: CardFacts) -> bool:
    """Whether it is a sequential model over item ids and no language model."""
    return facts.origin.get("kind") == "sequential"


def _usage(facts: CardFacts, where: str) -> str:
    code = f"""import triewise

recommender = triewise.load({json.dumps(where, ensure_ascii=False)})
item = recommender.catalog.index({json.dumps(facts.example, ensure_ascii=False)})
ranking = recommender.recommend([[item]], k=3, exclude="history")
print(ranking.titles(recommender.catalog)[0])"""
    package = "triewise[quant]" if facts.origin.get("quantisation", "none") != "none" else "triewise"
    lines = [
        "## Use",
        f"With the Python package `{package}` installed; `item` is the position of a title in the catalogue, and a "
        "history is a list of them, oldest first:",
        fenced(code, "python"),
    ]
    if "place" in facts.origin and _adapter(facts.origin):
        lines.append(
            f"The base model `{facts.origin['name']}` is not part of this: give its folder, "
            '`triewise.load(..., base="FOLDER")`.'
        )
    return "\n\n".join(lines)


def _data(facts: CardFacts) -> str:
    if facts.data is None:
        return ""
    info, settings = facts.data, facts.data["settings"]
    counts = ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in info["counts"].items())
    lines = [
        f"- source: {escape(str(_source(facts)))}, {counts}",
        f"- split: {escape(str(settings['split']))}, histories of at most {settings['max_history']} items",
        *(f"- {escape(without_folders(note))}" for note in info["notes"]),
    ]
    if info["citation"]:
        lines.append(f"- {escape(info['citation'])}")
    return "## Data\n\n" + "\n".join(lines)


def _model(facts: CardFacts) -> str:
    origin = facts.origin
    revision = f"revision {origin['revision']}" if origin.get("revision") else None
    named = dict.fromkeys(str(part) for part in (origin["name"], origin.get("repository"), revision) if part)
    kind = "encoder of item ids" if _of_ids(facts) else "language model"
    lines = [f"- {kind}: {escape(', '.join(named))}"]
    if origin.get("quantisation", "none") != "none":
        lines.append(f"- base quantised to {origin['quantisation']} with bitsandbytes")
    if "lora" in origin:
        lora = origin["lora"]
        targets = lora["targets"] if isinstance(lora["targets"], str) else ", ".join(lora["targets"])
        adapter = "LoRA adapter" if _adapter(origin) else "merged LoRA adapter"
        scale = f"rank {lora['rank']}, alpha {lora['alpha']:g}, dropout {lora['dropout']:g}"
        lines.append(f"- {adapter} of {scale}, on {escape(targets)}")
    if facts.recipe is not None and not _of_ids(facts):
        lines.append(f"- prompt template: {facts.recipe.template}")
    if facts.run is not None:
        training, size = facts.run["training"], facts.run["parameters"]
        trained = facts.run.get("trained_parameters", size)  # older runs trained all of them
        lines.append(f"- {size:,} parameters, {trained:,} of them trained")
        lines.append(f"- {training['steps']} steps, ended by: {training['stopped']}")
        hashes = ", ".join(f"{name} {value[:16]}" for name, value in facts.run["hashes"].items())
        lines.append(f"- hashes (sha256): {hashes}")
        wanted = ("triewise", "trierec", "torch", "transformers")  # trierec: in runs made before the rename
        versions = (f"{name} {v}" for name in wanted if (v := facts.run["versions"].get(name)))
        lines.append(f"- made with {escape(', '.join(versions))}")
    return "## Model\n\n" + "\n".join(lines)


def _results(facts: CardFacts) -> str:
    if facts.metrics is None:
        return ""
    metrics = facts.metrics
    groups = [name for name in ("warm", "cold") if metrics.get(name, {}).get("n_users")]
    heads = [f"{name} targets, {metrics[name]['n_users']} users" for name in groups]
    rows = [["metric", "all users", "95 % interval", *heads], ["---"] * (3 + len(heads))]
    for name, (low, high) in metrics["intervals"].items():
        parts = [f"{metrics[part][name]:.4f}" if name in metrics[part] else "" for part in groups]
        rows.append([name, f"{metrics[name]:.4f}", f"{low:.4f} to {high:.4f}", *parts])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    excluded = {
        "none": "nothing is excluded from a ranking",
        "history": "items of the history are excluded",
        "seen": "everything the user had before is excluded",
    }[metrics["exclude"]]
    keys = dict.fromkeys((*facts.settings, "adapter", "allow", "seed"))
    said = [f"{key} = {without_folders(str(metrics[key]))}" for key in keys if metrics.get(key) is not None]
    return (
        f"## Results\n\n{table}\n\n{metrics['n_users']:,} rows of the {metrics['split']} split; {excluded}; items with "
        f"equal titles count as one. Settings: {escape(', '.join(said))}. Intervals: bootstrap over users. Warm "
        "targets were a training target before, cold ones never."
    )


def _recipe(facts: CardFacts) -> str:
    if facts.recipe is None:
        settings = ", ".join(f"{name} = {value}" for name, value in facts.settings.items())
        return f"## Recipe\n\nNot known here. The recommender ranks with {escape(settings)}."
    shared = _shared(facts.recipe.model_dump(mode="json", exclude={"data": {"folder"}}))
    return f"## Recipe\n\n{fenced(dump_recipe(Recipe.model_validate(shared)), 'toml')}"


def _limits(facts: CardFacts) -> str:
    needed = "training anew." if _of_ids(facts) else "a new prefix tree, and training to be ranked well."
    scores = (
        "numbers that order items, not probabilities"
        if _of_ids(facts)
        else "log-probabilities of titles under this model, not of anybody liking an item"
    )
    lines = [
        f"- Only the {facts.n_items:,} items it was made with can be recommended; others need {needed}",
        "- It repeats what users of one data set did, with its favourites and its gaps; it knows nothing else about a "
        "user than the history.",
        f"- Scores are {scores}.",
    ]
    if facts.metrics is None:
        lines.append("- No metrics are recorded.")
    elif facts.run is not None:
        lines.append(f"- The results are those of one training with seed {facts.run['seed']}.")
    return "## Limits\n\n" + "\n".join(lines)


def _source(facts: CardFacts) -> str | None:
    """Name of the data set: the last part of a folder, without ``msl:`` or ``d3:``."""
    if facts.data is None:
        return None
    return PureWindowsPath(str(facts.data["source"]).partition(":")[2] or str(facts.data["source"])).name


def _shared(value: Any) -> Any:
    """A recipe's values with paths cut to their last part."""
    if isinstance(value, dict):
        return {key: _shared(inner) for key, inner in value.items()}
    return without_folders(value) if isinstance(value, str) else value
