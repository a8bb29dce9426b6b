"""What is refused, and in which shape: keys, hosts, bodies, fields, names, limits. Never a failure of the server."""

import json
import random
import string
from pathlib import Path
from typing import Any

import httpx
import pytest

from graftlm.serve.errors import ApiError
from graftlm.serve.limits import parse_object
from graftlm.serve.protocol import ChatRequest
from graftlm.serve.security import is_loopback
from tests.serve.conftest import Served

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2, "temperature": 0}
OPENAI = {"message", "type", "param", "code"}


def check_shape(answer: httpx.Response, status: int, path: str = "") -> dict[str, Any]:
    """The error in an answer, which has the shape of its protocol."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    error: dict[str, Any] = body["error"]
    if path.startswith("/v1/messages"):
        assert body["type"] == "error"
        assert error.keys() == {"type", "message"}
    else:
        assert body.keys() == {"error"}
        assert error.keys() == OPENAI
    assert error["message"]
    assert error["type"]
    return error


def paths(served: Served) -> list[tuple[str, str]]:
    """(method, path) of every route."""
    found = [(m, r.path.replace("{model:path}", "tiny")) for r in served.app.routes for m in r.methods]
    assert len(found) >= 14
    return found


# Keys and hosts ------------------------------------------------------------------------------------------------------


def test_every_route_but_health_wants_a_key(limited: Any) -> None:
    served = limited(keys=["first", "second"], allow_adapter_changes=True)
    for method, path in [*paths(served), ("GET", "/nowhere"), ("POST", "/v1/models/../x")]:
        for headers in ({}, {"authorization": "Bearer third"}, {"authorization": "Bearer "}, {"x-api-key": "firs"}):
            answer = served.client.request(method, path, headers=headers, json={})
            if path in ("/health", "/"):  # the page holds nothing secret (tests/serve/page)
                assert answer.status_code == 200
            else:
                assert check_shape(answer, 401, path)["type"] == "authentication_error"
                assert answer.headers["www-authenticate"] == "Bearer"
        for headers in ({"authorization": "Bearer first"}, {"x-api-key": "second"}, {"authorization": "bearer second"}):
            assert served.client.request(method, path, headers=headers, json={}).status_code != 401


def test_keys_are_compared_whole_and_in_constant_time(limited: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from graftlm.serve import security

    compared = []
    monkeypatch.setattr(security.hmac, "compare_digest", lambda a, b: compared.append((len(a), len(b))) or a == b)
    served = limited(keys=["a", "bb", "ccc"])
    assert served.client.get("/v1/models", headers={"x-api-key": "a"}).status_code == 200
    assert compared == [(32, 32)] * 3  # all of them, though the first one matches


def test_without_a_key_other_hosts_are_refused(limited: Any) -> None:
    served = limited()
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", ""):
        assert check_shape(served.client.get("/v1/models", headers={"host": host}), 403)["code"] == "other_host"
    for host in ("localhost", "localhost:8000", "127.0.0.1:80", "[::1]:8000"):
        assert served.client.get("/v1/models", headers={"host": host}).status_code == 200
    with_key = limited(keys=["k"])
    assert with_key.client.get("/v1/models", headers={"host": "a.example", "x-api-key": "k"}).status_code == 200
    wide = limited(loopback_only=False)
    assert wide.client.get("/v1/models", headers={"host": "a.example"}).status_code == 200


@pytest.mark.parametrize(
    ("host", "here"), [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("LOCALHOST", True), ("0.0.0.0", False),
                       ("localhost.evil.example", False), ("10.0.0.1", False), ("::", False)],
)  # fmt: skip
def test_loopback_hosts(host: str, here: bool) -> None:
    assert is_loopback(host) is here


def test_no_answer_allows_other_origins(served: Served) -> None:
    answer = served.client.get("/v1/models", headers={"origin": "https://evil.example"})
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert check_shape(served.client.options("/v1/chat/completions"), 405)


# Bodies --------------------------------------------------------------------------------------------------------------

BODIES = {
    "nothing": b"",
    "no JSON": b"{",
    "a list": b"[]",
    "a text": b'"x"',
    "null": b"null",
    "not UTF-8": b'{"model": "\xff"}',
    "overlong UTF-8": b'{"model": "\xc0\xaf"}',
    "a surrogate": rb'{"model": "\ud800"}',
    "a surrogate as a key": rb'{"\udfff": 1}',
    "NaN": b'{"temperature": NaN}',
    "infinity": b'{"temperature": -Infinity}',
    "1e999": b'{"temperature": 1e999}',
    "a huge integer": b'{"seed": 1' + b"0" * 400 + b"}",
    "thousands of digits": b'{"seed": 1' + b"0" * 5000 + b"}",
    "deep lists": b'{"messages": ' + b"[" * 200 + b"]" * 200 + b"}",
    "very deep lists": b"[" * 100_000 + b"]" * 100_000,
    "deep objects": b'{"a":' * 100 + b"1" + b"}" * 100,
    "UTF-16": '{"model": "tiny"}'.encode("utf-16"),
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_a_body_that_is_none_is_the_clients_mistake(served: Served, body: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/messages", "/v1/load_lora_adapter"):
        headers = {"content-type": "application/json"}
        check_shape(served.client.post(path, content=body, headers=headers), 400, path)
    served.assert_idle()


def test_other_content_types_are_refused(served: Served) -> None:
    for headers in ({}, {"content-type": "text/plain"}, {"content-type": "application/x-www-form-urlencoded"}):
        answer = served.client.post("/v1/chat/completions", content=json.dumps(CHAT), headers=headers)
        check_shape(answer, 415)
    typed = {"content-type": "Application/JSON; charset=utf-8"}
    assert served.client.post("/v1/chat/completions", content=json.dumps(CHAT), headers=typed).status_code == 200


def test_a_large_body_is_refused_however_it_comes(limited: Any) -> None:
    served = limited({"body_bytes": 1000})
    large = json.dumps({**CHAT, "user": "x" * 1000})
    read: list[int] = []

    def parts() -> Any:
        for number in range(1000):
            read.append(number)
            yield b" " * 100

    headers = {"content-type": "application/json"}
    for content in (large, parts()):
        answer = served.client.post("/v1/chat/completions", content=content, headers=headers)
        assert check_shape(answer, 413)["type"] == "request_too_large"
    lying = served.client.post("/v1/chat/completions", content=large, headers={**headers, "content-length": "10"})
    assert lying.status_code in (400, 413)
    fitting = json.dumps({**CHAT, "user": "x" * 100})
    assert served.client.post("/v1/chat/completions", content=fitting, headers=headers).status_code == 200


def test_depth_is_counted_exactly() -> None:
    assert parse_object(b'{"a": [[1]]}', 3) == {"a": [[1]]}
    with pytest.raises(ApiError, match="deeper than 2"):
        parse_object(b'{"a": [[1]]}', 2)


# Fields --------------------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a misspelt field": ({"temprature": 1}, "temprature"),
    "a field of another route": ({"prompt": "x"}, "prompt"),
    "a number as text": ({"max_tokens": "2"}, "max_tokens"),
    "a flag as a number": ({"stream": 1}, "stream"),
    "a number as a flag": ({"max_tokens": True}, "max_tokens"),
    "no tokens": ({"max_tokens": 0}, "max_tokens"),
    "negative tokens": ({"max_tokens": -1}, "max_tokens"),
    "two limits": ({"max_completion_tokens": 3}, "max_tokens"),
    "too hot": ({"temperature": 1e6}, "temperature"),
    "cold": ({"temperature": -1}, "temperature"),
    "no nucleus": ({"temperature": 1, "top_p": 0}, "top_p"),
    "no answers": ({"n": 0}, "n"),
    "too many answers": ({"n": 10_000}, "n"),
    "an empty stop": ({"stop": ["a", ""]}, "stop"),
    "many stops": ({"stop": ["a"] * 50}, "stop"),
    "usage without a stream": ({"stream_options": {"include_usage": True}}, "stream_options"),
    "logprobs of nothing": ({"top_logprobs": 2}, "top_logprobs"),
    "no messages": ({"messages": []}, "messages"),
    "a role that is none": ({"messages": [{"role": "usr", "content": "x"}]}, "messages"),
    "no role": ({"messages": [{"content": "x"}]}, "messages"),
    "no content": ({"messages": [{"role": "user"}]}, "messages"),
    "a picture": ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
                  "messages[0].content"),
    "an unknown field of a message": ({"messages": [{"role": "user", "content": "x", "weight": 0}]},
                                      "messages[0].weight"),
    "an answer at the end": ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
                             "messages"),
    "a tool that is no function": ({"tools": [{"type": "web_search"}]}, "tools"),
    "a tool without a name": ({"tools": [{"type": "function", "function": {}}]}, "tools"),
    "a choice of no tool": ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
    "an unknown variable": ({"chat_template_kwargs": {"enable_thinking": True}}, "enable_thinking"),
    "a reserved variable": ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    "an effort that nobody reads": ({"reasoning_effort": "high"}, "reasoning_effort"),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), WRONG.values(), ids=WRONG)
def test_a_wrong_field_is_named(served: Served, fields: dict[str, Any], param: str) -> None:
    error = check_shape(served.client.post("/v1/chat/completions", json=CHAT | fields), 400)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    served.assert_idle()


def test_a_misspelt_field_is_told_what_is_near(served: Served) -> None:
    answer = served.client.post("/v1/chat/completions", json=CHAT | {"temprature": 1})
    assert "'temperature'" in answer.json()["error"]["message"]


def test_fields_that_change_nothing_are_ignored(served: Served) -> None:
    fields = dict.fromkeys(ChatRequest.IGNORED, "x")
    plain = served.client.post("/v1/chat/completions", json=CHAT).json()
    answer = served.client.post("/v1/chat/completions", json=CHAT | fields).json()
    assert answer["choices"] == plain["choices"]
    nulls = dict.fromkeys(set(ChatRequest.model_fields) - set(CHAT))
    assert served.client.post("/v1/chat/completions", json=CHAT | nulls).json()["choices"] == plain["choices"]


def test_a_prompt_beyond_the_context_is_refused(served: Served) -> None:
    long = served.chat(content="a b " * 400)
    assert check_shape(long, 400)["code"] == "context_length_exceeded"
    answer = served.chat(max_tokens=600)
    assert check_shape(answer, 400)["code"] == "context_length_exceeded"
    served.assert_idle()


def test_a_system_message_that_the_template_refuses(served: Served) -> None:
    answer = served.client.post("/v1/chat/completions", json=CHAT | {"messages": [{"role": "tool", "content": "x"}]})
    assert answer.status_code < 500


FUNCTION = {"name": "f", "parameters": {"type": "object"}}
WITHIN: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"response_format": {"type": "json_schema", "json_schema": 5}}),
    ("/v1/chat/completions", {"tools": [{"type": "function", "function": FUNCTION}], "tool_choice": {"function": "f"}}),
    ("/v1/completions", {"prompt": "a", "response_format": {"type": "json_schema", "json_schema": True}}),
    ("/v1/responses", {"input": "a", "text": {"format": 1.5}}),
    ("/v1/responses", {"input": "a", "text": {"format": ["json_object"]}}),
    ("/v1/responses", {"input": "a", "tools": [{"type": "function", **FUNCTION}], "tool_choice": {"function": ["f"]}}),
    ("/v1/responses", {"input": [{"type": "reasoning", "content": 5}, {"role": "user", "content": "a"}]}),
    ("/v1/responses", {"input": [{"type": "reasoning", "content": ["a"]}, {"role": "user", "content": "a"}]}),
    ("/v1/responses", {"input": [{"type": "reasoning", "content": [{"text": 5}]}, {"role": "user", "content": "a"}]}),
    ("/v1/messages", {"output_config": {"format": [[]]}}),
    ("/v1/messages", {"tools": [{"name": "f"}], "tool_choice": {"type": {}}}),
    ("/v1/messages", {"tools": [{"name": "f"}], "tool_choice": {"type": "tool", "function": "f"}}),
]


@pytest.mark.parametrize(("path", "fields"), WITHIN)
def test_what_is_within_a_field_has_its_type(served: Served, path: str, fields: dict[str, Any]) -> None:
    """The schema of a request leaves these open; what reads them does not."""
    body = CHAT if "messages" in path or "chat" in path else {}
    error = check_shape(served.client.post(path, json=body | {"model": "hermes"} | fields), 400, path)
    if "param" in error:
        assert error["param"].partition(".")[0].partition("[")[0] in fields
    served.assert_idle()


# Routes and names ----------------------------------------------------------------------------------------------------


def test_unknown_routes_and_methods(served: Served) -> None:
    assert "/v1/chat/completions" in check_shape(served.client.get("/v1/chat/completion"), 404)["message"]
    assert check_shape(served.client.put("/v1/messages"), 405, "/v1/messages")
    assert check_shape(served.client.delete("/v1/models"), 405)
    assert check_shape(served.client.get("/v1/messages/x"), 404, "/v1/messages")


def test_an_unknown_model_is_told_what_is_near(served: Served) -> None:
    for model in ("plian", "tiny:plian", "other:plain", "", "tiny:", "Tiny", " tiny"):
        for path in ("/v1/chat/completions", "/v1/messages"):
            check_shape(served.client.post(path, json=CHAT | {"model": model}), 404, path)
    error = check_shape(served.chat("plian"), 404)
    assert "'plain'" in error["message"]
    assert error["param"] == "model"
    served.assert_idle()


def test_routes_that_change_adapters_need_an_option(limited: Any) -> None:
    served = limited()
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        check_shape(served.client.post(path, json={"lora_name": "plain", "lora_path": "plain"}), 404)


def hostile_names(library: Path) -> list[str]:
    """200 names that lead elsewhere, or nowhere."""
    inside = ["plain", "bot"]
    fixed = [
        "", ".", "..", "/", "//", "\\", "~", "*", "?", "%2e%2e", "..%2fplain", "plain/", "./plain", "/plain", "plain/.",
        "plain/../bot", "../library/plain", str(library), str(library / "plain"), "plain\x00", "\x00", "plain\n",
        " plain", "plain ", "PLAIN", "..\\plain", "C:\\plain", "file:///plain", "http://127.0.0.1/plain",
        "$HOME", "`id`", "a" * 5000, "plaın", "ｐｌａｉｎ", "..／plain", "link", "linked",
        "plain/adapter_config.json", "con", "-rf",
        ".hidden", "bot/../plain",
    ]  # fmt: skip
    chosen = random.Random(0)
    parts = ["..", ".", "/", "\\", "plain", "bot", "%2f", "\x00", "~", " ", "library", "tiny", "etc", "passwd", "://"]
    while len(set(fixed)) < 200:
        name = "".join(chosen.choices(parts, k=chosen.randint(2, 6)))
        fixed += [name] if name not in inside else []
    return list(dict.fromkeys(fixed))


def test_no_name_leads_out_of_the_folder_of_adapters(served: Served, tmp_path: Path) -> None:
    (served.library / "link").symlink_to(served.library / "plain", target_is_directory=True)
    (tmp_path / "outside").mkdir()
    (served.library / "linked").symlink_to(tmp_path / "outside", target_is_directory=True)
    before = served.service.catalog.names
    names = hostile_names(served.library)
    assert len(names) >= 200
    try:
        for name in names:
            answer = served.client.post("/v1/load_lora_adapter", json={"lora_name": "new", "lora_path": name})
            error = check_shape(answer, 400)
            assert str(served.library.parent) not in error["message"].replace(name, "").replace(repr(name)[1:-1], "")
            answer = served.client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": "plain"})
            if answer.status_code == 200:
                assert set(name) <= set(string.ascii_letters + string.digits + "._-")
                served.client.post("/v1/unload_lora_adapter", json={"lora_name": name})
            else:
                check_shape(answer, 400)
            check_shape(served.client.post("/v1/unload_lora_adapter", json={"lora_name": name}), 404)
            check_shape(served.chat(name), 404 if len(name) <= 512 else 400)
    finally:
        (served.library / "link").unlink()
        (served.library / "linked").unlink()
    assert served.service.catalog.names == before
    served.assert_idle()


def test_no_answer_shows_a_path_of_the_server(served: Served) -> None:
    for path in ("/v1/models", "/v1/models/plain", "/v1/models/tiny", "/health", "/metrics"):
        assert str(served.library.parent) not in served.client.get(path).text


# Limits --------------------------------------------------------------------------------------------------------------


def test_a_full_queue_is_refused_with_a_time_to_come_back(limited: Any) -> None:
    served = limited({"queue": 1}, max_requests=2)
    served.service.enter(3)
    answer = served.chat()
    assert check_shape(answer, 429)["type"] == "rate_limit_error"
    assert int(answer.headers["retry-after"]) >= 1
    served.service.leave(1)
    assert served.chat().status_code == 200
    assert served.chat(n=2).status_code == 429
    served.service.leave(2)
    served.assert_idle()


def test_an_answer_that_takes_too_long_is_an_error(limited: Any) -> None:
    served = limited({"timeout": 0.0})
    error = check_shape(served.chat(), 504)
    assert error["type"] == "timeout_error"
    served.assert_idle()


def test_while_it_drains_a_server_refuses_what_is_new(limited: Any) -> None:
    served = limited()
    served.service.draining = True
    answer = served.chat()
    assert check_shape(answer, 503)["code"] == "shutting_down"
    assert answer.headers["retry-after"]
    assert served.client.get("/health").status_code == 503


def test_a_failure_of_the_model_is_500_without_its_insides(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("/secret/place")

    with monkeypatch.context() as patched:
        patched.setattr("graftlm.generation.engine.pass_over", fail)
        answer = served.chat()
        assert check_shape(answer, 500)["type"] == "api_error"
        assert "secret" not in answer.text
        streamed = served.chat(stream=True)
        assert "secret" not in streamed.text
        assert '"internal_error"' in streamed.text
    with monkeypatch.context() as patched:
        patched.setattr("graftlm.serve.chat.talk_of", fail)
        assert check_shape(served.chat(), 500)["code"] == "internal_error"
    served.assert_idle()
    assert served.chat().status_code == 200
