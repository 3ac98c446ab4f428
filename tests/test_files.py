"""Files are whole or absent."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import pytest

from triewise.errors import UserError
from triewise.files import (
    atomic_files,
    atomic_folder,
    atomic_path,
    check_files,
    file_hashes,
    read_json,
    remove,
    sha256_file,
    write_json,
    write_text,
    writes,
)


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


def test_of_several_files_the_old_stay_till_the_new_are_written(tmp_path: Path) -> None:
    def write(text: str, fail: bool = False) -> None:
        with atomic_files(tmp_path / "run", last="all.json") as place:
            (place / "model").mkdir()
            write_text(place / "model" / text, text)
            write_text(place / "all.json", text)
            if fail:
                raise RuntimeError

    def names() -> list[str]:
        return sorted(p.relative_to(tmp_path / "run").as_posix() for p in (tmp_path / "run").rglob("*"))

    write("one")
    assert names() == ["all.json", "model", "model/one"]
    with pytest.raises(RuntimeError):
        write("two", fail=True)
    assert names() == ["all.json", "model", "model/one"]
    write("two")
    assert names() == ["all.json", "model", "model/two"]


def test_links_are_followed(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    (disk / "run" / "model").mkdir(parents=True)
    (disk / "notes").write_text("old", encoding="utf-8")
    for name in ("run", "notes"):
        (tmp_path / name).symlink_to(disk / name)
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "model").symlink_to(disk / "run" / "model")
    (tmp_path / "parts" / "notes").symlink_to(disk / "notes")
    with atomic_folder(tmp_path / "run" / "model") as folder:
        write_text(folder / "w", "1")
    write_text(tmp_path / "notes", "new")
    assert (disk / "notes").read_text("utf-8") == "new"
    with atomic_files(tmp_path / "parts", last="z") as place:
        (place / "model").mkdir()
        write_text(place / "model" / "w", "2")
        write_text(place / "notes", "newer")
        write_text(place / "z", "")
    assert (disk / "notes").read_text("utf-8") == "newer"
    assert (disk / "run" / "model" / "w").read_text("utf-8") == "2"
    with atomic_folder(tmp_path / "run") as folder:
        write_text(folder / "w", "3")
    assert [p.name for p in (disk / "run").iterdir()] == ["w"]
    links = [tmp_path / "run", tmp_path / "notes", *(tmp_path / "parts" / n for n in ("model", "notes"))]
    assert all(path.is_symlink() for path in links)
    assert not list(tmp_path.rglob(".tmp-*"))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError("64 requested and 12 written"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
        RuntimeError("basic_ios::clear: iostream error"),
        ValueError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_names_the_path(tmp_path: Path, error: Exception) -> None:
    told = f"cannot write {re.escape(str(tmp_path))}/{{}}: no space left; free some and go on with --resume"
    for write, name in ((atomic_path, "file"), (atomic_folder, "folder"), (writes, "log")):
        with pytest.raises(UserError, match=told.format(name)), write(tmp_path / name):
            raise error
    inside = pytest.raises(UserError, match=told.format("folder"))
    with inside, atomic_folder(tmp_path / "folder") as folder, atomic_path(folder / "inside"):
        raise error
    with pytest.raises(RuntimeError, match="of its own"), atomic_path(tmp_path / "file"):
        raise RuntimeError("of its own")


def test_a_sealed_file_tells_what_was_changed_in_it(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"x": 0.1, "y": (1, 2), "é": None}, sealed=True)
    assert read_json(file) == {"x": 0.1, "y": [1, 2], "é": None}
    text = file.read_text("utf-8")
    file.write_text(text.replace("\n", "\r\n"), "utf-8")
    assert read_json(file) == {"x": 0.1, "y": [1, 2], "é": None}, "however it is laid out"
    file.write_text(text.replace("0.1", "0.2"), "utf-8")
    with pytest.raises(
        UserError, match="a.json was changed after it was written .its seal does not hold.; restore"
    ):
        read_json(file)


def test_hashes_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_text(tmp_path / "model" / "w", "1")
    write_text(tmp_path / "trie", "2")
    hashes = file_hashes(tmp_path)
    assert list(hashes) == ["model/w", "trie"]
    check_files(tmp_path, hashes, "train again")
    for name, told in (
        ("trie", "trie is not the file that was written"),
        ("model/w", "model/w is not the file"),
    ):
        before = (tmp_path / name).read_text("utf-8")
        write_text(tmp_path / name, "3")
        with pytest.raises(UserError, match=told):
            check_files(tmp_path, hashes, "train again")
        (tmp_path / name).unlink()
        with pytest.raises(UserError, match=r"wanted .*, which is missing; train again"):
            check_files(tmp_path, hashes, "train again")
        write_text(tmp_path / name, before)
    write_text(tmp_path / "more", "4")
    (tmp_path / "model" / ".hidden").write_text("5", "utf-8")
    check_files(tmp_path, hashes, "train again")
    write_text(tmp_path / "model" / "more", "4")
    with pytest.raises(UserError, match="more was not written with the files beside it; remove it"):
        check_files(tmp_path, hashes, "train again")
    for _ in range(2):
        check_files(tmp_path, None, "train again")
    assert capsys.readouterr().err.count("was written before files were hashed") == 1


def test_a_folder_goes_whole_or_not_at_all(tmp_path: Path) -> None:
    for _ in range(2):
        write_text(tmp_path / "d" / "a", "1")
        remove(tmp_path / "d")
    assert not list(tmp_path.iterdir())
