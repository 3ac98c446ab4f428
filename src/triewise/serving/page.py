"""The page a person looks at: ``GET /`` of the service, its one style, script and sign; nothing comes from elsewhere.

What it shows it asks of the service as any program would. Titles are untrusted text: the script sets text, never
markup, and the policy lets nothing run or load that is not served here.
"""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING

from triewise.reports import look

if TYPE_CHECKING:
    from fastapi import FastAPI

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "cache-control": "no-cache",
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
}


def add_page(app: FastAPI) -> None:
    """Add the page to an application, outside its OpenAPI document: it needs no key, what it asks may."""
    from fastapi import Response

    here = resources.files("triewise.serving")

    def text(name: str) -> str:
        return here.joinpath(name).read_text(encoding="utf-8")

    files = {
        "/": (text("page.html"), "text/html"),
        "/page/style.css": (look("css") + text("page.css"), "text/css"),
        "/page/script.js": (look("js") + text("page.js"), "text/javascript"),
        "/page/icon.svg": (text("icon.svg"), "image/svg+xml"),
    }

    def add(path: str, content: str, kind: str) -> None:
        async def file() -> Response:
            return Response(content, media_type=kind, headers=HEADERS)

        app.add_api_route(path, file, include_in_schema=False, response_model=None)

    for path, (content, kind) in files.items():
        add(path, content, kind)
