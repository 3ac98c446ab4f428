"""The house: ten wings in the order in which data flows, their walls and doors, and what importing them costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from statistics import mean, median

import pytest

import triewise

PACKAGE = Path(triewise.__file__).parent
# Data flows down; a module imports only from wings above its own, and from its own.
WINGS = "data models tokens ranking training decoding reports recommenders serving app".split()  # noqa: SIM905
ROOT = (
    "errors plain lazy progress files locks settings objectives recipe arrays cache"  # stands above all wings
)
BELOW = "cli studies commandline options __init__ __main__ testing"  # stands below all of them
WALLS = {  # wing -> wings it may not know, though they stand above it
    "training": {"ranking"},
    "decoding": {"training"},
    "reports": {"training"},
    "recommenders": {"training"},
    "serving": {"training"},
}
LEVELS = {"decoding": 7}  # longest chain of imports inside a wing; 5 elsewhere
DOORS = {  # what the world outside relies on
    "triewise": "prepare load_dataset load_recipe train evaluate load Recipe Dataset Catalog Ranking Recommender Trie "
    "UserError __version__",
    "triewise.tokens": "Trie Prompts build_prompts information_gain zero_gain decoding_weights binary_weights "
    "linear_weights position_weights",
    "triewise.training": "Objective AdaptiveTemperature trie_nll vocabulary_nll train",
    "triewise.decoding": "TrieEngine beam_search exact_search rank_catalogue score",
    "triewise.ranking": "Ranking Recommender Groups evaluate hit_rate ndcg mrr MostPopular ItemKNN",
    "triewise.recommenders": "GenerativeRecommender SequentialRecommender GroundedRecommender",
    "triewise.data": "prepare load_dataset Catalog Dataset Interactions Split",
}

Module = tuple[str, str]  # wing ("" for the root) and name


def module_of(file: Path) -> Module:
    place = file.relative_to(PACKAGE)
    return (place.parts[0] if len(place.parts) > 1 else "", place.stem)


def imports(source: str, package: bool = True) -> set[str]:
    """Modules of this package that a source imports, wherever in it, but for those that only type checkers see."""
    tree = ast.parse(source)
    unseen = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for part in node.body
        for inner in ast.walk(part)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in unseen:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "triewise":
            found.add(str(node.module))
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "triewise"}
    return found


def trespasses(module: Module, source: str) -> list[str]:
    """What a module imports and may not."""
    wing, name = module
    wrong = []
    for target in sorted(imports(source)):
        other = target.split(".")[1] if target.count(".") else ""
        if other in WINGS and wing in WINGS:
            ahead = WINGS.index(other) > WINGS.index(wing)
            past_the_door = other != wing and target.count(".") > 1
            if ahead or past_the_door or other in WALLS.get(wing, ()):
                wrong.append(target)
        elif other in WINGS:
            wrong += [target] if name in ROOT.split() else []
        elif wing in WINGS and other not in ROOT.split():
            wrong.append(target)
    return wrong


def sources() -> Iterator[tuple[Module, str]]:
    for file in sorted(PACKAGE.rglob("*.py")):
        yield module_of(file), file.read_text(encoding="utf-8")


def test_every_module_stands_in_a_wing() -> None:
    assert {wing for (wing, _), _ in sources()} == {"", *WINGS}
    at_root = {name for (wing, name), _ in sources() if not wing}
    assert at_root <= {*ROOT.split(), *BELOW.split()}


def test_walls_doors_and_the_order_of_the_wings() -> None:
    """Between wings the way is the door: ``from triewise.tokens import Trie``."""
    wrong = [
        f"{module}: {trespasses(module, source)}"
        for module, source in sources()
        if trespasses(module, source)
    ]
    assert not wrong, wrong


@pytest.mark.parametrize(
    ("module", "line"),
    [
        (("training", "losses"), "from triewise.ranking import evaluate"),
        (("training", "losses"), "from triewise.decoding import score"),
        (("decoding", "engine"), "from triewise.training import Objective"),
        (("recommenders", "generative"), "from triewise.training import train"),
        (("reports", "card"), "import triewise.app.runs"),
        (("data", "splits"), "from triewise.tokens import Trie"),
        (("decoding", "engine"), "from triewise.tokens.trie import Trie"),
        (("", "recipe"), "from triewise.data import Catalog"),
        (("recommenders", "generative"), "from triewise.cli import main"),
        (("app", "demo"), "def f():\n    from triewise.recommenders.saved import CARD"),
    ],
)
def test_a_broken_wall_is_noticed(module: Module, line: str) -> None:
    assert trespasses(module, line)


def test_no_circle_and_few_levels_inside_a_wing() -> None:
    for wing in ("", *WINGS):
        inside = {
            name: imports(source) for (w, name), source in sources() if w == wing and name != "__init__"
        }
        prefix = f"triewise.{wing}." if wing else "triewise."
        above = {
            name: {t.removeprefix(prefix) for t in found if t.startswith(prefix)} & set(inside)
            for name, found in inside.items()
        }
        level: dict[str, int] = {}
        for name in TopologicalSorter(above).static_order():  # raises where there is a circle
            level[name] = 1 + max((level[other] for other in above[name]), default=0)
        assert max(level.values(), default=0) <= LEVELS.get(wing, 5), (wing, level)


def test_modules_and_functions_are_read_in_a_sitting() -> None:
    lines = [len(source.splitlines()) for _, source in sources()]
    assert max(lines) <= 530
    assert median(lines) <= 220
    assert mean(len(imports(source)) for _, source in sources()) <= 3.5
    for module, source in sources():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                assert length <= 60, (module, node.name, length)


@pytest.mark.parametrize(("package", "names"), DOORS.items())
def test_doors(package: str, names: str) -> None:
    door = __import__(package, fromlist=["*"])
    assert set(door.__all__) == set(names.split())
    assert all(getattr(door, name) is not None for name in names.split())
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = door.nothing


def test_every_name_of_every_door_is_there() -> None:
    for wing in WINGS:
        door = __import__(f"triewise.{wing}", fromlist=["*"])
        assert all(getattr(door, name) is not None for name in dir(door))
        # Importing a module binds its name in the package, and would hide what the door has under it.
        stub = (PACKAGE / wing / "__init__.pyi").read_text(encoding="utf-8")
        named = {
            a.asname for node in ast.parse(stub).body if isinstance(node, ast.ImportFrom) for a in node.names
        }
        assert not named & {name for (w, name), _ in sources() if w == wing}


def loaded_by(code: str, modules: str) -> set[str]:
    """Which of some modules are loaded after some code ran in a fresh interpreter."""
    code = f"import sys; {code}; print(*(set({modules.split()!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


HEAVY = "torch transformers polars matplotlib"


def test_importing_the_package_and_its_doors_loads_no_torch() -> None:
    wings = ", ".join(f"triewise.{wing}" for wing in WINGS)
    assert loaded_by(f"import triewise, triewise.cli, {wings}", HEAVY) == set()


def test_what_recommends_never_imports_the_trainer() -> None:
    every = (
        "import triewise; triewise.load; import triewise.recommenders as r; [getattr(r, n) for n in dir(r)]"
    )
    assert loaded_by(every, "transformers.trainer triewise.training.trainer") == set()
    assert loaded_by("import triewise.training.trainer", "transformers.trainer") == {"transformers.trainer"}


def test_a_module_is_known_by_its_name_alone() -> None:
    names = [name for (_, name), _ in sources() if name != "__init__"]
    assert len(names) == len(set(names))
