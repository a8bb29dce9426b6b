"""Scoring: ROUGE-L against Google's package, the loss against transformers' own."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer

from graftlm.data.formats import Message
from graftlm.data.pack import Example
from graftlm.data.render import Renderer
from graftlm.data.source import Row
from graftlm.testing import tiny_model
from graftlm.training.held_out import can_be_answered, evaluate, held_out_loss, rouge_l

WORDS = ["return", "the", "first", "item", "of", "a", "list,", "or", "None", "if", "it's", "empty.", "2"]


def test_rouge_l_is_that_of_the_reference_package() -> None:
    scorer = RougeScorer(["rougeL"])
    draw = random.Random(0)
    for _ in range(500):
        a, b = (" ".join(draw.choices(WORDS, k=draw.randint(1, 12))) for _ in range(2))
        assert rouge_l(a, b) == pytest.approx(scorer.score(a, b)["rougeL"].fmeasure, abs=1e-12)


@pytest.mark.parametrize(
    ("a", "b", "score"), [("", "", 0.0), ("a", "", 0.0), ("A b.", "a B", 1.0), ("a b", "b a", 0.5)]
)
def test_rouge_l_by_hand(a: str, b: str, score: float) -> None:
    assert rouge_l(a, b) == score


@pytest.mark.parametrize("packed", [True, False])
def test_the_loss_is_the_mean_over_all_supervised_tokens(packed: bool) -> None:
    draw = np.random.default_rng(1)
    model = tiny_model()
    examples, total, count = [], 0.0, 0
    for number in range(5):
        ids = draw.integers(3, 300, int(draw.integers(6, 20))).astype(np.int32)
        weights = (draw.random(len(ids)) < 0.5).astype(np.float32)
        weights[0], weights[-1] = 0, 1
        examples.append(Example(ids, weights, str(number)))
        labels = torch.from_numpy(np.where(weights > 0, ids, -100).astype(np.int64))[None]
        with torch.no_grad():
            loss = model(torch.from_numpy(ids.astype(np.int64))[None], labels=labels).loss
        total, count = total + float(loss) * int(weights.sum()), count + int(weights.sum())
    assert held_out_loss(model, examples, pack_tokens=40, packed=packed) == pytest.approx(total / count, rel=1e-5)


def test_answers_come_back_in_the_order_of_the_rows(tokenizer: Any) -> None:
    model, renderer = tiny_model(), Renderer(tokenizer)
    rows = [Row([Message("user", "x" * n), Message("assistant", "y")], str(n), str(n)) for n in (30, 2, 17)]
    examples = [Example(renderer.conversation(r.messages).ids, np.array([0.0, 1.0], np.float32).repeat(
        [1, len(renderer.conversation(r.messages).ids) - 1]).astype(np.float32), r.where) for r in rows]  # fmt: skip
    seen: list[int] = []
    together = evaluate(
        model, renderer, examples, rows, max_new_tokens=5, pack_tokens=256, packed=True, progress=seen.append
    )
    alone = [
        evaluate(model, renderer, [e], [r], max_new_tokens=5, pack_tokens=256, packed=True).answers[0]
        for e, r in zip(examples, rows, strict=True)
    ]
    assert together.answers == alone
    assert seen == [1, 2, 3]


def test_only_a_question_with_an_answer_can_be_answered() -> None:
    assert can_be_answered(Row([Message("user", "a"), Message("assistant", "b")], "", ""))
    assert not can_be_answered(Row([Message("text", "a")], "", ""))
    assert not can_be_answered(Row([Message("assistant", "a"), Message("user", "b")], "", ""))
