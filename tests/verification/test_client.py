"""What servers say, in all forms that they have, and errors that name what to do."""

from typing import Any

import pytest

from graftlm.verification.client import Reply, Server, api_key, choose_model, read_reply
from tests.errors import raises


def answer(logprobs: Any, **usage: int) -> dict[str, Any]:
    return {"choices": [{"text": "a", "logprobs": logprobs}], "usage": usage}


@pytest.mark.parametrize(
    ("logprobs", "wanted"),
    [
        (None, []),
        ({"tokens": ["a"], "token_logprobs": [-1.0], "top_logprobs": None}, []),
        ({"top_logprobs": [{"a": -1.0, " b": -2}, {"c": -3}]}, [("a", -1.0), (" b", -2.0)]),
        ({"top_logprobs": [{"token_id:7": -1.0, "token_id:300": -2.5}]}, [(7, -1.0), (300, -2.5)]),
        ({"top_logprobs": [{"a": 0.0, "b": float("-inf"), "c": None, "d": -9999.0}]}, [("a", 0.0)]),
        ({"content": [{"token": "x", "logprob": -1, "top_logprobs": [{"token": "x", "logprob": -1}]}]}, [("x", -1.0)]),
        ({"content": [{"top_logprobs": [{"id": 5, "token": "x", "logprob": -1}]}]}, [(5, -1.0)]),
        ({"content": [{"top_logprobs": [{"token": "token_id:5", "logprob": -1}]}]}, [(5, -1.0)]),
        ({"content": [{"top_logprobs": []}]}, []),
    ],
)  # fmt: skip
def test_every_form_of_log_probabilities_is_read(logprobs: Any, wanted: list[tuple[int | str, float]]) -> None:
    assert read_reply(answer(logprobs, prompt_tokens=4)) == Reply(wanted, "a", 4)


def test_a_message_is_read_as_a_text_is() -> None:
    assert read_reply({"choices": [{"message": {"content": "hi"}}]}) == Reply([], "hi", None)
    assert read_reply({"choices": [{"message": {"content": None}}]}) == Reply([], "", None)


def test_probabilities_are_not_taken_for_their_logarithms() -> None:
    with pytest.raises(ValueError, match="above 0"):
        read_reply(answer({"top_logprobs": [{"a": 0.7, "b": 0.2}]}))


BASE = {"id": "base"}


@pytest.mark.parametrize(
    ("listed", "wanted", "found"),
    [
        ([], "x", "x"),
        ([BASE, {"id": "parcels"}, {"id": "b"}], None, "parcels"),
        ([BASE, {"id": "base:parcels"}, {"id": "b"}], None, "base:parcels"),
        ([BASE, {"id": "lora-1", "parent": "base"}], None, "lora-1"),
        ([{"id": "/models/base.gguf"}], None, "/models/base.gguf"),
        ([BASE, {"id": "parcels"}], "base", "base"),
    ],
)
def test_the_model_is_the_one_that_can_be_meant(listed: list[dict[str, str]], wanted: str | None, found: str) -> None:
    assert choose_model(listed, "parcels", wanted) == found


@pytest.mark.parametrize("parents", [{}, {"parent": "base"}])
def test_of_several_models_one_must_be_named(parents: dict[str, str]) -> None:
    with raises("data/unknown-model", match=r"--model.*parcel2"):
        choose_model([BASE, {"id": "parcel2", **parents}, {"id": "b", **parents}], "parcels", None)


def test_a_url_without_a_path_is_completed() -> None:
    for url in (
        "http://localhost:8000",
        "http://localhost:8000/",
        "http://localhost:8000/v1",
        "http://localhost:8000/v1/",
    ):
        assert Server(url, None, timeout=1).url == "http://localhost:8000/v1"
    assert Server("http://localhost:8000/api/v3", None, timeout=1).url == "http://localhost:8000/api/v3"


def test_a_key_goes_to_another_machine_or_where_it_was_named_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("OTHER", "other")
    monkeypatch.delenv("EMPTY", raising=False)
    assert api_key("http://localhost:8000/v1", None) is None
    assert api_key("https://host.invalid/v1", None) == "secret"
    assert api_key("http://localhost:8000/v1", "OTHER") == "other"
    with raises("data/missing-api-key", match="EMPTY"):
        api_key("http://localhost:8000/v1", "EMPTY")
    with raises("data/invalid-url", match="localhost:8000"):
        api_key("localhost:8000/v1", None)
