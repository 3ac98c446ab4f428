"""The process that serves, over real sockets: rude clients, its end, its client, and what a mistake prints."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import worlds
from tests.serving.served import TITLES
from triewise.errors import UserError
from triewise.serving import in_background, named_sets, server
from triewise.serving.client import Client, ServiceError
from triewise.serving.guard import read_keys

KEY = "0123456789abcdef"


class Running:
    """The service in a thread of this process."""

    port: int

    def __init__(self, patch: pytest.MonkeyPatch, keys: Path) -> None:
        patch.setattr(server, "HEADER_SECONDS", 0.3)
        patch.setattr(server, "CONNECTIONS", 6)
        patch.setattr("triewise.serving.guard.BODY_SECONDS", 0.3)
        self.lines: list[Any] = []
        self.keys = keys

    @contextmanager
    def started(self) -> Iterator[Running]:
        recommender = worlds.recommender(TITLES, search="exact")
        with in_background(recommender, name="small", api_keys=self.keys, log=self.lines.append) as url:
            self.port = int(url.rpartition(":")[2])
            yield self

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def sends(self, data: bytes) -> bytes:
        """What comes back till the service closes."""
        with self.connect() as one:
            one.sendall(data)
            return rest(one)

    def client(self, **how: Any) -> Client:
        return Client(f"http://127.0.0.1:{self.port}", api_key=KEY, **how)


def rest(one: socket.socket) -> bytes:
    parts = []
    try:
        while part := one.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(KEY)
    with pytest.MonkeyPatch.context() as patch, Running(patch, keys).started() as one:
        yield one


def test_rude_clients_are_let_go_and_others_are_served(running: Running) -> None:
    begun = time.monotonic()
    assert running.sends(b"") == b"" and running.sends(b"GET / HT") == b""  # silent, and slow
    slow = running.sends(
        b"POST /v1/recommend HTTP/1.1\r\nhost: a\r\nx-api-key: %b\r\ncontent-length: 9\r\n\r\n{"
        % KEY.encode()
    )
    assert b"408" in slow and b'"code":"timeout"' in slow
    assert time.monotonic() - begun < 8
    flood = b"GET / HTTP/1.1\r\n" + b"".join(b"h%d: %b\r\n" % (i, b"x" * 100) for i in range(5000))
    assert b"200" not in running.sends(flood)[:20]
    assert b"413" in running.sends(
        b"POST /v1/recommend HTTP/1.1\r\nhost: a\r\nx-api-key: %b\r\ncontent-length: 99999999\r\n\r\n"
        % KEY.encode()
    )
    assert b"400" in running.sends(b"\x16\x03\x01\x00\xa5\x01\x00\x00")
    with running.connect() as half:
        half.sendall(b"GET /health/live HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        half.shutdown(socket.SHUT_WR)
        rest(half)
    many = [running.connect() for _ in range(12)]
    time.sleep(0.6)
    assert all(rest(one) == b"" for one in many)
    for one in many:
        one.close()
    with running.client() as client:
        assert client.recommend([["Red Sun one"]]).results[0].certified


def test_the_client(running: Running) -> None:
    with running.client() as client:
        assert client.ready() == () and client.models()[0]["id"] == "small"
        found = client.recommend(
            [["Red Sun one", "Nope"], []], 3, exclude=["raw-1", "what"], explain=True, compare=True
        )
        [first, _] = found.results
        assert first.unknown == ("Nope",) and found.unknown == ("what",) and first.certified and first.beam
        assert "".join(token.text for token in first.items[0].tokens) == first.items[0].title
        assert found.counters["users"] == 2 and found.catalog_version >= 0
        by_id = client.recommend([["raw-0"]], 3, by="id", exclude=["raw-1"], search="catalogue")
        assert [i.id for i in by_id.results[0].items] == [i.id for i in first.items]
        scored = client.score([["raw-0"]], [[i.id for i in first.items]], by="id").results[0]
        assert [i.score for i in scored.items] == pytest.approx([i.score for i in first.items], abs=1e-5)
        assert [i.title for i in client.catalog("green s", limit=2)] == ["Green Sun one", "Green Sun two"]
        with pytest.raises(ServiceError, match="422 invalid: wanted k of at most 1000") as refused:
            client.recommend([[]], 2000)
        assert refused.value.request_id
    with (
        Client(f"http://127.0.0.1:{running.port}") as stranger,
        pytest.raises(ServiceError, match="unauthorized"),
    ):
        stranger.recommend([[]])


def test_a_changed_catalogue_is_used_at_once(running: Running) -> None:
    with running.client() as client:
        before = client.catalog(limit=1000)
        version = client.change_catalog({"new-1": "Yellow Sun one"}, remove=["raw-0"])
        titles = [i.title for i in client.recommend([["Blue Sun one"]], 18).results[0].items]
        assert "Yellow Sun one" in titles and "Red Sun one" not in titles
        kept = client.recommend([["Red Sun one"]], 2)
        assert kept.catalog_version == version and not kept.results[0].unknown
        with pytest.raises(ServiceError, match="422 invalid: wanted ids of the catalogue"):
            client.change_catalog(remove=["raw-0"])
        assert client.rollback_catalog() > version and client.catalog(limit=1000) == before


def test_the_client_comes_again_and_knows_strangers() -> None:
    answers = [httpx.Response(503, headers={"retry-after": "0"}), httpx.Response(200, json={"data": []})]
    transport = httpx.MockTransport(lambda request: answers.pop(0))
    with Client(http=httpx.Client(transport=transport, base_url="http://a")) as client:
        assert client.models() == []
        answers.append(httpx.Response(502, text="<html>bad gateway"))
        with pytest.raises(ServiceError, match="502 unknown: <html>bad gateway"):
            client.models()
        for other in ({"error": "bad gateway"}, {"error": {"message": "bad"}}, ["bad"]):
            answers.append(httpx.Response(502, json=other))
            with pytest.raises(ServiceError, match="502 unknown: "):
                client.models()


def test_the_client_needs_httpx_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys; from triewise.serving.client import Client; Client(); print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(UserError, match=r"pip install 'triewise\[serve\]'"):
        Client()


def test_mistakes_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    recommender = worlds.recommender(TITLES)
    keys, ids = tmp_path / "keys", tmp_path / "ids"
    with pytest.raises(UserError, match="wanted a file of API keys"):
        read_keys(keys)
    keys.write_text("\n")
    with pytest.raises(UserError, match="of at least 16 characters in .*, got none"):
        read_keys(keys)
    keys.write_text(f"{KEY}\nshort\n")
    with pytest.raises(UserError, match="got a shorter one"):
        read_keys(keys)
    keys.write_text(f" {KEY} \n")
    assert read_keys(keys) == [KEY.encode()]
    ids.write_text("raw-1\nraw-2\n")
    assert named_sets([f"some={ids}"], recommender.catalog) == {"some": ["raw-1", "raw-2"]}
    with pytest.raises(UserError, match="wanted --items NAME=FILE"):
        named_sets(["some"], recommender.catalog)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="cannot listen on"):
        server.serve(recommender, port=taken.getsockname()[1])
    with pytest.raises(UserError, match=r"cannot listen on no\.such\.host"):
        server.serve(recommender, host="no.such.host")
    monkeypatch.setattr(server, "listening", lambda host, port: socket.create_server(("127.0.0.1", 0)))
    monkeypatch.setattr("gc.freeze", lambda: None)
    monkeypatch.setattr("sys.setswitchinterval", lambda seconds: None)
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: sockets[0].close())
    before = signal.getsignal(signal.SIGTERM)
    server.serve(recommender, host="0.0.0.0", port=0)
    signal.signal(signal.SIGTERM, before)
    assert "everybody who reaches 0.0.0.0 may ask" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="serving needs fastapi, uvicorn, prometheus_client"):
        server.serve(recommender)


@pytest.mark.slow
def test_the_command_serves_and_drains(tmp_path: Path) -> None:
    worlds.recommender(TITLES).save_pretrained(tmp_path / "run")
    command = [
        sys.executable,
        "-m",
        "triewise",
        "serve",
        str(tmp_path / "run"),
        "--port",
        "0",
        "--search",
        "exact",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        first = process.stderr.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+) answers", first)
        assert found, first
        with Client(f"http://127.0.0.1:{found[1]}") as client:
            assert client.recommend([["Red Sun one"]], 3).results[0].certified
        process.send_signal(signal.SIGTERM)
        lines = process.stderr.read().splitlines()
    assert process.returncode == 0 and json.loads(lines[0])["status"] == 200


def test_an_accepted_connection_sends_at_once() -> None:
    """Else the body of an answer waits for the acknowledgement of its head: 40 ms a request."""
    from triewise.serving.server import listening

    with listening("127.0.0.1", 0) as ours, socket.create_connection(ours.getsockname()):
        accepted, _ = ours.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
