"""The application: its routes, and what becomes of requests that none of them answers."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from graftlm.errors import nearest
from graftlm.recipe import Recipe
from graftlm.serve import chat, completions, embeddings, messages, page, responses, tokens, training_data, training_runs
from graftlm.serve.errors import ApiError, internal
from graftlm.serve.limits import read_object
from graftlm.serve.metrics import CONTENT_TYPE, Metrics
from graftlm.serve.openapi import document
from graftlm.serve.protocol import LoadRequest, UnloadRequest, read
from graftlm.serve.runs import Service
from graftlm.serve.security import OPEN, Guard
from graftlm.serve.sse import ClientGoneError

log = logging.getLogger("graftlm.serve")

POSTS = {
    "/v1/chat/completions": chat.handle,
    "/v1/completions": completions.handle,
    "/v1/embeddings": embeddings.handle,
    "/v1/messages": messages.handle,
    "/v1/messages/count_tokens": messages.count_tokens,
    "/v1/responses": responses.handle,
    "/tokenize": tokens.tokenize,
    "/detokenize": tokens.detokenize,
}
"""Path -> what answers it."""

DESCRIPTION = "/openapi.json"


def make_app(
    service: Service,
    *,
    keys: Sequence[str] = (),
    allow_adapter_changes: bool = False,
    loopback_only: bool = True,
    runs: Path | None = None,
    data: Recipe | None = None,
) -> FastAPI:
    """The application over a service; whoever makes it closes the service.

    `keys`: one of them is needed on every path but /health and the files of the page; none: no key is asked for, and
    with `loopback_only` only requests to a loopback host are answered. `allow_adapter_changes`: the routes that load
    and unload adapters exist. `runs`: the folder whose runs can be looked at. `data`: the recipe whose rows can be.
    """
    app = FastAPI(title="graft serve", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    routes = _Routes(service)
    gets = routes.gets() | page.gets() | training_runs.gets(runs) | training_data.gets(data)
    posts = {path: _post(service, handle) for path, handle in POSTS.items()}
    if allow_adapter_changes:
        posts |= {"/v1/load_lora_adapter": routes.load, "/v1/unload_lora_adapter": routes.unload}
    described = document([*gets, DESCRIPTION], posts, keys=bool(keys), open_paths=OPEN)
    for path, get in (gets | {DESCRIPTION: _same(described)}).items():
        app.add_api_route(path, get, methods=["GET"])
    for path, post in posts.items():
        app.add_api_route(path, post, methods=["POST"])
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientGoneError, _client_gone)
    app.add_exception_handler(Exception, _failure)
    app.add_middleware(Guard, keys=tuple(keys), loopback_only=loopback_only, is_draining=lambda: service.draining)
    app.add_middleware(_Count, metrics=service.metrics)
    return app


def _post(service: Service, handle: Any) -> Any:
    async def route(request: Request) -> Response:
        response: Response = await handle(service, request)
        return response

    return route


def _same(tree: Any) -> Any:
    async def route(request: Request) -> Response:
        return JSONResponse(tree)

    return route


class _Routes:
    """The routes that answer at once."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def gets(self) -> dict[str, Any]:
        found = {"/health": self.health, "/metrics": self.metrics, "/v1/models": self.models}
        return found | {"/v1/models/{model:path}": self.model}

    async def health(self, request: Request) -> Response:
        ready = not self.service.draining
        return JSONResponse({"status": "ok" if ready else "draining"}, 200 if ready else 503)

    async def metrics(self, request: Request) -> Response:
        return Response(self.service.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def models(self, request: Request) -> Response:
        entries = self.service.catalog.entries()
        ends = {"first_id": entries[0]["id"], "last_id": entries[-1]["id"], "has_more": False}  # for Anthropic's client
        return JSONResponse({"object": "list", "data": entries, **ends})

    async def model(self, request: Request) -> Response:
        return JSONResponse(self.service.catalog.entry(request.path_params["model"]))

    async def load(self, request: Request) -> Response:
        body = read(LoadRequest, await read_object(request, self.service.limits))
        catalog = self.service.catalog
        await self.service.in_thread(lambda: catalog.load(body.lora_name, body.lora_path, replace=body.load_inplace))
        return JSONResponse(catalog.entry(body.lora_name))

    async def unload(self, request: Request) -> Response:
        body = read(UnloadRequest, await read_object(request, self.service.limits))
        await self.service.in_thread(lambda: self.service.catalog.unload(body.lora_name))
        return JSONResponse({"id": body.lora_name, "object": "model", "deleted": True})


# Errors --------------------------------------------------------------------------------------------------------------


async def _api_error(request: Request, error: Any) -> Response:
    response: Response = error.response(request.url.path)
    return response


async def _http_error(request: Request, error: Any) -> Response:
    path, status = request.url.path, error.status_code
    if status == 404:
        paths = [route.path for route in request.app.routes]
        own = ApiError(404, f"no route {path!r:.200}. {nearest(path, paths)}", code="not_found")
    elif status == 405:
        own = ApiError(405, f"{request.method} is no method of {path}", code="method_not_allowed")
    else:
        own = ApiError(status, str(error.detail), code="http_error")
    return own.response(path, error.headers)


async def _client_gone(request: Request, error: Any) -> Response:
    return Response(status_code=499)  # nobody reads it; the metrics count it


async def _failure(request: Request, error: Any) -> Response:
    log.error("a request to %s failed", request.url.path, exc_info=error)
    return internal().response(request.url.path)


class _Count:
    """ASGI middleware that counts requests by route, not by path: what clients make up is one label."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 499

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, counted)
        finally:
            path = getattr(scope.get("route"), "path", "(none)")
            self.metrics.requests.labels(path, str(status)).inc()
