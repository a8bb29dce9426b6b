"""GET /openapi.json: the routes of a server and the bodies that they read, in OpenAPI 3.1.

A schema says which fields there are and what each may be. It does not say which go together, what chat template a model
has, or what is in a field that is an open object: a request can fit its schema and be refused with 400.
"""

import re
from collections.abc import Iterable
from typing import Any

from pydantic.json_schema import models_json_schema

from graftlm import __version__
from graftlm.serve import protocol
from graftlm.serve.errors import MESSAGES

BODIES: dict[str, type[protocol.Body]] = {
    "/v1/chat/completions": protocol.ChatRequest,
    "/v1/completions": protocol.CompletionRequest,
    "/v1/embeddings": protocol.EmbeddingRequest,
    "/v1/messages": protocol.MessagesRequest,
    "/v1/messages/count_tokens": protocol.CountRequest,
    "/v1/responses": protocol.ResponsesRequest,
    "/tokenize": protocol.TokenizeRequest,
    "/detokenize": protocol.DetokenizeRequest,
    "/v1/load_lora_adapter": protocol.LoadRequest,
    "/v1/unload_lora_adapter": protocol.UnloadRequest,
}
"""Path -> the body that a POST to it reads."""

TEXT = {"type": "string"}
ERRORS: dict[str, Any] = {
    "Error": {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {"message": TEXT, "type": TEXT, "param": {"type": ["string", "null"]}, "code": TEXT},
            }
        },
    },
    "MessagesError": {
        "type": "object",
        "required": ["type", "error"],
        "properties": {
            "type": {"const": "error"},
            "error": {
                "type": "object",
                "required": ["type", "message"],
                "properties": {"type": TEXT, "message": TEXT},
            },
        },
    },
}
"""What every answer from 400 on is: OpenAI's error, or Anthropic's under /v1/messages."""


def document(gets: Iterable[str], posts: Iterable[str], *, keys: bool, open_paths: frozenset[str]) -> dict[str, Any]:
    """The description of these routes. `keys`: whether a key is needed, on all but `open_paths`."""
    posts = list(posts)
    kinds = list(dict.fromkeys(BODIES[path] for path in posts))
    _, found = models_json_schema([(kind, "validation") for kind in kinds], ref_template=_ref("{model}"))
    schemas = found.get("$defs", {})
    for kind in kinds:
        ignored = {name: {"description": "Ignored: it changes no answer."} for name in sorted(kind.IGNORED)}
        schemas[kind.__name__]["properties"] |= ignored
    paths: dict[str, Any] = {}
    for path in gets:
        operation = _operation(path, ["*/*"])
        if path in open_paths:
            operation["security"] = []
        paths.setdefault(_template(path), {})["get"] = operation
    for path in posts:
        streams = "stream" in BODIES[path].model_fields
        operation = _operation(path, ["application/json", *(["text/event-stream"] if streams else [])])
        schema = {"$ref": _ref(BODIES[path].__name__)}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
        paths.setdefault(_template(path), {})["post"] = operation
    schemes = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "graft serve", "version": __version__, "description": (__doc__ or "").partition("\n\n")[2]},
        "paths": paths,
        "components": {"schemas": {**schemas, **ERRORS}, **({"securitySchemes": schemes} if keys else {})},
        **({"security": [{"bearer": []}, {"header": []}]} if keys else {}),
    }


def _ref(name: str) -> str:
    return f"#/components/schemas/{name}"


def _template(path: str) -> str:
    """A route's path without the kinds of its parameters."""
    return re.sub(r"\{(\w+):\w+\}", r"{\1}", path)


def _operation(path: str, kinds: list[str]) -> dict[str, Any]:
    error = {"$ref": _ref("MessagesError" if path.startswith(MESSAGES) else "Error")}
    refused = {"description": "The request is refused, or failed", "content": {"application/json": {"schema": error}}}
    responses = {"200": {"description": "The answer", "content": {kind: {} for kind in kinds}}, "default": refused}
    names = re.findall(r"\{(\w+)", path)
    parameters = [{"name": name, "in": "path", "required": True, "schema": TEXT} for name in names]
    return {"responses": responses} | ({"parameters": parameters} if parameters else {})
