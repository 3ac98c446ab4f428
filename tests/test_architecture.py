"""The order of the rooms, and what importing the package costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import triewise

PACKAGE = Path(triewise.__file__).parent
# Data flows from left to right; a room imports only rooms before it.
ORDER = """
    errors files progress recipe processes
    fetch hub tables interactions readers splits published catalog lint sources dataset
    prompts trie decisiveness
    examples cautions losses adapters backbones packing forward contrast preferences checkpoints course train
    ranking counting neighbours filters treecache engine growth search grounding card generative
    encoders sequential
    metrics evaluate choice analysis figures report terminal
    learners runs compare demo cli
""".split()  # noqa: SIM905


def internal_imports(file: Path) -> list[str]:
    """Rooms a module imports, wherever in the file."""
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    found = [
        n.module
        for n in nodes
        if isinstance(n, ast.ImportFrom) and n.module and n.module.startswith("triewise.")
    ]
    return [name.removeprefix("triewise.").partition(".")[0] for name in found]


def test_each_room_imports_only_rooms_before_it() -> None:
    rank = {name: i for i, name in enumerate(ORDER)}
    rooms = {file.stem: file for file in PACKAGE.glob("[a-z]*.py")}
    assert set(rooms) == set(rank), "every room has a place in the order"
    back = [
        (name, d) for name, file in rooms.items() for d in internal_imports(file) if rank[d] >= rank[name]
    ]
    assert not back, f"imports that flow uphill: {back}"


def test_importing_the_package_and_its_door_loads_no_torch() -> None:
    heavy = "{'torch', 'transformers', 'polars', 'matplotlib'}"
    code = f"import sys, triewise, triewise.cli; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_of_the_package() -> None:
    assert triewise.__all__ == ["UserError", "load"]
    assert all(hasattr(triewise, name) for name in triewise.__all__)
