"""/v1/chat/completions: the answers of `graftlm.answer`, whole and streamed, alone and in company."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import graftlm
from graftlm.adapters.load import load_adapter
from graftlm.hub.load import load_base
from tests.serve.conftest import ADAPTERS, Served, events_of

MODELS = ("tiny", *ADAPTERS)
QUESTION = "the user asks"


@pytest.fixture(scope="module")
def expected(served: Served) -> dict[str, str]:
    """What `graftlm.answer` says, with a model of its own."""
    found = {}
    for name in MODELS:
        model, tokenizer = load_base(str(served.library.parent / "tiny"), dtype="float32")
        if name != "tiny":
            load_adapter(model, served.library / name)
        found[name] = graftlm.answer(model, tokenizer, QUESTION, max_new_tokens=8)
    return found


def streamed(served: Served, **fields: Any) -> list[Any]:
    body = {"max_tokens": 8, "temperature": 0, "stream": True, **fields}
    with served.client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        return events_of(response.iter_lines())


def test_the_models_of_this_file_answer_differently(expected: dict[str, str]) -> None:
    assert len(set(expected.values())) == len(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_a_greedy_answer_is_that_of_the_library(served: Served, expected: dict[str, str], name: str) -> None:
    answer = served.chat(name, QUESTION)
    (choice,) = answer.json()["choices"]
    assert choice["message"]["content"] == expected[name]
    fingerprint = next(
        each["fingerprint"] for each in served.client.get("/v1/models").json()["data"] if each["id"] == name
    )
    assert answer.headers["x-graft-adapter"] == f"{name}@{fingerprint}"
    qualified = served.chat(f"tiny:{name}" if name != "tiny" else name, QUESTION)
    assert qualified.json()["choices"][0]["message"]["content"] == expected[name]
    assert qualified.headers["x-graft-adapter"] == answer.headers["x-graft-adapter"]
    served.assert_idle()


@pytest.mark.parametrize("name", MODELS)
def test_a_stream_is_the_same_answer(served: Served, expected: dict[str, str], name: str) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    *chunks, last, done = streamed(served, model=name, messages=messages, stream_options={"include_usage": True})
    whole = served.chat(name, QUESTION).json()
    assert done == "[DONE]"
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == expected[name]
    assert [c["choices"][0]["finish_reason"] for c in chunks if c["choices"][0]["finish_reason"]] == [
        whole["choices"][0]["finish_reason"]
    ]
    assert len({chunk["id"] for chunk in [*chunks, last]}) == 1
    served.assert_idle()


def test_mixed_requests_at_once_are_each_as_alone(served: Served, expected: dict[str, str]) -> None:
    names = [name for name in MODELS for _ in range(5)]
    with ThreadPoolExecutor(len(names)) as threads:
        answers = list(threads.map(lambda name: served.chat(name, QUESTION), names))
    assert [each.json()["choices"][0]["message"]["content"] for each in answers] == [expected[name] for name in names]
    assert [each.headers["x-graft-adapter"].partition("@")[0] for each in answers] == names
    served.assert_idle()


def test_more_adapters_than_slots_take_turns(limited: Any, expected: dict[str, str]) -> None:
    served = limited(slots=1)
    names = [name for _ in range(4) for name in MODELS]
    with served.client, ThreadPoolExecutor(len(names)) as threads:
        answers = list(threads.map(lambda name: served.chat(name, QUESTION), names))
    assert [each.json()["choices"][0]["message"]["content"] for each in answers] == [expected[name] for name in names]
    served.assert_idle()


def test_several_samples_have_seeds_one_after_the_other(served: Served) -> None:
    one = [served.chat("plain", temperature=1, seed=seed).json()["choices"][0]["message"] for seed in (7, 8, 9)]
    together = served.chat("plain", temperature=1, seed=7, n=3).json()
    assert [choice["message"] for choice in together["choices"]] == one
    assert [choice["index"] for choice in together["choices"]] == [0, 1, 2]
    assert len({each["content"] for each in one}) > 1
    messages = [{"role": "user", "content": "hello"}]
    texts = ["", "", ""]
    for chunk in streamed(served, model="plain", messages=messages, temperature=1, seed=7, n=3)[:-1]:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == [each["content"] for each in one]


def test_without_a_seed_samples_differ(served: Served) -> None:
    assert len({served.chat("plain", temperature=1).json()["choices"][0]["message"]["content"] for _ in range(4)}) > 1


def test_a_text_that_stops_is_not_in_the_answer(served: Served, expected: dict[str, str]) -> None:
    text = expected["plain"]
    stop = text[2:4]
    assert text.find(stop) >= 0
    answer = served.chat("plain", QUESTION, stop=stop).json()["choices"][0]
    assert answer["message"]["content"] == text[: text.find(stop)]
    assert answer["finish_reason"] == "stop"
    messages = [{"role": "user", "content": QUESTION}]
    chunks = streamed(served, model="plain", messages=messages, stop=[stop])[:-1]
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == text[: text.find(stop)]


def test_usage_counts_tokens(served: Served) -> None:
    usage = served.chat("tiny", QUESTION).json()["usage"]
    counted = served.client.post(
        "/tokenize", json={"model": "tiny", "messages": [{"role": "user", "content": QUESTION}]}
    ).json()
    assert usage["prompt_tokens"] == counted["count"] == len(counted["tokens"])
    assert usage["completion_tokens"] == 8
    assert usage["total_tokens"] == usage["prompt_tokens"] + 8
