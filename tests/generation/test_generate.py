"""Many answers at once are the answers one by one; and streaming shows the same."""

from typing import Any

import numpy as np
import pytest
import torch

from graftlm.generation.answer import answer
from graftlm.generation.generate import generate
from graftlm.testing import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.versions


def varied(kind: str = "llama", **changes: Any) -> Any:
    """A tiny model with weights so large that its greedy answers differ from prompt to prompt."""
    return tiny_model(kind, initializer_range=0.6, tie_word_embeddings=False, **changes)


def prompts(count: int = 7) -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(3, 300, int(random.integers(1, 15))).tolist() for _ in range(count)]


def answers(model: Any, asked: list[list[int]], **options: Any) -> list[list[int]]:
    settings = {"stop_ids": [2], "max_new_tokens": 10} | options
    found = dict(generate(model, asked, **settings))
    assert sorted(found) == list(range(len(asked))), "each prompt is answered once"
    return [found[i] for i in range(len(asked))]


def by_hand(model: Any, prompt: list[int], stop: list[int], count: int) -> list[int]:
    """Greedy decoding without a cache: one full forward pass a token."""
    new: list[int] = []
    with torch.no_grad():
        while len(new) < count:
            token = int(model(torch.tensor([prompt + new]), use_cache=False).logits[0, -1].argmax())
            if token in stop:
                break
            new.append(token)
    return new


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_greedy_answers_of_many_are_those_of_one_prompt_at_a_time(kind: str) -> None:
    model, asked = varied(kind), prompts()
    wanted = [by_hand(model, p, [2], 10) for p in asked]
    assert len({tuple(w) for w in wanted}) > 3, "answers must differ, or this proves little"
    assert answers(model, asked) == wanted


def test_an_answer_ends_before_the_first_of_the_stop_ids() -> None:
    model, asked = varied(), prompts()
    whole = answers(model, asked, stop_ids=[2])
    stops = sorted({w[3] for w in whole})  # tokens that are known to come
    assert 2 not in stops
    found = answers(model, asked, stop_ids=stops)
    assert found == [by_hand(model, p, stops, 10) for p in asked]
    assert all(len(f) <= 3 for f in found)
    assert not any(set(f) & set(stops) for f in found)


def test_an_answer_may_keep_the_very_id_that_ended_it_and_one_that_was_cut_has_none() -> None:
    model, asked = varied(), prompts()
    free = answers(model, asked, stop_ids=[])
    stops = sorted({new[4] for new in free})
    kept, bare = answers(model, asked, stop_ids=stops, keep_stop=True), answers(model, asked, stop_ids=stops)
    for whole, new, without in zip(kept, free, bare, strict=True):
        ends = [n for n, token in enumerate(new) if token in stops]
        assert whole == new[: ends[0] + 1], "every one of these answers ends"
        assert without == whole[:-1]
    assert len({whole[-1] for whole in kept}) > 1, "of several stop ids, the one that was written"
    never = next(token for token in range(3, 300) if not any(token in new for new in free))
    assert answers(model, asked, stop_ids=[never], keep_stop=True) == free


def test_no_more_than_asked_for_is_generated() -> None:
    assert all(len(a) <= 4 for a in answers(varied(), prompts(), max_new_tokens=4))


def test_what_ships_in_the_models_generation_config_does_not_change_greedy_answers() -> None:
    model, asked = varied(), prompts()
    wanted = answers(model, asked)
    shipped = model.generation_config
    shipped.do_sample, shipped.temperature, shipped.top_p, shipped.top_k = True, 0.6, 0.9, 5
    shipped.repetition_penalty, shipped.no_repeat_ngram_size, shipped.max_length = 5.0, 1, 20
    before = shipped.to_dict()
    assert answers(model, asked) == wanted
    assert model.generation_config is shipped
    assert shipped.to_dict() == before


def test_sampling_depends_on_its_seed_and_leaves_greedy_alone() -> None:
    model, asked = varied(), prompts()
    first, again, other = (answers(model, asked, temperature=2.0, seed=s) for s in (1, 1, 2))
    assert first == again
    assert first != other
    assert answers(model, asked, temperature=1.0, top_p=1e-6) == answers(model, asked), "the likeliest token alone"


def test_each_token_is_shown_as_it_comes() -> None:
    model, asked = varied(), prompts()
    for prompt in asked:
        shown: list[int] = []
        ((_, new),) = generate(model, [prompt], stop_ids=[2], max_new_tokens=10, on_token=shown.append)
        assert [t for t in shown if t != 2] == new
        assert new == by_hand(model, prompt, [2], 10)


@pytest.mark.parametrize("question", ["what?", "the user asks", "a system tells caf\u00e9 \U0001f600"])
def test_streamed_text_is_the_answer(question: str) -> None:
    model, tokenizer = varied(), tiny_tokenizer()
    pieces: list[str] = []
    whole = answer(model, tokenizer, question, max_new_tokens=20)
    streamed = answer(model, tokenizer, question, max_new_tokens=20, on_text=pieces.append)
    assert streamed == whole
    assert whole.startswith("".join(pieces))
    assert len(pieces) > 1
    if not whole.endswith("\ufffd"):  # half of a character is never shown
        assert "".join(pieces) == whole
