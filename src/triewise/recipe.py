"""Recipes: strict TOML files to validated settings.

A published method is a recipe file; its keys are listed in `triewise.settings`. An unknown key is an error that names
the nearest known one. ``--set a.b=value`` changes one key.
"""

from __future__ import annotations

import difflib
import re
import reprlib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import (
    BaseModel,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from triewise.errors import UserError
from triewise.objectives import ObjectiveSettings
from triewise.settings import (
    BackboneSettings,
    DataSettings,
    DistilSettings,
    EvaluationSettings,
    ExampleSettings,
    HybridSettings,
    IdentifierSettings,
    Section,
    SequentialSettings,
    TrainingSettings,
)

# What runs did before a key existed whose default is another one.
_BEFORE = {"evaluation": {"gain_over": "all"}}

_TAGS = ("dllm2rec", "llm-cf")  # kinds that pydantic names in the place of a problem

# What only a language model has a use for; the values that change nothing.
OF_LANGUAGE_MODELS = {
    "training": ("log_parts", "order", "packing", "gradient_checkpointing", "workers", "freeze"),
    "evaluation": (
        *("search", "choose", "support", "length_penalty", "alpha", "measure", "scope"),
        *("gamma", "against_exact", "pruned", "merge_adapter"),
    ),
}


class Recipe(Section):
    """One run: data, backbone, objective, training, evaluation, seed; or [sequential] for backbone and objective."""

    name: str
    title: str = ""
    seed: int = Field(0, ge=0, le=2**32 - 1)
    data: DataSettings
    backbone: BackboneSettings = BackboneSettings()
    identifier: IdentifierSettings = IdentifierSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    hybrid: HybridSettings | None = None
    sequential: SequentialSettings | None = None
    enhance: DistilSettings | ExampleSettings | None = Field(None, discriminator="kind")
    training: TrainingSettings = TrainingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()

    @property
    def template(self) -> str:
        """Prompt template: what the recipe says, else ``plain`` for models trained from scratch, ``msl`` otherwise."""
        return self.backbone.template or ("plain" if self.backbone.name == "tiny" else "msl")

    def changed(self, *changes: str) -> Recipe:
        """This recipe with ``a.b=value`` changes, validated; see `load_recipe`."""
        return parse_recipe(self.model_dump(mode="json", exclude_none=True), self.name, changes)

    def value_of(self, key: str) -> Any:
        """What it has for a key with dots, as a JSON value; None where it leaves that open."""
        value: Any = self.model_dump(mode="json")
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    @model_serializer(mode="wrap")
    def _without_unused(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        if self.sequential is not None:
            for name in ("backbone", "identifier", "objective", "hybrid"):
                values.pop(name, None)
        return values

    @model_validator(mode="after")
    def _named(self) -> Recipe:
        if not re.fullmatch(r"(?!\.)[\w.-]{1,60}", self.name):
            raise ValueError(
                "name must be at most 60 letters, digits, '.', '_' and '-', no '.' first, since run folders are called "
                f"so, got {_shown(self.name)}"
            )
        return self

    @model_validator(mode="after")
    def _sequential_alone(self) -> Recipe:
        if self.sequential is None:
            return self
        unused: list[str] = [
            name for name in ("backbone", "identifier", "objective") if name in self.model_fields_set
        ]
        unused += ["hybrid"] * (self.hybrid is not None)
        for section, keys in OF_LANGUAGE_MODELS.items():
            chosen, default = getattr(self, section), type(getattr(self, section))()
            unused += [f"{section}.{key}" for key in keys if getattr(chosen, key) != getattr(default, key)]
        if unused:
            raise ValueError(f"[sequential] has no use for {unused[0]}; leave it out")
        if self.sequential.half_life_days is not None and self.training.supervision != "last":
            raise ValueError("sequential.half_life_days needs training.supervision = 'last'")
        return self

    @model_validator(mode="after")
    def _enhanced(self) -> Recipe:
        if self.enhance is None:
            return self
        if self.sequential is None or self.sequential.loss == "cloze":
            raise ValueError(
                "[enhance] needs a [sequential] encoder that reads forwards: gru4rec, sasrec, esasrec or lrurec"
            )
        for key, wanted in (("supervision", "last"), ("rows", "train")):
            if getattr(self.training, key) != wanted:
                raise ValueError(
                    f"[enhance] is about the rows of train, one target each; set training.{key} = {wanted!r}"
                )
        if isinstance(self.enhance, ExampleSettings) and self.sequential.width % (2 * self.enhance.heads):
            raise ValueError(
                f"sequential.width must be a multiple of twice enhance.heads, got {self.sequential.width} and "
                f"{self.enhance.heads}"
            )
        return self

    @model_validator(mode="after")
    def _coded(self) -> Recipe:
        if self.identifier.kind == "title":
            return self
        if self.hybrid is not None:
            raise ValueError("[hybrid] puts item vectors behind titles; set identifier.kind = 'title'")
        if "grounding" in (self.evaluation.search, *self.evaluation.choose):
            raise ValueError("grounding compares free texts with titles; set identifier.kind = 'title'")
        return self

    @model_validator(mode="after")
    def _whole(self) -> Recipe:
        if self.training.freeze and (self.hybrid is not None or self.identifier.kind != "title"):
            raise ValueError("item vectors and codes are learned below all layers: set training.freeze = 0")
        grows = self.training.supervision == "every"
        if grows and self.hybrid is not None and self.template != "plain":
            raise ValueError("[hybrid] with training.supervision = 'every' needs backbone.template = 'plain'")
        if self.training.supervision == "every" and self.objective.preference.negatives:
            raise ValueError("objective.preference.negatives > 0 needs training.supervision = 'last'")
        users = self.hybrid is not None and self.hybrid.kind == "a-llmrec"
        if users and self.training.supervision == "every":
            raise ValueError("hybrid.kind = 'a-llmrec' needs training.supervision = 'last'")
        if self.hybrid is not None and self.hybrid.frozen and self.backbone.lora.rank:
            raise ValueError(
                "hybrid.frozen = true trains no adapter: set backbone.lora.rank = 0 and quantisation = 'none'"
            )
        course = 0.0 if self.hybrid is None else self.hybrid.share_of_curriculum
        if self.hybrid is not None and self.hybrid.frozen and course:
            raise ValueError("hybrid.frozen = true learns nothing from text alone: set hybrid.curriculum = 0")
        if course and self.objective.preference.negatives:
            raise ValueError("the reference of S-DPO always reads item vectors: set hybrid.curriculum = 0")
        for name in ("soft_targets", "flow"):
            if getattr(self.objective, name) is not None and self.training.workers:
                raise ValueError(
                    f"objective.{name} asks a model in the process that trains: set training.workers = 0"
                )
        if self.objective.contrast.without_history == "unknown" and (self.template == "plain" or grows):
            raise ValueError(
                "objective.contrast.without_history = 'unknown' needs backbone.template = 'msl' or 'd3' and "
                "training.supervision = 'last'"
            )
        if self.training.rows == "train+valid" and self.training.evaluate_every:
            raise ValueError(
                "training.rows = 'train+valid' trains on the validation rows; set training.evaluate_every = 0"
            )
        weighs = self.evaluation.assistant is not None and self.evaluation.assistant_weight == "choose"
        if self.training.rows == "train+valid" and (self.evaluation.choose or weighs):
            key, kept = ("assistant_weight", "its number") if weighs else ("choose", "evaluation.search")
            raise ValueError(
                f"evaluation.{key} looks at the validation rows, on which training.rows = 'train+valid' trains; "
                f"choose with training.rows = 'train' and set {kept}"
            )
        if self.training.rows == "train+valid" and self.evaluation.split == "valid":
            raise ValueError(
                "training.rows = 'train+valid' trains on the validation rows; set evaluation.split = 'test'"
            )
        return self


def recipe_folder() -> Path:
    """Where the recipes that come with triewise are."""
    packaged = Path(__file__).parent / "recipes"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "recipes"


def load_recipe(path: str | Path, changes: Iterable[str] = ()) -> Recipe:
    """Read a recipe and apply ``a.b=value`` changes.

    Args:
        path: A TOML file, or the name of a recipe that comes with triewise (``demo/msl``).
        changes: ``key=value`` with dots in the key; the value is TOML, or a bare word for a string.

    Raises:
        UserError: No such file, not TOML, an unknown key (with the nearest known one), a value out of range.
    """
    file = Path(path)
    if not file.is_file():
        file = recipe_folder() / f"{path}.toml"
    if not file.is_file():
        known = sorted(
            f.relative_to(recipe_folder()).with_suffix("").as_posix() for f in recipe_folder().rglob("*.toml")
        )
        raise UserError(
            f"wanted a recipe file or one of {', '.join(known)}, got {str(path)!r}; check the path"
        )
    return parse_recipe(read_toml(file), str(file), changes)


def run_recipe(run: Path, changes: Iterable[str] = ()) -> Recipe:
    """The recipe in a run folder; a key that did not exist when the run was made has what was done then.

    Arguments and errors as `load_recipe`.
    """
    file = run / "recipe.toml"
    values = read_toml(file)
    for section, before in _BEFORE.items():
        if isinstance(given := values.get(section, {}), dict):
            values[section] = before | given
    return parse_recipe(values, str(file), changes)


def read_toml(file: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        UserError: It is none.
    """
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits, and lists in lists
        raise UserError(f"wanted UTF-8 TOML in {file}, got: {error}") from None


def parse_recipe(values: dict[str, Any], where: str, changes: Iterable[str] = ()) -> Recipe:
    """Apply changes to a recipe's values, and validate them; ``where`` is named in errors."""
    for change in changes:
        _apply(values, change)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: {_first_problem(error)}") from None


def dump_recipe(recipe: Recipe) -> str:
    """TOML text of a recipe with every key spelled out.

    Raises:
        UserError: The text would be read as another recipe.
    """
    lines: list[str] = []
    _dump(recipe.model_dump(mode="json", exclude_none=True), "", lines)
    text = "\n".join(lines).lstrip("\n") + "\n"
    try:
        same = Recipe.model_validate(tomllib.loads(text)) == recipe
    except ValueError:
        same = False
    if not same:
        raise UserError(
            f"the recipe {recipe.name} would not be read as it is written; leave out its unusual characters and numbers"
        )
    return text


def _dump(table: Mapping[str, Any], prefix: str, lines: list[str]) -> None:
    lines.extend(f"{key} = {_toml(value)}" for key, value in table.items() if not isinstance(value, dict))
    for key, value in table.items():
        if isinstance(value, dict):
            lines.append(f"\n[{prefix}{key}]")
            _dump(value, f"{prefix}{key}.", lines)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if isinstance(value, str):
        escaped = "".join(
            f"\\u{ord(c):04x}" if ord(c) < 32 or c == "\x7f" else "\\" + c if c in '"\\' else c for c in value
        )
        return f'"{escaped}"'
    return repr(value)


def _apply(values: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    if not equals or not key.strip():
        raise UserError(f"wanted --set key=value such as training.steps=100, got {_shown(change)}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
        if isinstance(value, int) and value.bit_length() > 64:  # hexadecimal, which Python will not print
            value = text
    except ValueError:
        value = text
    except RecursionError:
        raise UserError(
            f"wanted a value in --set, got lists in lists: {_shown(change)}; give a plain one"
        ) from None
    *tables, last = key.strip().split(".")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise UserError(
                f"wanted a key such as training.steps in --set, got {_shown(change)}: {table} is not a table"
            )
    values[last] = value


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    # A value of several types is reported once a type, with the type as the last part of its place.
    known = _keys(Recipe)
    key = ".".join(str(part) for part in problem["loc"] if part not in _TAGS)
    if problem["type"].startswith("union_tag"):
        context, key = problem["ctx"], f"{key}.kind"
        if "tag" in context:
            return f"{key}: Input should be one of {context['expected_tags']}, got {_shown(context['tag'])}"
        problem["type"] = "missing"
    if problem["type"] != "extra_forbidden":
        key = max((name for name in known if f"{key}.".startswith(f"{name}.")), key=len, default=key)
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.3)
        return f"unknown key {_shown(key)}" + (f"; did you mean {near[0]!r}?" if near else "")
    if problem["type"] == "missing":
        return f"the key {_shown(key)} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key or 'recipe'}: {message}" + (
        "" if ", got " in message or not key else f", got {_shown(problem['input'])}"
    )


def _shown(value: Any) -> str:
    """The ``repr`` of what came, cut where it would fill the screen."""
    short = reprlib.Repr()
    short.maxstring, short.maxother, short.maxlong, short.maxdict, short.maxlist = 200, 200, 60, 60, 20
    try:
        return short.repr(value)
    except ValueError:  # Python writes no number of thousands of digits
        return "a number of thousands of digits"


def _keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, info in section.model_fields.items():
        keys.append(prefix + name)
        for kind in (info.annotation, *get_args(info.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                keys.extend(_keys(kind, f"{prefix}{name}."))
    return keys
