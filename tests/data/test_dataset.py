"""Prepared folders: what is in them, that they are whole or refused, and the real data sets' known numbers."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from random import Random

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings, strategies as st

import triewise
from tests.conftest import shared
from tests.data.test_fetch import ZIP, cache  # noqa: F401  (a fixture)
from tests.data_fixtures import (
    CLEAN_FILMS,
    write_1m,
    write_100k,
    write_d3,
    write_d3_original,
    write_latest,
    write_msl,
    write_recbole,
    write_tables,
)
from triewise import cache as store, cli, files
from triewise.data import Dataset, Interactions, fetch, load_dataset, prepare
from triewise.data.readers import csv_folder
from triewise.data.splits import WAYS, lazy_splits
from triewise.errors import UserError
from triewise.files import read_json
from triewise.recipe import Recipe

FILES = ["catalog.parquet", "dataset.json", "test.parquet", "train.parquet", "valid.parquet"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# --- what is in them --------------------------------------------------------------------------------------------------


def test_a_prepared_folder_has_the_promised_files_and_columns(tmp_path: Path) -> None:
    raw = write_msl(tmp_path / "raw")
    before = contents(raw)
    dataset = prepare(f"msl:{raw}", tmp_path / "out")
    assert contents(raw) == before
    assert sorted(contents(tmp_path / "out")) == FILES
    catalog = pl.read_parquet(tmp_path / "out" / "catalog.parquet")
    assert catalog.rows() == [
        (0, "1", "Pen, blue", 0, 2),
        (1, "2", "Tape\nwide", 1, 0),
        (2, "3", "Ink &amp; well", 2, 1),
        (3, "4", "", 3, 0),
        (4, "10", "Pen, blue", 0, 1),
    ]
    assert catalog.columns == ["item", "item_id", "title", "group", "train_targets"]
    train = pl.read_parquet(tmp_path / "out" / "train.parquet")
    assert train.schema == {
        "user_id": pl.String,
        "history": pl.List(pl.Int32),
        "target": pl.Int32,
        "timestamp": pl.Int64,
    }
    assert train.rows()[0] == ("7", [0, 1], 2, 100)
    assert dataset.train_targets.tolist() == [2, 0, 1, 0, 1]
    assert repr(dataset) == f"Dataset({tmp_path / 'out'}, 5 items, 4/1/2 rows)"


def test_dataset_json_says_what_was_done(tmp_path: Path) -> None:
    raw = write_msl(tmp_path / "Amazon_Office")
    prepare(f"msl:{raw}", tmp_path / "out")
    info = json.loads((tmp_path / "out" / "dataset.json").read_text(encoding="utf-8"))
    assert info["format"] == 1
    assert info["source"] == f"msl:{raw}"
    assert info["settings"] == {"split": "published", "max_history": 20, "clean": "none", "k_core": 0}
    assert (info["noun"], info["verb"]) == ("office products", "used")
    assert info["counts"] == {
        "users": 3,
        "items": 5,
        "titles": 4,
        "interactions": 11,
        "train_rows": 4,
        "valid_rows": 1,
        "test_rows": 2,
    }
    assert info["repairs"] == {"empty_titles": 1}
    assert info["notes"] == []
    assert info["citation"] is None
    for name, digest in info["sha256"].items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == digest
    assert sorted(info["sha256"]) == [name for name in FILES if name != "dataset.json"]
    assert info["raw_sha256"]["train.csv"] == hashlib.sha256((raw / "train.csv").read_bytes()).hexdigest()


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    raw = write_msl(tmp_path / "raw")
    prepare(f"msl:{raw}", tmp_path / "one")
    prepare(f"msl:{raw}", tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_histories_are_cut_to_max_history(tmp_path: Path) -> None:
    raw = write_msl(tmp_path / "raw")
    dataset = prepare(f"msl:{raw}", tmp_path / "out", max_history=1)
    assert [row.tolist() for row in dataset.train.history] == [[1], [2], [3], [0]]
    assert dataset.info["settings"]["max_history"] == 1


def test_movielens_is_split_by_leave_one_out(cache: Path, tmp_path: Path) -> None:  # noqa: F811
    (cache / "ml-100k.zip").write_bytes(ZIP)
    dataset = prepare("ml-100k", tmp_path / "out")
    assert dataset.info["settings"]["split"] == "leave-one-out"
    assert (dataset.info["noun"], dataset.info["verb"]) == ("movies", "watched")
    assert dataset.info["citation"] == fetch.CITATION
    ids = np.array(dataset.catalog.item_id)
    assert ids[dataset.test.target].tolist() == ["2", "2"]
    assert ids[dataset.valid.target].tolist() == ["10", "9"]
    assert dataset.test.seen is not None
    assert [ids[row].tolist() for row in dataset.test.seen] == [["7", "9", "10"], ["10", "9"]]
    assert dataset.catalog.n_titles == 3


def test_users_without_a_test_row_are_counted(
    cache: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = b"user\titem\ttimestamp\trating\n1\t2\t5\t1\n1\t7\t6\t1\n2\t2\t5\t1\n2\t7\t6\t1\n2\t9\t7\t1\n3\t9\t7\t1\n"
    (cache / fetch.INTERACTIONS).write_bytes(rows)
    (cache / fetch.TITLES).write_bytes(b"item\ttitle\n2\ta\n7\tb\n9\tc\n")
    monkeypatch.setattr("triewise.data.sources.fetch", lambda _: cache)
    dataset = prepare("ml-100k", tmp_path / "out")
    assert dataset.info["repairs"] == {"users_without_test_row": 2}
    assert dataset.info["counts"]["users"] == 3
    (cache / fetch.INTERACTIONS).write_bytes(rows[:40])
    with pytest.raises(
        UserError, match="wanted rows for train, valid and test from ml-100k, found none for valid"
    ):
        prepare("ml-100k", tmp_path / "other")


@pytest.mark.parametrize(
    ("kind", "name", "expected"),
    [
        ("msl", "Amazon_Books", ("books", "read")),
        ("msl", "toys", ("toys", "played")),
        ("msl", "Clothing", ("clothing", "worn")),
        ("msl", "x", ("items", "bought")),
        ("d3", "amazon_games_d3", ("video games", "enjoyed")),
        ("d3", "Toys_and_Games", ("toys and games", "enjoyed")),
        ("d3", "CDs_and_Vinyl", ("musics", "enjoyed")),
        ("d3", "x", ("items", "bought")),
    ],
)
def test_noun_and_verb_follow_the_folder(
    tmp_path: Path, kind: str, name: str, expected: tuple[str, str]
) -> None:
    raw = (write_msl if kind == "msl" else write_d3)(tmp_path / name)
    info = prepare(f"{kind}:{raw}", tmp_path / "out").info
    assert (info["noun"], info["verb"]) == expected


def test_noun_and_verb_of_d3_may_follow_the_file(tmp_path: Path) -> None:
    info = prepare(f"d3:{write_d3_original(tmp_path / 'x')}", tmp_path / "out").info
    assert (info["noun"], info["verb"]) == ("video games", "enjoyed")
    assert sorted(info["raw_sha256"])[0] == "info/Video_Games_5_2012-10-2018-11.txt"


# --- raw sources ------------------------------------------------------------------------------------------------------

SHAPES = {
    "movielens": [write_100k, write_1m, write_latest],
    "recbole": [write_recbole],
    "csv": [write_tables, lambda folder: write_tables(folder, "parquet")],
}


def test_every_shape_of_the_same_ratings_is_prepared_to_the_same_bytes(
    cache: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    (cache / "ml-100k.zip").write_bytes(ZIP)
    prepare("ml-100k", tmp_path / "out")
    wanted = contents(tmp_path / "out")
    del wanted["dataset.json"]
    for kind, shapes in SHAPES.items():
        for number, write in enumerate(shapes):
            raw = write(tmp_path / f"{kind}-{number}" / "ml-raw")
            info = prepare(f"{kind}:{raw}", tmp_path / "again").info
            got = contents(tmp_path / "again")
            del got["dataset.json"]
            assert got == wanted, raw
            assert (info["noun"], info["verb"]) == ("movies", "watched")
            assert info["repairs"] == {"rows_out_of_time_order": 2}
            assert sorted(info["raw_sha256"]) == sorted(path.name for path in raw.iterdir())
            assert info["citation"] == (fetch.CITATION if kind == "movielens" else None)


def many_rows(n_users: int = 30, n_rows: int = 12, seed: int = 0) -> list[tuple[int, int, int, int]]:
    """Ratings of the four films at random times, some of them twice."""
    rng = np.random.default_rng(seed)
    return [
        (user, int(rng.choice(list(CLEAN_FILMS))), 5, int(rng.integers(0, 500)))
        for user in range(n_users)
        for _ in range(n_rows)
    ]


@pytest.mark.parametrize("split", WAYS[:3])
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), random=st.randoms(use_true_random=False))
def test_the_order_of_the_rows_of_a_file_changes_nothing(split: str, seed: int, random: Random) -> None:
    rows = many_rows(n_users=8, seed=seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = []
        for form in ("csv", "parquet"):
            source = f"csv:{write_tables(folder / form, form, rows)}"
            prepare(source, folder / "out", max_history=4, k_core=2, split=split)
            found.append(contents(folder / "out"))
            del found[-1]["dataset.json"]
            random.shuffle(rows)
    assert found[0] == found[1]


@pytest.mark.parametrize("split", ["time-windows", "time-growing"])
def test_a_split_by_time_is_written_as_it_is_defined(tmp_path: Path, split: str) -> None:
    raw = csv_folder(write_tables(tmp_path / "raw", rows=many_rows()))
    dataset = prepare(f"csv:{tmp_path / 'raw'}", tmp_path / "out", max_history=3, k_core=5, split=split)
    assert dataset.info["settings"] == {"split": split, "max_history": 3, "clean": "none", "k_core": 5}
    interactions = Interactions.from_events(raw.events, raw.title, 5)
    for name, wanted in zip(("train", "valid", "test"), lazy_splits(interactions, split, 3), strict=True):
        got = getattr(dataset, name)
        assert got.to_frame().equals(wanted.part(0, wanted.n_rows).to_frame())
        assert got.n_rows == dataset.info["counts"][f"{name}_rows"]
    assert dataset.info["counts"]["interactions"] == len(interactions.item)
    assert dataset.info["repairs"]["duplicate_rows"] == 360 - len(set(map(repr, many_rows())))
    assert dataset.info["notes"][0].startswith("the column stars is not used: every row counts")
    assert dataset.info["notes"][1:] == list(interactions.notes)


def test_the_last_of_few_users_is_counted_where_it_gives_no_row(tmp_path: Path) -> None:
    rows = [*many_rows(4, 4), (9, 2, 5, 7)]
    source = f"csv:{write_tables(tmp_path / 'raw', rows=rows)}"
    assert prepare(source, tmp_path / "out").info["repairs"]["users_without_test_row"] == 1
    assert prepare(source, tmp_path / "out", split="time-growing").info["repairs"]["users_without_row"] == 1


def test_titles_are_cleaned_before_groups_are_made(tmp_path: Path) -> None:
    raw = write_msl(tmp_path / "raw")
    titles = {"1": "Pen &amp; ink", "2": "Pen  & ink", "3": "Tape", "4": " ", "10": "Tape"}
    (raw / "id2name4Rec.json").write_text(json.dumps(titles), encoding="utf-8")
    dataset = prepare(f"msl:{raw}", tmp_path / "out", clean="html+space")
    assert dataset.catalog.title == ("Pen & ink", "Pen & ink", "Tape", "", "Tape")
    assert dataset.catalog.group.tolist() == [0, 0, 2, 3, 2]
    assert dataset.info["settings"]["clean"] == "html+space"
    assert dataset.info["repairs"] == {"titles_cleaned": 3, "titles_merged": 1}


def test_a_raw_title_of_which_cleaning_leaves_nothing_is_an_error(tmp_path: Path) -> None:
    raw = write_tables(tmp_path / "raw")
    text = (raw / "items.csv").read_text(encoding="utf-8").replace("unknown", "&nbsp;")
    (raw / "items.csv").write_text(text, encoding="utf-8")
    assert prepare(f"csv:{raw}", tmp_path / "out").catalog.title[2] == "&nbsp;"
    with pytest.raises(
        UserError,
        match="wanted a title for each item, clean = 'html.space' leaves nothing of 1, first '9'; repair",
    ):
        prepare(f"csv:{raw}", tmp_path / "out", clean="html+space")


def test_an_item_without_title_may_be_outside_the_k_core(tmp_path: Path) -> None:
    rows = [*many_rows(), (0, 77, 5, 600)]
    source = f"csv:{write_tables(tmp_path / 'raw', rows=rows)}"
    with pytest.raises(UserError, match="wanted a title for each item, 1 have none, first '77'; add them"):
        prepare(source, tmp_path / "out")
    assert prepare(source, tmp_path / "out", k_core=2).catalog.n_items == 4


def test_the_lint_is_kept(tmp_path: Path) -> None:
    lint = prepare(f"msl:{write_msl(tmp_path / 'raw')}", tmp_path / "out").info["lint"]
    assert load_dataset(tmp_path / "out").info["lint"] == lint
    assert {"name": "empty_titles", "count": 1, "of": 5, "example": "item 4 has no title"} in lint
    names = [finding["name"] for finding in lint]
    assert names == [
        "cold_valid_targets",
        "cold_test_targets",
        "targets_in_history_train",
        "targets_in_history_valid",
        "targets_in_history_test",
        "train_targets_after_first_test",
        "duplicate_rows",
        "test_histories_of_one_item",
        "look_alike_titles",
        "markup_in_titles",
        "control_characters_in_titles",
        "mis_decoded_titles",
        "very_long_titles",
        "titles_shared_by_items",
        "empty_titles",
    ]
    raw = prepare(f"csv:{write_tables(tmp_path / 'tables')}", tmp_path / "out").info["lint"]
    assert [finding["name"] for finding in raw] == [
        *names,
        "repeated_interactions",
        "ties",
        "ties_test_targets",
        "times_before_1995",
        "times_in_the_future",
        "look_alike_users",
        "look_alike_items",
    ]


def test_the_command_shows_counts_repairs_and_findings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = write_tables(tmp_path / "raw", rows=many_rows())
    words = ["prepare", f"csv:{raw}", "--out", str(tmp_path / "out"), "--split", "time-windows"]
    words += ["--k-core", "2", "--clean", "html+space", "--max-history", "3"]
    monkeypatch.setattr("sys.argv", ["triewise", *words])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        cli.main()
    output = capsys.readouterr()
    assert (stop.value.code, output.err) == (0, "")
    for line in (
        r"repaired: rows out of time order +1\d\d\n",
        r"lint: targets in history test +\d+ of \d+; user \d+ is to get '.*', which is in the history\n",
        r"lint: repeated interactions +\d+ of \d+; user \d+ has '.*' \d+ times\n",
        r"leaves out low ones; 2-core: 3\d\d of 3\d\d interactions are in it\n",
    ):
        assert re.search(line, output.out), (line, output.out)
    assert "cold" not in output.out  # what does not occur is not shown
    settings = {"split": "time-windows", "max_history": 3, "clean": "html+space", "k_core": 2}
    assert load_dataset(tmp_path / "out").info["settings"] == settings


# --- larger than the memory -------------------------------------------------------------------------------------------


def test_rows_written_in_parts_are_the_rows_written_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = f"csv:{write_tables(tmp_path / 'raw', rows=many_rows())}"
    at_once = prepare(source, tmp_path / "one", max_history=4)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("triewise.data.dataset._ROWS_TOGETHER", {False: 7, True: 3})
    for room in ("dataset", "sources"):
        monkeypatch.setattr(f"triewise.data.{room}.MANY_ROWS", 1)
    in_parts = prepare(source, tmp_path / "two", max_history=4)
    for name in ("train", "valid", "test"):
        assert getattr(in_parts, name).to_frame().equals(getattr(at_once, name).to_frame())
    notes = capsys.readouterr().err.splitlines()
    n_rows = sum(count for name, count in at_once.info["counts"].items() if name.endswith("_rows"))
    assert notes[0] == f"looking for leaks, cold targets and repeats in {n_rows} rows"
    assert notes[1] == f"writing: {n_rows} rows"
    assert re.fullmatch(rf"writing: {n_rows}/{n_rows} rows in \d+ s", notes[2])


PARTS = """
import sys
from pathlib import Path
from triewise.data import dataset, prepare
dataset._ROWS_TOGETHER, dataset._ROWS_IN_GROUP = {False: 50, True: 50}, 100
prepare("csv:" + sys.argv[1], Path(sys.argv[2]), max_history=5)
"""


def test_the_number_of_threads_changes_no_byte(tmp_path: Path) -> None:
    raw = write_tables(tmp_path / "raw", rows=many_rows(100))
    for threads in ("1", "3"):
        environment = os.environ | {
            "PYTHONPATH": str(Path(triewise.__file__).parents[1]),
            "POLARS_MAX_THREADS": threads,
        }
        command = [sys.executable, "-c", PARTS, str(raw), str(tmp_path / threads)]
        subprocess.run(command, env=environment, check=True, capture_output=True)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_a_split_is_read_when_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = files.scan
    monkeypatch.setattr("triewise.data.dataset.scan", lambda path: read.append(path.name) or real(path))
    raw = write_msl(tmp_path / "raw")
    dataset = prepare(f"msl:{raw}", tmp_path / "out")
    assert read == []
    assert dataset.valid is dataset.valid
    assert read == ["valid.parquet"]
    load_dataset(tmp_path / "out")
    assert read == ["valid.parquet", "catalog.parquet"]
    prepare(f"msl:{raw}", tmp_path / "out", max_history=1)
    with pytest.raises(UserError, match=r"train.parquet is not the file that was prepared"):
        _ = dataset.train  # the folder was prepared anew since


# --- what a recipe wants ----------------------------------------------------------------------------------------------


def test_a_recipe_gets_the_data_it_asks_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from triewise.app.folders import open_data
    from triewise.recipe import parse_recipe

    raw = write_tables(tmp_path / "raw", rows=many_rows())

    def recipe(**changes: object) -> Recipe:
        data = {"source": f"csv:{raw}", "folder": tmp_path / "out", **changes}
        return parse_recipe({"name": "x", "data": data}, "f")

    wanted = {"split": "time-growing", "k_core": 3, "clean": "html+space", "max_history": 5}
    assert open_data(recipe(**wanted)).info["settings"] == wanted
    assert open_data(recipe(**wanted)).info["settings"] == wanted
    for name, value in [("split", "time-windows"), ("k_core", 0), ("clean", "none")]:
        with pytest.raises(
            UserError,
            match=rf"was prepared with {name} = .*, the recipe wants '?{value}'?; give another data.folder",
        ):
            open_data(recipe(**wanted | {name: value}))
    with pytest.raises(
        UserError,
        match="data.split: Input should be 'leave-one-out', 'time-windows', 'time-growing' or 'dates'",
    ):
        recipe(split="random")


def test_a_recipe_reads_a_folder_of_before_there_was_a_choice(tmp_path: Path) -> None:
    from triewise.app.folders import open_data
    from triewise.recipe import parse_recipe

    source = f"msl:{write_msl(tmp_path / 'raw')}"
    info = prepare(source, tmp_path / "out").info
    del info["settings"]["k_core"], info["lint"]
    (tmp_path / "out" / "dataset.json").write_text(json.dumps(info), encoding="utf-8")
    data = {"source": source, "folder": tmp_path / "out"}
    assert open_data(parse_recipe({"name": "x", "data": data}, "f")).test.n_rows == 2
    with pytest.raises(UserError, match="wanted no split and no k_core for msl:"):
        open_data(parse_recipe({"name": "x", "data": data | {"k_core": 5}}, "f"))


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("amazon:Books", "wanted the folder Books, which does not exist"),
        ("steam:", "wanted a folder after steam:, got nothing"),
        ("ml-10m", "wanted one of ml-100k, .* or csv:DIR as the source, got 'ml-10m'; choose one of them"),
        ("movielens:nowhere", "wanted the folder nowhere, which does not exist"),
        ("recbole:nowhere", "wanted the folder nowhere, which does not exist"),
        ("csv:nowhere", "wanted the folder nowhere, which does not exist"),
        ("csv:", "wanted a folder after csv:, got nothing; write for example csv:data/games"),
        ("ml-100k:x", "wanted one of .*, got 'ml-100k:x'"),
        ("", "wanted one of .*, got ''"),
        (r"C:\data", "wanted one of .*, got"),
        ("msl", "wanted one of .*, got 'msl'"),
        ("msl:", "wanted a folder after msl:, got nothing"),
        ("d3:nowhere", "wanted the folder nowhere, which does not exist"),
        (r"msl:C:\nowhere", r"wanted the folder C:.*nowhere, which does not exist"),
    ],
)
def test_sources_that_are_not_there(tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_settings_are_checked(tmp_path: Path) -> None:
    raw = write_msl(tmp_path / "raw")
    with pytest.raises(UserError, match="wanted max_history of at least 1, got 0"):
        prepare(f"msl:{raw}", tmp_path / "out", max_history=0)
    with pytest.raises(UserError, match="wanted clean to be 'none', 'all' or steps of .*, got 'x'; choose"):
        prepare(f"msl:{raw}", tmp_path / "out", clean="x")
    with pytest.raises(
        UserError, match="wanted k_core of at least 0, got -1; choose for example 5, or 0 for none"
    ):
        prepare("ml-100k", tmp_path / "out", k_core=-1)
    with pytest.raises(
        UserError,
        match="wanted split to be one of leave-one-out, time-windows, time-growing, dates, got 'random'",
    ):
        prepare("ml-100k", tmp_path / "out", split="random")
    for kind, change in [("msl", {"k_core": 5}), ("msl", {"split": "time-windows"}), ("d3", {"k_core": 2})]:
        with pytest.raises(
            UserError,
            match=rf"wanted no split and no k_core for {kind}:, which its authors have split, got .*; leave",
        ):
            prepare(f"{kind}:{raw}", tmp_path / "out", **change)  # type: ignore[arg-type]


def test_only_a_prepared_folder_is_replaced(tmp_path: Path) -> None:
    raw = write_msl(tmp_path / "raw")
    before = contents(raw)
    with pytest.raises(
        UserError, match=r"wanted an empty or a prepared folder, .*raw holds id2name4Rec.json"
    ):
        prepare(f"msl:{raw}", raw)
    with pytest.raises(UserError, match=r"wanted an empty or a prepared folder, .* holds raw"):
        prepare(f"msl:{raw}", tmp_path)
    with pytest.raises(UserError, match=r"wanted a folder to write, .*train.csv is a file"):
        prepare(f"msl:{raw}", raw / "train.csv")
    assert contents(raw) == before
    (tmp_path / "out").mkdir()
    prepare(f"msl:{raw}", tmp_path / "out")
    assert prepare(f"msl:{raw}", tmp_path / "out", max_history=1).info["settings"]["max_history"] == 1


def test_a_place_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    raw = write_msl(tmp_path / "raw")
    with pytest.raises(UserError, match=r"cannot write .*train.csv/out: .*; choose another folder"):
        prepare(f"msl:{raw}", raw / "train.csv" / "out")


def test_a_failure_leaves_the_older_folder_alone(tmp_path: Path) -> None:
    raw = write_msl(tmp_path / "raw")
    prepare(f"msl:{raw}", tmp_path / "out")
    before = contents(tmp_path / "out")
    (raw / "test.csv").unlink()
    with pytest.raises(UserError, match=r"wanted the file test.csv"):
        prepare(f"msl:{raw}", tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_loading_checks_everything(tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(f"msl:{write_msl(tmp_path / 'raw')}", out)
    assert isinstance(load_dataset(out), Dataset)
    with pytest.raises(
        UserError, match=r"wanted a prepared folder, .*raw has no dataset.json; run: triewise prepare"
    ):
        load_dataset(tmp_path / "raw")
    good, info = contents(out), read_json(out / "dataset.json")
    for change, message in [
        ({"format": 2}, "wanted a prepared folder of format 1, .* has 2; prepare it again"),
        ({"sha256": {}}, r"catalog.parquet is not the file that was prepared"),
        ({"sha256": None}, r"catalog.parquet is not the file that was prepared"),
    ]:
        (out / "dataset.json").write_text(json.dumps(info | change), encoding="utf-8")
        with pytest.raises(UserError, match=message):
            load_dataset(out)
    (out / "dataset.json").write_text(
        json.dumps({k: v for k, v in info.items() if k != "noun"}), encoding="utf-8"
    )
    with pytest.raises(UserError, match=r"wanted 'noun' in .*dataset.json, it is missing; prepare it again"):
        load_dataset(out)
    for text, message in [("[]", "dataset.json is damaged"), ("{", "wanted UTF-8 JSON in")]:
        (out / "dataset.json").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            load_dataset(out)
    (out / "dataset.json").write_bytes(good["dataset.json"])
    (out / "test.parquet").write_bytes(good["test.parquet"][:-1])
    with pytest.raises(
        UserError, match=r"test.parquet is not the file that was prepared .its sha256 differs."
    ):
        load_dataset(out)
    (out / "test.parquet").unlink()
    with pytest.raises(
        UserError, match=r"wanted test.parquet in the prepared folder .*, it is missing; prepare it again"
    ):
        load_dataset(out)


# --- a kill at any moment ---------------------------------------------------------------------------------------------

CHILD = """
import os, signal, sys
from pathlib import Path
import polars as pl
from triewise.data import prepare

raw, out, moment, when = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
calls = 0

def killing(real, before):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == when and before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if calls == when:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call

if moment == "write":
    def half(self, path, **options):
        global calls
        calls += 1
        if calls == when:
            Path(path).write_bytes(b"PAR1")
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, path, **options)
    real, pl.LazyFrame.sink_parquet = pl.LazyFrame.sink_parquet, half
else:
    os.replace = killing(os.replace, moment == "before")
prepare("msl:" + raw, out, max_history=2)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
@pytest.mark.parametrize(
    ("moment", "when", "old"),
    [
        ("write", 1, False),
        ("write", 4, True),
        ("before", 1, True),
        ("before", 2, False),
        ("before", 2, True),
        ("after", 2, True),
        ("before", 3, True),
        ("after", 3, True),
    ],
)
def test_a_killed_prepare_leaves_nothing_half_written(
    tmp_path: Path, moment: str, when: int, old: bool
) -> None:
    raw, out = write_msl(tmp_path / "raw"), tmp_path / "out"
    if old:
        prepare(f"msl:{raw}", out, max_history=1)
    # os.replace is called for dataset.json, then, when there is an old folder, to put it aside, then for the new one.
    environment = os.environ | {
        "PYTHONPATH": str(Path(triewise.__file__).parents[1]),
        "POLARS_MAX_THREADS": "1",
    }
    killed = subprocess.run(
        [sys.executable, "-c", CHILD, str(raw), str(out), moment, str(when)],
        env=environment,
        capture_output=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    finished = (moment, when) == ("after", 3)
    if out.exists():
        assert load_dataset(out).info["settings"]["max_history"] == (2 if finished else 1)
        assert finished or old
    else:
        with pytest.raises(UserError, match="wanted a prepared folder"):
            load_dataset(out)
        aside = tmp_path / ".tmp-out.old"
        assert aside.exists() == old
        if old:  # between the two renames: the old folder waits beside its place, whole
            assert load_dataset(aside).info["settings"]["max_history"] == 1
    again = prepare(f"msl:{raw}", out)
    assert again.info["settings"]["max_history"] == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "raw"]


def test_an_interrupted_replacement_is_restored_by_the_next_try(tmp_path: Path) -> None:
    raw, out = write_msl(tmp_path / "raw"), tmp_path / "out"
    prepare(f"msl:{raw}", out)
    before = contents(out)
    out.rename(tmp_path / ".tmp-out.old")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            pl.LazyFrame, "sink_parquet", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full"))
        )
        with pytest.raises(UserError, match=r"cannot write .*: disk full; choose another folder"):
            prepare(f"msl:{raw}", out)
    assert contents(out) == before


# --- real data --------------------------------------------------------------------------------------------------------


def test_amazon_office(tmp_path: Path) -> None:
    dataset = prepare(f"msl:{shared('amazon_office')}", tmp_path / "out")
    assert dataset.info["counts"] == {
        "users": 4895,
        "items": 2414,
        "titles": 2411,
        "interactions": 53149,
        "train_rows": 15400,
        "valid_rows": 1925,
        "test_rows": 1925,
    }
    assert dataset.catalog.title[1422].count("\n") == 1  # id 1423
    assert sum(bool(re.search(r"&#?\w+;", title)) for title in dataset.catalog.title) == 190


def test_amazon_books(tmp_path: Path) -> None:
    dataset = prepare(f"msl:{shared('amazon_books')}", tmp_path / "out")
    counts = dataset.info["counts"]
    assert (counts["items"], counts["titles"]) == (6344, 6335)
    assert (counts["train_rows"], counts["valid_rows"], counts["test_rows"]) == (31164, 3896, 4383)
    assert dataset.catalog.item_id[5745] == "5746"
    assert dataset.catalog.title[5745] == ""
    assert dataset.info["repairs"] == {"empty_titles": 1}
    found = {finding["name"]: finding["count"] for finding in dataset.info["lint"]}
    assert found["targets_in_history_test"] == 13
    assert found["train_targets_after_first_test"] == 0
    assert found["cold_test_targets"] == np.isin(dataset.test.target, dataset.train.target, invert=True).sum()
    assert dataset.info["notes"][0].startswith("no valid.csv: the last 3,896 of the 35,060 training rows")
    assert np.setdiff1d(dataset.test.target, dataset.train.target).size > 200
    assert (np.diff(dataset.train.timestamp) >= 0).all()
    assert dataset.train.timestamp[-1] <= dataset.valid.timestamp[0]


def test_amazon_games_d3(tmp_path: Path) -> None:
    folder = shared("amazon_games_d3")
    dataset = prepare(f"d3:{folder}", tmp_path / "out")
    counts = dataset.info["counts"]
    assert counts["items"] == 3858
    assert (counts["train_rows"], counts["valid_rows"], counts["test_rows"]) == (49133, 6142, 6142)
    lines = (folder / "info.txt").read_text(encoding="utf-8").split("\n")
    assert "".join(f"{t}\t{i}\n" for i, t in enumerate(dataset.catalog.title)).split("\n") == lines
    first = pl.read_csv(folder / "test.csv", n_rows=1)
    assert str(dataset.test.history[0].tolist()) == first["history_item_id"][0]
    assert dataset.test.target[0] == first["item_id"][0]


def cached(name: str) -> None:
    """Skip unless the real release is in the cache: a test does not download."""
    if not fetch.is_whole(store.cache_folder() / name, fetch.RELEASES[name]):
        pytest.skip(f"{name} is not in the cache; triewise prepare {name} --out DIR fetches it")


def test_ml_100k(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached("ml-100k")
    monkeypatch.setenv("TRIEWISE_OFFLINE", "1")
    dataset = prepare("ml-100k", tmp_path / "out")
    assert dataset.info["counts"] == {
        "users": 943,
        "items": 1682,
        "titles": 1664,
        "interactions": 100000,
        "train_rows": 100000 - 3 * 943,
        "valid_rows": 943,
        "test_rows": 943,
    }
    assert dataset.catalog.title[dataset.catalog.item_id.index("267")] == "unknown"
    assert dataset.catalog.title[dataset.catalog.item_id.index("543")] == "Misérables, Les (1995)"
    assert dataset.test.seen is not None
    assert dataset.test.seen.lengths.min() >= 19
    assert dataset.test.history.lengths.max() == 20
    assert not any(
        target in seen for seen, target in zip(dataset.test.seen, dataset.test.target, strict=True)
    )
    count = np.bincount(dataset.test.seen.values, minlength=1682)
    assert (count + np.bincount(dataset.test.target, minlength=1682)).sum() == 100000


def test_the_unpacked_ml_100k_gives_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached("ml-100k")
    monkeypatch.setenv("TRIEWISE_OFFLINE", "1")
    folder = store.cache_folder() / "ml-100k"
    rows = pl.read_csv(folder / fetch.INTERACTIONS, separator="\t").select(
        "user", "item", "rating", "timestamp"
    )
    films = (folder / fetch.TITLES).read_text(encoding="utf-8").split("\n")[1:-1]
    (tmp_path / "raw").mkdir()
    rows.sample(fraction=1, shuffle=True, seed=0).write_csv(
        tmp_path / "raw" / "u.data", separator="\t", include_header=False
    )
    lines = (film.replace("\t", "|") + "|01-Jan-1995||http://x|0|1\n" for film in films)
    (tmp_path / "raw" / "u.item").write_bytes("".join(lines).encode("latin-1"))
    prepare("ml-100k", tmp_path / "one")
    prepare(f"movielens:{tmp_path / 'raw'}", tmp_path / "two")
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    del one["dataset.json"], two["dataset.json"]
    assert one == two


def test_ml_1m(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached("ml-1m")
    monkeypatch.setenv("TRIEWISE_OFFLINE", "1")
    dataset = prepare("ml-1m", tmp_path / "out")
    assert dataset.info["counts"] == {
        "users": 6040,
        "items": 3706,
        "titles": 3706,
        "interactions": 1000209,
        "train_rows": 1000209 - 3 * 6040,
        "valid_rows": 6040,
        "test_rows": 6040,
    }
    assert dataset.info["repairs"] == {"titles_without_interactions": 177}
    assert dataset.catalog.title[dataset.catalog.item_id.index("1320")] == "Alien³ (1992)"
    assert dataset.catalog.item_id[-1] == "3952"
