"""IFD, perplexity, lengths, filters: each against the plain model or a plain count."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from graftlm.data.chat.roles import Role
from graftlm.data.sources.formats import TEXT, Message
from graftlm.data.sources.source import Row
from graftlm.selection import dedup, ifd, length, longest, perplexity, reversed_ifd
from graftlm.selection import format as by_format
from graftlm.selection.base import Pool, last_answer
from graftlm.testing import tiny_model
from tests.errors import raises
from tests.selection.conftest import qa, some_rows


def _perplexity(model: Any, ids: np.ndarray, count: int) -> float:
    """Of the last `count` ids, given those before, by the model's own forward pass."""
    row = torch.from_numpy(ids.astype("int64"))
    with torch.no_grad():
        log_p = model(row[None]).logits[0, :-1].log_softmax(-1).gather(1, row[1:, None])[:, 0]
    return math.exp(-float(log_p[-count:].mean()))


def test_ifd_is_the_ratio_of_perplexities_of_the_plain_model(pool_of: Callable[..., Pool]) -> None:
    model, rows = tiny_model(), some_rows(8)
    pool = pool_of(rows, model)
    header = pool.renderer.tokenization.encode("<|im_end|>\n<|im_start|>assistant\n", cuts=[])[0]
    found, by_loss = (ifd.ratios(pool, rows, ratio) for ratio in ("perplexity", "loss"))
    for number, row in enumerate(rows):
        rendered = pool.renderer.conversation(row.messages)
        start, end = last_answer(rendered)
        answer = rendered.ids[start:end]
        assert pool.renderer.decode(answer) == row.messages[1].content
        with_question, alone = (
            _perplexity(model, np.concatenate([before, answer]), len(answer))
            for before in (rendered.ids[:start], header)
        )
        assert found[number] == pytest.approx(with_question / alone, rel=1e-4)
        assert by_loss[number] == pytest.approx(math.log(with_question) / math.log(alone), rel=1e-4)
    scores = ifd.score(ifd.IfdConfig(), pool)
    assert np.array_equal(np.isneginf(scores), found >= 1), "where the question does not help, the row is left out"
    np.testing.assert_allclose(scores[found < 1], found[found < 1], rtol=1e-6)


def test_ifd_takes_the_last_answer_and_leaves_out_what_has_no_question(pool_of: Callable[..., Pool]) -> None:
    several = Row([*qa("a", "one line").messages, *qa("in one", "the user").messages], "several", "a")
    text = Row([Message(TEXT, "the system tells the user")], "text", "t")
    pool = pool_of([several, text])
    found = ifd.ratios(pool, pool.rows, "perplexity")
    assert np.isnan(found).tolist() == [False, True]
    with_question, _ = ifd.with_and_without(pool, several) or (None, None)
    assert with_question is not None
    assert pool.renderer.decode(with_question.ids[with_question.weights > 0]) == "the user"
    with raises("data/no-rows-left", match="question"):
        ifd.ratios(pool, [text], "perplexity")


def test_reversed_ifd_asks_for_the_question_given_the_answer(pool_of: Callable[..., Pool]) -> None:
    pool = pool_of([*some_rows(5), Row([Message(TEXT, "the system tells the user")], "text", "t")])
    turned = reversed_ifd.turned_around(pool.rows[2])
    assert turned is not None
    assert turned.messages[1] == Message("assistant", pool.rows[2].messages[0].content)
    assert pool.rows[2].messages[1].content in turned.messages[0].content
    scores = reversed_ifd.score(reversed_ifd.ReversedIfdConfig(), pool)
    wanted = ifd.ratios(pool, [row for r in pool.rows if (row := reversed_ifd.turned_around(r))], "perplexity")
    stays = wanted < 1
    np.testing.assert_allclose(scores[:5][stays], -wanted[stays], rtol=1e-6)
    assert np.isneginf(scores[:5][~stays]).all()
    assert np.isneginf(scores[5])


def test_bands_of_perplexity(pool_of: Callable[..., Pool]) -> None:
    pool = pool_of([*some_rows(9), qa("the user asks " * 40, "one line", "long")], max_tokens=80)
    low, middle, high = (
        perplexity.score(perplexity.PerplexityConfig(band=band), pool) for band in ("low", "middle", "high")
    )
    for scores in (low, middle, high):
        assert np.isneginf(scores).tolist() == [False] * 9 + [True]
    order = np.argsort(high[:9])
    assert np.array_equal(np.argsort(-low[:9]), order)
    assert int(middle.argmax()) == order[4], "the median comes first"
    assert {int(i) for i in np.argsort(middle[:9])[:2]} == {int(order[0]), int(order[-1])}, "and the ends last"


def test_lengths_are_counted_in_tokens_of_answers(pool_of: Callable[..., Pool]) -> None:
    rows = [*some_rows(6), qa("the user asks " * 40, "one line", "long")]
    pool = pool_of(rows, max_tokens=80)
    scores = longest.score(longest.LongestConfig(), pool)
    wanted = [int((pool.renderer.conversation(row.messages).roles == Role.ASSISTANT).sum()) for row in rows]
    assert scores[:6].tolist() == wanted[:6]
    assert np.isneginf(scores[6])
    bounds = length.LengthConfig(least=wanted[0] + 1, most=max(wanted[:6]) - 1)
    stays = np.isfinite(length.score(bounds, pool))
    assert stays.tolist() == [wanted[0] < n < max(wanted[:6]) for n in wanted[:6]] + [False]
    prompts = [last_answer(pool.renderer.conversation(row.messages))[0] for row in rows]
    stays = np.isfinite(length.score(length.LengthConfig(most_prompt=prompts[1]), pool))
    assert stays.tolist() == [n <= prompts[1] for n in prompts[:6]] + [False]


def test_format_filters_by_expressions(pool_of: Callable[..., Pool]) -> None:
    pool = pool_of([qa("a", "one line."), qa("b", "one line"), qa("c", "As an AI, one line.")])
    stays = np.isfinite(by_format.score(by_format.FormatConfig(matches=r"\.$", lacks="As an AI"), pool))
    assert stays.tolist() == [True, False, False]
    with pytest.raises(ValueError, match="no regular expression"):
        by_format.FormatConfig(matches="(")


def test_duplicates_leave_the_first(pool_of: Callable[..., Pool]) -> None:
    rows = [
        qa("a  b", "One line", "1"),
        qa("c", "one line", "2"),
        qa("A b", "one LINE ", "3"),
        qa("a b", "a line", "4"),
    ]
    stays = np.isfinite(dedup.score(dedup.DedupConfig(), pool_of(rows)))
    assert stays.tolist() == [True, True, False, True]


def test_a_row_of_more_weight_is_no_duplicate_of_itself(pool_of: Callable[..., Pool]) -> None:
    one, two = qa("a question", "one line", "1"), qa("A question", "one line", "2")
    stays = np.isfinite(dedup.score(dedup.DedupConfig(similar=0.99), pool_of([one, one, *some_rows(2), two, two])))
    assert stays.tolist() == [True, True, True, True, False, False]


def test_rows_that_call_or_think_otherwise_are_no_duplicates(pool_of: Callable[..., Pool]) -> None:
    def acts(number: int, city: str, thinking: str = "") -> Row:
        call = {"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}
        answer = Message("assistant", "", tool_calls=(call,), thinking=thinking)
        return Row(
            [Message("user", "what weather is it there, where you looked for it before?"), answer], str(number), city
        )

    thought = "of all the cities that there are it is this one"
    rows = [acts(1, "Rome"), acts(2, "Oslo"), acts(3, "Rome"), acts(4, "Rome", thought)]
    pool = pool_of(some_rows(4))
    pool.rows = rows
    for near in (0.8, None):
        stays = np.isfinite(dedup.score(dedup.DedupConfig(near=near), pool))
        assert stays.tolist() == [True, True, False, True], near


def test_near_duplicates_share_their_words(pool_of: Callable[..., Pool]) -> None:
    line = "the user asks and the assistant answers in one line what a system tells it to answer"
    words = line.split()
    texts = [" ".join(words), " ".join(words[:-1]), " ".join(reversed(words)), " ".join([*words, "again"])]
    rows = [qa("a question", text, str(n)) for n, text in enumerate(texts)]
    stays = [
        np.isfinite(dedup.score(dedup.DedupConfig(near=near), pool_of(rows))).tolist() for near in (0.8, None, 0.999)
    ]
    assert stays == [[True, False, True, False], [True] * 4, [True] * 4]


def test_similar_rows_are_those_with_similar_embeddings(pool_of: Callable[..., Pool]) -> None:
    from graftlm.selection.base import embeddings

    rows = some_rows(12)
    rows[7] = qa(rows[2].messages[0].content + " ", rows[2].messages[1].content, "near")
    pool = pool_of(rows)
    points = embeddings(pool)
    threshold = float(points[2] @ points[7]) - 1e-3
    found = np.isfinite(dedup.score(dedup.DedupConfig(near=None, similar=threshold), pool))
    stays: list[int] = []
    for n in range(12):
        if all(float(points[n] @ points[j]) < threshold for j in stays):
            stays.append(n)
    assert np.flatnonzero(found).tolist() == stays
    assert 7 not in stays
