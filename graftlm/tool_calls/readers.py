"""Readers: the text of an answer from the first sign of a call on -> the text around the calls, and the calls.

A call is as `Message.tool_calls` has it: {"type": "function", "function": {"name": ..., "arguments": {...}}}. What is
no whole, valid call of one of the tools stays text: nothing here raises for what a model writes.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from graftlm.data.sources.messages import Fields
from graftlm.tool_calls.values import end_of_space, gemma_object, json_at, python_calls, typed

Tools = Mapping[str, Any]
"""Name of a tool -> the schema of its arguments."""
Calls = list[Fields]
Reader = Callable[[str, Tools | None], tuple[str, Calls]]
"""(text, the tools that there are; None: of any name) -> (the text around the calls, the calls)."""
Inside = Callable[[str, int, Tools | None], tuple[Calls | None, int]]
"""(text, where the tag ends, the tools) -> (the calls behind the tag, where they end); None where it is no call."""


def call_of(name: Any, arguments: Any, tools: Tools | None, own: Any = None) -> Fields | None:
    """The call of a tool of this name; None where there is none, or the arguments are no object."""
    if isinstance(arguments, str):  # JSON within a text
        arguments = json_at(arguments, 0)[0]
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    if tools is not None and name not in tools:
        return None
    call: Fields = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {**call, "id": own} if isinstance(own, str) else call


def _all(calls: list[Fields | None]) -> Calls | None:
    found = [call for call in calls if call is not None]
    return found if found and len(found) == len(calls) else None


# Between tags --------------------------------------------------------------------------------------------------------


def tagged(open_: str, close: str, inside: Inside, *, around: tuple[str, ...] = ()) -> Reader:
    """Calls between two tags, one after the other; the last one may lack the second. `around`: tags around all."""

    def read(text: str, tools: Tools | None) -> tuple[str, Calls]:
        calls: Calls = []
        kept, at = "", 0
        while (begin := text.find(open_, at)) >= 0:
            found, end = inside(text, begin + len(open_), tools)
            closed = text.startswith(close, end)
            if found is None or not (closed or end == len(text)):
                kept, at = kept + text[at : begin + len(open_)], begin + len(open_)
                continue
            calls += found
            kept, at = kept + text[at:begin].rstrip(), end + len(close) if closed else end
        rest = text[at:]
        if calls:
            for tag in around:
                kept, rest = kept.replace(tag, "").rstrip(), rest.replace(tag, "")
        return kept + (rest if rest.strip() else ""), calls

    return read


def json_calls(name: str = "name", key: str = "arguments", own: str = "id") -> Inside:
    """A JSON object, or a list of them: {"name": ..., "arguments": {...}}."""

    def inside(text: str, at: int, tools: Tools | None) -> tuple[Calls | None, int]:
        value, end = json_at(text, at)
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(each, dict) for each in values):
            return None, end
        return _all([call_of(each.get(name), each.get(key), tools, each.get(own)) for each in values]), end

    return inside


_NAME = r"[\w.-]+"
_XML_BEGIN = re.compile(rf"\s*<function=({_NAME})>\s*")
_XML_KEY = re.compile(r"<parameter=([^<>\n]+)>\n?")
_GLM_BEGIN = re.compile(rf"\s*({_NAME})\s*")
_GLM_KEY = re.compile(r"<arg_key>([^<>]*)</arg_key>\s*<arg_value>")


def _raw_arguments(begin: re.Pattern[str], key: re.Pattern[str], close: str, last: str) -> Inside:
    """A name, and raw values between a key and `close`, up to `last`. What a value means the schema of the tool says.

    Values are looked for one by one: a pattern for all of them could be tried in as many ways as there are subsets.
    """

    def inside(text: str, at: int, tools: Tools | None) -> tuple[Calls | None, int]:
        if (found := begin.match(text, at)) is None:
            return None, at
        name, at, schema = found[1], found.end(), (tools or {}).get(found[1])
        properties = schema.get("properties") if isinstance(schema, Mapping) else None
        arguments: dict[str, Any] = {}
        while (found := key.match(text, at)) is not None:
            end = text.find(close, found.end())
            if end < 0 or (own := found[1].strip()) in arguments:
                return None, at
            raw = text[found.end() : end]
            raw = raw.removesuffix("\n") if last else raw
            arguments[own] = typed(raw, properties.get(own) if isinstance(properties, Mapping) else None)
            at = end_of_space(text, end + len(close))
        if not text.startswith(last, at):
            return None, at
        return _all([call_of(name, arguments, tools)]), end_of_space(text, at + len(last))

    return inside


xml_calls = _raw_arguments(_XML_BEGIN, _XML_KEY, "</parameter>", "</function>")
"""<function=NAME><parameter=KEY>\\nraw\\n</parameter></function>"""
glm_calls = _raw_arguments(_GLM_BEGIN, _GLM_KEY, "</arg_value>", "")
"""NAME<arg_key>KEY</arg_key><arg_value>raw</arg_value>"""

SEPARATOR = "<\uff5ctool\u2581sep\uff5c>"
_DEEPSEEK = re.compile(rf"\s*(?:function{SEPARATOR}({_NAME})\s*```json\s*|({_NAME}){SEPARATOR}\s*)(?=\{{)")


def deepseek_calls(text: str, at: int, tools: Tools | None) -> tuple[Calls | None, int]:
    """function<sep>NAME, then JSON in a fence; or NAME<sep>JSON."""
    if (found := _DEEPSEEK.match(text, at)) is None:
        return None, at
    value, end = json_at(text, found.end())
    if found[1] is not None and value is not None:
        if not text.startswith("```", end):
            return None, at
        end = end_of_space(text, end + 3)
    return _all([call_of(found[1] or found[2], value, tools)]), end


_KIMI = re.compile(rf"\s*((?:functions\.)?({_NAME}):\d+)\s*<\|tool_call_argument_begin\|>\s*(?=\{{)")


def kimi_calls(text: str, at: int, tools: Tools | None) -> tuple[Calls | None, int]:
    """functions.NAME:NUMBER<|tool_call_argument_begin|>JSON; what is before the second tag is the call's id."""
    if (found := _KIMI.match(text, at)) is None:
        return None, at
    value, end = json_at(text, found.end())
    return _all([call_of(found[2], value, tools, found[1])]), end


def gemma_calls(text: str, at: int, tools: Tools | None) -> tuple[Calls | None, int]:
    """call:NAME{key:<|"|>text<|"|>,n:7}"""
    if (found := re.compile(rf"call:({_NAME})(?=\{{)").match(text, at)) is None:
        return None, at
    value, end = gemma_object(text, found.end())
    return _all([call_of(found[1], value, tools)]), end


def python_list(close: str) -> Inside:
    """[f(a=1), g()], up to one of the closing tags (a text of an argument may hold the tag), or the end."""

    def inside(text: str, at: int, tools: Tools | None) -> tuple[Calls | None, int]:
        end = at
        for _ in range(8):  # tags in arguments
            end = text.find(close, end)
            stop = len(text) if end < 0 else end
            if (found := python_calls(text[at:stop])) is not None:
                return _all([call_of(name, arguments, tools) for name, arguments in found]), stop
            if end < 0:
                break
            end += len(close)
        return None, at

    return inside


# Whole answers -------------------------------------------------------------------------------------------------------


def mistral(text: str, tools: Tools | None) -> tuple[str, Calls]:
    """[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]; since 2025 [TOOL_CALLS]name[ARGS]{...} for each."""
    tag = "[TOOL_CALLS]"
    before, _, rest = text.partition(tag)
    calls: list[Fields | None] = []
    value, end = json_at(rest, 0)
    if isinstance(value, list) and end == len(rest):
        calls = [_json_call(each, ("arguments",), tools) for each in value]
    else:
        at = 0
        while found := _MISTRAL_NAME.match(rest, at):
            value, at = json_at(rest, found.end())
            calls.append(call_of(found[1], value, tools, found[2]))
            if value is None:
                break
            at += len(tag) if rest.startswith(tag, at) else 0
        if at < len(rest):
            return text, []
    valid = _all(calls)
    return (text, []) if valid is None else (before.rstrip(), valid)


_MISTRAL_NAME = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\]([\w-]+))?(?:\[ARGS\])?\s*(?=\{)")
PYTHON_TAG = "<|python_tag|>"
_ONLY = {"name", "parameters", "arguments", "type", "id"}


def _json_call(value: Any, keys: tuple[str, ...], tools: Tools | None) -> Fields | None:
    """The call that a JSON value is, and nothing besides."""
    if not isinstance(value, dict):
        return None
    key = next((key for key in keys if key in value), keys[0])
    return call_of(value.get("name"), value.get(key), tools, value.get("id"))


def llama(text: str, tools: Tools | None) -> tuple[str, Calls]:
    """{"name": ..., "parameters": {...}}, several with a semicolon between; behind <|python_tag|> name.call(a="b")
    too."""
    at = end_of_space(text, 0)
    tagged_ = text.startswith(PYTHON_TAG, at)
    at += len(PYTHON_TAG) if tagged_ else 0
    if tagged_ and (found := python_calls(text[at:])) is not None:
        named = [(name.removesuffix(".call"), arguments) for name, arguments in found]
        valid = _all([call_of(name, arguments, tools) for name, arguments in named])
        return (text, []) if valid is None else ("", valid)
    return _json_answer(text, at, ("parameters",), tools)


def python_answer(text: str, tools: Tools | None) -> tuple[str, Calls]:
    """[f(a=1), g()] as a whole answer."""
    found = python_calls(text)
    valid = None if found is None else _all([call_of(name, arguments, tools) for name, arguments in found])
    return (text, []) if valid is None else ("", valid)


def plain(text: str, tools: Tools | None) -> tuple[str, Calls]:
    """{"name": ..., "arguments": {...}}, one after the other or in a list, in a fence or bare. "parameters" will do."""
    inner = text.strip()
    if inner.startswith("```") and inner.endswith("```"):
        inner = inner[3:-3].removeprefix("json").strip()
    value, end = json_at(inner, 0)
    if isinstance(value, list) and end == len(inner):
        calls = _all([_only(each, ("arguments", "parameters"), tools) for each in value])
        return (text, []) if calls is None else ("", calls)
    rest, found = _json_answer(inner, 0, ("arguments", "parameters"), tools)
    return (rest, found) if found else (text, [])


def _only(value: Any, keys: tuple[str, ...], tools: Tools | None) -> Fields | None:
    return _json_call(value, keys, tools) if isinstance(value, dict) and value.keys() <= _ONLY else None


def _json_answer(text: str, at: int, keys: tuple[str, ...], tools: Tools | None) -> tuple[str, Calls]:
    """Calls as JSON objects one after the other, with a semicolon between or not, to the end of the text."""
    calls: Calls = []
    while at < len(text):
        value, at = json_at(text, at)
        call = _only(value, keys, tools)
        if call is None:
            return text, []
        calls.append(call)
        at += 1 if text.startswith(";", at) else 0
    return "", calls
