"""Histories to prompts: one object for training and for inference, hashed.

A template decides three texts: what stands before the history, how titles stand in the history, and the
string whose tokens are a title. Prompt and title are tokenised apart and their ids are concatenated, so no
seam is ever searched for. Titles are untrusted text: they are tokenised with ``split_special_tokens=True``,
and what a tokenizer takes for a special token all the same (unigram models do) is spelt out in characters, so
that a title which contains the terminator's spelling is just a title.

Templates (facts of the papers' prompts in ``docs/papers.md``; the sentences of ``msl`` are ours)::

    plain   titles, each closed by the terminator   title as it is      ours, for models trained from scratch
    msl     instruction, input, response            title in quotes     MSL, BIGRec
    d3      the same with "User Input"              title and newline   IGD's copy of D3
            (``d3-reworded``: what d3 was here before it had its authors' words, for what was trained on it)

A *growing* prompt has the instruction once and behind it the titles of the history, each as the model writes titles, as
in ``plain``. So one forward of a user has every title as a target whose prompt is all that stands before it. The
instruction is the text up to the history; the marker of the answer behind a history is left out.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from triewise.arrays import Int64, Ragged
from triewise.errors import UserError, first_line
from triewise.tokens.readback import ReadBack, read_back

if TYPE_CHECKING:
    from triewise.data import Catalog
    from triewise.models import SlotIds
    from triewise.tokens.identifiers import Identifier

_ANNOUNCEMENT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
_ALONE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
_UNKNOWN = "Unknow"  # IGD's code spells it so

# Spelling, grammar and white space of d3 are its authors'; results depend on the exact text, so they stay.
_BEFORE = {
    "msl": _ANNOUNCEMENT
    + "\n\n### Instruction:\nGiven the {noun} the user has {verb}, recommend a new one the user likes."
    "\n\n### Input:\nThe user has {verb} the following {noun} before: ",
    "d3": _ANNOUNCEMENT
    + " \n\n### Instruction:\nGiven a list of {noun} the user recetenly enjoy, please write a new {noun} that the user "
    "may bought\n### User Input: \nThe user has palyed the following {noun}s before: ",
    "d3-reworded": _ANNOUNCEMENT
    + "\n\n### Instruction:\nGiven a list of {noun} the user recently enjoyed, please write a new "
    "one that the user may buy\n\n### User Input: \nThe user has palyed the following {noun}s before: ",
}
_AFTER = {"msl": "\n \n\n### Response:\n", **dict.fromkeys(("d3", "d3-reworded"), "\n\n### Response: \n")}
_TITLE = {"plain": "{}", "msl": '"{}"', **dict.fromkeys(("d3", "d3-reworded"), "{}\n")}
_IN_HISTORY = {"msl": '"{}"', **dict.fromkeys(("d3", "d3-reworded"), "{}")}
TEMPLATES = tuple(_TITLE)
WITHOUT = ("no-input", "unknown")
_USER = " is a user representation. "  # behind the user's slot, as in A-LLMRec
_PLACE = "\N{OBJECT REPLACEMENT CHARACTER}"  # where the user's text goes while a chat template is rendered

# Tokenizers keep the settings of a call until the next, and counts are read and written. A lock of the module, because
# prompts are copied and sent to processes.
_ONE_AT_A_TIME = threading.Lock()


@dataclass
class Dropped:
    """How many titles did not fit, counted while prompts are made; threads may count together."""

    titles: int = 0
    prompts: int = 0
    limit: int = 0  # tokens of a prompt

    def add(self, titles: int) -> None:
        """One prompt more that lost so many titles."""
        with _ONE_AT_A_TIME:
            self.titles += titles
            self.prompts += titles > 0


@dataclass(frozen=True)
class Prompts:
    """Turns histories of item indices into token ids, in any number of threads; made by :func:`build_prompts`.

    Attributes:
        template: One of :data:`TEMPLATES`.
        title_tokens: For each item the ids of its title and the terminator: what the trie is built from.
        bos: Ids in front of every prompt; never empty for ``plain``, so an empty history has a prompt too.
        max_history: Only the last so many titles of a history are used.
        max_tokens: A longer prompt loses whole titles, oldest first.
        n_items: How many of the titles are items; those behind them only histories hold.
        settings: The keyword arguments of :func:`build_prompts` that make this object again.
        dropped: Titles that were dropped because of ``max_tokens`` so far.
        special: Ids that text never becomes: the special tokens without the one for unknown text.
        slots: Where given, the slot of an item stands behind its title, and that of the user, if there are any, in
            front of everything.
        identifier: Where given, its codes stand for an item, in the history too, with the title behind them or without.
    """

    tokenizer: Any = field(repr=False)
    title: tuple[str, ...] = field(repr=False)
    template: str
    title_tokens: Ragged = field(repr=False)
    bos: tuple[int, ...]
    before: tuple[int, ...] = field(repr=False)
    after: tuple[int, ...] = field(repr=False)
    lead: str = field(repr=False)
    max_history: int
    max_tokens: int
    n_items: int
    settings: dict[str, Any] = field(repr=False)
    dropped: Dropped = field(default_factory=Dropped, repr=False)
    special: frozenset[int] = field(default=frozenset(), repr=False)
    slots: SlotIds | None = field(default=None, repr=False)
    identifier: Identifier | None = field(default=None, repr=False)

    @property
    def growing(self) -> bool:
        """Whether an instruction is followed by titles as they are written, see above."""
        return bool(self.settings.get("growing"))

    @cached_property
    def head(self) -> tuple[int, ...]:
        """Ids in front of the first title of a prompt that is plain or grows."""
        return tuple(self._around(self.lead)) if self.growing else self.bos

    @property
    def grows(self) -> bool:
        """Whether titles of a history stand as they are written, so that each can be a target too."""
        return self.growing or self.template == "plain"

    @cached_property
    def hash(self) -> str:
        """Hex SHA-256 of all that prompts depend on: template, titles of items, tokenizer, limits."""
        template, identifier, n_items = self.template, self.identifier, self.n_items
        name = template.removesuffix("-reworded")
        frame: list[Any] = [
            _AFTER.get(template),
            _TITLE[template],
            _IN_HISTORY.get(template),
            self.title[:n_items],
            name,
        ]
        frame += [self.lead, self.before, self.after, self.bos, self.max_history, self.max_tokens]
        coded = None if identifier is None else replace(identifier, codes=identifier.codes[:n_items])
        read = _read_beside(self.slots, coded)
        grows = [key for key in ("growing",) if key in self.settings]
        identity = [*frame, tokenizer_hash(self.tokenizer), *read, *grows]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    @property
    def n_dropped(self) -> int:
        """Titles dropped so far because prompts were too long."""
        return self.dropped.titles

    def encode(self, history: Iterable[int]) -> list[int]:
        """Prompt ids for one history.

        Args:
            history: Item indices, oldest first; may be empty.

        Raises:
            UserError: If the instruction alone is longer than ``max_tokens``.
        """
        items = [int(i) for i in history][-self.max_history :] if self.max_history else []
        user = [] if self.slots is None else self.slots.user(items)
        for first in range(len(items) + 1):
            ids = [*user, *self._encode(items[first:])]
            if len(ids) <= self.max_tokens:
                self.dropped.add(first)
                return ids
        raise UserError(
            f"wanted a prompt of at most {self.max_tokens} tokens, the instruction alone has {len(ids)}; "
            "raise max_tokens"
        )

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts as they are, without template and terminator; what spells a special token is characters."""
        return _plain_ids(self.tokenizer, list(texts), self.special) if len(texts) else []

    def changed(self, title: Sequence[str], source: Int64, n_items: int) -> Prompts:
        """The same for other titles, of which those that are here already are not tokenised again.

        Args:
            title: Of the items, and behind them of those that only histories hold.
            source: int64, which title here each of them is, -1 for a new one.
            n_items: How many are items.

        Raises:
            UserError: New titles beside codes, or a tokenizer that puts the terminator into a title.
        """
        new, identifier = np.flatnonzero(source < 0).tolist(), self.identifier
        if identifier is not None:
            if new:
                raise UserError(
                    f"a model that writes codes has none for a new item: wanted no {title[new[0]]!r}; make codes for "
                    "the whole catalogue and train again"
                )
            identifier = replace(identifier, codes=tuple(identifier.codes[i] for i in source.tolist()))
        made = _title_tokens(self.tokenizer, [title[i] for i in new], self.template, self.special)
        rows = source.copy()
        rows[new] = len(self.title_tokens) + np.arange(len(new))
        tokens = self.title_tokens.then(made).take(rows)
        return replace(self, title=tuple(title), title_tokens=tokens, n_items=n_items, identifier=identifier)

    def read_titles(self, rows: list[list[int]]) -> list[str]:
        """The titles that generated ids spell: texts without special tokens and without the template's frame."""
        texts = self.tokenizer.batch_decode(
            rows, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        before, after = _TITLE[self.template].split("{}")
        return [text.removeprefix(before).removesuffix(after) for text in texts] if rows else []

    @cached_property
    def codes(self) -> Ragged:
        """Ids of the codes of each item (I rows), none without an identifier."""
        return _code_ids(self.tokenizer, self.identifier)

    @cached_property
    def readback(self) -> ReadBack:
        """What the tokenizer does to the titles; takes a quarter of the time that making them did. Nothing to codes."""
        if self.identifier is not None:
            return ReadBack()
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        return read_back(self.title, self.title_tokens, unknown, self.read_titles)

    def without_history(self, style: str = "no-input") -> list[int]:
        """Prompt ids that say nothing of a user, for CFT; a ``plain`` prompt without titles is what ``bos`` is.

        Args:
            style: ``no-input``: the instruction alone, as CFT's code; ``unknown``: one word in the place of the
                history, as IGD's code.

        Raises:
            UserError: Unknown style, or ``unknown`` with the ``plain`` template, which has no words.
        """
        if style not in WITHOUT:
            raise UserError(f"wanted without_history among {', '.join(WITHOUT)}, got {style!r}")
        if self.grows:
            if style == "unknown":
                raise UserError(
                    "without_history = 'unknown' needs an instruction template (msl or d3) that does not grow, got "
                    f"{self.template!r}; use 'no-input'"
                )
            return list(self.head)
        instruction, mark, section = self.lead.rpartition("\n### ")
        after = _AFTER[self.template]
        if style == "no-input":
            instruction = instruction.removeprefix(_ANNOUNCEMENT).removesuffix("\n")
            text = _ALONE + instruction + after[after.index("\n\n###") :]
        else:
            text = instruction + mark + section.partition("\n")[0] + "\n" + _UNKNOWN + after
        return self._around(text)

    def _encode(self, items: list[int]) -> list[int]:
        if self.slots is not None:
            return self._slotted(items, self.slots)
        if self.grows:
            return [*self.head, *itertools.chain.from_iterable(self.title_tokens[i].tolist() for i in items)]
        if self.identifier is not None:
            return self._coded(items, self.identifier.titled)
        titles = ", ".join(_IN_HISTORY[self.template].format(self.title[i]) for i in items)
        return self._around(self.lead + titles + _AFTER[self.template])

    def _slotted(self, items: list[int], slots: SlotIds) -> list[int]:
        """The same with the slot of each item behind its title; texts between slots are tokenised apart."""
        if self.template == "plain":
            texts, end = [self.title_tokens[i].tolist() for i in items], []
        else:
            titles = [_IN_HISTORY[self.template].format(self.title[i]) for i in items]
            lead = self.lead if slots.histories is None else _USER + self.lead
            parts = [(", " if n else lead) + title for n, title in enumerate(titles)]
            parts.append(_AFTER[self.template] if items else lead + _AFTER[self.template])
            *texts, end = _plain_ids(self.tokenizer, parts, self.special)
        behind = ([*ids, slots.item(i)] for ids, i in zip(texts, items, strict=True))
        return [*self.bos, *self.before, *itertools.chain.from_iterable(behind), *end, *self.after]

    def _coded(self, items: list[int], titled: bool) -> list[int]:
        """The same with the codes of each item, and behind them its title or nothing; texts are tokenised apart."""
        titles = [_IN_HISTORY[self.template].format(self.title[i]) if titled else "" for i in items]
        texts = [*([self.lead] if items else []), *[", "] * (len(items) - 1), *titles]
        ids = _plain_ids(
            self.tokenizer, [*texts, ("" if items else self.lead) + _AFTER[self.template]], self.special
        )
        rows = zip(ids, items, ids[len(items) :], strict=False)
        shown = ([*before, *self.codes[i].tolist(), *title] for before, i, title in rows)
        return [*self.bos, *self.before, *itertools.chain.from_iterable(shown), *ids[-1], *self.after]

    def _around(self, text: str) -> list[int]:
        """Ids of a text between those that every prompt has."""
        [ids] = _plain_ids(self.tokenizer, [text], self.special)
        return [*self.bos, *self.before, *ids, *self.after]


def build_prompts(
    tokenizer: Any,
    catalog: Catalog,
    template: str = "plain",
    noun: str = "items",
    verb: str = "bought",
    *,
    max_history: int = 20,
    max_tokens: int = 1024,
    chat: bool = False,
    start: Sequence[int] | None = None,
    slots: SlotIds | None = None,
    identifier: Identifier | None = None,
    growing: bool = False,
) -> Prompts:
    """Tokenise the catalogue and fix everything a prompt depends on.

    Args:
        tokenizer: A Hugging Face tokenizer with a terminator (``eos_token``).
        catalog: The titles.
        template: One of :data:`TEMPLATES`.
        noun: What the items are, plural, for the instruction; from ``dataset.json``.
        verb: What users did with them, past participle; from ``dataset.json``.
        max_history: At most so many titles of a history are used, the most recent ones.
        max_tokens: Length limit of a prompt in tokens.
        chat: Wrap the prompt in the tokenizer's chat template as a user's turn (instruct models).
        start: Ids in front of every prompt; None: with ``chat`` nothing, else what the tokenizer itself puts in front
            of a text, and for ``plain``, which needs a first token, its start token or terminator where that is none.
        slots: Of the model that reads the prompts, see `Prompts`.
        identifier: What stands for an item in the place of its title; its names are tokens of the tokenizer.
        growing: Titles of the history stand as they are written, see `Prompts`; of ``plain`` they do anyway.

    Raises:
        UserError: Unknown template, ``chat`` or slots where they cannot be, or a tokenizer that cannot write titles.
    """
    _check(tokenizer, template, chat)
    grows = _grows(growing, template, slots)
    lead = _BEFORE[template].format(noun=noun, verb=verb) if template in _BEFORE else ""
    sides = _chat_sides(tokenizer) if chat else ((), ())
    bos, said = _started(tokenizer, template, chat, start)
    lengths = {"max_history": max_history, "max_tokens": max_tokens}
    return Prompts(
        tokenizer=tokenizer,
        title=catalog.title,
        template=template,
        title_tokens=_identifiers(tokenizer, catalog.title, template, identifier),
        bos=bos,
        before=sides[0],
        after=sides[1],
        lead=lead,
        max_history=max_history,
        max_tokens=max_tokens,
        n_items=catalog.n_items,
        settings={"template": template, "noun": noun, "verb": verb, **lengths, "chat": chat, **said, **grows},
        special=_special(tokenizer),
        slots=slots,
        identifier=identifier,
    )


def _grows(growing: bool, template: str, slots: SlotIds | None) -> dict[str, bool]:
    """What settings have to say of prompts that grow; of ``plain`` and of others nothing."""
    if not growing or template == "plain":
        return {}
    if slots is not None:
        raise UserError(
            f"item vectors in a prompt that grows need the plain template, got {template!r}; use it"
        )
    return {"growing": True}


def _check(tokenizer: Any, template: str, chat: bool) -> None:
    if template not in TEMPLATES:
        raise UserError(f"wanted a prompt template among {', '.join(TEMPLATES)}, got {template!r}")
    if tokenizer.eos_token_id is None:
        raise UserError(
            "wanted a tokenizer with an end-of-sequence token to close titles; set tokenizer.eos_token"
        )
    if chat and (template == "plain" or not getattr(tokenizer, "chat_template", None)):
        raise UserError(
            "chat = true needs an instruction template (msl or d3) and a tokenizer with a chat template"
        )
    try:
        tokenizer(["a"], add_special_tokens=False, split_special_tokens=True)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(
            f"wanted a tokenizer that can split special tokens, got {type(tokenizer).__name__} "
            f"({first_line(error).rstrip('.')}); use the model's tokenizer.json, or choose another model"
        ) from error


def tokenizer_hash(tokenizer: Any) -> str:
    """Hex SHA-256 of a tokenizer's vocabulary, rules and special tokens."""
    if hasattr(tokenizer, "backend_tokenizer"):
        # A tokenizer remembers the truncation and padding of its last call; they are no part of what it is.
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        rules.update(truncation=None, padding=None)
    else:  # its rules are code
        with TemporaryDirectory() as folder:
            files = [Path(file) for file in tokenizer.save_vocabulary(folder)]
            kept = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
        added = {str(i): repr(token) for i, token in tokenizer.added_tokens_decoder.items()}
        rules = {"class": type(tokenizer).__name__, "files": kept, "added": added}
    return hashlib.sha256(json.dumps([rules, tokenizer.eos_token_id], sort_keys=True).encode()).hexdigest()


def _special(tokenizer: Any) -> frozenset[int]:
    """Ids of the special tokens, without the one that stands for unknown text."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).items()
    return frozenset(i for i, token in added if token.special and i != tokenizer.unk_token_id)


def _plain_ids(tokenizer: Any, texts: list[str], special: frozenset[int]) -> list[list[int]]:
    """Ids of untrusted texts: the spelling of a special token is characters like any other."""
    with _ONE_AT_A_TIME:
        rows = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    # Where special tokens are pieces of the model itself (unigram), it finds them in text, split or not.
    return [
        ids if special.isdisjoint(ids) else [part for i in ids for part in _spelt(tokenizer, i, special)]
        for ids in rows
    ]


def _spelt(tokenizer: Any, token: int, special: frozenset[int]) -> list[int]:
    """A special token as the ids of its characters, another token as it is."""
    if token not in special:
        return [token]
    characters: list[int] = tokenizer.convert_tokens_to_ids(list(tokenizer.convert_ids_to_tokens(token)))
    return characters


def _read_beside(slots: SlotIds | None, identifier: Identifier | None) -> list[Any]:
    """What a prompt depends on beside texts and tokenizer, for its hash."""
    read: list[Any] = [] if slots is None else [[slots.first, slots.n_items, slots.histories is not None]]
    return read if identifier is None else [*read, identifier.fingerprint]


def _identifiers(
    tokenizer: Any, titles: Sequence[str], template: str, identifier: Identifier | None
) -> Ragged:
    """What the model writes for each item: title, codes, or both, and the terminator."""
    codes = _code_ids(tokenizer, identifier)
    if identifier is not None and not identifier.titled:
        return Ragged.from_lists([[*row, int(tokenizer.eos_token_id)] for row in codes])
    behind = _title_tokens(tokenizer, titles, template, _special(tokenizer))
    if identifier is None:
        return behind
    return Ragged.from_lists([[*row, *rest] for row, rest in zip(codes, behind, strict=True)])


def _code_ids(tokenizer: Any, identifier: Identifier | None) -> Ragged:
    rows = () if identifier is None else identifier.codes
    return Ragged.from_lists([tokenizer.convert_tokens_to_ids(list(row)) for row in rows])


def _title_tokens(tokenizer: Any, titles: Sequence[str], template: str, special: frozenset[int]) -> Ragged:
    rows = _plain_ids(tokenizer, [_TITLE[template].format(t) for t in titles], special) if titles else []
    end = int(tokenizer.eos_token_id)
    for title, ids in zip(titles, rows, strict=True):
        if end in ids:
            raise UserError(
                f"the tokenizer writes its terminator (id {end}) inside the title {title!r}; "
                "use a tokenizer that can split special tokens"
            )
    return Ragged.from_lists([[*ids, end] for ids in rows])


def _started(
    tokenizer: Any, template: str, chat: bool, start: Sequence[int] | None
) -> tuple[tuple[int, ...], dict[str, list[int]]]:
    """Ids in front of every prompt, and what settings have to say of them."""
    single = single_start(tokenizer, template, chat)
    own = () if chat else _in_front(tokenizer) or single
    bos = own if start is None else tuple(start)
    return bos, {} if bos == own == single else {"start": list(bos)}


def single_start(tokenizer: Any, template: str, chat: bool) -> tuple[int, ...]:
    """One start token or none: what every prompt started with where settings name no ``start``."""
    if chat:
        return ()
    if template == "plain":
        return (int(tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id),)
    return tuple(i for i in tokenizer("")["input_ids"][:1] if i == tokenizer.bos_token_id)


def _in_front(tokenizer: Any) -> tuple[int, ...]:
    """What a tokenizer puts in front of a text; of an empty one it could not be told from what it puts behind."""
    whole, text = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (True, False))
    places = range(len(whole) - len(text) + 1)
    return next((tuple(whole[:i]) for i in places if whole[i : i + len(text)] == text), ())


def _chat_sides(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids before and after the user's text; only these may contain special tokens."""
    turn = [{"role": "user", "content": _PLACE}]
    try:
        rendered = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        problem = f"shows it {rendered.count(_PLACE)} times"
    except Exception as error:  # a template is a program of the model's author
        rendered, problem = "", f"fails ({type(error).__name__}: {first_line(error)})"
    if rendered.count(_PLACE) != 1:
        raise UserError(
            f"wanted a chat template that shows a user's turn once, got one that {problem}; set backbone.chat = false, "
            "or correct the tokenizer's chat_template"
        )
    before, _, after = rendered.partition(_PLACE)
    return tuple(tuple(tokenizer(side, add_special_tokens=False)["input_ids"]) for side in (before, after))  # type: ignore[return-value]


def turns(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of untrusted texts, each as a user's turn where the tokenizer has a chat template."""
    chat = getattr(tokenizer, "chat_template", None)
    before, after = _chat_sides(tokenizer) if chat else (_in_front(tokenizer), ())
    return [[*before, *ids, *after] for ids in _plain_ids(tokenizer, list(texts), _special(tokenizer))]
