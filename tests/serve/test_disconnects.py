"""Whatever ends a request early ends all of it: its answers, its place, its adapter. And nobody who reads slowly holds
others up."""

import asyncio
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.serve.conftest import Served


def eventually(is_so: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    ends = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < ends
        time.sleep(0.005)


class Steps:
    """Lets the engine of a server run one step at a time."""

    def __init__(self, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may, self.free, self.count = threading.Semaphore(0), False, 0
        engine = served.service.worker.engine
        step = engine.step

        def one() -> None:
            if not self.free:
                self.may.acquire()
            self.count += 1
            step()

        monkeypatch.setattr(engine, "step", one)

    def let(self, count: int) -> None:
        for _ in range(count):
            self.may.release()

    def open(self) -> None:
        self.free = True
        self.let(1)


class Call:
    """A request to the application that is read part by part."""

    def __init__(self, served: Served, path: str, body: Any, reads: bool = True) -> None:
        self.served, self.sent, self.reads = served, list[Any](), reads
        self.scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
            "path": path, "raw_path": path.encode(), "root_path": "", "query_string": b"", "scheme": "http",
            "headers": [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")], "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }  # fmt: skip
        self.body: bytes | None = json.dumps(body).encode()
        self.gone = asyncio.Event()
        self.task = asyncio.create_task(served.app(self.scope, self.receive, self.send))

    async def receive(self) -> Any:
        if self.body is not None:
            body, self.body = self.body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)
        if not self.reads and len(self.sent) > 1:
            await asyncio.Event().wait()  # a client that reads no more

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent).decode()


def body(model: str = "plain", **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hello"}]
    return {"model": model, "messages": messages, "max_tokens": 100, "temperature": 0, **fields}


async def until(is_so: Callable[[], bool]) -> None:
    await asyncio.to_thread(eventually, is_so)


PATHS = {
    "/v1/chat/completions": body(),
    "/v1/completions": {"model": "plain", "prompt": "hello", "max_tokens": 100, "temperature": 0},
    "/v1/messages": body(),
    "/v1/responses": {"model": "plain", "input": "hello", "max_output_tokens": 100, "temperature": 0},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_a_client_that_goes_away_ends_its_request(
    limited: Any, monkeypatch: pytest.MonkeyPatch, path: str, stream: bool
) -> None:
    served: Served = limited()
    steps = Steps(served, monkeypatch)

    async def scenario() -> None:
        call = Call(served, path, {**PATHS[path], "stream": stream})
        await until(lambda: served.service.worker.open_jobs == 1)
        steps.let(3)
        await until(lambda: steps.count == 3)
        call.gone.set()
        await asyncio.wait_for(call.task, 10)
        steps.open()
        await until(lambda: served.service.worker.open_jobs == 0)

    asyncio.run(scenario())
    assert steps.count <= 5  # 100 tokens were asked for
    served.assert_idle()


def test_a_client_that_goes_away_while_it_waits_ends_its_request(limited: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    served: Served = limited(slots=1)
    steps = Steps(served, monkeypatch)

    async def scenario() -> None:
        first = Call(served, "/v1/chat/completions", body("plain", max_tokens=2))
        await until(lambda: served.service.worker.open_jobs == 1)
        second = Call(served, "/v1/chat/completions", body("bot", max_tokens=2))  # waits for the only slot
        await until(lambda: served.service.open_answers == 2)
        second.gone.set()
        await asyncio.wait_for(second.task, 10)
        steps.open()
        await asyncio.wait_for(first.task, 10)
        await until(lambda: served.service.open_answers == 0)
        assert first.sent[0]["status"] == 200

    asyncio.run(scenario())
    served.assert_idle()


def test_a_cancelled_request_ends_before_its_thread_begins(limited: Any) -> None:
    served: Served = limited()
    blocked = threading.Event()
    workers = served.service._threads._max_workers
    for _ in range(workers):
        served.service._threads.submit(blocked.wait)

    async def scenario() -> None:
        call = Call(served, "/v1/chat/completions", body())
        await until(lambda: served.service.open_answers == 1)
        call.gone.set()
        await asyncio.wait_for(call.task, 10)
        await until(lambda: served.service.open_answers == 0)

    try:
        asyncio.run(scenario())
    finally:
        blocked.set()
    served.assert_idle()


def test_a_client_that_reads_nothing_holds_nobody_up(limited: Any) -> None:
    served: Served = limited({"timeout": 2.0, "ping": 0.1})

    async def scenario() -> None:
        slow = Call(served, "/v1/chat/completions", body(max_tokens=50, stream=True), reads=False)
        await until(lambda: len(slow.sent) == 2)
        others = [Call(served, "/v1/chat/completions", body(max_tokens=4)) for _ in range(3)]
        await asyncio.wait_for(asyncio.gather(*(each.task for each in others)), 10)
        assert [each.sent[0]["status"] for each in others] == [200] * 3
        await until(lambda: served.service.open_answers == 0)  # its answer is complete, read or not
        await asyncio.wait_for(slow.task, 10)  # and what is left of it ends with its time

    asyncio.run(scenario())
    served.assert_idle()


def test_silence_on_a_stream_is_broken_by_comments(limited: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    served: Served = limited({"ping": 0.02})
    steps = Steps(served, monkeypatch)

    async def scenario() -> None:
        call = Call(served, "/v1/chat/completions", body(max_tokens=2, stream=True))
        await until(lambda: call.text.count(": ping\n\n") >= 3)
        steps.open()
        await asyncio.wait_for(call.task, 10)
        assert call.text.endswith("data: [DONE]\n\n")

    asyncio.run(scenario())
    served.assert_idle()


def test_a_deadline_ends_a_stream_with_an_error(limited: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    served: Served = limited({"timeout": 1.0})
    served.chat("plain", max_tokens=1)  # which starts what is started once
    steps = Steps(served, monkeypatch)

    async def scenario() -> None:
        call = Call(served, "/v1/chat/completions", body(stream=True))
        steps.let(2)
        await until(lambda: steps.count == 2)
        await asyncio.sleep(1.1)
        steps.open()
        await asyncio.wait_for(call.task, 10)
        assert '"code":"timeout"' in call.text
        assert "[DONE]" not in call.text

    asyncio.run(scenario())
    served.assert_idle()


def test_closing_a_service_ends_running_requests(limited: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    served: Served = limited()
    steps = Steps(served, monkeypatch)

    async def scenario() -> None:
        calls = [Call(served, "/v1/chat/completions", body(stream=stream)) for stream in (False, True)]
        await until(lambda: served.service.worker.open_jobs == 2)
        steps.let(2)
        served.service.cancel()
        steps.open()
        await asyncio.wait_for(asyncio.gather(*(each.task for each in calls)), 10)
        assert calls[0].sent[0]["status"] == 503
        assert '"code":"shutting_down"' in calls[1].text

    asyncio.run(scenario())
    served.assert_idle()


def test_requests_at_random_moments_leave_nothing(limited: Any) -> None:
    """Some are read to their end, some end early, on the base and on adapters that share one slot."""
    import random

    served: Served = limited(slots=1, max_requests=3)
    chosen = random.Random(0)

    async def one(number: int) -> None:
        model = chosen.choice(["tiny", "plain", "bot", "peft"])
        call = Call(served, chosen.choice(list(PATHS)[:1]), body(model, max_tokens=12, stream=number % 2 == 0))
        if number % 3:
            await asyncio.sleep(chosen.random() * 0.1)
            call.gone.set()
        await asyncio.wait_for(call.task, 60)

    async def scenario() -> None:
        await asyncio.gather(*(one(number) for number in range(30)))
        await until(lambda: served.service.open_answers == 0)

    asyncio.run(scenario())
    eventually(lambda: served.service.worker.open_jobs == 0)
    served.assert_idle()
    assert served.chat("plain").status_code == 200
