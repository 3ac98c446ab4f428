"""Settings chosen on validation rows: many short trainings, the best recipe, and a page about them.

A folder holds one study: ``recipe.toml`` and ``space.toml`` as they were given, ``study.db`` (Optuna's, SQLite),
``trials/`` with a run folder each, ``trials.html`` and ``best.toml``. A trial is claimed by the lock of its folder,
which the kernel takes back from a process that is killed: another call, or one beside it, then goes on from its
checkpoint. Test rows are never looked at.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triewise.app.folders import open_data
from triewise.app.runs import RECIPE, recommender_of, train_run, validator
from triewise.app.space import Range, Step, changes_of, read_space
from triewise.errors import Diverged, UserError
from triewise.files import write_text
from triewise.locks import Busy, one_writer
from triewise.progress import note
from triewise.recipe import Recipe, dump_recipe, run_recipe
from triewise.reports import StepOfTrials, TrialShown, trials_page

STUDY, SPACE, BEST_RECIPE, PAGE, BASE = "study.db", "space.toml", "best.toml", "trials.html", "base"
AS = "as"  # attribute of a trial: the one whose value it has, because it is the same recipe
POLL = 1.0  # seconds between two looks at what other processes do
_KEPT = {RECIPE, "log.jsonl", "run.json"}  # of a trial that is not the best


@dataclass(frozen=True)
class Tuned:
    """What a call came to.

    Attributes:
        out: The study's folder.
        steps: Name, metric, numbers of trials by state, and the best trial of each step.
        interrupted: Whether it was stopped before all trials were made.
    """

    out: Path
    steps: tuple[dict[str, Any], ...]
    interrupted: bool

    def as_json(self) -> dict[str, Any]:
        """As JSON values."""
        files = {"best": str(self.out / BEST_RECIPE), "page": str(self.out / PAGE)}
        return files | {"steps": list(self.steps), "interrupted": self.interrupted}


def tune(
    recipe: Recipe,
    space: Path,
    trials: int,
    out: Path | str,
    *,
    resume: bool = False,
    trust_remote_code: bool = False,
) -> Tuned:
    """Choose keys of a recipe by `training.metric` on validation rows, step after step.

    Trials of a step are drawn by TPE, or are all combinations where there are no more of them than trials, the recipe
    as it is among them. The median of the others' validations ends one that is behind. A step of ``evaluation`` keys
    alone trains nothing: it ranks with the best run of the steps before it.

    Args:
        recipe: What is tuned.
        space: What may change, see `read_space`.
        trials: Of each step that does not say; of all processes and calls together.
        out: Folder of the study.
        resume: Go on with the study that is there, also beside another process.
        trust_remote_code: As of `train_run`.

    Raises:
        UserError: No Optuna, another space or recipe than the study's, a folder that holds one, or nothing came of all
            trials of a step.
    """
    out, plan = Path(out), read_space(Path(space), recipe)
    study = _Study(_optuna(), recipe, plan, trials, out, trust_remote_code)
    with one_writer(out, wait=True):
        study.begin(Path(space), resume)
    interrupted = False
    for step in plan:
        interrupted = not study.take(step)
        if interrupted:
            break
    return Tuned(out, tuple(study.facts()), interrupted)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise UserError("triewise tune needs Optuna; run: pip install 'triewise[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


class _Study:
    """The trials of all steps, and what has been chosen so far."""

    def __init__(
        self, optuna: Any, recipe: Recipe, plan: list[Step], trials: int, out: Path, trust: bool
    ) -> None:
        self.optuna, self.plan, self.trials, self.out, self.trust = optuna, plan, trials, out, trust
        self.start = self.recipe = recipe
        self.run: Path | None = None  # the best of the last step that trained
        self.metric = recipe.training.metric
        self.studies: dict[str, Any] = {}

    def begin(self, space: Path, resume: bool) -> None:
        """Make the folder's files, or compare them with what is given."""
        from sqlalchemy.engine import URL

        if (self.out / "run.json").is_file():
            raise UserError(
                f"{self.out} holds a run, whose recipe a study would replace; choose another --out"
            )
        given = {RECIPE: dump_recipe(self.start), SPACE: space.read_text(encoding="utf-8")}
        if (self.out / STUDY).is_file():
            if not resume:
                raise UserError(f"{self.out} already holds a study; choose another --out, or add --resume")
            theirs = {
                RECIPE: dump_recipe(run_recipe(self.out)),  # an older version wrote fewer keys
                SPACE: (self.out / SPACE).read_text(encoding="utf-8"),
            }
            for name, text in given.items():
                if theirs[name] != text:
                    raise UserError(
                        f"the study in {self.out} has another {name} than this call; give the same, or choose another "
                        "--out"
                    )
        for name, text in given.items():
            write_text(self.out / name, text)
        open_data(self.start)  # prepared by one process, where it is absent
        url = URL.create("sqlite", database=str((self.out / STUDY).resolve())).render_as_string()
        # Several processes write a few lines a trial; who comes second waits.
        storage = self.optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 120}})
        pruner = self.optuna.pruners.MedianPruner()
        for step in self.plan:
            how = {"storage": storage, "pruner": pruner, "direction": "maximize", "load_if_exists": True}
            study = self.studies[step.name] = self.optuna.create_study(study_name=step.name, **how)
            if not study.get_trials(deepcopy=False):
                self._enqueue(step, study)

    def _enqueue(self, step: Step, study: Any) -> None:
        """What is tried first: all combinations where they are few enough, else the recipe as it is."""
        own = step.as_optuna({key: self.start.value_of(key) for key in step.axes})
        rows = step.all_of_them(self.wanted(step)) or []
        for row in ([own] if own else []) + [row for row in rows if row != own]:
            study.enqueue_trial(row)

    def wanted(self, step: Step) -> int:
        """How many trials a step has; no more than there are combinations."""
        n = step.trials or self.trials
        all_ = step.all_of_them(n)
        return n if all_ is None else len(all_)

    def take(self, step: Step) -> bool:
        """Make the trials that are left of a step, or wait for those who do; False: interrupted."""
        if step.decoding and self.run is None and not self._train_base():
            return False
        study = self.studies[step.name]
        while True:
            with contextlib.ExitStack() as held:
                with one_writer(self.out, wait=True):
                    claimed = self._claim(step, held)
                if claimed is None:
                    if not self._running(study):
                        break
                    time.sleep(POLL)
                    continue
                trial, values = claimed
                if not self._make(step, trial, values):
                    return False
            with one_writer(self.out, wait=True):
                self._show()
        best = self._best(step)
        if best is None:
            raise UserError(
                f"no trial of the step {step.name} came to an end; correct the space in {self.out / SPACE}, and choose "
                "another --out"
            )
        self.recipe = self.recipe.changed(*changes_of(_told(step, best.params)))
        if not step.decoding:
            self.run = self.folder(step, best.number)
        with one_writer(self.out, wait=True):
            self._show()
        return True

    def folder(self, step: Step, number: int) -> Path:
        """Of a trial, whose number is from 0 with Optuna and from 1 for people."""
        return self.out / "trials" / f"{step.name}-{number + 1}"

    def _made(self, step: Step) -> list[Any]:
        """The trials of a step that were begun."""
        return [t for t in self.studies[step.name].get_trials(deepcopy=False) if t.state.name != "WAITING"]

    def _running(self, study: Any) -> list[Any]:
        running: list[Any] = [t for t in study.get_trials(deepcopy=False) if t.state.name == "RUNNING"]
        return running

    def _claim(self, step: Step, held: contextlib.ExitStack) -> tuple[Any, dict[str, Any]] | None:
        """A trial and its values: one whose process was killed, else a new one; None: none is left."""
        study = self.studies[step.name]
        for dead in self._running(study):
            if not _locked(self.folder(step, dead.number), held):
                continue  # another process makes it
            if all(t.number != dead.number for t in self._running(study)):
                continue  # it has ended since
            trial = self.optuna.trial.Trial(study, dead._trial_id)
            return trial, {key: axis.draw(trial, key) for key, axis in step.axes.items()}
        sampler = self.optuna.samplers.TPESampler
        made = self._made(step)
        if len(made) >= self.wanted(step):
            return None
        for later in self.plan[self.plan.index(step) + 1 :]:
            if self._made(later):  # another best of this step would not be what they were measured with
                note(
                    f"{step.name} stays as it is: {later.name} was begun with the best of its {len(made)} trials"
                )
                return None
        # Of its own seed, so that a resumed study draws what an uninterrupted one draws.
        study.sampler = sampler(seed=self.start.seed + len(made))
        trial = study.ask()
        held.enter_context(one_writer(self.folder(step, trial.number)))
        return trial, {key: axis.draw(trial, key) for key, axis in step.axes.items()}

    def _make(self, step: Step, trial: Any, values: dict[str, Any]) -> bool:
        """Make one trial and tell the study; False: interrupted, it stays to be gone on with."""
        study = self.studies[step.name]
        shown = ", ".join(f"{key} = {value}" for key, value in values.items())
        note(f"{step.name}, trial {trial.number + 1} of {self.wanted(step)}: {shown}")
        same = [
            t
            for t in study.get_trials(deepcopy=False)
            if t.state.name == "COMPLETE" and t.params == trial.params
        ]
        if same:
            trial.set_user_attr(AS, same[0].number)
            study.tell(trial, same[0].value)
            return True
        try:
            changed = self.recipe.changed(*changes_of(values))
        except UserError as error:
            return self._failed(step, trial, error)
        if step.decoding:
            assert self.run is not None
            study.tell(trial, self._ranked(self.run, changed))
            return True
        try:
            return self._trained(step, trial, changed)
        except UserError as error:
            # What stops every trial is no fault of this one.
            if "no space left" in str(error) or not (self._best(step) or isinstance(error, Diverged)):
                raise
            return self._failed(step, trial, error)

    def _failed(self, step: Step, trial: Any, error: UserError) -> bool:
        note(f"warning: {step.name}, trial {trial.number + 1} cannot be: {error}")
        self.studies[step.name].tell(trial, state=self.optuna.trial.TrialState.FAIL)
        with one_writer(self.out, wait=True):
            _tidy(self.folder(step, trial.number))
        return True

    def _trained(self, step: Step, trial: Any, recipe: Recipe) -> bool:
        study, folder = self.studies[step.name], self.folder(step, trial.number)
        known = dict(study.get_trials(deepcopy=False)[trial.number].intermediate_values)

        def watch(row: Mapping[str, Any]) -> str | None:
            if "valid" not in row:
                return None
            if row["step"] not in known:
                trial.report(row["valid"][self.metric], row["step"])
            return "pruned" if trial.should_prune() else None

        result = self._run(recipe, folder, watch)
        if result.stopped == "interrupted":
            return False
        if result.stopped == "pruned":
            study.tell(trial, state=self.optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, result.best_metric)
        with one_writer(self.out, wait=True):
            told = study.get_trials(
                deepcopy=False
            )  # one look at all: another process may tell the best between two
            best = self._best(step, told)
            for one in told:
                if one.state.is_finished() and (best is None or one.number != best.number):
                    _tidy(self.folder(step, one.number))
        return True

    def _run(self, recipe: Recipe, folder: Path, watch: Any = None) -> Any:
        """Train, with a validation at the end where the recipe has none."""
        if not recipe.training.evaluate_every:
            recipe = recipe.changed(f"training.evaluate_every={recipe.training.steps}")
        how = {"resume": (folder / "run.json").is_file(), "trust_remote_code": self.trust, "watch": watch}
        return train_run(recipe, folder, **how)

    def _train_base(self) -> bool:
        """A training of the recipe as it is, where the first step is about decoding; False: interrupted."""
        folder = self.out / "trials" / BASE
        while True:
            with contextlib.ExitStack() as held:
                if _locked(folder, held):
                    result = self._run(self.recipe, folder)
                    self.run = folder
                    return bool(result.stopped != "interrupted")
            time.sleep(POLL)

    def _ranked(self, run: Path, recipe: Recipe) -> float:
        """The metric of a run's model, ranked as a recipe says, on the rows that trainings are validated on."""
        settings = recipe.evaluation.model_copy(update={"split": "valid"})
        dataset, recommender, _ = recommender_of(run, settings, self.trust)
        return float(validator(recipe, dataset, recommender)(None)[self.metric])

    def _best(self, step: Step, trials: Any = None) -> Any:
        """The best trial of a step, the earliest of equal ones; None: none has ended."""
        ended = trials or self.studies[step.name].get_trials(deepcopy=False)
        complete = [t for t in ended if t.state.name == "COMPLETE" and AS not in t.user_attrs]
        return max(complete, key=lambda t: (t.value, -t.number), default=None)

    def facts(self) -> Iterator[dict[str, Any]]:
        """Of each step its trials by state, and the best one."""
        for step in self.plan:
            best, states = self._best(step), [t.state.name.lower() for t in self._made(step)]
            number = {state: states.count(state) for state in ("complete", "pruned", "fail", "running")}
            chosen = best and {"trial": best.number, "value": best.value, "values": _told(step, best.params)}
            yield {"name": step.name, "metric": self.metric, "trials": len(states), **number, "best": chosen}

    def _show(self) -> None:
        """Write the best recipe so far and the page; for who holds the lock of the folder."""
        recipe, steps = self.start, []
        users = self.start.training.valid_users
        lines = [
            f"# Chosen by triewise tune: by {self.metric} on at most {users} validation rows, never on test rows."
        ]
        for step, facts in zip(self.plan, self.facts(), strict=True):
            steps.append(self._shown(step))
            if facts["best"] is None:
                continue
            best, n = facts["best"], f"{facts['trials']} of {self.wanted(step)}"
            recipe = recipe.changed(*changes_of(best["values"]))
            said = ", ".join(changes_of(best["values"]))
            lines.append(
                f"# {step.name}: {self.metric} {best['value']:.4f}, trial {best['trial'] + 1}; {n} trials were made, "
                f"{facts['pruned']} of them ended early. {said}"
            )
        write_text(self.out / BEST_RECIPE, "\n".join(lines) + "\n" + dump_recipe(recipe))
        page = trials_page(self.start.title or self.start.name, self.metric, users, steps)
        write_text(self.out / PAGE, page)

    def _shown(self, step: Step) -> StepOfTrials:
        study, best, trials = self.studies[step.name], self._best(step), self._made(step)
        importance: dict[str, float] = {}
        values = {t.value for t in trials if t.state.name == "COMPLETE"}
        if len(step.axes) > 1 and len(values) > 1:
            how = self.optuna.importance.PedAnovaImportanceEvaluator()  # Optuna 4's own wants scikit-learn
            importance = dict(self.optuna.importance.get_param_importances(study, evaluator=how))
        rows = tuple(
            TrialShown(
                t.number + 1,
                t.state.name.lower(),
                t.value if t.state.name in ("COMPLETE", "PRUNED") else None,
                _told(step, t.params),
                tuple(sorted(t.intermediate_values.items())),
            )
            for t in trials
        )
        log = frozenset(key for key, axis in step.axes.items() if isinstance(axis, Range) and axis.log)
        return StepOfTrials(step.name, tuple(step.axes), log, rows, importance, best and best.number + 1)


def _locked(folder: Path, held: contextlib.ExitStack) -> bool:
    """Whether the lock of a folder could be had, which is held then; False: another process has it."""
    with contextlib.suppress(Busy):
        held.enter_context(one_writer(folder))
        return True
    return False


def _told(step: Step, params: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a trial, from what Optuna was told of them."""
    ranges = {key for key, axis in step.axes.items() if isinstance(axis, Range)}
    return {key: v if key in ranges else json.loads(v) for key, v in params.items()}


def _tidy(folder: Path) -> None:
    """Remove what a trial that is not the best has but its recipe and its log."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name not in _KEPT:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
