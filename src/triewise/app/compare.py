"""Several runs side by side: rows, paired intervals, and users whose recommendations are looked at closely."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from triewise.app.exploring import Looked, example, example_rows, explore
from triewise.app.folders import consented, open_run, trained_data
from triewise.app.studying import IN_REPORT, distinct, studied_runs
from triewise.data import Dataset, Split, allowed_items, first_rows, said_of_ties
from triewise.errors import UserError
from triewise.locks import one_writer
from triewise.ranking import (
    SHOWN,
    Evaluation,
    Groups,
    ItemKNN,
    MostPopular,
    evaluate,
    interval,
    load_evaluation,
    paired_interval,
    paired_p,
)
from triewise.recommenders import SETTINGS, SavedRecommender, load
from triewise.reports import Comparison, Report, Row, make_statistics, without_folders, write_report
from triewise.training import MAY_CHANGE, read_log

if TYPE_CHECKING:
    from triewise.recipe import Recipe

POPULAR, KNN = "most popular", "item-kNN"
SHOWS_USERS = (
    "This page shows some users with their ids and histories as they are in the data. To send it on, make it with "
    "triewise report --anonymous, which numbers them."
)
MORE = ("HR@1", "HR@20", "NDCG@20", "MRR@10", "coverage@10")
LARGE = 20e6  # parameters; of such models one alone is asked, since a user takes it a second on a CPU
USERS = 40, 12  # that can be looked up, of small and of large models
JUDGED = ("split", "exclude", "allow")  # what rows of one table have in common
# How a row was ranked: runs that differ here are no repeats of each other.
RANKED = (*SETTINGS, "adapter", "assistant", "assistant_weight")

# Of two runs of one recipe these may differ: what is reported and when, memory, and when a clock stops it.
FREE: dict[str, Any] = dict.fromkeys(("seed", "name", "title", "evaluation"), True) | {
    "training": MAY_CHANGE - {"patience"}
}


@dataclass(frozen=True)
class Repeats:
    """Runs of one recipe with different seeds, judged as one: the value of a user is the mean over the runs.

    Attributes:
        name: What the row is called.
        runs: Two or more evaluations of the same rows.
    """

    name: str
    runs: tuple[Evaluation, ...]

    @property
    def metrics(self) -> dict[str, Any]:
        """How the runs were evaluated: what ``metrics.json`` of the first says."""
        return self.runs[0].metrics

    @property
    def target(self) -> NDArray[np.int32]:
        """(B,) targets, the same for all runs."""
        return self.runs[0].target

    def per_user(self, metric: str) -> NDArray[np.float64]:
        """(B,) means over the runs."""
        mean: NDArray[np.float64] = np.mean([run.per_user(metric) for run in self.runs], axis=0)
        return mean


def baselines(dataset: Dataset, like: Evaluation) -> list[Evaluation]:
    """The rows every method has to beat, on the rows and with the exclusions of another evaluation: no training."""
    counts, shared = dataset.train_interactions, like.metrics
    groups = Groups.from_labels(dataset.catalog.group, counts)
    allow = None if shared["allow"] is None else allowed_items(Path(shared["allow"]), dataset.catalog)
    knn, popular = ItemKNN.fit(dataset.train, groups), MostPopular(groups, counts)
    return [
        evaluate(
            recommender,
            _rows(dataset, like),
            name=name,
            split_name=shared["split"],
            k=like.items.shape[1],
            exclude=shared["exclude"],
            allow=allow,
            facts={"search": "catalogue", "support": "none"} | {n: shared[n] for n in ("allow", "seed")},
            train_targets=dataset.train_targets,
            train_interactions=counts,
            seed=shared["seed"],
        )
        for name, recommender in ((KNN, knn), (POPULAR, popular))
    ]


def row(evaluation: Evaluation | Repeats, note: str = "") -> Row:
    """A line of the metrics table; of runs with several seeds their mean and standard deviation."""
    runs = evaluation.runs if isinstance(evaluation, Repeats) else (evaluation,)
    each = [run.metrics for run in runs]
    first = each[0]
    means = {n: float(np.mean([m[n] for m in each])) for n in (*SHOWN, *MORE) if all(n in m for m in each)}
    intervals = {name: (low, high) for name, (low, high) in first["intervals"].items() if name in SHOWN}
    deviations = {}
    if len(runs) > 1:
        intervals = {name: interval(evaluation.per_user(name), seed=first["seed"]) for name in SHOWN}
        deviations = {name: float(np.std([m[name] for m in each], ddof=1)) for name in SHOWN}
    notes = (note, _assistance(each), f"{len(runs)} seeds" if len(runs) > 1 else "")
    return Row(
        evaluation.name,
        {name: means[name] for name in SHOWN},
        intervals,
        "; ".join(part for part in notes if part),
        float(np.mean([m["timing"]["seconds"] for m in each])),
        deviations,
        {name: means[name] for name in MORE if name in means},
        {
            bucket: (part["n_users"], float(np.mean([m["by_popularity"][bucket]["HR@10"] for m in each])))
            for bucket, part in first.get("by_popularity", {}).items()
            if all("by_popularity" in m for m in each)
        },
    )


def _assistance(metrics: Sequence[dict[str, Any]]) -> str:
    """Who assisted the runs of a row, and the weights of their models."""
    helpers = sorted({Path(m["assistant"]).name for m in metrics if "assistant" in m})
    weights = sorted({f"{m['assistant_weight']:g}" for m in metrics if "assistant_weight" in m})
    said = [f"assisted by {', '.join(helpers)}"] if helpers else []
    return ", ".join(said + ([f"own weight {' or '.join(weights)}"] if weights else []))


def repeats(recipes: Sequence[Recipe], evaluations: Sequence[Evaluation]) -> list[list[int]]:
    """Which runs are one row: places of runs that differ in nothing but the seed, in order of their first."""
    places: dict[str, list[int]] = {}
    seeds: set[tuple[str, int]] = set()
    for i, (recipe, evaluation) in enumerate(zip(recipes, evaluations, strict=True)):
        chosen = {"chosen": RANKED, "chosen_weight": ("assistant_weight",)}  # by validation rows, run by run
        free = {key for name, keys in chosen.items() if name in evaluation.metrics for key in keys}
        ranked = [key for key in (*JUDGED, *RANKED) if key in JUDGED or key not in free]
        judged = {n: evaluation.metrics.get(n) for n in (*ranked, "n_users")}
        key = json.dumps([recipe.model_dump(mode="json", exclude=FREE), judged])
        if (key, recipe.seed) in seeds:  # the same run twice
            key = f"{key} {i}"
        seeds.add((key, recipe.seed))
        places.setdefault(key, []).append(i)
    return list(places.values())


def comparisons(
    evaluations: Sequence[Evaluation | Repeats], names: Sequence[str] = ("HR@10", "NDCG@10")
) -> tuple[Comparison, ...]:
    """The first evaluation against each of the others, user by user.

    Raises:
        UserError: Evaluations of different rows.
    """
    first = evaluations[0]
    differences = []
    for other in evaluations[1:]:
        for key in JUDGED:
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
            difference, p = float((a - b).mean()), paired_p(a, b)
            differences.append(Comparison(first.name, other.name, name, difference, low, high, p))
    return tuple(differences)


def collect(
    runs: Sequence[Path],
    popular: bool = True,
    *,
    trust: bool = False,
    anonymous: bool = False,
    users: int | None = None,
) -> Report:
    """Everything a report shows about runs on one data set; the first run is compared with the others.

    Paths of this machine are cut to their last part. Users are shown with their ids, or numbered (``anonymous``);
    ``users`` of them can be looked up, by default `USERS`.

    Raises:
        UserError: A run without evaluation, runs on different data or data that changed since, or one that asks to run
            code that comes with its language model, which ``trust`` does not grant.
    """
    opened = _opened(runs)
    dataset = trained_data(runs[0], record := opened[0][1])
    evaluations = [load_evaluation(run) for run in runs]
    together = repeats([r for r, _ in opened], evaluations)
    first = [group[0] for group in together]
    names = distinct([opened[i][0].title or opened[i][0].name for i in first], [runs[i] for i in first])
    name_of = {i: name for name, group in zip(names, together, strict=True) for i in group}
    evaluations = [replace(evaluation, name=name_of[i]) for i, evaluation in enumerate(evaluations)]
    named: list[Evaluation | Repeats] = []
    curves = {}
    for name, group in zip(names, together, strict=True):
        several = tuple(evaluations[i] for i in group)
        named.append(Repeats(name, several) if len(group) > 1 else several[0])
        for i in group:
            curves[name if i == group[0] else f"{name}, seed {opened[i][0].seed}"] = read_log(runs[i])
    notes = [_row_note(opened[i][0], opened[i][1], evaluations[i].metrics) for i in first]
    if popular:
        named += baselines(dataset, evaluations[0])
        notes += ["neighbours of the history's items, of train", "counts of train"]
    large = max(record["parameters"] for _, record in opened) > LARGE
    writers: list[SavedRecommender | None] = []
    for i in first:
        writes = opened[i][0].sequential is None and not (large and any(writers))
        trusted = writes and consented(opened[i][0], trust, runs[i])
        writers.append(load(runs[i], assistant=False, trust_remote_code=trusted) if writes else None)
    looked = [
        Looked(e.runs[0] if isinstance(e, Repeats) else e, writer)
        for e, writer in zip(named, [*writers, None, None], strict=False)
    ]
    looks = _looks(looked, dataset, USERS[large] if users is None else users, anonymous)
    return Report(
        title=f"{without_folders(dataset.info['source'])}: {', '.join(e.name for e in named)}",
        subtitle=_protocol(evaluations, dataset),
        rows=tuple(row(e, note) for e, note in zip(named, notes, strict=True)),
        comparisons=comparisons(named),
        curves=curves,
        **looks,
        statistics=make_statistics(IN_REPORT, studied_runs([runs[i] for i in first], names)),
        notes=_notes(dataset, opened, shows_users=bool(looks) and not anonymous),
        provenance=_provenance(record, [r.seed for r, _ in opened]),
    )


def _opened(runs: Sequence[Path]) -> list[tuple[Recipe, dict[str, Any]]]:
    """Recipe and ``run.json`` of each run; UserError as `collect`."""
    opened = [open_run(run) for run in runs]
    for run in runs:
        if not (run / "metrics.json").is_file():
            raise UserError(f"{run} has no metrics.json; run: triewise evaluate {run}")
    if len({record["hashes"]["data"] for _, record in opened}) > 1:
        raise UserError(
            "wanted runs on the same data for one report, got different data hashes; make a report of each"
        )
    return opened


def _looks(looked: Sequence[Looked], dataset: Dataset, users: int, anonymous: bool) -> dict[str, Any]:
    """The parts of a report that need a model that writes titles; those of the first, where there is one."""
    writer = next((each for each in looked if each.recommender is not None), None)
    if writer is None or writer.recommender is None:
        return {}
    recommender, split = writer.recommender, _rows(dataset, writer.evaluation)
    rows = example_rows(writer.evaluation)
    shown = tuple(example(recommender, writer.evaluation, split, r) for r in rows)
    explorer = explore(looked, dataset, split, users, rows) if users else None
    if anonymous:
        ids = [user.user for user in shown] + [user.user for user in (explorer.users if explorer else ())]
        number = {raw: str(n) for n, raw in enumerate(dict.fromkeys(ids), 1)}
        shown = tuple(replace(user, user=number[user.user]) for user in shown)
        if explorer:
            numbered = tuple(replace(user, user=number[user.user]) for user in explorer.users)
            explorer = replace(explorer, users=numbered)
    figures = recommender.title_figures(dataset) | {"examples": shown, "explorer": explorer}
    figures["facts"] |= {"source": without_folders(dataset.info["source"])}
    return figures


def report_runs(
    runs: Sequence[Path],
    out: Path,
    *,
    trust_remote_code: bool = False,
    anonymous: bool = False,
    users: int | None = None,
) -> Report:
    """Write one HTML report of several runs; ``anonymous`` and ``users`` as in `collect`."""
    report = collect(runs, trust=trust_remote_code, anonymous=anonymous, users=users)
    with one_writer(out.parent) if (out.parent / "run.json").is_file() else contextlib.nullcontext():
        write_report(out, report)
    return report


def _rows(dataset: Dataset, evaluation: Evaluation) -> Split:
    split = dataset.test if evaluation.metrics["split"] == "test" else dataset.valid
    return first_rows(split, len(evaluation.rank))


def _protocol(evaluations: Sequence[Evaluation], dataset: Dataset) -> str:
    evaluation, judged = evaluations[0], evaluations[0].metrics
    titles = f"{dataset.catalog.n_titles:,} titles"
    ranked = {
        "catalogue": f"the whole catalogue of {titles} ranked exactly for each",
        "exact": f"the best {evaluation.items.shape[1]} of {titles} found exactly for each",
        "beam": f"beam search with {judged.get('beams')} beams through {titles} for each",
        "grounding": f"{titles} ranked for each by the distance to a free text",
    }[judged["search"]]
    if len({e.metrics["search"] for e in evaluations}) > 1:
        ranked = f"{titles} ranked for each, exactly where a row says nothing else"
    excluded = {
        "none": "nothing is excluded from the ranking",
        "history": "items of the row's history are excluded",
        "seen": "items the user has already seen are excluded",
    }[judged["exclude"]]
    if judged["allow"] is not None:
        excluded += f", and only the items of {Path(judged['allow']).name} are returned"
    return (
        f"{judged['n_users']} {judged['split']} users, {ranked}; {excluded}. "
        "Intervals: 95 % bootstrap over users."
    )


def _row_note(recipe: Recipe, record: dict[str, Any], metrics: dict[str, Any]) -> str:
    """What a reader has to know beside the numbers of a row: size, budget, rows learned from, how it was ranked."""
    training = record["training"]
    size, seconds = record["parameters"] / 1e6, record["timing"]["seconds"]
    note = f"{size:.2f} M parameters, {training['steps']} steps in {seconds:.0f} s"
    if recipe.training.rows != "train":
        note += f", trained on {recipe.training.rows}"
    if metrics["search"] in ("beam", "grounding"):
        note += f", {metrics['search']}"
    if metrics["support"] == "vocabulary":
        note += ", vocabulary support"
    if recipe.identifier.kind != "title" and recipe.identifier.collisions == "group":
        note += ", titles of equal codes count as one"
    return note


def _notes(
    dataset: Dataset, opened: Sequence[tuple[Recipe, dict[str, Any]]], *, shows_users: bool
) -> tuple[str, ...]:
    """Sentences on data and method, and what a reader has to know before the page is sent on."""
    of_data = map(without_folders, dataset.info["notes"])
    return (*of_data, *said_of_ties(dataset.info), *_stopped(opened), *([SHOWS_USERS] if shows_users else []))


def _stopped(opened: Sequence[tuple[Recipe, dict[str, Any]]]) -> list[str]:
    """A sentence for each run that its clock or somebody stopped."""
    said = "{} stopped early {}, after {} steps: more steps may change its numbers."
    found = []
    for recipe, record in opened:
        training, why = record["training"], "on its time limit"
        if record["status"] == "stopped":
            why = f"({training['stopped']})"
        elif training["stopped"] != "time limit":
            continue
        found.append(said.format(recipe.title or recipe.name, why, training["steps"]))
    return found


def _shareable(command: str) -> str:
    """A command line whose paths are cut to their last part."""
    try:
        words = shlex.split(command)
    except ValueError:  # of an older run, which quoted nothing
        words = command.split()
    cut = [(key, equals, without_folders(value)) for key, equals, value in (w.rpartition("=") for w in words)]
    return shlex.join("".join(parts) for parts in cut)


def _provenance(record: dict[str, Any], seeds: Sequence[int]) -> dict[str, str]:
    return {
        **record["versions"],
        "commit": record["commit"] or "installed package",
        "machine": record["machine"],
        "command": _shareable(record["command"]),
        "seeds": ", ".join(str(seed) for seed in sorted(set(seeds))),
        **{f"{part} hash": value[:16] for part, value in record["hashes"].items()},
    }
