"""Log-probabilities of an answer and of its prompt, against a plain forward pass of the model over the whole row."""

from typing import Any

import pytest
import torch

from graftlm.generation import engine as engine_module
from graftlm.generation.engine import Engine
from graftlm.generation.logprobs import TokenLogprob
from graftlm.generation.requests import Generation, Request
from graftlm.generation.sampling import Sampling
from graftlm.testing import tiny_model
from tests.architectures import build
from tests.errors import raises
from tests.generation.test_engine import long_prompts, with_deltas
from tests.generation.test_generate import varied

pytestmark = pytest.mark.versions

SHARED = list(range(3, 83))
"""Long enough that requests with this beginning compute it once, and for several parts of READ_TOKENS."""


def forward(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double().log_softmax(1)


def check(found: TokenLogprob | None, wanted: torch.Tensor, token: int, count: int) -> None:
    """`wanted` [V]: ln p of each id."""
    assert found is not None
    assert found.logprob == pytest.approx(float(wanted[token]), abs=1e-4)
    assert [value for _, value in found.likeliest] == pytest.approx(wanted.topk(count).values.tolist(), abs=1e-4)
    assert [value for _, value in found.likeliest] == pytest.approx(
        [float(wanted[i]) for i, _ in found.likeliest], abs=1e-4
    )
    assert len({i for i, _ in found.likeliest}) == count


def check_all(model: Any, answer: Generation, count: int | None, prompt_count: int | None) -> None:
    prompt = list(answer.request.ids)
    wanted = forward(model, [*prompt, *answer.ids])
    assert len(answer.logprobs) == (0 if count is None else len(answer.ids))
    for at, found in enumerate(answer.logprobs):
        check(found, wanted[len(prompt) + at - 1], answer.ids[at], count or 0)
    assert len(answer.prompt_logprobs) == (0 if prompt_count is None else len(prompt))
    for at, read in enumerate(answer.prompt_logprobs):
        if at == 0:
            assert read is None, "nothing predicts the first token"
        else:
            check(read, wanted[at - 1], prompt[at], prompt_count or 0)


@pytest.mark.parametrize("step_tokens", [13, 512])
def test_they_are_those_of_a_forward_pass_whatever_is_sampled_and_shared(step_tokens: int) -> None:
    model = varied(head_dim=16)
    odd = Sampling(
        temperature=2.0, top_k=50, repetition_penalty=1.4, presence_penalty=1.0, logit_bias=((9, 5.0),), seed=3
    )
    asked = [
        (SHARED, None, None, odd), (SHARED, 0, None, odd), (SHARED, 3, 2, odd), (SHARED, 5, 0, Sampling()),
        ([*SHARED, 7], None, 4, Sampling()), ([5], 1, 1, Sampling()), *((ids, 2, 1, odd) for ids in long_prompts(3)),
    ]  # fmt: skip
    engine = Engine(model, step_tokens=step_tokens)
    assert not engine.reason
    requests = [Request(ids, 6, sampling, logprobs=k, prompt_logprobs=p) for ids, k, p, sampling in asked]
    for number, answer in engine.run(requests):
        check_all(model, answer, asked[number][1], asked[number][2])


def test_a_model_that_transformers_runs_gives_the_same() -> None:
    model = build("mamba")
    engine = Engine(model)
    assert engine.reason
    requests = [Request(SHARED[:20], 5, logprobs=2, prompt_logprobs=1), Request(SHARED[:20], 5)]
    (first, plain) = (answer for _, answer in sorted(engine.run(requests), key=lambda pair: pair[0]))
    check_all(model, first, 2, 1)
    check_all(model, plain, None, None)
    assert first.ids == plain.ids
    later = Request(SHARED[:20], 5, prompt_logprobs=1, prompt_logprobs_from=7)
    ((_, found),) = engine.run([later])
    assert found.prompt_logprobs == [None] * 7 + first.prompt_logprobs[7:]


def test_each_request_has_those_of_its_own_deltas() -> None:
    from graftlm.model.modes import by_row

    model = with_deltas()
    rows: list[tuple[str, ...]] = [(), ("the-lora",), ("the-prefix",), ("the-full", "the-ia3")]
    requests = [Request(SHARED, 3, adapters=row, logprobs=1, prompt_logprobs=1) for row in rows]
    for number, answer in Engine(model).run(requests):
        with by_row(model, [rows[number]]):
            check_all(model, answer, 1, 1)


def test_they_are_there_when_a_token_is_given_to_its_listener() -> None:
    model, seen = tiny_model(), list[tuple[int, int]]()
    engine = Engine(model)
    answer = engine.submit(
        Request([5], 4, logprobs=0, on_token=lambda _: seen.append((len(answer.ids), len(answer.logprobs))))
    )
    engine.wait(answer)
    assert seen == [(1, 1), (2, 2), (3, 3), (4, 4)]


@pytest.mark.parametrize("step_tokens", [13, 512])
@pytest.mark.parametrize("begin", [0, 1, 2, 60, 80, 83])
def test_log_probabilities_of_continuations_share_what_stands_before(
    begin: int, step_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of tokens from `begin` on, for four continuations of one beginning: the numbers of a pass over each alone."""
    model, computed = varied(head_dim=16), list[int]()
    plain = engine_module.pass_over

    def counted(copy: Any, pieces: Any) -> torch.Tensor:
        computed.append(sum(len(piece.ids) for piece in pieces))
        return plain(copy, pieces)

    monkeypatch.setattr(engine_module, "pass_over", counted)
    ends = [[7, 9, 11, 5], [7, 9, 12, 6], [200, 201, 202, 203], [7, 8, 7, 8, 7, 8]]
    requests = [Request([*SHARED, *end], 1, prompt_logprobs=1, prompt_logprobs_from=begin) for end in ends]
    for number, answer in Engine(model, step_tokens=step_tokens).run(requests):
        ids = [*SHARED, *ends[number]]
        wanted = forward(model, ids)
        assert len(answer.prompt_logprobs) == len(ids)
        assert answer.prompt_logprobs[: max(1, begin)] == [None] * max(1, begin)
        for at in range(max(1, begin), len(ids)):
            check(answer.prompt_logprobs[at], wanted[at - 1], ids[at], 1)
    everything, shared = sum(len(SHARED) + len(end) for end in ends), max(0, begin - 1)
    assert sum(computed) <= everything - 3 * (shared if shared >= engine_module.SHARED_TOKENS else 0) + 6


def test_a_beginning_outside_of_the_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt_logprobs_from is 3"):
        Engine(tiny_model()).submit(Request([1, 2, 3], 1, prompt_logprobs=0, prompt_logprobs_from=3))


@pytest.mark.parametrize("given", [{"logprobs": 301}, {"prompt_logprobs": -1}])
def test_more_of_the_likeliest_than_there_are_is_refused(given: dict[str, int]) -> None:
    with raises("request/too-many-logprobs"):
        Engine(tiny_model()).submit(Request([5], 1, **given))  # type: ignore[arg-type]
