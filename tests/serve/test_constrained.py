"""Log-probabilities, penalties, JSON by schema, calls of tools and thoughts, through every protocol."""

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import torch

from graftlm.adapters.load import load_adapter
from graftlm.generation.engine import Engine
from graftlm.generation.reasoning import Tags
from graftlm.generation.requests import Request
from graftlm.hub.load import load_base
from graftlm.serve.dialect import Dialect, Parts
from graftlm.serve.logprobs import TokenTexts
from graftlm.testing import tiny_tokenizer
from graftlm.tool_calls.formats import HERMES, MISTRAL, PLAIN
from graftlm.tool_calls.plain import INSTRUCTION
from tests.serve.conftest import Served, events_of

USER = [{"role": "user", "content": "the user asks"}]
SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}, "ok": {"type": "boolean"}},
    "required": ["age", "ok"],
    "additionalProperties": False,
}
FIND = {
    "type": "function",
    "function": {
        "name": "find",
        "description": "Finds.",
        "parameters": {
            "type": "object",
            "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
            "required": ["n"],
            "additionalProperties": False,
        },
    },
}
STOP = {
    "type": "function",
    "function": {"name": "stop", "parameters": {"type": "object", "additionalProperties": False}},
}


def ok(answer: Any) -> Any:
    assert answer.status_code == 200, answer.text
    return answer.json()


def streamed(served: Served, path: str, body: dict[str, Any]) -> Iterator[Any]:
    with served.client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200, response.read()
        yield from events_of(response.iter_lines())


# Log-probabilities and penalties -------------------------------------------------------------------------------------


def test_log_probabilities_are_those_of_a_plain_pass(served: Served) -> None:
    model, _ = load_base(str(served.library.parent / "tiny"), dtype="float32")
    load_adapter(model, served.library / "plain")
    ids = served.tokenizer("the user asks")["input_ids"]
    body = {"model": "plain", "prompt": ids, "max_tokens": 5, "temperature": 0, "logprobs": 3, "echo": True}
    (choice,) = ok(served.client.post("/v1/completions", json=body))["choices"]
    found = choice["logprobs"]
    texts = TokenTexts(served.tokenizer)
    assert found["tokens"][: len(ids)] == [texts.name_of(i) for i in ids]
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    answer_ids = dict(Engine(model, prepack=False).run([Request(ids, 5)]))[0].ids
    assert found["tokens"][len(ids) :] == [texts.name_of(i) for i in answer_ids]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*ids, *answer_ids]])).logits[0].log_softmax(-1)
    expected = [float(logits[n, token]) for n, token in enumerate([*ids, *answer_ids][1:])]
    assert found["token_logprobs"][1:] == pytest.approx(expected, abs=1e-4)
    for each, row in zip(found["top_logprobs"][1:], logits, strict=False):
        assert sorted(each.values(), reverse=True) == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
    assert found["text_offset"][:2] == [0, len(found["tokens"][0])]
    assert b"".join(map(texts.bytes_of, [*ids, *answer_ids])).decode(errors="replace") == choice["text"]
    alone = ok(served.client.post("/v1/completions", json={**body, "max_tokens": 0}))
    assert alone["choices"][0]["logprobs"]["token_logprobs"] == found["token_logprobs"][: len(ids)]
    assert alone["choices"][0]["text"] == "the user asks"
    assert alone["usage"]["completion_tokens"] == 0
    served.assert_idle()


def test_a_stream_has_the_log_probabilities_of_the_whole(served: Served) -> None:
    fields = {"logprobs": True, "top_logprobs": 2}
    whole = ok(served.chat("plain", "the user asks", **fields))["choices"][0]["logprobs"]["content"]
    assert len(whole) == 8
    assert all(len(each["top_logprobs"]) == 2 for each in whole)
    assert all(each["logprob"] == each["top_logprobs"][0]["logprob"] for each in whole)  # greedy
    assert all(bytes(each["bytes"]).decode(errors="replace") == each["token"] for each in whole)
    body = {"model": "plain", "messages": USER, "max_tokens": 8, "temperature": 0, **fields}
    parts = [c["choices"][0]["logprobs"] for c in streamed(served, "/v1/chat/completions", body) if c != "[DONE]"]
    assert [each for part in parts if part for each in part["content"]] == whole
    completion = {"model": "plain", "prompt": "a", "max_tokens": 8, "temperature": 0, "logprobs": 1}
    expected = ok(served.client.post("/v1/completions", json=completion))["choices"][0]["logprobs"]
    found = [c["choices"][0]["logprobs"] for c in streamed(served, "/v1/completions", completion) if c != "[DONE]"]
    for key in ("tokens", "token_logprobs", "text_offset"):
        assert [each for part in found if part for each in part[key]] == expected[key]


@pytest.mark.parametrize("text", ["é 字 🙂", "a\nb", "<|im_end|>"])
def test_bytes_of_tokens_make_the_text(text: str) -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text)["input_ids"]
    texts = TokenTexts(tokenizer)
    assert b"".join(texts.bytes_of(i) for i in ids).decode() == text


def test_a_bias_and_penalties_act(served: Served) -> None:
    token = served.tokenizer("z")["input_ids"][0]
    assert ok(served.chat("plain", logit_bias={str(token): 100}))["choices"][0]["message"]["content"] == "z" * 8
    plain = ok(served.chat("plain"))["choices"][0]["message"]["content"]
    for name in ("presence_penalty", "frequency_penalty"):
        assert ok(served.chat("plain", **{name: 2}))["choices"][0]["message"]["content"] != plain
    for bias in ({"z": 1}, {"-1": 1}, {"999": 1}, {"1" * 30: 1}, {str(token): 101}):
        assert served.chat("plain", logit_bias=bias).status_code == 400
    served.assert_idle()


# JSON ----------------------------------------------------------------------------------------------------------------

FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}


@pytest.mark.parametrize("seed", range(4))
def test_an_answer_is_valid_by_its_schema(served: Served, seed: int) -> None:
    sampled: dict[str, Any] = {"temperature": 1.0, "max_tokens": 60}
    choice = ok(served.chat("plain", response_format=FORMAT, seed=seed, **sampled))["choices"][0]
    jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
    assert choice["finish_reason"] == "stop"
    completion = {"model": "plain", "prompt": "a", "seed": seed, "response_format": FORMAT, **sampled}
    jsonschema.validate(
        json.loads(ok(served.client.post("/v1/completions", json=completion))["choices"][0]["text"]), SCHEMA
    )
    responses = {
        "model": "plain", "input": "a", "temperature": 1, "max_output_tokens": 60,
        "text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}},
    }  # fmt: skip
    found = ok(served.client.post("/v1/responses", json=responses))
    jsonschema.validate(json.loads(found["output"][0]["content"][0]["text"]), SCHEMA)
    assert found["status"] == "completed"
    message = {
        "model": "plain", "messages": USER, "max_tokens": 60,
        "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
    }  # fmt: skip
    jsonschema.validate(json.loads(ok(served.client.post("/v1/messages", json=message))["content"][0]["text"]), SCHEMA)
    served.assert_idle()


def test_a_json_object_is_one(served: Served) -> None:
    body = {"response_format": {"type": "json_object"}, "max_tokens": 40, "temperature": 1}
    for seed in range(3):
        choice = ok(served.chat("plain", seed=seed, **body))["choices"][0]
        assert choice["message"]["content"].startswith("{")
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(choice["message"]["content"]), dict)


@pytest.mark.parametrize(
    "form",
    [{"type": "json"}, {"type": "json_schema"}, {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}},
     {"type": "json_schema", "json_schema": {"schema": 1}}, {}],
)  # fmt: skip
def test_wrong_formats(served: Served, form: dict[str, Any]) -> None:
    answer = served.chat("plain", response_format=form)
    assert answer.status_code == (400 if form else 200), answer.text
    served.assert_idle()


# Tools ---------------------------------------------------------------------------------------------------------------


def test_a_forced_call_is_one(served: Served) -> None:
    tools = [FIND, STOP]
    for choice, names in (
        ("required", {"find", "stop"}),
        ({"type": "function", "function": {"name": "find"}}, {"find"}),
    ):
        forced = {"tools": tools, "tool_choice": choice, "parallel_tool_calls": False}
        found = ok(served.chat("hermes", **forced, max_tokens=120, temperature=1, seed=3))["choices"][0]
        assert found["finish_reason"] == "tool_calls"
        assert found["message"]["content"] is None
        for call in found["message"]["tool_calls"]:
            assert call["type"] == "function"
            assert call["id"]
            assert call["function"]["name"] in names
            arguments = json.loads(call["function"]["arguments"])
            if call["function"]["name"] == "find":
                jsonschema.validate(arguments, FIND["function"]["parameters"])
    served.assert_idle()


FORCED = {"tools": [FIND], "tool_choice": {"type": "function", "function": {"name": "find"}}}


def test_a_stream_has_the_calls_of_the_whole(served: Served) -> None:
    body = {"model": "hermes", "messages": USER, "max_tokens": 120, "temperature": 1, "seed": 3, **FORCED}
    whole = ok(served.client.post("/v1/chat/completions", json=body))["choices"][0]["message"]["tool_calls"]
    chunks = [chunk["choices"][0] for chunk in streamed(served, "/v1/chat/completions", body) if chunk != "[DONE]"]
    calls = [call for chunk in chunks for call in chunk["delta"].get("tool_calls", [])]
    assert [call["index"] for call in calls] == list(range(len(whole)))
    assert [call["function"] for call in calls] == [call["function"] for call in whole]
    assert not any(chunk["delta"].get("content") for chunk in chunks)
    assert chunks[-1]["finish_reason"] == "tool_calls"


def test_the_result_of_a_call_goes_back(served: Served) -> None:
    """The same conversation in three protocols is the same prompt."""
    call = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"n": 1}'}}
    chat = {
        "model": "hermes", "tools": [FIND], "max_tokens": 4, "temperature": 0,
        "messages": [*USER, {"role": "assistant", "content": None, "tool_calls": [call]},
                     {"role": "tool", "tool_call_id": "c1", "content": "found"}],
    }  # fmt: skip
    expected = ok(served.client.post("/v1/chat/completions", json=chat))
    function = FIND["function"]
    anthropic = {
        "model": "hermes", "max_tokens": 4, "temperature": 0,
        "tools": [{"name": "find", "description": "Finds.", "input_schema": function["parameters"]}],
        "messages": [*USER, {"role": "assistant", "content": [
            {"type": "tool_use", "id": "c1", "name": "find", "input": {"n": 1}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "found"}]}],
    }  # fmt: skip
    message = ok(served.client.post("/v1/messages", json=anthropic))
    assert message["content"][0]["text"] == expected["choices"][0]["message"]["content"]
    assert message["usage"]["input_tokens"] == expected["usage"]["prompt_tokens"]
    responses = {
        "model": "hermes", "max_output_tokens": 4, "temperature": 0, "tools": [{"type": "function", **function}],
        "input": [*USER, {"type": "function_call", "call_id": "c1", "name": "find", "arguments": '{"n": 1}'},
                  {"type": "function_call_output", "call_id": "c1", "output": "found"}],
    }  # fmt: skip
    found = ok(served.client.post("/v1/responses", json=responses))
    assert found["output"][0]["content"][0]["text"] == expected["choices"][0]["message"]["content"]
    assert found["usage"]["input_tokens"] == expected["usage"]["prompt_tokens"]
    wrong = {**chat, "messages": [*chat["messages"][:-1], {"role": "tool", "tool_call_id": "c2", "content": "x"}]}
    assert served.client.post("/v1/chat/completions", json=wrong).status_code == 400


def test_a_call_in_the_other_protocols(served: Served) -> None:
    tool = {"name": "find", "input_schema": FIND["function"]["parameters"]}
    choice = {"type": "any", "disable_parallel_tool_use": True}
    body = {"model": "hermes", "messages": USER, "max_tokens": 120, "tools": [tool], "tool_choice": choice}
    found = ok(served.client.post("/v1/messages", json=body))
    assert found["stop_reason"] == "tool_use"
    for block in found["content"]:
        assert block["type"] == "tool_use"
        jsonschema.validate(block["input"], tool["input_schema"])
    events = list(streamed(served, "/v1/messages", {**body, "temperature": 0.0}))
    starts = [e["content_block"] for e in events if e["type"] == "content_block_start"]
    assert {start["type"] for start in starts} == {"tool_use"}
    deltas = [e["delta"] for e in events if e["type"] == "content_block_delta"]
    assert len(deltas) == len(starts)
    for delta in deltas:
        jsonschema.validate(json.loads(delta["partial_json"]), tool["input_schema"])
    responses = {
        "model": "hermes", "input": "a", "max_output_tokens": 120, "temperature": 0,
        "tool_choice": {"type": "function", "name": "find"},
        "tools": [{"type": "function", **FIND["function"]}],
    }  # fmt: skip
    whole = ok(served.client.post("/v1/responses", json=responses))
    assert {item["type"] for item in whole["output"]} == {"function_call"}
    last = list(streamed(served, "/v1/responses", responses))[-1]
    assert [item["arguments"] for item in last["response"]["output"]] == [i["arguments"] for i in whole["output"]]


def test_a_template_without_a_place_for_tools_has_them_in_plain_text(served: Served) -> None:
    """The prompt is that of a client who writes the list, the calls and the results into the messages."""
    call = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"n": 1}'}}
    asked: list[dict[str, Any]] = [
        *USER,
        {"role": "assistant", "content": "So:", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "found"},
        {"role": "user", "content": "and now"},
    ]
    listed = INSTRUCTION.format(tools=json.dumps(FIND["function"]))
    said = [
        {"role": "user", "content": f"{listed}\n\n{USER[0]['content']}"},
        {"role": "assistant", "content": 'So:\n{"name": "find", "arguments": {"n": 1}}'},
        {"role": "user", "content": "find returned:\nfound\n\nand now"},
    ]
    body = {"model": "plain", "max_tokens": 4, "temperature": 0}
    wanted = ok(served.client.post("/v1/chat/completions", json={**body, "messages": said}))
    found = ok(served.client.post("/v1/chat/completions", json={**body, "messages": asked, "tools": [FIND]}))
    assert (found["usage"], found["choices"]) == (wanted["usage"], wanted["choices"])
    system = {"role": "system", "content": "Be brief."}
    said = [{"role": "system", "content": f"Be brief.\n\n{listed}"}, *USER]
    wanted = ok(served.client.post("/v1/chat/completions", json={**body, "messages": said}))
    found = ok(served.client.post("/v1/chat/completions", json={**body, "messages": [system, *USER], "tools": [FIND]}))
    assert (found["usage"], found["choices"]) == (wanted["usage"], wanted["choices"])
    forced = ok(served.chat("plain", **FORCED, max_tokens=120, temperature=1, seed=3))["choices"][0]
    assert forced["finish_reason"] == "tool_calls"
    (called,) = forced["message"]["tool_calls"]
    jsonschema.validate(json.loads(called["function"]["arguments"]), FIND["function"]["parameters"])
    served.assert_idle()


def test_tools_that_cannot_be_are_refused(served: Served) -> None:
    for model, fields in (
        ("hermes", {"tools": [FIND, FIND]}),
        ("hermes", {"tools": [], "tool_choice": "required"}),
        ("hermes", {"tools": [FIND], "tool_choice": "always"}),
        ("hermes", {"tools": [FIND], "tool_choice": {"type": "function", "function": {"name": "fnid"}}}),
        ("hermes", {**FORCED, "response_format": FORMAT}),
    ):
        answer = served.chat(model, **fields)
        assert answer.status_code == 400, answer.text
    without = ok(served.chat("plain", tools=[FIND], tool_choice="none"))
    assert without["choices"] == ok(served.chat("plain"))["choices"]
    served.assert_idle()


# Thoughts ------------------------------------------------------------------------------------------------------------


def test_thoughts_are_apart(served: Served) -> None:
    """The prompt opens them, and nothing closes them here."""
    fields = {"chat_template_kwargs": {"enable_thinking": True}}
    message = ok(served.chat("hermes", **fields))["choices"][0]["message"]
    assert message["content"] == ""
    assert message["reasoning_content"]
    body = {"model": "hermes", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "temperature": 0}
    chunks = [
        c["choices"][0]["delta"] for c in streamed(served, "/v1/chat/completions", body | fields) if c != "[DONE]"
    ]
    assert "".join(chunk.get("reasoning_content", "") for chunk in chunks) == message["reasoning_content"]
    thinking = ok(
        served.client.post("/v1/messages", json={**body, "thinking": {"type": "enabled", "budget_tokens": 9}})
    )
    assert thinking["content"][0] == {"type": "thinking", "thinking": message["reasoning_content"], "signature": ""}
    off = ok(served.client.post("/v1/messages", json={**body, "thinking": {"type": "disabled"}}))
    assert off["content"][0]["type"] == "text"


@pytest.mark.parametrize("cut", [1, 2, 3, 7, 1000])
def test_parts_are_the_same_however_the_text_comes(cut: int) -> None:
    from graftlm.data.chat.render import Renderer

    renderer = Renderer(tiny_tokenizer())
    text = 'I think\nso</think>\nLook: <tool_call>\n{"name": "find", "arguments": {"n": 1}}\n</tool_call>'
    prompt = renderer.tokenizer("<think>\n")["input_ids"]
    for kind, length in ((HERMES, 29), (MISTRAL, None)):
        parts = Parts(Dialect(Tags("<think>", "</think>"), kind), renderer, prompt, {"find": {}}, plain=False)
        found = [part for at in range(0, len(text), cut) for part in parts.add(text[at : at + cut])] + parts.close()
        assert "".join(part.thought for part in found) == "I think\nso"
        calls = [part.call for part in found if part.call is not None]
        if length is None:  # another format: it stays text
            assert calls == []
            assert "".join(part.text for part in found) == text.partition("</think>\n")[2]
            continue
        assert "".join(part.text for part in found) == "Look:"
        (call,) = calls
        assert (call["name"], json.loads(call["arguments"])) == ("find", {"n": 1})
        assert len(call["id"]) == length
    whole = Parts(Dialect(Tags("<think>", "</think>"), PLAIN), renderer, prompt, {}, plain=True)
    assert "".join(part.text for part in [*whole.add(text), *whole.close()]) == text
