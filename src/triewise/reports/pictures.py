"""Figures of a report as files of their own: SVG that needs no page around it, and PNG."""

from __future__ import annotations

import re
from importlib import resources

from triewise.errors import UserError

SCALE = 3  # pixels of a PNG for each unit of a figure


def standalone(svg: str) -> str:
    """An SVG drawing of a report with the rules of the page that it needs in it, in the light colours."""
    here = resources.files("triewise.reports")
    page, shared = (here.joinpath(name).read_text(encoding="utf-8") for name in ("report.html", "look.css"))
    values = dict(re.findall(r"--(\w+):([^;}]+)", shared[: shared.index("@media")]))
    used = {"", *" ".join(re.findall(r'class="([^"]*)"', svg)).split()}
    rules = []
    for selectors, rule in re.findall(r"([^{}]+)\{([^{}]*)\}", page[page.index("<style>") :]):
        named = [re.fullmatch(r"svg(?: text)?()|\.(\w+)", one.strip()) for one in selectors.split(",")]
        kept = [one[0] for one in named if one and (one[2] or "") in used]
        rules += [f"{','.join(kept)}{{{rule}}}"] if kept else []
    style = re.sub(r"var\(--(\w+)\)", lambda name: values[name[1]], "".join(rules))
    width, height = re.search(r'viewBox="0 0 (\d+) (\d+)', svg).groups()  # type: ignore[union-attr]
    back = f'<rect width="{width}" height="{height}" fill="{values["bg"]}"/>'
    size = f'xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
    head, rest = svg.split(">", 1)
    return f"{head.replace('<svg ', f'<svg {size}', 1)}><style>{style}</style>{back}{rest}\n"


def to_png(svg: str) -> bytes:
    """A standalone SVG as PNG.

    Raises:
        UserError: The package that draws it is not installed.
    """
    try:
        import resvg_py
    except ImportError:
        raise UserError(
            "PNG needs the package resvg-py, which is not installed; pip install 'triewise[png]', or export svg"
        ) from None
    return bytes(resvg_py.svg_to_bytes(svg_string=svg, zoom=SCALE))
