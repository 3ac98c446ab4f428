"""Every family of language models: none silently wrong, none a traceback.

What is asked stands in `tests/family_checks.py`; the table of all answers is docs/models.md. The fast tier has one
family of each kind and asks it what its kind is about; the slow one asks every family everything. Cells of
`KNOWN_FAULTS` have to fail until they are mended.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.family_checks import (
    CASES,
    COLUMNS,
    DTYPES,
    LONG,
    ROWS,
    SPEAKS_OF,
    Cell,
    check,
    check_case,
    check_refused,
    dataset,
)
from tests.model_families import FAMILIES, KNOWN_FAULTS, REFUSED, TITLES, build, family, tokenizer
from triewise.data import Dataset

FAST: dict[tuple[str, str], Sequence[str]] = {
    ("llama", "float32"): COLUMNS,
    ("llama", "bfloat16"): ("load", "path", "exact"),
    ("deepseek_v4", "float32"): ("lora",),
    ("gpt2", "float32"): ("path", "packing"),
    ("mixtral", "float32"): ("path", "packing", "lora"),
    ("mistral_window", "float32"): ("path", "beams", "exact", "packing"),
    ("gpt_neo", "float32"): ("path", "packing"),
    ("gemma2", "float32"): ("path", "packing"),
    ("mpt", "float32"): ("path", "packing"),
    ("mpt", "bfloat16"): ("path",),
    ("mamba", "bfloat16"): ("path",),
    ("lfm2", "float32"): ("path", "packing"),
    ("deepseek_v2", "float32"): ("path", "lora"),
    ("phi3_longrope", "float32"): ("path", "packing"),
    ("llama_dynamic", "float32"): ("path", "beams", "exact", "packing"),
}
EVERY = [(name, dtype) for name in FAMILIES for dtype in DTYPES]
_known: dict[tuple[str, str], dict[str, Cell]] = {}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return dataset(tmp_path_factory.mktemp("families") / "data")


def cells(name: str, dtype: str, columns: Sequence[str], data: Dataset, scratch: Path) -> dict[str, Cell]:
    """Cells of a family, each column asked once in a run of the tests."""
    found = _known.setdefault((name, dtype), {})
    missing = [column for column in columns if column not in found]
    if missing:
        found |= check(name, dtype, data, scratch / "work", missing)
    return {column: found[column] for column in columns}


def unexpected(name: str, dtype: str, found: dict[str, Cell]) -> dict[str, str]:
    """Faults that are not known, and what an ordinary family is not to be refused."""
    return {
        column: str(cell)
        for column, cell in found.items()
        if (name, dtype, column) not in KNOWN_FAULTS
        and (
            cell.fault
            or (cell.text.startswith("refused") and column != "lora" and family(name).kind != "length")
        )
    }


@pytest.mark.parametrize(("name", "dtype"), FAST)
def test_one_family_of_each_kind(name: str, dtype: str, data: Dataset, tmp_path: Path) -> None:
    assert not unexpected(name, dtype, cells(name, dtype, FAST[name, dtype], data, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), EVERY)
def test_every_family(name: str, dtype: str, data: Dataset, tmp_path: Path) -> None:
    assert not unexpected(name, dtype, cells(name, dtype, COLUMNS, data, tmp_path))


@pytest.mark.parametrize(
    ("name", "dtype", "column"),
    [
        pytest.param(
            *key,
            marks=[
                pytest.mark.xfail(strict=True, reason=code),
                *([] if key[2] in FAST.get(key[:2], ()) else [pytest.mark.slow]),
            ],
        )
        for key, code in KNOWN_FAULTS.items()
        if key[0] in FAMILIES
    ],
)
def test_a_known_fault_is_still_there(
    name: str, dtype: str, column: str, data: Dataset, tmp_path: Path
) -> None:
    columns = FAST.get((name, dtype), ())
    found = cells(name, dtype, columns if column in columns else COLUMNS, data, tmp_path)
    assert not found[column].fault, str(found[column])


def outcomes(names: Iterable[str], kind: str) -> list[Any]:
    """Names as parameters; those of known faults have to fail."""
    known = {name: KNOWN_FAULTS.get((name, kind, "outcome")) for name in names}
    return [
        pytest.param(name, marks=[pytest.mark.xfail(strict=True, reason=code)] if code else [])
        for name, code in known.items()
    ]


@pytest.mark.parametrize("name", outcomes(REFUSED, "any"))
def test_what_must_be_refused_is_refused_in_one_line(name: str, data: Dataset, tmp_path: Path) -> None:
    """Or gives what the reference gives: positions that prompts were cut for are no reason to refuse."""
    found = check_refused(name, data, tmp_path / "work")
    assert not found.fault, str(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", outcomes(CASES, "case"))
def test_one_thing_each(name: str, tmp_path: Path) -> None:
    found = check_case(name, tmp_path / "work")
    assert not found.fault, str(found)


def test_the_tiny_models_cross_what_their_families_are_about() -> None:
    """The longest prompt is longer than every narrow window, table and limit of RoPE, and shorter than wide ones."""
    lengths = {
        kind: [len(tokenizer(kind)(title)["input_ids"]) for title in TITLES] for kind in ("bytes", "pieces")
    }
    for of_title in lengths.values():
        longest = sum(of_title[i] + 1 for i in LONG)
        assert 64 < 96 < longest < 512
        assert sum(of_title[i] + 1 for i in ROWS[-1]) < 32
    assert {family(name).kind for name, _ in FAST} == {made.kind for made in FAMILIES.values()}
    assert set(SPEAKS_OF) == set(REFUSED)


def test_a_seed_makes_the_same_model() -> None:
    first, again, other = (build("llama", seed) for seed in (0, 0, 1))
    weights = [dict(model.named_parameters()) for model in (first, again, other)]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    assert not weights[0]["lm_head.weight"].equal(weights[2]["lm_head.weight"])


def test_the_table_names_every_family_and_every_known_fault() -> None:
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)`", text, flags=re.MULTILINE)
    assert {name: rows.count(name) for name in rows} == dict.fromkeys(FAMILIES, 2) | dict.fromkeys(REFUSED, 1)
    assert "new:" not in text
    for code in set(KNOWN_FAULTS.values()):
        assert re.search(rf"^\| {code} \|", text, flags=re.MULTILINE), code
