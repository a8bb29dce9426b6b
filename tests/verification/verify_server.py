"""An OpenAI-compatible server that serves what a test says, right or wrong, in the form that the test says."""

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import torch

from graftlm.adapters.load import load_adapter
from graftlm.hub.load import load_base
from graftlm.model.modes import by_row


class Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Served:
    """A base with adapters, and how it answers."""

    base: Path
    adapters: dict[str, Path] = field(default_factory=dict)
    """By the names under which they are served."""
    applied: dict[str, tuple[str, float]] = field(default_factory=dict)
    """Model -> (adapter whose weights answer, factor), where that is not the adapter itself; ("", 1) is the base."""
    dtype: str = "float32"
    quantization: str = "none"
    template: str | None = None
    """Where it is not the base's."""
    routes: tuple[str, ...] = ("completions", "chat/completions")
    logprobs: str | None = "top"
    """Form of log-probabilities in completions: `top` (OpenAI), `content` (llama-server); None: it has none."""
    most: int = 20
    takes_ids: bool = True
    by_id: bool = False
    """Whether it knows vLLM's return_tokens_as_token_ids."""
    strict: bool = False
    """Whether it refuses fields that it does not know."""
    counts: bool = True
    """Whether it says how many tokens a prompt has."""
    lists_models: bool = True
    error: Any = None
    """(status, body) or a function of a request's number -> the same or None."""
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model, self.tokenizer = load_base(str(self.base), dtype=self.dtype, quantization=self.quantization)
        for number, folder in enumerate(self.adapters.values()):
            load_adapter(self.model, folder, name=f"a{number}")
        self.names = {name: f"a{number}" for number, name in enumerate(self.adapters)}

    def row(self, model: str) -> dict[str, float]:
        if model == "base":
            return {}
        if model not in self.names and model not in self.applied:
            raise Refused(404, f"The model {model!r} does not exist")
        adapter, factor = self.applied.get(model, (model, 1.0))
        return {self.names[adapter]: factor} if adapter else {}

    def prompt(self, path: str, body: dict[str, Any]) -> list[int]:
        if path == "chat/completions":
            template = self.template or self.tokenizer.chat_template
            text = self.tokenizer.apply_chat_template(
                body["messages"], chat_template=template, tokenize=False, add_generation_prompt=True
            )
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if isinstance(body["prompt"], str):
            return list(self.tokenizer(body["prompt"])["input_ids"])
        if not self.takes_ids:
            raise Refused(422, "prompt: a string is needed")
        return list(body["prompt"])

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        known = {"model", "prompt", "messages", "max_tokens", "temperature", "top_p", "logprobs", "top_logprobs"}
        if self.strict and (more := body.keys() - known):
            raise Refused(400, f"unknown fields {sorted(more)}")
        wanted = body.get("top_logprobs" if path == "chat/completions" else "logprobs") or 0
        if self.logprobs and wanted > self.most:
            raise Refused(400, f"at most {self.most} log-probabilities")
        ids, row = self.prompt(path, body), self.row(body["model"])
        first, new = self.generated(ids, row, body["max_tokens"])
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        choice: dict[str, Any] = (
            {"message": {"role": "assistant", "content": text}} if "messages" in body else {"text": text}
        )
        if self.logprobs and wanted:
            form = "content" if "messages" in body else self.logprobs
            choice["logprobs"] = self.reported(first, wanted, form, bool(body.get("return_tokens_as_token_ids")))
        return {"choices": [choice], **({"usage": {"prompt_tokens": len(ids)}} if self.counts else {})}

    def reported(self, log_probs: torch.Tensor, count: int, form: str, by_id: bool) -> dict[str, Any]:
        values, ids = log_probs.topk(count)
        texts = [self.tokenizer.decode([i]) for i in ids.tolist()]
        named = [f"token_id:{i}" for i in ids.tolist()] if by_id and self.by_id else texts
        if form == "top":
            return {"top_logprobs": [dict(zip(named, values.tolist(), strict=True))]}
        tops = [{"token": n, "logprob": v} for n, v in zip(named, values.tolist(), strict=True)]
        return {"content": [tops[0] | {"top_logprobs": tops}]}

    @torch.no_grad()
    def generated(self, ids: Sequence[int], row: dict[str, float], count: int) -> tuple[torch.Tensor, list[int]]:
        """The log-probabilities of the first new token, and the greedy answer without its end."""
        with by_row(self.model, [row]):
            out = self.model.generate(
                torch.tensor([ids]),
                max_new_tokens=count,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=0,
            )
        return out.logits[0][0].float().log_softmax(-1), out.sequences[0, len(ids) :].tolist()


@contextmanager
def running(served: Served) -> Iterator[str]:
    """The URL of the server, up to /v1, until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            models = [{"id": "base"}, *[{"id": name, "parent": "base"} for name in (*served.adapters, *served.applied)]]
            unique = list({each["id"]: each for each in models}.values())
            self.send(*((200, {"data": unique}) if served.lists_models else (404, {"error": "no such route"})))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            path = self.path.removeprefix("/v1/")
            served.asked.append({**body, "path": path})
            served.keys.append(self.headers["Authorization"])
            error = served.error(len(served.asked)) if callable(served.error) else served.error
            if error is not None:
                self.send(*error)
            elif path not in served.routes:
                self.send(404, {"error": "no such route"})
            else:
                try:
                    self.send(200, served.answer(path, body))
                except Refused as refused:
                    self.send(refused.status, {"error": {"message": str(refused)}})

        def send(self, status: int, body: Any) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
