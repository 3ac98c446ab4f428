"""Every line that says what a user did wrong is in docs/errors.md, and some test provokes it."""

from __future__ import annotations

import ast
import importlib
import itertools
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import numpy as np
import pytest
import torch

import triewise
from tests.conftest import RUN
from tests.worlds import TITLES, recommender, split, write_msl_folder
from triewise.app import comparisons, evaluate_run, train_run
from triewise.app.compare import collect, read_log
from triewise.app.folders import open_data
from triewise.cli import main
from triewise.errors import UserError
from triewise.files import read_json, sha256_file, write_json
from triewise.models import load_trained, save_trained
from triewise.models.smollm2 import _read_gguf
from triewise.ranking import Evaluation, Groups, MostPopular, evaluate, load_evaluation
from triewise.recipe import Recipe, parse_recipe
from triewise.tokens import Trie

PACKAGE = Path(triewise.__file__).parent
PLACE = {
    f.stem: ".".join(f.relative_to(PACKAGE.parent).with_suffix("").parts)
    for f in PACKAGE.rglob("*.py")
    if f.stem != "__init__"
}
TABLE = Path(__file__).parents[1] / "docs" / "errors.md"
NO_ERRORS = "Lines on stderr that are no errors"
RAISED = (
    "UserError",
    "Diverged",
    "Busy",
    "ValueError",
    "KeyError",
    "_complain",
)  # `commandline._complain` prints what is not raised

# (module, wording) that no test of this process can reach, each with its reason.
OUT_OF_REACH: dict[tuple[str, str], str] = {}


# ---------------------------------------------------------------- the lines of the source
@dataclass(frozen=True)
class Place:
    """One call that makes an error; ``lines`` are its possible wordings with ``{}`` for what varies."""

    file: str
    module: str
    function: str
    first: int
    last: int
    kind: str
    lines: frozenset[str]
    draft: str

    def __str__(self) -> str:
        return f"src/{PLACE[self.file].replace('.', '/')}.py:{self.first} {self.draft}"


def canonical(line: str) -> str:
    """White space made one space, and every run of ``{...}`` made ``{}``."""
    return " ".join(re.sub(r"(\{[^{}]*\})+", "{}", line).split())


@dataclass(frozen=True)
class Reader:
    """Reads the string expressions of one module."""

    tree: ast.Module
    module: ModuleType
    seen: tuple[str, ...] = field(default=())  # functions being followed, so that recursion ends

    def wordings(self, node: ast.expr, function: ast.FunctionDef | None) -> set[str]:
        """What a string expression can be; a name is followed to where it is set or passed."""
        match node:
            case ast.Constant(value=str(text)):
                return {text}
            case ast.JoinedStr(values=parts):
                return {"".join(p) for p in itertools.product(*(self.wordings(v, function) for v in parts))}
            case ast.FormattedValue(value=value, conversion=conversion):
                known = self.constant(value)
                if known is not None:
                    return {"{}", repr(known) if conversion == ord("r") else str(known)}
                return {"{}"} | (self.wordings(value, function) if conversion == -1 else set())
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                pairs = itertools.product(self.wordings(left, function), self.wordings(right, function))
                return {a + b for a, b in pairs}
            case ast.BinOp(left=left, op=ast.Div(), right=right):  # a path
                pairs = itertools.product(self.wordings(left, function), self.wordings(right, function))
                return {f"{a}/{b}" for a, b in pairs}
            case ast.IfExp(body=body, orelse=other):
                return self.wordings(body, function) | self.wordings(other, function)
            case ast.Name(id=name) if function is not None:
                set_to = [
                    n.value
                    for n in ast.walk(function)
                    if isinstance(n, ast.Assign) and [ast.unparse(t) for t in n.targets] == [name]
                ]
                found = [self.wordings(value, None) for value in [*set_to, *self.passed(function, name)]]
                return set().union(*found) if found else {"{}"}
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if name not in self.seen:
                return self.returned(name)
        return {"{}"}

    def passed(self, function: ast.FunctionDef, name: str) -> list[ast.expr]:
        """What the calls in this module give for a parameter of a function."""
        parameters = [a.arg for a in function.args.args if a.arg != "self"]
        found = []
        for call in ast.walk(self.tree):
            if isinstance(call, ast.Call) and ast.unparse(call.func).rpartition(".")[2] == function.name:
                given = dict(zip(parameters, call.args, strict=False)) | {
                    k.arg: k.value for k in call.keywords
                }
                found += [given[name]] if name in given else []
        return found

    def returned(self, name: str) -> set[str]:
        """What a function of this module can return."""
        inner = Reader(self.tree, self.module, (*self.seen, name))
        found: set[str] = set()
        for made in ast.walk(self.tree):
            if isinstance(made, ast.FunctionDef) and made.name == name:
                for node in ast.walk(made):
                    if isinstance(node, ast.Return) and node.value is not None:
                        found |= inner.wordings(node.value, made)
        return found or {"{}"}

    def constant(self, node: ast.expr) -> Any:
        """The value of an expression of the module's constants, such as ``', '.join(TEMPLATES)``; else None."""
        names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        constants = {n for n in names if n.isupper() and hasattr(self.module, n)}
        if not constants or names - constants - {"map", "repr"}:
            return None
        return eval(
            ast.unparse(node),
            {"map": map, "repr": repr} | {n: getattr(self.module, n) for n in names if n in constants},
        )


def shown(node: ast.expr) -> str:
    """A name for what varies."""
    called = {id(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)}
    for n in ast.walk(node):
        if id(n) not in called and isinstance(n, ast.Name | ast.Attribute):
            name = n.id if isinstance(n, ast.Name) else n.attr
            if name != "self":
                return name
    return "value"


def draft(node: ast.expr) -> str:
    """The line with a name for each thing that varies, to paste into the table."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(map(draft, parts))
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return draft(left) + draft(right)
        case ast.IfExp(body=body):
            return draft(body)
        case ast.FormattedValue(value=ast.BinOp(left=left, right=ast.Constant(value=str(text)))):
            return f"{{{shown(left)}}}/{text}"
        case ast.FormattedValue(value=value):
            return f"{{{shown(value)}}}"
    return "{line}"


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """Every function with its dotted name, outer ones first."""
    for node in ast.iter_child_nodes(tree):
        named = isinstance(node, ast.FunctionDef | ast.ClassDef)
        name = f"{prefix}{node.name}." if named else prefix  # type: ignore[attr-defined]
        if isinstance(node, ast.FunctionDef):
            yield name[:-1], node
        yield from functions(node, name)


def sections() -> dict[str, str]:
    """Class of each section of a recipe to its dotted key."""

    def walk(model: Any, key: str) -> Iterator[tuple[str, str]]:
        yield from (
            (base.__name__, key or "recipe")
            for base in model.__mro__
            if base.__module__.removeprefix("triewise.") in OF_RECIPES
        )
        for name, info in model.model_fields.items():
            for kind in (info.annotation, *get_args(info.annotation)):
                if hasattr(kind, "model_fields"):
                    yield from walk(kind, f"{key}.{name}".lstrip("."))

    return dict(walk(Recipe, ""))


def as_reported(lines: set[str], key: str) -> set[str]:
    """What `recipe.parse_recipe` makes of the wordings of a section's validator."""
    return {
        f"{{}}: {key}: {line}" + ("" if key == "recipe" or ", got " in line else ", got {}") for line in lines
    }


OF_RECIPES = ("recipe", "settings", "objectives")  # modules whose ValueErrors `recipe.parse_recipe` reports


@cache
def places() -> tuple[Place, ...]:
    """Every place of the source that makes an error."""
    found = []
    for file in sorted(file for file in PACKAGE.rglob("*.py") if file.stem in PLACE):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        owner = {id(n): pair for pair in functions(tree) for n in ast.walk(pair[1])}
        for node in ast.walk(tree):
            if not (
                isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in RAISED
            ):
                continue
            name, function = owner.get(id(node), ("", None))
            reader = Reader(tree, importlib.import_module(PLACE[file.stem]))
            lines, text = reader.wordings(node.args[0], function), draft(node.args[0])
            if node.func.id == "_complain" and lines == {"{}"}:
                continue  # passes on the line of a UserError
            module = file.stem
            if module in OF_RECIPES and node.func.id == "ValueError":
                key = sections()[name.partition(".")[0]]
                lines, text = as_reported(lines, key), as_reported({text}, key).pop()
                text, name, module = text.replace("{}", "{file}", 1), "parse_recipe", "recipe"
            found.append(
                Place(
                    file.stem,
                    module,
                    name,
                    node.lineno,
                    node.end_lineno or node.lineno,
                    node.func.id,
                    frozenset(map(canonical, lines)),
                    f"| `{module}.{name}` | `{text}` | |",
                )
            )
    return tuple(found)


# ---------------------------------------------------------------- the rows of the table
@dataclass(frozen=True)
class Row:
    """A row of a table whose columns are where and line."""

    number: int
    section: str
    where: tuple[str, ...]
    line: str

    @property
    def modules(self) -> set[str]:
        return {name.partition(".")[0] for name in self.where}

    def __str__(self) -> str:
        return f"docs/errors.md:{self.number} | {', '.join(f'`{w}`' for w in self.where)} | `{self.line}` |"


@cache
def rows() -> tuple[Row, ...]:
    found, section, ours = [], "", False
    for number, text in enumerate(TABLE.read_text(encoding="utf-8").splitlines(), 1):
        if text.startswith("## "):
            section = text.removeprefix("## ")
        cells = [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", text)[1:-1]]
        if not text.startswith("|"):
            ours = False
        elif cells[:2] == ["where", "line"]:
            ours = True
        elif ours and not cells[0].startswith("-"):
            where, line = (re.findall(r"`([^`]+)`", cell) for cell in cells[:2])
            assert where and line, f"docs/errors.md:{number} wants names and a line in backticks, got {text}"
            found.append(Row(number, section, tuple(where), line[0]))
    return tuple(found)


def expect_none(found: list[Any], problem: str) -> None:
    if found:
        pytest.fail("\n".join([problem, *map(str, found)]), pytrace=False)


def test_every_error_line_of_the_source_has_a_row() -> None:
    documented = {(module, canonical(row.line)) for row in rows() for module in row.modules}
    missing = [p for p in places() if not any((p.module, line) in documented for line in p.lines)]
    expect_none(missing, "lines that docs/errors.md does not have; add a row for each:")


def test_every_row_is_a_line_of_the_source() -> None:
    said = {(p.module, line) for p in places() for line in p.lines}
    stale = [
        row
        for row in rows()
        if row.section != NO_ERRORS and not all((m, canonical(row.line)) in said for m in row.modules)
    ]
    expect_none(stale, "rows of docs/errors.md that no line of the source says; correct or drop:")


def test_every_note_of_the_table_is_a_line_of_the_source() -> None:
    notes = [row for row in rows() if row.section == NO_ERRORS]
    assert notes
    stale = []
    for row in notes:
        for module in row.modules:
            tree = ast.parse(
                Path(importlib.import_module(PLACE[module]).__file__ or "").read_text(encoding="utf-8")
            )
            reader = Reader(tree, importlib.import_module(PLACE[module]))
            texts = [n for n in ast.walk(tree) if isinstance(n, ast.JoinedStr | ast.Constant | ast.BinOp)]
            if not any(canonical(row.line) in map(canonical, reader.wordings(n, None)) for n in texts):
                stale.append(row)
    expect_none(stale, "rows of docs/errors.md that no line of the source says; correct or drop:")


def test_every_row_names_code_that_exists() -> None:
    unknown = []
    for row in rows():
        for where in row.where:
            module, *names = where.split(".")
            at: Any = importlib.import_module(PLACE[module])
            for name in names:
                at = getattr(at, name, None)
            if at is None:
                unknown.append(row)
    expect_none(unknown, "rows of docs/errors.md that name no function or class:")


# ---------------------------------------------------------------- every place is reached
def is_reached(place: Place, raised: dict[tuple[str, int], set[str]]) -> bool:
    """Whether a test made this error.

    A ValueError of a recipe's section becomes a UserError elsewhere, so it is known by its words.
    """
    module = PLACE[place.module]
    if place.kind == "UserError":
        return any((module, line) in raised for line in range(place.first, place.last + 1))
    said = {line for (name, _), lines in raised.items() if name == module for line in lines}
    shapes = [re.compile(".*".join(map(re.escape, wording.split("{}")))) for wording in place.lines]
    return any(shape.fullmatch(" ".join(line.split())) for shape in shapes for line in said)


def unprovoked(raised: dict[tuple[str, int], set[str]]) -> list[Place]:
    """Errors of the source that no test has made."""
    ours = [p for p in places() if p.kind == "UserError" or (p.module, p.kind) == ("recipe", "ValueError")]
    excused = {p for p in ours for line in p.lines if (p.module, line) in OUT_OF_REACH}
    return [p for p in ours if p not in excused and not is_reached(p, raised)]


def test_every_error_is_provoked_by_a_test(request: pytest.FixtureRequest) -> None:
    """Runs last; `tests/conftest.py` has recorded where the tests before it met a UserError."""
    assert set(OUT_OF_REACH) <= {(p.module, line) for p in places() for line in p.lines}, "stale exceptions"
    run = request.config.stash[RUN]
    if not run.is_whole(request.session):
        pytest.skip("only a whole run without failures knows which errors no test provokes")
    silent = unprovoked(run.raised)
    expect_none(silent, "errors that no test provokes; write a test for each:")


# ---------------------------------------------------------------- lines that no other file provokes
def write_run(folder: Path, data: str = "of one") -> Path:
    """What `open_run` takes for a trained run."""
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text('name = "x"\n[data]\nsource = "ml-100k"\n', encoding="utf-8")
    facts = {"commit": None, "machine": "", "command": "", "parameters": 1, "timing": {}, "versions": {}}
    training = {"steps": 1, "stopped": "steps", "best_step": None, "best_metric": None}
    facts |= {"data": {"folder": "data", "source": "ml-100k"}, "training": training}
    write_json(folder / "run.json", {"status": "trained", "hashes": {"data": data}, **facts})
    return folder


def test_runs_that_cannot_be_compared(tmp_path: Path) -> None:
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other", "of another")
    with pytest.raises(UserError, match="one has no metrics.json; run: triewise evaluate"):
        collect([one])
    for run in (one, other):
        write_json(run / "metrics.json", {})
    with pytest.raises(UserError, match="wanted runs on the same data for one report"):
        collect([one, other])
    with pytest.raises(UserError, match="one/predictions.parquet, which is missing; run: triewise evaluate"):
        load_evaluation(one)
    with pytest.raises(UserError, match="log.jsonl, which is missing"):
        read_log(one)
    row = '{"step": 1, "loss": 2.0}\n'
    (one / "log.jsonl").write_text(row, encoding="utf-8")
    known = {"bytes": len(row), "sha256": sha256_file(one / "log.jsonl")}
    write_json(one / "run.json", read_json(one / "run.json") | {"log": known})
    assert [r["step"] for r in read_log(one)] == [1]
    (one / "log.jsonl").write_text(row.replace("2.0", "1.0"), encoding="utf-8")
    with pytest.raises(UserError, match="log.jsonl is not the file that was written"):
        read_log(one)


def test_evaluations_of_different_rows() -> None:
    def evaluation(target: int) -> Evaluation:
        return replace(evaluate(popular, split([[0]], [target]), name="a", split_name="test"), metrics={})

    popular = MostPopular(Groups.from_labels(np.arange(3), np.ones(3)), np.ones(3))
    with pytest.raises(UserError, match="were evaluated on different rows"):
        comparisons([evaluation(1), evaluation(2)])


def test_a_run_is_evaluated_as_it_was_trained(tmp_path: Path, capsys, monkeypatch) -> None:
    words = ["triewise", "evaluate", str(write_run(tmp_path / "run")), "--set", "training.steps=3"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "wanted --set evaluation.KEY=VALUE, got 'training.steps=3'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A recipe of one step on a published split."""
    folder = tmp_path_factory.mktemp("errors")
    values = {
        "name": "small",
        "data": {
            "source": f"msl:{write_msl_folder(folder / 'raw', n_users=6)}",
            "folder": str(folder / "data"),
        },
        "backbone": {"tiny": {"vocabulary": 300, "width": 16, "layers": 1, "heads": 2, "feed_forward": 32}},
        "training": {"steps": 1},
    }
    return parse_recipe(values, "small")


def changed(recipe: Recipe, section: str, **values: Any) -> Recipe:
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=values)})


def test_data_that_changed_since_the_training(small: Recipe, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_run(small, run)
    facts = read_json(run / "run.json")
    write_json(run / "run.json", facts | {"hashes": facts["hashes"] | {"data": "of yesterday"}})
    with pytest.raises(UserError, match="the data changed since .* was started; restore it, or start anew"):
        train_run(small, run, resume=True)
    with pytest.raises(UserError, match="the data in .* changed since .* was trained; prepare the same data"):
        evaluate_run(run)


def test_recipes_that_ask_what_the_data_do_not_have(small: Recipe, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(UserError, match="evaluation.exclude = 'seen' needs what users had before"):
        train_run(changed(small, "evaluation", exclude="seen"), tmp_path / "run")
    data = open_data(small)
    monkeypatch.setattr(
        "triewise.app.runs.open_data", lambda _: replace(data, valid=data.valid.take(np.arange(0)))
    )
    with pytest.raises(UserError, match="training.evaluate_every > 0 needs validation rows"):
        train_run(changed(small, "training", evaluate_every=1), tmp_path / "run")


def test_without_the_package_that_reads_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="needs the gguf package; run: pip install"):
        _read_gguf(tmp_path, "model.gguf")


def test_recommenders_that_are_not_whole(tmp_path: Path) -> None:
    recommender(TITLES[:4]).save_pretrained(tmp_path)
    other = Trie.from_sequences([[5, 2], [6, 2], [7, 2], [8, 2]])
    other.save(tmp_path / "trie.npz")
    facts = read_json(tmp_path / "recommender.json")
    facts["hashes"]["trie"] = other.fingerprint()
    facts["sha256"]["trie.npz"] = sha256_file(tmp_path / "trie.npz")
    write_json(tmp_path / "recommender.json", facts, sealed=True)
    with pytest.raises(UserError, match="the tokenizer in .*/model does not give the titles of trie.npz"):
        triewise.load(tmp_path)
    (tmp_path / "trie.npz").unlink()
    with pytest.raises(UserError, match="wanted trie.npz in .*, which is missing; restore it"):
        triewise.load(tmp_path)


def test_weights_of_another_model(tmp_path: Path) -> None:
    save_trained(torch.nn.Linear(2, 2), tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match="wanted the weights of this model in .*, got those of another"):
        load_trained(torch.nn.Linear(2, 2, bias=False), tmp_path / "weights.safetensors")
