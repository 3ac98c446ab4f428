"""Files of the hub: checked, resumed, and what is said when they do not come; nothing here makes a connection."""

from __future__ import annotations

import hashlib
import io
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from triewise.cli import main
from triewise.data.fetch_amazon import CATEGORIES, HubFile, fetch_category
from triewise.errors import UserError

CONTENT = {
    "Gift_Cards.csv": b"user_id,parent_asin\n" * 100,
    "meta_Gift_Cards.jsonl": b'{"parent_asin": "B"}\n' * 50,
}


class Answer(io.BytesIO):
    status = 200


class Hub:
    """Answers as the hub does; ``stops`` cuts answers after so many bytes."""

    def __init__(self, resumes: bool = True) -> None:
        self.asked: list[tuple[str, str]] = []
        self.stops: int | None = None
        self.resumes = resumes

    def open(self, request: urllib.request.Request, timeout: float) -> Answer:
        name = request.full_url.rsplit("/", 1)[1]
        span = str(request.get_header("Range"))
        self.asked.append((name, span))
        start = int(span.removeprefix("bytes=").removesuffix("-")) if self.resumes else 0
        answer = Answer(CONTENT[name][start:][: self.stops])
        answer.status = 206 if self.resumes else 200
        return answer


@pytest.fixture(params=[True, False])
def hub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(request.param)
    monkeypatch.delenv("TRIEWISE_OFFLINE", raising=False)
    monkeypatch.setattr(urllib.request, "urlopen", made.open)
    known = tuple(HubFile(len(text), hashlib.sha256(text).hexdigest()) for text in CONTENT.values())
    monkeypatch.setitem(CATEGORIES, "Gift_Cards", known)
    return made


def test_both_files_are_fetched_once(tmp_path: Path, hub: Hub) -> None:
    for _ in range(2):
        folder = fetch_category("Gift_Cards", tmp_path / "in")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == CONTENT
    assert [name for name, _ in hub.asked] == list(CONTENT)


def test_a_download_that_stopped_goes_on(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.stops = 500
    with pytest.raises(
        UserError, match=r"wanted 2,000 bytes of .*Gift_Cards.csv, got 500 \(the connection ended\); run"
    ):
        fetch_category("Gift_Cards", tmp_path)
    assert not (tmp_path / "Gift_Cards.csv").exists()
    hub.stops = None
    fetch_category("Gift_Cards", tmp_path)
    assert hub.asked[1] == ("Gift_Cards.csv", "bytes=500-")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == CONTENT


def test_other_bytes_are_refused_and_not_kept(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CATEGORIES, "Gift_Cards", (HubFile(2_000, "0" * 64), CATEGORIES["Gift_Cards"][1]))
    with pytest.raises(
        UserError, match="wanted 2,000 bytes with sha256 000.* got 2,000 with .*; try again later"
    ):
        fetch_category("Gift_Cards", tmp_path)
    assert not list(tmp_path.iterdir())


def test_no_connection(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> Any:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    with pytest.raises(
        UserError, match=r"got 0 \(Name or service not known\); run it again to go on from there, or"
    ):
        fetch_category("Gift_Cards", tmp_path)
    monkeypatch.setenv("TRIEWISE_OFFLINE", "1")
    with pytest.raises(
        UserError, match="TRIEWISE_OFFLINE=1 forbids connections; download https://.* to .*.csv"
    ):
        fetch_category("Gift_Cards", tmp_path)


def test_an_unknown_category(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"whose files are known \(Books, .*\), got 'Shoes'; choose one of them, or"
    ):
        fetch_category("Shoes", tmp_path)


def test_the_command_says_what_comes_next(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["triewise", "fetch", "Gift_Cards", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    assert "triewise prepare amazon:" in capsys.readouterr().out
