"""What `triewise tune` may change: keys of a recipe with their ranges or choices, in one step or several."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triewise.errors import UserError
from triewise.recipe import Recipe, read_toml

# What decides on which rows a trial is learned and measured, and by what: of all trials it is the same.
_THE_SAME = (
    *("name", "title", "seed", "data", "training.rows", "training.sample", "training.valid_users"),
    *("training.metric", "training.report_to", "training.time_limit_s", "evaluation.split"),
    *("evaluation.k", "evaluation.users", "evaluation.exclude", "evaluation.allow", "evaluation.choose"),
    "identifier.collisions",
)
_OF_A_RANGE = {"low", "high", "log", "step"}
MOST_AT_ONCE = 1000  # combinations that are counted


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, both included; whole ones where all that is given is.

    Attributes:
        low: The smallest.
        high: The largest.
        log: Whether they are drawn evenly on a logarithmic scale.
        step: Between two of them; None: any.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def whole(self) -> bool:
        """Whether only whole numbers are drawn."""
        return all(isinstance(number, int) for number in (self.low, self.high, self.step or 0))

    def ends(self) -> list[Any]:
        """Values that stand for all, to be tried on the recipe."""
        return [self.low, self.high]

    def holds(self, value: Any) -> bool:
        """Whether it may be drawn."""
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        steps = 0.0 if self.step is None else (value - self.low) / self.step
        return self.low <= value <= self.high and abs(steps - round(steps)) < 1e-8  # as Optuna has it

    def draw(self, trial: Any, key: str) -> Any:
        """One of them, as a trial of Optuna suggests."""
        if self.whole:
            step = {} if self.step is None else {"step": int(self.step)}
            return trial.suggest_int(key, int(self.low), int(self.high), log=self.log, **step)
        return trial.suggest_float(key, self.low, self.high, log=self.log, step=self.step)


@dataclass(frozen=True)
class Choices:
    """One of some values, in JSON."""

    values: tuple[str, ...]

    def ends(self) -> list[Any]:
        """All of them."""
        return [json.loads(value) for value in self.values]

    def holds(self, value: Any) -> bool:
        """Whether it is among them."""
        return value in self.ends()

    def draw(self, trial: Any, key: str) -> Any:
        """One of them, as a trial of Optuna suggests."""
        return json.loads(trial.suggest_categorical(key, list(self.values)))


@dataclass(frozen=True)
class Step:
    """Keys that are chosen together, after those of the steps before.

    Attributes:
        name: Of its trials' folders.
        axes: What each key may be.
        trials: How many are made; None: as many as the call says.
    """

    name: str
    axes: Mapping[str, Range | Choices]
    trials: int | None

    @property
    def decoding(self) -> bool:
        """Whether it changes nothing that is trained."""
        return all(key.startswith("evaluation.") for key in self.axes)

    def all_of_them(self, most: int) -> list[dict[str, str]] | None:
        """Every combination of choices as Optuna is told of it; None where there are ranges, or more than ``most``."""
        values = [axis.values for axis in self.axes.values() if isinstance(axis, Choices)]
        if len(values) < len(self.axes):
            return None
        all_ = list(itertools.islice(itertools.product(*values), most + 1))
        return [dict(zip(self.axes, row, strict=True)) for row in all_] if len(all_) <= most else None

    def as_optuna(self, values: Mapping[str, Any]) -> dict[str, Any] | None:
        """Values of all keys as Optuna is told of them; None where one of them cannot be drawn."""
        if not all(axis.holds(values.get(key)) for key, axis in self.axes.items()):
            return None
        return {
            key: json.dumps(values[key]) if isinstance(axis, Choices) else values[key]
            for key, axis in self.axes.items()
        }


def changes_of(values: Mapping[str, Any]) -> list[str]:
    """Values as ``--set`` takes them: what JSON writes of them is TOML too."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def read_space(file: Path, recipe: Recipe) -> list[Step]:
    """The steps of a file, each value tried on the recipe.

    Args:
        file: TOML with ``[[step]]`` tables (``name``, ``trials``, ``space``), or one table ``[space]``.
        recipe: What is tuned.

    Raises:
        UserError: Another file, an unknown key, a value that the recipe refuses, or a key that all trials share.
    """
    table = read_toml(file)
    given = table.get("step", [{"name": "all", "space": table["space"]}] if "space" in table else [])
    extra = set(table) - ({"step"} if "step" in table else {"space"})
    if not (isinstance(given, list) and given) or extra:
        raise UserError(
            f"wanted [[step]] tables or one [space] in {file}, got {sorted(table)}; see docs/tuning.md"
        )
    steps = [_step(file, number, each) for number, each in enumerate(given, 1)]
    names = [step.name for step in steps]
    if len(set(names)) < len(names):
        raise UserError(f"wanted steps of different names in {file}, got {', '.join(names)}; rename one")
    # Where titles of equal codes are ranked as one, the coarsest codes would hit most.
    the_same = (*_THE_SAME, "identifier") if recipe.identifier.collisions == "group" else _THE_SAME
    for step in steps:
        for key, axis in step.axes.items():
            if any(f"{key}.".startswith(f"{same}.") for same in the_same):
                raise UserError(
                    f"{file}: {key} decides what a trial is learned from or measured by, and has to be the same for "
                    "all; leave it out of the space"
                )
            for value in axis.ends():
                try:
                    recipe.changed(*changes_of({key: value}))
                except UserError as error:
                    raise UserError(f"{file}: {error}") from None
    return steps


def _step(file: Path, number: int, given: Any) -> Step:
    values = given if isinstance(given, dict) else {}
    name, trials, space = values.get("name", f"step-{number}"), values.get("trials"), values.get("space")
    axes = dict(_axes(file, space)) if isinstance(space, dict) else {}
    sound = isinstance(name, str) and name.replace("-", "").isalnum() and axes
    counted = trials is None or (type(trials) is int and trials > 0)
    if not (sound and counted and set(values) <= {"name", "trials", "space"}):
        raise UserError(
            f"wanted a step with a name of letters and digits, its space and, if at all, trials > 0 in {file}, got "
            f"{values or given}"
        )
    return Step(str(name), axes, trials)


def _axes(file: Path, table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Range | Choices]]:
    """Axes of a table whose keys have dots, or are tables themselves."""
    for name, value in table.items():
        key = prefix + name
        if isinstance(value, dict) and not set(value) & _OF_A_RANGE:
            yield from _axes(file, value, f"{key}.")
        elif isinstance(value, list) and value:
            yield key, Choices(tuple(dict.fromkeys(json.dumps(one, default=str) for one in value)))
        else:
            yield key, _range(file, key, value)


def _range(file: Path, key: str, value: Any) -> Range:
    wrong = UserError(
        f"wanted a list of choices or {{ low, high }} with log or step for {key} in {file}, got {value!r}"
    )
    if not isinstance(value, dict) or not {"low", "high"} <= set(value) <= _OF_A_RANGE:
        raise wrong
    made = Range(**value)
    numbers = [made.low, made.high, *([] if made.step is None else [made.step])]
    if any(type(number) not in (int, float) for number in numbers) or type(made.log) is not bool:
        raise wrong
    if (
        not made.low < made.high
        or (made.log and (made.low <= 0 or made.step is not None))
        or min(numbers[2:], default=1) <= 0
    ):
        raise wrong
    return made
