"""Random tables against Python's csv module: no row is lost, no cell changed, and what cannot be read is one line."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import random
from pathlib import Path

import pytest

from triewise.data.interactions import PLAIN
from triewise.data.readers import Raw, csv_folder
from triewise.errors import UserError

LETTERS = [
    "a",
    "B",
    "é",
    "Ω",
    "猫",
    '"',
    '""',
    ",",
    ";",
    "\t",
    "|",
    " ",
    "'",
    "\\",
    "0",
    "7",
    "_",
    "-",
    ".",
    "&amp;",
]
UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def text(rng: random.Random, allowed: list[str], longest: int = 8) -> str:
    """Not empty, and not white space alone: such a title is none."""
    made = "".join(rng.choice(allowed) for _ in range(rng.randint(1, longest)))
    return made if made.strip() else made + "x"


def written(rng: random.Random, header: list[str], rows: list[list[str]], separator: str, end: str) -> str:
    """As some program would write it: all cells quoted, those that need it, or some at random."""
    style = rng.choice(["all", "minimal", "random"])

    def cell(value: str) -> str:
        needs = any(letter in value for letter in (separator, '"', "\n", "\r")) or value != value.strip()
        quote = needs or style == "all" or (style == "random" and rng.random() < 0.3)
        return '"' + value.replace('"', '""') + '"' if quote else value

    return end.join([separator.join(map(cell, row)) for row in [header, *rows]] + [""] * (rng.random() < 0.8))


def table(rng: random.Random) -> tuple[bytes, bytes, str, list[tuple[str, str, int]], dict[str, str]]:
    """Two files, their ends, and what is in them by construction."""
    allowed = list(LETTERS)
    if rng.random() < 0.3:
        allowed += ["\n", "\r\n"]
    encoding = rng.choice(["utf-8", "utf-8", "utf-8-sig", "utf-16", "cp1252"])
    if encoding == "cp1252":
        allowed = [letter for letter in allowed if letter not in "Ω猫"]
    separator, end = rng.choice(",\t;|"), rng.choice(["\n", "\n", "\r\n"])
    ids = [letter for letter in allowed if letter not in "\r\n"]
    items = list({text(rng, ids, 5): None for _ in range(rng.randint(1, 8))})
    users = [text(rng, ids, 5) for _ in range(rng.randint(1, 5))]
    titles = {item: text(rng, allowed, 20) for item in items}
    unit = rng.choice(list(UNITS))
    start = rng.randint(800_000_000, 1_700_000_000)
    events = [
        (rng.choice(users), rng.choice(items), start + rng.randint(0, 10**6))
        for _ in range(rng.randint(1, 12))
    ]
    rows = [[user, item, str(when * UNITS[unit]), text(rng, allowed)] for user, item, when in events]
    header, more = ["user", "item", "timestamp", "note"], [[item, title] for item, title in titles.items()]
    rng.shuffle(more)
    pack, packed = rng.choice([(bytes, ""), (bytes, ""), (gzip.compress, ".gz"), (bz2.compress, ".bz2")])
    files = [
        pack(written(rng, names, body, separator, end).encode(encoding))
        for names, body in ((header, rows), (["item", "title"], more))
    ]
    return files[0], files[1], packed, events, titles


def got(raw: Raw) -> list[tuple[str, str, int]]:
    events = raw.events
    rows = zip(events.user.tolist(), events.item.tolist(), events.timestamp.tolist(), strict=True)
    return [(events.user_id[user], events.item_id[item], when) for user, item, when in rows]


def read_well_formed(folder: Path, seeds: range) -> None:
    for seed in seeds:
        rng = random.Random(seed)
        inter, items, packed, events, titles = table(rng)
        name = rng.choice(["a.csv", "a.txt", "A.CSV", "a.tsv"])
        here = folder / str(seed)
        here.mkdir()
        (here / f"{name}{packed}").write_bytes(inter)
        (here / f"b{name[1:]}{packed}").write_bytes(items)
        raw = csv_folder(here)
        assert (got(raw), raw.title) == (events, titles), f"seed {seed} in {here}"


def as_python_reads(data: bytes) -> tuple[list[tuple[str, str, int]], bool]:
    """Interactions as the csv module reads them, and whether every row has its four cells."""
    rows = [row for row in csv.reader(io.StringIO(data.decode(), newline=""), strict=True) if row][1:]
    whole = all(len(row) == 4 for row in rows)
    return [(row[0], row[1], int(row[2])) for row in rows if len(row) == 4], whole


def read_damaged(folder: Path, seeds: range) -> None:
    """One character of a good file is changed: what is read is what the csv module reads, or it is one clear line."""
    for seed in seeds:
        rng = random.Random(seed)
        ids = ["a", "b", '"', ",", " ", "é"]
        rows = [
            [text(rng, ids, 4), text(rng, ids, 4), str(10**9 + n), text(rng, [*ids, "\n"])] for n in range(8)
        ]
        whole = written(rng, ["user", "item", "timestamp", "note"], rows, ",", "\n")
        place = rng.randint(len("user,item,timestamp,note") + 3, len(whole) - 1)
        damaged = (
            whole[:place] + rng.choice(['"', ",", "\n", "", "\r", "\\"]) + whole[place + rng.randint(0, 1) :]
        )
        here = folder / str(seed)
        here.mkdir()
        (here / "a.csv").write_bytes(damaged.encode())
        titles = sorted({row[1] for row in rows})
        made = io.StringIO()
        csv.writer(made).writerows([["item", "title"], *([item, "t"] for item in titles)])
        (here / "b.csv").write_text(made.getvalue(), encoding="utf-8")
        try:
            found = got(csv_folder(here))
        except UserError as error:
            assert "\n" not in str(error), f"seed {seed}"
            continue
        try:
            wanted, cells = as_python_reads(damaged.encode())
        except (csv.Error, ValueError):
            assert "\\" in damaged, f"seed {seed}: read, and Python reads it not"
            continue
        if cells:
            assert found == wanted, f"seed {seed} in {here}"


@pytest.mark.parametrize("read", [read_well_formed, read_damaged])
def test_200_random_tables(read, tmp_path: Path) -> None:
    read(tmp_path, range(200))


@pytest.mark.slow
@pytest.mark.parametrize("read", [read_well_formed, read_damaged])
def test_2000_random_tables(read, tmp_path: Path) -> None:
    read(tmp_path, range(200, 2200))


@pytest.mark.parametrize("seed", range(40))
def test_bad_rows_are_left_out_and_counted(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    good, bad = [], ["u,i", "u,i,5,6,7", ",i,5,x", "u,,5,x", "u,i,never,x", "u,i,,x"]
    lines = []
    for number in range(20):
        if rng.random() < 0.3:
            lines.append(rng.choice(bad))
        else:
            good.append((f"u{number}", "i", 10**9 + number))
            lines.append(f"u{number},i,{10**9 + number},x")
    (tmp_path / "a.csv").write_text("user,item,timestamp,note\n" + "\n".join(lines), encoding="utf-8")
    (tmp_path / "b.csv").write_text("item,title\ni,I\n", encoding="utf-8")
    raw = csv_folder(tmp_path, PLAIN.model_copy(update={"bad_rows": "drop"}))
    assert got(raw) == good
    assert raw.repairs.get("bad_rows", 0) + raw.repairs.get("broken_rows", 0) == 20 - len(good)
