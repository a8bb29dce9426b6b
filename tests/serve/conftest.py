"""A server over a tiny base and four adapters: `plain` (a LoRA), `bot` (another chat template), `peft` (no record),
`hermes` (a chat template with tools and thoughts)."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from graftlm.adapters.folder import RECORD
from graftlm.adapters.save import save_adapter
from graftlm.deltas.lora import LoraConfig
from graftlm.generation.adapter_pool import AdapterPool
from graftlm.generation.engine import Engine
from graftlm.hub.load import load_base
from graftlm.model.attach import attach, detach
from graftlm.serve.app import make_app
from graftlm.serve.catalog import Catalog
from graftlm.serve.limits import Limits
from graftlm.serve.metrics import Metrics
from graftlm.serve.runs import Service
from graftlm.serve.worker import Worker
from graftlm.testing import save_tiny_base, tiny_tokenizer
from graftlm.testing.deltas import move
from graftlm.testing.tiny import CHATML

BOT = CHATML.replace("<|im_start|>assistant", "<|im_start|>bot")
HERMES = (
    "{% if tools %}<|im_start|>system\nCall tools by <tool_call>: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking | default(false) %}<think>\n{% endif %}{% endif %}{# </think> #}"
)
ADAPTERS = ("plain", "bot", "peft", "hermes")
URL = "http://127.0.0.1"


@pytest.fixture(scope="session")
def served_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="session")
def library(served_base: Path) -> Path:
    """The folder of adapters."""
    folder = served_base.parent / "library"
    model, _ = load_base(str(served_base), dtype="float32")
    for seed, name in enumerate(ADAPTERS):
        move(attach(model, LoraConfig(r=2)), scale=0.5, seed=seed)
        tokenizer = {"bot": tiny_tokenizer(BOT), "hermes": tiny_tokenizer(HERMES)}.get(name)
        save_adapter(model, folder / name, tokenizer=tokenizer)
        detach(model)
    (folder / "peft" / RECORD).unlink()
    return folder


@dataclass
class Served:
    """A server and what it serves."""

    service: Service
    model: Any
    tokenizer: Any
    library: Path
    client: TestClient
    app: Any

    def chat(self, model: str = "tiny", content: str = "hello", **fields: Any) -> Any:
        messages = [{"role": "user", "content": content}]
        body = {"model": model, "messages": messages, "max_tokens": 8, "temperature": 0, **fields}
        return self.client.post("/v1/chat/completions", json=body)

    def assert_idle(self) -> None:
        """Nothing runs, nothing waits, no adapter is held."""
        engine, pool = self.service.worker.engine, self.service.catalog.pool
        assert self.service.open_answers == 0
        assert self.service.worker.open_jobs == 0
        assert engine.running == 0
        assert not engine._queue
        assert pool.counts().leased == 0


def serve(base: Path, library: Path, limits: Limits | None = None, **options: Any) -> Served:
    model, tokenizer = load_base(str(base), dtype="float32")
    pool = AdapterPool(model, slots=options.pop("slots", 4))
    for name in ADAPTERS:
        pool.register(name, library / name)
    metrics, engine = Metrics(), Engine(model, max_requests=options.pop("max_requests", 8), prepack=False)
    catalog = Catalog(model, tokenizer, pool, folder=library)
    service = Service(catalog, Worker(engine, metrics), limits or Limits(), metrics)
    app = make_app(service, **options)
    return Served(service, model, tokenizer, library, TestClient(app, base_url=URL, raise_server_exceptions=False), app)


@pytest.fixture(scope="module")
def served(served_base: Path, library: Path) -> Iterator[Served]:
    """One for all tests of a file, each of which leaves it idle."""
    found = serve(served_base, library, allow_adapter_changes=True)
    with found.client:
        yield found
    found.service.close()


@pytest.fixture
def limited(served_base: Path, library: Path) -> Iterator[Any]:
    """Servers with other limits or options: limited(limits={...}, options)."""
    made: list[Served] = []

    def make(limits: dict[str, Any] | None = None, **options: Any) -> Served:
        made.append(serve(served_base, library, replace(Limits(), **(limits or {})), **options))
        return made[-1]

    yield make
    for each in made:
        each.client.close()
        each.service.close()


def events_of(lines: Iterator[str]) -> list[Any]:
    """The JSON of each event of a stream; `[DONE]` as it is."""
    found = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [each if each == "[DONE]" else json.loads(each) for each in found]
