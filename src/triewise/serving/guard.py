"""What stands between the network and the routes: request ids, the key, limits of a body, the log, the last resort.

An ASGI middleware. Nothing that goes wrong inside leaves the process but as a code, a line and the request's id.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import re
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from fastapi.responses import JSONResponse

from triewise.errors import UserError
from triewise.files import decoded
from triewise.plain import clean, json_line

Scope = MutableMapping[str, Any]
Receive = Callable[[], Any]
Send = Callable[[MutableMapping[str, Any]], Any]
CHANGES = 8  # times the limit of a body: changes of a catalogue are longer than histories
CLOSED = ("/v1/", "/metrics")  # to who has no key, where keys are wanted
BODY_SECONDS = 10.0
EVERYWHERE = frozenset({"0.0.0.0", "[::]"})


class Refusal(Exception):
    """A request that gets no answer but an error.

    Args:
        status: Of HTTP.
        code: One word for programs.
        message: One line for people.
        retry: Seconds after which it may work.
    """

    def __init__(self, status: int, code: str, message: str, retry: int | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.retry = status, code, message, retry

    def response(self) -> JSONResponse:
        """As it is sent."""
        headers = {} if self.retry is None else {"retry-after": str(self.retry)}
        if self.status in (408, 413):  # what is left of the body is not waited for
            headers["connection"] = "close"
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        body = {"error": {"code": self.code, "message": clean(self.message)}}
        return JSONResponse(body, self.status, headers)


@dataclass(frozen=True)
class Rules:
    """What the guard goes by.

    Attributes:
        keys: Of whom may ask; none: everybody.
        max_body: Bytes.
        log: Gets the fields of each request's line.
        measure: Gets path, status and seconds of each request.
        paths: Those of the routes; others count as one.
        hosts: Names in ``Host`` that are answered where there are no keys, in small letters; None: all. With an address
            that stands for all of the machine every address is answered.
    """

    keys: Sequence[bytes]
    max_body: int
    log: Callable[[Mapping[str, Any]], None]
    measure: Callable[[str, int, float], None]
    paths: frozenset[str]
    hosts: frozenset[str] | None = None


class Guard:
    """See the module."""

    def __init__(self, app: Any, rules: Rules) -> None:
        self.app, self.rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, headers = time.perf_counter(), dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        name = given if re.fullmatch(r"[\w.:-]{1,64}", given, re.ASCII) else uuid.uuid4().hex
        said: dict[str, Any] = {}
        path = _path(scope)
        scope["state"] = {**scope.get("state", {}), "request_id": name, "said": said, "begun": begun}
        status = 0

        async def out(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                mine = {b"cache-control": b"no-store", b"x-content-type-options": b"nosniff"}
                mine[b"content-security-policy"] = b"default-src 'none'; frame-ancestors 'none'"
                mine |= {**dict(message.get("headers", ())), b"x-request-id": name.encode()}
                message["headers"] = list(mine.items())
            await send(message)

        try:
            self._admit(scope["method"], path, headers)
            body = await self._body(path, headers, receive)
            if body is None:
                return
            await self.app(scope, _again(body, receive), out)
        except Refusal as refusal:
            said["code"] = refusal.code
            await refusal.response()(scope, receive, out)
        except Exception:
            said["traceback"] = traceback.format_exc()
            if not status:
                message = f"something went wrong here; the log tells more of request {name}"
                await Refusal(500, "internal", message).response()(scope, receive, out)
        finally:
            seconds = time.perf_counter() - begun
            self.rules.measure(path if path in self.rules.paths else "other", status, seconds)
            line = {"time": round(time.time(), 3), "request_id": name, "method": scope["method"]}
            line |= {"path": scope["path"][:200], "status": status, "took_ms": round(1000 * seconds, 3)}
            self.rules.log(line | said)

    def _admit(self, method: str, path: str, headers: Mapping[bytes, bytes]) -> None:
        """Refuse who has no key where one is needed; every key is compared, whatever was found.

        A browser that shows another site's page is refused too: it may stand where everybody may ask. Such a page can
        have its own name lead here, so where no key is needed the name has to be one of ours.
        """
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if host and not self.rules.keys and not _is_among(host, self.rules.hosts):
            raise Refusal(
                421,
                "misdirected",
                f"wanted a Host that this service has, got {host[:100]!r}; serve --allow-host names more",
            )
        if method == "POST" and headers.get(b"sec-fetch-site") in (b"cross-site", b"same-site"):
            raise Refusal(403, "forbidden", "wanted a request of this service's own page, got another site's")
        if not self.rules.keys or not path.startswith(CLOSED):
            return
        bearer = headers.get(b"authorization", b"")
        given = headers.get(b"x-api-key") or (bearer[7:] if bearer[:7].lower() == b"bearer " else b"")
        if not sum(hmac.compare_digest(given.strip(), key) for key in self.rules.keys):
            raise Refusal(
                401, "unauthorized", "wanted a valid key in X-API-Key or as Authorization: Bearer KEY"
            )

    async def _body(self, path: str, headers: Mapping[bytes, bytes], receive: Receive) -> bytes | None:
        """All of the body; None where the client has gone."""
        most = self.rules.max_body * (CHANGES if path == "/v1/catalog" else 1)

        def too_large() -> NoReturn:
            raise Refusal(413, "too_large", f"wanted a body of at most {most} bytes; send less at a time")

        length = headers.get(b"content-length", b"0")
        if length.isdigit() and (len(length) > 18 or int(length) > most):
            too_large()
        parts, size = [], 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        too_large()
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            raise Refusal(408, "timeout", f"wanted the body within {BODY_SECONDS:g} seconds") from None


def _path(scope: Scope) -> str:
    """What routes go by: the path without that under which another application, or a proxy, has put this one."""
    path, root = str(scope["path"]), scope.get("root_path", "")
    return path.removeprefix(root) if path.startswith(f"{root}/") else path


def _is_among(host: str, names: frozenset[str] | None) -> bool:
    """Whether ``Host`` names one of some hosts, with any port."""
    name = re.sub(r":\d*$", "", host)
    if names is None or name in names:
        return True
    with contextlib.suppress(ValueError):
        return bool(names & EVERYWHERE) and bool(ipaddress.ip_address(name.strip("[]")))
    return False


def _again(body: bytes, receive: Receive) -> Receive:
    """The body that was read, then what else comes."""
    left = [body]

    async def receive_again() -> Any:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return await receive()

    return receive_again


def to_stderr(fields: Mapping[str, Any]) -> None:
    """One JSON line."""
    print(json_line(fields), file=sys.stderr, flush=True)


def read_keys(path: Path) -> list[bytes]:
    """The keys of a file, one a line.

    Raises:
        UserError: No such file, none in it, or one that is short.
    """
    try:
        lines = decoded(path.read_bytes()).split("\n")
    except OSError as error:
        raise UserError(f"wanted a file of API keys in {path}, got: {error}; write one key a line") from None
    keys = [line.strip().encode() for line in lines if line.strip()]
    if not keys or min(map(len, keys)) < 16:
        raise UserError(
            f"wanted API keys of at least 16 characters in {path}, got {'a shorter one' if keys else 'none'}; "
            "write one key a line, such as openssl rand -hex 24 prints"
        )
    return keys
