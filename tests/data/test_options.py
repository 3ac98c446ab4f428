"""What a person can ask of `prepare`: shapes of files, names of columns, what counts, and how rows are split."""

from __future__ import annotations

import ast
import json
import zipfile
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import triewise
from triewise import cli
from triewise.data import Dataset, load_dataset, prepare
from triewise.errors import UserError
from triewise.options import DATA_OPTIONS

TITLES = {f"i{number}": f"Title {number}" for number in range(8)}
EVENTS = [
    (f"u{user}", f"i{(user + step) % 8}", 1_600_000_000 + 1000 * user + 60 * place)
    for user in range(6)
    for place, step in enumerate((0, 3, 6, 1, 4))
]
FRAME = pl.DataFrame(EVENTS, schema=["user", "item", "timestamp"], orient="row")


def write(folder: Path, files: dict[str, str | bytes] | None = None) -> Path:
    """Interactions and titles as CSV; ``files`` adds and replaces some, None takes one away."""
    folder.mkdir(exist_ok=True)
    titles = "item,title\n" + "".join(f"{item},{title}\n" for item, title in TITLES.items())
    for name, content in {"inter.csv": FRAME.write_csv(), "items.csv": titles, **(files or {})}.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def tried(tmp_path: Path, files: dict[str, str | bytes] | None = None, **choices: Any) -> Dataset:
    return prepare(f"csv:{write(tmp_path / 'raw', files)}", tmp_path / "out", **choices)


def size(data: Dataset) -> tuple[int, int, int]:
    return tuple(data.info["counts"][name] for name in ("users", "items", "interactions"))


def refused(
    tmp_path: Path, message: str, files: dict[str, str | bytes] | None = None, **choices: Any
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        tried(tmp_path, files, **choices)
    assert "\n" not in str(caught.value)


def test_one_function_hands_paths_to_polars() -> None:
    """Which would take brackets and stars in a path for a pattern."""
    places = [
        f"{file.stem}:{node.lineno}"
        for file in Path(triewise.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and node.attr.startswith(("read_", "scan_"))
        and isinstance(node.value, ast.Name)
        and node.value.id in ("pl", "polars")
    ]
    assert {place.partition(":")[0] for place in places} == {"files"}
    assert (
        len(places) == 5
    )  # one for each form, in `files.scan`, and `files.parquet_metadata`, which opens the file


# --- shapes -----------------------------------------------------------------------------------------------------------


def zipped(name: str, content: str, *others: str) -> bytes:
    path = Path(name)
    with zipfile.ZipFile(path, "w") as archive:
        for inside in (name, *others):
            archive.writestr(inside.replace(".zip", ".csv"), content)
    return path.read_bytes()


def test_files_may_be_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    FRAME.lazy().sink_csv(tmp_path / "x.zst", compression="zstd")
    packed = {"b.csv.zst": (tmp_path / "x.zst").read_bytes(), "c.zip": zipped("c.zip", FRAME.write_csv())}
    for number, (name, content) in enumerate(packed.items()):
        raw = write(tmp_path / f"raw{number}", {name: content})
        (raw / "inter.csv").unlink()
        assert size(prepare(f"csv:{raw}", tmp_path / "out")) == (6, 8, 30)
    refused(
        tmp_path,
        "wanted one file in .*d.zip, found d.csv, e.csv; unpack it",
        {"d.zip": zipped("d.zip", FRAME.write_csv(), "e.csv"), "inter.csv": "x,y\n"},
    )


def test_json_lines_and_arrays(tmp_path: Path) -> None:
    rows = [{"user": user, "item": item, "timestamp": when, "tags": ["x"]} for user, item, when in EVENTS]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for name, content in (("a.jsonl", lines), ("a.json", json.dumps(rows)), ("a.txt", lines)):
        assert (
            size(tried(tmp_path / name[1:], {name: content, "inter.csv": "x\n"})) == (6, 8, 30)
            if ((tmp_path / name[1:]).mkdir() is None)
            else None
        )
    broken = lines + '{"user": "u1", \n'
    refused(
        tmp_path,
        "a.jsonl, line 31: wanted a JSON object, got .*; repair",
        {"a.jsonl": broken, "inter.csv": "x\n"},
    )
    data = tried(tmp_path, {"a.jsonl": broken, "inter.csv": "x\n"}, bad_rows="drop")
    assert (size(data), data.info["repairs"]["broken_rows"]) == ((6, 8, 30), 1)
    (tmp_path / "raw" / "a.jsonl").unlink()
    refused(
        tmp_path, "wanted a JSON array or JSON lines in .*a.json, got", {"a.json": "[1,", "inter.csv": "x\n"}
    )


def test_folders_of_parquet_may_be_hive_partitions(tmp_path: Path) -> None:
    raw = write(tmp_path / "raw", {"inter.csv": "x\n"})
    for user, part in FRAME.group_by("user"):
        folder = raw / "events" / f"user={user[0]}"
        folder.mkdir(parents=True)
        part.drop("user").write_parquet(folder / "0.parquet")
    assert size(prepare(f"csv:{raw}", tmp_path / "out")) == (6, 8, 30)


def test_neighbours_that_are_no_tables_stop_nothing(tmp_path: Path) -> None:
    beside = {
        "README.txt": "See: http, and\nmore",
        "broken.parquet": b"PAR1",
        "empty.csv": "",
        "n.json": "{}",
    }
    assert size(tried(tmp_path, beside)) == (6, 8, 30)


def test_what_was_prepared_inside_the_source_is_no_table_of_it(tmp_path: Path) -> None:
    source = write(tmp_path / "raw")
    first = prepare(f"csv:{source}", source / "prepared")
    again = prepare(f"csv:{source}", source / "again")
    assert first.info["raw_sha256"] == again.info["raw_sha256"] and size(first) == size(again)


def test_a_file_is_named_where_several_may_be_meant(tmp_path: Path) -> None:
    beside = {"other.csv": "user,item,when,timestamp\nu9,i1,x,5\n", "names.csv": "item,title\ni1,X\n"}
    refused(tmp_path, "found inter.csv .*; other.csv .*--interactions-file", beside)
    refused(
        tmp_path,
        "found items.csv .*; names.csv .*--catalogue-file|found items",
        beside,
        interactions_file="inter.csv",
    )
    files = {"interactions_file": "inter.csv", "catalogue_file": "items.csv"}
    assert size(tried(tmp_path, beside, **files)) == (6, 8, 30)
    refused(
        tmp_path,
        "wanted the table x.csv in .*, found .*inter.csv.*; check the name",
        interactions_file="x.csv",
    )


def test_own_splits_are_kept(tmp_path: Path) -> None:
    place = pl.int_range(pl.len()) % 5
    parts = {
        "train": FRAME.filter(place < 3),
        "valid": FRAME.filter(place == 3),
        "test": FRAME.filter(place == 4),
    }
    files = {f"{name}.csv": part.write_csv() for name, part in parts.items()} | {"inter.csv": "x\n"}
    data = tried(tmp_path, files)
    assert [split.n_rows for split in (data.train, data.valid, data.test)] == [12, 6, 6]
    assert [len(row) for row in data.test.history] == [4] * 6
    assert "as its splits" in data.info["notes"][0]
    (tmp_path / "raw" / "valid.csv").unlink()
    del files["valid.csv"]
    data = tried(tmp_path, files)
    assert [split.n_rows for split in (data.train, data.valid, data.test)] == [11, 1, 6]


def test_recbole_benchmark_files_are_the_splits(tmp_path: Path) -> None:
    head = "user_id:token\titem_id:token\ttimestamp:float\n"
    for name, places in (("train", (0, 1, 2)), ("valid", (3,)), ("test", (4,))):
        rows = ["\t".join(map(str, row)) for number, row in enumerate(EVENTS) if number % 5 in places]
        (tmp_path / f"x.{name}.inter").write_text(head + "\n".join(rows), encoding="utf-8")
    titles = "".join(f"{item}\t{title}\n" for item, title in TITLES.items())
    (tmp_path / "x.item").write_text("item_id:token\tname:token_seq\n" + titles, encoding="utf-8")
    data = prepare(f"recbole:{tmp_path}", tmp_path / "out")
    assert [split.n_rows for split in (data.train, data.valid, data.test)] == [12, 6, 6]


def _listed(folder: Path, **parts: str) -> Path:
    """RecBole's benchmark files with histories: user u0's rows i0 i3 | i6 | i1 and v's."""
    folder.mkdir(exist_ok=True)
    rows = {
        "train": ["u0\ti0\t1\ti3", "u0\ti0 i3\t2\ti6", "v\ti7\t1\ti0", "v\t\t0\ti7"],
        "valid": ["u0\ti0 i3 i6\t3\ti1"],
        "test": ["v\ti7 i0\t2\ti5"],
    }
    head = "session_id:token\titem_id_list:token_seq\titem_length:float\titem_id:token\n"
    for name, lines in rows.items():
        text = parts.get(name, head + "\n".join(lines) + "\n")
        (folder / f"x.{name}.inter").write_text(text, encoding="utf-8")
    titles = "".join(f"{item}\t{title}\n" for item, title in TITLES.items())
    (folder / "x.item").write_text("item_id:token\tname:token_seq\n" + titles, encoding="utf-8")
    return folder


def test_recbole_rows_with_histories_are_taken_as_they_are(tmp_path: Path) -> None:
    raw = _listed(tmp_path / "raw")
    data = prepare(f"recbole:{raw}", tmp_path / "out")
    assert [split.n_rows for split in (data.train, data.valid, data.test)] == [3, 1, 1]
    assert size(data) == (2, 8, 7)
    assert (data.info["settings"]["split"], data.info["repairs"]) == (
        "published",
        {"rows_without_history": 1},
    )
    row = [data.catalog.item_id[item] for item in data.valid.history[0]]
    assert (row, data.catalog.item_id[data.valid.target[0]]) == (["i0", "i3", "i6"], "i1")
    assert data.test.user_id.tolist() == ["v"]
    (raw / "x.valid.inter").unlink()
    rows = "item_id_list\titem_id\ttimestamp\n" + 5 * "i0\ti3\t1600000000000\n"
    data = prepare(f"recbole:{_listed(raw, train=rows, test=rows)}", tmp_path / "out")
    assert data.info["repairs"] == {"milliseconds": 10}
    (raw / "x.valid.inter").unlink()
    data = prepare(f"recbole:{raw}", tmp_path / "out")
    assert "users are counted by the rows whose history is one item" in data.info["notes"][1]
    assert data.info["notes"][2].startswith("no NAME.valid.inter: the last 1 of the 5 training rows")
    assert [data.train.n_rows, *data.valid.timestamp] == [4, 1_600_000_000]


@pytest.mark.parametrize(
    ("test", "line"),
    [
        (
            "item_id_list\titem_id\ttimestamp\ni0 i99\ti1\t1600000000\n",
            "row 1: wanted item ids that x.item has",
        ),
        ("item_id_list\titem_length\titem_id\ni0 i1\t3\ti1\n", "row 1: wanted 2, the number of items of"),
        ("item_id_list\titem_id\ni0 i1\t\n", "row 1: wanted a value in column item_id, got an empty"),
        ("item_id_list\titem_id\ttimestamp\ni0\ti1\tsoon\n", "row 1: wanted Unix seconds or an ISO date in"),
        ("user_id\titem_id\nv\ti1\n", "wanted the column item_id_list in .*x.test.inter, as in the other"),
    ],
)
def test_broken_rows_with_histories(tmp_path: Path, test: str, line: str) -> None:
    raw = _listed(tmp_path / "raw", test=test)
    with pytest.raises(UserError, match=line):
        prepare(f"recbole:{raw}", tmp_path / "out")


def test_rows_with_histories_that_nobody_split(tmp_path: Path) -> None:
    raw = _listed(tmp_path / "raw")
    for name in ("valid", "test"):
        (raw / f"x.{name}.inter").unlink()
    (raw / "x.train.inter").rename(raw / "x.inter")
    with pytest.raises(UserError, match=r"wanted NAME.train.inter and NAME.test.inter in .*, found x.inter"):
        prepare(f"recbole:{raw}", tmp_path / "out")
    with pytest.raises(UserError, match="wanted no split and no k_core for recbole:, which its authors"):
        prepare(f"recbole:{raw}", tmp_path / "out", k_core=5)


def test_numbered_text_files_in_a_folder_are_one_table(tmp_path: Path) -> None:
    raw = write(tmp_path / "raw")
    (raw / "inter.csv").unlink()
    (raw / "events" / "year=2020").mkdir(parents=True)
    (raw / "events" / "part-0000.csv").write_text(FRAME.head(17).write_csv(), encoding="utf-8")
    (raw / "events" / "part-0001.csv").write_text(FRAME.tail(13).write_csv(), encoding="utf-8")
    (raw / "events" / "_SUCCESS").write_text("", encoding="utf-8")
    (raw / "old").mkdir()
    (raw / "old" / "inter.csv").write_text(FRAME.head(9).write_csv(), encoding="utf-8")  # no number: no shard
    data = prepare(f"csv:{raw}", tmp_path / "out")
    assert size(data) == (6, 8, 30)
    assert "interactions are read from events as one table" in data.info["notes"]
    assert sorted(data.info["raw_sha256"]) == ["events/part-0000.csv", "events/part-0001.csv", "items.csv"]
    data = prepare(
        f"csv:{write(raw, {'all.csv': FRAME.head(27).write_csv(), 'inter.csv': 'x'})}", tmp_path / "out"
    )
    assert size(data)[2] == 27  # a file that is enough goes before a folder
    assert "interactions are read from all.csv, not from events" in data.info["notes"]
    (raw / "all.csv").unlink()
    (raw / "events" / "part-0001.csv").write_text("user,item\nu0,i0\n", encoding="utf-8")
    with pytest.raises(
        UserError, match=r"wanted the columns .* of part-0000.csv in every file of .*in part-0001"
    ):
        prepare(f"csv:{raw}", tmp_path / "out")


def test_json_lines_in_folders_of_years_are_one_table(tmp_path: Path) -> None:
    raw = write(tmp_path / "raw")
    (raw / "inter.csv").unlink()
    for year, part in ((2020, FRAME.head(20)), (2021, FRAME.tail(10))):
        (raw / "log" / f"year={year}").mkdir(parents=True)
        (raw / "log" / f"year={year}" / "0.jsonl").write_text(part.write_ndjson(), encoding="utf-8")
    assert size(prepare(f"csv:{raw}", tmp_path / "out")) == (6, 8, 30)
    (raw / "log" / "year=2021" / "0.jsonl").write_text('{"user": "u0"\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"0.jsonl, line 1: wanted a JSON object"):
        prepare(f"csv:{raw}", tmp_path / "out")


# --- what counts ------------------------------------------------------------------------------------------------------


def test_minima_of_users_and_items_apart(tmp_path: Path) -> None:
    more = FRAME.write_csv() + "".join(f"v,i0,{1_600_000_000 + n}\n" for n in range(2))
    assert size(tried(tmp_path, {"inter.csv": more}, min_user=3)) == (6, 8, 30)
    data = tried(tmp_path, {"inter.csv": more}, min_item=4, min_user=1)
    assert data.info["notes"][0].startswith("1/4-core: ")
    refused(
        tmp_path,
        "wanted users and items with at least 9/1 interactions each, the 9/1-core is empty",
        min_user=9,
        min_item=1,
    )


def test_a_range_of_time(tmp_path: Path) -> None:
    data = tried(tmp_path, since="2020-09-13", until="1600005000")
    assert (size(data)[0], data.info["repairs"]["rows_outside_the_time_range"]) == (5, 5)
    refused(tmp_path, "wanted interactions in .*inter.csv, nothing is left of its rows", since="2030-01-01")
    refused(tmp_path, "wanted a date such as 2020-12-31 or Unix seconds, got 'soon'", since="soon")


def test_rows_of_short_histories_may_be_left_out(tmp_path: Path) -> None:
    data = tried(tmp_path, min_history=2)
    assert ([split.n_rows for split in (data.train, data.valid, data.test)]) == [6, 6, 6]
    assert data.info["repairs"]["rows_with_short_history"] == 6


def test_a_split_at_dates(tmp_path: Path) -> None:
    dates = {"split": "dates", "valid_from": "1600003000", "test_from": "2020-09-13T12:00:00"}
    refused(
        tmp_path,
        "wanted valid_from before test_from",
        split="dates",
        valid_from="2021",
        test_from="2020-01-01",
    )
    data = tried(tmp_path, **dates | {"test_from": "1600005000"})
    assert [split.n_rows for split in (data.train, data.valid, data.test)] == [12, 8, 4]
    assert data.valid.timestamp.min() >= 1600003000
    assert data.test.timestamp.min() >= 1600005000
    refused(tmp_path, "split = 'dates' and both valid_from and test_from go together", split="dates")
    refused(
        tmp_path,
        "split = 'dates' and both .* go together, got split leave-one-out",
        test_from="2020",
        valid_from="2019",
    )
    untimed = {"inter.csv": FRAME.drop("timestamp").write_csv()}
    refused(
        tmp_path,
        "wanted times for split time-growing, .* has none; choose leave-one-out",
        untimed,
        split="time-growing",
        ties="file",
    )


def test_ties_may_be_drawn_and_the_draw_stays(tmp_path: Path) -> None:
    tied = FRAME.with_columns(timestamp=pl.lit(1_600_000_000))
    one = tried(tmp_path, {"inter.csv": tied.write_csv()}, ties="random").test.to_frame()
    other = tried(tmp_path, {"inter.csv": tied.reverse().write_csv()}, ties="random").test.to_frame()
    assert one.equals(other)
    assert not one.equals(tried(tmp_path, {"inter.csv": tied.write_csv()}).test.to_frame())


def test_settings_are_stored_where_they_are_not_the_default(tmp_path: Path) -> None:
    data = tried(tmp_path, ties="file", keep_unused=True, events=())
    assert data.info["settings"] == {
        "split": "leave-one-out",
        "max_history": 20,
        "clean": "none",
        "k_core": 0,
        "ties": "file",
        "keep_unused": True,
    }
    refused(
        tmp_path,
        "data.ties: Input should be 'item', 'file' or 'random', got 'x'; see triewise prepare",
        ties="x",
    )


def test_published_splits_take_no_choice_of_rows(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="wanted no ties for msl:, whose rows its authors have chosen, got 'file'"
    ):
        prepare("msl:nowhere", tmp_path / "out", ties="file")


def test_a_recipe_never_trains_on_files_that_were_changed(tmp_path: Path) -> None:
    from triewise.app.folders import open_data
    from triewise.recipe import parse_recipe

    raw = write(tmp_path / "raw")
    data = {"source": f"csv:{raw}", "folder": tmp_path / "out", "ties": "file", "events": []}
    recipe = parse_recipe({"name": "x", "data": data}, "f")
    assert open_data(recipe).info["settings"]["ties"] == "file"
    open_data(recipe)
    other = parse_recipe({"name": "x", "data": data | {"ties": "item"}}, "f")
    with pytest.raises(UserError, match="was prepared with ties = 'file', the recipe wants 'item'"):
        open_data(other)
    (raw / "notes.csv").write_text("what,ever\n1,2\n", encoding="utf-8")
    open_data(recipe)  # a neighbour that would not be read
    (raw / "more.csv").write_text(FRAME.head(3).write_csv(), encoding="utf-8")
    with pytest.raises(
        UserError, match=r"was prepared without more.csv, which csv:.* would read; prepare it"
    ):
        open_data(recipe)
    (raw / "more.csv").unlink()
    write(raw, {"inter.csv": FRAME.head(25).write_csv()})
    with pytest.raises(
        UserError, match="was prepared from another inter.csv than csv:.* has now; prepare it again"
    ):
        open_data(recipe)


def test_the_command_takes_every_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"inter.csv": FRAME.rename({"user": "who"}).with_columns(kind=pl.lit("buy")).write_csv()}
    raw = write(tmp_path / "raw", files)
    words = ["triewise", "prepare", f"csv:{raw}", "--out", str(tmp_path / "out"), "--user-column", "who"]
    words += ["--event-column", "kind", "--events", "buy, ", "--keep-unused", "--min-user", "2"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    stored = load_dataset(tmp_path / "out").info["settings"]
    wanted = {
        "user_column": "who",
        "event_column": "kind",
        "events": ["buy"],
        "keep_unused": True,
        "min_user": 2,
    }
    assert stored.items() >= wanted.items()
    assert set(DATA_OPTIONS) <= set(triewise.Recipe.model_fields["data"].annotation.model_fields)


def test_what_hangs_on_ties_is_said_where_data_are_described(tmp_path: Path) -> None:
    from triewise.app.compare import _notes
    from triewise.app.folders import describe_data

    tied = FRAME.with_columns(timestamp=pl.col("timestamp") // 1000 * 1000).write_csv()
    data = tried(tmp_path, {"inter.csv": tied}, ties="file")
    said = describe_data(tmp_path / "out")["ties"]
    assert said == (
        "30 of 30 interactions (100.0%) and 6 of 6 test targets (100.0%) share their time with another interaction "
        "of the user; what decides their order is data.ties = file"
    )
    assert said in _notes(data, [], shows_users=False)
    assert "ties" not in describe_data(Path(tried(tmp_path).folder))
