"""Text that others wrote, made safe for a terminal, a log, JSON and HTML.

Titles, names, paths and headers of CSV files are such text. Control characters in it would move the cursor or set
colours, and those of writing direction would show other words than there are.
"""

from __future__ import annotations

import json
import re
from typing import Any

# What no HTML file may hold, and what turns the direction of writing.
UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def legible(text: str) -> str:
    """The text with U+FFFD for control characters other than line breaks and tabs, and for halves of characters."""
    return UNSEEN.sub("\N{REPLACEMENT CHARACTER}", text)


def clean(text: object) -> str:
    """`legible` in one line: line breaks and tabs become spaces."""
    return legible(re.sub(r"[\n\r\t]", " ", str(text)))


def json_line(value: Any) -> str:
    """Strict JSON in one line, in which what `legible` replaces is escaped; what JSON does not know becomes text."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=str)
    return UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
