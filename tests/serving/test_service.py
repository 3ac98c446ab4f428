"""The HTTP service: the contract of every route, who is refused, and that nothing leaks."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from tests import slot_worlds, worlds
from tests.serving.served import TITLES, Served, served
from triewise.models import SequentialModel
from triewise.ranking import Groups
from triewise.recommenders import SequentialRecommender
from triewise.serving import Limits, answer, batching, contract, server
from triewise.serving.guard import Refusal
from triewise.serving.service import create_app
from triewise.settings import EncoderSettings

KEY = b"0123456789abcdef-key"


@pytest.fixture(scope="module")
def one() -> Iterator[Served]:
    with served() as found:
        yield found


def ask(one: Served, **body: Any) -> dict[str, Any]:
    response = one("POST", "/v1/recommend", json=body)
    assert response.status_code == 200, response.text
    told: dict[str, Any] = response.json()
    contract.RecommendResponse.model_validate(told)
    return told


def refused(response: httpx.Response, status: int, code: str) -> str:
    assert response.status_code == status, response.text
    error = contract.ErrorBody.model_validate(response.json()).error
    assert error.code == code and "\n" not in error.message and "Traceback" not in response.text
    return error.message


def test_an_answer_is_that_of_recommend(one: Served) -> None:
    recommender = one.service.view.recommender
    told = ask(one, histories=[{"titles": ["Red Sun one", "Nope"]}, {"ids": ["raw-3", "raw-99"]}, {}], k=4)
    for result, (names, by) in zip(
        told["results"], [(["Red Sun one"], "title"), (["raw-3"], "id"), ([], "id")], strict=True
    ):
        [alone] = answer(recommender, [names], 4, by=by).of_each  # type: ignore[arg-type]
        assert [item["id"] for item in result["items"]] == [r.item_id for r in alone.recommendations]
        assert [item["title"] for item in result["items"]] == [r.title for r in alone.recommendations]
        np.testing.assert_allclose(
            [item["score"] for item in result["items"]], [r.score for r in alone.recommendations], atol=1e-5
        )
        assert result["certified"] is True
    assert [result["unknown"] for result in told["results"]] == [["Nope"], ["raw-99"], []]
    assert told["catalog_version"] == one.service.view.number and told["took_ms"] > 0
    assert told["counters"]["users"] == 3 and told["counters"]["token_forwards"] > 0
    assert "tokens" not in told["results"][0]["items"][0] and "beam" not in told["results"][0]


@pytest.mark.parametrize("search", [None, "exact", "beam", "catalogue"])
def test_searches_filters_and_sets(one: Served, search: str | None) -> None:
    history = {"ids": ["raw-0"]}
    told = ask(one, histories=[history], k=18, search=search)["results"][0]
    ids = {item["id"] for item in told["items"]}
    assert "raw-0" not in ids and (search == "beam" or len(ids) == 17)
    kept = ask(
        one, histories=[history], k=18, search=search, keep_history=True, allow=["raw-0", "raw-1", "no"]
    )
    assert {item["id"] for item in kept["results"][0]["items"]} == {"raw-0", "raw-1"}
    assert kept["unknown"] == ["no"]
    reds = ask(one, histories=[history], search=search, allow="reds", exclude=["raw-2", "what"])
    assert {item["id"] for item in reds["results"][0]["items"]} == {"raw-1", "raw-3", "raw-4", "raw-5"}
    assert reds["unknown"] == ["what"]
    without = ask(one, histories=[{}], k=18, search=search, exclude="reds")["results"][0]
    assert not {item["id"] for item in without["items"]} & {f"raw-{i}" for i in range(6)}
    nothing = ask(one, histories=[{}], search=search, allow=["no"])["results"][0]
    assert nothing["items"] == []


def test_what_is_excluded_is_read_once_a_request(one: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be 100,000 items for 100 histories; what belongs to each of them is the engine's work."""
    read, members = [], Groups.members

    def counted(groups: Groups, items: Any) -> Any:
        read.append((threading.current_thread().name, len(items)))
        return members(groups, items)

    monkeypatch.setattr(Groups, "members", counted)
    told = ask(one, histories=[{"ids": [f"raw-{i}"]} for i in range(9)], exclude="reds", k=18)
    assert [n for thread, n in read if thread != "engine"] == [6]
    for i, result in enumerate(told["results"]):
        assert {item["id"] for item in result["items"]} == {f"raw-{j}" for j in range(6, 18) if j != i}


def test_explained_and_compared(one: Served) -> None:
    told = ask(one, histories=[{"ids": ["raw-4"]}], k=3, explain=True, compare=True)["results"][0]
    for item in told["items"]:
        assert "".join(token["text"] for token in item["tokens"]) == item["title"]
        product = np.prod([token["probability"] for token in item["tokens"]])
        assert np.log(product) == pytest.approx(item["score"], abs=1e-4)
        assert any(token["decided"] for token in item["tokens"])
    beams = one.service.view.recommender.with_settings(search="beam", beams=10)
    [alone] = answer(beams, [["raw-4"]], 3, by="id").of_each
    assert told["beam"] == [r.item_id for r in alone.recommendations]


def test_scores(one: Served) -> None:
    body = {"histories": [{"ids": ["raw-1"]}, {}], "candidates": [["raw-2", "nope", "raw-5"]]}
    told = one("POST", "/v1/score", json=body).json()
    contract.ScoreResponse.model_validate(told)
    wanted = one.service.view.recommender.score([[1], []], [[2, 5], [2, 5]])
    assert [[s["id"] for s in result["scores"]] for result in told["results"]] == [["raw-2", "raw-5"]] * 2
    np.testing.assert_allclose(
        [[s["score"] for s in r["scores"]] for r in told["results"]], wanted, atol=1e-5
    )
    assert told["unknown"] == ["nope"]
    wrong = one("POST", "/v1/score", json={"histories": [{}], "candidates": [[], []]})
    assert "one for each of 1 histories" in refused(wrong, 422, "invalid")


def test_scores_are_bounded() -> None:
    with served(limits=Limits(max_k=5, max_histories=4)) as one:
        body = {"histories": [{}] * 2, "candidates": [["raw-0"] * 10]}
        assert one("POST", "/v1/score", json=body).status_code == 200
        body["candidates"][0].append("raw-0")  # type: ignore[arg-type]
        line = refused(one("POST", "/v1/score", json=body), 422, "invalid")
        assert line.startswith("wanted at most 20 scores, of all candidates of all histories, got 22;")


def test_models_and_the_catalogue(one: Served) -> None:
    [model] = contract.Models.model_validate(one("GET", "/v1/models").json()).data
    assert (model.id, model.kind, model.search, model.n_items) == ("small", "generative", "exact", 18)
    assert model.sets == ["reds"] and model.explains

    def ids(**query: Any) -> list[str]:
        page = contract.CatalogPage.model_validate(one("GET", "/v1/catalog", params=query).json())
        assert page.n_items == 18
        return [item.id for item in page.items]

    assert ids(limit=2, offset=17) == ["raw-17"] and len(ids()) == 18 and ids(offset=99) == []
    assert ids(starts="blue s") == ["raw-6", "raw-7", "raw-8"]
    assert ids(starts="MOON", limit=2) == ["raw-3", "raw-4"] and ids(starts="oon") == []
    assert ids(starts="!?") == ids()


def test_health_and_metrics(one: Served) -> None:
    assert one("GET", "/health/live").json()["status"] == "ok"
    assert one("GET", "/health/ready").json() == {"status": "ok", "reasons": []}
    ask(one, histories=[{}], allow=["no"])
    text = one("GET", "/metrics").text
    for line in (
        'triewise_results_total{certified="true"}',
        "triewise_empty_results_total",
        "triewise_batch_users_bucket",
        "triewise_queue_users 0.0",
        f"triewise_catalog_version {one.service.view.number}",
        'triewise_request_seconds_bucket{le="0.01",path="/v1/recommend"}',
        'triewise_requests_total{path="/v1/recommend",status="200"}',
    ):
        assert line in text
    one("GET", "/wp-admin/" + "x" * 50)
    assert "wp-admin" not in one("GET", "/metrics").text


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "JSON"),
        (b"[" * 100_000, ""),
        (b"\xff\xfe\x00", ""),
        (b'{"histories": [{"titles": ["\\ud800"]}]}', "titles"),
        (b'{"histories": []}', "histories"),
        (b'{"histories": [{}], "k": 0}', "k"),
        (b'{"histories": [{}], "k": 1001}', "wanted k of at most 1000, got 1001"),
        (b'{"histories": [{}], "k": NaN}', "k"),
        (b'{"histories": [{}], "k": 1e999}', "k"),
        (b'{"histories": [{}], "k": "3"}', "k"),
        (b'{"histories": [{}], "what": 1}', "what"),
        (b'{"histories": [{"ids": [], "titles": []}]}', "got both"),
        (b'{"histories": [{}], "search": "fast"}', "search"),
        (
            b'{"histories": [{}], "allow": "blues"}',
            r"wanted the name of a set (reds) or a list of ids, got 'blues'",
        ),
        (b'{"histories": [' + b",".join([b"{}"] * 101) + b"]}", "wanted at most 100 histories, got 101"),
        (b"", ""),
        (b"null", ""),
    ],
)
def test_mistakes_are_one_line(one: Served, body: bytes, said: str) -> None:
    response = one("POST", "/v1/recommend", content=body, headers={"content-type": "application/json"})
    assert said in refused(response, 422, "invalid")


def test_strange_texts_come_back_whole(one: Served) -> None:
    names = ["<img src=x onerror=alert(1)>", "\u202e", "a\nb", "x" * 100_000, "", "🎬"]
    told = ask(one, histories=[{"titles": names}])
    assert told["results"][0]["unknown"] == names


def test_paths_and_methods(one: Served) -> None:
    refused(one("GET", "/nothing"), 404, "not_found")
    refused(one("PUT", "/v1/recommend"), 405, "method_not_allowed")
    large = one("POST", "/v1/recommend", content=b" " * ((1 << 20) + 1))
    assert "at most 1048576 bytes" in refused(large, 413, "too_large")

    async def endless() -> Any:
        while True:
            yield b" " * 100_000

    refused(one("POST", "/v1/recommend", content=endless()), 413, "too_large")


def test_ids_of_requests_and_the_log(one: Served) -> None:
    given = one("GET", "/health/live", headers={"x-request-id": "mine-1"})
    assert given.headers["x-request-id"] == "mine-1"
    made = one(
        "POST", "/v1/recommend", json={"histories": [{"titles": ["secret"]}]}, headers={"x-request-id": "a b"}
    )
    assert made.headers["x-request-id"] == made.json()["request_id"] != "a b"
    assert made.headers["cache-control"] == "no-store"
    line = one.lines[-1]
    assert (
        line["request_id"] == made.json()["request_id"] and line["status"] == 200 and line["histories"] == 1
    )
    assert line["catalog_version"] == one.service.view.number and "secret" not in json.dumps(line)
    with served(titles=True) as other:
        ask(other, histories=[{"titles": ["secret"]}])
        assert other.lines[-1]["asked"] == [{"titles": ["secret"]}]


def test_keys() -> None:
    with served(keys=[KEY, b"another-key-of-16"]) as one:
        for how in (
            {},
            {"x-api-key": "wrong"},
            {"authorization": "Bearer wrong"},
            {"authorization": KEY.decode()},
        ):
            response = one("GET", "/v1/models", headers=how)
            refused(response, 401, "unauthorized")
            assert response.headers["www-authenticate"] == "Bearer"
        refused(one("GET", "/metrics"), 401, "unauthorized")
        assert one("GET", "/health/ready").status_code == 200
        for how in ({"x-api-key": KEY.decode()}, {"authorization": "bearer another-key-of-16"}):
            assert one("GET", "/v1/models", headers=how).status_code == 200


def test_a_mounted_service_wants_its_keys() -> None:
    from starlette.applications import Starlette
    from starlette.routing import Mount

    with served(keys=[KEY], limits=Limits(max_body=1000)) as one:
        one.app = Starlette(routes=[Mount("/some/where", one.app)])  # type: ignore[assignment]
        refused(one("GET", "/some/where/v1/models"), 401, "unauthorized")
        refused(one("POST", "/some/where/v1/catalog/rollback"), 401, "unauthorized")
        refused(one("GET", "/some/where/metrics"), 401, "unauthorized")
        key = {"x-api-key": KEY.decode()}
        long = {"remove": ["x" * 900] * 2}  # as long as a change may be, and no other request
        refused(one("POST", "/some/where/v1/catalog", json=long, headers=key), 422, "invalid")
        assert 'path="/v1/catalog"' in one("GET", "/some/where/metrics", headers=key).text


def test_pages_of_other_sites_change_nothing(one: Served) -> None:
    for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 422)):
        response = one("POST", "/v1/catalog/rollback", headers={"sec-fetch-site": site})
        refused(response, status, "forbidden" if status == 403 else "invalid")


@pytest.mark.parametrize(
    ("bound", "host", "status"),
    [
        ("127.0.0.1", "localhost", 200),
        ("127.0.0.1", "LOCALHOST:8000", 200),
        ("127.0.0.1", "127.0.0.1:1", 200),
        ("127.0.0.1", "[::1]:8000", 200),
        ("127.0.0.1", "proxy.example", 200),
        ("127.0.0.1", "evil.example", 421),
        ("127.0.0.1", "localhost.evil.example", 421),
        ("127.0.0.1", "10.0.0.1", 421),
        ("10.0.0.1", "10.0.0.1:8000", 200),
        ("::2", "[::2]:8000", 200),
        ("0.0.0.0", "10.0.0.1:8000", 200),
        ("0.0.0.0", "[::2]", 200),
        ("0.0.0.0", "evil.example:8000", 421),
    ],
)
def test_a_name_that_leads_here_is_not_enough(one: Served, bound: str, host: str, status: int) -> None:
    """A page's own name may lead to this machine, and the browser takes us for that page then."""
    hosts = [*server._names(bound), "Proxy.example"]
    app = create_app(one.service, hosts=hosts, log=lambda line: None)
    keyed = create_app(one.service, hosts=hosts, keys=[KEY], log=lambda line: None)

    async def ask(app: Any) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://served") as client:
            return await client.get("/v1/models", headers={"host": host, "x-api-key": KEY.decode()})

    response = asyncio.run(ask(app))
    assert response.status_code == status and asyncio.run(ask(keyed)).status_code == 200
    if status == 421:
        assert f"got '{host}'; serve --allow-host" in refused(response, 421, "misdirected")


def test_nothing_comes_from_elsewhere(one: Served) -> None:
    assert one("GET", "/docs").status_code == one("GET", "/redoc").status_code == 404
    assert one("GET", "/openapi.json").json()["info"]["title"] == "triewise"
    assert "default-src 'none'" in one("GET", "/v1/models").headers["content-security-policy"]
    assert "script-src 'self'" in one("GET", "/").headers["content-security-policy"]


def test_nothing_leaks(one: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("secret of the machine room")

    monkeypatch.setattr(type(one.service.view), "question", broken)
    response = one("POST", "/v1/recommend", json={"histories": [{}]})
    message = refused(response, 500, "internal")
    assert response.headers["x-request-id"] in message and "secret" not in response.text
    assert "secret of the machine room" in one.lines[-1]["traceback"]


def test_a_fault_of_the_engine_is_answered(one: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("out of order")

    with monkeypatch.context() as patch:
        patch.setattr("triewise.serving.view.told", broken)
        refused(one("POST", "/v1/recommend", json={"histories": [{}, {}]}), 500, "internal")
        patch.setattr("triewise.decoding.search.Together.step", broken)
        refused(one("POST", "/v1/recommend", json={"histories": [{}]}), 500, "internal")
        patch.setattr("triewise.decoding.search.Together.join", broken)
        refused(one("POST", "/v1/recommend", json={"histories": [{}]}), 500, "internal")
        patch.setattr("triewise.recommenders.GenerativeRecommender.together", broken)
        refused(one("POST", "/v1/recommend", json={"histories": [{}]}), 500, "internal")
        patch.setattr("triewise.recommenders.GenerativeRecommender.score", broken)
        refused(
            one("POST", "/v1/score", json={"histories": [{}], "candidates": [["raw-1"]]}), 500, "internal"
        )
    ask(one, histories=[{}])


def sequential() -> SequentialRecommender:
    model = SequentialModel(EncoderSettings(encoder="sasrec", width=8), len(worlds.TITLES), 5, 1)
    return SequentialRecommender(model.eval(), worlds.catalog(), np.arange(9))


KINDS: dict[str, Callable[[], Any]] = {
    "sequential": sequential,
    "llara": lambda: slot_worlds.recommender("llara", search="exact"),
    "a-llmrec": lambda: slot_worlds.recommender("a-llmrec", search="beam"),
    "assisted": lambda: worlds.recommender(search="exact", assistant=sequential(), assistant_weight=0.5),
    "grounded": lambda: worlds.recommender(search="grounding", text_tokens=6),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_recommender(kind: str) -> None:
    with served(KINDS[kind]()) as one:
        bodies = [{"histories": [{"ids": [f"raw-{i}"]}], "k": 3 + i % 2} for i in range(8)]

        async def all_at_once(client: httpx.AsyncClient) -> list[httpx.Response]:
            return await asyncio.gather(*(client.post("/v1/recommend", json=body) for body in bodies))

        for i, response in enumerate(one.many(all_at_once)):
            [alone] = answer(one.service.view.recommender, [[f"raw-{i}"]], 3 + i % 2, by="id").of_each
            [result] = response.json()["results"]
            assert [item["id"] for item in result["items"]] == [r.item_id for r in alone.recommendations]
            np.testing.assert_allclose(
                [item["score"] for item in result["items"]],
                [r.score for r in alone.recommendations],
                atol=1e-5,
            )
        [model] = one("GET", "/v1/models").json()["data"]
        assert model["explains"] == (kind != "sequential")
        if kind == "sequential":
            explained = one("POST", "/v1/recommend", json={"histories": [{}], "explain": True})
            assert "writes no titles" in refused(explained, 422, "invalid")
            beams = one("POST", "/v1/recommend", json={"histories": [{}], "search": "beam"})
            assert "a sequential model scores every item" in refused(beams, 422, "invalid")


def test_200_clients_get_what_one_gets(one: Served, rng: np.random.Generator) -> None:
    lists = [[f"raw-{n}" for n in rng.integers(0, 18, rng.integers(0, 7))] for _ in range(200)]
    how: list[dict[str, Any]] = [
        {"k": 2 + 2 * (i % 2), "search": ["exact", "beam"][i % 3 > 1], "explain": i % 20 == 0}
        for i in range(200)
    ]

    async def all_at_once(client: httpx.AsyncClient) -> list[httpx.Response]:
        bodies = [{"histories": [{"ids": ids}], **more} for ids, more in zip(lists, how, strict=True)]
        return await asyncio.gather(*(client.post("/v1/recommend", json=body) for body in bodies))

    responses = one.many(all_at_once)
    assert max(response.json()["counters"]["users"] for response in responses) > 8
    for k, search in {(more["k"], more["search"]) for more in how}:
        chosen = [i for i, more in enumerate(how) if (more["k"], more["search"]) == (k, search)]
        recommender = one.service.view.searching(search)
        alone = answer(recommender, [lists[i] for i in chosen], k, by="id").of_each
        for i, wanted in zip(chosen, alone, strict=True):
            [result] = responses[i].json()["results"]
            assert [item["id"] for item in result["items"]] == [r.item_id for r in wanted.recommendations]
            np.testing.assert_allclose(
                [item["score"] for item in result["items"]],
                [r.score for r in wanted.recommendations],
                atol=1e-5,
            )
            assert result["certified"] == wanted.certified


def test_answers_are_of_the_version_they_name(rng: np.random.Generator) -> None:
    with served(limits=Limits(max_batch=8)) as one:
        views = {one.service.view.number: one.service.view}
        lists = [[f"raw-{n}" for n in rng.integers(0, 18, 3)] for _ in range(120)]

        async def ask(client: httpx.AsyncClient, ids: list[str], delay: float) -> httpx.Response:
            await asyncio.sleep(delay)
            return await client.post("/v1/recommend", json={"histories": [{"ids": ids}], "k": 5})

        async def swapped(client: httpx.AsyncClient) -> list[httpx.Response]:
            asked = [asyncio.create_task(ask(client, ids, i / 200)) for i, ids in enumerate(lists)]
            add = [{"id": f"new-{i}", "title": f"Yellow {i} one"} for i in range(5)]
            for path, body in (("", {"add": add, "remove": ["raw-1"]}), ("/rollback", None)):
                await asyncio.sleep(0.1)
                response = await client.post(f"/v1/catalog{path}", json=body)
                contract.Changed.model_validate(response.json())
                views[response.json()["catalog_version"]] = one.service.view
            return await asyncio.gather(*asked)

        responses = one.many(swapped)
        assert {response.status_code for response in responses} == {200} and len(views) == 3
        for ids, response in zip(lists, responses, strict=True):
            told = response.json()
            [alone] = answer(views[told["catalog_version"]].recommender, [ids], 5, by="id").of_each
            assert [item["id"] for item in told["results"][0]["items"]] == [
                r.item_id for r in alone.recommendations
            ]
        assert len({response.json()["catalog_version"] for response in responses}) >= 2


def test_many_changes_do_not_hold_up_who_types(monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    with served() as one:
        monkeypatch.setattr(one.service.live, "rollback", lambda: (go.wait(10), one.service.live.current)[1])

        async def types(client: httpx.AsyncClient) -> list[httpx.Response]:
            changes = [asyncio.create_task(client.post("/v1/catalog/rollback")) for _ in range(40)]
            await asyncio.sleep(0.1)
            try:
                async with asyncio.timeout(5):
                    found = await client.get("/v1/catalog?starts=red")
            finally:
                go.set()
            return [found, *await asyncio.gather(*changes)]

        responses = one.many(types)
        assert {response.status_code for response in responses} == {200}
        assert responses[0].json()["items"][0]["title"] == "Red Sun one"


class Held:
    """Lets the engine's thread wait."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        from triewise.decoding.search import Together

        self.go, self.begun, step = threading.Event(), threading.Event(), Together.step

        def held(search: Together) -> Any:
            self.begun.set()
            assert self.go.wait(20)
            return step(search)

        patch.setattr(Together, "step", held)


def test_overload_is_refused_and_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    recommender = worlds.recommender(TITLES, search="exact", batch_users=2)
    with served(recommender, Limits(max_batch=2, wait_ms=0, queue=3)) as one:
        held = Held(monkeypatch)

        async def too_many(client: httpx.AsyncClient) -> tuple[list[httpx.Response], httpx.Response]:
            body = {"histories": [{}]}
            first = asyncio.create_task(client.post("/v1/recommend", json=body))
            await asyncio.to_thread(held.begun.wait)
            tasks = [asyncio.create_task(client.post("/v1/recommend", json=body)) for _ in range(11)]
            while sum(task.done() for task in tasks) < 8:  # three wait
                await asyncio.sleep(0.01)
            ready = await client.get("/health/ready")
            held.go.set()
            return await asyncio.gather(first, *tasks), ready

        responses, ready = one.many(too_many)
        status = [response.status_code for response in responses]
        assert status.count(429) == 8 and status.count(200) == 4
        [busy, *_] = [response for response in responses if response.status_code == 429]
        refused(busy, 429, "overloaded")
        assert int(busy.headers["retry-after"]) >= 1
        assert ready.status_code == 503 and ready.json()["reasons"] == ["the queue is full"]
        assert one("GET", "/health/ready").status_code == 200
        ask(one, histories=[{}])


def test_many_kinds_of_requests_do_not_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(max_batch=2, wait_ms=0, queue=10)
    with served(worlds.recommender(TITLES, search="exact", batch_users=2), limits) as one:
        held = Held(monkeypatch)

        async def all_kinds(client: httpx.AsyncClient) -> list[httpx.Response]:
            def asked(k: int) -> asyncio.Task[httpx.Response]:
                body = {"histories": [{}], "k": k, "search": ("exact", "beam")[k % 2]}
                return asyncio.create_task(client.post("/v1/recommend", json=body))

            tasks = [asked(1)]
            await asyncio.to_thread(held.begun.wait)
            tasks += [asked(k) for k in range(2, 11)]
            await asyncio.sleep(0.05)
            held.go.set()
            return await asyncio.gather(*tasks)

        seen: list[int] = []
        step = batching.Batcher._step

        def counted(batcher: batching.Batcher, work: batching.Work) -> None:
            seen.append(len(batcher._sessions))
            step(batcher, work)

        monkeypatch.setattr(batching.Batcher, "_step", counted)
        responses = one.many(all_kinds)
        assert [len(response.json()["results"][0]["items"]) for response in responses] == list(range(1, 11))
        assert max(seen) == batching.KINDS
        ask(one, histories=[{}])


def test_who_waits_too_long_or_goes_leaves_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    with served(limits=Limits(wait_ms=0, timeout=0.3)) as one:
        held = Held(monkeypatch)
        response = one("POST", "/v1/recommend", json={"histories": [{}, {}]})
        assert response.headers["retry-after"] and "within 0.3 seconds" in refused(response, 503, "timeout")

        async def goes(client: httpx.AsyncClient) -> None:
            held.begun.clear()
            task = asyncio.create_task(client.post("/v1/recommend", json={"histories": [{}] * 3}))
            await asyncio.sleep(0.05)
            task.cancel()

        one.many(goes)
        held.go.set()
        ask(one, histories=[{}])
        assert not one.service.batcher.waiting


def test_what_runs_is_finished_before_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with served(limits=Limits(wait_ms=0)) as one:
        held = Held(monkeypatch)

        async def stop(client: httpx.AsyncClient) -> list[httpx.Response]:
            runs = asyncio.create_task(client.post("/v1/recommend", json={"histories": [{}]}))
            await asyncio.to_thread(held.begun.wait)
            ends = asyncio.create_task(asyncio.to_thread(one.service.stop))
            while not one.service.draining:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            late, ready = (
                await client.post("/v1/recommend", json={"histories": [{}]}),
                await client.get("/health/ready"),
            )
            held.go.set()
            await ends
            return [await runs, late, ready]

        done, late, ready = one.many(stop)
        assert done.status_code == 200
        refused(late, 503, "stopping")
        assert "stopping" in ready.json()["reasons"]
        one("GET", "/health/live")


def test_a_refusal_keeps_to_one_line() -> None:
    assert Refusal(422, "invalid", "two\nlines\x1b[0m").response().body == (
        '{"error":{"code":"invalid","message":"two lines\ufffd[0m"}}'.encode()
    )
