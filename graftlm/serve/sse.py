"""Answers as server-sent events, and what a client that goes away ends."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

log = logging.getLogger("graftlm.serve")

T = TypeVar("T")

PING = b": ping\n\n"
"""A comment: readers skip it."""

DONE = b"data: [DONE]\n\n"


def event(data: Any, name: str | None = None) -> bytes:
    """One event."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


class ClientGoneError(Exception):
    """The client closed its connection before its answer was complete."""


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: "asyncio.Task[Any]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns; it is cancelled, and ClientGoneError raised, where the client goes away before."""
    task, gone = asyncio.create_task(work), asyncio.create_task(_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        await _end(task, gone)


class EventStream(Response):
    """A response that sends events as they come.

    It ends with the events, when the client goes away, or at `deadline` (of `time.monotonic`), however slowly the
    client reads; `on_close` is called then. `ping` seconds of silence are broken by a comment.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[bytes],
        *,
        headers: Mapping[str, str],
        on_close: Callable[[], None],
        ping: float,
        deadline: float,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})
        del self.headers["content-length"]
        self.events, self.on_close, self.ping, self.deadline = events, on_close, ping, deadline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        tasks = [asyncio.create_task(self._write(send)), asyncio.create_task(_gone(receive))]
        try:
            left = self.deadline + self.ping - time.monotonic()  # the answer itself ends, and says so, a little before
            await asyncio.wait(tasks, timeout=max(0.0, left), return_when=asyncio.FIRST_COMPLETED)
            if tasks[0].done() and (error := tasks[0].exception()):
                log.error("a stream failed", exc_info=error)
        finally:
            self.on_close()
            await _end(*tasks)

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for part in self._with_pings():
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _with_pings(self) -> AsyncIterator[bytes]:
        following: asyncio.Future[bytes] | None = None
        try:
            while True:
                following = following or asyncio.ensure_future(anext(self.events))
                done, _ = await asyncio.wait({following}, timeout=self.ping)
                if not done:
                    yield PING
                    continue
                try:
                    yield following.result()
                except StopAsyncIteration:
                    return
                following = None
        finally:
            if following is not None:
                following.cancel()
