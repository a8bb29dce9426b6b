"""Scoring: ROUGE-L against Google's package, the loss against transformers' own."""

import random
from typing import Any
from unicodedata import normalize

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer

from graftlm.data.batches.pack import Example
from graftlm.data.chat.render import Renderer
from graftlm.data.quality.minhash import words_of
from graftlm.data.sources.formats import Message
from graftlm.data.sources.source import Row
from graftlm.evaluation.held_out import can_be_answered, evaluate, held_out_loss
from graftlm.evaluation.metrics.rouge import rouge_l
from graftlm.testing import tiny_model

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


SENTENCES = {
    "Chinese": ("包裹在路上。", ["包", "裹", "在", "路", "上"]),
    "Chinese beyond the basic plane": ("𠮷野家", ["𠮷", "野", "家"]),
    "Japanese": ("猫はいる。", ["猫", "は", "い", "る"]),
    "Thai": ("ไปบ้าน", ["ไ", "ป", "บ้", "า", "น"]),
    "Korean": ("안녕 세상", ["안녕", "세상"]),
    "Russian": ("Посылка в пути.", ["посылка", "в", "пути"]),
    "Greek": ("Το δέμα έρχεται!", ["το", "δέμα", "έρχεται"]),
    "Hindi": ("हिन्दी में लिखो", ["हिन्दी", "में", "लिखो"]),
    "Tamil": ("தமிழ் மொழி", ["தமிழ்", "மொழி"]),
    "Arabic": ("الطَّرْدُ قادم", ["الطَّرْدُ", "قادم"]),
    "Hebrew": ("שָׁלוֹם עולם", ["שָׁלוֹם", "עולם"]),
    "German": ("Größe: 5", ["grösse", "5"]),
    "French": ("Déjà_vu, l'été", ["déjà", "vu", "l", "été"]),
    "emoji": ("👍 ok ❤️", ["👍", "ok", "❤️"]),
}


@pytest.mark.parametrize("script", SENTENCES)
def test_words_and_rouge_l_of_every_script(script: str) -> None:
    sentence, words = SENTENCES[script]
    assert words_of(sentence) == [normalize("NFKC", word) for word in words]
    assert rouge_l(sentence, sentence) == 1.0
    assert rouge_l(sentence, normalize("NFD", sentence)) == 1.0, "one text in two Unicode forms"
    half = " ".join(words[: len(words) // 2])
    assert 0 < rouge_l(sentence, half) < 1
    assert rouge_l(sentence, "none of them") == 0.0


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
