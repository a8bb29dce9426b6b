"""The model `auto`: a router chooses, the answer says what, and other requests are as they were."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from graftlm.hub.load import load_base
from graftlm.routing.routers.arrow import ArrowConfig
from graftlm.routing.routers.retriever import RetrieverConfig
from graftlm.serve.app import make_app
from graftlm.serve.limits import Limits
from graftlm.serve.server import Options, make_service
from tests.errors import raises
from tests.serve.conftest import ADAPTERS, URL, Served, events_of

QUESTIONS = {"plain": "apple banana cherry", "bot": "1 + 2 = 3, 4 * 5", "peft": "SELECT name FROM t", "hermes": "Wo?"}


def serve(base: Path, library: Path, router: Any, **more: Any) -> Served:
    model, tokenizer = load_base(str(base), dtype="float32")
    service = make_service(model, tokenizer, library, Options(router=router, **more), Limits())
    app = make_app(service, allow_adapter_changes=True)
    client = TestClient(app, base_url=URL, raise_server_exceptions=False)
    return Served(service, model, tokenizer, library, client, app)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder, found = tmp_path_factory.mktemp("rows"), {}
    for name, text in QUESTIONS.items():
        found[name] = str(folder / f"{name}.jsonl")
        lines = [json.dumps({"prompt": f"{text} {n} {text}", "completion": "yes"}) for n in range(4)]
        Path(found[name]).write_text("\n".join(lines) + "\n")
    return found


@pytest.fixture(scope="module")
def by_request(served_base: Path, library: Path, rows: dict[str, str]) -> Iterator[Served]:
    found = serve(served_base, library, RetrieverConfig(rows=rows, top_k=1))
    with found.client:
        yield found
    found.service.close()


@pytest.fixture(scope="module")
def by_token(served_base: Path, library: Path) -> Iterator[Served]:
    found = serve(served_base, library, ArrowConfig(among=("plain", "peft")))
    with found.client:
        yield found
    found.service.close()


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_request_is_answered_as_by_the_adapter_that_the_router_names(by_request: Served, name: str) -> None:
    asked = f"{QUESTIONS[name]} 9 {QUESTIONS[name]}"
    routed, named = by_request.chat("auto", asked), by_request.chat(name, asked)
    assert routed.status_code == 200, routed.text
    assert routed.headers["x-graft-adapter"] == named.headers["x-graft-adapter"]
    assert routed.headers["x-graft-adapter"].startswith(f"{name}@")
    assert routed.json()["choices"] == named.json()["choices"], "with its own chat template"
    assert routed.json()["model"] == "auto"
    by_request.assert_idle()


def test_streams_and_other_protocols_are_routed_too(by_request: Served) -> None:
    asked = f"{QUESTIONS['bot']} 5 {QUESTIONS['bot']}"
    plain = by_request.chat("auto", asked, n=2)
    assert len(plain.json()["choices"]) == 2
    body = {"model": "auto", "messages": [{"role": "user", "content": asked}], "max_tokens": 8, "temperature": 0}
    with by_request.client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
        assert response.headers["x-graft-adapter"] == plain.headers["x-graft-adapter"]
        events = events_of(response.iter_lines())
    text = "".join(each["choices"][0]["delta"].get("content") or "" for each in events[:-1] if each["choices"])
    assert text == plain.json()["choices"][0]["message"]["content"]
    messages = by_request.client.post("/v1/messages", json=body)
    assert messages.headers["x-graft-adapter"] == plain.headers["x-graft-adapter"]
    by_request.assert_idle()


def test_tokens_of_a_request_are_routed_and_others_are_not(by_token: Served) -> None:
    alone = by_token.chat("plain").json()["choices"]
    auto = by_token.chat("auto")
    assert auto.status_code == 200, auto.text
    assert auto.headers["x-graft-adapter"].startswith("arrow(peft+plain)@sha256:")
    assert auto.json()["choices"] != by_token.chat("tiny").json()["choices"]
    assert by_token.chat("plain").json()["choices"] == alone
    assert by_token.chat("auto").json()["choices"] == auto.json()["choices"]
    by_token.assert_idle()
    mixture = by_token.service.catalog.routing
    assert mixture is not None
    assert mixture._now().leases == 0


def test_it_is_a_model_of_the_list(by_token: Served, served: Served) -> None:
    entries = {each["id"]: each for each in by_token.client.get("/v1/models").json()["data"]}
    assert entries["auto"] == by_token.client.get("/v1/models/auto").json()
    assert (entries["auto"]["router"], entries["auto"]["parent"]) == ("arrow", "tiny")
    assert served.chat("auto").status_code == 404, "without a router there is no such model"
    assert "auto" not in {each["id"] for each in served.client.get("/v1/models").json()["data"]}


def test_what_no_prompt_can_choose_is_refused(by_request: Served) -> None:
    for path, body in {
        "/v1/embeddings": {"input": "x"},
        "/tokenize": {"prompt": "x"},
        "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "x"}]},
    }.items():
        answer = by_request.client.post(path, json={"model": "auto", **body})
        assert answer.status_code == 400, path
        assert "auto" in answer.text
    several = by_request.client.post("/v1/completions", json={"model": "auto", "prompt": ["a", "b"]})
    assert several.status_code == 400
    assert "2" in several.json()["error"]["message"]
    one = by_request.client.post("/v1/completions", json={"model": "auto", "prompt": "a"})
    assert one.status_code == 200
    load = {"lora_name": "auto", "lora_path": "plain"}
    assert by_request.client.post("/v1/load_lora_adapter", json=load).status_code == 400
    by_request.assert_idle()


def test_adapters_that_are_loaded_and_unloaded_change_what_is_routed(served_base: Path, library: Path) -> None:
    served = serve(served_base, library, ArrowConfig())
    with served.client as client:
        before = served.chat("auto").headers["x-graft-adapter"]
        assert before.startswith("arrow(bot+hermes+peft+plain)@")
        client.post("/v1/unload_lora_adapter", json={"lora_name": "bot"})
        assert served.chat("auto").headers["x-graft-adapter"].startswith("arrow(hermes+peft+plain)@")
        for name in ("hermes", "peft", "plain"):
            client.post("/v1/unload_lora_adapter", json={"lora_name": name})
        assert served.chat("auto").headers["x-graft-adapter"] == served.chat("tiny").headers["x-graft-adapter"]
        served.assert_idle()
    served.service.close()


def test_an_adapter_that_is_called_auto_cannot_be_served_beside_a_router(served_base: Path, tmp_path: Path) -> None:
    model, tokenizer = load_base(str(served_base), dtype="float32")
    (tmp_path / "auto").mkdir()
    (tmp_path / "auto" / "adapter_config.json").write_text("{}")
    with raises("adapter/name-registered", "auto"):
        make_service(model, tokenizer, tmp_path, dataclasses.replace(Options(), router=ArrowConfig()), Limits())
