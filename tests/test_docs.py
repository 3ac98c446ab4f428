"""What README and docs/ promise: the code runs, and every command, key, module, test and file they name is there."""

from __future__ import annotations

import ast
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

import triewise
from triewise import cli
from triewise.recipe import Recipe, load_recipe

ROOT = Path(__file__).parents[1]
PACKAGE = Path(triewise.__file__).parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")
SUFFIXES = ("py", "toml", "html", "parquet", "json")  # files that are called as modules are
MODULES = {file.stem: file for file in PACKAGE.rglob("[a-z]*.py")}


def blocks(language: str, text: str = README) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [block for kind, block in found if kind == language]


def names_in(file: Path) -> set[str]:
    """Everything that a module defines at its top, and ``Class.member``."""
    found: set[str] = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            inner = [
                getattr(n, "name", "") or getattr(getattr(n, "target", None), "id", "") for n in node.body
            ]
            found |= {f"{node.name}.{name}" for name in inner}
    return found


def test_the_first_screen_says_what_it_is_installs_and_runs() -> None:
    first = "\n".join(README.splitlines()[:40])
    assert "pip install" in first
    assert "arXiv:2602.21677" in first
    code = blocks("python", first)[0].strip().splitlines()
    assert code[0] == "import triewise"
    assert len(code) <= 9


def test_the_first_code_prints_what_stands_below_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples")
    import shop  # type: ignore[import-not-found]

    try:
        (tmp_path / "shop").mkdir()
        shop.write_shop(tmp_path / "shop")
        exec(blocks("python")[0], {})
    finally:
        del sys.modules["shop"]
    (hit_rate, titles), (printed_rate, printed) = (
        capsys.readouterr().out.splitlines(),
        next(block for block in blocks("") if "Sleeping" in block).splitlines(),
    )
    assert float(hit_rate) == pytest.approx(float(printed_rate), abs=0.05)
    assert titles.split(",")[0] == printed.split(",")[0]


def test_every_command_in_the_pages_is_one() -> None:
    group: Any = typer.main.get_command(cli.app)
    seen = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in blocks("console", text):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True) if line.startswith("$ ") else []
                if "triewise" not in words or words[-1] == "triewise":
                    continue
                name, *rest = words[words.index("triewise") + 1 :]
                seen += 1
                if name == "--help":
                    continue
                known = {option for given in group.commands[name].params for option in given.opts}
                assert {word for word in rest if re.match(r"-+[a-z]", word)} <= known, line
                changes = [rest[i + 1] for i, word in enumerate(rest) if word == "--set"]
                if name in ("train", "run") and "/" in rest[0] and not rest[0].endswith(".toml"):
                    load_recipe(rest[0], changes)
    assert seen >= 12


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file(page: Path) -> None:
    made = {"examples/index.md", "recipes.md", "index.md", "api/index.rst"}  # docs/pages.py makes them
    text = re.sub(r"`[^`]*`", "", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not target.startswith("http") and target not in made:
            there = page.parent / target
            example = ROOT / Path(target).with_suffix(".py")
            assert there.exists() or example.is_file(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_recipe_module_and_test_that_is_named_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    if page.name == "log.md":  # a log tells what was
        return
    missing = []
    sections = {*Recipe.model_fields, "ranking", "dataset", "metrics"}  # keys of a recipe, objects, and files
    for module, name in re.findall(r"`([a-z_]+)\.([A-Za-z_]+(?:\.[A-Za-z_]+)?)(?:\(.*?\))?`", text):
        if module in set(MODULES) - sections and name not in {
            "py",
            "toml",
            "html",
            "parquet",
            "json",
            *names_in(MODULES[module]),
        }:
            missing.append(f"{module}.{name}")
    last = ""
    tests = {file.name: file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py")}
    for file, name in re.findall(r"`(test_[a-z_0-9]+\.py)?(?:::([A-Za-z_0-9:]+))?`", text):
        last = file or last
        if name and f" {name.split('::')[-1]}(" not in tests.get(last, ""):
            missing.append(f"{last}::{name}")
    for name in re.findall(
        r"`(?:recipes/)?((?:demo|office|papers|ml-1m)/[a-z0-9/-]+[a-z0-9])(?:\.toml)?`", text
    ):
        load_recipe(name)
    assert not missing, missing


def test_every_example_has_a_page() -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import pages  # type: ignore[import-not-found]
    finally:
        sys.path.pop(0)
    assert set(pages.EXAMPLES) == {file.stem for file in (ROOT / "examples").glob("*.py")}
