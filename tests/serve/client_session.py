"""Run by test_clients.py, with one version of each client: python client_session.py URL. Prints what it found."""

import sys
from typing import Any

import anthropic
import openai
import pytest

URL, KEY = sys.argv[1], "k"
USER: list[Any] = [{"role": "user", "content": "the user asks"}]
PARAMETERS = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["n"],
    "additionalProperties": False,
}
GREEDY: dict[str, Any] = {"max_tokens": 8, "temperature": 0}


def openai_session() -> str:
    client: Any = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0)
    assert [model.id for model in client.models.list()][0] == "tiny"
    chat = client.chat.completions.create
    text = chat(model="plain", messages=USER, **GREEDY).choices[0].message.content
    chunks = chat(model="plain", messages=USER, stream=True, stream_options={"include_usage": True}, **GREEDY)
    found = list(chunks)
    assert "".join(c.choices[0].delta.content or "" for c in found if c.choices) == text
    assert found[-1].usage.completion_tokens == 8
    tool = {"type": "function", "function": {"name": "find", "parameters": PARAMETERS}}
    choice = {"type": "function", "function": {"name": "find"}}
    called = chat(model="hermes", messages=USER, max_tokens=100, tools=[tool], tool_choice=choice).choices[0]
    assert called.finish_reason == "tool_calls"
    (call,) = called.message.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": "x"}
    assert chat(model="hermes", messages=[*USER, called.message, result], tools=[tool], **GREEDY).choices
    logprobs = chat(model="plain", messages=USER, logprobs=True, top_logprobs=2, **GREEDY).choices[0].logprobs
    assert len(logprobs.content) == 8
    assert len(client.embeddings.create(model="plain", input="a").data[0].embedding) == 32
    assert client.completions.create(model="plain", prompt="a", logprobs=1, **GREEDY).choices[0].logprobs.tokens
    respond = {"model": "plain", "input": "the user asks", "max_output_tokens": 8, "temperature": 0}
    assert client.responses.create(**respond).output_text == text
    deltas = [
        e.delta for e in client.responses.create(**respond, stream=True) if e.type == "response.output_text.delta"
    ]
    assert "".join(deltas) == text
    form = {"format": {"type": "json_schema", "name": "x", "schema": PARAMETERS}}
    with client.responses.stream(**{**respond, "max_output_tokens": 60}, text=form) as stream:
        assert list(stream)[-1].type == "response.completed"
        assert stream.get_final_response().output_text.startswith('{"n": ')
    for fields, kind in (
        ({"model": "nobody"}, openai.NotFoundError),
        ({"model": "plain", "n": 99}, openai.BadRequestError),
    ):
        with pytest.raises(kind) as caught:
            chat(messages=USER, **fields)
        assert caught.value.code
        assert caught.value.param
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{URL}/v1", api_key="other", max_retries=0).models.list()
    return str(text)


def anthropic_session(text: str) -> None:
    client: Any = anthropic.Anthropic(base_url=URL, api_key=KEY, max_retries=0)
    asked: dict[str, Any] = {"model": "plain", "max_tokens": 8, "messages": USER, "extra_body": {"temperature": 0}}
    assert client.messages.create(**asked).content[0].text == text
    with client.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == text
        final = stream.get_final_message()
    assert final.stop_reason == "max_tokens"
    assert final.usage.output_tokens == 8
    count = client.messages.count_tokens(model="plain", messages=USER).input_tokens
    assert count == final.usage.input_tokens
    tool = {"name": "find", "input_schema": PARAMETERS}
    forced = {"type": "tool", "name": "find"}
    called = client.messages.create(model="hermes", max_tokens=100, messages=USER, tools=[tool], tool_choice=forced)
    assert called.stop_reason == "tool_use"
    (use,) = called.content
    assert 0 <= use.input["n"] <= 9
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "x"}
    messages = [*USER, {"role": "assistant", "content": called.content}, {"role": "user", "content": [result]}]
    assert client.messages.create(model="hermes", max_tokens=4, tools=[tool], messages=messages).content
    assert [model.id for model in client.models.list()][0] == "tiny"
    with pytest.raises(anthropic.NotFoundError) as caught:
        client.messages.create(model="nobody", max_tokens=1, messages=USER)
    assert caught.value.body["error"]["type"] == "not_found_error"


if __name__ == "__main__":
    anthropic_session(openai_session())
    print(f"openai {openai.__version__}, anthropic {anthropic.__version__}")
