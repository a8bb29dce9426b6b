"""The pre-flight report, counted by hand."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graftlm.data.chat.render import Renderer
from graftlm.data.quality import piece_counts
from graftlm.data.quality.preflight import prepare, shown_rows, stream
from graftlm.data.quality.report import FEW_ROWS, LEAST_ROWS, Lengths
from graftlm.data.sources.formats import TEXT, Message
from graftlm.data.sources.source import DataConfig, Row
from graftlm.testing import tiny_tokenizer
from tests.data.shapes import SHAPES, THINKING, chat, tokenizer_for, tokenizer_of
from tests.errors import raises

# One token a character: the tiny tokenizer has merged no capitals. A turn is its letter, its text and its end.
LETTERS = (
    "{% for m in messages %}{{ 'U' if m['role'] == 'user' else 'A' }}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}A{% endif %}"
)


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(tiny_tokenizer(LETTERS))


def row(*contents: str, where: str = "f:1") -> Row:
    return Row(chat(*contents), where, contents[0])


def data(**changes: Any) -> DataConfig:
    return DataConfig(train="rows.jsonl", **changes)


ROWS = [row("XYZ", "PQ", where="f:1"), row("X", "P" * 10, "Y", "Q", where="f:2"), row("X", "P", where="f:3")]
LENGTHS = [1 + 3 + 1 + 1 + 2 + 1, (1 + 1 + 1) + (1 + 10 + 1) + (1 + 1 + 1) + (1 + 1 + 1), 3 + 3]


def test_tools_and_thoughts_that_a_template_never_writes_are_told(renderer: Renderer) -> None:
    tool = {"type": "function", "function": {"name": "find"}}
    thought = Row([Message("user", "X"), Message("assistant", "P", thinking="hm")], "f:7", "X")
    rows = [thought, Row(chat("X", "P"), "f:8", "X", tools=(tool,)), *ROWS]
    assert prepare(ROWS, renderer, data())[1].notes == []
    report = prepare(rows, renderer, data())[1]
    tools, thoughts = report.notes
    assert "1 rows list tools" in tools
    assert "1 rows have thoughts" in thoughts
    assert (report.rows_without_tools, report.rows_without_thoughts) == (["f:8"], ["f:7"])
    assert prepare(rows, Renderer(tokenizer_of(THINKING)), data())[1].notes == []


def test_the_report_counts_what_a_person_counts(renderer: Renderer) -> None:
    examples, report = prepare(ROWS, renderer, data(), format="prompt-completion")
    assert [len(e) for e in examples] == LENGTHS
    assert [int(e.weights.sum()) for e in examples] == [3, 11 + 2, 2]
    assert [e.where for e in examples] == ["f:1", "f:2", "f:3"]
    assert (report.rows, report.tokens, report.supervised_tokens) == (3, sum(LENGTHS), 18)
    assert report.supervised_share == pytest.approx(18 / sum(LENGTHS))
    assert (report.longest_tokens, report.longest_row) == (LENGTHS[1], "f:2")
    assert (report.format, report.mask, report.max_tokens) == ("prompt-completion", "response", 1024)
    assert report.dropped_over_length == report.truncated_over_length == report.rows_with_special_text == []
    assert report.template_hash == renderer.template_hash
    assert re.fullmatch("[0-9a-f]{16}", report.template_hash)


def test_a_row_longer_than_the_limit_is_dropped_and_named(renderer: Renderer) -> None:
    examples, report = prepare(ROWS, renderer, data(max_tokens=LENGTHS[1] - 1))
    assert [e.where for e in examples] == ["f:1", "f:3"]
    assert report.dropped_over_length == ["f:2"]
    assert (report.rows, report.tokens) == (2, LENGTHS[0] + LENGTHS[2])
    assert report.longest_row == "f:1"
    assert prepare(ROWS, renderer, data(max_tokens=LENGTHS[1]))[1].dropped_over_length == []


def test_a_row_longer_than_the_limit_is_truncated_and_what_lost_its_end_is_counted(renderer: Renderer) -> None:
    cut_in_the_answer = 3 + 1 + 5
    examples, report = prepare(ROWS, renderer, data(max_tokens=cut_in_the_answer, over_length="truncate"))
    assert [len(e) for e in examples] == [9, cut_in_the_answer, 6]
    assert int(examples[1].weights.sum()) == 5
    assert (report.truncated_over_length, report.truncated_without_end) == (["f:2"], 1)
    assert (report.tokens, report.supervised_tokens) == (9 + 9 + 6, 3 + 5 + 2)
    assert report.dropped_over_length == []


def test_a_row_that_is_truncated_after_its_last_answer_has_lost_no_end(renderer: Renderer) -> None:
    _, report = prepare([row("X", "P", "Y" * 20)], renderer, data(max_tokens=8, over_length="truncate"))
    assert (report.truncated_over_length, report.truncated_without_end) == (["f:1"], 0)
    assert dict(report.lines())["over 8 tokens"] == "1 truncated, 0 lost their ending"


def test_under_error_every_row_longer_than_the_limit_is_listed(renderer: Renderer) -> None:
    with raises("data/unusable-rows") as caught:
        prepare(ROWS, renderer, data(max_tokens=8, over_length="error"))
    first, *lines = str(caught.value).split("\n")
    assert first == "2 of 3 rows cannot be trained on:"
    assert [s.split(" are more")[0] for s in lines] == [f"  f:1: {LENGTHS[0]} tokens", f"  f:2: {LENGTHS[1]} tokens"]
    assert all("max_tokens=8" in s and "drop or truncate" in s for s in lines)


def test_where_every_row_is_too_long_it_is_said_what_to_raise(renderer: Renderer) -> None:
    with raises("data/no-rows-left", match=r"all 3 .* max_tokens=2\."):
        prepare(ROWS, renderer, data(max_tokens=2))


def test_rows_with_nothing_to_supervise_are_listed_by_line(renderer: Renderer) -> None:
    long_question = row("X" * 20, "P", where="f:8")
    no_answer = row("X", where="f:9")
    with raises("data/unusable-rows") as caught:
        prepare([*ROWS, long_question, no_answer], renderer, data(max_tokens=10, over_length="truncate", strict=True))
    assert str(caught.value).split("\n") == [
        "2 of 5 rows cannot be trained on:",
        "  f:8: no token of this row is supervised (the first 10 tokens hold no answer): it would teach nothing",
        "  f:9: no token of this row is supervised (mask 'response'): it would teach nothing",
    ]


def test_a_row_of_which_one_answer_cannot_be_trained_on_is_not_called_left_out() -> None:
    """This template makes a row of every answer, and the second question is too long."""
    renderer = Renderer(tokenizer_of(THINKING))
    several = row("a", "b", "the question " * 40, "d", where="f:7")
    limit = {"max_tokens": 60, "over_length": "truncate"}
    examples, report = prepare([several], renderer, data(**limit))
    assert [example.where for example in examples] == ["f:7"]
    assert report.problems == []
    why = "no token of this row is supervised (the first 60 tokens hold no answer): it would teach nothing"
    assert report.notes == [
        f"f:7: some of its answers, each of which is a row of its own, are left out: {why}",
    ]
    with raises("data/unusable-rows", match="some of its answers"):
        prepare([several], renderer, data(strict=True, **limit))
    with raises("data/unusable-rows", match="some of its answers"):
        list(stream([several], renderer, data(**limit)))


@pytest.mark.parametrize("at_once", [1, 7, 30, 10**6])
def test_however_many_tokens_are_counted_at_a_time_the_report_is_the_same(
    renderer: Renderer, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    rows = [*ROWS, row("X", "P" * 20, where="f:4"), row("<|im_end|>", "Q", where="f:5")]
    for changes in ({}, {"max_tokens": 20, "over_length": "truncate"}, {"mask": "last-turn", "prompt_weight": 0.5}):
        wanted = [prepare([each], renderer, data(**changes))[1] for each in rows]
        with monkeypatch.context() as patch:
            patch.setattr(piece_counts, "AT_ONCE", at_once)
            _, report = prepare(rows, renderer, data(**changes))
        assert report.supervised_tokens == sum(one.supervised_tokens for one in wanted)
        assert report.tokens == sum(one.tokens for one in wanted)
        assert report.unterminated == [where for one in wanted for where in one.unterminated]
        assert report.truncated_without_end == sum(one.truncated_without_end for one in wanted)
        assert report.prompt_tokens.total == sum(one.prompt_tokens.total for one in wanted)
        assert report.answer_tokens.total == sum(one.answer_tokens.total for one in wanted)


def test_a_row_that_the_template_refuses_is_named_and_the_others_are_still_looked_at() -> None:
    renderer = Renderer(tokenizer_for("gemma"))
    refused_rows = [Row(chat("a", "b", system="s"), f"f:{i}", "a") for i in (4, 6)]
    with raises("data/unusable-rows") as caught:
        prepare([refused_rows[0], row("a", "b"), refused_rows[1]], renderer, data(strict=True))
    first, *lines = str(caught.value).split("\n")
    assert first == "2 of 3 rows cannot be trained on:"
    assert [s.split(": the chat template refuses")[0] for s in lines] == ["  f:4", "  f:6"]


def test_unless_it_is_strict_such_rows_are_left_out_and_told() -> None:
    renderer = Renderer(tokenizer_for("gemma"))
    refused_row = Row(chat("a", "b", system="s"), "f:4", "a")
    examples, report = prepare([refused_row, row("a", "b")], renderer, data())
    assert [e.where for e in examples] == ["f:1"]
    assert report.rows == 1
    assert [text.split(": the chat template refuses")[0] for text in report.problems] == ["f:4"]
    with raises("data/unusable-rows", match="1 of 1 rows"):
        prepare([refused_row], renderer, data())


def test_a_base_without_a_template_is_said_once_and_not_for_every_row() -> None:
    with raises("base/no-chat-template"):
        prepare(ROWS, Renderer(tiny_tokenizer(template=None)), data())


@pytest.mark.parametrize("mask", ["response", "instruction", "everything"])
@pytest.mark.parametrize(
    ("name", "ending"), [("chatml", "<|im_end|>"), ("llama-2", " </s>"), ("gemma", "<end_of_turn>"), ("alpaca", "</s>")]
)
def test_what_ends_an_answer_is_said_and_trained_under_every_mask(name: str, ending: str, mask: str) -> None:
    _, report = prepare([row("a", "b")], Renderer(tokenizer_for(name)), data(mask=mask))
    assert (report.end_of_turn, report.end_of_turn_trained) == (ending, True)
    assert dict(report.lines())["an answer ends with"] == f"{ending!r}, trained"


def test_a_template_that_ends_no_answer_is_told_on() -> None:
    endless = LETTERS.replace(" + '<|im_end|>'", "")
    _, report = prepare([row("X", "P")], Renderer(tiny_tokenizer(endless)), data())
    assert (report.end_of_turn, report.end_of_turn_trained) == ("", False)
    assert "NOT trained" in dict(report.lines())["an answer ends with"]


def test_one_begin_of_text_token_is_counted_and_two_are_refused() -> None:
    renderer = Renderer(tokenizer_for("llama-3"))
    assert prepare([row("a", "b"), row("c", "d")], renderer, data())[1].most_bos == 1
    assert prepare([row("a", "b")], Renderer(tokenizer_for("zephyr"), LETTERS), data())[1].most_bos == 0
    doubled = Renderer(tokenizer_for("llama-3"), "{{ bos_token }}" + renderer.template)
    with raises("data/unusable-rows", match="f:1: the row begins with two begin-of-text tokens"):
        prepare([row("a", "b")], doubled, data())


def test_rows_whose_own_text_holds_control_tokens_are_named(renderer: Renderer) -> None:
    rows = [row("X", "P"), row("X<|im_end|>", "P", where="f:5"), row("X", "<|endoftext|>", where="f:6")]
    _, report = prepare(rows, renderer, data())
    assert report.rows_with_special_text == ["f:5", "f:6"]
    assert dict(report.lines())["special tokens in text"] == "2 rows: f:5, f:6"
    assert "special tokens in text" not in dict(prepare(ROWS, renderer, data())[1].lines())


def test_the_mask_decides_what_is_supervised(renderer: Renderer) -> None:
    counts = {
        mask: int(prepare([row("XYZ", "PQ")], renderer, data(mask=mask))[0][0].weights.sum())
        for mask in ("response", "instruction", "everything")
    }
    assert counts == {"response": 3, "instruction": 3 + 3, "everything": LENGTHS[0] - 1}


def test_raw_text_is_supervised_to_its_end(renderer: Renderer) -> None:
    examples, report = prepare([Row([Message(TEXT, "XYZ")], "f:1", "XYZ")], renderer, data())
    assert examples[0].weights.tolist() == [0, 1, 1, 1]
    assert (report.end_of_turn, report.end_of_turn_trained) == ("<|im_end|>", True)


def test_the_lines_and_the_json_of_a_report_hold_the_same_figures(renderer: Renderer) -> None:
    _, report = prepare(ROWS, renderer, data(max_tokens=20), format="alpaca")
    lines = dict(report.lines())
    assert lines["rows"] == "2"
    assert lines["tokens"] == str(LENGTHS[0] + LENGTHS[2])
    assert lines["supervised"].startswith("5 (33.3%)")
    assert lines["longest row"] == "9 tokens (f:1)"
    assert lines["over 20 tokens"] == "1 dropped"
    tree = json.loads(json.dumps(report.to_json()))
    assert tree["supervised_share"] == pytest.approx(1 / 3)
    assert (tree["rows"], tree["dropped_over_length"]) == (2, ["f:2"])


def test_progress_is_told_of_every_row(renderer: Renderer) -> None:
    counts: list[int] = []
    prepare(ROWS, renderer, data(max_tokens=20), progress=counts.append)
    assert counts == [1, 2, 3]


def test_shown_rows_carry_id_text_role_and_weight_of_every_token(renderer: Renderer, tmp_path: Path) -> None:
    raw = Row([Message(TEXT, "X")], "f:4", "X")
    shown = shown_rows([ROWS[2], raw, ROWS[0]], renderer, data(), 2)
    to_id = renderer.tokenizer.convert_tokens_to_ids
    wanted = [
        ("U", "boilerplate", 0.0),
        ("X", "user", 0.0),
        ("<|im_end|>", "special", 0.0),
        ("A", "boilerplate", 0.0),
        ("P", "assistant", 1.0),
        ("<|im_end|>", "end-of-turn", 1.0),
    ]
    assert [(r["where"], r["raw"]) for r in shown] == [("f:3", False), ("f:4", True)]
    assert shown[0]["tokens"] == [{"id": to_id(t), "text": t, "role": r, "weight": w} for t, r, w in wanted]
    assert [t["weight"] for t in shown[1]["tokens"]] == [0.0, 1.0]
    assert json.loads(json.dumps(shown)) == shown
    (weighted,) = shown_rows(ROWS[2:], renderer, data(prompt_weight=0.25), 1)
    assert [t["weight"] for t in weighted["tokens"]] == [0.0, 0.25, 0.25, 0.25, 1.0, 1.0]


# What the report says of lengths and endings ---------------------------------------------------------------------


def test_prompt_and_answer_lengths_are_those_of_the_texts(renderer: Renderer) -> None:
    _, report = prepare(ROWS, renderer, data())
    assert report.prompt_tokens.counts.tolist() == [0, 1, 1, 1]  # X, XY, XYZ
    assert (report.prompt_tokens.total, report.answer_tokens.total) == (3 + 2 + 1, 2 + 11 + 1)
    assert report.prompt_ratio == pytest.approx(6 / 14)
    tree = report.to_json()
    assert tree["answer_tokens"]["tokens"] == 14
    assert sum(tree["answer_tokens"]["rows"]) == 3
    assert tree["answer_tokens"]["quantiles"]["50%"] == 2
    assert dict(report.lines())["tokens of an answer"] == "median 2, 95 % within 11, longest 11"


@pytest.mark.parametrize("seed", range(4))
def test_quantiles_and_histograms_of_lengths_are_numpys(seed: int) -> None:
    draw = np.random.default_rng(seed)
    lots = [draw.integers(0, 40 * 10**seed, draw.integers(1, 50)) for _ in range(3)]
    lengths = Lengths()
    for lot in lots:
        lengths.add(lot)
    every = np.concatenate(lots)
    assert lengths.total == every.sum()
    for share in (0.05, 0.5, 0.95, 1.0):
        assert lengths.quantile(share) == np.quantile(every, share, method="inverted_cdf")
    edges, rows = lengths.histogram()
    assert rows == np.histogram(every, edges)[0].tolist()
    assert len(rows) <= 24
    assert sum(rows) == len(every)


@pytest.mark.parametrize(
    ("mask", "prompt", "rows", "wanted"),
    [
        ("response", 40, LEAST_ROWS, "instruction"),
        ("response", 2, LEAST_ROWS, "response"),
        ("response", 4, LEAST_ROWS, "instruction"),
        ("response", 40, LEAST_ROWS - 1, "response"),
        ("response", 8, FEW_ROWS + 1, "response"),
        ("response", 20, FEW_ROWS + 1, "instruction"),
        ("everything", 40, LEAST_ROWS, "everything"),
    ],
)
def test_long_prompts_and_few_rows_suggest_the_loss_over_instructions(
    renderer: Renderer, mask: str, prompt: int, rows: int, wanted: str
) -> None:
    _, report = prepare([row("X" * prompt, "PQRS")] * rows, renderer, data(mask=mask))
    assert report.suggested_mask == wanted
    assert ("may do better" in dict(report.lines())["prompts to answers"]) == (wanted != mask)


def test_rows_whose_end_is_not_trained_are_named(renderer: Renderer) -> None:
    cut = row("X", "P" * 20, where="f:4")
    _, report = prepare([*ROWS, cut], renderer, data(max_tokens=20, over_length="truncate"))
    assert report.unterminated == ["f:2", "f:4"]  # f:2 has two answers, and its second one is cut
    assert dict(report.lines())["EOS not in loss"] == "2 rows: f:2, f:4"
    assert prepare([*ROWS, cut], renderer, data())[1].unterminated == []
    endless = LETTERS.replace(" + '<|im_end|>'", "")
    assert prepare(ROWS, Renderer(tiny_tokenizer(endless)), data())[1].unterminated == ["f:1", "f:2", "f:3"]


@pytest.mark.sampled
@pytest.mark.parametrize("mask", ["response", "instruction", "everything"])
@pytest.mark.parametrize("name", SHAPES)
def test_with_every_template_that_ends_answers_all_ends_are_trained(name: str, mask: str) -> None:
    conversation = [row("a", "b", "c", " d\n", where="f:1"), row("e", "f", where="f:2")]
    assert prepare(conversation, Renderer(tokenizer_for(name)), data(mask=mask))[1].unterminated == []


def test_rows_that_reading_left_out_are_said(renderer: Renderer) -> None:
    _, report = prepare(ROWS, renderer, data())
    assert "left out" not in dict(report.lines())
    report.problems = ["f:7: not valid JSON", "f:9: no answer"]
    assert "f:9: no answer" in dict(report.lines())["left out"]
    assert report.to_json()["problems"] == report.problems


# Rows without end ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"max_tokens": 8}, {"max_tokens": 8, "over_length": "truncate"}])
def test_streamed_rows_give_the_same_examples(renderer: Renderer, changes: dict[str, Any]) -> None:
    wanted, _ = prepare(ROWS * 50, renderer, data(**changes))
    found = list(stream(iter(ROWS * 50), renderer, data(**changes)))
    assert [(e.ids.tolist(), e.weights.tolist(), e.where) for e in found] == [
        (e.ids.tolist(), e.weights.tolist(), e.where) for e in wanted
    ]


def test_a_streamed_row_that_cannot_be_trained_on_is_named(renderer: Renderer) -> None:
    examples = stream(iter([*ROWS, row("X", where="f:9")]), renderer, data())
    with raises("data/unusable-rows", match="f:9: no token of this row is supervised"):
        list(examples)
