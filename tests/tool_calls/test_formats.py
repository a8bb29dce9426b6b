"""Calls in answers, read in the formats of families of models."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from graftlm.testing import tiny_tokenizer
from graftlm.tool_calls.formats import (
    COHERE,
    DEEPSEEK,
    DEEPSEEK_V3,
    FORMATS,
    GEMMA,
    GLM,
    GRANITE,
    HERMES,
    KIMI,
    LFM,
    LLAMA,
    MISTRAL,
    PLAIN,
    PYTHON,
    XML,
    CallStream,
    ToolFormat,
    parse_calls,
    tool_format,
)
from tests.cases.test_every_template import shipped

FIND = ("find", {"what": "a </tool_call> [TOOL_CALLS] {x}", "n": 2})
STOP = ("stop", {})

CALLS, CALL, END, ENDS = (
    f"<\uff5ctool\u2581{each}\uff5c>"
    for each in ("calls\u2581begin", "call\u2581begin", "call\u2581end", "calls\u2581end")
)
SEP = "<\uff5ctool\u2581sep\uff5c>"
"""DeepSeek's tags."""

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
    (LLAMA, '<|python_tag|>find.call(what="a </tool_call> [TOOL_CALLS] {x}", n=2)', "", [FIND]),
    (
        HERMES,
        f'<tool_call>[{{"name": "stop", "arguments": {{}}}}, {json.dumps({"name": "find", "arguments": FIND[1]})}]',
        "",
        [STOP, FIND],
    ),
    (
        XML,
        "I look.\n<tool_call>\n<function=find>\n<parameter=what>\na </tool_call> [TOOL_CALLS] {x}\n</parameter>\n"
        "<parameter=n>\n2\n</parameter>\n</function>\n</tool_call>\n<tool_call><function=stop></function></tool_call>",
        "I look.",
        [FIND, STOP],
    ),
    (
        GLM,
        "<tool_call>find\n<arg_key>what</arg_key>\n<arg_value>a </tool_call> [TOOL_CALLS] {x}</arg_value>\n"
        "<arg_key>n</arg_key>\n<arg_value>2</arg_value>\n</tool_call>\n<tool_call>stop\n</tool_call>",
        "",
        [FIND, STOP],
    ),
    (GRANITE, f"<|tool_call|>[{json.dumps({'name': 'find', 'arguments': FIND[1]})}]", "", [FIND]),
    (GRANITE, 'So. <|tool_call|>[{"name": "stop", "arguments": {}}]<|/tool_call|>', "So.", [STOP]),
    (
        LFM,
        "<|tool_call_start|>[find(what='a </tool_call> [TOOL_CALLS] {x}', n=2), stop()]<|tool_call_end|>Done.",
        "Done.",
        [FIND, STOP],
    ),
    (LFM, '<|tool_call_start|>[find(what="<|tool_call_end|>")]', "", [("find", {"what": "<|tool_call_end|>"})]),
    (
        GEMMA,
        'Well.<|tool_call>call:find{what:<|"|>a </tool_call> [TOOL_CALLS] {x}<|"|>,n:2}<tool_call|>'
        "<|tool_call>call:stop{}<tool_call|>",
        "Well.",
        [FIND, STOP],
    ),
    (
        GEMMA,
        '<|tool_call>call:find{at:{<|"|>x<|"|>:[1, -2.5,<|"|>,<|"|>],y:null},ok:true}<tool_call|>',
        "",
        [("find", {"at": {"x": [1, -2.5, ","], "y": None}, "ok": True})],
    ),
    (
        COHERE,
        f"<|START_ACTION|>[\n    {json.dumps({'tool_call_id': '0', 'tool_name': 'find', 'parameters': FIND[1]})}\n]"
        "<|END_ACTION|>",
        "",
        [FIND],
    ),
    (
        DEEPSEEK_V3,
        f"Yes.{CALLS}{CALL}function{SEP}find\n```json\n{json.dumps(FIND[1])}\n```{END}\n"
        f"{CALL}function{SEP}stop\n```json\n{{}}\n```{END}{ENDS}",
        "Yes.",
        [FIND, STOP],
    ),
    (DEEPSEEK, f"{CALLS}{CALL}find{SEP}{json.dumps(FIND[1])}{END}{CALL}stop{SEP}{{}}{END}{ENDS}", "", [FIND, STOP]),
    (
        KIMI,
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.find:0<|tool_call_argument_begin|>"
        f"{json.dumps(FIND[1])}<|tool_call_end|><|tool_call_begin|>functions.stop:1<|tool_call_argument_begin|>{{}}"
        "<|tool_call_end|><|tool_calls_section_end|>",
        "",
        [FIND, STOP],
    ),
    (PYTHON, "[find(what='a </tool_call> [TOOL_CALLS] {x}', n=2), stop()]", "", [FIND, STOP]),
    (
        PYTHON,
        ' [find(a=[-1, 2.5, (None, true)], b={"k": {"l": False}}, c="\\ud83d\\ude00")]\n',
        "",
        [("find", {"a": [-1, 2.5, [None, True]], "b": {"k": {"l": False}}, "c": "\U0001f600"})],
    ),
    (PLAIN, json.dumps({"name": "find", "arguments": FIND[1]}), "", [FIND]),
    (PLAIN, '{"name": "stop", "arguments": {}}\n{"name": "stop", "parameters": {}}', "", [STOP, STOP]),
    (PLAIN, '```json\n[{"name": "stop", "arguments": {}}]\n```\n', "", [STOP]),
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
    (LLAMA, "<|python_tag|>import os\nos.listdir()"),
    (XML, "<tool_call><function=stop></tool_call>"),
    (XML, "<tool_call><function=find><parameter=n>2</function></tool_call>"),
    (XML, "<tool_call><function=find>" + "<parameter=n>2</parameter>" * 3 + "</function></tool_call>"),
    (XML, "<tool_call><function=find>" + "".join(f"<parameter=n{n}>2</parameter>" for n in range(500)) + "<tool_call>"),
    (XML, '<tool_call>{"name": "stop", "arguments": {}}</tool_call>'),
    (GLM, "<tool_call>find\n<arg_key>n</arg_key>\n<arg_value>2"),
    (GLM, "<tool_call></tool_call>"),
    (GRANITE, "<|tool_call|>[]"),
    (GRANITE, "<|tool_call|>[3]"),
    (LFM, "<|tool_call_start|>[find(2)]<|tool_call_end|>"),
    (LFM, "<|tool_call_start|>[__import__('os').system('ls')]<|tool_call_end|>"),
    (LFM, "<|tool_call_start|>" * 300 + "["),
    (GEMMA, '<|tool_call>call:find{what:<|"|>a}<tool_call|>'),
    (GEMMA, "<|tool_call>call:find{what:a}<tool_call|>"),
    (GEMMA, "<|tool_call>call:find{n:2 m:3}<tool_call|>"),
    (GEMMA, "<|tool_call>call:find{a:" + "[" * 100_000),
    (COHERE, '<|START_ACTION|>[{"name": "stop", "arguments": {}}]<|END_ACTION|>'),
    (DEEPSEEK_V3, f"{CALLS}{CALL}function{SEP}stop\n```json\n{{}}{END}{ENDS}"),
    (DEEPSEEK, f"{CALLS}{CALL}stop{SEP}{{{END}{ENDS}"),
    (KIMI, "<|tool_calls_section_begin|><|tool_call_begin|>functions.stop<|tool_call_argument_begin|>{}"),
    (PYTHON, "[1, 2]"),
    (PYTHON, "[]"),
    (PYTHON, "[stop(), stop]"),
    (PYTHON, "[stop(a=1, **{})]"),
    (PYTHON, "[stop(a=1e999)]"),
    (PYTHON, "[stop(a='\\ud83d')]"),
    (PYTHON, "[f(a=" + "-" * 50_000 + "1)]"),
    (PYTHON, "[" * 50_000),
    (PLAIN, '{"name": "Ada"}'),
    (PLAIN, '{"name": "stop", "arguments": {}, "age": 3}'),
    (PLAIN, "```json\n{}\n```"),
    (PLAIN, "```"),
    (PLAIN, "[1] A book"),
    (PLAIN, '{"name": "stop", "arguments": {}} would do.'),
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
    assert parse_calls(text, format, tools={"other": {}}) == (text, ()), "a call of what is no tool is text"


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


def test_every_format_is_read_and_refused_here() -> None:
    assert {form.name for form, *_ in READ} == {form.name for form, _ in TEXTS} == {form.name for form in FORMATS}


@pytest.mark.parametrize("format", FORMATS, ids=lambda form: form.name)
def test_any_text_is_read_alike_in_any_pieces(format: ToolFormat) -> None:
    """Texts made of what formats are made of: what is text and what is a call does not depend on the cuts, and no
    text is lost where there is no call."""
    chance = random.Random(format.name)
    words = [
        *format.kept,
        *"{}[]()\"',:= \n",
        "stop",
        "find",
        "call:",
        "name",
        "function",
        '{"name": "stop", "arguments": {}}',
    ]
    words += [text for form, text, *_ in READ if form.name == format.name]
    for seed in range(60):
        text = "".join(chance.choices(words, k=chance.randrange(1, 9)))
        found = parse_calls(text, format)
        assert by_pieces(text, format, seed) == found
        assert found.calls or found.content == text


def test_what_a_raw_argument_means_its_schema_says() -> None:
    tools = {"find": {"properties": {"what": {"type": "string"}, "n": {"type": "integer"}, "x": {}}}}
    raw = {"what": "7", "n": "7", "x": "true", "y": "null", "z": " [1]", "w": "a\nb"}
    wanted = {"what": "7", "n": 7, "x": True, "y": None, "z": [1], "w": "a\nb"}
    xml = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in raw.items())
    glm = "".join(f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n" for key, value in raw.items())
    for format, text in ((XML, f"\n<function=find>\n{xml}</function>\n"), (GLM, f"find\n{glm}")):
        (call,) = parse_calls(f"<tool_call>{text}</tool_call>", format, tools).calls
        assert call["function"]["arguments"] == wanted


def test_the_format_is_that_of_the_chat_template() -> None:
    says = '{{- \'Respond in the format {"name": function name, "parameters": dictionary of its values}.\' }}'
    assert tool_format(says) is LLAMA
    assert tool_format('{{ \'<tool_call>\\n{"name": "\' + call.name }} {{ tool.parameters }}') is HERMES
    assert tool_format("{{ '[TOOL_CALLS] [' }}") is MISTRAL
    assert tool_format("<tool_call>\\n<function=") is XML
    assert tool_format(f"{{{{ '{CALL}' + call.function.name + '{SEP}' + call.function.arguments }}}}") is DEEPSEEK
    assert tool_format("respond only with <|tool_call|> followed by a JSON list of tools used") is GRANITE
    assert tool_format("use the format of [func_name1(params_name1=params_value1...), func_name2(params)]") is PYTHON
    assert tool_format("'<|tool_call_begin|>' + call.id + '<|tool_call_argument_begin|>'") is KIMI
    assert tool_format("'<|START_ACTION|>[' ~ action") is COHERE
    assert tool_format(tiny_tokenizer().chat_template) is tool_format(None) is PLAIN


UNKNOWN = {"gptoss": "channels", "muse_glimmer": "blocks of its own", "deepseek_r1_distill": "it writes no calls"}
"""Templates of TRL whose calls are not read."""
TOOLS = [
    {"type": "function", "function": {"name": name, "description": f"Does {name}.", "parameters": {
        "type": "object", "properties": {key: {"type": kind, "description": f"the {key}"}}, "required": [key]}}}
    for name, key, kind in (("get_weather", "city", "string"), ("find_parcel", "number", "integer"))
]  # fmt: skip


def writes_calls(path: Path) -> bool:
    known = path.stem.removesuffix("_training") not in UNKNOWN
    return known and "tool_calls" in path.read_text(encoding="utf-8")


def answer_of(template: str, called: list[tuple[str, dict[str, Any]]], *, as_text: bool) -> str:
    """What a template writes of an answer with these calls, behind the prompt or behind the thoughts that it opens."""
    functions = [{"name": n, "arguments": json.dumps(given) if as_text else given} for n, given in called]
    calls = [{"id": f"abcdef00{n}", "type": "function", "function": each} for n, each in enumerate(functions)]
    asked = [{"role": "user", "content": "Rome?"}]
    texts = []
    for messages in (asked, [*asked, {"role": "assistant", "content": "", "tool_calls": calls}]):
        found, _ = render_jinja_template(
            conversations=[messages],
            tools=TOOLS,
            chat_template=template,
            add_generation_prompt=messages is asked,
            bos_token="<s>",
            eos_token="</s>",
        )
        texts.append(found[0])
    prompt, whole = texts
    start = next(n for n in range(len(whole) + 1) if n == len(prompt) or whole[n : n + 1] != prompt[n : n + 1])
    return whole[start:].removesuffix("<|eot_id|>")  # which ends the answer, and is no part of its text


@pytest.mark.parametrize("path", [path for path in shipped() if writes_calls(path)], ids=lambda path: path.stem)
def test_what_the_templates_of_trl_write_is_read(path: Path) -> None:
    """What a template writes of an answer is read as the calls of that answer."""
    template = path.read_text(encoding="utf-8")
    weather, parcel = ("get_weather", {"city": 'Rome, the "eternal"'}), ("find_parcel", {"number": 7})
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
    read = 0
    for called in ([weather], [parcel], [weather, parcel]):
        for as_text in (False, True):
            try:
                text = answer_of(template, called, as_text=as_text)
            except Exception:  # one that takes arguments in the other form alone, or one call
                continue
            if pairs(parse_calls(text, tool_format(template), schemas).calls) == called:
                read += 1
                break
            assert not as_text, (called, text)
    assert read >= 2
