"""Reported mistakes of chat templates and masks, on the templates that TRL ships and on tiny ones."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graftlm.data.check import Report, prepare
from graftlm.data.formats import FORMATS
from graftlm.data.pack import Example
from graftlm.data.render import Renderer
from graftlm.data.source import DataConfig, Row
from graftlm.testing import tiny_tokenizer


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
