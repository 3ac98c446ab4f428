"""The process that serves: sockets, signals, and clients that are slow, many or rude."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib.util
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triewise.data import allowed_items
from triewise.errors import UserError
from triewise.progress import note
from triewise.serving.limits import Limits

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

    from triewise.data import Catalog
    from triewise.recommenders import SavedRecommender

HEADER_SECONDS = 10.0  # for the first line and the headers of a request
HEADER_BYTES = 32 << 10
CONNECTIONS = 1000
KEEP_SECONDS = 20  # of a connection on which nothing is asked
DRAIN_SECONDS = 60
SWITCH_SECONDS = 0.0005  # in 5 ms, as Python has it, a change of the catalogue delays requests twice as much
LOOPBACK = frozenset({"127.0.0.1", "[::1]", "localhost"})


def serve(
    recommender: SavedRecommender,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    allow_hosts: Sequence[str] = (),
    **how: Any,
) -> None:
    """Answer HTTP requests until the process is told to stop; those that run are finished then.

    Args:
        recommender: What answers.
        host: Address to listen on; the default is reached from this machine alone.
        port: To listen on; 0: any that is free.
        allow_hosts: More names under which it may be asked where there are no keys, such as that of a proxy.
        how: As for `application`.

    Raises:
        UserError: The extra is missing, the file of keys is wrong, or the port is taken.
    """
    own = _names(host)
    app, door = application(recommender, hosts=own | {*allow_hosts}, **how), listening(host, port)
    if own != LOOPBACK and not how.get("api_keys"):
        note(
            f"everybody who reaches {host} may ask, and change the catalogue: --api-key-file wants a key of them"
        )
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.collect()
    gc.freeze()  # what is there now stays; else each full collection looks through all of torch
    note(f"http://{host}:{door.getsockname()[1]} answers; /openapi.json says what can be asked")
    # Told to stop it finishes what runs; uvicorn raises the signal again then, where it is of no use.
    signal.signal(signal.SIGTERM, lambda *_: None)
    _server(app).run(sockets=[door])


@contextlib.contextmanager
def in_background(recommender: SavedRecommender, **how: Any) -> Iterator[str]:
    """Serve from a thread of this process, for a notebook or a test: the address, while the block runs."""
    app, door = application(recommender, hosts=LOOPBACK, **how), listening("127.0.0.1", 0)
    server = _server(app)
    thread = threading.Thread(target=lambda: server.run(sockets=[door]))
    thread.start()
    try:
        while thread.is_alive() and not (server.started and app.state.service.warm):
            time.sleep(0.01)
        yield f"http://127.0.0.1:{door.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def application(
    recommender: SavedRecommender,
    *,
    name: str = "triewise",
    api_keys: Path | None = None,
    limits: Limits | None = None,
    sets: Mapping[str, Sequence[str]] | None = None,
    catalogue: Path | None = None,
    log_titles: bool = False,
    log: Callable[[Mapping[str, Any]], None] | None = None,
    hosts: Collection[str] | None = None,
) -> FastAPI:
    """The service as an ASGI application, for a server of your own.

    Args:
        recommender: What answers.
        name: What ``/v1/models`` calls it.
        api_keys: A file of keys, one a line; None: everybody may ask.
        limits: What it takes on.
        sets: Named sets of raw ids, for ``exclude`` and ``allow`` of a request.
        catalogue: Folder in which versions of the catalogue are kept; None: in memory alone.
        log_titles: Whether the log has the histories of requests.
        log: Gets the fields of one line for each request; None: a JSON line on stderr.
        hosts: Names in ``Host`` that are answered where there are no keys; None: any.
    """
    parts = ("fastapi", "uvicorn", "prometheus_client")
    missing = [part for part in parts if not importlib.util.find_spec(part)]
    if missing:
        raise UserError(f"serving needs {', '.join(missing)}; run: pip install 'triewise[serve]'")
    from triewise.serving.guard import read_keys, to_stderr
    from triewise.serving.service import Service, create_app
    from triewise.serving.versions import LiveCatalogue

    limits = limits or Limits()
    keys = [] if api_keys is None else read_keys(api_keys)
    if hasattr(recommender, "engine"):  # decodes as many users together; no ranking depends on it
        recommender = recommender.with_settings(batch_users=limits.max_batch)
    service = Service(LiveCatalogue(recommender, catalogue), limits, sets or {}, name)
    return create_app(service, keys=keys, log=log or to_stderr, log_titles=log_titles, hosts=hosts)


def _names(host: str) -> frozenset[str]:
    """What a service on an address is called in ``Host``."""
    return LOOPBACK | {f"[{host}]" if ":" in host else host}


def named_sets(given: Sequence[str], catalog: Catalog) -> dict[str, list[str]]:
    """Sets of raw ids from ``NAME=FILE``.

    Raises:
        UserError: It is said otherwise, or the file is not as `allowed_items` wants it.
    """
    sets: dict[str, list[str]] = {}
    for one in given:
        name, _, file = one.partition("=")
        if not name or not file or name in sets:
            raise UserError(f"wanted --items NAME=FILE, each name once, got {one!r}")
        sets[name] = [catalog.item_id[i] for i in allowed_items(Path(file), catalog)]
    return sets


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        UserError: The address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        made = socket.create_server((host, port), family=family, backlog=CONNECTIONS)
        # asyncio sets this only on sockets that name their protocol; else a body waits 40 ms for an acknowledgement.
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return made
    except OSError as error:
        raise UserError(
            f"cannot listen on {host} port {port} ({error}); choose another --port or --host"
        ) from None


def _server(app: FastAPI) -> uvicorn.Server:
    from uvicorn import Config, Server

    config = Config(
        app,
        http=_patient(),
        ws="none",
        access_log=False,
        log_level="error",
        server_header=False,
        timeout_keep_alive=KEEP_SECONDS,
        timeout_graceful_shutdown=DRAIN_SECONDS,
        h11_max_incomplete_event_size=HEADER_BYTES,
    )
    return Server(config)


def _patient() -> type[asyncio.Protocol]:
    """Uvicorn's protocol, which does not wait for ever for headers, and has a limit of connections."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Patient(H11Protocol):
        deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > CONNECTIONS:
                transport.abort()
            else:
                self._expect()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state.__name__ == "IDLE":
                if self.deadline is None:
                    self._expect()
            else:
                self._forget()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget()
            super().connection_lost(exc)

        def _expect(self) -> None:
            self.deadline = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

        def _forget(self) -> None:
            if self.deadline is not None:
                self.deadline.cancel()
            self.deadline = None

    return Patient
