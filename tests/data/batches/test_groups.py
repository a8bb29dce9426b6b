"""Rows with several answers -> groups: the answers are all that is compared, and what is missing is named."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from graftlm.data.batches.groups import answers_of, groups, mismatched_groups, prepare_groups, usable_by
from graftlm.data.batches.pack import Group
from graftlm.data.chat.render import Renderer
from graftlm.data.quality.preflight import prepare
from graftlm.data.sources.formats import TEXT, Message
from graftlm.data.sources.source import DataConfig, Row
from graftlm.testing import tiny_tokenizer
from tests.data.shapes import SHAPES, chat, tokenizer_for
from tests.errors import raises

# One token a character: the tiny tokenizer has merged no capitals. A turn is its letter, its text and its end.
LETTERS = (
    "{% for m in messages %}{{ 'U' if m['role'] == 'user' else 'A' }}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}A{% endif %}"
)


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(tiny_tokenizer(LETTERS))


def data(**changes: Any) -> DataConfig:
    return DataConfig(train="rows.jsonl", **changes)


def pair(prompt: list[str], chosen: list[str], *rejected: list[str], where: str = "f:1") -> Row:
    messages = chat(*prompt, *chosen)
    return Row(messages, where, prompt[0], rejected=tuple(chat(*prompt, *other) for other in rejected))


def judged(prompt: list[str], answer: str, desirable: bool, where: str = "f:1") -> Row:
    return Row(chat(*prompt, answer), where, prompt[0], desirable=desirable)


def made(rows: list[Row], renderer: Renderer, needs: str, **changes: Any) -> tuple[list[Group], list[str]]:
    examples, report = prepare(answers_of(rows), renderer, data(**changes))
    found, _, problems = groups(rows, examples, needs)
    return found, [*report.problems, *problems]


def compared(group: Group, renderer: Renderer) -> list[str]:
    """The text of what is trained of each answer, control tokens included."""
    return [renderer.tokenizer.decode(e.ids[e.weights > 0]) for e in group.answers]


def test_of_a_pair_only_what_follows_the_common_messages_is_compared(renderer: Renderer) -> None:
    row = pair(["X", "EARLIER", "Y"], ["GOOD"], ["BAD"])
    (group,), problems = made([row], renderer, "pairs")
    assert problems == []
    assert compared(group, renderer) == ["GOOD<|im_end|>", "BAD<|im_end|>"]
    assert (group.pairs, group.scores) == (((0, 1),), (1.0, 0.0))
    assert [answer.where for answer in group.answers] == ["f:1", "f:1: rejected answer 1"]
    prompt = renderer.prompt(row.messages[:-1], ())
    for answer in group.answers:
        assert answer.ids[: len(prompt)].tolist() == prompt.tolist()
        assert set(answer.weights.tolist()) == {0.0, 1.0}
        assert answer.weights[: len(prompt)].sum() == 0


def test_conversations_that_part_earlier_are_compared_from_there(renderer: Renderer) -> None:
    (group,), _ = made([pair(["X"], ["FIRST", "ASKED", "SECOND"], ["OTHER", "ASKED", "LAST"])], renderer, "pairs")
    assert compared(group, renderer) == ["FIRST<|im_end|>SECOND<|im_end|>", "OTHER<|im_end|>LAST<|im_end|>"]


def test_the_best_of_a_ranking_is_compared_with_each_of_the_others(renderer: Renderer) -> None:
    (group,), _ = made([pair(["X"], ["BEST"], ["SECOND"], ["THIRD"])], renderer, "pairs")
    assert (group.pairs, group.scores) == (((0, 1), (0, 2)), (1.0, 0.0, 0.0))


def test_feedback_is_a_mark_and_a_pair_may_be_two_of_them(renderer: Renderer) -> None:
    rows = [
        judged(["X", "OLD", "Y"], "GOOD", True, "f:1"),
        judged(["X"], "BAD", False, "f:2"),
        pair(["X"], ["A"], ["B"], where="f:3"),
    ]
    found, problems = made(rows, renderer, "feedback")
    assert problems == []
    assert [group.scores for group in found] == [(1.0,), (0.0,), (1.0, 0.0)]
    assert [group.pairs for group in found] == [(), (), ()]
    assert compared(found[0], renderer) == ["GOOD<|im_end|>"]


@pytest.mark.parametrize("name", SHAPES)
def test_answers_to_one_prompt_begin_alike_in_every_shape_of_template(name: str) -> None:
    renderer = Renderer(tokenizer_for(name))
    row = pair(["a question", "an answer", "and another?"], ["yes, that one"], ["no"])
    (group,), problems = made([row], renderer, "pairs")
    assert problems == []
    prompt = renderer.prompt(row.messages[:-1], ())
    for answer, text in zip(group.answers, ("yes, that one", "no"), strict=True):
        assert answer.ids[: len(prompt)].tolist() == prompt.tolist()
        trained = answer.weights.nonzero()[0]
        assert trained[0] == len(prompt)
        assert renderer.tokenizer.decode(answer.ids[trained]) == SHAPES[name].trained(text)


def test_a_row_that_comes_twice_is_rendered_once_and_is_two_groups(renderer: Renderer) -> None:
    row = judged(["X"], "GOOD", True)
    assert len(answers_of([row, row])) == 1
    found, _ = made([row, row], renderer, "feedback")
    assert len(found) == 2
    assert found[0] == found[1]


def test_the_report_counts_pairs_and_advises_no_mask_that_would_be_refused(renderer: Renderer) -> None:
    rows = [pair(["X" * 40], ["GOOD"], ["BAD"]), pair(["Y" * 40], ["GOOD"], ["BAD"], where="f:2")]
    found, group_rows, report = prepare_groups(rows, renderer, data(), "pairs")
    assert (len(found), group_rows, report.rows) == (2, rows, 2)
    assert report.suggested_mask == "response"
    *_, report = prepare_groups(rows, renderer, data(), "feedback")
    assert report.notes == ["2 answers were liked, 2 were not"]
    same = [pair(["X"], ["SAMEGOOD"], ["SAMEBAD"])]
    with raises("data/unusable-rows", match="f:1: rejected answer 1"):
        prepare_groups(same, renderer, data(max_tokens=8, over_length="truncate"), "pairs")
    with raises("data/no-rows-left", match="each of 1 .* max_tokens=8"):
        prepare_groups([pair(["X"], ["P"], ["Q" * 9])], renderer, data(max_tokens=8), "pairs")
    strict = data(max_tokens=8, over_length="truncate", strict=True)
    with raises("data/unusable-rows", match="f:1: rejected answer 1"):
        prepare_groups([*same, pair(["Y"], ["P"], ["Q"], where="f:2")], renderer, strict, "pairs")


def test_a_pair_of_which_one_answer_is_too_long_is_left_out_whole(renderer: Renderer) -> None:
    rows = [pair(["X"], ["GOOD"], ["B" * 50]), pair(["X"], ["GOOD"], ["BAD"], where="f:2")]
    examples, report = prepare(answers_of(rows), renderer, data(max_tokens=20))
    found, group_rows, problems = groups(rows, examples, "pairs")
    assert [group.where for group in found] == [row.where for row in group_rows] == ["f:2"]
    assert (problems, report.dropped_over_length) == ([], ["f:1: rejected answer 1"])


def test_answers_that_are_cut_to_the_same_tokens_are_named(renderer: Renderer) -> None:
    rows = [pair(["X"], ["SAMEGOOD"], ["SAMEBAD"]), pair(["X"], ["GOOD"], ["BAD"], where="f:2")]
    found, problems = made(rows, renderer, "pairs", max_tokens=8, over_length="truncate")
    assert [group.where for group in found] == ["f:2"]
    assert problems == ["f:1: rejected answer 1 is rendered to the same tokens as the chosen one"]


SUPERVISED = Row(chat("X", "P"), "f:7", "X")
RAW = Row([Message(TEXT, "some text")], "f:8", "")


@pytest.mark.parametrize(
    ("needs", "row", "message"),
    [
        ("pairs", SUPERVISED, r"f:7: no rejected answer[\s\S]*`chosen` and `rejected`"),
        ("pairs", RAW, r"f:8: raw text has no answer"),
        ("pairs", judged(["X"], "P", True, "f:9"), r"f:9: no rejected answer[\s\S]*`kto`"),
        ("feedback", SUPERVISED, r"f:7: nobody says whether[\s\S]*`label`"),
        ("feedback", RAW, r"f:8: raw text"),
        ("text", SUPERVISED, r"f:7: a conversation is no raw text[\s\S]*mask: everything"),
        ("rewards", SUPERVISED, r"f:7: no rewards[\s\S]*a loop that generates"),
        ("pairs", replace(pair(["X"], ["P"], ["Q"]), rejected=(chat("X"),)), "does not end with an answer"),
    ],
)
def test_rows_that_lack_what_a_loss_needs_are_refused_by_their_place(needs: str, row: Row, message: str) -> None:
    with raises("data/rows-unfit-for-loss", match=message):
        usable_by("somebody", needs, data())([row])


def test_rows_that_have_it_pass() -> None:
    rows = [pair(["X"], ["P"], ["Q"])]
    assert usable_by("dpo", "pairs", data())(rows) == (rows, [])
    assert usable_by("kto", "feedback", data())(rows) == (rows, [])
    assert usable_by("pretraining", "text", data())([RAW]) == ([RAW], [])
    assert usable_by("pretraining", "text", data(mask="everything"))([SUPERVISED]) == ([SUPERVISED], [])
    usable, notes = usable_by("supervised", "answers", data())(rows)
    assert usable == rows
    assert "rejected answers" in notes[0]


def test_a_mismatched_answer_is_the_next_one_s_after_this_one_s_prompt(renderer: Renderer) -> None:
    rows = [
        judged(["X"], "GOOD", True, "f:1"), judged(["X"], "BAD", False, "f:2"), judged(["YY"], "OTHER", True, "f:3"),
    ]  # fmt: skip
    found, _ = made(rows, renderer, "feedback")
    probes = mismatched_groups(found)
    assert all(probe.mismatched for probe in probes)
    texts = [renderer.tokenizer.decode(probe.answers[0].ids) for probe in probes]
    end = "<|im_end|>"
    assert texts == [f"UX{end}AOTHER{end}", f"UX{end}AOTHER{end}", f"UYY{end}AGOOD{end}"]
    assert [compared(probe, renderer)[0] for probe in probes] == [f"OTHER{end}", f"OTHER{end}", f"GOOD{end}"]
    assert mismatched_groups(found[:2]) == [], "both were asked the same"
    assert mismatched_groups(found[:1]) == []
    assert np.array_equal(found[0].answers[0].ids[-2:], probes[2].answers[0].ids[-2:])
