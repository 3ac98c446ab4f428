"""Users to look up in a report: data and script that no title can break out of, and what a reader sees and does."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.browser import SCHEMES, WIDTHS, check_look, chromium, opened
from tests.reports.test_report import Page, full
from triewise.reports import Explored, Explorer, Method, Ranked, write_report
from triewise.reports.explanation import Recommendation, Token

ATTACK = "</script><script>alert(1)</script><!-- <img src=x onerror=alert(2)> \u2028 \ud800"
LONG = "Interminable" * 20


def title(name: str, *steps: tuple[str, float, int], hit: bool = False) -> Recommendation:
    """A title of (text, probability, alternatives); its end is forced."""
    tokens = tuple(Token(text, math.log(p), ways, 0.25 * ways) for text, p, ways in steps)
    end = Token("", 0.0, 1, 0.0)
    return Recommendation(0, name, sum(t.log_p for t in tokens), (*tokens, end) if tokens else (), hit)


def explorer() -> Explorer:
    wars = title("Star Wars", ("Star", 0.4, 5), (" W", 0.6, 2), ("ars", 1.0, 1), hit=True)
    trek = title("Star Trek", ("Star", 0.4, 5), (" T", 0.3, 2), ("rek", 1.0, 1))
    nasty = title(ATTACK, (ATTACK, 0.1, 5))
    short = title("Star", ("Star", 0.4, 5), ("", 0.1, 2), hit=True)
    plain = replace(wars, tokens=()), replace(nasty, tokens=())
    one = Explored(
        "7",
        ("found", "beams differ"),
        tuple(f"title {i}" for i in range(7)),
        "Star Wars",
        (Ranked(0, (wars, trek), None, ("Star Wars", ATTACK)), Ranked(1, plain)),
    )
    two = Explored(
        ATTACK,
        ("missed",),
        (),
        "Star",
        (Ranked(99, (trek, nasty), short, ("Star Trek", ATTACK)), Ranked(-1, ())),
    )
    return Explorer(
        (one, two),
        (Method("MSL", "10 beams", "Probabilities are the model's."), Method("most popular")),
        {"found": "it is", "missed": "it is not", "beams differ": ATTACK, "unseen": "nobody"},
        "2 of 9 users.",
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, replace(full(), explorer=explorer()))
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


def data(path: Path) -> dict[str, Any]:
    found = re.search(
        r'<script type="application/json" id="explored">(.*?)</script>', path.read_text(encoding="utf-8")
    )
    assert found
    values: dict[str, Any] = json.loads(found[1])
    return values


def test_the_data_are_json_that_no_title_ends(written: Path) -> None:
    page = Page(written.read_text(encoding="utf-8"))
    assert [attrs.get("type") for tag, attrs in page.tags if tag == "script"] == ["application/json", None]
    assert ATTACK.replace("\ud800", "\ufffd") in data(written)["titles"]
    assert written.read_text(encoding="utf-8").count("<script>alert") == 0


def test_a_way_has_decisions_and_what_was_forced(written: Path) -> None:
    first, second = data(written)["users"]
    assert first["ranked"][0]["found"][0]["way"] == [["Star", -0.916, 5, 1.25], [" W", -0.511, 2, 0.5], "ars"]
    assert second["ranked"][0]["target"]["way"] == [["Star", -0.916, 5, 1.25], ["", -2.303, 2, 0.5]]
    leaking = title("ab", ("a", 0.5, 2), ("b", 0.9, 1))
    user = replace(explorer().users[0], ranked=(Ranked(3, (leaking,)),))
    write_report(
        written.with_name("leaks.html"), replace(full(), explorer=replace(explorer(), users=(user,)))
    )
    assert data(written.with_name("leaks.html"))["users"][0]["ranked"][0]["found"][0]["way"] == [
        ["a", -0.693, 2, 0.5],
        ["b", -0.105],
    ]


def test_without_a_script_the_page_shows_its_users(written: Path, browser: Any) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(written.as_uri())
    assert not page.locator("#explorer").is_visible()
    assert page.get_by_text("User 1 ").is_visible()
    context.close()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_reader_looks_users_up(written: Path, browser: Any, width: int, scheme: str) -> None:
    with opened(browser, written.as_uri(), width, scheme) as page:
        section = page.locator("#explorer")
        assert section.get_by_role("heading", name="User 7").is_visible()
        assert "1 of these 2 missed by 10 beams" in section.inner_text()
        assert section.locator(".way li:not(.heads)").all_inner_texts()[0].split() == [
            "5",
            "Star",
            "40",
            "%",
            "1.25",
        ]
        check_look(page)
        section.get_by_role("button", name="Star Trek").press("Enter")
        assert "Star Trek" in section.locator("li:has(.way) button").inner_text()
        assert page.evaluate("document.activeElement.innerText").startswith("2"), (
            "the focus stays where it was"
        )
        section.get_by_role("button", name="Next user").click()
        assert "place 100" in section.inner_text()
        assert section.locator("li:has(.way) button").inner_text().split()[:2] == ["100", "Star"], (
            "the true next title, though not among the best"
        )
        assert "<script>alert(1)</script>" in section.locator("h3").inner_text(), "a name is text"
        assert section.get_by_role("button", name="Next user").is_disabled()
        section.get_by_role("button", name="found").click()
        assert section.locator("option").count() == 1
        assert section.get_by_role("button", name="unseen").is_disabled()
        check_look(page)


@pytest.mark.parametrize("width", WIDTHS)
def test_many_ways_and_writing_from_right_to_left(tmp_path: Path, browser: Any, width: int) -> None:
    name = "שלום עולם (1999)"
    found = title(name, ("שלום", 0.4, 123_456), (" עולם", 0.2, 98_765), (" (1999)", 1.0, 1))
    user = Explored("משתמש 7", ("found",), (name,), name, (Ranked(0, (found,)),))
    shown = Explorer((user,), (Method("MSL"),), {"found": "it is"}, "1 of 9 users.")
    write_report(path := tmp_path / "report.html", replace(full(), explorer=shown))
    with opened(browser, path.as_uri(), width) as page:
        nodes = page.locator("#explorer b.node")
        assert nodes.all_inner_texts() == ["123,456", "98,765"]
        heights, size = nodes.evaluate_all("all => [all.map((e) => e.offsetHeight), innerHeight]")
        assert size == 900 and max(heights) < 30, "a number is one line"
        beside = nodes.evaluate_all(
            "all => all.map((e) => e.nextSibling.getBoundingClientRect().left - e.getBoundingClientRect().right)"
        )
        assert min(beside) > 0, "and does not cover its token"
        picked = page.locator("#explorer option").inner_text()
        assert picked == f"User \u2068משתמש 7\u2069: \u2068{name}\u2069"
        assert (
            page.locator("#explorer .way bdi").first.evaluate("(e) => getComputedStyle(e).textAlign")
            == "left"
        )
        check_look(page)


def test_it_prints(written: Path, browser: Any) -> None:
    with opened(browser, written.as_uri()) as page:
        page.emulate_media(media="print", color_scheme="dark")
        assert not page.locator(".pick").is_visible()
        assert page.locator("#explorer .way").is_visible()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
