"""The judge: a base of ours by its probabilities, and an endpoint that is a server of the test's own."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from graftlm.data.sources.formats import Message
from graftlm.selection import judge
from graftlm.selection.base import Pool
from graftlm.selection.judge import JudgeConfig
from graftlm.testing import tiny_model
from tests.errors import raises
from tests.judges.endpoint_server import Endpoint
from tests.selection.conftest import qa, some_rows


def test_an_endpoint_grades_every_row(
    endpoint: Endpoint, pool_of: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    pool = pool_of(some_rows(6))
    grade = {
        row.messages[1].content: text
        for row, text in zip(pool.rows, ["5", "Grade: 2", "4.5", "1", "3.", "no"], strict=True)
    }
    endpoint.reply = lambda prompt: next(text for answer, text in grade.items() if prompt.endswith(answer))
    scores = judge.score(JudgeConfig(url=endpoint.url, model="judge", key_from="MY_KEY", least=2.0), pool)
    assert scores.tolist() == [5, 2, 4.5, -np.inf, 3, -np.inf]
    assert "1 replies hold no grade" in pool.notes[0]
    assert all(body["model"] == "judge" and body["path"] == "/v1/chat/completions" for body in endpoint.requests)
    assert set(endpoint.keys) == {"Bearer secret"}
    assert all(row.messages[0].content in "".join(str(b) for b in endpoint.requests) for row in pool.rows)


def test_braces_of_a_row_are_its_own(endpoint: Endpoint, pool_of: Callable[..., Pool]) -> None:
    endpoint.reply = lambda prompt: "5" if prompt == "Q fill in {answer} A 4 {question}" else "1"
    pool = pool_of([qa("fill in {answer}", "4 {question}")])
    assert judge.score(JudgeConfig(url=endpoint.url, prompt="Q {question} A {answer}"), pool).tolist() == [5.0]


def test_a_busy_endpoint_is_asked_again_and_one_that_refuses_is_not(
    endpoint: Endpoint, pool_of: Callable[..., Pool]
) -> None:
    pool = pool_of(some_rows(1))
    replies: list[str | int] = ["4", 503, 429]
    endpoint.reply = lambda prompt: replies.pop()
    assert judge.score(JudgeConfig(url=endpoint.url), pool).tolist() == [4]
    endpoint.reply = lambda prompt: 401
    with raises("data/endpoint-refuses", match="401"):
        judge.score(JudgeConfig(url=endpoint.url), pool)
    assert len(endpoint.requests) == 4
    endpoint.reply = lambda prompt: 500
    with raises("data/endpoint-unreachable", match="4 attempts"):
        judge.score(JudgeConfig(url=endpoint.url), pool)
    endpoint.reply = lambda prompt: "what a fine row"
    with raises("data/ungraded-replies"):
        judge.score(JudgeConfig(url=endpoint.url), pool)


def test_rows_go_to_another_machine_only_when_that_is_allowed(
    pool_of: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    pool = pool_of(some_rows(2))
    config = JudgeConfig(url="https://judge.invalid/v1", model="x")
    with raises("data/network-not-allowed"):
        judge.score(config, pool)
    pool.network = True
    with raises("data/missing-api-key", match="OPENAI_API_KEY"):
        judge.score(config, pool)


def test_a_base_grades_by_the_probabilities_of_the_digits(pool_of: Callable[..., Pool]) -> None:
    model = tiny_model()
    pool = pool_of(some_rows(4), model)
    config = JudgeConfig(prompt="rate {question} | {answer}")
    found = judge.score(config, pool)
    for row, grade in zip(pool.rows, found, strict=True):
        question = f"rate {row.messages[0].content} | {row.messages[1].content}"
        ids = torch.from_numpy(pool.renderer.prompt([Message("user", question)]).astype("int64"))
        digits = [pool.renderer.tokenizer.encode(d, add_special_tokens=False)[0] for d in "12345"]
        with torch.no_grad():
            chance = model(ids[None]).logits[0, -1][digits].softmax(0)
        assert grade == pytest.approx(float(chance @ torch.arange(1.0, 6.0)), rel=1e-4)
    with pytest.raises(ValueError, match="answer"):
        JudgeConfig(prompt="how good?")
