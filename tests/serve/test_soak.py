"""A server that works for minutes: 64 clients that stream, leave, read slowly and err, while adapters come and go.

$GRAFT_SOAK_SECONDS is the duration, 600 where it is not set.
"""

import asyncio
import json
import os
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from graftlm.adapters.save import save_adapter
from graftlm.deltas.lora import LoraConfig
from graftlm.hub.load import load_base
from graftlm.model.attach import attach, detach
from graftlm.testing.deltas import move
from tests.serve.conftest import ADAPTERS
from tests.serve.streaming_client import Reply, post
from tests.serve.test_server import running

SECONDS = float(os.environ.get("GRAFT_SOAK_SECONDS", "600"))
CLIENTS, SLOTS, MAX_REQUESTS, QUEUE = 64, 3, 16, 80
"""Slots are fewer than adapters. A client asks for up to five answers, so that some find the queue full (429)."""
MORE = ("one", "two", "three", "four")
MOVING = ("moving-1", "moving-2")
"""Names under which one folder after the other is loaded, and then none."""
PROMPTS = ("hello", "the user asks", "where is parcel 7?", "a", "what is it that the assistant answers?")
TOKENS = 24

WARM_UP = 1 / 3
"""Part of the time in which memory may still grow: threads, arenas of the allocator and caches of compiled templates
are made when they are first needed."""
GROWTH = 1.03
"""The median of the last third of the time over that of the middle third. The process has about 500 MB, so this is
15 MB. In ten minutes each of those thirds answers thousands of requests: a leak of the tensors of one adapter a
reload, or of a few kB a request, is more than that. The RSS of a process without a leak moves by about 1 %: arenas of
the allocator are given back late."""

WAYS = {"stream": 40, "whole": 20, "leave": 20, "slow": 8, "unknown": 6, "many": 6}
"""What a client does next, and how often."""


@pytest.fixture(scope="module")
def many(library: Path, served_base: Path) -> Path:
    """The folder of adapters with more of them."""
    model, _ = load_base(str(served_base), dtype="float32")
    for seed, name in enumerate(MORE, 10):
        move(attach(model, LoraConfig(r=4)), scale=0.5, seed=seed)
        save_adapter(model, library / name)
        detach(model)
    return library


class Process:
    """What the system knows of a process. Linux alone has it."""

    def __init__(self, pid: int) -> None:
        self.folder = Path("/proc") / str(pid)

    def files(self) -> int:
        return len(list((self.folder / "fd").iterdir()))

    def threads(self) -> int:
        return len(list((self.folder / "task").iterdir()))

    def children(self) -> int:
        return sum(len((task / "children").read_text().split()) for task in (self.folder / "task").iterdir())

    def rss(self) -> int:
        """Bytes."""
        line = next(line for line in (self.folder / "status").read_text().splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) * 1024


@dataclass
class Tally:
    """What the clients saw."""

    port: int
    right: dict[tuple[str, str], str]
    """(tag of the weights, prompt) -> the greedy answer."""
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    """Seconds: from sending a request to its first token, and from a token to the next."""


def chat(model: str, prompt: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}]
    return {"model": model, "messages": messages, "max_tokens": TOKENS, "temperature": 0, **fields}


def digest(tag: str) -> str:
    """The weights that a tag names, whatever name they have."""
    return tag.partition("@")[2]


async def one_client(tally: Tally, models: list[str], seed: int, ends: float) -> None:
    chosen = random.Random(seed)
    while time.monotonic() < ends:
        (way,) = chosen.choices(list(WAYS), list(WAYS.values()))
        model, prompt = chosen.choice(models), chosen.choice(PROMPTS)
        try:
            refused = await asyncio.wait_for(WAY[way](tally, model, prompt, chosen), 300)
        except Exception as error:
            tally.wrong.append(f"{way} {model}: {error!r:.500}")
            continue
        tally.counts[f"{way}, {refused}" if refused else way] += 1
        if refused:
            await asyncio.sleep(chosen.random())


async def refusal(tally: Tally, reply: Reply, model: str) -> str:
    """Why an answer is no 200, where the client provoked it; "" for a 200."""
    await reply.head()
    if reply.status == 200:
        return ""
    error = json.loads(await reply.body())["error"]
    expected = {(429, "queue_full")} | ({(404, "model_not_found")} if model in (*MOVING, "nobody") else set())
    assert (reply.status, error["code"]) in expected, (reply.status, error)
    return str(error["code"])


def check_answer(tally: Tally, reply: Reply, prompt: str, text: str) -> None:
    expected = tally.right[digest(reply.headers["x-graft-adapter"]), prompt]
    assert text == expected, f"{reply.headers['x-graft-adapter']} {prompt!r}: {text!r}, alone {expected!r}"


async def read_stream(
    tally: Tally, reply: Reply, answers: int, began: float | None = None, pause: float = 0.0
) -> list[str]:
    """The text of each answer of a stream, which is complete."""
    texts, ended, last, seen = [""] * answers, 0, began, b""
    async for chunk in reply.chunks():
        seen += chunk
        *whole, seen = seen.split(b"\n\n")
        for line in whole:
            assert b'"error"' not in line, line
            if line.startswith(b":") or line == b"data: [DONE]":
                ended += line == b"data: [DONE]"
                continue
            assert not ended, f"{line!r} after [DONE]"
            choice = json.loads(line.removeprefix(b"data: "))["choices"][0]
            if (text := choice["delta"].get("content")) and last is not None:
                (tally.first if last == began else tally.between).append(time.monotonic() - last)
                last = time.monotonic()
            texts[choice["index"]] += text or ""
        if pause:
            await asyncio.sleep(pause)
    assert (reply.complete, ended, seen) == (True, 1, b"")
    return texts


# What a client does ---------------------------------------------------------------------------------------------------


async def stream(tally: Tally, model: str, prompt: str, chosen: random.Random) -> str:
    began = time.monotonic()
    reply = await post(tally.port, "/v1/chat/completions", chat(model, prompt, stream=True))
    try:
        if refused := await refusal(tally, reply, model):
            return refused
        (text,) = await read_stream(tally, reply, 1, began)
        check_answer(tally, reply, prompt, text)
    finally:
        reply.leave()
    return ""


async def whole(tally: Tally, model: str, prompt: str, chosen: random.Random) -> str:
    reply = await post(tally.port, "/v1/chat/completions", chat(model, prompt))
    try:
        if refused := await refusal(tally, reply, model):
            return refused
        check_answer(tally, reply, prompt, json.loads(await reply.body())["choices"][0]["message"]["content"])
    finally:
        reply.leave()
    return ""


async def leave(tally: Tally, model: str, prompt: str, chosen: random.Random) -> str:
    """Ask for much, and go away at any time: before the head, between two events, or never."""
    body = chat(model, prompt, max_tokens=200, stream=chosen.random() < 0.7)
    reply = await post(tally.port, "/v1/chat/completions", body)

    async def read() -> None:
        if not await refusal(tally, reply, model):
            await reply.body()

    try:
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(read(), chosen.random() * 2)
    finally:
        reply.leave()
    return ""


async def slow(tally: Tally, model: str, prompt: str, chosen: random.Random) -> str:
    """Four long answers, more than the buffers of the sockets hold, and a pause after every read."""
    body = chat(model, prompt, stream=True, n=4, logprobs=True, top_logprobs=20)
    reply = await post(tally.port, "/v1/chat/completions", body, receive_buffer=4096)
    try:
        if refused := await refusal(tally, reply, model):
            return refused
        for text in await read_stream(tally, reply, 4, pause=0.03):
            check_answer(tally, reply, prompt, text)
    finally:
        reply.leave()
    return ""


async def unknown(tally: Tally, model: str, prompt: str, chosen: random.Random) -> str:
    refused = await stream(tally, "nobody", prompt, chosen)
    assert refused, "an unknown model answered"
    return refused


async def many_answers(tally: Tally, model: str, prompt: str, chosen: random.Random) -> str:
    """Several prompts of the completions, sampled: complete, whatever they say."""
    body = {"model": model, "prompt": list(PROMPTS), "max_tokens": 6, "stream": chosen.random() < 0.5}
    reply = await post(tally.port, "/v1/completions", body)
    try:
        if refused := await refusal(tally, reply, model):
            return refused
        data = await reply.body()
        if body["stream"]:
            assert data.endswith(b"data: [DONE]\n\n"), data[-200:]
        else:
            assert len(json.loads(data)["choices"]) == len(PROMPTS)
    finally:
        reply.leave()
    return ""


WAY = {"stream": stream, "whole": whole, "leave": leave, "slow": slow, "unknown": unknown, "many": many_answers}


# What comes and goes --------------------------------------------------------------------------------------------------


class Changes(threading.Thread):
    """Loads, replaces and unloads adapters until `stop` is set."""

    def __init__(self, url: str) -> None:
        super().__init__(name="changes")
        self.url, self.stop, self.count = url, threading.Event(), 0
        self.wrong: list[str] = []

    def run(self) -> None:
        chosen, loaded = random.Random(0), set[str]()
        folders = [*ADAPTERS, *MORE]
        with httpx.Client(base_url=f"{self.url}/v1", timeout=120) as client:
            while not self.stop.wait(0.1):
                name = chosen.choice(MOVING)
                if name in loaded and chosen.random() < 0.4:
                    answer = client.post("/unload_lora_adapter", json={"lora_name": name})
                    loaded.discard(name)
                elif chosen.random() < 0.2:  # one that is always there: the same files again
                    fixed = chosen.choice(folders)
                    body = {"lora_name": fixed, "lora_path": fixed, "load_inplace": True}
                    answer = client.post("/load_lora_adapter", json=body)
                else:
                    body = {"lora_name": name, "lora_path": chosen.choice(folders), "load_inplace": name in loaded}
                    answer = client.post("/load_lora_adapter", json=body)
                    loaded.add(name)
                self.count += 1
                if answer.status_code != 200:
                    self.wrong.append(f"{answer.request.url}: {answer.status_code} {answer.text:.500}")
            for name in loaded:
                client.post("/unload_lora_adapter", json={"lora_name": name})


class Memory(threading.Thread):
    """The RSS of a process twice a second."""

    def __init__(self, process: Process) -> None:
        super().__init__(name="memory")
        self.process, self.stop, self.samples = process, threading.Event(), list[int]()

    def run(self) -> None:
        while not self.stop.wait(0.5):
            self.samples.append(self.process.rss())

    def medians(self) -> tuple[float, float]:
        """Of the two halves of the time after the warm-up."""
        samples = self.samples[int(len(self.samples) * WARM_UP) :]
        half = len(samples) // 2
        return statistics.median(samples[:half]), statistics.median(samples[half:])


# The test -------------------------------------------------------------------------------------------------------------


def gauges(url: str) -> dict[str, float]:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def answers_alone(url: str, models: list[str]) -> Iterator[tuple[tuple[str, str], str]]:
    """((weights, prompt), the greedy answer), one request after the other."""
    with httpx.Client(base_url=url, timeout=120) as client:
        for model in models:
            for prompt in PROMPTS:
                answer = client.post("/v1/chat/completions", json=chat(model, prompt))
                assert answer.status_code == 200, answer.text
                text = answer.json()["choices"][0]["message"]["content"]
                yield (digest(answer.headers["x-graft-adapter"]), prompt), text


def eventually(found: Callable[[], Any], wanted: Any) -> None:
    """Wait for connections that end and answers that are cancelled. At most a minute."""
    ends = time.monotonic() + 60
    while found() != wanted and time.monotonic() < ends:
        time.sleep(0.2)
    assert found() == wanted


async def all_clients(tally: Tally, models: list[str], seconds: float) -> None:
    ends = time.monotonic() + seconds
    await asyncio.gather(*(one_client(tally, models, seed, ends) for seed in range(CLIENTS)))


def percentiles(values: list[float]) -> str:
    """In ms."""
    cuts = statistics.quantiles(values, n=100)
    return f"p50 {1000 * cuts[49]:.1f} ms, p99 {1000 * cuts[98]:.1f} ms, of {len(values)}"


@pytest.mark.long(group="soak")
def test_a_server_works_for_long(served_base: Path, many: Path, record_property: Callable[[str, object], None]) -> None:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("the files and the memory of a process are read from /proc")
    arguments = ("--base", served_base, "--adapters", many, "--dtype", "float32", "--allow-adapter-changes")
    limits = ("--slots", SLOTS, "--max-requests", MAX_REQUESTS, "--queue", QUEUE)
    models = ["tiny", *ADAPTERS, *MORE]
    with running(*arguments, *limits) as (server, url):
        right = dict(answers_alone(url, models))
        assert len(set(right.values())) > len(right) // 2, "other weights and prompts have other answers"
        process = Process(server.pid)
        before = {"files": process.files(), "children": process.children()}
        threads = process.threads()
        tally, changes, memory = Tally(int(url.rpartition(":")[2]), right), Changes(url), Memory(process)
        for thread in (changes, memory):
            thread.start()
        try:
            asyncio.run(all_clients(tally, [*models, *MOVING], SECONDS))
        finally:
            for thread in (changes, memory):
                thread.stop.set()
                thread.join()
        middle, last = memory.medians()
        record_property("requests", sum(tally.counts.values()))
        record_property("by way", dict(sorted(tally.counts.items())))
        record_property("changes of adapters", changes.count)
        record_property("first token", percentiles(tally.first))
        record_property("between tokens", percentiles(tally.between))
        record_property("RSS", f"{middle / 2**20:.0f} MiB, later {last / 2**20:.0f} MiB")
        record_property("threads", f"{threads}, later {process.threads()}")

        assert tally.wrong == []
        assert changes.wrong == []
        assert all(tally.counts[way] > 0 for way in ("stream", "whole", "leave", "slow", "many"))
        idle = {"graft_requests_running": 0, "graft_requests_waiting": 0, "graft_adapters_leased": 0}
        eventually(lambda: {name: gauges(url)[name] for name in idle}, idle)
        eventually(lambda: {"files": process.files(), "children": process.children()}, before)
        assert process.threads() <= threads + MAX_REQUESTS + QUEUE, "more than those that prepare requests"
        assert gauges(url)["graft_adapters_registered"] == len(ADAPTERS) + len(MORE)
        assert dict(answers_alone(url, models)) == right
        assert last <= middle * GROWTH, f"{middle / 2**20:.1f} MiB, later {last / 2**20:.1f} MiB"
