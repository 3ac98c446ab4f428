"""Raw Amazon and Steam: each release by its keys, what is left out, real files with known counts."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tests.conftest import shared
from triewise.data import prepare
from triewise.data.raw_amazon import amazon_folder
from triewise.data.raw_steam import steam_folder
from triewise.errors import UserError
from triewise.settings import DataSettings

Record = dict[str, Any]
BY_NAME = DataSettings(source="", user_column="username")
PAIRS = [("u", "B1", 10), ("v", "B2", 20), ("u", "B2", 15), ("u", "B2", 30), ("v", "B1", 5)]
OLD = [
    {"reviewerID": user, "asin": item, "unixReviewTime": (17_000 + day) * 86_400} for user, item, day in PAIRS
]
Y2014 = [record | {"helpful": [0, 1]} for record in OLD]
Y2018 = [record | {"verified": True, "style": {"Size:": " 5"}} for record in OLD]
Y2023 = [
    {
        "title": "Of the review",
        "asin": "B9",
        "parent_asin": item,
        "user_id": user,
        "timestamp": (17_000 + day) * 86_400_000 + 7,
    }
    for user, item, day in PAIRS
]
META_2014 = [
    {"asin": "B1", "title": "One &amp; 'two'", "imUrl": ""},
    {"asin": "B2", "title": "Two"},
    {"asin": "B3"},
]
META_2018 = [
    {"asin": "B1", "title": " One", "also_buy": [], "rank": []},
    {"asin": "B2", "title": "Two", "rank": ""},
]
META_2023 = [{"parent_asin": "B1", "title": "One", "price": None}, {"parent_asin": "B2", "title": "Two"}]


def write(path: Path, records: Sequence[Record], literal: bool = False) -> Path:
    text = "".join(f"{record!r}\n" if literal else f"{json.dumps(record)}\n" for record in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize(
    ("year", "reviews", "metadata", "literal"),
    [(2014, Y2014, META_2014, True), (2018, Y2018, META_2018, False), (2023, Y2023, META_2023, False)],
)
def test_a_release_is_recognised_by_its_keys(
    tmp_path: Path, year: int, reviews: list[Record], metadata: list[Record], literal: bool
) -> None:
    write(tmp_path / "b.json.gz", reviews)
    write(tmp_path / "a.jsonl", metadata, literal)
    (tmp_path / "notes.json").write_text("[]", encoding="utf-8")  # neighbours do not matter
    raw = amazon_folder(tmp_path)
    assert raw.notes == (f"Amazon {year}: b.json.gz with a.jsonl",)
    assert raw.title["B1"] == metadata[0]["title"]
    assert raw.events.item_id == ("B1", "B2")
    assert raw.events.timestamp.tolist()[:3] == [(17_000 + day) * 86_400 for day in (10, 20, 15)]
    assert len(raw.events.user) == (4 if year == 2023 else 5)  # of 2023 the first review of a pair counts
    assert raw.repairs.get("repeated_reviews", 0) == (1 if year == 2023 else 0)


def test_interactions_of_the_hub_go_before_reviews_and_splits(tmp_path: Path) -> None:
    write(tmp_path / "All.jsonl", Y2023)
    write(tmp_path / "meta_All.jsonl", META_2023)
    (tmp_path / "All.csv").write_text(
        "user_id,parent_asin,rating,timestamp\nu,B1,5.0,1600000000000\n", encoding="utf-8"
    )
    (tmp_path / "All.test.csv").write_text("user_id,parent_asin,rating,timestamp,history\n", encoding="utf-8")
    raw = amazon_folder(tmp_path)
    assert raw.events.timestamp.tolist() == [1_600_000_000]
    assert raw.notes[1] == "the interactions are those of All.csv; All.jsonl is not read"


@pytest.mark.parametrize(("year", "order"), [(2014, (0, 1)), (2018, (1, 0))])
def test_ratings_without_a_header(tmp_path: Path, year: int, order: tuple[int, int]) -> None:
    write(tmp_path / "meta.json", META_2014 if year == 2014 else META_2018, literal=True)
    rows = [f"{row[order[0]]},{row[order[1]]},5.0,{(17_000 + row[2]) * 86_400}\n" for row in PAIRS]
    (tmp_path / "ratings.csv").write_text("".join(rows), encoding="utf-8")
    raw = amazon_folder(tmp_path)
    assert raw.notes == (f"Amazon {year}: ratings.csv with meta.json",)
    assert (raw.events.user_id, raw.events.item_id) == (("u", "v"), ("B1", "B2"))
    assert len(raw.events.user) == 5
    write(tmp_path / "reviews.json", Y2014 if year == 2014 else Y2018)
    assert amazon_folder(tmp_path).notes[1].endswith("reviews.json; ratings.csv is not read")


def test_metadata_of_a_neighbouring_release_is_said(tmp_path: Path) -> None:
    write(tmp_path / "reviews.json", Y2018)
    write(tmp_path / "meta.json", META_2014, literal=True)
    assert amazon_folder(tmp_path).notes[1] == "the metadata look like those of 2014"


@pytest.mark.parametrize(
    ("files", "line"),
    [
        (
            {"a": Y2014},
            r"wanted one file of metadata of an Amazon release .*, found a.json; keep the reviews and",
        ),
        ({"a": META_2014}, "wanted one file of reviews of an Amazon release"),
        (
            {"a": Y2014, "b": Y2014, "c": META_2014},
            "wanted one file of reviews .*, found a.json, b.json; keep",
        ),
        (
            {"a": Y2014, "b": META_2023},
            r"wanted metadata of 2014 \(asin and title\) for a.json, .*b.json is of another",
        ),
        (
            {"a": [*Y2014, {"asin": "B1"}], "b": META_2014},
            "row 6: wanted a value in column reviewerID, got an empty cell",
        ),
    ],
)
def test_broken_folders(tmp_path: Path, files: dict[str, list[Record]], line: str) -> None:
    for name, records in files.items():
        write(tmp_path / f"{name}.json", records)
    with pytest.raises(UserError, match=line):
        amazon_folder(tmp_path)


GAMES = [
    {"id": "1", "app_name": "Old name"},
    {"app_name": "No id"},
    {"id": "2", "app_name": "b"},
    {"id": "3"},
    {"id": "4", "app_name": " &quot;Four&amp;quot; "},
    {"id": "5", "app_name": "w " * 24 + "w"},
    {"id": "6", "app_name": "w " * 25 + "w"},
    {"id": "1", "app_name": "Counter™"},
]
REVIEWS = [
    {"username": name, "product_id": item, "date": date} | ({"user_id": user} if user else {})
    for name, user, item, date in [
        ("ann", "a", "1", "2014-06-24"),
        ("bob", None, "1", "2014-06-25"),
        ("ann", "a", "2", "2014-06-24"),
        ("ann", "a", "3", "2014-06-24"),
        ("ann", "a", "4", "June 2014"),
        ("ann", "a", "4", "1970-01-02"),
        ("ann", "a", "5", "2014-06-26"),
        ("ann", "a", "6", "2014-06-27"),
    ]
]


def test_steam_as_the_script_of_igd(tmp_path: Path) -> None:
    write(tmp_path / "steam_games.json.gz", GAMES, literal=True)
    write(tmp_path / "steam_reviews.json", REVIEWS, literal=True)
    raw = steam_folder(tmp_path)
    assert raw.title == {"1": "Counter™", "4": '"Four&quot;', "5": GAMES[5]["app_name"]}
    assert raw.repairs == {
        "rows_without_user": 1,
        "rows_without_item_or_date": 1,
        "rows_of_untitled_items": 3,
    }
    assert raw.events.timestamp.tolist() == [1_403_568_000, 86_400, 1_403_740_800]
    assert steam_folder(tmp_path, BY_NAME).events.user_id == ("ann", "bob")


def test_steam_without_what_it_needs(tmp_path: Path) -> None:
    write(tmp_path / "steam_reviews.json", REVIEWS, literal=True)
    with pytest.raises(
        UserError, match=r"wanted one file of Steam games \(app_name, id\) in .*, found steam_reviews"
    ):
        steam_folder(tmp_path)
    write(tmp_path / "steam_games.json", GAMES, literal=True)
    with pytest.raises(
        UserError, match="wanted reviews with nickname, product_id, date and a game that steam_games"
    ):
        steam_folder(tmp_path, DataSettings(source="", user_column="nickname"))


# --- real files -------------------------------------------------------------------------------------------------------


def test_real_digital_music_of_2014_in_windows(tmp_path: Path) -> None:
    data = prepare(
        f"amazon:{shared('amazon2014_digital_music')}", tmp_path / "out", split="time-windows", max_history=10
    )
    counts = data.info["counts"]
    assert (counts["users"], counts["items"], counts["interactions"]) == (2_490, 382, 6_908)
    assert [counts[f"{name}_rows"] for name in ("train", "valid", "test")] == [1_601, 200, 201]
    assert data.info["repairs"]["catalogue_rows_without_title"] == 98


@pytest.mark.parametrize("without", [(), ("All_Beauty.csv.gz",)])
def test_real_all_beauty_of_2023_is_the_published_split(tmp_path: Path, without: tuple[str, ...]) -> None:
    """Also out of the raw reviews, which hold nine pairs twice."""
    folder = shared("amazon2023_all_beauty")
    linked = tmp_path / "in"
    linked.mkdir()
    for path in folder.iterdir():
        if path.name not in without:
            (linked / path.name).symlink_to(path)
    data = prepare(f"amazon:{linked}", tmp_path / "out", max_history=100)
    assert data.info["repairs"].get("repeated_reviews", 0) == (9 if without else 0)
    for name in ("valid", "test"):
        published = pl.read_csv(folder / f"All_Beauty.{name}.csv.gz")
        rows = {
            user: (item, (history or "").split())
            for user, item, history in published.select("user_id", "parent_asin", "history").iter_rows()
        }
        split, item_id = getattr(data, name), data.catalog.item_id
        ours = {
            user: (item_id[target], [item_id[item] for item in history])
            for user, target, history in zip(split.user_id, split.target, split.history, strict=True)
        }
        assert len(rows) == 253
        assert ours == rows
