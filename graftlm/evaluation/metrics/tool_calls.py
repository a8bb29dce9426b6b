"""Calls of tools, compared by name and arguments, as the AST check of the Berkeley Function Calling Leaderboard does
(Patil et al. 2025, ICML; code: bfcl-eval 2026.3.23, `ast_checker`).

tool_calls   1 where the answer has exactly the calls of the row's field `calls`, in any order, else 0
tool_names   the same of their names alone

An answer is read as JSON ({"name", "arguments"}, one, a list or one a line), as calls of Python ([f(a=1), g(b="x")]),
or in the tags of Hermes, Mistral and Llama. `calls` is a list of {"name": "f", "arguments": {"a": 1}}, or of
{"f": {"a": [1, 2], "b": ["x", ""]}}: for each argument the values that are right, and "" where it may be left out.

Numbers are equal by value, true is no 1. With `strings: loose` texts are compared without case, spaces and ,./-_*^, as
BFCL does; it checks types by the tool's schema, which the values alone decide here. ToolEval's pass rate needs a judge
and is not built.
"""

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

from graftlm.config.schema import config
from graftlm.errors import DataError
from graftlm.evaluation.metrics.base import Answer, Array, MetricConfig, MetricRow, field_of, scores
from graftlm.evaluation.metrics.json_answers import NoJson, read
from graftlm.tool_calls.formats import HERMES, LLAMA, MISTRAL, parse_calls

LOOSE = re.compile(r"[ ,./\-_*^]")


@config
class ToolCallsConfig(MetricConfig):
    name: Literal["tool_calls"] = "tool_calls"
    strings: Literal["exact", "loose"] = "exact"
    """How texts in arguments are compared."""


@config
class ToolNamesConfig(MetricConfig):
    name: Literal["tool_names"] = "tool_names"


class Call(NamedTuple):
    name: str
    arguments: Mapping[str, Any]


class Wanted(NamedTuple):
    """A call that would be right."""

    name: str
    arguments: Mapping[str, Sequence[Any]]
    """Argument -> values that are right."""
    optional: frozenset[str]


Text = Callable[[str], str]


# Reading -------------------------------------------------------------------------------------------------------------


def calls_in(text: str) -> list[Call]:
    """The calls that an answer makes; empty where it makes none, or is none of the forms as a whole."""
    for format in (HERMES, MISTRAL, LLAMA):
        if found := parse_calls(text, format).calls:
            return [Call(each["function"]["name"], each["function"]["arguments"]) for each in found]
    return _json_calls(text) or _python_calls(text)


def _json_calls(text: str) -> list[Call]:
    lines = [line for line in text.splitlines() if line.strip()]
    for pieces in ([text], lines):
        try:
            values = [read(piece) for piece in pieces]
        except NoJson:
            continue
        flat = [each for value in values for each in (value if isinstance(value, list) else [value])]
        found = [_call(each) for each in flat]
        if found and all(found):
            return [call for call in found if call is not None]
    return []


def _call(value: Any) -> Call | None:
    """A JSON value as a call: {"name", "arguments"}, also inside of "function", or BFCL's {name: arguments}."""
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict):
        return None
    name, arguments = value.get("name"), value.get("arguments", value.get("parameters", {}))
    if "name" not in value and len(value) == 1:
        ((name, arguments),) = value.items()
    if isinstance(arguments, str):
        try:
            arguments = read(arguments)
        except NoJson:
            return None
    return Call(name, arguments) if isinstance(name, str) and isinstance(arguments, dict) else None


def _python_calls(text: str) -> list[Call]:
    """[f(a=1), module.g(b="x")], with or without brackets; values are literals."""
    try:
        body = ast.parse(text.strip(), mode="eval").body
        nodes = body.elts if isinstance(body, ast.List | ast.Tuple) else [body]
        return [_python_call(node) for node in nodes]
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        return []


def _python_call(node: ast.expr) -> Call:
    if not isinstance(node, ast.Call) or node.args or any(each.arg is None for each in node.keywords):
        raise ValueError("no call by names of arguments")
    arguments = {str(each.arg): ast.literal_eval(each.value) for each in node.keywords}
    plain = json.loads(json.dumps(arguments))  # a tuple becomes a list; what JSON has not is refused
    return Call(ast.unparse(node.func), plain)


def wanted_calls(calls: Any, where: str) -> list[Wanted]:
    """The field `calls` of a row; DataError for what is no list of calls."""
    found = [_wanted(each) for each in (calls if isinstance(calls, list | tuple) else [calls])]
    if not all(found):
        raise DataError(
            f"{where}: `calls` is a list of calls that would be right, each as "
            '{"name": "f", "arguments": {"a": 1}} or {"f": {"a": [1, 2]}}, not '
            f"{json.dumps(calls, default=str)[:100]}",
            code="invalid-calls",
        )
    return [each for each in found if each is not None]


def _wanted(value: Any) -> Wanted | None:
    if isinstance(value, Mapping) and isinstance(value.get("function"), Mapping):
        value = value["function"]
    if not isinstance(value, Mapping):
        return None
    if isinstance(value.get("name"), str):
        arguments = value.get("arguments") or {}
        if not isinstance(arguments, Mapping):
            return None
        return Wanted(value["name"], {key: [one] for key, one in arguments.items()}, frozenset())
    if len(value) != 1:
        return None
    ((name, options),) = value.items()
    if not isinstance(options, Mapping) or not all(isinstance(each, list | tuple) for each in options.values()):
        return None
    return Wanted(name, dict(options), frozenset(key for key, each in options.items() if "" in each))


# Comparing -----------------------------------------------------------------------------------------------------------


def same_calls(found: Sequence[Call], wanted: Sequence[Wanted], text: Text = str) -> bool:
    """Whether each call is one of the wanted ones, and each of these is made once; in any order."""
    if len(found) != len(wanted):
        return False
    if not wanted:
        return True
    first, *others = wanted
    return any(
        _same_call(call, first, text) and same_calls([*found[:at], *found[at + 1 :]], others, text)
        for at, call in enumerate(found)
    )


def _same_call(call: Call, wanted: Wanted, text: Text) -> bool:
    return (
        call.name == wanted.name
        and call.arguments.keys() <= wanted.arguments.keys()
        and wanted.arguments.keys() - wanted.optional <= call.arguments.keys()
        and all(any(_same(value, one, text) for one in wanted.arguments[key]) for key, value in call.arguments.items())
    )


def _same(value: Any, wanted: Any, text: Text) -> bool:
    if isinstance(value, str) and isinstance(wanted, str):
        return text(value) == text(wanted)
    if isinstance(value, list | tuple) and isinstance(wanted, list | tuple):
        return len(value) == len(wanted) and all(_same(a, b, text) for a, b in zip(value, wanted, strict=True))
    if isinstance(value, Mapping) and isinstance(wanted, Mapping):
        return value.keys() == wanted.keys() and all(_same(value[key], wanted[key], text) for key in value)
    return isinstance(value, bool) == isinstance(wanted, bool) and bool(value == wanted)


def loose(text: str) -> str:
    return LOOSE.sub("", text).lower().replace("'", '"')


def call_parts(config: ToolCallsConfig, items: Sequence[Answer]) -> Array:
    text: Text = loose if config.strings == "loose" else str
    return _parts(lambda found, wanted: same_calls(found, wanted, text), config, items)


def same_names(found: Sequence[Call], wanted: Sequence[Wanted]) -> bool:
    return sorted(each.name for each in found) == sorted(each.name for each in wanted)


def _parts(
    same: Callable[[Sequence[Call], Sequence[Wanted]], bool], config: MetricConfig, items: Sequence[Answer]
) -> Array:
    wanted = [wanted_calls(field_of(item, "calls", config.name), item.where) for item in items]
    return scores([float(same(calls_in(item.text), each)) for item, each in zip(items, wanted, strict=True)])


ROWS = {
    "tool_calls": MetricRow(ToolCallsConfig, (Answer,), call_parts),
    "tool_names": MetricRow(ToolNamesConfig, (Answer,), partial(_parts, same_names)),
}
