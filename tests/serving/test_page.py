"""The service's page in a browser: what a person does with it, by mouse and by keyboard, and what titles cannot do."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.browser import SCHEMES, TIMEOUT_MS, WIDTHS, check_look, chromium, opened

fastapi = pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("uvicorn", reason="the extra serve is not installed")

ATTACK = "<img src=x onerror=alert(1)>"
TITLES = [
    *("Star Wars", "Star Trek", "Stargate", "Toy Story", ATTACK, "Alien", "Aliens", "Brazil", "Dune"),
    *("Eraser", "Fargo", "Gandhi", "Heat", "Casablanca", "Interminable" * 12),
]


def application(kind: str = "generative", key: str = "", trouble: dict[str, Any] | None = None) -> Any:
    """A stand-in for the service: the contract's shapes; titles in their order, beams without the second one."""
    from fastapi.responses import JSONResponse

    from triewise.serving.page import add_page

    app, items = fastapi.FastAPI(), [{"id": str(i), "title": title} for i, title in enumerate(TITLES)]
    writes = kind == "generative"

    def refused(status: int, message: str, **headers: str) -> Any:
        return JSONResponse({"error": {"code": "x", "message": message}}, status, headers)

    @app.middleware("http")
    async def guard(request: fastapi.Request, call_next: Any) -> Any:
        if request.url.path.startswith("/v1/") and request.headers.get("x-api-key", "") != key:
            return refused(401, "no key")
        return await call_next(request)

    @app.get("/v1/models")
    async def models() -> Any:
        searches = ["beam", "exact", "catalogue"] if writes else ["catalogue"]
        one = {"id": ATTACK, "kind": kind, "search": "catalogue", "searches": searches, "explains": writes}
        return {"data": [one | {"n_items": len(items), "catalog_version": 3, "max_k": 100}]}

    @app.get("/v1/catalog")
    async def catalog(starts: str = "", limit: int = 20) -> Any:
        found = [item for item in items if item["title"].lower().startswith(starts.lower())][:limit]
        return {"catalog_version": 3, "n_items": len(items), "items": found}

    @app.post("/v1/recommend")
    async def recommend(request: fastapi.Request) -> Any:
        if trouble:
            return refused(**trouble)
        body = await request.json()
        had, search = body["histories"][0]["titles"], body.get("search", "catalogue")
        left = [i for i in items if i["title"] not in had and i["id"] not in body["exclude"]]
        if search == "beam":
            left = left[:1] + left[2:]
        shown = []
        for place, item in enumerate(left[: body["k"]]):
            tokens = [{"text": item["title"][:2], "probability": 0.4 / (place + 1), "decided": True}]
            tokens += [{"text": item["title"][2:], "probability": 1.0, "decided": False}]
            tokens += [{"text": "", "probability": 0.5, "decided": place == 0}]
            shown.append({**item, "score": -float(place), "tokens": tokens if body.get("explain") else None})
        unknown = [title for title in had if title not in TITLES]
        result = {"items": shown, "certified": search != "beam", "unknown": unknown}
        counters = {"token_forwards": 1234, "rounds": 3, "cache_bytes_peak": 5 << 20}
        return {"results": [result], "catalog_version": 3, "counters": counters, "took_ms": 12.3}

    add_page(app)
    return app


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """An application on loopback, in a thread."""
    import uvicorn

    server = uvicorn.Server(
        uvicorn.Config(app, port=0, log_level="error", ws="none", timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    with serving(application()) as url:
        yield url


def listed(page: Any) -> list[str]:
    page.locator("body:not(.busy)").wait_for()
    return [" ".join(text.split()) for text in page.locator(".recs > li bdi:not(.way bdi)").all_inner_texts()]


def test_everything_comes_from_the_service_under_a_strict_policy(service: str) -> None:
    import httpx

    answer = httpx.get(service)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
    assert not set(answer.text.split()) & {"style=", "onclick="} and "<script>" not in answer.text
    for name, kind in {
        "style.css": "text/css",
        "script.js": "text/javascript",
        "icon.svg": "image/svg+xml",
    }.items():
        there = httpx.get(f"{service}page/{name}")
        assert there.status_code == 200 and there.headers["content-type"].startswith(kind)
        assert "http://www.w3.org" in there.text or "//" not in there.text.replace("// ", "").replace(
            "//\n", ""
        )
    assert "/page/style.css" not in httpx.get(f"{service}openapi.json").text


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_visit(service: str, browser: Any, width: int, scheme: str) -> None:
    with opened(browser, service, width, scheme) as page:
        page.get_by_role("button", name="Star Wars").wait_for()
        check_look(page)
        box = page.get_by_role("combobox")
        box.fill("st")
        page.get_by_role("option", name="Stargate").wait_for()
        check_look(page)
        page.get_by_role("option", name="Stargate").click()
        assert listed(page)[:3] == ["Star Wars", "Star Trek○", "Toy Story"]
        assert page.locator(".proof").inner_text().startswith("✓ Certified")
        assert "10 titles in 12 ms" in page.locator("#status").inner_text()
        assert page.locator(".recs .val").first.inner_text() == "20 %".replace(" ", "\u00a0"), (
            "the product of its tokens"
        )
        assert page.locator(".recs bdi .d3").first.inner_text() == "St"
        facts = page.locator(".facts").inner_text()
        assert "9 of 10" in facts and "1,234" in facts and "5.0" in facts and "12 ms" in facts
        page.get_by_role("button", name="Leave Star Wars out").click()
        page.locator(".recs > li:first-child", has_text="Star Trek").wait_for()
        assert page.evaluate("document.activeElement.ariaLabel") == "Leave Star Trek out", "at the same place"
        assert listed(page)[1] == "Toy Story○"
        page.locator(".recs summary").first.click()
        assert page.locator(".way").first.inner_text().split() == [
            *("St", "40", "%", "ar", "Trek", "forced", "(end)", "50", "%", "whole", "title", "20", "%")
        ]
        check_look(page)
        page.get_by_role("button", name="Allow Star Wars again").click()
        page.locator(".recs > li:first-child", has_text="Star Wars").wait_for()
        page.get_by_label("beam", exact=True).check(force=True)
        page.get_by_text("Not certified").wait_for()
        assert "Exact search beside it".lower() in page.locator(".facts").inner_text().lower()
        check_look(page)


def test_titles_are_text(service: str, browser: Any) -> None:
    with opened(browser, service) as page:
        page.get_by_role("button", name="Star Wars").wait_for()
        assert ATTACK in page.locator("#model").inner_text()
        page.get_by_role("combobox").fill("<img")
        page.get_by_role("option", name=ATTACK).click()
        page.get_by_role("combobox").fill(f"{ATTACK} unknown")
        page.get_by_role("combobox").press("Enter")
        page.get_by_text("1 title is not in the catalogue and left out.").wait_for()
        assert page.locator("#history bdi").all_inner_texts() == [ATTACK, f"{ATTACK} unknown"]
        assert page.locator("#history .unknown").inner_text().split("\n")[0] == f"{ATTACK} unknown"
        page.get_by_role("button", name=f"Take {ATTACK} away", exact=True).click()
        page.get_by_role("button", name=f"Leave {ATTACK} out").click()
        page.get_by_role("button", name=f"Allow {ATTACK} again").wait_for()
        assert page.locator("img").count() == 0


def test_by_keyboard_alone(service: str, browser: Any) -> None:
    """A combobox as the ARIA practices have it, and everything else in the order of the page."""
    with opened(browser, service) as page:
        page.get_by_role("button", name="Star Wars").wait_for()
        press, focus = (
            page.keyboard.press,
            lambda: page.evaluate("document.activeElement.id || document.activeElement.ariaLabel"),
        )
        press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        press("Tab")
        assert focus() == "title"
        box, options = page.get_by_role("combobox"), page.get_by_role("option")
        page.keyboard.type("ali")
        options.first.wait_for()
        assert box.get_attribute("aria-expanded") == "true"
        press("ArrowUp")
        assert options.all_inner_texts() == ["Alien", "Aliens"]
        assert box.get_attribute("aria-activedescendant") == "match-1"
        assert [o.get_attribute("aria-selected") for o in options.all()] == ["false", "true"]
        press("Escape")
        assert box.get_attribute("aria-expanded") == "false" and box.input_value() == "ali"
        assert box.get_attribute("aria-activedescendant") is None
        press("Escape")
        assert box.input_value() == ""
        page.keyboard.type("dUNE")
        options.first.wait_for()
        press("Enter")
        assert page.locator("#history bdi").all_inner_texts() == ["Dune"], "as the catalogue spells it"
        page.keyboard.type("ali")
        options.first.wait_for()
        press("ArrowDown")
        press("Enter")
        listed(page)
        assert page.locator("#history bdi").all_inner_texts() == ["Dune", "Alien"] and focus() == "title"
        press("Backspace")
        assert page.locator("#history bdi").all_inner_texts() == ["Dune"]
        press("Tab")
        assert page.evaluate("document.activeElement.value") == "catalogue"
        press("ArrowLeft")
        assert page.get_by_label("exact", exact=True).is_checked()
        press("Tab")
        assert focus() == "compare"
        press("Space")
        page.locator(".facts .chips").wait_for(state="detached")
        press("Tab")
        assert focus() == "go"
        press("Enter")
        first = listed(page)[0]
        page.keyboard.press("Tab")
        press("Enter")
        assert page.locator(".recs details").first.get_attribute("open") is not None
        press("Tab")
        assert focus() == f"Add {first} to the history"
        press("Tab")
        press("Enter")
        page.get_by_role("button", name=f"Allow {first} again").wait_for()


def test_a_key_where_the_service_asks_for_one(browser: Any) -> None:
    with serving(application(key="sesame")) as url:
        context = browser.new_context()
        page = context.new_page()
        page.set_default_timeout(TIMEOUT_MS)
        page.goto(url)
        page.get_by_text("This service asks for an API key.").wait_for()
        page.get_by_label("API key").fill("abracadabra")
        page.get_by_label("API key").press("Enter")
        page.get_by_text("The service does not know this key.").wait_for()
        page.get_by_label("API key").fill("sesame")
        page.get_by_role("button", name="Use it").click()
        page.get_by_role("button", name="Star Wars").click()
        assert len(listed(page)) == 10 and not page.locator("#alert").inner_text()
        assert page.evaluate("JSON.stringify([localStorage, sessionStorage]) + document.cookie") == "[{},{}]"
        context.close()


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ({"status": 422, "message": "wanted k of at most 5, got 10"}, "wanted k of at most 5, got 10"),
        (
            {"status": 429, "message": "9 users wait", "retry-after": "7"},
            "The service is busy: 9 users wait Try again in 7 s.",
        ),
        ({"status": 500, "message": "something went wrong here"}, "something went wrong here"),
    ],
)
def test_what_goes_wrong_is_said(browser: Any, trouble: dict[str, Any], said: str) -> None:
    with serving(application(trouble=trouble)) as url:
        page = browser.new_page()
        page.set_default_timeout(TIMEOUT_MS)
        page.goto(url)
        page.get_by_role("button", name="Star Wars").click()
        page.get_by_role("alert").get_by_text(said).wait_for()
        trouble.clear()
        page.get_by_role("button", name="Try again").click()
        page.locator(".recs li").first.wait_for()
        assert not page.get_by_role("alert").inner_text()
        page.close()


def test_a_service_that_is_gone(browser: Any) -> None:
    page = browser.new_page()
    page.set_default_timeout(TIMEOUT_MS)
    with serving(application()) as url:
        page.goto(url)
        page.get_by_role("button", name="Star Wars").wait_for()
    page.get_by_role("button", name="Star Wars").click()
    page.get_by_text("The service does not answer. Is it still running?").wait_for()
    page.close()


def test_the_service_itself(browser: Any) -> None:
    """What the stand-in stands for: a language model behind a key."""
    from tests import worlds
    from tests.serving.served import served

    titles = (
        "Red Sun",
        "Red Moon",
        "Red Moon rises",
        ATTACK,
        *(f"Blue {name}" for name in ("Sun", "Moon", "Sea")),
    )
    recommender = worlds.recommender(titles, search="exact", batch_users=8)
    with served(recommender, keys=[b"open sesame, said he"]) as one, serving(one.app) as url:
        page = browser.new_page()
        page.set_default_timeout(TIMEOUT_MS)
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        page.get_by_label("API key").fill("open sesame, said he")
        page.get_by_role("button", name="Use it").click()
        page.get_by_text("small · 7 items").wait_for()
        page.get_by_role("combobox").fill("red m")
        page.get_by_role("option", name="Red Moon rises").click()
        assert sorted(text.removesuffix("○") for text in listed(page)) == sorted(
            {*titles} - {"Red Moon rises"}
        )
        assert page.get_by_text("✓ Certified").is_visible()
        assert page.locator(".facts td").count() > 6
        page.get_by_role("button", name=f"Leave {ATTACK} out").click()
        page.get_by_role("button", name=f"Allow {ATTACK} again").wait_for()
        assert len(listed(page)) == 5
        page.get_by_label("beam", exact=True).check(force=True)
        page.get_by_text("Exact search beside it").wait_for()
        assert not errors
        page.close()


def test_a_model_that_writes_no_titles(browser: Any) -> None:
    with serving(application(kind="sequential")) as url, opened(browser, url, 390) as page:
        page.get_by_role("button", name="Star Wars").click()
        assert len(listed(page)) == 10
        assert page.locator(".recs .val").first.inner_text() == "0.00"
        assert page.locator(".recs details").count() == 0 and not page.locator("#compare").is_visible()
        check_look(page)
