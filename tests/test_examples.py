"""Each file in examples/ runs, on a CPU and without a network, and prints what it is for."""

from __future__ import annotations

import ast
import functools
import importlib
import re
import runpy
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
PRINTED = {  # a line of each, as a regular expression
    "a_model_over_item_ids": r"saved, loaded, and the same: True",
    "assistant": r"chosen a = \S+; HR@1 0\.\d+ on test rows, alone 0\.\d+",
    "exact_or_beams": r"exact +misses +0 of 240, certified for 24 of 24 users",
    "filters": r"    items \[\[\d+, \d+, -1\], \[\d+, \d+, -1\]\]",
    "msl_igd_lml": r"MSL - LML: NDCG@10 \+0\.\d+ \(\+0\.\d+ to \+0\.\d+\), p = 0\.\d+",
    "quickstart": r"    Coffee filter, paper  \(log-probability -\d\.\d+\)",
    "serve": r"version 1: \[.*'Tent, 4 persons'.*\]\nand back, version 2",
    "shop": r"    p0,\"Coffee beans, dark roast\"",
    "tokens_and_tree": r"    MSL \[0\.0, \d\.\d+, \d\.\d+, 0\.0\]",
    "what_decided": r"1\. [\d.]+%  \[Sleeping\] bag,\[ [sw]\](ummer|inter)",
    "your_own_model": r"an adapter of rank 4 on .+",
    "your_own_recommender": r"broken promises: none",
}


def test_every_example_is_run() -> None:
    assert {file.stem for file in EXAMPLES.glob("*.py")} == set(PRINTED)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """What the examples import; the same recipe with the same changes is trained once for all of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("examples")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        module = importlib.import_module("shop")
        patch.setattr(module, "trained", functools.cache(module.trained))
        yield module
        del sys.modules["shop"]


@pytest.mark.parametrize("name", PRINTED)
def test_an_example_prints_what_it_is_for(
    name: str, shop: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert re.search(PRINTED[name], capsys.readouterr().out)


@pytest.mark.parametrize("name", PRINTED)
def test_an_example_is_short_and_says_what_it_shows(name: str) -> None:
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert 15 <= len(source.splitlines()) <= 60
    first, _, rest = (ast.get_docstring(ast.parse(source)) or "").partition("\n")
    assert first.endswith((".", ",")) or rest
