"""Files are whole or absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from triewise.errors import UserError
from triewise.files import atomic_folder, atomic_path, read_json, sha256_file, write_json


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"x": 1})
    with pytest.raises(RuntimeError), atomic_path(file) as temporary:
        temporary.write_text("half", encoding="utf-8")
        raise RuntimeError
    assert read_json(file) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_failed_folder_leaves_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    with atomic_folder(folder) as temporary:
        (temporary / "one").write_text("1", encoding="utf-8")
    with pytest.raises(RuntimeError), atomic_folder(folder) as temporary:
        (temporary / "two").write_text("2", encoding="utf-8")
        raise RuntimeError
    assert [p.name for p in folder.iterdir()] == ["one"]
    with atomic_folder(folder) as temporary:
        (temporary / "three").write_text("3", encoding="utf-8")
    assert [p.name for p in folder.iterdir()] == ["three"]
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_a_kill_between_the_two_renames_is_mended_by_the_next_write(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    (tmp_path / ".tmp-d.old").mkdir()
    (tmp_path / ".tmp-d.old" / "one").write_text("1", encoding="utf-8")
    with pytest.raises(RuntimeError), atomic_folder(folder):
        raise RuntimeError
    assert [p.name for p in folder.iterdir()] == ["one"]


def test_json_is_strict(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    with pytest.raises(UserError, match="does not exist"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_bytes(b"{\xff")
    with pytest.raises(UserError, match="wanted UTF-8 JSON"):
        read_json(tmp_path / "a.json")


def test_sha256_of_known_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a").startswith("ba7816bf8f01cfea")
