"""Reading raw files: every line a user can get."""

from __future__ import annotations

import gzip
from pathlib import Path

import polars as pl
import pytest

from tests.data_fixtures import write_csv
from triewise.data.tables import ROW, find_file, integers, read_rows
from triewise.errors import UserError

# --- files ------------------------------------------------------------------------------------------------------------


def test_files_may_be_gzip_under_either_name(tmp_path: Path) -> None:
    content = "﻿a,b\n1,x\n".encode()
    (tmp_path / "plain.csv").write_bytes(content)
    (tmp_path / "packed.csv.gz").write_bytes(gzip.compress(content))
    (tmp_path / "hidden.csv").write_bytes(gzip.compress(content))
    for name in ("plain.csv", "packed.csv", "hidden.csv"):
        assert read_rows(find_file(tmp_path, name), ["a"], {}).rows() == [(1, "1")]


def test_missing_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"wanted the folder .*nowhere, which does not exist; check the path"):
        find_file(tmp_path / "nowhere", "train.csv")
    with pytest.raises(UserError, match=r"wanted the file train.csv in .*, found nothing; add it"):
        find_file(tmp_path, "train.csv")
    (tmp_path / "training.csv").write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match=r"wanted the file train.csv in .*, found training.csv; add it"):
        find_file(tmp_path, "train.csv")
    with pytest.raises(UserError, match=r"wanted the folder .*training.csv, which is a file; check the path"):
        find_file(tmp_path / "training.csv", "train.csv")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "which is empty; copy or download it again"),
        (b"a,b\n", "wanted rows in .*, found only a header"),
        (b"\n\n", "wanted rows in .*, which is empty; copy"),
        (b"a,b\n,\n,\n", "wanted rows in .*, found only a header"),
        (b"x,b\n1,2\n", "wanted the column a in .*, found x, b; rename or add it"),
        (b"a,b\n1,2\n3\n", "row 2: wanted a value in column b, got an empty cell; fill it in"),
        (b'a,b\n1,2\n"",4\n', "row 2: wanted a value in column a, got an empty cell"),
        (b"a,b\n1,2,3\n", "line 2: wanted 2 cells, got 3, the last '3'; put a cell"),
        (b'a,b\n1,"2\n', "line 2: wanted quotes around whole cells .*, got '1,\"2'; repair"),
        (
            gzip.compress(b"a,b\n1,2\n" * 1000, mtime=0)[:-30],
            "cannot read .*: Compressed file ended before .*; copy",
        ),
        (
            gzip.compress(b"a,b\n1,2\n", mtime=0)[:-4] + b"\0\0\0\0",
            "cannot read .*: Incorrect length of data",
        ),
        (b"\x1f\x8bno gzip", "cannot read .*; copy or download it again"),
    ],
)
def test_broken_files_are_one_clear_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "train.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_rows(path, ["a", "b"], {})
    assert "\n" not in str(caught.value)
    assert "train.csv" in str(caught.value)
    assert path.read_bytes() == content


def test_blank_lines_are_left_out_and_counted(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"a,b\r\n1,2\r\n\r\n3,4\r\n\r\n")
    repairs: dict[str, int] = {}
    assert read_rows(tmp_path / "t.csv", ["a", "b"], repairs).rows() == [(1, "1", "2"), (3, "3", "4")]
    assert repairs == {"blank_rows": 2}


def test_text_that_looks_like_nothing_stays_text(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", ["a"], [["None"], ["NA"], ["null"], ["nan"], ["x\ny"]])
    assert read_rows(path, ["a"], {})["a"].to_list() == ["None", "NA", "null", "nan", "x\ny"]


# --- cells ------------------------------------------------------------------------------------------------------------


def cells(*values: str) -> pl.DataFrame:
    return pl.DataFrame({ROW: range(1, len(values) + 1), "x": values})


def test_whole_numbers_may_be_written_as_floats() -> None:
    assert integers(cells("5", " -6 ", "7.0", "8."), "x", Path("f")).tolist() == [5, -6, 7, 8]


@pytest.mark.parametrize("cell", ["1.5", "1e9", "nan", "x", "1 2", str(10**30)])
def test_other_numbers_name_their_row(cell: str) -> None:
    with pytest.raises(UserError, match=r"f.csv, row 2: wanted a whole number in column x, got"):
        integers(cells("5", cell), "x", Path("f.csv"))
