"""Semantic ids: both layouts, codes shared by items, and every line a user can get."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import shared
from tests.data_fixtures import write_csv
from triewise.data import prepare, read_index
from triewise.data.coded import coded_rows, coded_sequences
from triewise.data.published import tab_titles
from triewise.errors import UserError

INDEX = {"0": ["<a_1>", "<b_2>"], "1": ["<a_1>"], "2": ["<a_1>", "<b_2>"], "3": ["<a_4>", "<b_0>", "<c_9>"]}
INTER = {"7": [0, 1, 3], "8": [3, 2, 1, 0], "9": [1, 0, 2]}


def write(folder: Path, **objects: Any) -> Path:
    """``index`` becomes ``toys.index.json``, and so on."""
    for name, known in objects.items():
        (folder / f"toys.{name}.json").write_text(json.dumps(known), encoding="utf-8")
    return folder


def write_minionerec(folder: Path, info: dict[str, list[str]] = INDEX, train: str = "train.csv") -> Path:
    (folder / "index.json").write_text(json.dumps(INDEX), encoding="utf-8")
    lines = (f"{''.join(codes)}\tTitle {item}\t{item}\n" for item, codes in info.items())
    (folder / "info.txt").write_text("".join(lines), encoding="utf-8")
    for name in (train, "valid.csv", "test.csv"):
        write_csv(folder / name, ["user_id", "history_item_id", "item_id"], [(5, "[0, 1]", 3)])
    return folder


def test_an_index_is_lists_of_tokens_or_of_numbers_or_texts(tmp_path: Path) -> None:
    write(tmp_path, index={"b": ["<a_1>", "<b_2>"], "a": [7, 0], "c": "<a_1> <b_2>"})
    path = tmp_path / "toys.index.json"
    wanted = {"b": ("<a_1>", "<b_2>"), "a": ("7", "0"), "c": ("<a_1>", "<b_2>")}
    assert list(read_index(path).items()) == list(wanted.items())
    packed = tmp_path / "toys.index.json.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read_index(packed) == wanted


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("{", "wanted JSON in .*toys.index.json, got"),
        ('{"0": ["<a_1>"], "0": ["<a_2>"]}', "the key 0 twice"),
        ("[1]", "wanted an object from item id to codes"),
        ("{}", "wanted codes of items"),
        *(
            (f'{{"0": {codes}}}', "item '0': wanted a list of code tokens such as")
            for codes in ("[]", "null", "[true]", '[" "]', '"a_1"', '"<a_1> b"', '[["<a_1>"]]', "5")
        ),
    ],
)
def test_a_broken_index(tmp_path: Path, text: str, line: str) -> None:
    path = tmp_path / "toys.index.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=line):
        read_index(path)


def test_sequences_become_interactions_and_tokens_titles(tmp_path: Path) -> None:
    write(tmp_path, index=INDEX, inter=INTER | {"10": []})
    data = prepare(f"codes:{tmp_path}", tmp_path / "out")
    assert data.catalog.title == ("<a_1><b_2>", "<a_1>", "<a_1><b_2>", "<a_4><b_0><c_9>")
    assert data.catalog.group.tolist() == [0, 1, 0, 3]  # items 0 and 2 share their codes
    assert data.info["counts"]["interactions"] == 10
    assert data.info["repairs"] == {"users_without_items": 1}
    assert data.test.target.tolist() == [3, 0, 2]
    assert [row.tolist() for row in data.test.history] == [[0, 1], [3, 2, 1], [1, 0]]


@pytest.mark.parametrize("from_info", [False, True])
def test_titles_are_those_of_the_item_file_or_of_the_info_file(tmp_path: Path, from_info: bool) -> None:
    write(tmp_path, index=INDEX, inter=INTER)
    if from_info:
        lines = (f"{''.join(INDEX[item])}\tTitle\t{item}\t{item}\n" for item in INDEX)
        (tmp_path / "info.txt").write_text("".join(lines), encoding="utf-8")
    else:
        items = {item: {"title": f"Title\t{item}", "brand": 5} for item in INDEX}
        write(tmp_path, item=items | {"1": "Title\t1", "3": {"title": " "}})
    raw = coded_sequences(tmp_path)
    assert raw.title["1"] == "Title\t1"
    assert raw.title["3"] == ("Title\t3" if from_info else "<a_4><b_0><c_9>")


def test_rows_of_minionerec(tmp_path: Path) -> None:
    data = coded_rows(write_minionerec(tmp_path))
    assert data.titles.title == ("Title 0", "Title 1", "Title 2", "Title 3")
    assert data.titles.codes == ("<a_1><b_2>", "<a_1>", "<a_1><b_2>", "<a_4><b_0><c_9>")
    assert data.splits["test"].target.tolist() == [3]
    assert data.files[-1].name == "index.json"


def test_train_rows_under_another_name_are_said(tmp_path: Path) -> None:
    data = coded_rows(write_minionerec(tmp_path, train="train_derived.csv"))
    assert "there is no train.csv: the train rows are those of train_derived.csv" in data.notes


def test_codes_are_split_off_only_where_every_line_has_them(tmp_path: Path) -> None:
    path = tmp_path / "info.txt"
    path.write_text("<a_1><b_2>\tOne\t0\n<b>bold</b>\tTwo\t1\n", encoding="utf-8")
    assert tab_titles(path).title == ("<a_1><b_2>\tOne", "<b>bold</b>\tTwo")
    assert tab_titles(path).codes == ()


@pytest.mark.parametrize(
    ("objects", "line"),
    [
        ({"inter": INTER}, r"wanted one file NAME.index.json \(item id to codes\)"),
        (
            {"index": INDEX, "inter": {"7": [0, 5]}},
            "wanted items that toys.index.json has codes for, got '5'",
        ),
        ({"index": INDEX, "inter": {"7": "0 1"}}, "user '7': wanted a list of item ids, got '0 1'"),
        (
            {"index": INDEX, "inter": INTER, "item": {"0": {"title": 5}}},
            "item '0': wanted a title that is text, got 5",
        ),
    ],
)
def test_broken_sequences(tmp_path: Path, objects: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        coded_sequences(write(tmp_path, **objects))


@pytest.mark.parametrize(
    ("info", "line"),
    [
        (INDEX | {"4": ["<a_1>"]}, "wanted codes of every item, item '4' has none"),
        (
            INDEX | {"1": ["<a_2>"]},
            "wanted the codes of item '1' to be those of the info file, got '<a_1>' and '<a_2>'",
        ),
    ],
)
def test_an_info_file_that_disagrees(tmp_path: Path, info: dict[str, list[str]], line: str) -> None:
    with pytest.raises(UserError, match=line):
        coded_rows(write_minionerec(tmp_path, info))


def test_real_letter_instruments(tmp_path: Path) -> None:
    counts = prepare(f"codes:{shared('letter_instruments')}", tmp_path / "out").info["counts"]
    assert (counts["items"], counts["titles"], counts["interactions"]) == (9_922, 9_897, 206_153)
    assert (counts["users"], counts["valid_rows"], counts["test_rows"]) == (24_772, 24_772, 24_772)


def test_real_minionerec_office(tmp_path: Path) -> None:
    data = prepare(f"codes:{shared('minionerec_office')}", tmp_path / "out")
    assert data.info["settings"]["split"] == "published"
    counts = data.info["counts"]
    assert (counts["items"], counts["valid_rows"], counts["test_rows"]) == (3_459, 4_866, 4_866)
