"""Pipelines of D3, MSL and IGD: rule by rule, against slow versions of the scripts, and known counts of real files."""

from __future__ import annotations

import ast
import gzip
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from tests.conftest import shared
from tests.reference import pipelines as slow
from triewise.data import Dataset, pipelines as rules, prepare, settings_of
from triewise.data.interactions import Events
from triewise.errors import UserError
from triewise.settings import DataSettings

DAY = 86_400


def events_of(reviews: list[slow.Review]) -> Events:
    user_id, item_id = (tuple(sorted({review[side] for review in reviews})) for side in (0, 1))
    user = np.array([user_id.index(user) for user, _, _ in reviews], dtype=np.int32)
    item = np.array([item_id.index(item) for _, item, _ in reviews], dtype=np.int32)
    return Events(user, item, np.array([time for _, _, time in reviews]), user_id, item_id)


def titles_of(metadata: slow.Metadata) -> pl.DataFrame:
    return pl.DataFrame(metadata, schema={"item": pl.String, "title": pl.String}, orient="row")


def rows_of(data: Dataset) -> list[list[slow.Row]]:
    item_id = data.catalog.item_id
    return [
        [
            (user, [item_id[item] for item in history], item_id[target], time)
            for user, history, target, time in zip(
                split.user_id, split.history, split.target, split.timestamp.tolist(), strict=True
            )
        ]
        for split in (data.train, data.valid, data.test)
    ]


def made_up(seed: int) -> tuple[list[slow.Review], slow.Metadata]:
    """Reviews of 2010 to 2018, many of one day, and metadata with everything that D3 has a rule for."""
    rng = np.random.default_rng(seed)
    days = rng.integers(15_000, 17_840, 1_200) // 40 * 40
    users, items = rng.integers(0, 60, 1_200), rng.integers(0, 40, 1_200)
    reviews = [
        (f"u{user}", f"i{item}", int(day) * DAY) for user, item, day in zip(users, items, days, strict=True)
    ]
    odd = [
        None,
        "x",
        '"quoted"',
        ' " inner " ',
        "&amp;quot;twice",
        "a <span id here",
        "w " * 20 + "w",
        "w " * 19 + "w",
    ]
    metadata: slow.Metadata = [
        (f"i{item}", odd[item] if item < len(odd) else f"Title {item}") for item in range(42)
    ]
    metadata += [("i20", "Another &amp; title"), ("i21", None)]  # items that stand there twice
    return reviews, metadata


def write(folder: Path, reviews: list[slow.Review], metadata: slow.Metadata) -> Path:
    folder.mkdir()
    lines = [
        json.dumps({"reviewerID": user, "asin": item, "unixReviewTime": time, "verified": True})
        for user, item, time in reviews
    ]
    (folder / "reviews.json").write_text("\n".join(lines), encoding="utf-8")
    records = [{"asin": item} | ({} if title is None else {"title": title}) for item, title in metadata]
    (folder / "meta.json").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("k_core", "enough", "year"), [(2, 20, 2017), (2, 34, 2016), (5, 20, 2015), (5, 36, 1996)]
)
def test_d3_equals_its_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, k_core: int, enough: int, year: int
) -> None:
    """Rows, their order and titles, for a start year that is found at once, later, and never."""
    reviews, metadata = made_up(0)
    parts, title, start = slow.d3(reviews, metadata, k_core, enough)
    monkeypatch.setattr(rules, "_ENOUGH_ITEMS", enough)
    folder = write(tmp_path / "in", reviews, metadata)
    data = prepare(f"amazon:{folder}", tmp_path / "out", pipeline="d3", k_core=k_core)
    assert sum(map(len, parts)) > 90
    assert rows_of(data) == parts
    assert dict(zip(data.catalog.item_id, data.catalog.title, strict=True)).items() <= title.items()
    assert any(f"d3: interactions of {start}-10-01 to 2018-11-01" in line for line in data.info["notes"])
    assert start == year


def test_d3_takes_a_year_that_is_named_or_every_time() -> None:
    reviews = [("u", "i", day * DAY) for day in (0, 16_344, 16_345, 17_836, 17_837)]
    events, rows = events_of(reviews), titles_of([("i", "Item")])
    kept = {year: rules.d3(events, rows, 0, year).events.timestamp // DAY for year in (2014, "all")}
    assert kept[2014].tolist() == [16_344, 16_345, 17_836]  # 2014-10-01 to 2018-11-01, both included
    assert len(kept["all"]) == 5
    assert rules.d3(events, rows, 0, 2014).repairs == {"rows_out_of_range": 2, "rows_of_untitled_items": 0}


def test_msl_equals_its_rules(tmp_path: Path) -> None:
    reviews, metadata = made_up(3)
    reviews += reviews[:5]  # the script counts a row that stands there twice
    parts, title = slow.msl(reviews, metadata, 4)
    data = prepare(
        f"amazon:{write(tmp_path / 'in', reviews, metadata)}", tmp_path / "out", pipeline="msl", k_core=4
    )
    assert rows_of(data) == parts
    assert all(
        title[item] == text for item, text in zip(data.catalog.item_id, data.catalog.title, strict=True)
    )


def test_a_sample_of_items_is_drawn_before_the_core() -> None:
    reviews, metadata = made_up(4)
    kept, again = (rules.msl(events_of(reviews), titles_of(metadata), 5, 20) for _ in range(2))
    assert len(np.unique(kept.events.item)) <= 20
    assert "20 of " in kept.note and kept.repairs["rows_of_items_not_drawn"] > 0
    assert kept.events.item.tolist() == again.events.item.tolist()
    assert np.bincount(kept.events.user).min() >= 5


def test_books_are_sampled_unless_told_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triewise.data.sources._SAMPLED_BOOKS", 20)
    reviews, metadata = made_up(4)
    for name, drawn, choices in (
        ("Books", True, {}),
        ("Toys", False, {}),
        ("more_Books", False, {"sample_items": 0}),
    ):
        folder = write(tmp_path / name, reviews, metadata)
        data = prepare(f"amazon:{folder}", tmp_path / f"out-{name}", pipeline="msl", **choices)
        assert any("items drawn" in line for line in data.info["notes"]) is drawn


def test_a_pipeline_sets_what_is_not_said() -> None:
    said = settings_of("amazon:x", pipeline="msl")
    assert said == {
        "split": "time-windows",
        "max_history": 10,
        "clean": "none",
        "k_core": 5,
        "ties": "file",
        "pipeline": "msl",
    }
    assert (
        settings_of("amazon:x", pipeline="d3", k_core=3, max_history=20, start_year="2015")["start_year"]
        == 2015
    )
    section = DataSettings(source="steam:x", pipeline="igd-steam", k_core=0)
    assert (section.split, section.max_history, section.k_core, section.ties) == (
        "time-growing",
        10,
        0,
        "file",
    )


@pytest.mark.parametrize(
    ("source", "choices", "line"),
    [
        ("csv:x", {"start_year": 2015}, "wanted no start_year for csv: without a pipeline"),
        ("csv:x", {"pipeline": "d3", "sample_items": 5}, "wanted no sample_items for csv: with pipeline d3"),
        ("csv:x", {"pipeline": "igd-steam"}, "wanted no pipeline for csv: with pipeline igd-steam"),
        (
            "amazon:x",
            {"user_column": "u"},
            "wanted no user_column for amazon: without a pipeline, .*, got 'u'; leave",
        ),
        ("msl:x", {"pipeline": "msl"}, "wanted no split and no k_core for msl:"),
        ("csv:x", {"pipeline": "dd"}, "data.pipeline: Input should be 'd3', 'msl' or 'igd-steam'"),
    ],
)
def test_settings_that_would_do_nothing(source: str, choices: dict[str, object], line: str) -> None:
    with pytest.raises(UserError, match=line):
        settings_of(source, **choices)


# --- real files -------------------------------------------------------------------------------------------------------


def counts(data: Dataset) -> tuple[list[int], list[int]]:
    known = data.info["counts"]
    return (
        [known[name] for name in ("interactions", "users", "items")],
        [known[f"{name}_rows"] for name in ("train", "valid", "test")],
    )


@pytest.mark.parametrize("start_year", ["auto", "all"])
def test_real_digital_music_by_the_rules_of_d3(tmp_path: Path, start_year: str) -> None:
    """Fewer than 10,000 items in any case, so that the search ends in 1996, before the first review."""
    folder = shared("amazon2014_digital_music")
    data = prepare(f"amazon:{folder}", tmp_path / "out", pipeline="d3", start_year=start_year)
    assert counts(data) == ([2_480, 268, 206], [1_769, 221, 222])
    with gzip.open(folder / "reviews_Digital_Music_5.json.gz", "rt", encoding="utf-8") as lines:
        reviews = [(r["reviewerID"], r["asin"], r["unixReviewTime"]) for r in map(json.loads, lines)]
    with gzip.open(folder / "meta_Digital_Music.json.gz", "rt", encoding="utf-8") as lines:
        metadata = [(m["asin"], m.get("title")) for m in map(ast.literal_eval, lines)]
    parts, title, year = slow.d3(reviews, metadata, 5, 10_000, 1996)
    assert year == 1996
    assert rows_of(data) == parts
    assert all(
        title[item] == text for item, text in zip(data.catalog.item_id, data.catalog.title, strict=True)
    )


def test_real_digital_music_in_windows_of_msl(tmp_path: Path) -> None:
    data = prepare(f"amazon:{shared('amazon2014_digital_music')}", tmp_path / "out", pipeline="msl", k_core=0)
    assert counts(data) == ([6_908, 2_490, 382], [1_601, 200, 201])


def test_real_gift_cards_by_the_rules_of_msl(tmp_path: Path) -> None:
    data = prepare(f"amazon:{shared('amazon2018_gift_cards')}", tmp_path / "out", pipeline="msl")
    assert counts(data) == ([2_960, 456, 147], [445, 56, 56])
    assert data.catalog.n_titles == 146


def test_real_steam_by_the_rules_of_igd(tmp_path: Path) -> None:
    data = prepare(f"steam:{shared('steam')}", tmp_path / "out", pipeline="igd-steam", user_column="username")
    assert counts(data) == ([7_753, 1_301, 333], [5_161, 645, 646])
    assert (data.info["noun"], data.info["settings"]["max_history"]) == ("games", 10)


def test_real_all_beauty_has_nothing_for_d3(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"wanted interactions that the rules leave \(d3: .*\), got none: .*"
    ) as caught:
        prepare(
            f"amazon:{shared('amazon2023_all_beauty')}", tmp_path / "out", pipeline="d3", start_year="all"
        )
    assert "\n" not in str(caught.value)


def test_real_published_sets(tmp_path: Path) -> None:
    clothing = prepare(f"msl:{shared('amazon_clothing')}", tmp_path / "clothing").info["counts"]
    assert (clothing["items"], clothing["test_rows"]) == (22_948, 5_544)
    assert clothing["train_rows"] + clothing["valid_rows"] == 44_351
    movies = counts(prepare(f"d3:{shared('amazon_movies_d3')}", tmp_path / "movies"))
    assert (movies[0][2], movies[1]) == (2_653, [21_937, 2_742, 2_743])
