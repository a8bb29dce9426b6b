"""graftlm.render: what a conversation is to training, token by token."""

import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import graftlm
from graftlm.data.batches.pack import Example
from graftlm.data.chat.masks import MASKS
from graftlm.data.chat.render import Renderer
from graftlm.data.quality.preflight import prepare
from graftlm.data.sources.load import load_rows
from graftlm.data.sources.messages import Message
from graftlm.data.sources.source import DataConfig
from graftlm.testing import tiny_tokenizer
from tests.errors import raises

ASKED = [{"role": "user", "content": "Where is my parcel?"}]
SAID = [*ASKED, {"role": "assistant", "content": "On its way."}]
LONG = [{"role": "system", "content": "Be brief."}, *SAID, *ASKED, {"role": "assistant", "content": "Still."}]
CALL = [
    *ASKED,
    {"role": "assistant", "tool_calls": [{"function": {"name": "track", "arguments": {"id": 7}}}]},
    {"role": "tool", "content": "at the door"},
    {"role": "assistant", "content": "It is at the door."},
]
TOOLS = [{"type": "function", "function": {"name": "track", "parameters": {"type": "object", "properties": {}}}}]

FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and m.reasoning_content and loop.last %}<t>{{ m.reasoning_content }}</t>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A template that leaves out what was thought before earlier answers."""


def write_rows(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_what_is_trained_stands_in_spans() -> None:
    (row,) = graftlm.render(SAID, tiny_tokenizer())
    assert row.text == (
        "<|im_start|>user\nWhere is my parcel?<|im_end|>\n<|im_start|>assistant\nOn its way.<|im_end|>\n"
    )
    assert "".join(row.tokens) == row.text
    assert row.trained == ("On its way.<|im_end|>",)
    ((start, end),) = row.spans
    assert row.roles[start:end] == ("assistant",) * (end - start - 1) + ("end-of-turn",)
    assert row.weights[start:end].tolist() == [1] * (end - start)
    assert row.weights.sum() == end - start
    assert len(row.ids) == len(row.weights) == len(row.tokens) == len(row.roles)


@pytest.mark.sampled
@pytest.mark.parametrize("mask", sorted(MASKS))
@pytest.mark.parametrize("prompt_weight", [0.0, 0.25])
@pytest.mark.parametrize("conversation", [SAID, LONG])
def test_it_is_what_training_has(
    conversation: Any, mask: Any, prompt_weight: float, tmp_path: Path, smollm2: str
) -> None:
    """Whole arrays, by way of a file of rows and of `prepare`."""
    from graftlm.hub.tokenizer import load_tokenizer

    file = write_rows(tmp_path / "rows.jsonl", [{"messages": conversation}])
    tokenizer, data = load_tokenizer(smollm2), DataConfig(train=str(file), mask=mask, prompt_weight=prompt_weight)
    rows, _ = load_rows(str(file))
    wanted, _ = prepare(rows, Renderer(tokenizer), data)
    for form in (conversation, rows[0], rows[0].messages):
        same(graftlm.render(form, tokenizer, mask=mask, prompt_weight=prompt_weight), wanted)


def same(found: list[Any], wanted: list[Example]) -> None:
    assert len(found) == len(wanted) > 0
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.ids.dtype == np.int32
        assert ours.weights.dtype == np.float32
        np.testing.assert_array_equal(ours.ids, theirs.ids)
        np.testing.assert_array_equal(ours.weights, theirs.weights)


def test_a_template_that_rewrites_gives_a_row_for_each_answer(tmp_path: Path) -> None:
    thought = [{**turn, "reasoning_content": "hm"} if turn["role"] == "assistant" else turn for turn in LONG]
    file = write_rows(tmp_path / "rows.jsonl", [{"messages": thought}])
    tokenizer = tiny_tokenizer(FORGETFUL)
    rows, _ = load_rows(str(file))
    found = graftlm.render(thought, tokenizer)
    same(found, prepare(rows, Renderer(tokenizer), DataConfig(train=str(file)))[0])
    assert [row.trained for row in found] == [
        ("<t>hm</t>On its way.<|im_end|>",),
        ("<t>hm</t>Still.<|im_end|>",),
    ]


def test_tools_are_rendered() -> None:
    template = "{% if tools %}{{ tools | tojson }}\n{% endif %}" + (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
        "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (row,) = graftlm.render(CALL, tiny_tokenizer(template), tools=TOOLS)
    assert '"name": "track", "parameters"' in row.text
    assert row.trained[1] == "It is at the door.<|im_end|>"
    assert '"id": 7' in row.trained[0]


def test_the_day_and_the_turn_order_are_given() -> None:
    dated = tiny_tokenizer("{{ strftime_now('%Y-%m-%d') }}\n" + tiny_tokenizer().chat_template)
    (row,) = graftlm.render(SAID, dated, today=datetime.date(2024, 2, 29))
    assert row.text.startswith("2024-02-29\n")
    with raises("data/unusable-conversation", match="turn_order: merge"):
        graftlm.render([*ASKED, *SAID], tiny_tokenizer())
    (row,) = graftlm.render([*ASKED, *SAID], tiny_tokenizer(), turn_order="merge")
    assert row.text.count("Where is my parcel?") == 2


def test_what_cannot_be_rendered_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match=r"'respond' is unknown\. Did you mean 'response'"):
        graftlm.render(SAID, tokenizer, mask="respond")
    with raises("data/unusable-conversation", match="list of messages"):
        graftlm.render("Where is my parcel?", tokenizer)  # type: ignore[arg-type]
    with raises("data/unusable-conversation", match="at least one message"):
        graftlm.render([], tokenizer)
    with raises("data/unusable-conversation", match=r"messages\[1\]"):
        graftlm.render([*ASKED, {"role": "nobody", "content": "?"}], tokenizer)
    with raises("data/unusable-conversation", match=r"messages\[1\]: a message must be a mapping"):
        graftlm.render([ASKED[0], Message("assistant", "mixed")], tokenizer)
    with raises("base/no-chat-template"):
        graftlm.render(SAID, tiny_tokenizer(None))


def test_a_row_has_its_own_tools(tmp_path: Path) -> None:
    rows, _ = load_rows(str(write_rows(tmp_path / "rows.jsonl", [{"messages": SAID}])))
    with pytest.raises(ValueError, match="a Row has its own"):
        graftlm.render(rows[0], tiny_tokenizer(), tools=TOOLS)


def test_rendered_rows_are_examples_that_packing_is_checked_with() -> None:
    from graftlm.testing import tiny_model

    rows = graftlm.render(SAID, tiny_tokenizer()) + graftlm.render(LONG, tiny_tokenizer())
    graftlm.check_packing(tiny_model(), rows)
    assert all(isinstance(row, Example) for row in rows)
