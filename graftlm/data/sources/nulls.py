"""Nulls that a table put into calls and schemas of tools, and that tell nothing.

In a table (Arrow, parquet) the mappings of one column all have the same keys, so a call has the arguments of all other
calls too, with null, and a schema the properties of all others. Read back from parquet or written as JSON they would be
trained as if somebody had said them. A null that the schema of its own tool allows or requires stays.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from graftlm.data.sources.messages import Fields, Message

VALUES = ("default", "const")
"""Keys of a schema whose value may be null where null is a value of its type."""


def without_nulls(value: Any) -> Any:
    """The value without keys whose value is null, at any depth."""
    if isinstance(value, Mapping):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def clean_tools(tools: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
    """The tools without the nulls in their schemas."""
    return tuple(_schema(tool) for tool in tools) if any(map(_has_null, tools)) else tools


def clean_calls(messages: list[Message], tools: tuple[dict[str, Any], ...]) -> list[Message]:
    """The messages, their calls without null arguments that the schema of the tool does not allow or require."""
    if not any(_has_null(call) for message in messages for call in message.tool_calls):
        return messages
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools}

    def cleaned(call: Fields) -> dict[str, Any]:
        function = call["function"]
        rest = without_nulls({key: value for key, value in call.items() if key != "function"})
        arguments = _arguments(function["arguments"], schemas.get(function["name"]))
        return {**rest, "function": {**function, "arguments": arguments}}

    return [
        replace(message, tool_calls=tuple(map(cleaned, message.tool_calls))) if message.tool_calls else message
        for message in messages
    ]


def _has_null(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(inner is None or _has_null(inner) for inner in value.values())
    return any(map(_has_null, value)) if isinstance(value, list) else False


def _arguments(value: Any, schema: Any) -> Any:
    schema = schema if isinstance(schema, Mapping) else {}
    if isinstance(value, list):
        return [_arguments(inner, schema.get("items")) for inner in value]
    if not isinstance(value, Mapping):
        return value
    properties, required = schema.get("properties"), schema.get("required")
    properties = properties if isinstance(properties, Mapping) else {}
    required = required if isinstance(required, list) else []
    return {
        key: _arguments(inner, properties.get(key))
        for key, inner in value.items()
        if inner is not None or key in required or _allows_null(properties.get(key))
    }


def _schema(value: Any) -> Any:
    if isinstance(value, list):
        return [_schema(inner) for inner in value]
    if not isinstance(value, Mapping):
        return value
    allowed = VALUES if _allows_null(value) else ()
    return {key: _schema(inner) for key, inner in value.items() if inner is not None or key in allowed}


def _allows_null(schema: Any) -> bool:
    if not isinstance(schema, Mapping):
        return False
    kind, enum = schema.get("type"), schema.get("enum")
    among = [part for key in ("anyOf", "oneOf") if isinstance(schema.get(key), list) for part in schema[key]]
    return (
        kind == "null"
        or (isinstance(kind, list) and "null" in kind)
        or schema.get("nullable") is True
        or (isinstance(enum, list) and None in enum)
        or any(map(_allows_null, among))
    )
