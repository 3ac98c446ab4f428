"""Write what Sphinx reads: ``python docs/pages.py FOLDER`` copies docs/*.md and makes the other pages.

Made are the home page (README), a page for each example, for the commands, for the keys of a recipe, and for each
wing and module. A file is written only where its text changed, so that Sphinx builds again only what it has to.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel

from triewise import cli, recipe

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "triewise"
WINGS = "data models tokens ranking training decoding reports recommenders serving app".split()  # noqa: SIM905
ORDER = (
    "getting-started examples/index commands recipes data serving tuning papers statistics reproducing models"
)
ORDER += " errors log notation api/index contributing changelog"
EXAMPLES = {  # in the order in which they are shown
    "quickstart": "Quick start from CSV files",
    "your_own_model": "Your own language model",
    "msl_igd_lml": "MSL, IGD and LML",
    "what_decided": "What decided a recommendation",
    "filters": "Filters",
    "exact_or_beams": "Exact search and beams",
    "assistant": "An assistant",
    "serve": "A service",
    "your_own_recommender": "Your own recommender",
    "a_model_over_item_ids": "A model over item ids",
    "tokens_and_tree": "Tokens and the tree",
    "shop": "The shop they learn from",
}


def pages() -> Iterator[tuple[str, str]]:
    """Every page: its place, and its text."""
    texts = {file.stem: file.read_text(encoding="utf-8") for file in sorted((ROOT / "docs").glob("*.md"))}
    for name in ("CONTRIBUTING", "CHANGELOG"):
        texts[name.lower()] = (ROOT / f"{name}.md").read_text(encoding="utf-8")
    home = (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
    texts["index"] = home + toctree(
        [
            f"API <{name}>" if name == "api/index" else name
            for name in ORDER.split()
            if name in {*texts, *MADE}
        ],
        hidden=True,
    )
    for name, text in texts.items():
        text = re.sub(r"\]\((?:docs/)?(CONTRIBUTING|CHANGELOG)\.md", lambda m: f"]({m[1].lower()}.md", text)
        yield f"{name}.md", text.replace("](examples/)", "](examples/index.md)").replace("](docs/", "](")
    yield "commands.md", commands()
    yield "recipes.md", recipes()
    yield from examples()
    yield from api()


MADE = {"examples/index", "commands", "recipes", "api/index"}


def toctree(names: Iterable[str], hidden: bool = False) -> str:
    """A list of pages, in Markdown."""
    kind = ":hidden:" if hidden else ":maxdepth: 1"
    return "\n\n```{toctree}\n" + "\n".join([kind, "", *names]) + "\n```\n"


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [header, tuple("---" for _ in header), *rows]
    return (
        "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        + "\n"
    )


def examples() -> Iterator[tuple[str, str]]:
    """A page for each file of examples/, with its docstring above its code."""
    known = {file.stem for file in (ROOT / "examples").glob("*.py")}
    if known != set(EXAMPLES):
        raise SystemExit(f"wanted a place in docs/pages.py for every example, got {known ^ set(EXAMPLES)}")
    rows = []
    for name, title in EXAMPLES.items():
        source = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
        said = ast.get_docstring(ast.parse(source)) or ""
        first, _, rest = said.partition("\n\n")
        code = source.split('"""', 2)[2].strip()
        text = re.sub(r"``(.+?)``", r"`\1`", f"{first}\n\n{rest}")
        run = f"```console\n$ python examples/{name}.py\n```"
        yield f"examples/{name}.md", f"# {title}\n\n{text}\n\n{run}\n\n```python\n{code}\n```\n"
        rows.append((f"[{title}]({name}.md)", " ".join(text.partition("\n\n")[0].split())))
    text = "# Examples\n\nEach file runs on a CPU in seconds, from a clone after an install, without a network.\n\n"
    yield (
        "examples/index.md",
        text + table(("example", "what you see"), rows) + toctree(EXAMPLES, hidden=True),
    )


def commands() -> str:
    """Every command with its arguments and options, as ``--help`` has them."""
    text = (
        "# Commands\n\nResults go to stdout, progress to stderr; a mistake is one line and exit status 2.\n"
    )
    group: Any = typer.main.get_command(cli.app)
    for name, command in group.commands.items():
        text += f"\n## triewise {name}\n\n{inspect.cleandoc(command.help or '')}\n\n"
        rows = []
        for given in command.params:
            flags = given.opts if given.param_type_name == "option" else [given.name.upper()]
            default = (
                ""
                if given.default in (None, False, ()) or given.required
                else f" (default `{given.default}`)"
            )
            rows.append((f"`{', '.join(flags)}`", f"{given.help or ''}{default}"))
        text += table(("argument or option", "what it is"), rows)
    return text


def recipes() -> str:
    """Every key of a recipe with its type, its default and its description."""
    text = "# Keys of a recipe\n\nA recipe is a strict TOML file; an unknown key is an error that names the nearest "
    text += "one. `--set a.b=value` changes a key.\n"
    for prefix, section in sections(recipe.Recipe, ""):
        rows = []
        for name, info in section.model_fields.items():
            if not any(inspect.isclass(k) and issubclass(k, BaseModel) for k in kinds(info.annotation)):
                default = "needed" if info.is_required() else f"`{recipe_value(info.default)}`"
                values = ", ".join([" or ".join(values_of(info.annotation)), *limits(info)])
                rows.append((f"`{name}`", default, values, info.description or ""))
        text += f"\n## {f'[{prefix}]' if prefix else 'At the top'}\n\n{inspect.cleandoc(section.__doc__ or '')}\n\n"
        text += table(("key", "default", "values", "what it is"), rows)
    return text


def recipe_value(value: Any) -> str:
    """A default as TOML has it."""
    return "none" if value is None else json.dumps(value)


def kinds(annotation: Any) -> tuple[Any, ...]:
    """The parts of a union, or the one type that there is."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def values_of(annotation: Any) -> list[str]:
    """What a key may be, part by part; that it may be left out goes without saying."""
    words = {str: "text", int: "integer", float: "number", bool: "true or false", Path: "path"}
    found: list[str] = []
    for kind in kinds(annotation):
        if get_origin(kind) is Literal:
            found += [f"`{json.dumps(value)}`" for value in get_args(kind)]
        elif get_origin(kind) is tuple:
            inner = [word for part in get_args(kind) if part is not ... for word in values_of(part)]
            found.append(f"list of {' or '.join(dict.fromkeys(inner))}")
        elif kind is not type(None):
            found.append(words[get_args(kind)[0] if get_origin(kind) is Annotated else kind])
    return found


def limits(info: Any) -> list[str]:
    """The range of a number."""
    signs = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    return [
        f"{said} {getattr(m, sign)}"
        for m in info.metadata
        for sign, said in signs.items()
        if hasattr(m, sign)
    ]


def sections(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """A section of a recipe and those in it, each with the name of its TOML table."""
    yield prefix, section
    for name, info in section.model_fields.items():
        for kind in kinds(info.annotation):
            if inspect.isclass(kind) and issubclass(kind, BaseModel):
                yield from sections(kind, f"{prefix}.{name}".lstrip("."))


def api() -> Iterator[tuple[str, str]]:
    """Pages in reStructuredText, as docstrings are: the package, each wing, each module."""
    root = sorted(f.stem for f in PACKAGE.glob("[a-z]*.py") if f.stem not in ("cli", "studies"))
    for wing in WINGS:
        modules = sorted(file.stem for file in (PACKAGE / wing).glob("[a-z]*.py"))
        yield from (module_page(f"triewise.{wing}.{name}") for name in modules)
        yield f"api/{wing}/index.rst", package_page(f"triewise.{wing}", modules)
    yield from (module_page(f"triewise.{name}") for name in root)
    yield "api/index.rst", package_page("triewise", [*(f"{wing} <{wing}/index>" for wing in WINGS), *root])


def module_page(module: str) -> tuple[str, str]:
    """A page with all public names of a module."""
    place = module.split(".", 1)[1].replace(".", "/")
    return f"api/{place}.rst", f"{headed(module)}.. automodule:: {module}\n"


def package_page(package: str, modules: Iterable[str]) -> str:
    """A page with the names behind a door, and the modules."""
    text = f"{headed(package)}.. automodule:: {package}\n   :no-members:\n\n"
    text += (
        f"What may be relied on, as ``from {package} import ...``:\n\n.. list-table::\n   :widths: 30 70\n\n"
    )
    for name, module, there in door(package):
        module = getattr(
            getattr(importlib.import_module(module), there), "__module__", module
        )  # where it is defined
        source = ast.parse(
            ROOT.joinpath("src", *module.split(".")).with_suffix(".py").read_text(encoding="utf-8")
        )
        defined = [node for node in source.body if getattr(node, "name", "") == there]
        first = (ast.get_docstring(defined[0]) or "").split("\n\n")[0].replace("\n", " ")  # type: ignore[arg-type]
        text += f"   * - :py:obj:`{name} <{module}.{there}>`\n     - {first}\n"
    return f"{text}\n.. toctree::\n   :caption: Modules\n   :maxdepth: 1\n\n" + "".join(
        f"   {name}\n" if ">" in name else f"   {name} <{name}>\n" for name in modules
    )


def door(package: str) -> list[tuple[str, str, str]]:
    """What a door promises: a name, the module it is from, and its name there."""
    stub = ast.parse(
        ROOT.joinpath("src", *package.split("."), "__init__.pyi").read_text(encoding="utf-8")
    ).body
    promised = next(ast.literal_eval(node.value) for node in stub if isinstance(node, ast.Assign))
    return sorted(
        (alias.asname or alias.name, f"{package}.{node.module}", alias.name)
        for node in stub
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if (alias.asname or alias.name) in promised
    )


def headed(title: str) -> str:
    """A heading."""
    return f"{title}\n{'=' * len(title)}\n\n"


def write(folder: Path) -> None:
    """Write all pages into a folder, and take out those that are no more."""
    made = {folder / place: text for place, text in pages()}
    for path in {*folder.rglob("*.md"), *folder.rglob("*.rst")} - set(made):
        path.unlink()
    for path, text in made.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
