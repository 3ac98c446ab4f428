"""A source and settings to a prepared folder: which reader, which split, which words for prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from pydantic import ValidationError

from triewise.data.catalog import Catalog
from triewise.data.coded import coded_rows, coded_sequences, has_sequences
from triewise.data.dataset import DATA_FORMAT, MANY_ROWS, Dataset, check_place, write_dataset
from triewise.data.fetch import RELEASES, fetch
from triewise.data.findings import count_findings
from triewise.data.interactions import Interactions
from triewise.data.movielens_files import CITATION, INTERACTIONS, TITLES
from triewise.data.pipelines import d3, igd_steam, msl
from triewise.data.published import Published, msl_files, read_d3, read_msl
from triewise.data.raw_amazon import amazon_files, amazon_folder
from triewise.data.raw_steam import steam_folder
from triewise.data.readers import (
    Raw,
    csv_files,
    csv_folder,
    movielens_folder,
    read_events,
)
from triewise.data.recbole import has_histories, recbole, recbole_files, recbole_rows
from triewise.data.splits import NAMES, WAYS, LazySplit, Split, lazy_splits
from triewise.data.tables import counted, open_table
from triewise.data.times import seconds_of
from triewise.data.titles import clean_titles, steps_of
from triewise.errors import UserError
from triewise.files import sha256_file
from triewise.locks import one_writer
from triewise.progress import note
from triewise.settings import PIPELINES, DataSettings

SOURCES = (
    "ml-100k, ml-1m, movielens:DIR, recbole:DIR, msl:DIR, d3:DIR, amazon:DIR, steam:DIR, codes:DIR or csv:DIR"
)
_PUBLISHED: dict[str, Callable[[Path], Published]] = {
    "msl": read_msl,
    "d3": read_d3,
    "codes": coded_rows,
    "recbole": recbole_rows,
}
_RAW: dict[str, Callable[[Path, DataSettings], Raw]] = {
    "movielens": movielens_folder,
    "recbole": recbole,
    "csv": csv_folder,
    "amazon": amazon_folder,
    "steam": steam_folder,
    "codes": lambda folder, _: coded_sequences(folder),
}
# What a source would read, where a file that is added can change that.
_FILES: dict[str, Callable[[Path, DataSettings], Iterable[Path]]] = {
    "csv": csv_files,
    "recbole": lambda folder, _: recbole_files(folder),
    "msl": lambda folder, _: msl_files(folder).values(),
    "amazon": lambda folder, _: amazon_files(folder),
}
_COLUMNS: tuple[str, ...] = (
    "item_column",
    "time_column",
    "title_column",
    "rating_column",
    "event_column",
    "events",
)
_COLUMNS += ("interactions_file", "catalogue_file")
_NOT_USED = {
    "amazon": ("user_column", *_COLUMNS),
    "steam": ("min_rating", *_COLUMNS),
    "codes": ("user_column", "min_rating", *_COLUMNS),
}
_SAMPLED_BOOKS = 100_000
_ALWAYS = ("split", "max_history", "clean", "k_core")
_TIES = {"file": "of the file", "random": "that a fixed seed draws"}

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


def choices_of(source: str, **given: Any) -> DataSettings:
    """The section ``[data]`` of a source, checked before anything is read; its keys are those of `DataSettings`.

    Raises:
        UserError: Unknown source, a setting out of range, or one that a published split cannot follow.
    """
    default = {name: info.default for name, info in DataSettings.model_fields.items()}
    choices = default | PIPELINES.get(given.get("pipeline"), {}) | given
    max_history, k_core, split = (choices[name] for name in ("max_history", "k_core", "split"))
    if max_history < 1:
        raise UserError(f"wanted max_history of at least 1, got {max_history}; choose for example 20")
    if k_core < 0:
        raise UserError(f"wanted k_core of at least 0, got {k_core}; choose for example 5, or 0 for none")
    if split not in WAYS:
        raise UserError(f"wanted split to be one of {', '.join(WAYS)}, got {split!r}; choose one of them")
    steps_of(choices["clean"])
    kind, place = _parsed(source)
    published = _is_published(kind, Path(place))
    if published and (split != WAYS[0] or k_core):
        raise UserError(
            f"wanted no split and no k_core for {kind}:, which its authors have split, got split {split} and "
            f"k_core {k_core}; leave them out"
        )
    try:
        made = DataSettings(source=source, **given)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(
            f"data.{key}: {first['msg']}, got {first['input']!r}; see triewise prepare --help"
        ) from None
    if (split == "dates") != (made.valid_from is not None and made.test_from is not None):
        raise UserError(
            "split = 'dates' and both valid_from and test_from go together, got "
            f"split {split}, valid_from {made.valid_from} and test_from {made.test_from}; give all or none"
        )
    if split == "dates" and seconds_of(str(made.valid_from)) >= seconds_of(str(made.test_from)):
        raise UserError(
            f"wanted valid_from before test_from, got {made.valid_from} and {made.test_from}; correct them"
        )
    others = _others(made)
    if published and others:
        name, value = next(iter(others.items()))
        raise UserError(
            f"wanted no {name} for {kind}:, whose rows its authors have chosen, got {value!r}; leave it out"
        )
    _check_raw(kind, others)
    return made


def _check_raw(kind: str, others: dict[str, Any]) -> None:
    """Refuse settings that would change nothing: raw sources know their columns, a pipeline its switches."""
    pipeline = others.get("pipeline")
    needs = {"start_year": "d3", "sample_items": "msl"}
    wrong = [
        name for name in others if needs.get(name, pipeline) != pipeline or name in _NOT_USED.get(kind, ())
    ]
    wrong += ["pipeline"] * (pipeline == "igd-steam" and kind != "steam")
    if wrong:
        raise UserError(
            f"wanted no {wrong[0]} for {kind}: {f'with pipeline {pipeline}' if pipeline else 'without a pipeline'}, "
            f"which does not use it, got {others[wrong[0]]!r}; leave it out"
        )


def _others(choices: DataSettings) -> dict[str, Any]:
    """The settings that are not at their defaults, but for the first four."""
    values = choices.model_dump(mode="json", exclude_defaults=True)
    return {name: value for name, value in values.items() if name not in ("source", "folder", *_ALWAYS)}


def settings_of(source: str, **given: Any) -> dict[str, Any]:
    """The settings as ``dataset.json`` holds them; four always, others where they are not at their defaults.

    Raises:
        UserError: As :func:`choices_of`.
    """
    choices = choices_of(source, **given)
    kind, place = _parsed(source)
    published = _is_published(kind, Path(place))
    return {
        "split": "published" if published else choices.split,
        "max_history": choices.max_history,
        "clean": choices.clean,
        "k_core": choices.k_core if choices.k_core > 1 else 0,
        **_others(choices),
    }


def read_source(choices: DataSettings) -> Prepared:
    """Read a source and make titles and rows of it, with settings from :func:`choices_of`.

    Raises:
        UserError: Broken files, an empty k-core, an item without a title.
    """
    kind, place = _parsed(choices.source)
    return (_published if _is_published(kind, Path(place)) else _raw)(kind, Path(place), choices)


def _is_published(kind: str, folder: Path) -> bool:
    """Whether the authors split the data; folders of codes and of RecBole tell by their files."""
    if kind == "recbole":
        return has_histories(folder)
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


def movielens(name: str, choices: DataSettings | None = None) -> Raw:
    """The ratings of ``"ml-100k"`` or ``"ml-1m"``, from the cache or fetched; every rating counts.

    Raises:
        UserError: If the data cannot be had; see :func:`triewise.data.fetch.fetch`.
    """
    folder = fetch(name)
    table = open_table(folder / INTERACTIONS, separator="\t", quote=None)
    lines = (folder / TITLES).read_text(encoding="utf-8").split("\n")[1:-1]
    title = dict(line.split("\t") for line in lines)
    repairs: dict[str, int] = {}
    choices = choices or DataSettings(source=name)
    events = read_events(table, "user", "item", "timestamp", repairs, choices, rating="rating")
    return Raw(events, title, (), repairs)


def _raw(kind: str, folder: Path, choices: DataSettings) -> Prepared:
    raw = movielens(kind, choices) if kind in RELEASES else _RAW[kind](folder, choices)
    films = kind in RELEASES or kind == "movielens"
    words = _FILMS if films else _words(choices.pipeline, folder, raw.files)
    if kind == "codes":
        choices = choices.model_copy(update={"ties": "file"})  # which has the order and no times
    k_core = choices.k_core
    if choices.pipeline:
        raw, k_core = _piped(raw, choices, words), 0
    interactions = Interactions.from_events(raw.events, raw.title, k_core, choices)
    repairs = raw.repairs | interactions.repairs
    title = _cleaned(interactions.title, choices.clean, repairs)
    emptied = [item for item, text in zip(interactions.item_id, title, strict=True) if not text]
    if emptied:
        raise UserError(
            f"wanted a title for each item, clean = {choices.clean!r} leaves nothing of {len(emptied)}, "
            f"first {emptied[0]!r}; repair them"
        )
    leaves_one_out = choices.split == WAYS[0]
    if not leaves_one_out and interactions.timestamp.max() < 0:
        raise UserError(
            f"wanted times for split {choices.split}, {choices.source} has none; choose leave-one-out"
        )
    short = (np.bincount(interactions.user) < (3 if leaves_one_out else 2)).sum()
    counted(repairs, "users_without_test_row" if leaves_one_out else "users_without_row", short)
    parts = lazy_splits(interactions, choices.split, choices.max_history, choices)
    if choices.min_history > 1:
        every = lazy_splits(
            interactions, choices.split, choices.max_history, choices.model_copy(update={"min_history": 1})
        )
        n_short = sum(part.n_rows for part in every) - sum(part.n_rows for part in parts)
        counted(repairs, "rows_with_short_history", n_short)
    notes = ("every rating is an interaction, whatever its value",) * (films and choices.min_rating is None)
    if choices.ties != "item" and kind != "codes":
        notes += (f"events of a user at one time are in the order {_TIES[choices.ties]}",)
    return Prepared(
        catalog=Catalog.from_titles(interactions.item_id, title),
        splits=dict(zip(NAMES, parts, strict=True)),
        interactions=interactions,
        users=len(interactions.user_id),
        n_interactions=len(interactions.item),
        words=words,
        repairs=repairs,
        notes=notes + raw.notes + interactions.notes,
        citation=CITATION if films else None,
        raw_sha256=dict(RELEASES[kind].sha256) if kind in RELEASES else _hashes(folder, raw.files),
    )


def _published(kind: str, folder: Path, choices: DataSettings) -> Prepared:
    published = _PUBLISHED[kind](folder)
    title = _cleaned(published.titles.title, choices.clean, published.repairs)
    rows, longest = published.splits, choices.max_history
    return Prepared(
        catalog=Catalog.from_titles([str(item) for item in published.titles.item_id], title),
        splits={name: replace(rows[name], history=rows[name].history.last(longest)) for name in NAMES},
        interactions=None,
        users=published.users,
        n_interactions=published.interactions,
        words=_words(kind, folder, published.files),
        repairs=published.repairs,
        notes=published.notes,
        citation=None,
        raw_sha256=_hashes(folder, published.files),
    )


def _cleaned(titles: tuple[str, ...], clean: str, repairs: dict[str, int]) -> tuple[str, ...]:
    """Cleaned titles; counts how many changed, and how many fewer different ones there are."""
    cleaned = titles
    for step in steps_of(clean):
        before, cleaned = cleaned, clean_titles(cleaned, step)
        if step not in ("html", "space"):
            changed = sum(new != old for new, old in zip(cleaned, before, strict=True))
            counted(repairs, f"titles_cleaned_of_{step}", changed)
    counted(repairs, "titles_cleaned", sum(new != old for new, old in zip(cleaned, titles, strict=True)))
    counted(repairs, "titles_merged", len(set(titles)) - len(set(cleaned)))
    return cleaned


def _piped(raw: Raw, choices: DataSettings, words: tuple[str, str]) -> Raw:
    """What a pipeline leaves of a source."""
    rows = raw.title_rows
    if rows is None:
        rows = pl.DataFrame({"item": list(raw.title), "title": list(raw.title.values())})
    if choices.pipeline == "d3":
        kept = d3(raw.events, rows, choices.k_core, choices.start_year)
    elif choices.pipeline == "msl":
        sample = choices.sample_items
        if sample is None:
            sample = _SAMPLED_BOOKS if words == _MSL_WORDS["book"] else 0
        kept = msl(raw.events, rows, choices.k_core, sample)
    else:
        kept = igd_steam(raw.events, raw.title, choices.k_core)
    repairs = dict(raw.repairs)
    for name, count in kept.repairs.items():
        counted(repairs, name, count)
    return replace(raw, events=kept.events, title=kept.title, repairs=repairs, notes=(*raw.notes, kept.note))


def _words(whose: str | None, folder: Path, files: tuple[Path, ...]) -> tuple[str, str]:
    """Noun and verb for prompts, by the name of the folder or else of its files; those of a paper for its data."""
    words = {"msl": _MSL_WORDS, "d3": _D3_WORDS, "igd-steam": _D3_WORDS}.get(whose or "", _OTHER_WORDS)
    names = (folder.resolve().name.lower(), *(file.name.lower() for file in files))
    return next((words[word] for name in names for word in words if word in name), _UNKNOWN_WORDS)


def _hashes(folder: Path, files: tuple[Path, ...]) -> dict[str, str]:
    return {file.relative_to(folder).as_posix(): sha256_file(file) for file in files}


def new_raw_file(dataset: Dataset, choices: DataSettings) -> str | None:
    """A file that a prepared folder's source would read now and that was not there, or not read, when it was prepared.

    Args:
        dataset: The prepared data.
        choices: The settings it was prepared with.

    Raises:
        UserError: If the files are no longer a source, for example when there are two that could be the catalogue.
    """
    kind, place = _parsed(choices.source)
    if kind not in _FILES or not Path(place).is_dir():
        return None
    now = {file.relative_to(place).as_posix() for file in _FILES[kind](Path(place), choices)}
    return min(now.difference(dataset.info.get("raw_sha256", now)), default=None)


def prepare(
    source: str,
    out: Path,
    *,
    max_history: int | None = None,
    clean: str = "none",
    k_core: int | None = None,
    split: str | None = None,
    **choices: object,
) -> Dataset:
    """Read a source and write a prepared folder.

    Args:
        source: One of :data:`SOURCES`.
        out: Folder to write; may be absent, empty or an older prepared folder, which is replaced as a whole.
        max_history: Histories are cut to the last so many items (20, of a pipeline 10); with ``"time-windows"`` also
            the length of a window.
        clean: How titles are cleaned; see :func:`triewise.data.titles.clean_titles`.
        k_core: Users and items with fewer interactions are left out, again and again until none is left; 0 or 1
            keeps all (0, of a pipeline 5). Not for published splits.
        split: ``"leave-one-out"`` (unless a pipeline says otherwise), ``"time-windows"`` or ``"time-growing"``; see
            :func:`triewise.data.splits.lazy_splits`. Published splits stay as they are.
        **choices: Further keys of :class:`triewise.settings.DataSettings`, such as ``user_column`` or ``ties``.

    Returns:
        The data set in ``out``.

    Raises:
        UserError: Unknown source, bad setting, broken raw files, ``out`` holds something else.
    """
    out = Path(out)
    asked = {"max_history": max_history, "clean": clean, "k_core": k_core, "split": split}
    given = {name: value for name, value in asked.items() if value is not None} | choices
    wanted, settings = choices_of(source, **given), settings_of(source, **given)
    check_place(out)
    with one_writer(out, beside=True):
        return _prepare(wanted, out, settings)


def _prepare(choices: DataSettings, out: Path, settings: dict[str, Any]) -> Dataset:
    source, read = choices.source, read_source(choices)
    empty = [name for name in NAMES if not read.splits[name].n_rows]
    if empty:
        raise UserError(
            f"wanted rows for train, valid and test from {source}, found none for {empty[0]}; use more data"
        )
    info = {"format": DATA_FORMAT, "source": source, "settings": settings, **_described(read)}
    try:
        info = write_dataset(out, read.catalog, read.splits, info)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(f"cannot write {out}: {error}; choose another folder") from None
    return Dataset.in_folder(out, read.catalog, info)


def _described(read: Prepared) -> dict[str, Any]:
    """What ``dataset.json`` says of the data."""
    rows = {f"{name}_rows": read.splits[name].n_rows for name in NAMES}
    if sum(rows.values()) >= MANY_ROWS:
        note(f"looking for leaks, cold targets and repeats in {sum(rows.values()):,} rows")
    findings = count_findings(read.splits, read.catalog, read.interactions)
    sizes = {"users": read.users, "items": read.catalog.n_items, "titles": read.catalog.n_titles}
    return {
        "noun": read.words[0],
        "verb": read.words[1],
        "counts": {**sizes, "interactions": read.n_interactions, **rows},
        "repairs": read.repairs,
        "lint": [asdict(finding) for finding in findings],
        "notes": list(read.notes),
        "citation": read.citation,
        "raw_sha256": read.raw_sha256,
    }
