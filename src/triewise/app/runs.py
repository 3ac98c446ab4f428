"""A run folder from beginning to end: prepare, train, evaluate, report.

``recipe.toml`` and ``run.json`` say what was done and with which data, prompt, trie and counts; ``log.jsonl``
how the training went; ``model/``, ``trie.npz``, ``catalog.parquet`` and ``recommender.json`` are the
recommender; ``predictions.parquet`` and ``metrics.json`` how good it is. Each file is whole or absent.
"""

from __future__ import annotations

import contextlib
import functools
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from triewise.app.assemble import Learner, learner_of
from triewise.app.bounds import check_sizes
from triewise.app.folders import (
    BEFORE,
    EndedRun,
    StartedRun,
    commit_of_source,
    consented,
    open_data,
    open_run,
    trained_data,
    versions,
    way,
)
from triewise.data import Dataset, Split, allowed_items, data_hash, first_rows
from triewise.errors import UserError
from triewise.files import (
    atomic_folder,
    file_names,
    read_json,
    read_record,
    remove,
    sha256_file,
    write_json,
    write_text,
)
from triewise.locks import one_writer, strangers
from triewise.progress import note
from triewise.ranking import SHOWN, Evaluation, Items, evaluate
from triewise.recipe import Recipe, dump_recipe, run_recipe
from triewise.recommenders import (
    CARD,
    IDENTIFIER,
    MANIFEST,
    SavedRecommender,
    card_facts,
    check_saved,
    choose_search,
    choose_weight,
    load,
)
from triewise.reports import model_card
from triewise.training import (
    BEST,
    BY_ITSELF,
    LOG,
    MAY_CHANGE,
    TrainResult,
    Watch,
    link,
    processes,
    resume_point,
)

if TYPE_CHECKING:
    from triewise.settings import EvaluationSettings

RECIPE = "recipe.toml"


def train_run(
    recipe: Recipe,
    out: Path | str,
    *,
    resume: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    watch: Watch | None = None,
) -> TrainResult:
    """Train a recipe into a run folder; in several processes each calls it, and the first one writes.

    Args:
        recipe: What to do.
        out: The run folder.
        resume: Go on from the last whole checkpoint; the recipe must be the one the run was started with.
        overwrite: Start anew in a folder that holds a run; an ended one stays in its folder ``before`` till the new
            one has ended.
        trust_remote_code: Execute code that comes with language models. A recipe can ask for it, not grant it.
        watch: Told each row of the log; a reason that it gives after a validation ends the training.

    Raises:
        UserError: The folder holds a run and neither ``resume`` nor ``overwrite`` is given; another recipe on
            resume; a recipe that asks for what is not granted; or another process writes there.
    """
    trust = consented(recipe, trust_remote_code, f"the recipe {recipe.name}")
    if recipe.sequential is None:
        backbone = recipe.backbone.model_copy(update={"trust_remote_code": trust})
        recipe = recipe.model_copy(update={"backbone": backbone})
    processes.start()
    out = Path(out)
    with contextlib.ExitStack() as held, processes.together():
        processes.share(recipe.training)

        def enter() -> dict[str, Any] | None:
            if out.exists() and not out.is_dir():
                raise UserError(f"wanted a folder for the run, but {out} is a file; choose another --out")
            held.enter_context(one_writer(out))
            return _check_folder(recipe, out, resume, overwrite)

        return _train_run(recipe, out, processes.on_first(enter), watch)


def _train_run(
    recipe: Recipe, out: Path, going_on: dict[str, Any] | None, watch: Watch | None
) -> TrainResult:
    """A run in a folder that was checked; ``going_on`` is its ``run.json``, None for a new one."""
    dataset = processes.first_then_others(lambda: open_data(recipe))
    if recipe.evaluation.exclude == "seen" and dataset.test.seen is None:
        raise UserError(
            "evaluation.exclude = 'seen' needs what users had before, which this data set does not know; use 'history'"
        )
    if recipe.evaluation.assistant is not None:
        open_run(recipe.evaluation.assistant)  # not needed before the evaluation, and not found out then
    check_sizes(recipe, dataset.catalog.n_items)
    if recipe.evaluation.allow is not None:
        allowed_items(recipe.evaluation.allow, dataset.catalog)
    learner = processes.first_then_others(lambda: learner_of(recipe, dataset))
    started = time.time()
    record, recommender = _record(recipe, out, dataset, learner), learner.recommender
    validate = validator(recipe, dataset, recommender) if recipe.training.evaluate_every else None
    if going_on is None:
        processes.on_first(lambda: _begin(recipe, out, record))
    elif changed := [n for n, value in record["hashes"].items() if going_on["hashes"].get(n, value) != value]:
        raise UserError(
            f"the {changed[0]} changed since {out} was started; restore it, or start anew with --overwrite"
        )
    how: dict[str, Any] = {"title": recipe.name, "watch": watch, "facts": recipe.model_dump(mode="json")}
    result = learner.fit(out, validate=validate, resume=going_on is not None, **how)
    training = {
        "steps": result.steps_done,
        "stopped": result.stopped,
        "best_step": result.best_step,
        "best_metric": result.best_metric,
    }
    if recommender.dropped is not None:
        n_dropped = sum(processes.gather_objects(recommender.dropped.titles))
        if n_dropped:
            limit = recommender.dropped.limit
            note(f"{recipe.name}: {n_dropped} titles dropped from prompts longer than {limit} tokens")
        training["titles_dropped_from_prompts"] = n_dropped
    timing = {"seconds": round(result.seconds, 1), "wall_seconds": round(time.time() - started, 1)}
    if processes.is_first() and going_on and _is_saved(out, going_on, result.steps_done):
        _write_record(out, going_on)  # the log has other times where steps were taken again
    elif processes.is_first():
        _finish(out, recommender, record | {"training": training, "timing": timing})
    return result


def _finish(out: Path, recommender: SavedRecommender, record: dict[str, Any]) -> None:
    """Write what a training gave, unless it was interrupted, and how it ended."""
    stopped = record["training"]["stopped"]
    status = "trained" if stopped in BY_ITSELF else "stopped"
    if stopped == "interrupted":
        status = "interrupted"
    else:
        recommender.save_pretrained(out)
    for name in ("metrics.json", CARD):  # they speak of other weights
        (out / name).unlink(missing_ok=True)
    _write_record(out, record | {"status": status})
    if status != "interrupted":
        remove(out / BEFORE)


def _begin(recipe: Recipe, out: Path, record: dict[str, Any]) -> None:
    """Make a folder that of a run which has just started; an ended one goes into its folder ``before``.

    A run that is ``starting`` has nothing yet that could be gone on with.
    """
    if _has_ended(out):
        with atomic_folder(out / BEFORE) as folder:
            for file in file_names(out):
                if not file.startswith(("checkpoint-", f"{BEST}/", f"{BEFORE}/")):
                    (folder / file).parent.mkdir(parents=True, exist_ok=True)
                    link(out / file, folder / file)
    text = dump_recipe(recipe)  # refused before anything is removed
    write_json(out / "run.json", record | {"status": "starting"}, sealed=True)
    for name in (MANIFEST, "metrics.json", CARD, IDENTIFIER):
        (out / name).unlink(missing_ok=True)
    resume_point(out, resume=False)  # what an earlier run left is removed
    write_text(out / RECIPE, text)
    _write_record(out, record | {"status": "training"})


def _has_ended(out: Path) -> bool:
    """Whether there is a run that has ended and is worth to be kept."""
    try:
        open_run(out)
    except UserError:
        return False
    return (out / MANIFEST).is_file()


def _write_record(out: Path, record: dict[str, Any]) -> None:
    """Write ``run.json`` with the hashes of what belongs to it: of the log, of what there is of it by now."""
    files = {name: sha256_file(out / name) for name in (RECIPE, MANIFEST) if (out / name).is_file()}
    log = out / LOG
    known = {"bytes": log.stat().st_size, "sha256": sha256_file(log)} if log.is_file() else None
    write_json(out / "run.json", record | {"files": files, "log": known}, sealed=True)


def _is_saved(out: Path, record: dict[str, Any], steps: int) -> bool:
    """Whether a run that was gone on with had ended at this step, and what it left is whole."""
    if record["status"] != "trained" or record["training"]["steps"] != steps:
        return False
    try:
        read_record(out)
        check_saved(out)
    except UserError as error:
        note(f"{error}; written again")
        return False
    return True


def changed_evaluation(
    run: Path, changes: Iterable[str] = (), *, split: str | None = None, search: str | None = None
) -> EvaluationSettings:
    """``[evaluation]`` of a run's recipe with ``evaluation.key=value`` changes.

    Args:
        run: The run folder.
        changes: As `triewise.load_recipe` takes them.
        split: Another split; None: the recipe's.
        search: Another search, which is then not chosen; None: the recipe's.

    Raises:
        UserError: No run folder, or a change of something else than the evaluation.
    """
    open_run(run)
    changes = list(changes)
    wrong = [change for change in changes if not change.strip().startswith("evaluation.")]
    if wrong:
        raise UserError(
            f"wanted --set evaluation.KEY=VALUE, got {wrong[0]!r}: the rest was fixed when the run was trained"
        )
    if search is not None:
        changes[:0] = [f"evaluation.search={search}", "evaluation.choose=[]"]
    if split is not None:
        changes.insert(0, f"evaluation.split={split}")
    return run_recipe(run, changes).evaluation


def evaluate_run(
    run: Path | str,
    changes: EvaluationSettings | None = None,
    *,
    name: str | None = None,
    trust_remote_code: bool = False,
) -> Evaluation:
    """Evaluate a trained run; writes metrics, predictions and a model card (``README.md``) into its folder.

    Args:
        run: The run folder.
        changes: Settings to use instead of the recipe's.
        name: Name of the row; default the title of the recipe.
        trust_remote_code: Execute code that comes with its language model; the run's word is not taken for it.
    """
    open_run(run := Path(run))
    with one_writer(run):
        return _evaluate_run(run, changes, name, trust_remote_code)


def _evaluate_run(
    run: Path, changes: EvaluationSettings | None, name: str | None, trust_remote_code: bool
) -> Evaluation:
    recipe, record = open_run(run)
    settings = changes or recipe.evaluation
    if settings.split == "valid" and recipe.training.rows != "train":
        raise UserError(f"{run} was trained on the validation rows; evaluate it with --split test")
    dataset, recommender, weights = recommender_of(run, settings, trust_remote_code)
    split = first_rows(dataset.test if settings.split == "test" else dataset.valid, settings.users)
    allow = _allowed(settings, recommender)
    name, chosen, valid = name or recipe.title or recipe.name, None, first_rows(dataset.valid, settings.users)
    if settings.choose:
        settings, chosen = choose_search(recommender, valid, settings, allow)
        recommender = recommender.configured(settings)
        gamma = f", gamma {settings.gamma:g}" if settings.search == "grounding" else ""
        name += f" ({settings.search}{gamma})"
    judge = functools.partial(
        evaluate,
        split=split,
        name=name,
        split_name=settings.split,
        k=settings.k,
        exclude=settings.exclude,
        allow=allow,
        facts={
            **recommender.used,
            "allow": None if settings.allow is None else str(settings.allow),
            **({"chosen": chosen} if chosen else {}),
            **({"chosen_weight": weights} if weights else {}),
            "seed": recipe.seed,
        },
        train_targets=recommender.counts,
        train_interactions=dataset.train_interactions,
        seed=recipe.seed,
    )
    beams = settings.beams if recommender.used.get("search") == "beam" else None
    evaluation = judge(recommender, depth=recommender.depth(settings.k), watch=beams)
    _search_otherwise(recommender, settings, judge, evaluation)
    _say_dropped(recommender, evaluation.metrics)
    known = {"data": dataset.info, "run": record, "metrics": evaluation.metrics}
    ranked = recipe.model_copy(update={"evaluation": settings})
    card = card_facts(recommender, recipe.title or recipe.name, recipe=ranked, **known)
    shown = run.resolve().name if run.is_absolute() else run.as_posix()  # no path of this machine
    of = {MANIFEST: sha256_file(run / MANIFEST)}
    evaluation.save(run, of=of, beside={CARD: model_card(card, shown)})
    return evaluation


def _search_otherwise(
    recommender: SavedRecommender,
    settings: EvaluationSettings,
    judge: Callable[..., Evaluation],
    evaluation: Evaluation,
) -> None:
    """Into the metrics: what beams find and how often they drop the true title, and what the exact search finds."""
    metrics, name = evaluation.metrics, f"pruned@{settings.beams}"
    if settings.pruned and name not in metrics:
        searching = recommender.with_settings(search="beam")
        found = judge(searching, depth=searching.depth(settings.k), watch=settings.beams).metrics
        metrics |= {name: found[name], "beam": {shown: found[shown] for shown in (*SHOWN, "counters")}}
    if settings.against_exact:
        searching = recommender.with_settings(search="exact")
        exact = judge(searching, depth=searching.depth(settings.k))
        metrics["against_exact"] = _against(evaluation, exact)


def _say_dropped(recommender: SavedRecommender, metrics: dict[str, Any]) -> None:
    """Titles that prompts had no room for, in ``metrics.json`` and on stderr."""
    dropped = recommender.dropped
    if dropped is None:
        return
    metrics["titles_dropped_from_prompts"] = dropped.titles
    if dropped.titles:
        note(
            f"{dropped.titles} titles dropped from {dropped.prompts} prompts longer than {dropped.limit} tokens"
        )


def _allowed(settings: EvaluationSettings, recommender: SavedRecommender) -> Items | None:
    """The items that settings allow; None: all."""
    return None if settings.allow is None else allowed_items(settings.allow, recommender.catalog)


def recommender_of(
    run: Path, settings: EvaluationSettings, trust: bool = False
) -> tuple[Dataset, SavedRecommender, dict[str, Any] | None]:
    """Data of a run, its recommender as settings say with its assistant, and how the weight of that was chosen.

    Raises:
        UserError: Data or recommender are not what was trained, the assistant does not fit, or one of them asks to
            run code that comes with it and ``trust`` is not given.
    """
    recipe, record = open_run(run)
    dataset = trained_data(run, record)
    consented(recipe, trust, run)
    recommender = load(run, merge_adapter=settings.merge_adapter, assistant=False, trust_remote_code=trust)
    for part, value in recommender.hashes.items():
        if record["hashes"].get(part, value) != value:
            raise UserError(
                f"the {part} of the recommender in {run} is not the one of its training (hash {value[:12]}, run.json "
                f"says {record['hashes'][part][:12]}); restore its files, or train again"
            )
    valid = first_rows(dataset.valid, settings.users)
    ranks = recommender.configured(settings)
    return dataset, *_assisted(ranks, settings, valid, _allowed(settings, recommender), trust)


def _assisted(
    recommender: SavedRecommender,
    settings: EvaluationSettings,
    valid: Split,
    allow: Items | None,
    trust: bool,
) -> tuple[SavedRecommender, dict[str, Any] | None]:
    """The recommender with the assistant of the settings, and how its weight was chosen, where it was."""
    place, weight = settings.assistant, settings.assistant_weight
    if place is None:
        return recommender, None
    recipe = open_run(place)[0]
    weighs = {settings.search, *settings.choose} != {"grounding"}  # which has gamma
    looks = settings.split == "valid" or settings.choose or (weight == "choose" and weighs)
    if looks and recipe.training.rows != "train":
        raise UserError(
            f"the assistant {place} was trained on the validation rows, which are looked at here; give one trained on "
            "train, or a number as assistant_weight"
        )
    helper = load(place, assistant=False, trust_remote_code=consented(recipe, trust, place))
    start = 0.5 if weight == "choose" else weight
    recommender = recommender.with_settings(assistant=helper, assistant_weight=start)
    if weight != "choose" or not weighs:
        return recommender, None
    best, tried = choose_weight(recommender, valid, settings.exclude, allow)
    return recommender.with_settings(assistant_weight=best), tried


def _against(evaluation: Evaluation, exact: Evaluation) -> dict[str, Any]:
    """How often a search gave the exact best k, and which share of them it missed."""
    missed = (exact.items[:, :, None] != evaluation.items[:, None, :]).all(2) & (exact.items >= 0)
    return {
        "users_with_all": int((~missed.any(1)).sum()),
        "missed_share": round(float(missed.sum() / max(int((exact.items >= 0).sum()), 1)), 6),
        "metrics": {name: exact.metrics[name] for name in SHOWN},
        "counters": exact.metrics["counters"],
    }


def validator(
    recipe: Recipe, dataset: Dataset, recommender: SavedRecommender
) -> Callable[[Any], dict[str, float]]:
    """Metrics of the model as it is now on rows of the validation split, drawn once."""
    n_rows = dataset.valid.n_rows
    if n_rows == 0:
        raise UserError("training.evaluate_every > 0 needs validation rows, and this data set has none")
    drawn = np.random.default_rng(recipe.seed).permutation(n_rows)[: recipe.training.valid_users]
    split = dataset.valid.take(np.sort(drawn))
    path = recipe.evaluation.allow
    allow = None if path is None else allowed_items(path, dataset.catalog)

    def validate(model: Any) -> dict[str, float]:
        result = evaluate(
            recommender,
            split,
            name="validation",
            split_name="valid",
            depth=recommender.depth(recipe.evaluation.k),
            exclude=recipe.evaluation.exclude,
            allow=allow,
        )
        return {name: value for name, value in result.metrics.items() if "@" in name}

    return validate


def _check_folder(recipe: Recipe, out: Path, resume: bool, overwrite: bool) -> dict[str, Any] | None:
    """What ``run.json`` says of the run to go on with, or None for a new one; changes nothing."""
    if not (out / "run.json").is_file():
        foreign = strangers(out)
        if set(foreign) - {RECIPE, LOG}:
            raise UserError(
                f"wanted a new or empty folder for the run, but {out} holds {foreign[0]}; choose another --out"
            )
        return None
    if overwrite:
        return None
    record = read_record(out, ())
    if record.get("status") == "starting":
        return None
    if not resume:
        raise UserError(f"{out} already holds a run; choose another --out, or add --resume or --overwrite")
    read_record(out, (RECIPE,))
    if _settled(run_recipe(out)) != _settled(recipe):
        raise UserError(f"{out} was started with another recipe; resume with {out / 'recipe.toml'}")
    found: dict[str, Any] = read_json(
        out / "run.json", EndedRun if record.get("status") == "trained" else StartedRun
    )
    return found


def _settled(recipe: Recipe) -> dict[str, Any]:
    """What may not change when a run goes on; how often it reports and when it stops may."""
    return recipe.model_dump(exclude={"training": MAY_CHANGE, "evaluation": True, "title": True})


def _record(recipe: Recipe, out: Path, dataset: Dataset, learner: Learner) -> dict[str, Any]:
    """What ``run.json`` says before training starts."""
    import torch

    return {
        "format": 1,
        "name": recipe.name,
        "seed": recipe.seed,
        "command": shlex.join(["triewise", *sys.argv[1:]]),
        "versions": versions(),
        "commit": commit_of_source(),
        "processes": processes.count(),
        **({"sharding": "FSDP2"} if processes.sharded() else {}),
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        "data": {
            "folder": str(dataset.folder.resolve()),
            "relative": way(out, dataset.folder),
            "source": dataset.info["source"],
        },
        **learner.facts,
        "hashes": {"data": data_hash(dataset), **learner.facts["hashes"]},
    }
