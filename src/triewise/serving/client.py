"""A small client of the service, for other programs; needs httpx, and neither torch nor the rest of triewise.

with Client("http://127.0.0.1:8000") as client:
    [result] = client.recommend([["Toy Story (1995)"]], k=5).results
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

from triewise.errors import UserError

if TYPE_CHECKING:
    import httpx

    Body = Mapping[str, Any]

LONGEST_WAIT = 30.0  # seconds that a Retry-After is followed


class ServiceError(Exception):
    """The service has refused a request.

    Attributes:
        status: Of HTTP.
        code: One word, such as ``overloaded``.
        request_id: Under which its log tells more.
    """

    def __init__(self, status: int, code: str, message: str, request_id: str) -> None:
        super().__init__(f"{status} {code}: {message}")
        self.status, self.code, self.request_id = status, code, request_id


@dataclass(frozen=True)
class Token:
    """A part of a title; ``decided`` where the catalogue left an alternative."""

    text: str
    probability: float
    decided: bool


@dataclass(frozen=True)
class Item:
    """A title; ``score`` is None where it was not asked for, or minus infinity."""

    id: str
    title: str = ""
    score: float | None = None
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True)
class Result:
    """What one history gets.

    Attributes:
        items: Best first; of scores in the order of the candidates.
        certified: Whether no better title is missing.
        unknown: Names of the history that the catalogue has not.
        beam: Ids that ten beams would return, where that was asked for.
    """

    items: tuple[Item, ...]
    certified: bool = False
    unknown: tuple[str, ...] = ()
    beam: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Response:
    """Results for each history, the version of the catalogue, and what it cost."""

    results: tuple[Result, ...]
    request_id: str
    catalog_version: int
    took_ms: float
    counters: Mapping[str, int]
    unknown: tuple[str, ...]


class Client:
    """Asks one service; may be used by several threads. Histories are lists of titles, or with ``by="id"`` of ids.

    Args:
        url: Of the service.
        api_key: Where it wants one.
        timeout: Seconds for one request.
        retries: How often a request is made again after 429 or 503, as late as the service says.
        http: A client of httpx to use instead of an own one.

    Raises:
        UserError: httpx is not installed.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout: float = 60.0,
        retries: int = 3,
        http: httpx.Client | None = None,
    ) -> None:
        try:
            import httpx
        except ImportError:
            raise UserError("the client needs httpx; run: pip install 'triewise[serve]'") from None
        headers = {} if api_key is None else {"x-api-key": api_key}
        self._http = http or httpx.Client(base_url=url, timeout=timeout)
        self._http.headers.update(headers)
        self._retries = retries

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close its connections."""
        self._http.close()

    def recommend(
        self,
        histories: Sequence[Sequence[str]],
        k: int = 10,
        *,
        by: Literal["title", "id"] = "title",
        search: str | None = None,
        exclude: Sequence[str] | str = (),
        allow: Sequence[str] | str | None = None,
        keep_history: bool = False,
        explain: bool = False,
        compare: bool = False,
    ) -> Response:
        """Titles for histories; ``exclude`` and ``allow`` are ids, or the name of a set that the service has.

        Raises:
            ServiceError: It refuses, and goes on doing so.
        """
        body = {"histories": _histories(histories, by), "k": k, "search": search, "exclude": _ids(exclude)}
        body |= {"allow": None if allow is None else _ids(allow), "keep_history": keep_history}
        told = self._ask("POST", "/v1/recommend", body | {"explain": explain, "compare": compare})
        results = []
        for one in told["results"]:
            items = tuple(
                Item(
                    it["id"],
                    it["title"],
                    it["score"],
                    tuple(Token(**token) for token in it.get("tokens", ())),
                )
                for it in one["items"]
            )
            beam = tuple(one["beam"]) if "beam" in one else None
            results.append(Result(items, one["certified"], tuple(one["unknown"]), beam))
        return _response(told, results)

    def score(
        self,
        histories: Sequence[Sequence[str]],
        candidates: Sequence[Sequence[str]],
        *,
        by: Literal["title", "id"] = "title",
    ) -> Response:
        """Scores of items by their ids: one list of them for all histories, or one for each."""
        body = {"histories": _histories(histories, by), "candidates": [list(ids) for ids in candidates]}
        told = self._ask("POST", "/v1/score", body)
        results = [
            Result(
                tuple(Item(s["id"], score=s["score"]) for s in one["scores"]), unknown=tuple(one["unknown"])
            )
            for one in told["results"]
        ]
        return _response(told, results)

    def catalog(self, starts: str = "", limit: int = 20, offset: int = 0) -> tuple[Item, ...]:
        """Items, in their order or by what their titles start with."""
        page = self._ask("GET", "/v1/catalog", params={"starts": starts, "limit": limit, "offset": offset})
        return tuple(Item(one["id"], one["title"]) for one in page["items"])

    def change_catalog(self, add: Mapping[str, str] | None = None, remove: Sequence[str] = ()) -> int:
        """Add items (titles by ids) and remove others: the version that is used from now on."""
        new = [{"id": item_id, "title": title} for item_id, title in (add or {}).items()]
        return int(self._ask("POST", "/v1/catalog", {"add": new, "remove": list(remove)})["catalog_version"])

    def rollback_catalog(self) -> int:
        """Go back to the catalogue before the last change: the version that is used from now on."""
        return int(self._ask("POST", "/v1/catalog/rollback")["catalog_version"])

    def models(self) -> list[dict[str, Any]]:
        """What recommends there."""
        found: list[dict[str, Any]] = self._ask("GET", "/v1/models")["data"]
        return found

    def ready(self) -> tuple[str, ...]:
        """Why it is not ready; nothing where it is."""
        return tuple(self._http.get("/health/ready").json()["reasons"])

    def _ask(self, method: str, path: str, body: Body | None = None, **how: Any) -> dict[str, Any]:
        for left in range(self._retries, -1, -1):
            response = self._http.request(method, path, json=body, **how)
            wait = response.headers.get("retry-after", "")
            if response.is_success or not left or not wait.isdigit():
                break
            time.sleep(min(float(wait), LONGEST_WAIT))
        name = response.headers.get("x-request-id", "")
        try:
            told: dict[str, Any] = response.json()
            error = {} if response.is_success else {name: told["error"][name] for name in ("code", "message")}
        except (ValueError, KeyError, TypeError):  # of something in between that is no service
            told, error = {}, {"code": "unknown", "message": response.text[:200]}
        if error:
            raise ServiceError(response.status_code, error["code"], error["message"], name)
        return told


def _histories(histories: Sequence[Sequence[str]], by: str) -> list[dict[str, list[str]]]:
    return [{f"{by}s": list(names)} for names in histories]


def _ids(given: Sequence[str] | str) -> list[str] | str:
    return given if isinstance(given, str) else list(given)


def _response(told: Body, results: Sequence[Result]) -> Response:
    head = {name: told[name] for name in ("request_id", "catalog_version", "took_ms", "counters")}
    return Response(tuple(results), **head, unknown=tuple(told["unknown"]))
