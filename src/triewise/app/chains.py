"""LLM-CF's chains of thought: which training rows they are about, what is asked, and the file that answers are kept in.

A chain explains why a user bought an item after a history, or why not. ``chains.jsonl`` has one JSON object a line, and
lines are only ever added; what was half written when a process died is no line, and is written again.

Shape key: R training rows, E chains.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from triewise.errors import UserError
from triewise.training import draw_rejected, make_windows

if TYPE_CHECKING:
    from pathlib import Path

    from triewise.arrays import Int64
    from triewise.data import Dataset, Split
    from triewise.settings import ExampleSettings, WriterSettings

CHAINS = "chains.jsonl"
LEAST = 10  # characters of a chain
_SEED = 0  # one folder of chains serves runs of all seeds
_OF_TEXT = {"model", "candidates", "temperature", "top_k", "max_tokens"}  # settings that a text depends on


@dataclass(frozen=True)
class Questions:
    """What chains are about.

    Attributes:
        row: int64 (E,), which training rows, ascending.
        item: int64 (E,): the row's target, or an item that is neither that nor in the history.
        label: int64 (E,): 1 and 0 for these two; half of the chains each.
        prompts: What a model is asked.
        templates: What is said without one.
        titles: Of the history, and behind them that of the item.
    """

    row: Int64
    item: Int64
    label: Int64
    prompts: tuple[str, ...]
    templates: tuple[str, ...]
    titles: tuple[tuple[str, ...], ...]

    def keys(self, writer: WriterSettings) -> list[str]:
        """A hash for each of the prompt, the model and its settings."""
        said = writer.model_dump(include=_OF_TEXT) | {"remote": writer.endpoint is not None}
        return [hashlib.sha256(json.dumps([prompt, said]).encode()).hexdigest() for prompt in self.prompts]


class Chain(NamedTuple):
    """A text, and whether a model wrote it."""

    text: str
    by_model: bool


def questions_of(settings: ExampleSettings, dataset: Dataset, rows: Split) -> Questions:
    """What is asked about a share of training rows (R); the same for all seeds.

    The authors ask about rows of a data set for click-through rates, in which items that were not bought stand already;
    here they are drawn.
    """
    n = min(max(2, round(settings.share * rows.n_rows)), rows.n_rows)
    rng = np.random.default_rng(_SEED)
    row = np.sort(rng.permutation(rows.n_rows)[:n])
    label, about = rng.permutation(n) % 2, rows.take(row)
    other = draw_rejected(make_windows(about, "last"), dataset.catalog.group, 1, _SEED)[:, 0]
    item = np.where(label == 1, about.target, other).astype(np.int64)
    title, words = dataset.catalog.title, (dataset.info["verb"], dataset.info["noun"])
    titles = tuple(
        (*(title[i] for i in history), title[asked])
        for history, asked in zip(about.history, item.tolist(), strict=True)
    )
    pairs = list(zip(titles, label.tolist(), strict=True))
    prompts = tuple(_prompt(of_row, bought, *words) for of_row, bought in pairs)
    return Questions(row, item, label, prompts, tuple(_template(t, b, *words) for t, b in pairs), titles)


def chains_of(settings: ExampleSettings, questions: Questions) -> list[Chain]:
    """The chains of a recipe: those of its folder, or without one the template's.

    Raises:
        UserError: Some are not in the folder, or there is a model and no folder.
    """
    folder, model = settings.chains, settings.writer.model
    if folder is None:
        if model != "template":
            raise UserError(
                f"chains of thought by {model} are written ahead of training; run: triewise reason RECIPE --out DIR, "
                "and set enhance.chains = DIR"
            )
        return [Chain(text, False) for text in questions.templates]
    kept, keys = kept_chains(folder), questions.keys(settings.writer)
    missing = sum(key not in kept for key in keys)
    if missing:
        raise UserError(
            f"{missing} of {len(keys)} chains of thought of these rows and enhance.writer are not in {folder}; run: "
            f"triewise reason RECIPE --out {folder}"
        )
    return [kept[key] for key in keys]


def chain_of(entry: Mapping[str, Any]) -> Chain:
    """The chain of a line."""
    return Chain(entry["text"], entry["by"] != "template")


def kept_chains(folder: Path) -> dict[str, Chain]:
    """What is in a folder, by key; nothing where it is not there yet."""
    found: dict[str, Chain] = {}
    file = folder / CHAINS
    for line in file.read_bytes().split(b"\n") if file.is_file() else ():
        try:
            entry = json.loads(line)
            found.setdefault(entry["key"], chain_of(entry))
        except (ValueError, KeyError, TypeError):
            continue  # half a line
    return found


def keep_chains(folder: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Add lines in one write, on a new line where the last one was not finished; on the disk when this ends."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{json.dumps(entry)}\n" for entry in entries)
    with (folder / CHAINS).open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            text = text if file.read(1) == b"\n" else f"\n{text}"
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def best_chain(candidates: Sequence[str], titles: Sequence[str], label: int) -> str | None:
    """The candidate with the highest `quality`, the first of equal ones; None where none can be used.

    One that is shorter than ten characters, or concludes the opposite of what happened, cannot.
    """
    usable = [text for text in map(str.strip, candidates) if len(text) >= LEAST]
    scored = [(quality(text, titles, label), text) for text in usable]
    scored = [(marks, text) for marks, text in scored if marks[3]]
    return max(scored, key=lambda pair: sum(pair[0]))[1] if scored else None


def quality(text: str, titles: Sequence[str], label: int) -> tuple[float, float, float, float]:
    """Four marks in [0, 1], of equal weight.

    Coherence: the share of sentences that are no repetition. Completeness: the share of the four points that are there.
    Relevance: the share of the titles' words that are in it. Consistency: whether it concludes what happened; 1/2
    where it concludes nothing. The authors have the same four by a sentiment lexicon and a sentence encoder.
    """
    sentences = [s.strip() for s in re.split(r"[.!?\n]+", text.casefold()) if len(s.strip()) > 1]
    points = {number for number in re.findall(r"(?:^|\s)([1-4])[.):]", text)}
    said, wanted = _words(text), _words(" ".join(titles))
    concluded = re.findall(r"\b(yes|no)\b", text.casefold())
    agrees = 0.5 if not concluded else float((concluded[-1] == "yes") == bool(label))
    return (
        len(set(sentences)) / max(len(sentences), 1),
        len(points) / 4,
        len(said & wanted) / max(len(wanted), 1),
        agrees,
    )


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))


def _prompt(titles: tuple[str, ...], bought: int, verb: str, noun: str) -> str:
    *history, item = titles
    listed = "\n".join(f"- {title}" for title in history)
    return (
        f"A user has {verb} these {noun}, oldest first:\n{listed}\nLater the user was offered this: {item}\n"
        f"The user {'took it' if bought else 'did not take it'}. Explain why, step by step, in four numbered points:\n"
        "1. What the history says of the user.\n2. How the offer fits the user.\n"
        "3. Whether the user wanted something different from before.\n"
        "4. What else may have mattered, such as how popular it is.\n"
        f'Then conclude: "Therefore the answer is {"Yes" if bought else "No"}."'
    )


def _template(titles: tuple[str, ...], bought: int, verb: str, noun: str) -> str:
    *history, item = titles
    shared = sorted(_words(item) & _words(" ".join(history)))
    fits = f"shares the words {', '.join(shared)} with that" if shared else "has no word in common with that"
    return (
        f"1. The user has {verb} these {noun}: {'; '.join(history)}. 2. The offer, {item}, {fits}. "
        f"3. It is {'more of the same' if shared else 'something different'}. 4. Nothing else is known. "
        f"Therefore the answer is {'Yes' if bought else 'No'}."
    )
