"""Grammars of answers that are calls: by them `tool_choice` forces one.

Arguments are valid by the schema of their tool. Where a format writes JSON, llguidance follows the whole schema. Where
it writes arguments one by one, each is written by the schema of its property.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from keyword import iskeyword
from typing import Any, NamedTuple

from graftlm.data.sources.messages import Fields
from graftlm.errors import RequestError, nearest
from graftlm.generation.grammar import JSON_STYLE, Grammar
from graftlm.tool_calls.formats import ToolFormat
from graftlm.tool_calls.readers import SEPARATOR
from graftlm.tool_calls.values import QUOTE

Tag = Callable[[str], str]
"""A tag in Lark's notation."""


class Wanted(NamedTuple):
    functions: Sequence[Fields]
    """{name, parameters} of the tools that may be called."""
    tag: Tag
    parallel: bool


def call_grammar(
    tools: Sequence[Fields], format: ToolFormat, tokenizer: Any, *, name: str | None = None, parallel: bool = True
) -> Grammar:
    """The grammar of an answer that is a call of one of the tools, or of the one called `name`; `parallel`: or several,
    where the format has them in one answer that ends by itself.

    Tools are as OpenAI has them: {"type": "function", "function": {name, parameters}}. RequestError where no tool has
    this name, or there is none, and for a schema that the format has no way to follow.
    """
    functions = {str(tool["function"]["name"]): tool["function"] for tool in tools}
    if not functions or (name is not None and name not in functions):
        raise RequestError(
            f"tool_choice asks for a call of {repr(name) if name else 'a tool'}, and the request has none such. "
            f"{nearest(name or '', functions)}",
            code="no-such-tool",
        )
    chosen = [functions[name]] if name is not None else list(functions.values())
    return Grammar.lark(_GRAMMARS[format.name](Wanted(chosen, lambda text: _tag(text, tokenizer), parallel)))


# JSON of a whole call ------------------------------------------------------------------------------------------------


def _hermes(wanted: Wanted) -> str:
    open_, close = map(wanted.tag, ("<tool_call>", "</tool_call>"))
    call = _embedded(_one_of(wanted.functions, "arguments", "#"))
    return f'start: call{_more(wanted)}\ncall: {open_} "\\n" object "\\n" {close}\nobject: {call}'


def _alone(key: str) -> Callable[[Wanted], str]:
    return lambda wanted: f"start: {_embedded(_one_of(wanted.functions, key, '#'))}"


def _plain(wanted: Wanted) -> str:
    call = _embedded(_one_of(wanted.functions, "arguments", "#"))
    return f"start: call{_more(wanted)}\ncall: {call}"


def _listed(before: str, after: str = "", *, name: str = "name", key: str = "arguments") -> Callable[[Wanted], str]:
    """A list of calls between two tags."""

    def grammar(wanted: Wanted) -> str:
        items = {"type": "array", "minItems": 1, **({} if wanted.parallel else {"maxItems": 1})}
        schema: dict[str, Any] = {**items, "items": _one_of(wanted.functions, key, "#/items", name)}
        tags = [wanted.tag(tag) if tag else "" for tag in (before, after)]
        return f"start: {tags[0]} {_embedded(schema)} {tags[1]}"

    return grammar


def _more(wanted: Wanted, between: str = "\n") -> str:
    return f" ({json.dumps(between)} call)*" if wanted.parallel and between else " call*" if wanted.parallel else ""


# A name, and JSON of the arguments -----------------------------------------------------------------------------------


def _deepseek(fence: bool) -> Callable[[Wanted], str]:
    begin, end = "<\uff5ctool\u2581call{}\u2581begin\uff5c>", "<\uff5ctool\u2581call{}\u2581end\uff5c>"

    def grammar(wanted: Wanted) -> str:
        tag, separator = wanted.tag, wanted.tag(SEPARATOR)
        rules, names = [], []
        for number, function in enumerate(wanted.functions):
            name, arguments = json.dumps(function["name"]), _embedded(_parameters(function))
            said = f'"function" {separator} {name} "\\n```json\\n"' if fence else f"{name} {separator}"
            rules.append(f"f{number}: {said} a{number}" + (' "\\n```"' if fence else "") + f"\na{number}: {arguments}")
            names.append(f"f{number}")
        between = '"\\n" call' if fence else "call"
        several = f" ({between})*" if wanted.parallel else ""
        start = f"start: {tag(begin.format('s'))} call{several} {tag(end.format('s'))}"
        call = f"call: {tag(begin.format(''))} ({' | '.join(names)}) {tag(end.format(''))}"
        return "\n".join([start, call, *rules])

    return grammar


def _kimi(wanted: Wanted) -> str:
    """The calls are numbered from 0, of which a grammar knows nothing: one call."""
    tag = wanted.tag
    parts = [
        f"{json.dumps('functions.' + function['name'] + ':0')} {tag('<|tool_call_argument_begin|>')} a{number}"
        for number, function in enumerate(wanted.functions)
    ]
    rules = [f"a{number}: {_embedded(_parameters(function))}" for number, function in enumerate(wanted.functions)]
    begin, end = tag("<|tool_calls_section_begin|>"), tag("<|tool_calls_section_end|>")
    call = f"call: {tag('<|tool_call_begin|>')} ({' | '.join(parts)}) {tag('<|tool_call_end|>')}"
    return "\n".join([f"start: {begin} call {end}", call, *rules])


# Arguments one by one ------------------------------------------------------------------------------------------------


class _Notation(NamedTuple):
    """How a format writes a call with its arguments one by one, in Lark's notation."""

    open: Callable[[str], str]
    """The name of the function -> what stands before its arguments."""
    close: str
    key: Callable[[str], str]
    """The name of an argument -> what stands before its value."""
    end: str = ""
    """What stands behind a value."""
    between: str = ""
    quote: str | None = ""
    """What stands around a text that is written as it is; None: texts are JSON."""
    nested: bool = True
    """Whether a value that holds others is JSON, so that it can be forced."""


def _refused(function: Fields, what: str) -> RequestError:
    return RequestError(
        f"tool_choice forces a call of {function['name']!r}, and this model writes arguments one by one, without JSON "
        f"around them: {what} cannot be followed so. Say auto, or leave it out",
        code="call-cannot-be-forced",
    )


def _rules(function: Fields, number: int, way: _Notation) -> list[str]:
    """Rules f{number} and others: a call with what its schema requires, in its order, then what it does not."""
    schema = _parameters(function)
    if unread := sorted(schema.keys() - _READ):
        raise _refused(function, f"{unread[0]!r} of its parameters")
    properties = schema.get("properties", {})
    required = [name for name in properties if name in schema.get("required", ())]
    optional = [name for name in properties if name not in required]
    parts, rules = {}, []
    for n, (name, value) in enumerate(properties.items()):
        parts[name] = " ".join(each for each in (way.key(name), f"f{number}v{n}", way.end) if each)
        rules.append(f"f{number}v{n}: {_value(function, name, value, way)}")

    def behind(names: Sequence[str]) -> str:
        return "".join(f" ({way.between} {parts[name]})?" for name in names)

    if required:
        whole = f" {way.between} ".join(parts[name] for name in required) + behind(optional)
    else:  # nothing stands before the first that is there
        tails = [parts[name] + behind(optional[n + 1 :]) for n, name in enumerate(optional)]
        whole = f"({' | '.join(tails)})?" if tails else ""
    return [f"f{number}: {way.open(function['name'])} {whole} {way.close}", *rules]


_READ = {"type", "properties", "required", "additionalProperties", "$defs", "definitions", "description", "title"}
_OF_TEXT = {"type", "description", "title", "default", "examples", "enum", "const", "minLength", "maxLength"}


def _value(function: Fields, name: str, schema: Any, way: _Notation) -> str:
    """A value by the schema of its property."""
    schema = schema if isinstance(schema, Mapping) else {}
    whole = _parameters(function)
    if not way.nested:
        schema = _with_type(schema, whole)
    if way.quote is None or schema.get("type") != "string":
        if not way.nested and schema.get("type") not in ("integer", "number", "boolean", "null"):
            raise _refused(function, f"{name!r}, which is neither a text nor a number,")
        return _embedded({**schema, **{key: whole[key] for key in ("$defs", "definitions") if key in whole}})
    if unread := sorted(schema.keys() - _OF_TEXT):
        raise _refused(function, f"{unread[0]!r} of {name!r}")
    texts = [schema["const"]] if "const" in schema else schema.get("enum")
    if texts is not None:
        said = " | ".join(json.dumps(str(text), ensure_ascii=False) for text in texts)
    else:
        said = f"/[^<]{{{schema.get('minLength', 0)},{schema.get('maxLength', '')}}}/"
    return f"{way.quote} ({said}) {way.quote}"


def _with_type(schema: Mapping[str, Any], whole: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema that a reference to a definition means; one that lists texts has the type of a text."""
    found: Any = whole
    for key in str(schema.get("$ref", "")).split("/")[1:]:
        found = found.get(key, {}) if isinstance(found, Mapping) else {}
    found = found if "$ref" in schema else schema
    texts = found.get("enum", ()) if isinstance(found, Mapping) else ()
    return {"type": "string", **found} if texts and all(isinstance(text, str) for text in texts) else found


def _each(way: _Notation, wanted: Wanted) -> tuple[str, list[str]]:
    """(one of the calls, the rules of all)."""
    found = [_rules(function, number, way) for number, function in enumerate(wanted.functions)]
    return " | ".join(f"f{number}" for number in range(len(found))), [rule for rules in found for rule in rules]


def _between_tags(
    open_: str, close: str, between: str, notation: Callable[[Tag], _Notation]
) -> Callable[[Wanted], str]:
    def grammar(wanted: Wanted) -> str:
        one, rules = _each(notation(wanted.tag), wanted)
        call = f"call: {wanted.tag(open_)} ({one}) {wanted.tag(close)}"
        return "\n".join([f"start: call{_more(wanted, between)}", call, *rules])

    return grammar


def _python(before: str = "", after: str = "") -> Callable[[Wanted], str]:
    def grammar(wanted: Wanted) -> str:
        for function in wanted.functions:
            names = [*function["name"].split("."), *_parameters(function).get("properties", {})]
            if wrong := [name for name in names if not name.isidentifier() or iskeyword(name)]:
                raise _refused(function, f"the name {wrong[0]!r}")
        way = _Notation(
            lambda name: json.dumps(f"{name}("), '")"', lambda key: json.dumps(f"{key}="), between='", "', quote=None
        )
        one, rules = _each(way, wanted)
        tags = [wanted.tag(tag) if tag else "" for tag in (before, after)]
        start = f'start: {tags[0]} "[" call{_more(wanted, ", ")} "]" {tags[1]}'
        return "\n".join([start, f"call: {one}", *rules])

    return grammar


def _xml(tag: Tag) -> _Notation:
    return _Notation(
        lambda name: json.dumps(f"\n<function={name}>\n"),
        '"</function>\\n"',
        lambda key: json.dumps(f"<parameter={key}>\n"),
        '"\\n</parameter>\\n"',
    )


def _glm(tag: Tag) -> _Notation:
    open_, close, value, end = map(tag, ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"))
    return _Notation(
        lambda name: json.dumps(f"{name}\n"),
        "",
        lambda key: f'{open_} {json.dumps(key)} {close} "\\n" {value}',
        f'{end} "\\n"',
    )


def _gemma(tag: Tag) -> _Notation:
    return _Notation(
        lambda name: json.dumps(f"call:{name}{{"),
        '"}"',
        lambda key: json.dumps(f"{key}:"),
        between='","',
        quote=tag(QUOTE),
        nested=False,
    )


_GRAMMARS: Mapping[str, Callable[[Wanted], str]] = {
    "hermes": _hermes,
    "llama": _alone("parameters"),
    "plain": _plain,
    "mistral": _listed("[TOOL_CALLS]"),
    "granite": _listed("<|tool_call|>"),
    "cohere": _listed("<|START_ACTION|>", "<|END_ACTION|>", name="tool_name", key="parameters"),
    "deepseek-v3": _deepseek(fence=True),
    "deepseek": _deepseek(fence=False),
    "kimi": _kimi,
    "xml": _between_tags("<tool_call>", "</tool_call>", "\n", _xml),
    "glm": _between_tags("<tool_call>", "</tool_call>", "\n", _glm),
    "gemma": _between_tags("<|tool_call>", "<tool_call|>", "", _gemma),
    "lfm": _python("<|tool_call_start|>", "<|tool_call_end|>"),
    "python": _python(),
}
"""Name of a format -> the grammar, in Lark's notation, of an answer that is a call or several."""


# Schemas -------------------------------------------------------------------------------------------------------------


def _parameters(function: Mapping[str, Any]) -> Mapping[str, Any]:
    return function.get("parameters") or {"type": "object"}


def _one_of(functions: Sequence[Mapping[str, Any]], key: str, at: str, name: str = "name") -> dict[str, Any]:
    """The schema, which stands at a place of another one, of a call of one of these functions."""
    options = []
    for number, function in enumerate(functions):
        place = f"{at}/anyOf/{number}/properties/{key}"
        arguments = _moved(_parameters(function), place)
        options.append(
            {
                "type": "object",
                "properties": {name: {"const": function["name"]}, key: arguments},
                "required": [name, key],
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
