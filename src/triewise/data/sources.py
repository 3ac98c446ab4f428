"""A source and settings to titles and rows: which reader, which split, which words for prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from triewise.data.catalog import Catalog, clean_titles
from triewise.data.coded import coded_rows, coded_sequences, has_sequences
from triewise.data.fetch import RELEASES, fetch
from triewise.data.interactions import Interactions
from triewise.data.movielens_files import CITATION, INTERACTIONS, TITLES
from triewise.data.published import Published, read_d3, read_msl
from triewise.data.raw_amazon import amazon_folder
from triewise.data.raw_steam import steam_folder
from triewise.data.readers import Raw, csv_folder, movielens_folder, read_events, recbole
from triewise.data.splits import NAMES, WAYS, LazySplit, Split, lazy_splits
from triewise.data.tables import counted, open_table
from triewise.errors import UserError
from triewise.files import sha256_file

SOURCES = (
    "ml-100k, ml-1m, movielens:DIR, recbole:DIR, msl:DIR, d3:DIR, amazon:DIR, steam:DIR, codes:DIR or csv:DIR"
)
_PUBLISHED: dict[str, Callable[[Path], Published]] = {"msl": read_msl, "d3": read_d3, "codes": coded_rows}
_RAW: dict[str, Callable[[Path], Raw]] = {
    "movielens": movielens_folder,
    "recbole": recbole,
    "csv": csv_folder,
    "amazon": amazon_folder,
    "steam": steam_folder,
    "codes": coded_sequences,
}

# What the items are and what users did with them, by a word in the name of the folder or of a file: the words
# of the papers ("musics" is D3's).
_MSL_WORDS = {
    "toy": ("toys", "played"),
    "book": ("books", "read"),
    "cloth": ("clothing", "worn"),
    "office": ("office products", "used"),
}
_D3_WORDS = {
    "toy": ("toys and games", "enjoyed"),
    "steam": ("games", "enjoyed"),
    "game": ("video games", "enjoyed"),
    "book": ("books", "enjoyed"),
    "cd": ("musics", "enjoyed"),
    "music": ("musics", "enjoyed"),
}
_FILMS = ("movies", "watched")
_OTHER_WORDS = {"ml-": _FILMS, "movie": _FILMS, "film": _FILMS, **_MSL_WORDS, "game": ("games", "played")}
_UNKNOWN_WORDS = ("items", "bought")


@dataclass(frozen=True, eq=False)
class Prepared:
    """What a source becomes before it is written.

    Attributes:
        catalog: The items, their titles cleaned.
        splits: ``train``, ``valid`` and ``test``.
        interactions: What the rows were made from; None for a published split.
        users: Number of users.
        n_interactions: Number of interactions behind the rows.
        words: What the items are and what users did with them, for prompts.
        repairs: As in :class:`Interactions`, and so are the notes.
        citation: Whom to cite, if the source says.
        raw_sha256: Hash of each file that was read.
    """

    catalog: Catalog
    splits: Mapping[str, Split | LazySplit]
    interactions: Interactions | None
    users: int
    n_interactions: int
    words: tuple[str, str]
    repairs: dict[str, int]
    notes: tuple[str, ...]
    citation: str | None
    raw_sha256: dict[str, str]


def settings_of(source: str, *, max_history: int, clean: str, k_core: int, split: str) -> dict[str, Any]:
    """The settings as ``dataset.json`` holds them, checked before anything is read; arguments as in `prepare`.

    Raises:
        UserError: Unknown source, a setting out of range, or one that a published split cannot follow.
    """
    if max_history < 1:
        raise UserError(f"wanted max_history of at least 1, got {max_history}; choose for example 20")
    if k_core < 0:
        raise UserError(f"wanted k_core of at least 0, got {k_core}; choose for example 5, or 0 for none")
    if split not in WAYS:
        raise UserError(f"wanted split to be one of {', '.join(WAYS)}, got {split!r}; choose one of them")
    clean_titles((), clean)
    kind, place = _parsed(source)
    if _is_published(kind, Path(place)):
        if split != WAYS[0] or k_core:
            raise UserError(
                f"wanted no split and no k_core for {kind}:, which its authors have split, got split {split} and "
                f"k_core {k_core}; leave them out"
            )
        split = "published"
    return {"split": split, "max_history": max_history, "clean": clean, "k_core": k_core if k_core > 1 else 0}


def read_source(source: str, settings: Mapping[str, Any]) -> Prepared:
    """Read a source and make titles and rows of it, with the settings that :func:`settings_of` gave.

    Raises:
        UserError: Broken files, an empty k-core, an item without a title.
    """
    kind, place = _parsed(source)
    return (_published if _is_published(kind, Path(place)) else _raw)(kind, Path(place), settings)


def _is_published(kind: str, folder: Path) -> bool:
    """Whether the authors split the data; a folder of codes tells by its files."""
    return kind in _PUBLISHED and not (kind in _RAW and has_sequences(folder))


def _parsed(source: str) -> tuple[str, str]:
    """Kind and folder of a source; a Windows path has a second colon, so only the first one counts."""
    if source in RELEASES:
        return source, ""
    kind, colon, place = source.partition(":")
    if not colon or kind not in {**_PUBLISHED, **_RAW}:
        raise UserError(f"wanted one of {SOURCES} as the source, got {source!r}; choose one of them")
    if not place:
        raise UserError(f"wanted a folder after {kind}:, got nothing; write for example {kind}:data/games")
    return kind, place


def movielens(name: str) -> Raw:
    """The ratings of ``"ml-100k"`` or ``"ml-1m"``, from the cache or fetched; every rating counts.

    Raises:
        UserError: If the data cannot be had; see :func:`triewise.data.fetch.fetch`.
    """
    folder = fetch(name)
    table = open_table(folder / INTERACTIONS, separator="\t", quote=None)
    lines = (folder / TITLES).read_text(encoding="utf-8").split("\n")[1:-1]
    title = dict(line.split("\t") for line in lines)
    return Raw(read_events(table, "user", "item", "timestamp", {}), title, (), {})


def _raw(kind: str, folder: Path, settings: Mapping[str, Any]) -> Prepared:
    raw = movielens(kind) if kind in RELEASES else _RAW[kind](folder)
    interactions = Interactions.from_events(raw.events, raw.title, settings["k_core"])
    repairs = raw.repairs | interactions.repairs
    title = _cleaned(interactions.title, settings["clean"], repairs)
    emptied = [item for item, text in zip(interactions.item_id, title, strict=True) if not text]
    if emptied:
        raise UserError(
            f"wanted a title for each item, clean = {settings['clean']!r} leaves nothing of {len(emptied)}, "
            f"first {emptied[0]!r}; repair them"
        )
    leaves_one_out = settings["split"] == WAYS[0]
    short = (np.bincount(interactions.user) < (3 if leaves_one_out else 2)).sum()
    counted(repairs, "users_without_test_row" if leaves_one_out else "users_without_row", short)
    films = kind in RELEASES or kind == "movielens"
    parts = lazy_splits(interactions, settings["split"], settings["max_history"])
    return Prepared(
        catalog=Catalog.from_titles(interactions.item_id, title),
        splits=dict(zip(NAMES, parts, strict=True)),
        interactions=interactions,
        users=len(interactions.user_id),
        n_interactions=len(interactions.item),
        words=_FILMS if films else _words(_OTHER_WORDS, folder, raw.files),
        repairs=repairs,
        notes=("every rating is an interaction, whatever its value",) * films
        + raw.notes
        + interactions.notes,
        citation=CITATION if films else None,
        raw_sha256=dict(RELEASES[kind].sha256) if kind in RELEASES else _hashes(folder, raw.files),
    )


def _published(kind: str, folder: Path, settings: Mapping[str, Any]) -> Prepared:
    published = _PUBLISHED[kind](folder)
    title = _cleaned(published.titles.title, settings["clean"], published.repairs)
    rows, longest = published.splits, settings["max_history"]
    return Prepared(
        catalog=Catalog.from_titles([str(item) for item in published.titles.item_id], title),
        splits={name: replace(rows[name], history=rows[name].history.last(longest)) for name in NAMES},
        interactions=None,
        users=published.users,
        n_interactions=published.interactions,
        words=_words(_MSL_WORDS if kind == "msl" else _D3_WORDS, folder, published.files),
        repairs=published.repairs,
        notes=published.notes,
        citation=None,
        raw_sha256=_hashes(folder, published.files),
    )


def _cleaned(titles: tuple[str, ...], clean: str, repairs: dict[str, int]) -> tuple[str, ...]:
    """Cleaned titles; counts how many changed, and how many fewer different ones there are."""
    cleaned = clean_titles(titles, clean)
    counted(repairs, "titles_cleaned", sum(new != old for new, old in zip(cleaned, titles, strict=True)))
    counted(repairs, "titles_merged", len(set(titles)) - len(set(cleaned)))
    return cleaned


def _words(words: Mapping[str, tuple[str, str]], folder: Path, files: tuple[Path, ...]) -> tuple[str, str]:
    """Noun and verb for prompts, by the name of the folder or else of its files."""
    names = (folder.resolve().name.lower(), *(file.name.lower() for file in files))
    return next((words[word] for name in names for word in words if word in name), _UNKNOWN_WORDS)


def _hashes(folder: Path, files: tuple[Path, ...]) -> dict[str, str]:
    return {file.relative_to(folder).as_posix(): sha256_file(file) for file in files}
