"""What comes from strangers: the OpenAPI document against the service, bodies of all kinds, and memory."""

from __future__ import annotations

import asyncio
import gc
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings

from tests.serving.served import Served, served
from triewise.serving import Limits
from triewise.serving.service import document

DOCUMENT = Path(__file__).parents[2] / "docs" / "openapi.json"
PATHS = ("/v1/recommend", "/v1/score", "/v1/catalog")
schema = schemathesis.openapi.from_dict(document())
FAST = settings(
    max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
)
SLOW = settings(FAST, max_examples=200)


@pytest.fixture(scope="module")
def one() -> Iterator[Served]:
    with served(limits=Limits(wait_ms=0)) as found:
        yield found


def test_the_document_is_what_the_code_makes() -> None:
    made = json.dumps(document(), indent=1, ensure_ascii=False) + "\n"
    assert DOCUMENT.read_text(encoding="utf-8") == made, (
        "write it anew: python -c 'import json; from triewise.serving.service import document; "
        "print(json.dumps(document(), indent=1, ensure_ascii=False))' > docs/openapi.json"
    )


def check(one: Served, case: Any) -> None:
    """No 5xx, and a JSON error of the contract where it is refused."""
    request = case.as_transport_kwargs(base_url="http://served")
    body = {"json": request["json"]} if "json" in request else {"content": request.get("data")}
    path = request["url"].removeprefix("http://served")
    response = one(
        request["method"], path, params=request.get("params"), headers=dict(request["headers"]), **body
    )
    assert response.status_code < 500 or path == "/health/ready", response.text
    assert response.status_code < 400 or set(response.json()["error"]) == {"code", "message"}


@schema.parametrize()
@FAST
def test_the_document_holds(one: Served, case: Any) -> None:
    check(one, case)


@pytest.mark.slow
@schema.parametrize()
@SLOW
def test_the_document_holds_for_long(one: Served, case: Any) -> None:
    check(one, case)


def value(rng: random.Random, depth: int = 0) -> Any:
    """Any JSON value, most often such as the service knows."""
    kind = rng.randrange(12)
    if kind < 4 and depth < 4:
        names = [
            "histories",
            "titles",
            "ids",
            "k",
            "search",
            "exclude",
            "allow",
            "candidates",
            "add",
            "remove",
            "id",
            "x",
        ]
        return {rng.choice(names): value(rng, depth + 1) for _ in range(rng.randrange(5))}
    if kind < 6 and depth < 4:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    simple: list[Any] = [
        None,
        True,
        0,
        -1,
        3,
        1e308,
        float("nan"),
        2**70,
        "",
        "raw-1",
        "reds",
        "exact",
        "\u202e\x00🎬",
    ]
    return rng.choice([*simple, "Red Sun one", "\ud800", "x" * rng.randrange(3000)])


def body(rng: random.Random) -> bytes:
    """A body: well-formed, nearly so, or noise."""
    good = {"histories": [{"titles": ["Red Sun one"]}], "k": 3, "exclude": ["raw-2"], "explain": True}
    for name in rng.sample(list(good), rng.randrange(3)):
        good[name] = value(rng)
    text = bytearray(json.dumps(good if rng.random() < 0.7 else value(rng)).encode())
    for _ in range(rng.choice([0, 0, 0, 1, 30])):
        place = rng.randrange(len(text) + 1)
        text[place : place + rng.randrange(3)] = rng.choice([b"", b"\xff", b"{", b'"', b"[" * 500, b"\\u"])
    return bytes(text)


def fuzz(one: Served, n: int, seed: int) -> dict[int, int]:
    """How often each status came."""
    rng, found = random.Random(seed), dict[int, int]()

    async def ask(client: httpx.AsyncClient) -> None:
        for _ in range(n):
            path, kind = rng.choice(PATHS), rng.choice(["application/json"] * 5 + ["text/plain", "x"])
            content = body(rng)
            response = await client.post(path, content=content, headers={"content-type": kind})
            assert response.status_code in (200, 413, 422), (content, response.text)
            assert (
                "Traceback" not in response.text and "error" in response.json()
            ) or response.status_code == 200
            found[response.status_code] = found.get(response.status_code, 0) + 1

    one.many(ask)
    assert not any("traceback" in line for line in one.lines)
    return found


def test_hundreds_of_bodies(one: Served) -> None:
    found = fuzz(one, 300, seed=1)
    assert found[200] > 10 and found[422] > 100


@pytest.mark.slow
def test_ten_thousand_bodies(one: Served) -> None:
    fuzz(one, 10_000, seed=2)


def resident() -> int:
    """Bytes of this process."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="/proc says how much memory a process has")
def test_memory_does_not_grow(one: Served) -> None:
    rng = random.Random(3)

    def load(n: int) -> int:
        async def ask(client: httpx.AsyncClient) -> None:
            for _ in range(n // 20):
                ids = [[f"raw-{rng.randrange(25)}" for _ in range(rng.randrange(6))] for _ in range(20)]
                asked = (
                    client.post("/v1/recommend", json={"histories": [{"ids": one}], "k": 3}) for one in ids
                )
                assert {response.status_code for response in await asyncio.gather(*asked)} == {200}

        one.many(ask)
        one.lines.clear()
        return resident()

    before = load(2000)
    assert load(8000) < 1.1 * before
