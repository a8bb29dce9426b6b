"""Calls of tools in an answer, in the formats in which families of models write them; and grammars that force them.

A call is as `Message.tool_calls` has it: {"type": "function", "function": {"name": ..., "arguments": {...}}}. What is
no whole, valid call stays text: nothing here raises for what a model writes. Tags may be special tokens, so the text
must be one that keeps those (`TextStream`, `keep_special`).
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from graftlm.data.sources.messages import Fields
from graftlm.errors import RequestError, nearest
from graftlm.generation.grammar import JSON_STYLE, Grammar
from graftlm.generation.text_stream import may_become


class ToolFormat(NamedTuple):
    """How a family writes calls."""

    name: str
    begins: tuple[str, ...]
    """What a call begins with."""
    alone: bool
    """Whether a call is a whole answer, so that it begins where the answer does."""
    key: str
    """What the arguments are called."""


HERMES = ToolFormat("hermes", ("<tool_call>",), False, "arguments")
"""<tool_call>{"name": ..., "arguments": {...}}</tool_call>, one after the other: Hermes, Qwen, SmolLM3."""
MISTRAL = ToolFormat("mistral", ("[TOOL_CALLS]",), False, "arguments")
"""[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]; since 2025 [TOOL_CALLS]name[ARGS]{...} for each."""
LLAMA = ToolFormat("llama", ("{", "<|python_tag|>"), True, "parameters")
"""{"name": ..., "parameters": {...}}, several with a semicolon between: Llama 3."""


def tool_format(template: str | None) -> ToolFormat | None:
    """The format of a chat template; None where it has none of these."""
    text = template or ""
    if "[TOOL_CALLS]" in text:
        return MISTRAL
    if "<tool_call>" in text:
        return None if "<function=" in text else HERMES
    return LLAMA if re.search(r'\\?"name\\?": .*\\?"parameters\\?": ', text) else None


class Parsed(NamedTuple):
    content: str
    calls: tuple[Fields, ...]


def parse_calls(text: str, format: ToolFormat, names: Collection[str] | None = None) -> Parsed:
    """The calls in an answer, and the text around them. `names` of the tools: a call of another one stays text."""
    stream = CallStream(format, names)
    first = stream.add(text)
    last = stream.close()
    return Parsed(first + last.content, last.calls)


class CallStream:
    """Text of an answer in, text that belongs to no call out; the calls are there at its end."""

    def __init__(self, format: ToolFormat, names: Collection[str] | None = None) -> None:
        self._format, self._names = format, names
        self._held = ""
        self._given = False

    def add(self, text: str) -> str:
        """The text that is sure to be in no call. From the first sign of a call on all is held."""
        self._held += text
        sure = self._sure()
        found, self._held = self._held[:sure], self._held[sure:]
        self._given = self._given or bool(found)
        return found

    def close(self) -> Parsed:
        """The rest of the text, and the calls."""
        parse = {"hermes": _hermes, "mistral": _mistral, "llama": _llama}[self._format.name]
        rest, calls = parse(self._held, self._names) if self._sure() < len(self._held) else (self._held, [])
        return Parsed(rest, tuple(calls)) if calls else Parsed(self._held, ())

    def _sure(self) -> int:
        """How many of the characters that are held cannot belong to a call, or be the space before it."""
        begins = self._format.begins
        if self._format.alone:
            text = self._held.lstrip()
            open_ = not self._given and (text.startswith(begins) or any(each.startswith(text) for each in begins))
            return 0 if open_ else len(self._held)
        at = min((at for each in begins if (at := self._held.find(each)) >= 0), default=-1)
        end = at if at >= 0 else len(self._held) - may_become(self._held, begins)
        return len(self._held[:end].rstrip())


# Reading -------------------------------------------------------------------------------------------------------------


def _no_json(constant: str) -> Any:
    """Python reads NaN and Infinity, which are no JSON."""
    raise ValueError(constant)


_DECODER = json.JSONDecoder(parse_constant=_no_json)
_SPACE = re.compile(r"\s*")
_NAMED = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\]([\w-]+))?(?:\[ARGS\])?\s*(?=\{)")

Calls = list[Fields]


def _json(text: str, at: int) -> tuple[Any, int]:
    """The JSON value that begins at a character, or after the space there, and where the text goes on after it and the
    space behind; (None, at) where there is none."""
    try:
        value, end = _DECODER.raw_decode(text, _end_of_space(text, at))
    except (ValueError, RecursionError):
        return None, at
    return value, _end_of_space(text, end)


def _end_of_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _call(value: Any, key: str, names: Collection[str] | None) -> Fields | None:
    """The call that a JSON value is, if it is one."""
    if not isinstance(value, dict) or not isinstance(name := value.get("name"), str) or not name:
        return None
    arguments = value.get(key)
    if isinstance(arguments, str):  # JSON within a text
        arguments = _json(arguments, 0)[0]
    if not isinstance(arguments, dict) or (names is not None and name not in names):
        return None
    call: Fields = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {**call, "id": value["id"]} if isinstance(value.get("id"), str) else call


def _hermes(text: str, names: Collection[str] | None) -> tuple[str, Calls]:
    open_, close = "<tool_call>", "</tool_call>"
    calls: Calls = []
    kept, at = "", 0
    while (begin := text.find(open_, at)) >= 0:
        value, end = _json(text, begin + len(open_))
        call = _call(value, "arguments", names)
        closed = text.startswith(close, end)
        if call is None or not (closed or end == len(text)):
            kept, at = kept + text[at : begin + len(open_)], begin + len(open_)
            continue
        calls.append(call)
        kept, at = kept + text[at:begin].rstrip(), end + len(close) if closed else end
    rest = text[at:]
    return kept + (rest if rest.strip() else ""), calls


def _mistral(text: str, names: Collection[str] | None) -> tuple[str, Calls]:
    tag = "[TOOL_CALLS]"
    before, _, rest = text.partition(tag)
    calls: list[Fields | None] = []
    value, end = _json(rest, 0)
    if isinstance(value, list) and end == len(rest):
        calls = [_call(each, "arguments", names) for each in value]
    else:
        at = 0
        while found := _NAMED.match(rest, at):
            value, at = _json(rest, found.end())
            fields = {"name": found[1], "arguments": value} | ({"id": found[2]} if found[2] else {})
            calls.append(_call(fields, "arguments", names))
            if value is None:
                break
            at += len(tag) if rest.startswith(tag, at) else 0
        if at < len(rest):
            return text, []
    valid = [call for call in calls if call is not None]
    return (before.rstrip(), valid) if len(valid) == len(calls) else (text, [])


def _llama(text: str, names: Collection[str] | None) -> tuple[str, Calls]:
    at = _end_of_space(text, 0)
    at += len("<|python_tag|>") if text.startswith("<|python_tag|>", at) else 0
    calls: Calls = []
    while at < len(text):
        value, at = _json(text, at)
        call = _call(value, "parameters", names) if value is not None else None
        if call is None or not value.keys() <= {"name", "parameters", "type", "id"}:
            return text, []
        calls.append(call)
        at += 1 if text.startswith(";", at) else 0
    return "", calls


# Forcing -------------------------------------------------------------------------------------------------------------


def call_grammar(
    tools: Sequence[Fields], format: ToolFormat, tokenizer: Any, *, name: str | None = None, parallel: bool = True
) -> Grammar:
    """The grammar of an answer that is a call of one of the tools, or of the one called `name`; `parallel`: or several,
    where the format has them in one answer that ends by itself. Arguments are valid by the schema of their tool.

    Tools are as OpenAI has them: {"type": "function", "function": {name, parameters}}. RequestError where no tool has
    this name, or there is none.
    """
    functions = {str(tool["function"]["name"]): tool["function"] for tool in tools}
    if not functions or (name is not None and name not in functions):
        raise RequestError(
            f"tool_choice asks for a call of {repr(name) if name else 'a tool'}, and the request has none such. "
            f"{nearest(name or '', functions)}",
            code="no-such-tool",
        )
    chosen = [functions[name]] if name is not None else list(functions.values())
    if format is MISTRAL:
        items = {"type": "array", "minItems": 1, **({} if parallel else {"maxItems": 1})}
        schema: dict[str, Any] = {**items, "items": _one_of(chosen, format.key, "#/items")}
        return Grammar.lark(f"start: {_tag('[TOOL_CALLS]', tokenizer)} {_embedded(schema)}")
    call = _embedded(_one_of(chosen, format.key, "#"))
    if format is LLAMA:
        return Grammar.lark(f"start: {call}")
    more = ' ("\\n" call)*' if parallel else ""
    open_, close = (_tag(tag, tokenizer) for tag in ("<tool_call>", "</tool_call>"))
    return Grammar.lark(f'start: call{more}\ncall: {open_} "\\n" object "\\n" {close}\nobject: {call}')


def _one_of(functions: Sequence[Mapping[str, Any]], key: str, at: str) -> dict[str, Any]:
    """The schema, which stands at a place of another one, of a call of one of these functions."""
    options = []
    for number, function in enumerate(functions):
        place = f"{at}/anyOf/{number}/properties/{key}"
        arguments = _moved(function.get("parameters") or {"type": "object"}, place)
        options.append(
            {
                "type": "object",
                "properties": {"name": {"const": function["name"]}, key: arguments},
                "required": ["name", key],
                "additionalProperties": False,
            }
        )
    return {"anyOf": options}


def _moved(schema: Any, place: str) -> Any:
    """A schema whose references within itself are right at another place."""
    if isinstance(schema, list):
        return [_moved(each, place) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved = {key: _moved(value, place) for key, value in schema.items()}
    reference = schema.get("$ref")
    return moved | {"$ref": place + reference[1:]} if isinstance(reference, str) and reference[:1] == "#" else moved


def _embedded(schema: Mapping[str, Any]) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': JSON_STYLE})}"


def _tag(tag: str, tokenizer: Any) -> str:
    """A tag in Lark's notation: the token that it is, else its text."""
    token = tokenizer.backend_tokenizer.token_to_id(tag)
    return json.dumps(tag) if token is None else f"<[{token}]>"
