"""Rows that only ask: their ids are those of generation, and what does not fit is told."""

from typing import Any

from graftlm.data.batches.prompts import asked_in, prepare_prompts, shown_prompts
from graftlm.data.chat.render import Renderer
from graftlm.data.sources.formats import Message
from graftlm.data.sources.source import DataConfig, Row
from graftlm.testing import tiny_tokenizer
from tests.errors import raises

ASK, ANSWER = Message("user", "where is it?"), Message("assistant", "on its way")


def row(*messages: Message, where: str = "f:1", **more: Any) -> Row:
    return Row(list(messages), where, "g", **more)


def test_what_is_asked_and_what_is_compared_with() -> None:
    assert asked_in(row(ASK)) == ([ASK], None)
    assert asked_in(row(ASK, ANSWER)) == ([ASK], "on its way")
    assert asked_in(row(ASK, ANSWER, ASK)) == ([ASK, ANSWER, ASK], None)
    assert asked_in(row(ASK, ANSWER, desirable=False)) == ([ASK], None), "nobody wants to be like what was not liked"


def test_a_prompt_is_what_generation_sees_and_nothing_of_it_is_trained() -> None:
    renderer = Renderer(tiny_tokenizer())
    rows = [row(ASK), row(ASK, ANSWER, where="f:2"), row(Message("system", "s"), ASK, ANSWER, ASK, where="f:3")]
    made, prompt_rows, report = prepare_prompts(rows, renderer, DataConfig(train="f"), room=8, format="prompt")
    assert prompt_rows == rows
    for prompt, one in zip(made, rows, strict=True):
        assert prompt.ids.tolist() == renderer.prompt(asked_in(one)[0]).tolist()
        assert prompt.where == one.where
        assert not prompt.weights.any()
    assert [prompt.reference for prompt in made] == [None, "on its way", None]
    assert (report.rows, report.tokens) == (3, sum(map(len, made)))
    assert (report.longest_row, report.longest_tokens) == ("f:3", len(made[2]))
    assert "1 rows have an answer" in report.notes[0]
    names = [name for name, _ in report.lines()]
    assert "tokens of a prompt" in names
    assert "supervised" not in names
    (shown,) = shown_prompts(made, renderer, 1)
    assert "".join(token["text"] for token in shown["tokens"]) == tiny_tokenizer().decode(made[0].ids)
    assert not any(token["weight"] for token in shown["tokens"])


def test_a_prompt_that_leaves_no_room_is_dropped_or_refused_and_told() -> None:
    renderer = Renderer(tiny_tokenizer())
    rows = [row(ASK), row(Message("user", "where " * 40), where="f:2")]
    size = len(renderer.prompt([ASK]))
    data = DataConfig(train="f", max_tokens=size + 8)
    made, prompt_rows, report = prepare_prompts(rows, renderer, data, room=8)
    assert (len(made), prompt_rows, report.dropped_over_length) == (1, rows[:1], ["f:2"])
    with raises("data/no-rows-left", match="all 2"):
        prepare_prompts(rows, renderer, data, room=9)
    with raises("data/unusable-rows", match="f:2: "):
        prepare_prompts(rows, renderer, DataConfig(train="f", max_tokens=size + 8, over_length="error"), room=8)


def test_what_the_template_refuses_is_a_problem_of_its_row() -> None:
    template = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template += "{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}: {% endif %}"
    renderer = Renderer(tiny_tokenizer(template))
    rows = [row(ASK), row(Message("system", "s"), ASK, where="f:2")]
    made, _, report = prepare_prompts(rows, renderer, DataConfig(train="f"), room=8)
    assert len(made) == 1
    assert "f:2: " in report.problems[0]
    with raises("data/unusable-rows", match="1 of 2 rows"):
        prepare_prompts(rows, renderer, DataConfig(train="f", strict=True), room=8)
