"""Records a line: JSON and Python literals, in pieces, and what is said of a line that is neither."""

from __future__ import annotations

import gzip
from pathlib import Path

import polars as pl
import pytest

from triewise.data import lines
from triewise.data.lines import keys_of, record_table
from triewise.errors import UserError

JSON = '{"asin": "1", "title": "A \\u00e9"}\n\n{"asin": 2, "x": NaN, "title": null}\n{"asin": "3"}'
LITERALS = "{u'asin': u'1', 'title': \"A é\"}\n\n{'asin': 2, 'x': True}\n{'asin': '3', 'title': None}\n"


def read(path: Path) -> list[tuple[str | None, ...]]:
    return record_table(path, "asin", "title").collect(pl.all()).rows()


@pytest.mark.parametrize("text", [JSON, LITERALS, "\ufeff" + LITERALS, JSON.replace("\n", "\r\n")])
@pytest.mark.parametrize("packed", [False, True])
def test_json_and_literals_give_the_same_records(tmp_path: Path, text: str, packed: bool) -> None:
    path = tmp_path / "meta.json"
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    assert read(path) == [("1", "A é"), ("2", None), ("3", None)]
    assert keys_of(path) >= {"asin", "title"}


def test_pieces_end_where_lines_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "meta.json"
    path.write_text(
        "".join(f'{{"asin": "{number}", "title": "{"t" * (number % 9)}"}}\n' for number in range(50))
    )
    for size in (1, 7, 40, 1000):
        monkeypatch.setattr(lines, "_PIECE", size)
        assert [asin for asin, _ in read(path)] == [str(number) for number in range(50)]


def test_large_files_say_how_far_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "meta.json.gz"
    path.write_bytes(gzip.compress(JSON.encode()))
    monkeypatch.setattr(lines, "_LARGE", 0)
    read(path)
    assert "reading meta.json.gz: 0 MB" in capsys.readouterr().err


def test_backslashes_that_escape_nothing_stay_without_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "meta.json"
    path.write_text("{'asin': '1', 'title': 'a\\d'}\n", encoding="utf-8")
    assert read(path) == [("1", "a\\d")]


def test_literals_are_never_evaluated(tmp_path: Path) -> None:
    path = tmp_path / "meta.json"
    path.write_text("{'asin': __import__('os').getcwd()}\n", encoding="utf-8")
    with pytest.raises(UserError, match="line 1: wanted a JSON object or a Python literal"):
        read(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"asin": "4", "tit',
            "line 4: wanted a JSON object or a Python literal such as .*; repair the line or download",
        ),
        ("[1, 2]", "line 4: wanted a JSON object"),
        ("{'asin': " + "(" * 5000, "line 4: wanted a JSON object"),
        ("{'asin': ['4']}", r"line 4: wanted text or a number as asin, got \['4'\]; repair the line"),
        ("{'asin': True}", "line 4: wanted text or a number as asin, got True"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "meta.json"
    path.write_text(f"{JSON[: JSON.rindex(chr(10))]}\n{line}\n", encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read(path)


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_no_record_at_all(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "meta.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match="wanted a record on each line of .*meta.json, found none"):
        read(path)


def test_a_gzip_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "meta.json.gz"
    path.write_bytes(gzip.compress(JSON.encode() * 100)[:-20])
    with pytest.raises(UserError, match="cannot read .*meta.json.gz: .*; copy or download it again"):
        read(path)
