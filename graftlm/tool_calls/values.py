"""Values in the notations of calls: JSON, Python's literals, raw text whose type a schema says, and Gemma's."""

import ast
import json
import math
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from graftlm.data.sources.messages import Fields


def _no_json(constant: str) -> Any:
    """Python reads NaN and Infinity, which are no JSON."""
    raise ValueError(constant)


_DECODER = json.JSONDecoder(parse_constant=_no_json)
_SPACE = re.compile(r"\s*")


def end_of_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def json_at(text: str, at: int) -> tuple[Any, int]:
    """The JSON value that begins at a character, or after the space there, and where the text goes on after it and the
    space behind; (None, at) where there is none."""
    try:
        value, end = _DECODER.raw_decode(text, end_of_space(text, at))
    except (ValueError, RecursionError):
        return None, at
    return value, end_of_space(text, end)


def typed(raw: str, schema: Any) -> Any:
    """What a raw text means for a property: itself where the schema says string, else JSON, else itself."""
    if isinstance(schema, Mapping) and schema.get("type") == "string":
        return raw
    value, end = json_at(raw, 0)
    return value if end == len(raw) and (value is not None or raw.strip() == "null") else raw


# Python --------------------------------------------------------------------------------------------------------------

_NAMES = {"true": True, "false": False, "null": None}
"""JSON's words, which models write among Python's."""


def python_calls(text: str) -> list[tuple[str, Fields]] | None:
    """(name, arguments) of each call in `[f(a=1), g()]`, or in `f(a=1)` alone; None for anything else."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        found = [_python_call(each) for each in (tree.elts if isinstance(tree, ast.List) else [tree])]
        json.dumps(found)  # a lone surrogate, say, is no text
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None
    return found or None


def _python_call(node: ast.expr) -> tuple[str, Fields]:
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("no call by names")
    given = {each.arg: _literal(each.value) for each in node.keywords}
    if None in given or len(given) < len(node.keywords):
        raise ValueError("names that are no names")
    return _dotted(node.func), {str(name): value for name, value in given.items()}


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    if isinstance(node, ast.Name):
        return node.id
    raise ValueError("no name")


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, str | bool | int | float)):
        if isinstance(node.value, float) and not math.isfinite(node.value):
            raise ValueError("no JSON")
        return _whole_characters(node.value) if isinstance(node.value, str) else node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        value = _literal(node.operand)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return -value
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(each) for each in node.elts]
    if isinstance(node, ast.Dict) and all(isinstance(key, ast.Constant) for key in node.keys):
        keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
        if all(isinstance(key, str) for key in keys):
            return {str(key): _literal(value) for key, value in zip(keys, node.values, strict=True)}
    if isinstance(node, ast.Name) and node.id in _NAMES:
        return _NAMES[node.id]
    raise ValueError("no literal")


def _whole_characters(text: str) -> str:
    """JSON's escapes write some characters as a pair of surrogates, which Python's literals leave apart."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16")


# Gemma ---------------------------------------------------------------------------------------------------------------

QUOTE = '<|"|>'
_KEY = re.compile(r"[^\s:{}\[\],<>|]+")


def gemma_object(text: str, at: int) -> tuple[Any, int]:
    """The value `{key:<|"|>text<|"|>,n:7}` at a character, and where the text goes on; (None, at) where there is
    none."""
    try:
        return _gemma(text, at) if text.startswith("{", at) else (None, at)
    except (ValueError, RecursionError):
        return None, at


def _gemma(text: str, at: int) -> tuple[Any, int]:
    if text.startswith(QUOTE, at):
        end = text.index(QUOTE, at + len(QUOTE))
        return text[at + len(QUOTE) : end], end + len(QUOTE)
    if text.startswith("[", at):
        items: list[Any] = []
        at = end_of_space(text, at + 1)
        while not text.startswith("]", at):
            value, at = _gemma(text, at)
            items.append(value)
            at = _after_item(text, at, "]")
        return items, at + 1
    if text.startswith("{", at):
        fields: dict[str, Any] = {}
        at = end_of_space(text, at + 1)
        while not text.startswith("}", at):
            key, at = _gemma_key(text, at)
            if not text.startswith(":", at) or key in fields:
                _refuse()
            fields[key], at = _gemma(text, end_of_space(text, at + 1))
            at = _after_item(text, at, "}")
        return fields, at + 1
    value, end = _DECODER.raw_decode(text, at)
    if isinstance(value, str | list | dict):
        _refuse()
    return value, end


def _gemma_key(text: str, at: int) -> tuple[str, int]:
    if text.startswith(QUOTE, at):
        value, at = _gemma(text, at)
        return str(value), at
    found = _KEY.match(text, at)
    return (found[0], found.end()) if found else _refuse()


def _after_item(text: str, at: int, close: str) -> int:
    at = end_of_space(text, at)
    if text.startswith(",", at):
        return end_of_space(text, at + 1)
    return at if text.startswith(close, at) else _refuse()


def _refuse() -> NoReturn:
    raise ValueError("not in Gemma's notation")
