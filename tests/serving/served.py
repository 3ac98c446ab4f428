"""A service over a small recommender, asked without a socket."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx

from tests import worlds
from triewise.serving import Limits
from triewise.serving.service import Service, create_app
from triewise.serving.versions import LiveCatalogue

T = TypeVar("T")
TITLES = tuple(
    f"{a} {b} {c}" for a in ("Red", "Blue", "Green") for b in ("Sun", "Moon") for c in ("one", "two", "three")
)
SETS = {"reds": [f"raw-{i}" for i in range(6)]}


class Served:
    """A started service and its application.

    Attributes:
        lines: What it has logged.
    """

    def __init__(
        self, recommender: Any, limits: Limits, keys: Sequence[bytes] = (), titles: bool = False
    ) -> None:
        self.lines: list[dict[str, Any]] = []
        self.service = Service(LiveCatalogue(recommender), limits, SETS, "small")
        self.app = create_app(
            self.service, keys=keys, log=lambda line: self.lines.append(dict(line)), log_titles=titles
        )

    def client(self) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://served")

    def many(self, ask: Callable[[httpx.AsyncClient], Awaitable[T]]) -> T:
        """What a coroutine gets."""

        async def within() -> T:
            async with self.client() as client:
                return await ask(client)

        return asyncio.run(within())

    def __call__(self, method: str, path: str, **how: Any) -> httpx.Response:
        """One request."""
        return self.many(lambda client: client.request(method, path, **how))

    def ready(self) -> None:
        """Wait till it is."""
        self.service.start()
        while not self.service.warm:
            self.service.batcher._thread.join(0.01)  # type: ignore[union-attr]


@contextmanager
def served(recommender: Any = None, limits: Limits | None = None, **how: Any) -> Iterator[Served]:
    if recommender is None:
        recommender = worlds.recommender(TITLES, search="exact", batch_users=8)
    one = Served(recommender, limits or Limits(), **how)
    one.ready()
    try:
        yield one
    finally:
        one.service.stop()
