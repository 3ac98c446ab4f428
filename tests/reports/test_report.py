"""The report: one well-formed file without a reference to another, whole sentences that say what the numbers say."""

from __future__ import annotations

import html
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from triewise.reports import Comparison, Example, Report, Row, write_report
from triewise.reports.explanation import Recommendation, Token
from triewise.reports.report import digits

VOID = {"meta", "br", "wbr", "img", "hr", "link", "input"}
NASTY = '<script>alert(1)</script> & "quotes" \'n <b>bold</b>'
LONG = "x" * 300


class Page(HTMLParser):
    """Checks that elements nest, and keeps what tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in {tag}: {attrs}"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"{tag} closes what is not open"

    def handle_data(self, data: str) -> None:
        if not {"style", "title"} & set(self.open):
            self.text.append(data)

    def all(self, tag: str, css: str = "") -> list[dict[str, str | None]]:
        return [attrs for t, attrs in self.tags if t == tag and css in (attrs.get("class") or "")]

    @property
    def words(self) -> str:
        return " ".join("".join(self.text).replace("\xa0", " ").split())


def rows() -> tuple[Row, ...]:
    return (
        Row("MSL", metrics(0.149, 0.077), intervals(0.149, 0.077), "775 steps", 12.3),
        Row("LML", metrics(0.118, 0.061), intervals(0.118, 0.061)),
        Row("most popular", metrics(0.086, 0.04), {}),
    )


def metrics(hr: float, ndcg: float) -> dict[str, float]:
    return {
        "HR@5": round(hr / 2, 3),
        "HR@10": hr,
        "NDCG@5": round(ndcg / 2, 3),
        "NDCG@10": ndcg,
        "MRR@10": 0.123456,
    }


def intervals(hr: float, ndcg: float) -> dict[str, tuple[float, float]]:
    return {name: (value - 0.02, value + 0.02) for name, value in metrics(hr, ndcg).items()}


def example(user: str = "7", target: str = "Star Wars", **changes: object) -> Example:
    def title(name: str, tokens: tuple[Token, ...], hit: bool = False) -> Recommendation:
        return Recommendation(0, name, sum(t.log_p for t in tokens), tokens, hit)

    star, end = Token("Star", math.log(0.4), 5, 0.3, 1), Token("", 0.0, 1, 0.0)
    wars = Token(" W", math.log(0.6), 2, 0.1, 2), Token("ars", 0.0, 1, 0.0, 3)
    found = (
        title("Star Wars", (star, *wars, replace(end, node=4)), True),
        title("Star", (star, Token("", math.log(0.04), 2, 0.1, 5))),
        title(NASTY, (Token(NASTY, math.log(0.5), 5, 0.0, 6), replace(end, node=7))),
    )
    made = Example(user, "MSL", tuple(f"title {i}" for i in range(8)), target, 0, found)
    return replace(made, **changes)


def curves() -> dict[str, list[dict[str, object]]]:
    def log(first: float) -> list[dict[str, object]]:
        return [
            {"step": s, "loss": first / s, "loss_zero_gain": 0.1, "loss_positive_gain": first, "temperature": 1.0,
             "w": 1 / s, "learning_rate": 1e-3} for s in (25, 50, 75)
        ] + [{"step": 75, "valid": {"NDCG@10": 0.05, "HR@10": 0.1}}]  # fmt: skip

    return {"MSL": log(3.0), "LML": log(7.0)}


def full() -> Report:
    return Report(
        title="ml-100k",
        subtitle="943 test users",
        rows=rows(),
        comparisons=(
            Comparison("MSL", "LML", "HR@10", 0.031, 0.009, 0.053),
            Comparison("MSL", "LML", "NDCG@10", 0.016, 0.004, 0.028),
        ),
        curves=curves(),
        facts={"titles": 1664, "forced_share": 0.72},
        forced=(np.array([0.0, 0.5, 1.0]), np.array([0.4, 0.4, 0.2])),
        examples=(example("1"), example("2"), example("3")),
        notes=("Seen items are excluded.",),
        provenance={"commit": "abc", "command": "triewise demo"},
    )


def page(tmp_path: Path, report: Report) -> Page:
    write_report(tmp_path / "report.html", report)
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def headings(found: Page) -> list[str]:
    text = "".join(f"\n{t}" for t in found.text)
    known = (
        "Who finds",
        "How the training",
        "How much of a title",
        "The data",
        "What users get",
        "Notes",
        "Where this comes",
    )
    return [name for name in known if f"\n{name}" in text]


def test_the_whole_report_is_well_formed_and_needs_nothing_else(tmp_path: Path) -> None:
    found = page(tmp_path, full())
    for tag, attrs in found.tags:
        assert tag not in {"script", "link", "img", "iframe", "object", "embed"}
        assert not {"src", "href", "srcset", "xlink:href"} & set(attrs), (tag, attrs)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"@import|url\(|https?://", text)
    assert "nan" not in text.lower().replace("nano", "") and "inf" not in re.sub(
        "inform|infin", "", text.split("</style>")[1]
    )
    assert headings(found) == [
        "Who finds",
        "How the training",
        "How much of a title",
        "What users get",
        "Notes",
        "Where this comes",
    ]
    assert len(text) < 60_000


def test_same_input_same_bytes(tmp_path: Path) -> None:
    write_report(tmp_path / "a.html", full())
    write_report(tmp_path / "b.html", full())
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_every_figure_has_a_text_alternative_and_a_caption(tmp_path: Path) -> None:
    found = page(tmp_path, full())
    pictures = found.all("svg")
    assert len(pictures) == 3 + 5 + 1 + 2  # dots, curves (the temperature does not vary), bars, two trees
    assert all(attrs["role"] == "img" and len(attrs["aria-label"] or "") > 20 for attrs in pictures)
    assert len(found.all("figure")) == len(found.all("figcaption"))
    said = " ".join(attrs["aria-label"] or "" for attrs in pictures)
    assert "HR@10, MSL: 0.149 (0.129 to 0.169)" in said
    assert "Training loss: MSL from 0.12 to 0.04 at step 75" in said
    assert "position 2 50\xa0%" in said
    assert "1. Star Wars, 24\xa0%: “Star” 40\xa0% of 5, “W” 60\xa0% of 2" in said


def test_titles_are_escaped_wherever_they_come(tmp_path: Path) -> None:
    name = f"{NASTY} \x00\x1b[31m \ud800"
    report = replace(
        full(),
        title=name,
        subtitle=name,
        rows=(replace(rows()[0], name=name, note=name),),
        comparisons=(Comparison(name, name, "HR@10", 0.1, -0.1, 0.3),),
        curves={name: curves()["MSL"]},
        facts={name: name},
        examples=(example(name, target=name, method=name, history=(name, LONG)),),
        notes=(name,),
        provenance={name: name},
    )
    found = page(tmp_path, report)
    assert not [tag for tag, _ in found.tags if tag == "script"]
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<b>bold" not in text and "\x00" not in text and "\x1b" not in text
    assert found.words.count("<script>alert(1)</script>") > 8


def test_braces_in_a_title_are_no_template(tmp_path: Path) -> None:
    assert "{style}{0}" in page(tmp_path, replace(full(), title="{style}{0}")).words


@pytest.mark.parametrize(
    ("missing", "gone"),
    [
        ({"rows": (), "comparisons": ()}, {"Who finds"}),
        ({"curves": {}}, {"How the training"}),
        ({"curves": {"MSL": [], "LML": [{"step": 3}]}}, {"How the training"}),
        ({"forced": None}, {"How much of a title"}),
        ({"forced": (np.zeros(2), np.zeros(2))}, {"How much of a title"}),
        ({"forced": None, "facts": {}}, {"How much of a title", "The data"}),
        ({"examples": ()}, {"What users get"}),
        ({"notes": ()}, {"Notes"}),
        ({"provenance": {}}, {"Where this comes"}),
    ],
)
def test_a_missing_part_leaves_its_section_out(
    tmp_path: Path, missing: dict[str, object], gone: set[str]
) -> None:
    found = page(tmp_path, replace(full(), **missing))
    everything = [
        "Who finds",
        "How the training",
        "How much of a title",
        "What users get",
        "Notes",
        "Where this comes",
    ]
    if "forced" in missing and "facts" not in missing:
        everything.insert(3, "The data")
    assert headings(found) == [name for name in everything if name not in gone]


def test_an_empty_report_is_a_title(tmp_path: Path) -> None:
    found = page(tmp_path, Report("only a title", ""))
    assert found.words == "only a title"


# --- sentences ----------------------------------------------------------------------------------------------


def test_the_summary_says_who_wins_and_that_zero_is_excluded(tmp_path: Path) -> None:
    words = page(tmp_path, full()).words
    assert (
        "This page compares three ways to recommend the title a user takes next, out of 1,664 titles."
        in words
    )
    assert (
        "MSL scores highest: the true next title is among the first ten for 14.9 % of the users (95 % interval 12.9 to "
        "16.9 %), against 11.8 % for LML and 8.6 % for most popular." in words
    )
    assert "HR@10 of MSL is 3.1 points above that of LML (95 % interval +0.9 to +5.3)." in words
    assert (
        "The interval excludes zero: this is unlikely to be only the luck of which users were tested."
        in words
    )
    assert "not the randomness of training" in words


def test_the_summary_is_honest_about_an_interval_with_zero(tmp_path: Path) -> None:
    report = replace(full(), comparisons=(Comparison("MSL", "LML", "HR@10", -0.004, -0.02, 0.012),))
    words = page(tmp_path, report).words
    assert "HR@10 of MSL is 0.4 points below that of LML (95 % interval −2.0 to +1.2)." in words
    assert "The interval includes zero: these users do not settle which is better." in words
    assert "excludes zero" not in words


def test_the_summary_of_mixed_comparisons(tmp_path: Path) -> None:
    report = replace(
        full(),
        comparisons=(
            Comparison("MSL", "LML", "HR@10", 0.01, -0.01, 0.03),
            Comparison("MSL", "most popular", "HR@10", 0.06, 0.04, 0.08),
        ),
    )
    words = page(tmp_path, report).words
    assert (
        "1.0 points above that of LML (95 % interval −1.0 to +3.0) and 6.0 points above that of most popular"
        in words
    )
    assert "Where an interval includes zero, these users do not settle which is better." in words


def test_one_method_alone_is_not_said_to_win(tmp_path: Path) -> None:
    report = replace(full(), rows=rows()[:1], comparisons=())
    found = page(tmp_path, report)
    assert "This page shows how well MSL can recommend the title a user takes next" in found.words
    assert " The true next title is among the first ten for 14.9 % of the users" in found.words
    assert "scores highest" not in found.words and "user by user" not in found.words.lower()


def test_a_tie_is_called_a_tie(tmp_path: Path) -> None:
    report = replace(full(), rows=(rows()[0], replace(rows()[0], name="IGD"), rows()[2]))
    assert "MSL and IGD are level: the true next title" in page(tmp_path, report).words


def test_other_metrics_are_shown_where_the_four_are_not_there(tmp_path: Path) -> None:
    report = Report("t", "s", rows=(Row("a", {"MRR": 0.2}, {"MRR": (0.1, 0.3)}), Row("b", {"MRR": 0.1}, {})))
    words = page(tmp_path, report).words
    assert "a scores highest: MRR is 0.200 (95 % interval 0.100 to 0.300), against 0.100 for b." in words


def test_the_table_marks_the_best_and_shows_what_is_missing(tmp_path: Path) -> None:
    without = replace(rows()[1], metrics={"HR@10": 0.3}, intervals={})
    page(tmp_path, replace(full(), rows=(rows()[0], without), comparisons=()))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    cells = re.findall("<td>(.*?)</td>", text)
    assert html.unescape(re.sub("<.*?>", " ", cells[1])).split() == ["0.149", "0.129", "to", "0.169"]
    assert [cell.startswith("<b>") for cell in cells] == [True, False, True, True, False, True, False, False]
    assert cells[4] == cells[6] == cells[7] == "–"
    assert "MRR@10" not in text, "the field's four are enough"


def test_small_metrics_keep_the_digits_that_tell_them_apart(tmp_path: Path) -> None:
    """Of large catalogues NDCG@10 is .0123 here and .0118 there: with three digits both would be 0.012."""
    ours, theirs = {"HR@10": 0.0312, "NDCG@10": 0.0123}, {"HR@10": 0.0302, "NDCG@10": 0.0118}
    low = (Row("a", ours, {}), Row("b", theirs, {}))
    apart = (Comparison("a", "b", "NDCG@10", 0.0005, 0.0001, 0.0009),)
    found = page(tmp_path, Report("t", "s", rows=low, comparisons=apart)).words
    for shown in ("0.0123", "0.0118", "+0.0005", "+0.0001", "3.12"):
        assert shown in found
    assert (digits(low), digits(rows())) == (4, 3)


# --- users --------------------------------------------------------------------------------------------------


def test_deciding_tokens_are_marked_by_how_much_they_decided(tmp_path: Path) -> None:
    found = page(tmp_path, replace(full(), examples=(example(),)))
    body = (tmp_path / "report.html").read_text(encoding="utf-8")
    first, second, _ = re.findall(r'<ol class="recs">.*?</ol>', body)[0].split("<li>")[1:]
    assert re.findall(r'<span class="(\w+)".*?>(.*?)</span>', first) == [
        ("d3", "Star"),
        ("d2", "W"),
        ("f", "ars"),
    ]
    assert "40\xa0%, one of 5 ways to go on; −ln p = 0.92, gain = 0.3000 nats" in first
    assert "✓ true next title" in first and "✓" not in second
    assert 'class="d5"' in second and "end of the title" in second, "ending the title was a decision"
    assert "24 %" in found.words and "1.6 %" in found.words


def test_history_shows_the_last_titles_and_keeps_the_others(tmp_path: Path) -> None:
    found = page(tmp_path, replace(full(), examples=(example(),)))
    assert "3 earlier" in found.words
    assert "title 0" in found.words and "title 7" in found.words
    few = page(
        tmp_path,
        replace(full(), examples=(example(history=("one",)), example("8", history=(), recommendations=()))),
    )
    assert "earlier" not in few.words
    assert "nothing yet" in few.words


@pytest.mark.parametrize(
    ("rank", "words"), [(0, "place 1 of the ranking"), (1234, "place 1,235"), (-1, "not ranked")]
)
def test_rank_of_the_true_next_title(tmp_path: Path, rank: int, words: str) -> None:
    assert words in page(tmp_path, replace(full(), examples=(example(target_rank=rank),))).words


def test_two_users_have_their_paths_drawn(tmp_path: Path) -> None:
    both = (example("1"), example("1", method="LML"), example("2"), example("3"))
    found = page(tmp_path, replace(full(), examples=both))
    labels = [attrs["aria-label"] or "" for attrs in found.all("div", "scroll")]
    assert [label for label in labels if "paths" in label] == [
        "Decoding paths of user 1; scrolls sideways",
        "Decoding paths of user 2; scrolls sideways",
    ]


def test_a_drawn_tree_by_hand(tmp_path: Path) -> None:
    page(tmp_path, replace(full(), examples=(example(),)))
    body = (tmp_path / "report.html").read_text(encoding="utf-8")
    tree = re.findall(r'<figure class="tree">.*?</figure>', body, re.S)[0]
    texts = [html.unescape(re.sub("<.*?>", "", t)) for t in re.findall("<text.*?</text>", tree)]
    assert texts.count("Star") == 1, "what titles share is drawn once"
    assert {
        "5",
        "2",
        "other 10\xa0%",
        "other 36\xa0%",
        "Wars",
        "(end)",
        "40\xa0%",
        "60\xa0%",
        "4.0\xa0%",
    } <= set(texts)
    assert "1.  24\xa0%  true next" in texts and "2.  1.6\xa0%" in texts and "3.  50\xa0%" in texts
    assert tree.count('class="hit"') == 4, "two edges, the leaf and its label"
    assert "is not among them" not in tree and "vocabulary support" not in tree


def test_a_drawn_tree_says_when_the_true_title_is_elsewhere_and_mass_leaks(tmp_path: Path) -> None:
    leaking = (
        Token("a", math.log(0.5), 2, 0.1, 1),
        Token("b", math.log(0.9), 1, 0.0, 2),
        Token("", 0.0, 1, 0.0, 3),
    )
    one = Recommendation(0, "ab", math.log(0.45), leaking, False)
    found = page(tmp_path, replace(full(), examples=(example(recommendations=(one,)),)))
    assert "The true next title, Star Wars, is not among them." in found.words
    assert "vocabulary support" in found.words
    assert "50 % × 90 %" in found.words


# --- curves and bars ----------------------------------------------------------------------------------------


def panels(found: Page) -> list[str]:
    labels = [(attrs["aria-label"] or "") for attrs in found.all("svg")]
    return [label for label in labels if " at step " in label]


def test_temperature_is_drawn_only_where_it_varies(tmp_path: Path) -> None:
    logs = curves()
    assert not [p for p in panels(page(tmp_path, full())) if p.startswith("Temperature")]
    for row in logs["MSL"][:3]:
        row["temperature"] = 1.5 + float(str(row["step"])) / 100
    (label,) = [
        p for p in panels(page(tmp_path, replace(full(), curves=logs))) if p.startswith("Temperature")
    ]
    assert label == "Temperature: MSL from 1.75 to 2.25 at step 75"


def test_a_loss_that_is_zero_everywhere_is_not_drawn(tmp_path: Path) -> None:
    log = [{"step": i, "loss": 1.0, "loss_zero_gain": 0.0} for i in range(3)]
    other = [{"step": i, "loss": 1.0, "loss_zero_gain": 0.5} for i in range(3)]
    names = [p.split(":")[0] for p in panels(page(tmp_path, replace(full(), curves={"MSL": log})))]
    assert not any(name.startswith("Loss of zero-gain") for name in names)
    both = panels(page(tmp_path, replace(full(), curves={"MSL": log, "LML": other})))
    assert any(name.startswith("Loss of zero-gain") for name in both)


def test_values_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    values = [None, math.nan, 2.0, math.inf, "3"]
    log: list[dict[str, object]] = [{"step": step, "loss": loss} for step, loss in enumerate(values, 1)]
    assert panels(page(tmp_path, replace(full(), curves={"a": log}))) == [
        "Training loss: a from 2 to 2 at step 3"
    ]


def test_a_long_training_is_drawn_with_few_points(tmp_path: Path) -> None:
    log: list[dict[str, object]] = [{"step": s, "loss": 1.0} for s in range(1, 20_001)]
    page(tmp_path, replace(full(), curves={"a": log}))
    assert (tmp_path / "report.html").stat().st_size < 60_000


def test_bars_beyond_the_last_drawn_position_are_accounted_for(tmp_path: Path) -> None:
    weight = np.full(40, 1 / 40)
    words = page(tmp_path, replace(full(), forced=(np.linspace(0, 1, 40), weight))).words
    assert "50 % of all target tokens are forced" in words
    assert "Positions after 24 hold 40 % of the tokens and are not drawn." in words


def test_seeds_coverage_and_popularity_are_shown_where_known(tmp_path: Path) -> None:
    seeds = replace(rows()[0], deviations={"HR@10": 0.004})
    more = replace(rows()[1], more={"HR@1": 0.02, "coverage@10": 0.5}, by_popularity={"20+": (1200, 0.125)})
    write_report(tmp_path / "r.html", Report("t", "s", rows=(seeds, more)))
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "0.149 ± 0.004" in page.words
    assert "HR@1coverage@1020+ seen (1,200 users)" in page.words
    assert "LML0.0200.5000.125" in page.words
    assert "MSL–––" in page.words
    write_report(tmp_path / "r.html", Report("t", "s", rows=rows()))
    assert "Coverage" not in (tmp_path / "r.html").read_text(encoding="utf-8")
