"""Users to look up in a report: what each method recommends them, and how their titles are written token by token.

The page holds them as JSON, which one small script shows. Titles are untrusted text: none can end the JSON's element,
and the script sets text, never markup. The page lets no script run but this one, by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from triewise.plain import legible
from triewise.reports.explanation import Recommendation, pieces
from triewise.reports.figures import escape

_HERE = resources.files("triewise.reports")
LEAKS = -1e-4  # a forced token below this log-probability has lost some to what is no title
ENDS = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}  # of elements, comments and lines of script


@dataclass(frozen=True)
class Method:
    """A row of the table as the explorer shows it.

    Attributes:
        name: Name of the row.
        other: The search that its rankings are compared with, as ``10 beams`` or ``the exact search``; empty where
            there is none.
        note: What a reader has to know of its probabilities.
    """

    name: str
    other: str = ""
    note: str = ""


@dataclass(frozen=True)
class Ranked:
    """What a method recommends one user.

    Attributes:
        rank: 0-based rank of the true next title, -1 where it was not ranked.
        found: The best titles; those of a method that writes no titles have no tokens.
        target: The true next title with its tokens, where it is not among them and can be explained.
        otherwise: Titles that the other search returned, best first; None where it was not asked.
    """

    rank: int
    found: tuple[Recommendation, ...]
    target: Recommendation | None = None
    otherwise: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Explored:
    """One user; ``ranked`` holds what each method of the explorer recommends, ``kinds`` why the user was chosen."""

    user: str
    kinds: tuple[str, ...]
    history: tuple[str, ...]
    target: str
    ranked: tuple[Ranked, ...]


@dataclass(frozen=True)
class Explorer:
    """Users to look up.

    Attributes:
        users: Whom.
        methods: What ``Explored.ranked`` is of.
        kinds: Names of the kinds of users and what they mean.
        chosen: How the users were chosen, in a sentence.
    """

    users: tuple[Explored, ...]
    methods: tuple[Method, ...]
    kinds: Mapping[str, str]
    chosen: str


def explorer_section(explorer: Explorer, colour: Mapping[str, str], note: str) -> str:
    """The section, which its script brings to light: without one it stays hidden.

    Args:
        explorer: The users.
        colour: Colour class of each method.
        note: How to read it; markup.
    """
    kinds = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(said)}</dd>" for name, said in explorer.kinds.items()
    )
    about = (
        f'<details class="about"><summary>How these users were chosen</summary><p>{escape(explorer.chosen)}</p>'
        f"<dl>{kinds}</dl></details>"
    )
    data = json.dumps(_values(explorer, colour), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return (
        f'<section id="explorer" hidden><h2>Look up a user</h2><p>{note}</p>{about}</section>'
        f'<script type="application/json" id="explored">{data.translate(ENDS)}</script><script>{_script()}</script>'
    )


def look(kind: str) -> str:
    """The style (``css``) or the script (``js``) that the report and the service's page have in common."""
    return _HERE.joinpath(f"look.{kind}").read_text(encoding="utf-8")


def script_policy() -> str:
    """What a content security policy has to say so that the explorer's script runs and no other."""
    digest = hashlib.sha256(_script().encode()).digest()
    return f";script-src 'sha256-{base64.b64encode(digest).decode()}'"


def _script() -> str:
    return look("js") + _HERE.joinpath("explorer.js").read_text(encoding="utf-8")


def _values(explorer: Explorer, colour: Mapping[str, str]) -> dict[str, Any]:
    """JSON values; titles are numbered and listed once."""
    place: dict[str, int] = {}

    def numbers(titles: Iterable[str]) -> list[int]:
        return [place.setdefault(title, len(place)) for title in titles]

    def ranked(of: Ranked) -> dict[str, Any]:
        shown = {
            "rank": of.rank,
            "found": [_title(r, *numbers([r.title])) for r in of.found],
            "target": of.target and _title(of.target, *numbers([of.target.title])),
            "other": None if of.otherwise is None else numbers(of.otherwise),
        }
        return {name: value for name, value in shown.items() if value is not None}

    kinds = list(explorer.kinds)
    users = [
        {
            "user": legible(user.user),
            "kinds": [kinds.index(kind) for kind in user.kinds],
            "history": numbers(user.history),
            "target": numbers([user.target])[0],
            "ranked": [ranked(of) for of in user.ranked],
        }
        for user in explorer.users
    ]
    methods = [
        {"name": legible(m.name), "colour": colour.get(m.name, "c0"), "other": m.other, "note": m.note}
        for m in explorer.methods
    ]
    return {"titles": list(map(legible, place)), "kinds": kinds, "methods": methods, "users": users}


def _title(found: Recommendation, number: int) -> dict[str, Any]:
    """A title: its number, and of one with tokens the log-probability and the way through the trie.

    A step of the way is a decision ``[text, log-probability, alternatives, gain]``, a forced run of tokens its text
    alone, or ``[text, log-probability]`` where some of it is lost to what is no title.
    """
    if not found.tokens:
        return {"t": number} | ({"hit": 1} if found.is_target else {})
    way: list[Any] = []
    forced, lost = "", 0.0

    def close() -> None:
        if forced or lost < LEAKS:
            way.append([forced, round(lost, 3)] if lost < LEAKS else forced)

    for piece in pieces(found.tokens):
        if piece.decides:
            close()
            forced, lost = "", 0.0
            way.append([legible(piece.text), round(piece.log_p, 3), piece.n_valid, round(piece.gain, 4)])
        else:
            forced, lost = forced + legible(piece.text), lost + piece.log_p
    close()
    values: dict[str, Any] = {"t": number, "p": round(found.score, 3), "way": way}
    return values | ({"hit": 1} if found.is_target else {}) | ({"coded": 1} if found.coded else {})
