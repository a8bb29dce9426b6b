"""From a run to an HTTP response, the same for every protocol."""

from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from graftlm.serve.runs import Run, Service
from graftlm.serve.sse import EventStream, while_connected

ADAPTER = "x-graft-adapter"
"""The header of every answer: `name@fingerprint` of the weights that gave it."""


class Format(Protocol):
    """Answers in the form of a protocol: whole, or as events."""

    async def whole(self) -> Mapping[str, Any]: ...

    def events(self) -> AsyncIterator[bytes]: ...


async def respond(
    service: Service,
    request: Request,
    begin: Callable[[], Coroutine[Any, Any, Run]],
    form: Callable[[Run], Format],
    *,
    stream: bool,
) -> Response:
    """Begin a run and send its answers. Whatever ends the response ends the run."""
    if not stream:
        return await while_connected(request, _whole(begin, form))
    run = await while_connected(request, begin())
    return EventStream(
        form(run).events(),
        headers={ADAPTER: run.tag},
        on_close=run.close,
        ping=service.limits.ping,
        deadline=run.deadline,
    )


async def _whole(begin: Callable[[], Coroutine[Any, Any, Run]], form: Callable[[Run], Format]) -> Response:
    run = await begin()
    try:
        return JSONResponse(await form(run).whole(), headers={ADAPTER: run.tag})
    finally:
        run.close()
