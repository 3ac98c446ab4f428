"""Small inputs as people have them, and what each has to give; the inputs lie beside the project."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.conftest import SHARED
from triewise.data import Dataset, prepare
from triewise.errors import UserError
from triewise.ranking import Groups
from triewise.serving import answer

CASES = SHARED.parent / "cases" / "data"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason=f"the cases are not beside the project ({CASES})")
TITLES = [f"Title number {number}" for number in range(8)]
Check = Callable[[Dataset], object]


def finding(data: Dataset, name: str) -> dict[str, Any]:
    return next(found for found in data.info["lint"] if found["name"] == name)


def row(data: Dataset, user: str) -> tuple[list[str], str]:
    """History and target of a user's test row, as raw ids."""
    ids, place = data.catalog.item_id, data.test.user_id.tolist().index(user)
    return [ids[item] for item in data.test.history[place]], ids[data.test.target[place]]


def is_base(data: Dataset, titles: list[str] | None = None) -> None:
    """Six users, eight items, and the histories from which all cases are made."""
    counts = data.info["counts"]
    assert (counts["users"], counts["items"], counts["interactions"]) == (6, 8, 30)
    assert [len(history) for history in data.test.history] == [4] * 6
    ids = data.catalog.item_id
    for user, name in enumerate(data.test.user_id.tolist()):
        taken = [ids[(user + step) % 8] for step in (0, 3, 6, 1, 4)]
        assert row(data, name) == (taken[:4], taken[4])
    assert list(data.catalog.title) == (titles or TITLES)


def has_titles(**changed: str) -> Check:
    """The base, with some titles."""
    return lambda data: is_base(data, [changed.get(f"i{number}", TITLES[number]) for number in range(8)])


def counts(**wanted: int) -> Check:
    def check(data: Dataset) -> None:
        assert {name: (data.info["counts"] | data.info["repairs"]).get(name) for name in wanted} == wanted

    return check


def found(name: str, count: int, *words: str) -> Check:
    def check(data: Dataset) -> None:
        got = finding(data, name)
        assert got["count"] == count, got
        assert all(word in got["example"] for word in words), got

    return check


def noted(*words: str) -> Check:
    def check(data: Dataset) -> None:
        assert all(any(word in note for note in data.info["notes"]) for word in words), data.info["notes"]

    return check


def same_row(user: str, history: str, target: str) -> Check:
    return lambda data: row(data, user) == (history.split(), target) or pytest.fail(str(row(data, user)))


def first_time(second: int) -> Check:
    return lambda data: data.train.timestamp.min() == second or pytest.fail(str(data.train.timestamp.min()))


def hashes_of(*names: str) -> Check:
    return lambda data: (
        sorted(data.info["raw_sha256"]) == sorted(names) or pytest.fail(str(data.info["raw_sha256"]))
    )


# (case, options) -> a line of error, or what the prepared folder has to be
CHECKS: list[tuple[str, dict[str, Any], str | list[Check]]] = [
    ("01a-stray-quote-in-title", {}, [has_titles(i2='3.5" floppy disk', i5='Monitor 24" wide')]),
    ("01d-backslash-escaped-quotes", {}, [has_titles(i2='The "Best" of')]),
    ("02a-path-with-brackets/data [v2]", {}, [is_base]),
    ("02i-glob-reads-the-sibling-folder/shop[1]", {}, [is_base, hashes_of("inter.csv", "items.csv")]),
    ("03c-hidden-copy", {}, [is_base, hashes_of("inter.csv", "items.csv")]),
    ("04a-users-table-beside", {}, [is_base, hashes_of("inter.csv", "items.csv")]),
    ("04d-tags-table", {}, [is_base, noted("interactions are read from inter.csv, not from tags.csv")]),
    ("05b-utf16", {}, [is_base, noted("items.csv is not UTF-8")]),
    ("05e-cp1252-mojibake", {}, [found("mis_decoded_titles", 1, "CafÃ©", "clean = 'mojibake'")]),
    ("07e-upper-case-extension", {}, [is_base]),
    ("07h-semicolon", {}, [is_base]),
    (
        "08a-milliseconds-order-inside-a-second",
        {},
        [is_base, same_row("u0", "i0 i3 i6 i1", "i4"), counts(milliseconds=30)],
    ),
    (
        "08aa-two-events-in-one-second-are-duplicates",
        {},
        [counts(interactions=32, duplicate_rows=None), same_row("u0", "i0 i0 i0 i1 i2 i3", "i4")],
    ),
    ("08c-microseconds", {}, [is_base, counts(microseconds=30), first_time(1600000060)]),
    ("08e-yyyymmdd", {}, [is_base, counts(calendar_dates=30), first_time(1577923200)]),
    ("08i-all-zero", {}, [found("ties", 30, "user u0 has 5 of one time"), found("ties_test_targets", 6)]),
    ("08i-all-zero", {"ties": "file"}, [is_base, noted("in the order of the file")]),
    (
        "08j-minus-one-unknown",
        {},
        "inter.csv, row 1: wanted Unix seconds .* got '-1'; .*leave such rows out with --bad",
    ),
    ("08j-minus-one-unknown", {"bad_rows": "drop"}, [counts(bad_rows=6, interactions=24)]),
    ("08v-iso-hh:mm-T", {}, [is_base, first_time(1569888060)]),
    ("09a-float-ids-in-csv", {}, r"8 have none, first '0\.0'; all would match without '\.0' .* for '0'"),
    ("10a-leading-zeros-one-side", {}, "first '00000'; all would match without leading zeros: .* for '0'"),
    (
        "11b-user-ids-with-trailing-space",
        {},
        [found("look_alike_users", 2, "'u1' and 'u1 ' differ in outer space only")],
    ),
    ("11c-header-with-spaces", {}, [is_base]),
    ("11f-very-huge-int-5000-digits", {}, [counts(users=6, items=8)]),
    (
        "13a-duplicate-column-in-header",
        {},
        "wanted each column once in .*inter.csv, found user, item, timestamp, item",
    ),
    ("13g-no-header", {}, r"inter.csv \(u0, i0, 1600000000\).*; inter.csv has no header, add one"),
    ("14e-nfc-nfd-pair", {}, [found("look_alike_titles", 5, r"'Caf\xe9' and 'Cafe\u0301' look alike")]),
    ("14e-nfc-nfd-pair", {"clean": "control+nfc"}, [found("look_alike_titles", 0), counts(titles_merged=3)]),
    (
        "14h-html-not-cleaned-no-hint",
        {},
        [found("markup_in_titles", 1, "Tom &amp; Jerry", "clean = 'html+tags'")],
    ),
    ("14h-html-not-cleaned-no-hint", {}, [found("look_alike_titles", 2, "Tom & Jerry")]),
    ("14h-html-not-cleaned-no-hint", {"clean": "html"}, [found("markup_in_titles", 0)]),
    ("14k-case-and-space-variants", {}, [found("look_alike_titles", 6, "Pen blue")]),
    ("14o-control-and-ansi", {}, [found("control_characters_in_titles", 4, "clean = 'control'")]),
    ("15a-catalogue-items-without-interactions", {}, [is_base, counts(titles_without_interactions=4)]),
    ("15a-catalogue-items-without-interactions", {"keep_unused": True}, [counts(items=12, interactions=30)]),
    ("15b-interactions-without-catalogue-row", {}, "2 have none, first 'i6'; .* with --untitled drop"),
    (
        "15b-interactions-without-catalogue-row",
        {"untitled": "drop", "k_core": 2},
        [counts(items=6, rows_of_untitled_items=7)],
    ),
    (
        "15d-two-titles-for-one-item",
        {},
        "got 'Title number 3' and .* for 'i3'; .* choose with --second-titles",
    ),
    (
        "15d-two-titles-for-one-item",
        {"second_titles": "first"},
        [is_base, counts(items_with_second_titles=1)],
    ),
    ("15d-two-titles-for-one-item", {"second_titles": "last"}, [has_titles(i3="Title number 3 (new)")]),
    ("15d-two-titles-for-one-item", {"second_titles": "most-frequent"}, [is_base]),
    ("15f-one-table-with-titles", {}, [lambda data: is_base(data, [f"T{number}" for number in range(8)])]),
    (
        "16a-parquet-shards-in-subfolder",
        {},
        [is_base, hashes_of("inter/part-0000.parquet", "inter/part-0001.parquet", "items.parquet")],
    ),
    ("16f-several-interaction-csv", {}, [is_base, noted("2020.csv, 2021.csv as one table")]),
    ("19e-no-timestamp", {}, "wanted a column for the time .* take the order of the file with --ties file"),
    (
        "19e-no-timestamp",
        {"ties": "file"},
        [is_base, noted("there are no times: the events of a user are in the order of the file")],
    ),
    ("20h2-msl-timestamp-ms", {}, [counts(milliseconds=15), first_time(1600000000)]),
    (
        "21d-minionerec-info-three-columns",
        {},
        [
            lambda data: (
                list(data.catalog.title) == [f"T {i}" for i in range(8)]
                or pytest.fail(str(data.catalog.title))
            )
        ],
    ),
    ("22b-ml100k-resaved-utf8", {}, [lambda data: data.catalog.index("Café (1990)")]),
    (
        "25b-recbole-space-separated",
        {},
        "x.item, whose header has spaces between them, got 4; save the file with tabs",
    ),
    ("25f-recbole-exponent-9-digits-lost", {}, [found("ties", 30), found("ties_test_targets", 6)]),
    (
        "30a-amazon2023-csv-plus-meta-csv",
        {},
        [lambda data: is_base(data, [f"Title {number}" for number in range(8)]), counts(milliseconds=30)],
    ),
    (
        "30e-hm",
        {
            "user_column": "customer_id",
            "item_column": "article_id",
            "time_column": "t_dat",
            "title_column": "prod_name",
        },
        [lambda data: is_base(data, [f"Strap top {number}" for number in range(8)])],
    ),
    ("30e-hm", {}, "name its columns with --user-column"),
    ("32b-file-order-lost-on-ties", {}, [found("ties", 24), found("ties_test_targets", 6, "user u0")]),
    ("32b-file-order-lost-on-ties", {"ties": "file"}, [same_row("u0", "i7 i3 i5", "i0")]),
    ("33a-rating-column-negative-feedback", {}, [is_base, noted("the column rating is not used")]),
    (
        "33a-rating-column-negative-feedback",
        {"min_rating": 4},
        [counts(rows_below_min_rating=18, interactions=12)],
    ),
    ("33b-event-type-column", {}, [is_base, noted("the column event is not used", "purchase (12)")]),
    ("33b-event-type-column", {"events": ("purchase",)}, [counts(rows_of_other_events=18, interactions=12)]),
    (
        "33b-event-type-column",
        {"events": ("buy",)},
        "wanted events of column event in .*, got 'buy'; there are purchase",
    ),
]
KINDS = {"20": "msl", "21": "d3", "22": "movielens", "25": "recbole"}
TOO_FEW = {"min_rating", "events"}  # leave two interactions a user, which is none for validation


@pytest.mark.parametrize(
    ("name", "options", "wanted"),
    CHECKS,
    ids=[f"{name}{' '.join(map(str, o.items()))}" for name, o, _ in CHECKS],
)
def test_every_case_has_its_right_value(
    name: str, options: dict[str, Any], wanted: str | list[Check], tmp_path: Path
) -> None:
    source = f"{KINDS.get(name[:2], 'csv')}:{CASES / name}"
    if isinstance(wanted, str):
        with pytest.raises(UserError, match=wanted) as caught:
            prepare(source, tmp_path / "out", **options)
        assert "\n" not in str(caught.value)
        return
    if set(options) & TOO_FEW:
        options = options | {"split": "time-growing"}
    data = prepare(source, tmp_path / "out", **options)
    for check in wanted:
        check(data)


def test_every_case_of_the_folder_is_here() -> None:
    assert {name.partition("/")[0] for name, _, _ in CHECKS} == {path.name for path in CASES.iterdir()}


@pytest.mark.parametrize("name", ["  Café ", "Cafe\u0301", "Café"])
def test_a_history_is_found_whatever_its_normal_form_and_outer_space(name: str, tmp_path: Path) -> None:
    data = prepare(f"csv:{CASES / '14e-nfc-nfd-pair'}", tmp_path / "out")
    assert data.catalog.title[data.catalog.index(name)] in ("Café", "Cafe\u0301")
    assert re.match("Cafe", data.catalog.spelled(" Cafe\u200b"))
    seen: list[list[int]] = []

    def recommend(histories: list[list[int]], *_: object) -> SimpleNamespace:
        seen.extend(histories)
        none = np.full((1, 1), -1)
        return SimpleNamespace(items=none, scores=none, certified=[True], tied=None, counters={})

    groups = Groups.from_labels(data.catalog.group)
    recommender: Any = SimpleNamespace(catalog=data.catalog, groups=groups, recommend=recommend, former=None)
    assert answer(recommender, [[name]], 1).of_each[0].unknown == ()
    assert len(seen[0]) == 1
