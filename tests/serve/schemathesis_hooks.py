"""Read by schemathesis (test_openapi.py): requests that the tiny model answers soon, and the shape of every error."""

import json
import os
from typing import Any
from zlib import crc32

import schemathesis

MODELS = ("hermes", "hermes", "plain", "tiny", "nobody")
LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
TALK = {"model": "plain", "messages": [{"role": "user", "content": "a"}], "max_tokens": 3}
RIGHT: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": TALK | {"tools": [{"type": "function", "function": {"name": "f"}}]},
    "/v1/messages": TALK | {"tools": [{"name": "f", "input_schema": {"type": "object"}}]},
    "/v1/messages/count_tokens": {"model": "plain", "messages": TALK["messages"]},
    "/v1/responses": {"model": "plain", "input": "a", "tools": [{"type": "function", "name": "f"}]},
    "/v1/completions": {"model": "plain", "prompt": "a", "max_tokens": 3},
}
"""Path -> a body that is answered by a model whose template has tools."""
INSIDE = (
    "arguments", "call_id", "content", "description", "effort", "format", "function", "id", "input", "input_schema",
    "json_schema", "name", "output", "parameters", "reasoning_content", "role", "schema", "strict", "text", "thinking",
    "tool_call_id", "tool_calls", "tool_use_id", "type",
)  # fmt: skip
"""Fields of the open objects: they may hold anything, and these are read."""
WORDS = {
    "role": ["user", "assistant", "system", "tool"],
    "type": [
        "text", "function", "custom", "tool", "any", "auto", "json_schema", "json_object", "message", "reasoning",
        "function_call", "function_call_output", "thinking", "tool_use", "tool_result", "enabled", "disabled",
    ],
}  # fmt: skip


def open_object(depth: int = 1) -> dict[str, Any]:
    """A schema of an object that may hold anything, and often holds what is read."""
    within = {"anyOf": [{"type": "string"}, {}, *([open_object(depth - 1)] if depth else [])]}
    properties: dict[str, Any] = dict.fromkeys(INSIDE, within)
    for name, words in WORDS.items():
        properties[name] = {"anyOf": [{"enum": words}, {"enum": words}, {}]}
    return {"type": "object", "properties": properties, "maxProperties": 5}


def opened(tree: Any) -> Any:
    """The schema with every open object replaced."""
    if isinstance(tree, list):
        return [opened(each) for each in tree]
    if not isinstance(tree, dict):
        return tree
    if tree.get("type") == "object" and tree.get("additionalProperties") is True:
        return open_object()
    return {name: opened(each) for name, each in tree.items()}


@schemathesis.hook
def before_load_schema(context: Any, raw_schema: dict[str, Any]) -> None:
    if os.environ["PHASE"] == "fuzzing":  # the other phase tries every combination of what a schema names
        raw_schema["components"]["schemas"] = opened(raw_schema["components"]["schemas"])


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """A model that there is, most of the time; a few tokens. Half of the bodies get right fields beside two of their
    own, as a body with ten random fields is refused for the first of them."""
    if not isinstance(body, dict):
        return body
    number = crc32(json.dumps(body, sort_keys=True, default=str).encode())
    right = RIGHT.get(context.operation.path)
    if right is not None and os.environ["PHASE"] == "fuzzing" and number % 2:
        own = sorted(body.keys() - {"model"})
        chosen = [own[number % len(own)], own[number // 7 % len(own)]] if own else []
        body = right | {name: body[name] for name in chosen}
    if isinstance(body.get("model"), str):
        body = body | {"model": MODELS[number // 2 % len(MODELS)]}
    for name in LENGTHS:
        if isinstance(body.get(name), int) and 3 < body[name] < 4096:
            body = body | {name: 3}
    if "chat" in context.operation.path and not any(name in body for name in LENGTHS):
        body = body | {"max_tokens": 3}
    if context.operation.path == "/v1/responses" and "max_output_tokens" not in body:
        body = body | {"max_output_tokens": 3}
    return body


@schemathesis.check
def errors_have_the_shape_of_their_protocol(ctx: Any, response: Any, case: Any) -> None:
    if response.status_code < 400 or response.request.method == "HEAD":
        return
    body, path = response.json(), response.request.path_url
    error = body["error"]
    if path.startswith("/v1/messages"):
        assert body.keys() == {"type", "error"}, body
        assert error.keys() == {"type", "message"}, body
    else:
        assert body.keys() == {"error"}, body
        assert error.keys() == {"message", "type", "param", "code"}, body
    assert error["type"], body
    assert error["message"], body
