"""Calls in answers: read in the formats of families of models, and forced by grammars."""

import json
import random
from typing import Any

import jsonschema
import pytest
from tokenizers import AddedToken

from graftlm.generation.engine import Engine
from graftlm.generation.grammar import GrammarCompiler
from graftlm.generation.requests import Request
from graftlm.generation.sampling import Sampling
from graftlm.generation.tool_calls import (
    HERMES,
    LLAMA,
    MISTRAL,
    CallStream,
    ToolFormat,
    call_grammar,
    parse_calls,
    tool_format,
)
from graftlm.testing import tiny_model, tiny_tokenizer
from tests.errors import raises

FIND = ("find", {"what": "a </tool_call> [TOOL_CALLS] {x}", "n": 2})
STOP = ("stop", {})

READ: list[tuple[ToolFormat, str, str, list[tuple[str, dict[str, Any]]]]] = [
    (HERMES, f"<tool_call>\n{json.dumps({'name': 'find', 'arguments': FIND[1]})}\n</tool_call>", "", [FIND]),
    (
        HERMES,
        f"Let me look.\n<tool_call>{json.dumps({'name': 'find', 'arguments': FIND[1]})}</tool_call>\n"
        '<tool_call>\n{"name": "stop", "arguments": {}}',
        "Let me look.",
        [FIND, STOP],
    ),
    (HERMES, '<tool_call>{"name": "stop", "arguments": {}}</tool_call> done', " done", [STOP]),
    (HERMES, '<tool_call>{"name": "stop", "arguments": "{}"}</tool_call>', "", [STOP]),
    (MISTRAL, f"[TOOL_CALLS] [{json.dumps({'name': 'find', 'arguments': FIND[1]})}]", "", [FIND]),
    (
        MISTRAL,
        'Yes. [TOOL_CALLS][{"name": "stop", "arguments": {}, "id": "a1"}, {"name": "stop", "arguments": {}}]',
        "Yes.",
        [STOP, STOP],
    ),
    (MISTRAL, f"[TOOL_CALLS]find[ARGS]{json.dumps(FIND[1])}[TOOL_CALLS]stop{{}}", "", [FIND, STOP]),
    (LLAMA, f"{json.dumps({'name': 'find', 'parameters': FIND[1]})}", "", [FIND]),
    (
        LLAMA,
        '\n<|python_tag|>{"name": "stop", "parameters": {}}; {"type": "function", "name": "stop", "parameters": {}}',
        "",
        [STOP, STOP],
    ),
]

TEXTS = [
    (HERMES, "<tool_call>{broken}</tool_call>"),
    (HERMES, '<tool_call>{"name": "stop"}</tool_call>'),
    (HERMES, '<tool_call>{"name": "stop", "arguments": []}</tool_call>'),
    (HERMES, '<tool_call>{"name": "stop", "arguments": {"a": NaN}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "stop", "arguments": {}} and more'),
    (HERMES, f"<tool_call>{'[' * 100_000}"),
    (HERMES, "so <tool"),
    (HERMES, "nothing \n of it \n"),
    (MISTRAL, '[TOOL_CALLS] [{"name": "stop", "arguments": {}}, {"name": 3}]'),
    (MISTRAL, "[TOOL_CALLS]"),
    (MISTRAL, "[TOOL_CALLS]find[ARGS]{1"),
    (MISTRAL, "[TOOL_CALLS] [] "),
    (LLAMA, '{"name": "Ada"}'),
    (LLAMA, '{"name": "Ada", "parameters": {}, "age": 3}'),
    (LLAMA, 'It is {"name": "stop", "parameters": {}}'),
    (LLAMA, '{"name": "stop", "parameters": {}} then'),
    (LLAMA, "<|python"),
    (LLAMA, " \n"),
]


def pairs(calls: Any) -> list[tuple[str, dict[str, Any]]]:
    assert all(call["type"] == "function" for call in calls)
    return [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


def by_pieces(text: str, format: ToolFormat, seed: int) -> tuple[str, Any]:
    stream, chance, at, content = CallStream(format), random.Random(seed), 0, ""
    while at < len(text):
        size = chance.randrange(1, 9) if len(text) < 1000 else 5000
        content += stream.add(text[at : at + size])
        at += size
    last = stream.close()
    return content + last.content, last.calls


@pytest.mark.parametrize(("format", "text", "content", "calls"), READ)
def test_calls_are_read_however_the_text_is_cut(
    format: ToolFormat, text: str, content: str, calls: list[tuple[str, dict[str, Any]]]
) -> None:
    found = parse_calls(text, format)
    assert (found.content, pairs(found.calls)) == (content, calls)
    for seed in range(20):
        assert by_pieces(text, format, seed) == found
    assert parse_calls(text, format, names=["other"]) == (text, ()), "a call of what is no tool is text"


@pytest.mark.parametrize(("format", "text"), TEXTS)
def test_what_is_no_valid_call_stays_text(format: ToolFormat, text: str) -> None:
    assert parse_calls(text, format) == (text, ())
    for seed in range(10):
        assert by_pieces(text, format, seed) == (text, ())


def test_an_id_that_the_model_writes_is_kept() -> None:
    text = '[TOOL_CALLS] [{"name": "stop", "arguments": {}, "id": "a1"}]'
    assert parse_calls(text, MISTRAL).calls[0]["id"] == "a1"
    assert parse_calls("[TOOL_CALLS]stop[CALL_ID]b2[ARGS]{}", MISTRAL).calls[0]["id"] == "b2"


def test_text_that_can_be_no_call_comes_at_once() -> None:
    stream = CallStream(HERMES)
    assert [stream.add(text) for text in ("a", " b ", "<", "b> ", "<tool_", "call>", " c")] == [
        "a", " b", "", " <b>", "", "", ""
    ]  # fmt: skip
    plain = CallStream(LLAMA)
    assert [plain.add(text) for text in (" ", "It", ' {"name"')] == ["", " It", ' {"name"']


def test_the_format_is_that_of_the_chat_template() -> None:
    says = '{{- \'Respond in the format {"name": function name, "parameters": dictionary of its values}.\' }}'
    assert tool_format(says) is LLAMA
    assert tool_format('{{ \'<tool_call>\\n{"name": "\' + call.name }} {{ tool.parameters }}') is HERMES
    assert tool_format("{{ '[TOOL_CALLS] [' }}") is MISTRAL
    assert tool_format("<tool_call>\\n<function=") is None, "XML is another format"
    assert tool_format(tiny_tokenizer().chat_template) is None
    assert tool_format(None) is None


# Forcing -------------------------------------------------------------------------------------------------------------

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "find",
            "parameters": {
                "type": "object",
                "properties": {"at": {"$ref": "#/$defs/place"}, "n": {"type": "integer", "minimum": 0, "maximum": 9}},
                "required": ["at"],
                "additionalProperties": False,
                "$defs": {"place": {"enum": ["here", "there"]}},
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "say",
            "parameters": {
                "type": "object",
                "properties": {"text": {"type": "string", "maxLength": 5}},
                "required": ["text"],
                "additionalProperties": False,
            },
        },
    },
]
SCHEMAS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}


@pytest.mark.parametrize("format", [HERMES, MISTRAL, LLAMA])
@pytest.mark.parametrize("name", [None, "find"])
@pytest.mark.parametrize("tags_are_tokens", [False, True])
def test_a_forced_call_is_read_and_valid(format: ToolFormat, name: str | None, tags_are_tokens: bool) -> None:
    pytest.importorskip("llguidance")
    tokenizer = tiny_tokenizer()
    if tags_are_tokens:
        tokenizer.add_tokens([AddedToken("<tool_call>", special=False), AddedToken("</tool_call>", special=False)])
        tokenizer.add_tokens([AddedToken("[TOOL_CALLS]", special=True)], special_tokens=True)
    compiler = GrammarCompiler(tokenizer, [2])
    grammar = compiler.compile(call_grammar(TOOLS, format, tokenizer, name=name, parallel=False))
    requests = Request([7, 30], 150, Sampling(1.0), (2,), grammar=grammar).several(5)
    called = set()
    for _, answer in Engine(tiny_model(vocab_size=310, initializer_range=0.3)).run(requests):
        assert answer.finish == "stop"
        found = parse_calls(tokenizer.decode(answer.answer_ids), format, names=SCHEMAS)
        assert found.content == ""
        ((function, arguments),) = pairs(found.calls)
        jsonschema.validate(arguments, SCHEMAS[function])
        called.add(function)
    assert called == {"find"} if name else called <= {"find", "say"}


def test_several_calls_are_forced_where_they_may_be() -> None:
    pytest.importorskip("llguidance")
    tokenizer = tiny_tokenizer()
    grammar = GrammarCompiler(tokenizer, [2]).compile(call_grammar(TOOLS, HERMES, tokenizer))
    requests = Request([7, 30], 300, Sampling(1.0), (2,), grammar=grammar).several(8)
    model = tiny_model(vocab_size=310, initializer_range=0.3)
    answers = [answer for _, answer in Engine(model).run(requests)]
    found = [parse_calls(tokenizer.decode(one.answer_ids), HERMES, SCHEMAS) for one in answers if one.finish == "stop"]
    assert any(len(one.calls) > 1 for one in found)
    assert all(one.content == "" for one in found)


def test_a_tool_that_is_not_there_is_refused() -> None:
    with raises("request/no-such-tool", match="find"):
        call_grammar(TOOLS, HERMES, tiny_tokenizer(), name="fimd")
    with raises("request/no-such-tool"):
        call_grammar([], HERMES, tiny_tokenizer())
