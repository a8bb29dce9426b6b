"""Calls that a grammar forces: in every format, read again and valid by the schema of their tool."""

from typing import Any

import jsonschema
import pytest
from tokenizers import AddedToken

from graftlm.generation.engine import Engine
from graftlm.generation.grammar import GrammarCompiler
from graftlm.generation.requests import Request
from graftlm.generation.sampling import Sampling
from graftlm.testing import tiny_model, tiny_tokenizer
from graftlm.tool_calls.force import call_grammar
from graftlm.tool_calls.formats import FORMATS, GEMMA, GLM, HERMES, LFM, PLAIN, XML, ToolFormat, parse_calls
from tests.errors import raises
from tests.tool_calls.test_formats import pairs

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


@pytest.mark.parametrize("format", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize(("name", "tags_are_tokens"), [(None, False), ("find", True)])
def test_a_forced_call_is_read_and_valid(format: ToolFormat, name: str | None, tags_are_tokens: bool) -> None:
    pytest.importorskip("llguidance")
    tokenizer = tiny_tokenizer()
    if tags_are_tokens:
        tags = [tag for tag in format.kept if len(tag) > 3]
        tokenizer.add_tokens([AddedToken(tag, special=False) for tag in tags])
    compiler = GrammarCompiler(tokenizer, [2])
    grammar = compiler.compile(call_grammar(TOOLS, format, tokenizer, name=name, parallel=False))
    requests = Request([7, 30], 250, Sampling(1.0), (2,), grammar=grammar).several(3)
    called = set()
    for _, answer in Engine(tiny_model(vocab_size=320, initializer_range=0.3)).run(requests):
        assert answer.finish == "stop"
        found = parse_calls(tokenizer.decode(answer.answer_ids), format, tools=SCHEMAS)
        assert found.content == ""
        ((function, arguments),) = pairs(found.calls)
        jsonschema.validate(arguments, SCHEMAS[function])
        called.add(function)
    assert called == {"find"} if name else called <= {"find", "say"}


@pytest.mark.parametrize("format", [HERMES, XML, LFM, GEMMA, PLAIN], ids=lambda form: form.name)
def test_several_calls_are_forced_where_they_may_be(format: ToolFormat) -> None:
    pytest.importorskip("llguidance")
    tokenizer = tiny_tokenizer()
    grammar = GrammarCompiler(tokenizer, [2]).compile(call_grammar(TOOLS, format, tokenizer))
    requests = Request([7, 30], 300, Sampling(1.0), (2,), grammar=grammar).several(8)
    model = tiny_model(vocab_size=320, initializer_range=0.3)
    answers = [answer for _, answer in Engine(model).run(requests)]
    found = [parse_calls(tokenizer.decode(one.answer_ids), format, SCHEMAS) for one in answers if one.finish == "stop"]
    assert any(len(one.calls) > 1 for one in found)
    assert all(one.content == "" for one in found)


def tool(properties: dict[str, Any], name: str = "find", **schema: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": name, "parameters": {
        "type": "object", "properties": properties, "additionalProperties": False, **schema}}}]  # fmt: skip


@pytest.mark.parametrize("format", [XML, GLM, GEMMA, LFM], ids=lambda form: form.name)
def test_arguments_one_by_one_may_be_left_out_where_they_are_not_required(format: ToolFormat) -> None:
    pytest.importorskip("llguidance")
    tokenizer = tiny_tokenizer()
    kinds: dict[str, Any] = {"a": {"type": "integer", "maximum": 9, "minimum": 0}, "b": {"enum": ["x", "7"]}}
    kinds["c"] = {"type": "string", "minLength": 1, "maxLength": 3}
    model, given = tiny_model(vocab_size=310, initializer_range=0.3), set[tuple[str, ...]]()
    for required in ([], ["c"]):
        tools = tool(kinds, required=required)
        schema = tools[0]["function"]["parameters"]
        grammar = GrammarCompiler(tokenizer, [2]).compile(call_grammar(tools, format, tokenizer, parallel=False))
        requests = Request([7, 30], 250, Sampling(1.0), (2,), grammar=grammar).several(8)
        for _, answer in Engine(model).run(requests):
            ((_, arguments),) = pairs(parse_calls(tokenizer.decode(answer.answer_ids), format, {"find": schema}).calls)
            jsonschema.validate(arguments, schema)
            given.add(tuple(arguments))
    assert len(given) > 3


@pytest.mark.parametrize(
    ("format", "properties", "schema", "match"),
    [
        (XML, {"a": {"type": "string", "pattern": "x+"}}, {}, "'pattern' of 'a'"),
        (XML, {}, {"anyOf": [{"required": ["a"]}]}, "'anyOf' of its parameters"),
        (GEMMA, {"a": {"type": "array"}}, {}, "'a', which is neither"),
        (LFM, {"in": {"type": "string"}}, {}, "the name 'in'"),
    ],
)
def test_what_a_format_has_no_way_to_follow_is_refused(
    format: ToolFormat, properties: dict[str, Any], schema: dict[str, Any], match: str
) -> None:
    with raises("request/call-cannot-be-forced", match=match):
        call_grammar(tool(properties, **schema), format, tiny_tokenizer())
    assert call_grammar(tool(properties, **schema), HERMES, tiny_tokenizer())


def test_a_tool_that_is_not_there_is_refused() -> None:
    with raises("request/no-such-tool", match="find"):
        call_grammar(TOOLS, HERMES, tiny_tokenizer(), name="fimd")
    with raises("request/no-such-tool"):
        call_grammar([], HERMES, tiny_tokenizer())
