"""A server that answers as a test says: the page's own routes, and the API with a model that is a script.

It has the routes that the page asks, in the form in which OpenAI's clients read them. So the tests of the page decide
what a model says, how slowly, and when it fails, as no model would.
"""

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from graftlm.recipe import Recipe
from graftlm.serve import page, training_data, training_runs


@dataclass
class Script:
    """What the models say and what they were asked."""

    answers: dict[str, list[Any]] = field(default_factory=dict)
    """Last message of the user -> deltas, each a text or a mapping; the question itself where there are none."""
    pause: float = 0.0
    """Seconds before each delta."""
    models: tuple[str, ...] = ("base", "parcels", "weather")
    key: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    """The bodies of all chat requests."""
    ended_early: int = 0
    """Streams that the client left."""


def app_of(script: Script, runs: Path | None = None, data: Recipe | None = None) -> FastAPI:
    app = FastAPI(openapi_url=None)
    for path, get in (page.gets() | training_runs.gets(runs) | training_data.gets(data)).items():
        app.add_api_route(path, get, methods=["GET"])

    @app.middleware("http")
    async def guard(request: Request, follow: Callable[[Request], Any]) -> Response:
        known = request.headers.get("authorization") == f"Bearer {script.key}"
        if script.key and not known and request.url.path not in page.PATHS:
            return JSONResponse({"error": {"message": "no valid API key"}}, 401)
        return await follow(request)

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [{"id": name, "object": "model"} for name in script.models]}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await request.json()
        script.asked.append(body)
        return StreamingResponse(
            stream(script, body),
            media_type="text/event-stream",
            headers={"x-graft-adapter": f"{body['model']}@sha256:0"},
        )

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Any:
        body = await request.json()
        text = body["prompt"] if "prompt" in body else "".join(m["content"] + "\n" for m in body["messages"])
        ids = [ord(character) for character in text]
        return {"tokens": ids, "count": len(ids), "token_strs": [chr(one) for one in ids]}

    @app.post("/v1/completions")
    async def completions(request: Request) -> Any:
        body = await request.json()
        scores = [None, *(log_prob(body["model"], token) for token in body["prompt"][1:]), -0.5]
        return {"choices": [{"text": "", "logprobs": {"token_logprobs": scores}}]}

    return app


def log_prob(model: str, token: int) -> float:
    """What a model gives to a token, in nats: all find vowels as likely, and `base` likes consonants less."""
    return -1.0 if chr(token) in "aeiou" else -3.0 if model == "base" else -0.5


async def stream(script: Script, body: dict[str, Any]) -> AsyncIterator[str]:
    question = body["messages"][-1]["content"]
    count, done = 0, False
    try:
        for delta in script.answers.get(question, [f"{body['model']} heard: ", question]):
            await asyncio.sleep(script.pause)
            if delta == "FAIL":
                yield event({"error": {"message": "the model failed"}})
                return
            count += 1
            yield event({"choices": [{"index": 0, "delta": {"content": delta} if isinstance(delta, str) else delta}]})
        yield event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        yield event({"choices": [], "usage": {"completion_tokens": count}})
        yield "data: [DONE]\n\n"
        done = True
    finally:
        script.ended_early += not done


def event(tree: Any) -> str:
    return f"data: {json.dumps(tree)}\n\n"


@contextmanager
def served(app: Any) -> Iterator[str]:
    """The address of the application while it runs in a thread."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        listening.close()
