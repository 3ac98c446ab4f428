"""Doors of packages: names that are imported when they are first asked for (PEP 562).

The stub ``__init__.pyi`` beside a package's ``__init__.py`` is the one list of its names, for type checkers and for
Python: ``from .trie import Trie as Trie``. ``__all__`` in it says which of them the world outside may rely on; the
others are for the wings below.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def door(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """What a package binds to ``__getattr__``, ``__dir__`` and ``__all__``.

    Args:
        package: Its ``__name__``.
        file: Its ``__file__``; the stub lies beside it.
    """
    stub = ast.parse(Path(file).with_suffix(".pyi").read_text(encoding="utf-8")).body
    places = {
        alias.asname or alias.name: (f"{package}.{node.module}", alias.name)
        for node in stub
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names
    }
    listed = next(ast.literal_eval(node.value) for node in stub if isinstance(node, ast.Assign))

    def find(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, there = places[name]
        found = getattr(importlib.import_module(module), there)
        setattr(sys.modules[package], name, found)  # so that it is looked up once
        return found

    return find, lambda: sorted({*vars(sys.modules[package]), *places}), listed
