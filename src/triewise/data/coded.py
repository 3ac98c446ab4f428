"""Semantic ids: for each item a sequence of code tokens, beside it the interactions and, where there are any, titles.

Two layouts are read. That of LETTER, LC-Rec and TIGER has ``NAME.index.json`` (item to codes), ``NAME.inter.json``
(user to items, oldest first) and maybe ``NAME.item.json`` (titles). That of MiniOneRec has ``index.json``, an info
file and rows that its authors split.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from triewise.data.interactions import Events, ordered_ids
from triewise.data.published import Published, read_d3, tab_titles
from triewise.data.readers import Raw
from triewise.data.tables import bare_name, counted, entries, names, read_text, shown
from triewise.errors import UserError

_TOKEN = re.compile(r"<[^<>\s]+>")
_KINDS = {"index": "item id to codes", "inter": "user to item ids", "item": "item id to what is known of it"}


def read_index(path: Path) -> dict[str, tuple[str, ...]]:
    """Code tokens of each item, from an ``index.json`` (plain or gzip) in the order of the file.

    A sequence is a list of tokens such as ``["<a_7>", "<b_0>"]``, of level numbers such as ``[7, 0]``, or one text of
    tokens ``"<a_7><b_0>"``. Sequences may differ in length, and several items may have the same one.

    Raises:
        UserError: Not a JSON object, an id that occurs twice, no item, or codes that are none of the three.
    """
    index = {item: _tokens(item, codes, path) for item, codes in _object(path, "index").items()}
    if not index:
        raise UserError(f"wanted codes of items in {path}, found none; copy or download it again")
    return index


def _tokens(item: str, codes: Any, path: Path) -> tuple[str, ...]:
    if isinstance(codes, str):
        tokens = _TOKEN.findall(codes)
        whole = "".join(tokens) == "".join(codes.split())
    else:
        tokens = codes if isinstance(codes, list) else []
        whole = all(isinstance(token, str | int) and not isinstance(token, bool) for token in tokens)
    tokens = [str(token) for token in tokens]
    if not tokens or not whole or not all(map(str.strip, tokens)):
        raise UserError(
            f'{path}, item {item!r}: wanted a list of code tokens such as ["<a_7>", "<b_0>"], got {shown(codes)}; '
            "repair it"
        )
    return tuple(tokens)


def has_sequences(folder: Path) -> bool:
    """Whether a folder of codes has the sequences of its users; else it has rows that its authors split."""
    return folder.is_dir() and any(_is_kind(path, "inter") for path in entries(folder))


def coded_sequences(folder: Path) -> Raw:
    """The layout of LETTER: every item of a user's list is an interaction, oldest first. There are no times.

    Titles are those of ``NAME.item.json`` or of an info file; where neither is there, an item's title is its tokens,
    joined.

    Raises:
        UserError: Missing, ambiguous or broken file, or an item without codes.
    """
    index_file, inter_file = (_the_one(folder, kind) for kind in ("index", "inter"))
    codes, files = read_index(index_file), [index_file, inter_file]
    users = {user: _items(user, items, inter_file) for user, items in _object(inter_file, "inter").items()}
    flat = [item for items in users.values() for item in items]
    uncoded = next((item for item in flat if item not in codes), None)
    if uncoded is not None:
        raise UserError(
            f"{inter_file}: wanted items that {index_file.name} has codes for, got {uncoded!r}; "
            "add its codes or drop it"
        )
    repairs: dict[str, int] = {}
    title = {item: "".join(tokens) for item, tokens in codes.items()}
    if any(_is_kind(path, "item") for path in entries(folder)):
        files.append(_the_one(folder, "item"))
        title |= _titles(_object(files[-1], "item"), files[-1])
    elif (folder / "info.txt").is_file():
        files.append(folder / "info.txt")
        title |= _info_titles(files[-1], codes)
    counted(repairs, "users_without_items", sum(not items for items in users.values()))
    user_id, item_id = ordered_ids(user for user in users if users[user]), ordered_ids(set(flat))
    user_at, item_at = ({raw: place for place, raw in enumerate(ids)} for ids in (user_id, item_id))
    length = {user: len(items) for user, items in users.items() if items}
    events = Events(
        user=np.repeat(np.array([user_at[user] for user in length], np.int32), list(length.values())),
        item=np.array([item_at[item] for item in flat], np.int32),
        timestamp=np.full(len(flat), -1, dtype=np.int64),
        user_id=tuple(user_id),
        item_id=tuple(item_id),
    )
    note = "there are no times: the items of a user are in the order of the file"
    return Raw(events, title, tuple(files), repairs, (note,))


def coded_rows(folder: Path) -> Published:
    """The layout of MiniOneRec: rows and titles as `read_d3` reads them, and an index that agrees with the titles.

    Raises:
        UserError: As `read_d3` and `read_index`, or an item without codes, or with others in the info file.
    """
    published = read_d3(folder)
    index_file = _the_one(folder, "index")
    item_id = published.titles.item_id.astype(str).tolist()
    _compare(published.titles.codes, item_id, read_index(index_file), index_file)
    return replace(published, files=(*published.files, index_file))


def _info_titles(path: Path, codes: dict[str, tuple[str, ...]]) -> dict[str, str]:
    titles = tab_titles(path)
    item_id = titles.item_id.astype(str).tolist()
    _compare(titles.codes, item_id, codes, path)
    return dict(zip(item_id, titles.title, strict=True))


def _compare(
    in_info: tuple[str, ...], item_id: list[str], codes: dict[str, tuple[str, ...]], path: Path
) -> None:
    """Refuse an item without codes, or whose codes in the info file, where it names them, are others."""
    for place, item in enumerate(item_id):
        if item not in codes:
            raise UserError(f"{path}: wanted codes of every item, item {item!r} has none; add them")
        if in_info and in_info[place] != "".join(codes[item]):
            raise UserError(
                f"{path}: wanted the codes of item {item!r} to be those of the info file, got {''.join(codes[item])!r} "
                f"and {in_info[place]!r}; take both files from one run"
            )


def _items(user: str, items: Any, path: Path) -> list[str]:
    if not isinstance(items, list) or not all(isinstance(item, str | int) for item in items):
        raise UserError(f"{path}, user {user!r}: wanted a list of item ids, got {shown(items)}; repair it")
    return [str(item) for item in items]


def _titles(known: dict[str, Any], path: Path) -> dict[str, str]:
    title = {}
    for item, facts in known.items():
        text = facts.get("title") if isinstance(facts, dict) else facts
        if not isinstance(text, str):
            raise UserError(
                f"{path}, item {item!r}: wanted a title that is text, got {shown(text)}; repair it"
            )
        if text.strip():
            title[item] = text
    return title


def _object(path: Path, kind: str) -> dict[str, Any]:
    """The one JSON object of a file, each key once."""
    try:
        known = json.loads(read_text(path), object_pairs_hook=_each_once)
    except (json.JSONDecodeError, RecursionError, LookupError) as error:
        raise UserError(f"wanted JSON in {path}, got {error}; copy or download it again") from None
    if not isinstance(known, dict):
        raise UserError(f"wanted an object from {_KINDS[kind]} in {path}, got {shown(known)}; check the file")
    return known


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    known: dict[str, Any] = {}
    for key, value in pairs:
        if key in known:
            raise LookupError(f"the key {key} twice")
        known[key] = value
    return known


def _is_kind(path: Path, kind: str) -> bool:
    return path.is_file() and path.name[0] != "." and f".{bare_name(path)}".endswith(f".{kind}.json")


def _the_one(folder: Path, kind: str) -> Path:
    there = entries(folder)
    found = [path for path in there if _is_kind(path, kind)]
    if len(found) != 1:
        raise UserError(
            f"wanted one file NAME.{kind}.json ({_KINDS[kind]}) in {folder}, found {names(found or there)}; "
            "keep one data set in a folder"
        )
    return found[0]
