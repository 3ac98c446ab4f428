"""What a tokenizer does to titles: which of them it makes equal, does not know, or does not give back."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from triewise.arrays import Ragged


@dataclass(frozen=True)
class ReadBack:
    """Distinct titles that tokens do not stand for, shortest first; each of them is in ``unknown`` or ``changed`` once.

    Attributes:
        shared: Titles whose tokens are those of another title as well, with that other one.
        unknown: Titles with a token for unknown text.
        changed: Other titles that their tokens do not spell, with what they spell.
    """

    shared: tuple[tuple[str, str], ...] = ()
    unknown: tuple[str, ...] = ()
    changed: tuple[tuple[str, str], ...] = ()

    def warnings(self) -> Iterator[str]:
        """A line with number and example for each kind that there is, for stderr."""
        if self.shared:
            one, other = self.shared[0]
            yield (
                f"warning: {len(self.shared)} titles share their tokens with another title: {one!r} and {other!r}; "
                "they are ranked as one title and any of them may be shown: choose a tokenizer that tells them apart"
            )
        if n := len(self.unknown):
            yield (
                f"warning: {n} {'titles contain' if n > 1 else 'title contains'} tokens the tokenizer does not know: "
                f"{self.unknown[0]!r}; what it does not know is lost: choose a tokenizer that falls back to bytes"
            )
        if n := len(self.changed):
            title, text = self.changed[0]
            yield (
                f"warning: {n} {'titles are' if n > 1 else 'title is'} not read back: {title!r} comes back as "
                f"{text!r}; the model cannot tell what is lost, and grounding compares what comes back"
            )


def read_back(
    titles: Sequence[str], tokens: Ragged, unknown: int | None, read: Callable[[list[list[int]]], list[str]]
) -> ReadBack:
    """Compare titles with their tokens, and with what these spell.

    Harmless is what no reader sees: outer white space, which some tokenizers add or take away, and whether an accent
    is a character of its own (Unicode's NFC, which Qwen2's rules apply). Titles that differ in nothing else are one.

    Args:
        titles: I titles; equal ones are looked at once.
        tokens: Of each title, the last one its terminator (I rows).
        unknown: The token for unknown text.
        read: Texts of tokens without terminator, in one call.
    """
    distinct: dict[str, int] = {}
    for item, title in enumerate(titles):
        distinct.setdefault(_seen(title), item)
    rows, offsets = tokens.values.tolist(), tokens.offsets.tolist()
    ids = {item: rows[offsets[item] : offsets[item + 1] - 1] for item in distinct.values()}
    alike: dict[tuple[int, ...], list[str]] = {}
    for item, row in ids.items():
        alike.setdefault(tuple(row), []).append(titles[item])
    shared = [
        (title, group[title == group[0]]) for group in alike.values() if len(group) > 1 for title in group
    ]
    lost = [item for item, row in ids.items() if unknown in row]
    known = sorted(ids.keys() - lost)
    changed = [
        (titles[item], text.strip())
        for item, text in zip(known, read([ids[item] for item in known]), strict=True)
        if _seen(text) != _seen(titles[item])
    ]
    return ReadBack(
        tuple(sorted(shared, key=lambda pair: len(pair[0]))),
        tuple(sorted((titles[item] for item in lost), key=len)),
        tuple(sorted(changed, key=lambda pair: len(pair[0]))),
    )


def _seen(text: str) -> str:
    """What a reader sees of a text."""
    return unicodedata.normalize("NFC", text).strip()
