"""Reported mistakes of chat templates and masks, on the templates that TRL ships and on tiny ones."""

import datetime
import importlib.util
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graftlm.config.schema import build
from graftlm.config.template_variables import with_variables
from graftlm.data.batches.pack import Example
from graftlm.data.chat.masks import weights
from graftlm.data.chat.render import Renderer
from graftlm.data.chat.token_cache import key
from graftlm.data.chat.turn_order import in_order
from graftlm.data.quality.preflight import prepare
from graftlm.data.quality.report import Report
from graftlm.data.sources.convert import to_fields
from graftlm.data.sources.formats import FORMATS, Message
from graftlm.data.sources.load import load_rows
from graftlm.data.sources.records import Problem
from graftlm.data.sources.source import DataConfig, Row
from graftlm.errors import DataError
from graftlm.hub.config import BaseConfig
from graftlm.hub.tokenizer import load_tokenizer
from graftlm.recipe import Recipe
from graftlm.testing import save_tiny_base, tiny_tokenizer
from tests.errors import raises


def shipped(name: str) -> str:
    """The text of a chat template that TRL ships; the test is skipped where TRL is not installed."""
    found = importlib.util.find_spec("trl")
    if found is None or found.origin is None:
        pytest.skip("TRL is not installed, which brings the template")
    return (Path(found.origin).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def row_of(*messages: dict[str, Any], where: str = "rows.jsonl:1", **fields: Any) -> Row:
    found = FORMATS["messages"]({"messages": list(messages), **fields})
    return Row(found.messages, where, where, found.tools)


def prepared(renderer: Renderer, *rows: Row, **data: Any) -> tuple[list[Example], Report]:
    return prepare(rows, renderer, DataConfig(train="rows.jsonl", **data), format="messages")


def trained(renderer: Renderer, *rows: Row, **data: Any) -> list[str]:
    """The text of each unbroken run of tokens with a weight, over all examples."""
    found = []
    for example in prepared(renderer, *rows, **data)[0]:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], (example.weights > 0).astype(int), [0]])))
        found += [renderer.tokenizer.decode(example.ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    return found


# `mask: last-turn` of a conversation that the template splits into rows ----------------------------------------------

TWO_TURNS = (
    user("one"),
    assistant("uno", reasoning_content="t1"),
    user("two"),
    assistant("dos", reasoning_content="t2"),
)
NO_THOUGHTS = (user("one"), assistant("uno"), user("two"), assistant("dos"))


@pytest.mark.parametrize("messages", [TWO_TURNS, NO_THOUGHTS], ids=["thoughts", "no thoughts"])
@pytest.mark.parametrize("name", ["qwen3", "qwen3_6", "gptoss", "glm4moe", "qwen2_5"])
def test_last_turn_trains_one_answer_of_a_conversation(name: str, messages: tuple[dict[str, Any], ...]) -> None:
    renderer = Renderer(tiny_tokenizer(shipped(name)))
    every = "".join(trained(renderer, row_of(*messages), mask="response"))
    assert (every.count("uno"), every.count("dos")) == (1, 1), "each answer once"
    last = "".join(trained(renderer, row_of(*messages), mask="last-turn"))
    assert ("uno" in last, "t1" in last, last.count("dos")) == (False, False, 1)


MARKS_THE_LAST = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if loop.last and m['role'] == 'assistant' %}{{ '!' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def test_last_turn_and_prompt_weight_weigh_each_message_once() -> None:
    renderer = Renderer(tiny_tokenizer(MARKS_THE_LAST))
    assert trained(renderer, row_of(*NO_THOUGHTS), mask="last-turn") == ["!dos<|im_end|>"]
    examples, _ = prepared(renderer, row_of(*NO_THOUGHTS), mask="last-turn", prompt_weight=0.5)
    by_weight = [{w: renderer.tokenizer.decode(e.ids[e.weights == w]) for w in (0.5, 1)} for e in examples]
    assert "uno" in by_weight[0][0.5]
    assert by_weight[0][1] == ""
    assert "two" in by_weight[1][0.5]
    assert "uno" not in by_weight[1][0.5]
    assert by_weight[1][1] == "!dos<|im_end|>"


def test_a_weight_of_an_earlier_answer_stands_before_last_turn() -> None:
    renderer = Renderer(tiny_tokenizer(MARKS_THE_LAST))
    weighted = row_of(user("one"), assistant("uno", weight=1), user("two"), assistant("dos"))
    assert trained(renderer, weighted, mask="last-turn") == ["!uno<|im_end|>", "!dos<|im_end|>"]


def test_a_conversation_whose_last_row_is_too_long_is_dropped_and_is_no_problem_of_its_other_rows() -> None:
    renderer = Renderer(tiny_tokenizer(MARKS_THE_LAST))
    long = row_of(user("one"), assistant("uno"), user("two"), assistant("dos " * 50))
    short = row_of(user("one"), assistant("uno"), where="rows.jsonl:2")
    _, report = prepared(renderer, long, short, mask="last-turn", max_tokens=60)
    assert report.dropped_over_length == ["rows.jsonl:1"]
    assert report.problems == report.notes == []
    assert report.rows == 1


# Calls, thoughts and tools: looked for in the rendered text ----------------------------------------------------------


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def tool(name: str) -> dict[str, Any]:
    schema = {"type": "object", "properties": {}}
    return {"type": "function", "function": {"name": name, "description": "Looks.", "parameters": schema}}


def template(answer: str, before: str = "") -> str:
    """A template of the kind of ChatML that writes `answer` of an answer."""
    return (
        before + "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
        "{% if m['role'] == 'assistant' %}" + answer + "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )


CONTENT = "{{ m['content'] or '' }}"
CALLS = "{% for c in m.tool_calls or [] %}{{ '<call>' ~ c.function | tojson ~ '</call>' }}{% endfor %}"
KNOWS_CALLS = {
    "the first alone": CONTENT + "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% endif %}",
    "names alone": CONTENT + "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}",
    "arguments alone": CONTENT + "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}",
    "the first argument": CONTENT + "{% for c in m.tool_calls or [] %}{{ c.function.name }}"
    "{% for k in c.function.arguments %}{% if loop.first %}{{ k ~ c.function.arguments[k] }}{% endif %}"
    "{% endfor %}{% endfor %}",
    "arguments that are true": CONTENT + "{% for c in m.tool_calls or [] %}{{ c.function.name }}"
    "{% for k, v in c.function.arguments.items() if v %}{{ k ~ v }}{% endfor %}{% endfor %}",
    "calls or text": "{% if m.content %}{{ m.content }}{% else %}" + CALLS + "{% endif %}",
    "none": CONTENT,
    "none, with a variable of that name": "{% set tool_calls = '' %}" + CONTENT,
}


@pytest.mark.parametrize("kind", KNOWS_CALLS)
def test_a_call_that_is_not_written_whole_is_refused(kind: str) -> None:
    text = "find(a=1, deep=false), find and find again: A 7, B 8"
    calls = [call("find", parcel="A 7", deep=False), call("find", parcel="B 8", deep=True)]
    thoughts = "I call find with parcel A 7 and parcel B 8, deep False and True."
    renderer = Renderer(tiny_tokenizer(template(KNOWS_CALLS[kind])))
    row = row_of(user("Where?"), assistant(text, tool_calls=calls, reasoning_content=thoughts), tools=[tool("find")])
    with raises("data/template-drops-calls", match="find.* in message 2"):
        renderer.rows(row.messages, row.tools)


@pytest.mark.parametrize(
    "written",
    [
        CONTENT + CALLS,
        CONTENT + "{% for c in m.tool_calls or [] %}{{ c.function | tojson(ensure_ascii=true) }}{% endfor %}",
        CONTENT + "{% for c in m.tool_calls or [] %}{{ c.function.name ~ c.function.arguments }}{% endfor %}",
        CONTENT + "{% for c in m.tool_calls or [] %}{% if c.function.name not in ('find', 'f') %}"
        "{{ raise_exception('unknown') }}{% endif %}{{ c.function.name ~ c.function.arguments.values() | list }}"
        "{% endfor %}",
        CONTENT + "{% for c in m.tool_calls or [] %}{{ c.function.name ~ '(' ~ c.function.arguments.parcel ~ ', ' }}"
        "{{ c.function.arguments.n ~ ')' }}{% endfor %}",
    ],
    ids=["JSON", "escaped JSON", "as Python has it", "known names", "known arguments"],
)
def test_calls_that_are_written_are_trained_in_whatever_form(written: str) -> None:
    renderer = Renderer(tiny_tokenizer(template(written)))
    calls = [call("find", parcel="A\U000f0000 7", n=3), call("find", parcel="B 8", n=4)]
    (found,) = trained(renderer, row_of(user("Where?"), assistant("Looking.", tool_calls=calls)))
    assert found.startswith("Looking.")
    assert found.endswith("<|im_end|>")


@pytest.mark.parametrize(
    ("name", "content", "calls"),
    [
        ("gptoss", None, [call("get_weather", city="Rome"), call("get_weather", city="Oslo")]),
        ("lfm2", "I will use get_weather.", [call("get_weather", city="Rome")]),
        ("llama3", "I will use get_weather.", [call("get_weather", city="Rome")]),
        ("gemma3", "I will use get_weather.", [call("get_weather", city="Rome")]),
        ("phi3", "I will use get_weather.", [call("get_weather", city="Rome")]),
        ("qwen2_5_vl", "I will use get_weather.", [call("get_weather", city="Rome")]),
    ],
)
def test_calls_that_shipped_templates_drop_are_refused(name: str, content: str, calls: list[dict[str, Any]]) -> None:
    renderer = Renderer(tiny_tokenizer(shipped(name)))
    row = row_of(user("Weather?"), assistant(content, tool_calls=calls), tools=[tool("get_weather")])
    with raises("data/template-drops-calls", match="'get_weather' in message 2"):
        renderer.rows(row.messages, row.tools)


THOUGHT = "Two and two make it."
LOSES_THOUGHTS = ["gemma4", "gemma4_v2", "gemma4_v3", "llama3", "phi3", "qwen3_instruct_2507"]


@pytest.mark.parametrize("name", [*LOSES_THOUGHTS, "qwen3", "glm4moe", "gptoss", "qwen3_5_think"])
def test_thoughts_are_in_the_trained_answer_or_counted(name: str) -> None:
    renderer = Renderer(tiny_tokenizer(shipped(name)))
    thinking = row_of(user("2+2?"), assistant("It is 4. " + THOUGHT[:7], reasoning_content=THOUGHT))
    lost = THOUGHT not in "".join(trained(renderer, thinking))
    report = prepared(renderer, thinking)[1]
    assert lost == (name in LOSES_THOUGHTS)
    assert report.rows_without_thoughts == (["rows.jsonl:1"] if lost else [])
    assert any("1 rows have thoughts" in note for note in report.notes) == lost


@pytest.mark.parametrize(
    "answer",
    [
        "{% set reasoning_content = m.reasoning_content %}" + CONTENT,
        "{% if m.tool_calls and m.reasoning_content %}{{ m.reasoning_content }}{% endif %}" + CONTENT,
        "{% if m.reasoning_content %}{{ m.reasoning_content[:8] }}{% endif %}" + CONTENT,
        "{# thinking #}" + CONTENT,
    ],
    ids=["named", "beside calls", "cut", "a comment"],
)
def test_thoughts_that_a_template_only_names_are_counted(answer: str) -> None:
    renderer = Renderer(tiny_tokenizer(template(answer)))
    thinking = row_of(user("2+2?"), assistant(f"It is 4. {THOUGHT}", reasoning_content=THOUGHT))
    untrained = row_of(user("2+2?"), assistant("It is 4.", reasoning_content=THOUGHT, weight=0), where="rows.jsonl:2")
    rest = (user("3+3?"), assistant("6"))
    untrained = Row([*untrained.messages, *row_of(*rest).messages], "rows.jsonl:2", "2")
    _, report = prepared(renderer, thinking, untrained)
    assert report.rows_without_thoughts == ["rows.jsonl:1"], "what has no weight loses nothing"


@pytest.mark.parametrize("name", ["gemma4", "gemma4_v3", "llama3", "qwen3_instruct_2507"])
def test_thoughts_in_the_text_stay_there_where_the_template_drops_them_apart(name: str) -> None:
    renderer = Renderer(tiny_tokenizer(shipped(name)))
    within = row_of(user("2+2?"), assistant(f"<think>\n{THOUGHT}\n</think>\n\nIt is 4."))
    (found,) = trained(renderer, within)
    assert found.startswith(f"<think>\n{THOUGHT}\n</think>\n\nIt is 4.")
    assert prepared(renderer, within)[1].rows_without_thoughts == []


def test_tools_that_are_not_written_are_counted_whatever_the_template_names() -> None:
    row = row_of(user("Use find."), assistant("No."), tools=[tool("find")])
    for before, lost in (("{% set t = tools %}", True), ("{{ tools[0].function.name if tools }}", False)):
        report = prepared(Renderer(tiny_tokenizer(template(CONTENT, before))), row)[1]
        assert report.rows_without_tools == (["rows.jsonl:1"] if lost else [])
        assert any("1 rows list tools" in note for note in report.notes) == lost
    two = row_of(user("Use find."), assistant("No."), tools=[tool("find"), tool("look")])
    report = prepared(Renderer(tiny_tokenizer(template(CONTENT, before))), two)[1]
    assert report.rows_without_tools == ["rows.jsonl:1"], "one of two"


# The end of an answer ------------------------------------------------------------------------------------------------

TWO_ENDS = (
    "{% for m in messages %}{{ '<|turn|>' + m['role'] + '|' + (m['content'] or '') }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
    "{% if m['role'] == 'assistant' %}{{ '<|response|>' + between }}{% endif %}{{ '<|im_end|>' }}{{ after }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|turn|>assistant|' }}{% endif %}"
)


def with_controls(source: str, *names: str) -> Any:
    tokenizer = tiny_tokenizer(source)
    tokenizer.add_special_tokens({"additional_special_tokens": list(names)})
    return tokenizer


@pytest.mark.parametrize(
    ("between", "after", "end"),
    [
        ("", "", "<|response|><|im_end|>"),
        ("<|close|>", "", "<|response|><|close|><|im_end|>"),
        ("", "<|close|>", "<|response|><|im_end|>"),
        ("\n", "", "<|response|>"),
        (".", "", "<|response|>"),
    ],
    ids=["two", "three", "one behind the end of text", "a line break between", "a text between"],
)
def test_the_end_is_all_control_tokens_up_to_the_end_of_text(between: str, after: str, end: str) -> None:
    source = f"{{% set between = {between!r} %}}{{% set after = {after!r} %}}" + TWO_ENDS
    renderer = Renderer(with_controls(source, "<|turn|>", "<|response|>", "<|close|>"))
    row = row_of(user("one"), assistant("uno"), user("two"), assistant("dos"))
    assert trained(renderer, row) == [f"uno{end}", f"dos{end}"]
    report = prepared(renderer, row)[1]
    assert (report.end_of_turn, report.end_of_turn_trained, report.unterminated) == (end, True, [])
    stops = renderer.tokenizer.convert_ids_to_tokens(list(renderer.stop_ids))
    assert "<|im_end|>" in stops


def test_an_answer_with_calls_ends_with_the_end_of_text_and_not_in_the_next_turn() -> None:
    source = "{% set between = '' %}{% set after = '<|turn|>' %}" + TWO_ENDS
    renderer = Renderer(with_controls(source, "<|turn|>", "<|response|>"))
    calling = (user("Where?"), assistant(None, tool_calls=[call("find", parcel="A 7")]))
    written = '{"name": "find", "arguments": {"parcel": "A 7"}}<|response|><|im_end|>'
    assert trained(renderer, row_of(*calling)) == [written]
    says_it = (user("Where?"), assistant(None, tool_calls=[call("find", parcel="A<|im_end|>7")]))
    (found,) = trained(renderer, row_of(*says_it))
    assert found.startswith(written.replace("A 7", "A<|im_end|>7")), "an end of text in the call itself ends nothing"


@pytest.mark.parametrize("name", ["cohere2", "cohere"])
def test_answers_of_cohere_end_with_the_token_that_servers_stop_at(name: str) -> None:
    tokenizer = with_controls(shipped(name), "<|END_RESPONSE|>", "<|START_RESPONSE|>", "<|START_OF_TURN_TOKEN|>")
    tokenizer.add_special_tokens({"eos_token": "<|END_OF_TURN_TOKEN|>"})
    found = trained(Renderer(tokenizer), row_of(*NO_THOUGHTS), max_tokens=8192)
    assert len(found) == 2
    assert all(text.endswith("<|END_OF_TURN_TOKEN|>") for text in found)


# Forms of calls ------------------------------------------------------------------------------------------------------

ROME = [call("get_weather", city="Rome")]


def calling(content: str | None = None) -> Row:
    return row_of(user("Weather?"), assistant(content, tool_calls=ROME), tools=[tool("get_weather")])


TAKES = {
    "text": "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name + ' ' + c.function.arguments }}"
    "{% endfor %}",
    "null content": "{% if m.content is none %}{% for c in m.tool_calls %}{{ c.function.name ~ ' ' }}"
    "{{ c.function.arguments | tojson }}{% endfor %}{% else %}{{ m.content }}{% endif %}",
    "text and null content": "{% if m.content is none %}{% for c in m.tool_calls %}{{ c.function.name + ' ' }}"
    "{{ c.function.arguments + '' }}{% endfor %}{% else %}{{ m.content }}{% endif %}",
    "a mapping": "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name ~ ' ' }}"
    "{% if c.function.arguments is not mapping %}{{ raise_exception('a mapping!') }}{% endif %}"
    "{{ c.function.arguments | tojson }}{% endfor %}",
}


@pytest.mark.parametrize("takes", TAKES)
def test_calls_are_handed_over_as_the_template_takes_them(takes: str) -> None:
    renderer = Renderer(tiny_tokenizer(template(TAKES[takes])))
    row = calling()
    assert trained(renderer, row) == ['get_weather {"city": "Rome"}<|im_end|>']
    longer = [*row.messages, *row_of(user("a"), assistant("b")).messages]
    (whole,) = renderer.rows(longer, row.tools)
    prompt = renderer.prompt(longer[:-1], row.tools)
    assert 'get_weather {"city": "Rome"}' in renderer.tokenizer.decode(prompt)
    assert whole.ids[: len(prompt)].tolist() == prompt.tolist(), "generation reads what training does"


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (
            "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name ~ ' ' }}"
            "{% if c.function.arguments is mapping %}{{ raise_exception('no') }}{% endif %}"
            "{{ c.function.arguments | tojson }}{% endfor %}",
            "data/template-refuses-conversation",
        ),
        (
            "{{ m.content }}{% if m.content is none %}{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}"
            "{% endif %}",
            "data/template-drops-calls",
        ),
    ],
    ids=["JSON in JSON", "the word None"],
)
def test_a_form_that_writes_what_nobody_said_is_no_form(answer: str, code: str) -> None:
    row = calling()
    with raises(code):
        Renderer(tiny_tokenizer(template(answer))).rows(row.messages, row.tools)


@pytest.mark.parametrize("name", ["deepseekv3_training", "qwen2_5", "llama3_1"])
def test_shipped_templates_write_one_call(name: str) -> None:
    (found,) = trained(Renderer(tiny_tokenizer(shipped(name))), calling())
    assert "get_weather" in found
    assert '"city": "Rome"' in found


def test_a_prompt_that_the_template_does_not_write_whole_is_refused() -> None:
    """As a row of it is: nobody would know that the model was asked something else."""
    no_tools = template(CONTENT, "{% set messages = messages | rejectattr('role', 'equalto', 'tool') | list %}")
    row = row_of(user("Weather?"), assistant("Looking."), {"role": "tool", "content": "9 degrees"})
    takes_parts = template(CONTENT).replace(
        "{{ m['content'] }}", "{% for p in m['content'] %}{{ p['text'] }}{% endfor %}"
    )
    with raises("data/template-drops-message", match=r"message 3 \(tool\)"):
        Renderer(tiny_tokenizer(no_tools)).prompt(row.messages)
    renderer = Renderer(tiny_tokenizer(takes_parts))
    assert "user\nWeather?<|im_end|>" in renderer.tokenizer.decode(renderer.prompt(row.messages[:1]))
    escaped = Renderer(
        tiny_tokenizer(template(CONTENT).replace("m['content'] }}{% endif", "m['content'] | tojson }}{% endif"))
    )
    assert '"Weather?"' in escaped.tokenizer.decode(escaped.prompt(row.messages[:1])), "escaped is written"


@pytest.mark.parametrize("name", ["idefics3", "smolvlm", "llava_next"])
def test_templates_that_take_content_in_parts_have_it_so(name: str) -> None:
    renderer = Renderer(tiny_tokenizer(shipped(name)))
    found = trained(renderer, row_of(user("one"), assistant(" uno\n"), user("two"), assistant("dos")))
    assert [text.strip()[:3] for text in found] == ["uno", "dos"]


# Templates that open the answer in the prompt ------------------------------------------------------------------------

THINKS = (user("2+2?"), assistant("It is 4.", reasoning_content=THOUGHT))
SAYS_ITS_THOUGHTS = (user("2+2?"), assistant(f"<think>\n{THOUGHT}\n</think>\n\nIt is 4."))
CLOSES_ITS_THOUGHTS = (user("2+2?"), assistant(f"{THOUGHT}\n</think>\n\nIt is 4."))
R1 = ("deepseek_r1_distill", "deepseekv3")


def follows_its_prompt(renderer: Renderer, row: Row) -> list[str]:
    """What is trained; every row of the conversation begins with the very prompt of its answer."""
    for piece in renderer.rows(row.messages, row.tools, row.variables):
        answers = [i for i, m in enumerate(row.messages) if m.role == "assistant" and i >= piece.first]
        prompt = renderer.prompt(row.messages[: answers[0]], row.tools, row.variables)
        assert piece.ids[: len(prompt)].tolist() == prompt.tolist()
        assert not weights(piece, "response")[: len(prompt)].any()
        assert weights(piece, "response")[len(prompt)] == 1
    return trained(renderer, row)


@pytest.mark.parametrize("messages", [THINKS, SAYS_ITS_THOUGHTS, CLOSES_ITS_THOUGHTS], ids=["apart", "text", "closed"])
@pytest.mark.parametrize("name", R1)
def test_thoughts_follow_the_prompt_that_opens_them(name: str, messages: tuple[dict[str, Any], ...]) -> None:
    tokenizer = with_controls(shipped(name), "<｜Assistant｜>", "<｜User｜>")
    tokenizer.add_special_tokens({"eos_token": "<｜end▁of▁sentence｜>"})
    renderer = Renderer(tokenizer)
    row = row_of(*messages)
    assert follows_its_prompt(renderer, row) == [f"{THOUGHT}\n</think>\n\nIt is 4.<｜end▁of▁sentence｜>"]
    assert prepared(renderer, row)[1].notes == [], "no thought is lost"


@pytest.mark.parametrize("name", R1)
def test_an_answer_without_thoughts_closes_what_the_prompt_opened(name: str) -> None:
    renderer = Renderer(tiny_tokenizer(shipped(name)))
    found = follows_its_prompt(renderer, row_of(user("one"), assistant("uno"), user("two"), assistant("dos")))
    assert [text.split("<｜")[0] for text in found] == ["\n</think>\n\nuno", "\n</think>\n\ndos"]


def test_an_answer_to_an_opened_prompt_may_be_written_with_an_empty_block() -> None:
    renderer = Renderer(tiny_tokenizer(shipped("nemotron_3_nano")))
    assert follows_its_prompt(renderer, row_of(user("one"), assistant("uno"))) == ["</think>uno<|im_end|>"]
    found = follows_its_prompt(renderer, row_of(*THINKS))
    assert [text.split() for text in found] == [[*THOUGHT.split(), "</think>", "It", "is", "4.<|im_end|>"]]


def test_a_block_that_the_prompt_closes_is_not_trained_and_takes_no_thoughts() -> None:
    closed = template(CONTENT).replace("assistant\\n' }}{% endif %}", "assistant\\n<|x|>none<|x|>' }}{% endif %}")
    renderer = Renderer(tiny_tokenizer(closed))
    assert follows_its_prompt(renderer, row_of(*NO_THOUGHTS)) == ["uno<|im_end|>", "dos<|im_end|>"]
    with raises("data/prompt-mismatch", match="message 2 with .*template_variables"):
        renderer.rows(row_of(*THINKS).messages)


def test_a_call_follows_the_prompt_that_opens_its_thoughts() -> None:
    opened = template(CONTENT + CALLS).replace("assistant\\n' }}{% endif %}", "assistant\\n<think>\\n' }}{% endif %}")
    renderer = Renderer(tiny_tokenizer(opened))
    row = row_of(user("Weather?"), assistant(None, tool_calls=ROME, reasoning_content=THOUGHT))
    written = '<call>{"name": "get_weather", "arguments": {"city": "Rome"}}</call><|im_end|>'
    assert follows_its_prompt(renderer, row) == [f"{THOUGHT}\n</think>\n\n{written}"]


# Variables of templates, the day, and the order of turns -------------------------------------------------------------

MODES = (
    "{% set effort = reasoning_effort | default('medium') %}{{ 'Effort: ' ~ effort ~ '. Today: ' }}"
    "{{ date_string if date_string is defined else strftime_now('%d %B %Y') }}{{ '\\n' }}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
DAY = datetime.date(2020, 2, 29)


def test_variables_of_a_recipe_become_part_of_the_template() -> None:
    source = with_variables(MODES, {"reasoning_effort": "low", "date_string": "1 May 2026", "n": [1, None, True]})
    renderer = Renderer(tiny_tokenizer(source), today=DAY)
    row = row_of(user("one"), assistant("uno"))
    (piece,) = renderer.rows(row.messages)
    assert piece.text.startswith("Effort: low. Today: 1 May 2026\n<|im_start|>user\n")
    chat = [{"role": "user", "content": "one"}]
    plainly = renderer.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert piece.text.startswith(plainly), "transformers and servers write the same"
    own = renderer.tokenizer.apply_chat_template(chat, tokenize=False, reasoning_effort="high")
    assert own.startswith("Effort: high."), "who renders can set another value"


def test_a_row_sets_variables_of_its_own() -> None:
    renderer = Renderer(tiny_tokenizer(with_variables(MODES, {"reasoning_effort": "low"})), today=DAY)
    row = row_of(user("one"), assistant("uno"))
    (piece,) = renderer.rows(row.messages, (), {"reasoning_effort": "high"})
    assert piece.text.startswith("Effort: high. Today: 29 February 2020\n")
    prompt = renderer.prompt(row.messages[:1], (), {"reasoning_effort": "high"})
    assert piece.ids[: len(prompt)].tolist() == prompt.tolist()


@pytest.mark.parametrize("name", ["template_variables", "chat_template_kwargs"])
def test_variables_stand_in_a_row_and_unread_ones_are_counted(name: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    fields = {"prompt": "one", "completion": "uno"}
    lines = [
        fields | {name: {"reasoning_effort": "high"}},
        fields | {name: json.dumps({"enable_thinking": False})},
        fields,
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows, _ = load_rows(str(file))
    assert [dict(row.variables) for row in rows] == [{"reasoning_effort": "high"}, {"enable_thinking": False}, {}]
    examples, report = prepared(Renderer(tiny_tokenizer(MODES), today=DAY), *rows)
    texts = [tiny_tokenizer(MODES).decode(example.ids) for example in examples]
    assert ["Effort: high" in text for text in texts] == [True, False, False]
    assert report.rows_with_unread_variables == [f"{file}:2"]
    assert any("1 rows set template variables" in note for note in report.notes)
    assert [to_fields(row).get("template_variables") for row in rows] == [
        *(dict(row.variables) for row in rows[:2]),
        None,
    ]


@pytest.mark.parametrize("variables", ['{"messages": []}', '{"a b": 1}', "[1]", "no"])
def test_variables_that_cannot_be_are_refused(variables: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "one", "completion": "uno", "template_variables": variables}) + "\n")
    with raises("data/unusable-rows", match="field 'template_variables'"):
        load_rows(str(file))


def test_a_recipe_refuses_variables_that_the_template_does_not_read(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base", template=MODES)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "one", "completion": "uno"}) + "\n")

    def recipe(**variables: Any) -> Recipe:
        return Recipe(base=str(base), data={"train": str(tmp_path / "rows.jsonl"), "template_variables": variables})

    chat_template = recipe(reasoning_effort="low").tokenizer().chat_template
    assert (
        Renderer(tiny_tokenizer(chat_template))
        .rows(row_of(user("a"), assistant("b")).messages)[0]
        .text.startswith("Effort: low")
    )
    with raises("recipe/invalid-template-variables", match=r"'reasoning_efort'.*reasoning_effort"):
        recipe(reasoning_efort="low").tokenizer()
    of_base = BaseConfig(name=str(base), template_variables={"reasoning_effort": "low"})
    assert load_tokenizer(of_base).chat_template == chat_template
    both = recipe(reasoning_effort="high")
    text = tiny_tokenizer(replace(both, base=of_base).tokenizer().chat_template)
    assert Renderer(text).rows(row_of(user("a"), assistant("b")).messages)[0].text.startswith("Effort: high")
    with raises("base/invalid-template-variables", match=r"'reasoning_efort'.*reasoning_effort"):
        load_tokenizer(BaseConfig(name=str(base), template_variables={"reasoning_efort": "low"}))
    for variables, why in (
        ({"date_string": DAY}, "date_string is a date: write it as text, in quotes"),
        ({"tools": []}, "set by rendering itself"),
        ({"a b": 1}, "no name of a variable"),
    ):
        with raises("recipe/invalid-value", match=why):
            build(DataConfig, {"train": "x", "template_variables": variables}, source="recipe.yaml")


def test_thoughts_are_off_where_the_recipe_says_so() -> None:
    source = with_variables(shipped("qwen3_5_think"), {"enable_thinking": False})
    renderer = Renderer(tiny_tokenizer(source))
    row = row_of(user("Where?"), assistant("In the van."))
    assert follows_its_prompt(renderer, row) == ["In the van.<|im_end|>"]
    on = Renderer(tiny_tokenizer(shipped("qwen3_5_think")))
    assert follows_its_prompt(on, row) != ["In the van.<|im_end|>"]


def test_the_day_is_given_and_decides_on_the_place_in_the_cache() -> None:
    row = row_of(user("one"), assistant("uno"))
    one, other = (Renderer(tiny_tokenizer(MODES), today=day) for day in (DAY, datetime.date(2020, 3, 1)))
    assert one.rows(row.messages)[0].text != other.rows(row.messages)[0].text
    data = DataConfig(train="x")
    assert key([row], one, data) != key([row], other, data)
    assert key([row], one, data) == key([row], Renderer(tiny_tokenizer(MODES), today=DAY), data)
    assert Renderer(tiny_tokenizer(MODES)).today == datetime.date.today()
    varied = replace(row, variables={"reasoning_effort": "low"})
    assert key([varied], one, data) != key([row], one, data)


NO_SYSTEM = template(CONTENT, "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}")
DROPS_SYSTEM = "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}" + template(CONTENT)


@pytest.mark.parametrize(
    ("source", "code"),
    [(NO_SYSTEM, "data/template-refuses-conversation"), (DROPS_SYSTEM, "data/answer-tokens-unknown")],
    ids=["refuses", "drops"],
)
def test_a_system_message_without_a_place_goes_where_the_recipe_says(source: str, code: str) -> None:
    system = {"role": "system", "content": "Be brief."}
    row = row_of(system, *NO_THOUGHTS)
    tokenizer = tiny_tokenizer(source)
    with raises(code, match=r"turn_order: merge"):
        Renderer(tokenizer).rows(row.messages)
    for how, first in (("merge", "user\nBe brief.\n\none<|im_end|>"), ("drop", "user\none<|im_end|>")):
        renderer = Renderer(tokenizer, turn_order=how)
        assert follows_its_prompt(renderer, row) == ["uno<|im_end|>", "dos<|im_end|>"]
        assert f"<|im_start|>{first}" in renderer.rows(row.messages)[0].text
        _, report = prepared(renderer, row, row_of(*NO_THOUGHTS, where="rows.jsonl:2"), turn_order=how)
        assert report.rows_with_moved_system == ["rows.jsonl:1"]
        assert any("1 rows have a system message" in note and how in note for note in report.notes)
    has_a_place = Renderer(tiny_tokenizer(), turn_order="merge")
    assert "system\nBe brief." in has_a_place.rows(row.messages)[0].text


ODD = {
    "two questions": ("UUA", ["U0\n\nU1", "A2"], ["U1", "A2"]),
    "two answers": ("UAA", ["U0", "A1\n\nA2"], ["U0", "A1"]),
    "begins with the model": ("AUA", None, ["U1", "A2"]),
    "system, begins with the model": ("SAUA", ["S0", "A1", "U2", "A3"], ["S0", "A1", "U2", "A3"]),
    "late system": ("UASUA", ["U0", "A1", "S2\n\nU3", "A4"], ["U0", "A1", "U3", "A4"]),
    "two systems": ("SSUA", ["S0\n\nS1", "U2", "A3"], ["S0", "U2", "A3"]),
    "in order": ("SUAUA", ["S0", "U1", "A2", "U3", "A4"], ["S0", "U1", "A2", "U3", "A4"]),
}
ROLES = {"U": "user", "A": "assistant", "S": "system"}


@pytest.mark.parametrize("name", ODD)
def test_turns_out_of_order_are_refused_merged_or_dropped_and_told(name: str, tmp_path: Path) -> None:
    turns, merged, dropped = ODD[name]
    messages = [{"role": ROLES[role], "content": f"{role}{i}"} for i, role in enumerate(turns)]
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"messages": messages}) + "\n")
    for how, wanted in (("refuse", None), ("merge", merged), ("drop", dropped)):
        in_order_already = merged == [f"{role}{i}" for i, role in enumerate(turns)]
        if wanted is None and not in_order_already:
            with raises("data/unusable-rows", match="turn_order: (merge|drop)"):
                load_rows(str(file), turn_order=how)
            continue
        problems: list[Problem] = []
        (row,), _ = load_rows(str(file), turn_order=how, problems=problems)
        if in_order_already:
            assert ([m.content for m in row.messages], problems) == (merged, [])
            continue
        assert [m.content for m in row.messages] == wanted
        assert all(not problem.left_out and f"turn_order: {how}" in problem.reason for problem in problems)
        assert problems


def test_weights_of_spans_stay_with_their_characters_when_messages_become_one() -> None:
    two = [
        Message("user", "one"),
        Message("user", "two", spans=((0, 3, 1.0),)),
        Message("assistant", "uno"),
        Message("assistant", "dos", spans=((1, 2, 0.0),)),
    ]
    (question, answer), _ = in_order(two, "merge")
    assert [question.content[a:b] for a, b, _ in question.spans] == ["two"]
    assert [answer.content[a:b] for a, b, _ in answer.spans] == ["o"]
    assert in_order([two[0], replace(two[2], weight=0.0), two[3]], "merge")[0][1:] == [
        replace(two[2], weight=0.0),
        two[3],
    ], "answers of other weights stay two"


# Many rows -----------------------------------------------------------------------------------------------------------

WRITES_THOUGHTS = "{% if m.reasoning_content %}{{ '<t>' ~ m.reasoning_content ~ '</t>' }}{% endif %}"
LOSES: dict[str, tuple[str, Callable[[dict[str, Any]], bool], Callable[[dict[str, Any]], bool]]] = {
    "nothing": (WRITES_THOUGHTS + CONTENT + CALLS, lambda m: False, lambda m: False),
    "all calls but the first": (
        WRITES_THOUGHTS + KNOWS_CALLS["the first alone"],
        lambda m: len(m["tool_calls"]) > 1,
        lambda m: False,
    ),
    "calls beside a text": (
        WRITES_THOUGHTS + KNOWS_CALLS["calls or text"],
        lambda m: bool(m["tool_calls"] and m["content"]),
        lambda m: False,
    ),
    "arguments that are not true": (
        WRITES_THOUGHTS + KNOWS_CALLS["arguments that are true"],
        lambda m: any(not v for c in m["tool_calls"] for v in c["function"]["arguments"].values()),
        lambda m: False,
    ),
    "thoughts without calls": (
        "{% if m.tool_calls %}" + WRITES_THOUGHTS + "{% endif %}" + CONTENT + CALLS,
        lambda m: False,
        lambda m: bool(m["reasoning_content"] and not m["tool_calls"]),
    ),
}
WORDS = ["find", "look", "find the parcel", "A 7", "7", "parcel", "deep", "false", "true", "I call find."]


def random_answer(draw: random.Random) -> dict[str, Any]:
    """An answer in which words, thoughts, names and arguments say the same things."""
    values = [*WORDS, 7, 0, 2.5, True, False, None, "", {"deep": [7, "A 7"]}, []]
    calls = [
        call(
            draw.choice(["find", "look"]),
            **{k: draw.choice(values) for k in draw.sample(WORDS[5:8], draw.randint(0, 3))},
        )
        for _ in range(draw.randint(0, 3))
    ]
    content = " ".join(draw.choices(WORDS, k=draw.randint(0 if calls else 1, 4)))
    thoughts = " ".join(draw.choices(WORDS, k=draw.randint(0, 4)))
    return assistant(content, tool_calls=calls, reasoning_content=thoughts)


@pytest.mark.parametrize("loses", LOSES)
def test_of_many_rows_no_call_and_no_thought_is_lost_in_silence(loses: str) -> None:
    answer, loses_calls, loses_thoughts = LOSES[loses]
    renderer, draw = Renderer(tiny_tokenizer(template(answer))), random.Random(17)
    answers = [random_answer(draw) for _ in range(200)]
    rows = [row_of(user("Where?"), each) for each in answers]
    found = renderer.rows_of_all([(row.messages, row.tools) for row in rows])
    for message, pieces in zip(answers, found, strict=True):
        assert isinstance(pieces, DataError) == loses_calls(message), (message, pieces)
        if not isinstance(pieces, DataError):
            assert pieces[0].lost_thoughts == loses_thoughts(message), message
