"""Recipes: strict, round-tripping, and with errors a person can act on."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from triewise.errors import UserError
from triewise.recipe import dump_recipe, load_recipe, parse_recipe, recipe_folder

SMALL = {"name": "x", "data": {"source": "ml-100k"}}
EVERY = sorted(recipe_folder().rglob("*.toml"))


@pytest.mark.parametrize("file", EVERY, ids=[f.stem for f in EVERY])
def test_shipped_recipes_load_and_round_trip(file: Path) -> None:
    recipe = load_recipe(file)
    assert parse_recipe(tomllib.loads(dump_recipe(recipe)), "dump") == recipe


FIRST = [file for file in EVERY if "# First: " in file.read_text(encoding="utf-8")]


@pytest.mark.parametrize("file", FIRST, ids=[f.stem for f in FIRST])
def test_what_a_recipe_says_to_run_first_makes_the_folders_that_it_names(file: Path) -> None:
    line = re.search("# First: .*", file.read_text(encoding="utf-8"))
    assert line is not None
    made = {f"runs/{load_recipe(name).name}" for name in re.findall("triewise run ([a-z0-9/-]+)", line[0])}
    recipe = load_recipe(file)
    hybrid, objective = recipe.hybrid, recipe.objective
    named = [hybrid and hybrid.items, objective.soft_targets, objective.preference.reference]
    named.append(recipe.identifier.items)
    named.append(objective.flow and objective.flow.scores)
    folders = [folder.absolute().relative_to(Path.cwd()) for folder in named if folder is not None]
    assert {folder.as_posix() for folder in folders} == made


def test_awkward_strings_round_trip() -> None:
    recipe = parse_recipe(
        {"name": "x", "title": 'a "b" \\ c\n\t\x01\x7f 漢', "data": {"source": "d3:C:\\data"}}, "f"
    )
    assert parse_recipe(tomllib.loads(dump_recipe(recipe)), "dump") == recipe


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"training": {"step": 3}}, "unknown key 'training.step'; did you mean 'training.steps'"),
        ({"trainin": {}}, "unknown key 'trainin'; did you mean 'training'"),
        ({"data": {}}, "the key 'data.source' is missing"),
        ({"data": {"source": "msl:x", "pipeline": ["d3"]}}, "data.pipeline: Input should be 'd3', 'msl' or"),
        ({"training": {"steps": 0}}, "training.steps: Input should be greater than or equal to 1, got 0"),
        ({"objective": {"temperature": -1.0}}, "temperature must be > 0 or 'adaptive', got -1.0"),
        (
            {"objective": {"support": "all"}},
            "objective.support: Input should be 'trie' or 'vocabulary', got 'all'",
        ),
        (
            {
                "backbone": {"name": "gpt2"},
                "training": {"supervision": "every"},
                "hybrid": {"kind": "llara", "items": "x"},
            },
            "[hybrid] with training.supervision = 'every' needs backbone.template = 'plain'",
        ),
        (
            {"training": {"batch_size": 10, "accumulation": 3}},
            "training: batch_size must be a multiple of accumulation, got 10 and 3",
        ),
        (
            {"training": {"freeze": 2, "gradient_checkpointing": True}},
            "training: gradient_checkpointing runs layers again: set keep_states = false, got true",
        ),
        (
            {"training": {"patience": 2}},
            "training: patience counts validations: wanted evaluate_every > 0, got 0",
        ),
        (
            {"evaluation": {"search": "beam", "beams": 11, "k": 12}},
            "beams must be at least k, got 11 beams for k = 12",
        ),
        (
            {"evaluation": {"beams": 5}},
            "evaluation.beams: Input should be greater than or equal to 10, got 5",
        ),
        (
            {"evaluation": {"search": "beam", "scope": "step", "against_exact": True}},
            "scope = 'step' has no exact search to compare with",
        ),
        ({"evaluation": {"search": "grounding", "pruned": True}}, "set pruned = false, got {"),
        ({"evaluation": {"scope": "step"}}, "scope = 'step' needs search = 'beam'"),
        ({"objective": {"adaptive": {"clamp": [3, 2]}}}, "two ascending temperatures > 0, got [3.0, 2.0]"),
        (
            {"objective": {"temperature": "adaptive", "support": "vocabulary"}},
            "temperature = 'adaptive' needs support = 'trie', got {",
        ),
        (
            {"training": {"rows": "train+valid", "evaluate_every": 5}},
            "trains on the validation rows; set training.evaluate_every = 0",
        ),
        (
            {"training": {"rows": "train+valid"}, "evaluation": {"split": "valid"}},
            "trains on the validation rows; set evaluation.split = 'test'",
        ),
    ],
)
def test_what_is_wrong_is_one_line(change: dict, line: str) -> None:
    with pytest.raises(UserError) as error:
        parse_recipe(SMALL | change, "my.toml")
    assert str(error.value).startswith("my.toml: ")
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_set_changes_one_key(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text('name = "x"\n[data]\nsource = "ml-100k"\n', encoding="utf-8")
    recipe = load_recipe(
        file, ["training.steps=5", "objective.temperature=adaptive", "backbone.name=a/b", "seed=3"]
    )
    assert (recipe.training.steps, recipe.objective.temperature, recipe.backbone.name, recipe.seed) == (
        5,
        "adaptive",
        "a/b",
        3,
    )
    assert recipe.template == "msl"
    with pytest.raises(UserError, match="wanted --set key=value"):
        load_recipe(file, ["training.steps"])
    with pytest.raises(UserError, match="seed is not a table"):
        load_recipe(file, ["seed=1", "seed.x=2"])


def test_ats_on_llama_3_looks_at_the_rows_of_the_released_code() -> None:
    """Its tokenizer merges the opening quote with the first word, so the root is where a title begins."""
    found = [load_recipe(file) for file in EVERY if "papers" in file.parts]
    rows = [r.objective.adaptive.rows for r in found if r.objective.temperature == "adaptive"]
    assert rows == ["root"] * 3


@pytest.mark.parametrize("file", EVERY, ids=[f.stem for f in EVERY])
def test_a_recipe_with_changes_is_a_new_recipe(file: Path) -> None:
    recipe = load_recipe(file)
    changed = recipe.changed("training.steps=7", "training.time_limit_s=1.5", "title=a b")
    assert (changed.training.steps, changed.training.time_limit_s, changed.title) == (7, 1.5, "a b")
    assert changed == load_recipe(file, ["training.steps=7", "training.time_limit_s=1.5", "title=a b"])
    assert recipe.changed() == recipe != changed
    with pytest.raises(
        UserError, match=f"{recipe.name}: unknown key 'training.step'; did you mean 'training"
    ):
        recipe.changed("training.step=7")


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"or one of .*demo/msl.*got 'nowhere'"):
        load_recipe("nowhere")
    (tmp_path / "r.toml").write_text("name = ", encoding="utf-8")
    with pytest.raises(UserError, match="wanted UTF-8 TOML"):
        load_recipe(tmp_path / "r.toml")
