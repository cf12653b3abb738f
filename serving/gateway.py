"""The HTTP face of a front: keys, limits, errors as JSON, metrics, the search page.

Nothing in here knows Ray: :func:`build_gateway` makes a FastAPI application around a
:class:`serving.service.SearchService`, and any ASGI server can run it.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Awaitable, Callable, Sequence
from importlib.resources import files
from time import perf_counter
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.config import ServeConfig
from colbert_core.errors import RaycolbertError
from serving.errors import BodyTooLarge, Overloaded, Unauthorized, http_status
from serving.metrics import Metrics
from serving.protocol import (
    ErrorDetail,
    ErrorResponse,
    Health,
    RerankRequest,
    RerankResponse,
    SearchRequest,
    SearchResponse,
)
from serving.service import SearchService

logger = logging.getLogger("ray.serve")

ROUTES = ("/", "/v1/search", "/v1/rerank", "/healthz", "/metrics", "/docs", "/openapi.json")
PROTECTED = "/v1/"
# A validation error repeats what was wrong, not the whole of what was sent.
MAX_MESSAGE = 500

DESCRIPTION = """
Multi-vector (ColBERT) search. Every answer names the index version and how many shards it comes from;
by default a missing shard fails the request. Errors are `{"error": {"type", "message"}}`.
"""


def build_gateway(
    service: SearchService,
    config: ServeConfig,
    metrics: Metrics,
    scrape: Callable[[], Awaitable[str]],
    keys: Sequence[str] = (),
) -> FastAPI:
    """The application.

    Args:
        service: answers the requests.
        config: the limits.
        metrics: counts requests.
        scrape: the Prometheus text for ``/metrics``.
        keys: accepted API keys; empty means that none is needed.
    """
    app = FastAPI(title="raycolbert", version="1", description=DESCRIPTION)
    page = files("serving").joinpath("search_page.html").read_text(encoding="utf-8")
    problems: dict[int | str, dict[str, Any]] = {
        code: {"model": ErrorResponse} for code in (400, 401, 404, 413, 429, 503, 504, "default")
    }

    @app.post("/v1/search", response_model=SearchResponse, responses=problems)
    async def search(body: SearchRequest) -> Response:
        """Find documents for one query or for several."""
        return _json((await service.search(body)).model_dump_json(exclude_none=True))

    @app.post("/v1/rerank", response_model=RerankResponse, responses=problems)
    async def rerank(body: RerankRequest) -> Response:
        """Order given texts, or documents of the index, by their MaxSim score for a query."""
        return _json((await service.rerank(body)).model_dump_json(exclude_none=True))

    @app.get("/healthz", response_model=Health, responses={503: {"model": Health}})
    async def healthz() -> Response:
        """200 when every shard group has the current index version loaded, else 503."""
        health = await service.health()
        return _json(health.model_dump_json(), 200 if health.status == "ok" else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def prometheus() -> Response:
        """Prometheus metrics of all fronts."""
        return Response(await scrape(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def search_page() -> HTMLResponse:
        return HTMLResponse(page)

    @app.exception_handler(RaycolbertError)
    async def known_error(request: Request, error: RaycolbertError) -> Response:
        return error_response(http_status(error), type(error).__name__, str(error))

    @app.exception_handler(RequestValidationError)
    async def invalid_body(request: Request, error: RequestValidationError) -> Response:
        details = (f"{_place(item['loc'])}: {item['msg']}" for item in error.errors())
        return error_response(400, "InvalidRequest", "; ".join(details)[:MAX_MESSAGE])

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        kinds = {404: "NotFound", 405: "MethodNotAllowed"}
        return error_response(
            error.status_code, kinds.get(error.status_code, "HttpError"), str(error.detail), error.headers
        )

    app.add_middleware(Gatekeeper, config=config, metrics=metrics, keys=keys)
    return app


class Gatekeeper:
    """What happens before and after every route: counting, keys, limits, and no stack trace ever."""

    def __init__(self, app: ASGIApp, config: ServeConfig, metrics: Metrics, keys: Sequence[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._keys = [key.encode("utf-8") for key in keys]
        self._max_body = config.max_body_kb * 1024
        self._max_inflight = config.max_inflight
        self._inflight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        route = scope["path"] if scope["path"] in ROUTES else "other"
        status = 500
        begin = perf_counter()

        async def counted_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._inflight += 1
        self._metrics.inflight.set(self._inflight)
        try:
            if route.startswith(PROTECTED):
                self._check_key(Headers(scope=scope))
                if self._inflight > self._max_inflight:
                    raise Overloaded(f"{self._max_inflight} requests are in work here; try again in a moment")
            await self._app(scope, await self._limited(scope, receive), counted_send)
        except RaycolbertError as error:
            code = http_status(error)
            headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(code)
            response = error_response(code, type(error).__name__, str(error), headers)
            await response(scope, receive, counted_send)
        except Exception:
            logger.exception("%s %s failed", scope["method"], scope["path"])
            message = "the request failed for a reason that is in the server's log"
            await error_response(500, "InternalError", message)(scope, receive, counted_send)
        finally:
            self._inflight -= 1
            self._metrics.inflight.set(self._inflight)
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.latency.labels(route).observe(perf_counter() - begin)

    def _check_key(self, headers: Headers) -> None:
        """Compares in a time that depends neither on where a key differs nor on which one fits."""
        if not self._keys:
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        if not given:
            raise Unauthorized("an API key is needed: 'Authorization: Bearer KEY' or 'X-API-Key: KEY'")
        accepted = [hmac.compare_digest(given.encode("latin-1"), key) for key in self._keys]
        if not any(accepted):
            raise Unauthorized("this API key is not accepted")

    async def _limited(self, scope: Scope, receive: Receive) -> Receive:
        """Reads the body, up to the limit, and hands it on in one piece."""
        too_large = BodyTooLarge(f"the body exceeds {self._max_body} bytes")
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdigit() and int(declared) > self._max_body:
            raise too_large
        body = b""
        more = True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return _replay(message, receive)
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._max_body:
                raise too_large
        return _replay({"type": "http.request", "body": body, "more_body": False}, receive)


def error_response(status: int, kind: str, message: str, headers: Any = None) -> JSONResponse:
    """An error in the one form that all errors have."""
    # Half a surrogate pair, which JSON can carry and UTF-8 cannot, may stand in what the client sent.
    message = message.encode("utf-8", "backslashreplace").decode("utf-8")
    body = ErrorResponse(error=ErrorDetail(type=kind, message=message))
    return JSONResponse(body.model_dump(), status, headers=headers)


def _replay(first: Message, receive: Receive) -> Receive:
    waiting = [first]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay


def _json(content: str, status: int = 200) -> Response:
    return Response(content, status, media_type="application/json")


def _place(location: Sequence[Any]) -> str:
    """``body.search.probes`` as a client wrote it: ``search.probes``."""
    return ".".join(str(part) for part in location if part != "body") or "body"
