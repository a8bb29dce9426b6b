"""Completions, embeddings, responses, messages, tokens: translations of the same core."""

import base64
import struct
from typing import Any

import pytest
import torch

from graftlm.adapters.load import load_adapter
from graftlm.generation.engine import Engine
from graftlm.generation.requests import Request
from graftlm.hub.load import load_base
from tests.serve.conftest import ADAPTERS, Served, events_of

MODELS = ("tiny", *ADAPTERS)


def alone(served: Served, name: str) -> Any:
    """A model of its own with one adapter, or none."""
    model, _ = load_base(str(served.library.parent / "tiny"), dtype="float32")
    if name != "tiny":
        load_adapter(model, served.library / name)
    return model


def post(served: Served, path: str, **body: Any) -> Any:
    answer = served.client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-graft-adapter"].startswith(body["model"].removeprefix("tiny:") + "@sha256:")
    served.assert_idle()
    return answer.json()


def events(served: Served, path: str, **body: Any) -> list[Any]:
    with served.client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200, response.read()
        found = events_of(response.iter_lines())
    served.assert_idle()
    return found


# Completions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_completion_goes_on_from_the_very_ids(served: Served, name: str) -> None:
    ids = served.tokenizer("the user asks")["input_ids"]
    engine = Engine(alone(served, name), prepack=False)
    expected = engine.wait(engine.submit(Request(ids, 6, stop_ids=(2,))))
    text = served.tokenizer.decode(expected.answer_ids, skip_special_tokens=True)
    for prompt in ("the user asks", ids, ["the user asks"], [ids]):
        found = post(served, "/v1/completions", model=name, prompt=prompt, max_tokens=6, temperature=0)
        assert [choice["text"] for choice in found["choices"]] == [text]
        assert found["usage"] == {"prompt_tokens": len(ids), "completion_tokens": 6, "total_tokens": len(ids) + 6}
    chunks = events(served, "/v1/completions", model=name, prompt=ids, max_tokens=6, temperature=0)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == text
    assert chunks[-1] == "[DONE]"


def test_several_prompts_and_echo(served: Served) -> None:
    prompts = ["the user", "answers in", "a"]
    body: dict[str, Any] = {"model": "plain", "max_tokens": 4, "temperature": 0}
    each = [post(served, "/v1/completions", prompt=prompt, **body)["choices"][0]["text"] for prompt in prompts]
    found = post(served, "/v1/completions", prompt=prompts, n=2, echo=True, **body)["choices"]
    expected = [prompt + text for prompt, text in zip(prompts, each, strict=True) for _ in range(2)]
    assert [choice["text"] for choice in found] == expected
    assert [choice["index"] for choice in found] == list(range(6))


@pytest.mark.parametrize(
    "fields",
    [{"prompt": []}, {"prompt": [[]]}, {"prompt": [300]}, {"prompt": [-1]}, {"prompt": [True]}, {"prompt": ["a", 1]},
     {"suffix": "x"}, {"best_of": 2}, {"prompt": ["a"] * 17}, {"logprobs": 99}],
)  # fmt: skip
def test_wrong_completions(served: Served, fields: dict[str, Any]) -> None:
    answer = served.client.post("/v1/completions", json={"model": "tiny", "prompt": "a", **fields})
    assert answer.status_code == 400, answer.text
    served.assert_idle()


# Embeddings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_an_embedding_is_the_mean_of_last_states(served: Served, name: str) -> None:
    model, texts = alone(served, name), ["the user asks", "hello"]
    found = post(served, "/v1/embeddings", model=name, input=texts)
    for each, text in zip(found["data"], texts, strict=True):
        ids = torch.tensor([served.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            mean = model.model(input_ids=ids).last_hidden_state[0].mean(0)
        assert torch.allclose(torch.tensor(each["embedding"]), mean / mean.norm(), atol=1e-6)
    assert [each["index"] for each in found["data"]] == [0, 1]
    assert found["usage"]["prompt_tokens"] == sum(len(served.tokenizer(text)["input_ids"]) for text in texts)
    packed = post(served, "/v1/embeddings", model=name, input=texts[0], encoding_format="base64")["data"][0][
        "embedding"
    ]
    floats = struct.unpack("<32f", base64.b64decode(packed))
    assert torch.equal(torch.tensor(floats), torch.tensor(found["data"][0]["embedding"]))


@pytest.mark.parametrize("fields", [{"input": ""}, {"input": []}, {"input": "a " * 2000}, {"dimensions": 3}])
def test_wrong_embeddings(served: Served, fields: dict[str, Any]) -> None:
    answer = served.client.post("/v1/embeddings", json={"model": "tiny", "input": "a", **fields})
    assert answer.status_code == 400, answer.text
    served.assert_idle()


# Tokens --------------------------------------------------------------------------------------------------------------


def test_tokens_there_and_back(served: Served) -> None:
    text = "the user asks: é 字 <|im_end|>"
    found = post(served, "/tokenize", model="plain", prompt=text, return_token_strs=True)
    assert found["tokens"] == served.tokenizer(text)["input_ids"]
    assert found["count"] == len(found["tokens"])
    assert "".join(found["token_strs"]) == text
    assert post(served, "/detokenize", model="plain", tokens=found["tokens"])["prompt"] == text
    assert served.client.post("/detokenize", json={"model": "plain", "tokens": [10**6]}).status_code == 400
    assert served.client.post("/tokenize", json={"model": "plain"}).status_code == 400


def test_an_adapter_is_asked_with_its_own_template(served: Served) -> None:
    body = {"messages": [{"role": "user", "content": "a"}]}
    texts = {}
    for name in MODELS:
        ids = post(served, "/tokenize", model=name, **body)["tokens"]
        texts[name] = post(served, "/detokenize", model=name, tokens=ids)["prompt"]
    assert texts["bot"].endswith("<|im_start|>bot\n")
    assert {texts[name] for name in MODELS if name not in ("bot", "hermes")} == {texts["tiny"]}


# Anthropic's messages ------------------------------------------------------------------------------------------------


def test_a_message_is_the_answer_of_chat(served: Served) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "the user "}, {"type": "text", "text": "asks"}]}]
    body = {"model": "plain", "max_tokens": 8, "temperature": 0.0, "messages": messages, "system": "a system"}
    found = post(served, "/v1/messages", **body)
    chat = [{"role": "system", "content": "a system"}, {"role": "user", "content": "the user asks"}]
    same = served.client.post(
        "/v1/chat/completions", json={"model": "plain", "max_tokens": 8, "temperature": 0, "messages": chat}
    ).json()
    assert found["content"] == [{"type": "text", "text": same["choices"][0]["message"]["content"]}]
    assert (found["type"], found["role"], found["stop_reason"]) == ("message", "assistant", "max_tokens")
    assert found["usage"] == {"input_tokens": same["usage"]["prompt_tokens"], "output_tokens": 8}
    counted = post(served, "/v1/messages/count_tokens", **{k: body[k] for k in ("model", "messages", "system")})
    assert counted == {"input_tokens": same["usage"]["prompt_tokens"]}
    stream = events(served, "/v1/messages", **body)
    assert [each["type"] for each in stream[:2]] == ["message_start", "content_block_start"]
    assert [each["type"] for each in stream[-3:]] == ["content_block_stop", "message_delta", "message_stop"]
    text = "".join(each["delta"]["text"] for each in stream if each["type"] == "content_block_delta")
    assert text == found["content"][0]["text"]
    assert stream[-2]["usage"] == {"output_tokens": 8}
    stop = text[2:4]
    stopped = post(served, "/v1/messages", **body, stop_sequences=[stop])
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", stop)
    assert stopped["content"][0]["text"] == text[: text.find(stop)]


@pytest.mark.parametrize(
    "fields",
    [{"messages": [{"role": "system", "content": "x"}]}, {"messages": [{"role": "user", "content": []}]},
     {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, {"max_tokens": 0},
     {"tools": [{"type": "bash_20250124", "name": "bash"}]}, {"system": 1}, {"stop_sequences": [""]}, {"n": 2}],
)  # fmt: skip
def test_wrong_messages(served: Served, fields: dict[str, Any]) -> None:
    body = {"model": "tiny", "max_tokens": 2, "messages": [{"role": "user", "content": "a"}], **fields}
    answer = served.client.post("/v1/messages", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"


# OpenAI's responses --------------------------------------------------------------------------------------------------


def test_a_response_is_the_answer_of_chat(served: Served) -> None:
    items = [{"role": "user", "content": [{"type": "input_text", "text": "the user asks"}]}]
    body = {"model": "plain", "max_output_tokens": 8, "temperature": 0, "instructions": "a system"}
    found = post(served, "/v1/responses", input="the user asks", **body)
    assert post(served, "/v1/responses", input=items, **body)["output"][0]["content"] == found["output"][0]["content"]
    chat = [{"role": "system", "content": "a system"}, {"role": "user", "content": "the user asks"}]
    same = served.client.post(
        "/v1/chat/completions", json={"model": "plain", "max_tokens": 8, "temperature": 0, "messages": chat}
    ).json()
    (item,) = found["output"]
    assert item["content"][0]["text"] == same["choices"][0]["message"]["content"]
    assert (found["status"], found["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert found["usage"]["total_tokens"] == same["usage"]["total_tokens"]
    stream = events(served, "/v1/responses", input="the user asks", **body)
    assert [each["sequence_number"] for each in stream] == list(range(len(stream)))
    kinds = [each["type"] for each in stream]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.incomplete",
    ]  # fmt: skip
    deltas = "".join(each["delta"] for each in stream if each["type"] == "response.output_text.delta")
    assert deltas == item["content"][0]["text"] == stream[-1]["response"]["output"][0]["content"][0]["text"]


@pytest.mark.parametrize(
    "fields",
    [{"previous_response_id": "resp_1"}, {"input": [{"type": "item_reference", "id": "x"}]}, {"input": []},
     {"tools": [{"type": "web_search"}]}, {"background": True}, {"truncation": "auto"},
     {"reasoning": {"effort": "low"}}, {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}],
)  # fmt: skip
def test_wrong_responses(served: Served, fields: dict[str, Any]) -> None:
    answer = served.client.post("/v1/responses", json={"model": "tiny", "input": "a", **fields})
    assert answer.status_code == 400, answer.text
    served.assert_idle()


# Models and metrics --------------------------------------------------------------------------------------------------


def test_models_have_parents(served: Served) -> None:
    found = served.client.get("/v1/models").json()
    assert {each["id"]: each["parent"] for each in found["data"]} == {"tiny": None, **dict.fromkeys(ADAPTERS, "tiny")}
    for each in found["data"]:
        assert served.client.get(f"/v1/models/{each['id']}").json() == each
    assert served.client.get("/v1/models/tiny:plain").json()["id"] == "plain"
    assert served.client.get("/v1/models/nobody").status_code == 404


def test_adapters_come_and_go(served: Served) -> None:
    answer = served.client.post("/v1/load_lora_adapter", json={"lora_name": "again", "lora_path": "plain"})
    assert answer.json()["parent"] == "tiny"
    assert served.chat("again").json()["choices"] == served.chat("plain").json()["choices"]
    twice = served.client.post("/v1/load_lora_adapter", json={"lora_name": "again", "lora_path": "bot"})
    assert twice.status_code == 400
    replaced = {"lora_name": "again", "lora_path": "bot", "load_inplace": True}
    assert served.client.post("/v1/load_lora_adapter", json=replaced).status_code == 200
    assert served.chat("again").json()["choices"] == served.chat("bot").json()["choices"]
    assert served.client.post("/v1/unload_lora_adapter", json={"lora_name": "again"}).status_code == 200
    assert served.chat("again").status_code == 404
    assert served.client.post("/v1/unload_lora_adapter", json={"lora_name": "tiny"}).status_code == 404
    served.assert_idle()


def test_metrics_count(served: Served) -> None:
    def value(name: str) -> float:
        lines = served.client.get("/metrics").text.splitlines()
        return float(next(line.split()[-1] for line in lines if line.startswith(f"{name} ")))

    before = (
        value("graft_answer_tokens_total"),
        value("graft_first_token_seconds_count"),
        value("graft_prompt_tokens_total"),
    )
    used = served.chat("plain").json()["usage"]
    assert value("graft_answer_tokens_total") == before[0] + used["completion_tokens"]
    assert value("graft_first_token_seconds_count") == before[1] + 1
    assert value("graft_prompt_tokens_total") == before[2] + used["prompt_tokens"]
    assert value("graft_adapters_registered") == len(ADAPTERS)
    assert value("graft_requests_running") == value("graft_requests_waiting") == 0
    held = served.service.catalog.open("plain", 10)
    assert value("graft_adapters_leased") == 1
    served.service.catalog.unload("plain")
    assert value("graft_adapters_leased") == 1, "an adapter that leaves is held, too"
    held.lease.release()
    assert value("graft_adapters_leased") == 0
    served.service.catalog.load("plain", "plain", replace=False)
    served.client.get("/made/up/nowhere")
    text = served.client.get("/metrics").text
    assert "nowhere" not in text
    assert 'graft_http_requests_total{path="(none)",status="404"}' in text
