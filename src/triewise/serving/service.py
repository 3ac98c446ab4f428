"""The HTTP service over one recommender: routes, readiness, and the way of a request to the engine and back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal

from fastapi import FastAPI, Query, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.security import APIKeyHeader
from starlette.exceptions import HTTPException

from triewise.errors import UserError
from triewise.serving import contract as said
from triewise.serving.batching import Batcher, ClosedError, Done, FullError, Job, Work
from triewise.serving.guard import Guard, Refusal, Rules, to_stderr
from triewise.serving.measures import Measures
from triewise.serving.page import add_page
from triewise.serving.view import Recommending, Scoring, View

if TYPE_CHECKING:
    from triewise.serving.limits import Limits
    from triewise.serving.versions import LiveCatalogue, Version

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": said.ErrorBody, "description": text}
    for status, text in {
        401: "No valid key.",
        403: "A page of another site wants to change something.",
        408: "The body did not come in time.",
        413: "The body is too large.",
        421: "Asked under a name that this service has not.",
        422: "The request is not what is wanted; the message says what is.",
        429: "The queue is full; Retry-After says when to come again.",
        500: "A fault of the service; the log has more under the request's id.",
        503: "Not ready, stopping, or not answered in time; see Retry-After.",
    }.items()
}
CODES = {404: "not_found", 405: "method_not_allowed", 413: "too_large", 422: "invalid"}


class Service:
    """One recommender that answers.

    Args:
        live: Its catalogue's versions.
        limits: What it takes on.
        sets: Named sets of raw ids.
        name: Of the model, as ``/v1/models`` says it.
    """

    def __init__(
        self, live: LiveCatalogue, limits: Limits, sets: Mapping[str, Sequence[str]], name: str
    ) -> None:
        self.live, self.limits, self.sets, self.name = live, limits, sets, name
        self.view = View(live.current, sets)
        self.batcher = Batcher(
            limits.max_batch, limits.wait_ms / 1000, limits.queue, lambda n: self.measures.batch.observe(n)
        )
        self.measures = Measures(
            lambda: self.batcher.waiting, lambda: (self.view.number, self.view.catalog.n_items)
        )
        self.warm = self.draining = False
        self._publisher = ThreadPoolExecutor(
            1, "catalogue"
        )  # changes wait for each other, and nobody for them

    def start(self) -> None:
        """Start the engine, with a first request that measures the model."""
        if not self.batcher.alive:
            self.batcher.start()
            work = Recommending(self.view, None, min(10, self.view.catalog.n_items))
            question = self.view.question(said.History(titles=list(self.view.catalog.title[:1]), ids=None))
            job = Job(work, [(question, self.view.generative, False)], time.monotonic() + 3600)
            self.batcher.submit(job).add_done_callback(lambda done: setattr(self, "warm", True))

    def stop(self) -> None:
        """Answer what waits, and end."""
        self.draining = True
        self.batcher.close()

    def reasons(self) -> list[str]:
        """Why no request should come here now."""
        full = self.batcher.waiting >= self.limits.queue
        found = {"stopping": self.draining, "the engine does not run": not self.batcher.alive}
        found |= {"the model is being warmed up": not self.warm, "the queue is full": full}
        return [reason for reason, holds in found.items() if holds]

    async def ask(self, request: Request, work: Work, rows: Sequence[Any]) -> Done:
        """Let the engine do it; given up when nobody waits for it any more.

        Raises:
            Refusal: No place, no time, or the service is stopping.
            UserError: The request's mistake.
        """
        job = Job(work, rows, time.monotonic() + self.limits.timeout)
        try:
            future = asyncio.wrap_future(self.batcher.submit(job))
        except FullError:
            raise Refusal(
                429, "overloaded", f"{self.limits.queue} users wait already; come again later", 1
            ) from None
        except ClosedError:
            raise Refusal(503, "stopping", "this service is stopping; ask another one", 1) from None
        gone = asyncio.ensure_future(_gone(request))
        try:
            both: set[asyncio.Future[Any]] = {future, gone}
            await asyncio.wait(both, timeout=self.limits.timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            job.until = 0.0
        if future.done() and not future.cancelled():
            return future.result()
        future.cancel()
        if gone.done() and not gone.cancelled():
            raise Refusal(499, "gone", "the client has gone")
        raise Refusal(
            503, "timeout", f"no answer within {self.limits.timeout:g} seconds; come again later", 1
        )

    async def publish(self, change: Callable[[], Version]) -> View:
        """Make another version and what requests need of it, and use it for what comes from now on."""

        def made() -> View:
            self.view = view = View(change(), self.sets)
            return view

        return await asyncio.get_running_loop().run_in_executor(self._publisher, made)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def create_app(
    service: Service,
    *,
    keys: Sequence[bytes] = (),
    log: Callable[[Mapping[str, Any]], None] = to_stderr,
    log_titles: bool = False,
    hosts: Collection[str] | None = None,
) -> FastAPI:
    """The service as an ASGI application.

    Args:
        service: What answers; started and stopped with the application where a server tells it so.
        keys: API keys; none: everybody may ask.
        log: Gets the fields of one line for each request.
        log_titles: Whether these have the histories.
        hosts: Names under which it is asked where there are no keys; None: any.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.stop)

    app = _routed(service, lifespan)
    app.state.service, app.state.log_titles = service, log_titles
    add_page(app)
    paths = frozenset(getattr(route, "path", "") for route in app.routes)
    names = None if hosts is None else frozenset(name.lower() for name in hosts)
    rules = Rules(keys, service.limits.max_body, log, service.measures.request, paths, names)
    app.add_middleware(Guard, rules=rules)
    return app


def document() -> dict[str, Any]:
    """The OpenAPI document, which does not depend on what is served."""
    service: Any = None
    return _routed(service).openapi()


def _routed(service: Service, lifespan: Any = None) -> FastAPI:
    app = FastAPI(
        title="triewise",
        version=metadata.version("triewise"),
        description="Recommendations with their proof: titles, the tokens that decided, and what it cost.",
        lifespan=lifespan,
        docs_url=None,  # a page that loads scripts from elsewhere
        redoc_url=None,
    )
    key = Security(APIKeyHeader(name="X-API-Key", auto_error=False))
    _add_answers(app, service, [key])
    _add_catalogue(app, service, [key])
    _add_operations(app, service)
    _add_errors(app)
    return app


def _add_answers(app: FastAPI, service: Service, needs: list[Any]) -> None:
    @app.post("/v1/recommend", response_model=said.RecommendResponse, responses=ERRORS, dependencies=needs)
    async def recommend(body: said.RecommendRequest, request: Request) -> JSONResponse:
        """Titles for histories."""
        view, limits = service.view, service.limits
        if body.k > limits.max_k:
            raise UserError(f"wanted k of at most {limits.max_k}, got {body.k}")
        if not view.generative and (body.explain or body.compare):
            raise UserError(
                "wanted neither explain nor compare of a model that writes no titles; leave them out"
            )
        listed, unknown = view.named(body.exclude)
        unwanted = view.recommender.groups.members(listed)
        only, more = (None, []) if body.allow is None else view.named(body.allow)
        rows = [
            (view.question(history, unwanted, only, body.keep_history), body.explain, body.compare)
            for history in _few(body.histories, limits)
        ]
        work = Recommending(view, body.search, min(body.k, view.recommender.groups.n_groups))
        view.searching(body.search)
        done = await service.ask(request, work, rows)
        service.measures.answered(done.results)
        return _answer(
            request, view, done, [*unknown, *more], body.histories, {"k": body.k, "search": body.search}
        )

    @app.post("/v1/score", response_model=said.ScoreResponse, responses=ERRORS, dependencies=needs)
    async def score(body: said.ScoreRequest, request: Request) -> JSONResponse:
        """Scores of given items after histories, by the model alone."""
        view = service.view
        found = [view.items(ids) for ids in body.candidates]
        asked = [view.question(history) for history in _few(body.histories, service.limits)]
        lists = [items for items, _ in found] * (len(asked) if len(found) == 1 else 1)
        _few_scores(sum(map(len, lists)), service.limits)
        done = await service.ask(request, Scoring(view), list(zip(asked, lists, strict=True)))
        return _answer(request, view, done, [raw for _, ids in found for raw in ids], body.histories, {})

    @app.get("/v1/models", response_model=said.Models, responses=ERRORS, dependencies=needs)
    async def models() -> JSONResponse:
        """What recommends here."""
        view, used = service.view, service.view.recommender.used
        plain = {name: value for name, value in used.items() if isinstance(value, str | int | float)}
        plain.pop("assistant", None)  # the path of a folder
        model = said.Model(
            id=service.name,
            kind="generative" if view.generative else "sequential",
            search=str(used["search"]),
            searches=list(view.searches),
            explains=view.generative,
            settings=plain,
            n_items=view.catalog.n_items,
            catalog_version=view.number,
            sets=sorted(view.sets),
            max_k=service.limits.max_k,
            max_histories=service.limits.max_histories,
        )
        return JSONResponse(said.Models(data=[model]).model_dump())


def _few(histories: list[said.History], limits: Limits) -> list[said.History]:
    if len(histories) > limits.max_histories:
        raise UserError(
            f"wanted at most {limits.max_histories} histories, got {len(histories)}; ask more often"
        )
    return histories


def _few_scores(n_scores: int, limits: Limits) -> None:
    most = limits.max_k * limits.max_histories
    if n_scores > most:
        raise UserError(
            f"wanted at most {most} scores, of all candidates of all histories, got {n_scores}; ask more often"
        )


def _answer(
    request: Request,
    view: View,
    done: Done,
    unknown: list[str],
    histories: list[said.History],
    notes: Mapping[str, Any],
) -> JSONResponse:
    """The answer of the contract; what the log says of it is noted."""
    state = request.state
    state.said.update(notes, histories=len(histories), catalog_version=view.number)
    state.said.update(batch=done.counters["users"], queue_ms=round(1000 * done.waited, 3))
    if request.app.state.log_titles:
        state.said["asked"] = [history.model_dump(exclude_none=True) for history in histories]
    more = {"counters": done.counters, "unknown": unknown}
    return JSONResponse({"results": list(done.results), **_head(request, view), **more})


def _head(request: Request, view: View) -> dict[str, Any]:
    """What every answer about a catalogue says of itself."""
    state = request.state
    took = round(1000 * (time.perf_counter() - state.begun), 3)
    return {"request_id": state.request_id, "catalog_version": view.number, "took_ms": took}


def _add_catalogue(app: FastAPI, service: Service, needs: list[Any]) -> None:
    route = "/v1/catalog"

    @app.get(route, response_model=said.CatalogPage, responses=ERRORS, dependencies=needs)
    async def catalog(
        starts: str = Query("", max_length=1000, description="A title, or a later word of it, begins so."),
        limit: int = Query(20, ge=1, le=1000),
        offset: int = Query(
            0, ge=0, le=1 << 31, description="Items to pass over, where nothing is looked for."
        ),
    ) -> JSONResponse:
        """Items of the catalogue, in its order or by what their titles start with."""
        view = service.view
        if starts:
            found = await asyncio.to_thread(lambda: view.completion.find(starts, limit))
        else:
            found = list(range(min(offset, view.catalog.n_items), min(offset + limit, view.catalog.n_items)))
        items = [{"id": view.catalog.item_id[i], "title": view.catalog.title[i]} for i in found]
        return JSONResponse({"catalog_version": view.number, "n_items": view.catalog.n_items, "items": items})

    async def changed(request: Request, change: Callable[[], Version]) -> JSONResponse:
        view = await service.publish(change)
        request.state.said["catalog_version"] = view.number
        return JSONResponse({**_head(request, view), "n_items": view.catalog.n_items})

    @app.post(route, response_model=said.Changed, responses=ERRORS, dependencies=needs)
    async def change(body: said.Change, request: Request) -> JSONResponse:
        """Add and remove items: all of it or nothing; requests that run finish on the version before."""
        add = [(item.id, item.title) for item in body.add]
        return await changed(request, lambda: service.live.change(add, body.remove))

    @app.post(f"{route}/rollback", response_model=said.Changed, responses=ERRORS, dependencies=needs)
    async def rollback(request: Request) -> JSONResponse:
        """Go back to the catalogue before the last change."""
        return await changed(request, service.live.rollback)


def _add_operations(app: FastAPI, service: Service) -> None:
    unready: dict[int | str, dict[str, Any]] = {503: {"model": said.Health, "description": "With reasons."}}

    @app.get("/health/live", response_model=said.Health)
    async def live() -> JSONResponse:
        """Whether the process answers."""
        return JSONResponse({"status": "ok", "reasons": []})

    @app.get("/health/ready", response_model=said.Health, responses=unready)
    async def ready() -> JSONResponse:
        """Whether requests should come here, and if not, why."""
        reasons = service.reasons()
        status: Literal["ok", "unavailable"] = "unavailable" if reasons else "ok"
        return JSONResponse({"status": status, "reasons": reasons}, 503 if reasons else 200)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        """Numbers for Prometheus."""
        return PlainTextResponse(
            service.measures.text(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Refusal) -> JSONResponse:
        request.state.said["code"] = error.code
        return error.response()

    @app.exception_handler(UserError)
    async def mistaken(request: Request, error: UserError) -> JSONResponse:
        return await refused(request, Refusal(422, "invalid", str(error)))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:3]]
        return await refused(request, Refusal(422, "invalid", "; ".join(lines)[:500]))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        status = 422 if error.status_code == 400 else error.status_code  # a body that is no JSON
        return await refused(request, Refusal(status, CODES.get(status, "refused"), str(error.detail)))
