r"""What can be wrong with titles, and the steps that put it right.

A title is what a model learns to write, letter by letter: two that look alike are two to it, and markup is text.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable, Sequence

from triewise.errors import UserError

_ENTITY = re.compile(r"&(?:#\d{1,7}|#x[0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,30});")
_TAG = re.compile(r"</?[a-zA-Z][a-zA-Z0-9]*(?:\s[^<>]*)?/?>|<!--.*?-->", re.DOTALL)
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
# Control characters but for white space, and those without width.
_CONTROL = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]"
)
# Two to four letters that UTF-8 bytes become when they are read as cp1252 (or latin-1).
_HIGH = "\x80-\xbf" + bytes(range(0x80, 0xA0)).decode("cp1252", "ignore")
_MOJIBAKE = re.compile(f"[\xc2-\xdf][{_HIGH}]|[\xe0-\xef][{_HIGH}]{{2}}|[\xf0-\xf4][{_HIGH}]{{3}}")
LONG_TITLE = 300  # characters


def _undone(match: re.Match[str]) -> str:
    text = match.group()
    try:
        return b"".join(_byte(letter) for letter in text).decode("utf-8")
    except UnicodeError:
        return text


def _byte(letter: str) -> bytes:
    try:
        return letter.encode("cp1252")
    except UnicodeEncodeError:
        return letter.encode("latin-1")


def _without_mojibake(title: str) -> str:
    for _ in range(2):  # some text went wrong twice
        title = _MOJIBAKE.sub(_undone, title)
    return title


# In this order, whatever the order in which they are asked for.
STEPS: dict[str, Callable[[str], str]] = {
    "mojibake": _without_mojibake,
    "html": html.unescape,
    "tags": lambda title: _TAG.sub(" ", title),
    "control": lambda title: _CONTROL.sub("", _ANSI.sub("", title)),
    "nfc": lambda title: unicodedata.normalize("NFC", title),
    "space": lambda title: " ".join(title.split()),
}


def steps_of(clean: str) -> tuple[str, ...]:
    """The steps that a setting such as ``"html+space"`` names.

    Raises:
        UserError: If one of them is unknown.

    >>> steps_of("space+html"), steps_of("none")
    (('html', 'space'), ())
    """
    wanted = {"none": [], "all": list(STEPS)}.get(clean, clean.split("+"))
    unknown = [step for step in wanted if step not in STEPS]
    if unknown:
        raise UserError(
            f"wanted clean to be 'none', 'all' or steps of {', '.join(STEPS)} with a plus between, got {clean!r}; "
            "choose for example 'html+space'"
        )
    return tuple(step for step in STEPS if step in wanted)


def clean_titles(titles: Sequence[str], clean: str = "none") -> tuple[str, ...]:
    r"""Titles after cleaning.

    Args:
        titles: As they are in the source.
        clean: ``"none"`` leaves each as it is. Else steps with a plus between, or ``"all"``: ``mojibake`` reads again
            what was UTF-8 and read as cp1252, ``html`` replaces entities by their characters, ``tags`` and ``control``
            leave out what they say, ``nfc`` composes letters and accents, ``space`` makes runs of white space one
            space and strips. What was escaped twice is unescaped once: ``&amp;amp;`` becomes ``&amp;``, since the
            second may be meant.

    Raises:
        UserError: If ``clean`` names an unknown step.

    >>> clean_titles(["Ink &amp;  well\n", "AT&amp;amp;T"], "html+space")
    ('Ink & well', 'AT&amp;T')
    """
    done = list(titles)
    for step in steps_of(clean):
        done = list(map(STEPS[step], done))
    return tuple(done)


def look(title: str) -> str:
    """What a reader sees of a title, case aside: titles of one look are hard to tell apart.

    >>> look("Tom &amp; Jerry ") == look("tom & Jerry")
    True
    """
    seen = unicodedata.normalize("NFC", _CONTROL.sub("", html.unescape(title)))
    return " ".join(seen.casefold().split())


def has_markup(title: str) -> bool:
    """Whether an HTML entity or tag is in it."""
    return bool(_TAG.search(title)) or any(html.unescape(name) != name for name in _ENTITY.findall(title))


def has_control(title: str) -> bool:
    """Whether a control character or one without width is in it, white space aside."""
    return bool(_CONTROL.search(title))


def is_mis_decoded(title: str) -> bool:
    """Whether UTF-8 was read as another encoding, or a letter was lost (U+FFFD)."""
    return not title.isascii() and ("\ufffd" in title or _without_mojibake(title) != title)
