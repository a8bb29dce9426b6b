"""How tokens are chosen, against the definitions computed by hand in float64."""

from typing import Any

import pytest
import torch

from graftlm.data.chat.render import Renderer
from graftlm.data.sources.formats import Message
from graftlm.generation.answer import answer
from graftlm.generation.engine import Engine
from graftlm.generation.generate import generate
from graftlm.generation.requests import Request
from graftlm.generation.sampling import Sampling
from graftlm.testing import tiny_model, tiny_tokenizer
from tests.errors import raises

pytestmark = pytest.mark.versions

DRAWS = 400
TEMPERATURE = 1.5
PROMPT = [7, 30, 12]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(initializer_range=0.6, tie_word_embeddings=False)


def drawn(model: Any, **options: Any) -> set[int]:
    """The first ids of many answers to one prompt."""
    found = generate(
        model, [PROMPT] * DRAWS, stop_ids=[2], max_new_tokens=1, temperature=TEMPERATURE, keep_stop=True, **options
    )  # fmt: skip
    return {ids[0] for _, ids in found}


def probabilities(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return (model(torch.tensor([PROMPT])).logits[0, -1].double() / TEMPERATURE).softmax(0)


def test_top_k_draws_among_the_likeliest_alone(model: Any) -> None:
    p = probabilities(model)
    wanted = set(p.topk(5).indices.tolist())
    found = drawn(model, top_k=5)
    assert found <= wanted
    assert {i for i in wanted if p[i] > 0.05} <= found, "what is likely among them is drawn"
    assert len(drawn(model)) > 5


@pytest.mark.parametrize("min_p", [0.05, 0.3])
def test_min_p_leaves_out_what_has_less_than_a_share_of_the_likeliest(model: Any, min_p: float) -> None:
    p = probabilities(model)
    wanted = set((p >= min_p * p.max()).nonzero()[:, 0].tolist())
    found = drawn(model, min_p=min_p)
    assert found <= wanted
    assert {i for i in wanted if p[i] > 0.05} <= found
    assert drawn(model) - wanted, "without it others are drawn too, or this proves nothing"


def test_a_repetition_penalty_is_that_of_its_paper_and_padding_does_not_count(model: Any) -> None:
    """Greedy, token by token over whole rows; in one batch with longer prompts the answers are the same."""
    prompts, penalty = [[7], [7, 30, 12], [40, 41, 42, 43, 44, 45, 9, 9]], 1.4

    def by_hand(prompt: list[int]) -> list[int]:
        row = list(prompt)
        while len(row) < len(prompt) + 12:
            with torch.no_grad():
                logits = model(torch.tensor([row])).logits[0, -1].double()
            for token in set(row):
                logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
            row.append(int(logits.argmax()))
        return row[len(prompt) :]

    options: dict[str, Any] = {"stop_ids": [], "max_new_tokens": 12}
    found = dict(generate(model, prompts, repetition_penalty=penalty, **options))
    wanted = [by_hand(prompt) for prompt in prompts]
    assert [found[i] for i in range(3)] == wanted
    plain = dict(generate(model, prompts, **options))
    assert [plain[i] for i in range(3)] != wanted


def test_every_change_of_logits_acts_in_the_order_of_the_documentation(model: Any) -> None:
    """Greedy, token by token over whole rows: bias, repetition penalty, then presence and frequency penalty of what
    the answer holds. Together in a batch with plain requests, which stay as they are."""
    bias = ((5, 3.0), (9, -2.5), (30, 40.0))
    given = [
        Sampling(),
        Sampling(presence_penalty=1.5),
        Sampling(frequency_penalty=0.7),
        Sampling(frequency_penalty=-0.4, presence_penalty=-0.5),
        Sampling(logit_bias=bias),
        Sampling(logit_bias=bias, repetition_penalty=1.3, presence_penalty=2.0, frequency_penalty=1.9),
    ]

    def by_hand(s: Sampling) -> list[int]:
        new: list[int] = []
        while len(new) < 25:
            with torch.no_grad():
                logits = model(torch.tensor([PROMPT + new])).logits[0, -1].double()
            for token, added in s.logit_bias:
                logits[token] = logits[token] + added
            for token in set(PROMPT + new):
                logits[token] *= s.repetition_penalty if logits[token] < 0 else 1 / s.repetition_penalty
            for token in set(new):
                logits[token] -= s.presence_penalty + s.frequency_penalty * new.count(token)
            new.append(int(logits.argmax()))
        return new

    engine = Engine(model)
    found = dict(engine.run([Request(PROMPT, 25, sampling) for sampling in given]))
    wanted = [by_hand(sampling) for sampling in given]
    assert [found[i].ids for i in range(len(given))] == wanted
    assert len(set(map(tuple, wanted))) == len(given), "each of them matters here"


def test_a_bias_of_100_forces_and_of_minus_100_bans_when_drawn_too(model: Any) -> None:
    for forced in (4, 299):
        sampling = Sampling(temperature=1.0, logit_bias=((forced, 100.0),))
        ((_, answer),) = Engine(model).run([Request(PROMPT, 5, sampling)])
        assert answer.ids == [forced] * 5
    ((_, answer),) = Engine(model).run([Request(PROMPT, 5)])
    banned = tuple((token, -100.0) for token in sorted(set(answer.ids)))
    ((_, other),) = Engine(model).run([Request(PROMPT, 40, Sampling(temperature=0.8, logit_bias=banned))])
    assert not set(other.ids) & set(answer.ids)


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": -0.1}, {"temperature": float("nan")}, {"top_p": 0.0, "temperature": 1}, {"top_p": 1.1},
        {"min_p": -0.1}, {"repetition_penalty": 0.0}, {"presence_penalty": 2.1}, {"frequency_penalty": float("inf")},
        {"logit_bias": ((3, 101.0),)}, {"logit_bias": ((-1, 1.0),)}, {"top_k": -1},
    ],
)  # fmt: skip
def test_a_number_out_of_its_range_is_refused_by_name(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(given))}"):
        Sampling(**given)


def test_a_bias_for_an_id_that_the_model_does_not_have_is_refused_at_once(model: Any) -> None:
    engine = Engine(model)
    with raises("request/unknown-token-id"):
        engine.submit(Request(PROMPT, 1, Sampling(logit_bias=((300, 1.0),))))


def test_several_answers_have_the_seeds_that_follow(model: Any) -> None:
    one = Request(PROMPT, 6, Sampling(temperature=1.0, seed=7))
    found = dict(Engine(model).run(one.several(3)))
    alone = dict(generate(model, [PROMPT] * 3, stop_ids=[], max_new_tokens=6, temperature=1.0, seed=7))
    assert [found[i].ids for i in range(3)] == [alone[i] for i in range(3)]
    assert len({tuple(ids) for ids in alone.values()}) == 3


@pytest.mark.parametrize("given", [{"top_k": 3}, {"min_p": 0.1}, {"top_p": 0.9}])
def test_what_would_do_nothing_at_temperature_0_is_refused(model: Any, given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(given))}: temperature 0"):
        list(generate(model, [PROMPT], stop_ids=[2], max_new_tokens=1, **given))


def test_an_answer_ends_before_the_first_of_the_stop_texts_wherever_tokens_end(model: Any) -> None:
    tokenizer, question = tiny_tokenizer(), "the user asks"
    renderer = Renderer(tokenizer)
    ((_, ids),) = generate(model, [renderer.prompt([Message("user", question)])], stop_ids=[2], max_new_tokens=30)
    whole = renderer.decode(ids)
    assert len(whole) > 12
    texts = [whole[at : at + length] for at in range(1, len(whole) - 4, 3) for length in (1, 2, 4)]
    texts = [text for text in texts if "\ufffd" not in text]
    assert len(texts) > 5
    for text in texts:
        for stop in ([text], ["never in it", text]):
            pieces: list[str] = []
            found = answer(model, tokenizer, question, max_new_tokens=30, stop=stop, on_text=pieces.append)
            assert found == whole[: whole.index(text)]
            assert "".join(pieces) == found, "nothing of what ends it is shown"


def test_stop_texts_stop_the_computation_too(model: Any) -> None:
    seen: list[int] = []

    def complete(ids: list[int]) -> bool:
        seen.append(len(ids))
        return len(ids) == 3

    found = dict(generate(model, [PROMPT, [9]], stop_ids=[], max_new_tokens=50, stop_when=complete))
    assert [len(ids) for ids in found.values()] == [3, 3]
    assert max(seen) == 3
