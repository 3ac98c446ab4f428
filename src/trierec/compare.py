"""Several runs side by side: rows, paired intervals, and users whose recommendations are looked at closely."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from trierec.analysis import Example, describe, explain, forced_by_position
from trierec.dataset import Dataset, load_dataset
from trierec.decisiveness import information_gain
from trierec.errors import UserError
from trierec.evaluate import SHOWN, Evaluation, evaluate, paired_interval
from trierec.files import read_json
from trierec.generative import GenerativeRecommender
from trierec.ranking import Groups, MostPopular
from trierec.report import Comparison, Report, Row, write_report
from trierec.runs import allowed_items, first_rows, load_run, open_run
from trierec.splits import Split

POPULAR = "most popular"


def load_evaluation(run: Path) -> Evaluation:
    """What ``trierec evaluate`` wrote into a run folder."""
    metrics = read_json(run / "metrics.json")
    if not (run / "predictions.parquet").is_file():
        raise UserError(f"wanted {run}/predictions.parquet, which is missing; run: trierec evaluate {run}")
    frame = pl.read_parquet(run / "predictions.parquet")
    return Evaluation(
        name=metrics["name"],
        metrics=metrics,
        rank=frame["rank"].to_numpy(),
        items=np.array(frame["items"].to_list(), dtype=np.int32),
        scores=np.array(frame["scores"].to_list(), dtype=np.float32),
        certified=frame["certified"].to_numpy(),
        target=frame["target"].to_numpy(),
        user_id=np.array(frame["user_id"].to_list(), dtype=object),
    )


def most_popular(dataset: Dataset, like: Evaluation) -> Evaluation:
    """The row every method has to beat, on the rows and with the exclusions of another evaluation."""
    counts = dataset.train_interactions
    recommender = MostPopular(Groups.from_labels(dataset.catalog.group, counts), counts)
    shared = like.metrics
    facts = {"search": "catalogue", "support": "none", "allow": shared["allow"], "seed": shared["seed"]}
    return evaluate(
        recommender,
        _rows(dataset, like),
        name=POPULAR,
        split_name=shared["split"],
        k=like.items.shape[1],
        exclude=shared["exclude"],
        allow=None if shared["allow"] is None else allowed_items(Path(shared["allow"]), dataset.catalog),
        facts=facts,
        train_targets=dataset.train_targets,
        seed=shared["seed"],
    )


def row(evaluation: Evaluation, note: str = "") -> Row:
    """A line of the metrics table."""
    intervals = {
        name: (low, high) for name, (low, high) in evaluation.metrics["intervals"].items() if name in SHOWN
    }
    metrics = {name: evaluation.metrics[name] for name in SHOWN}
    return Row(evaluation.name, metrics, intervals, note, evaluation.metrics["timing"]["seconds"])


def comparisons(
    evaluations: Sequence[Evaluation], names: Sequence[str] = ("HR@10", "NDCG@10")
) -> tuple[Comparison, ...]:
    """The first evaluation against each of the others, user by user.

    Raises:
        UserError: Evaluations of different rows.
    """
    first = evaluations[0]
    found = []
    for other in evaluations[1:]:
        for key in ("split", "exclude", "allow"):
            if first.metrics.get(key) != other.metrics.get(key):
                raise UserError(
                    f"{first.name} was evaluated with {key} = {first.metrics[key]!r} and {other.name} with "
                    f"{other.metrics[key]!r}; evaluate both alike"
                )
        if not np.array_equal(first.target, other.target):
            raise UserError(
                f"{first.name} and {other.name} were evaluated on different rows; evaluate both on the same split"
            )
        for name in names:
            a, b = first.per_user(name), other.per_user(name)
            low, high = paired_interval(a, b)
            found.append(Comparison(first.name, other.name, name, float((a - b).mean()), low, high))
    return tuple(found)


def example_rows(evaluation: Evaluation, n: int = 3) -> list[int]:
    """Rows worth a look, chosen by rule and not by taste: the first hit in the top 5, near miss, and miss."""
    rank = evaluation.rank
    kinds = (
        (rank >= 0) & (rank < 5),
        (rank >= evaluation.items.shape[1]) & (rank < 100),
        (rank >= 100) | (rank < 0),
        np.ones(len(rank), dtype=bool),
        np.ones(len(rank), dtype=bool),
    )
    rows: list[int] = []
    for kind in kinds:
        fresh = [r for r in np.flatnonzero(kind).tolist() if r not in rows]
        rows.extend(fresh[:1])
    return rows[:n]


def examples(
    run: Path, evaluation: Evaluation, dataset: Dataset, rows: Sequence[int], top: int = 5
) -> tuple[Example, ...]:
    """Users with history, target and the tokens that decided each of their top recommendations."""
    recommender = load_run(run, open_run(run)[0])
    split = _rows(dataset, evaluation)
    gain = information_gain(recommender.trie, recommender.counts)
    return tuple(_example(recommender, evaluation, split, gain, r, top) for r in rows)


def _example(
    recommender: GenerativeRecommender, evaluation: Evaluation, split: Split, gain: Any, r: int, top: int
) -> Example:
    title = recommender.catalog.title
    items = [int(i) for i in evaluation.items[r, :top] if i >= 0]
    prompt = recommender.prompts.encode(split.history[r])
    target = int(split.target[r])
    found = explain(
        recommender.engine, recommender.backbone.tokenizer, recommender.catalog, prompt, items, target, gain
    )
    history = tuple(title[i] for i in split.history[r])
    return Example(
        str(split.user_id[r]), evaluation.name, history, title[target], int(evaluation.rank[r]), tuple(found)
    )


def collect(runs: Sequence[Path], popular: bool = True) -> Report:
    """Everything a report shows about runs on one data set; the first run is compared with the others.

    Raises:
        UserError: A run without evaluation, or runs on different data.
    """
    opened = [open_run(run) for run in runs]
    for run in runs:
        if not (run / "metrics.json").is_file():
            raise UserError(f"{run} has no metrics.json; run: trierec evaluate {run}")
    if len({facts["hashes"]["data"] for _, facts in opened}) > 1:
        raise UserError(
            "wanted runs on the same data for one report, got different data hashes; make a report of each"
        )
    recipe, facts = opened[0]
    dataset = load_dataset(Path(facts["data"]["folder"]))
    names = _names(runs, [r.title or r.name for r, _ in opened])
    evaluations = [replace(load_evaluation(run), name=name) for run, name in zip(runs, names, strict=True)]
    if popular:
        evaluations.append(most_popular(dataset, evaluations[0]))
    recommender = load_run(runs[0], recipe)
    return Report(
        title=f"{dataset.info['source']}: {', '.join(e.name for e in evaluations)}",
        subtitle=_protocol(evaluations[0], dataset),
        rows=tuple(
            row(e, _row_note(facts))
            for e, (_, facts) in zip(evaluations, [*opened, (None, {})], strict=False)
        ),
        comparisons=comparisons(evaluations),
        curves={name: read_log(run) for name, run in zip(names, runs, strict=True)},
        facts=describe(dataset, recommender.prompts, recommender.trie, recommender.counts),
        forced=forced_by_position(recommender.trie, recommender.counts),
        examples=examples(runs[0], evaluations[0], dataset, example_rows(evaluations[0])),
        notes=tuple(dataset.info["notes"])
        + tuple(_stopped(r.title or r.name, f) for r, f in opened if _stopped(r.name, f)),
        provenance=_provenance(facts, [r.seed for r, _ in opened]),
    )


def report_runs(runs: Sequence[Path], out: Path) -> Report:
    """Write one HTML report of several runs."""
    report = collect(runs)
    write_report(out, report)
    return report


def read_log(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's ``log.jsonl``."""
    log = run / "log.jsonl"
    if not log.is_file():
        raise UserError(f"wanted {log}, which is missing; restore it or train again")
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


def _rows(dataset: Dataset, evaluation: Evaluation) -> Split:
    split = dataset.test if evaluation.metrics["split"] == "test" else dataset.valid
    return first_rows(split, len(evaluation.rank))


def _names(runs: Sequence[Path], titles: Sequence[str]) -> list[str]:
    """Titles of runs, with the folder's name where a title occurs twice."""
    return [t if titles.count(t) == 1 else f"{t} ({run.name})" for run, t in zip(runs, titles, strict=True)]


def _protocol(evaluation: Evaluation, dataset: Dataset) -> str:
    facts = evaluation.metrics
    titles = f"{dataset.catalog.n_titles:,} titles"
    ranked = {
        "catalogue": f"the whole catalogue of {titles} ranked exactly for each",
        "exact": f"the best {evaluation.items.shape[1]} of {titles} found exactly for each",
        "beam": f"beam search with {facts.get('beams')} beams through {titles} for each",
        "grounding": f"{titles} ranked for each by the distance to a free text",
    }[facts["search"]]
    excluded = {
        "none": "nothing is excluded from the ranking",
        "history": "items of the row's history are excluded",
        "seen": "items the user has already seen are excluded",
    }[facts["exclude"]]
    if facts["allow"] is not None:
        excluded += f", and only the items of {Path(facts['allow']).name} are returned"
    return (
        f"{facts['n_users']} {facts['split']} users, {ranked}; {excluded}. "
        "Intervals: 95 % bootstrap over users."
    )


def _row_note(facts: dict[str, Any]) -> str:
    if not facts:
        return "counts of the training split"
    training = facts["training"]
    size, seconds = facts["parameters"] / 1e6, facts["timing"]["seconds"]
    return f"{size:.2f} M parameters, {training['steps']} steps in {seconds:.0f} s"


def _stopped(name: str, facts: dict[str, Any]) -> str:
    if facts["training"]["stopped"] != "time limit":
        return ""
    steps = facts["training"]["steps"]
    return f"{name} stopped early on its time limit, after {steps} steps: more steps may change its numbers."


def _provenance(facts: dict[str, Any], seeds: Sequence[int]) -> dict[str, str]:
    shown = {name: version for name, version in facts["versions"].items()}
    shown |= {
        "commit": facts["commit"] or "installed package",
        "machine": facts["machine"],
        "command": facts["command"],
    }
    shown["seeds"] = ", ".join(str(seed) for seed in sorted(set(seeds)))
    return shown | {f"{part} hash": value[:16] for part, value in facts["hashes"].items()}
