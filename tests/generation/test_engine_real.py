"""The engine on SmolLM2, whose answers mean something: against transformers, in float32."""

from typing import Any

import pytest
import torch

from graftlm.data.sources.formats import Message
from graftlm.generation.answer import chat_renderer
from graftlm.generation.engine import Engine
from graftlm.generation.requests import Request
from graftlm.generation.sampling import Sampling
from graftlm.hub.load import load_base

pytestmark = pytest.mark.slow

QUESTIONS = [
    "What is a list?",
    "Write a haiku about rain.",
    "Name three rivers.",
    "2 + 2?",
    "Explain recursion to a child.",
]


@pytest.fixture(scope="module")
def loaded() -> Any:
    return load_base("smollm2", dtype="float32")


def test_greedy_answers_are_those_of_transformers(loaded: Any) -> None:
    """Equal up to the first position where the two best logits are within 1e-4, and such positions are rare."""
    model, tokenizer = loaded
    renderer = chat_renderer(model, tokenizer)
    asked = [
        renderer.prompt([Message("user", f"{text} {more}")]).tolist() for text in QUESTIONS for more in ("", "Why?")
    ]
    engine = Engine(model, step_tokens=64)
    assert engine.reason == ""
    found = dict(engine.run([Request(ids, 24, stop_ids=renderer.stop_ids) for ids in asked]))
    compared = close = 0
    for number, ids in enumerate(asked):
        out = model.generate(
            torch.tensor([ids]), max_new_tokens=24, do_sample=False, repetition_penalty=1.0, output_logits=True,
            return_dict_in_generate=True, eos_token_id=list(renderer.stop_ids), pad_token_id=0,
        )  # fmt: skip
        for mine, theirs, logits in zip(
            found[number].ids, out.sequences[0, len(ids) :].tolist(), out.logits, strict=False
        ):
            first, second = logits[0].topk(2).values.tolist()
            compared += 1
            if first - second < 1e-4:
                close += 1
                break
            assert mine == theirs
        else:
            assert len(found[number].ids) == out.sequences.shape[1] - len(ids)
    assert compared > 100
    assert close <= 0.005 * compared


def test_samples_of_one_prompt_are_those_of_each_alone(loaded: Any) -> None:
    """In float64, where rounding decides nothing."""
    model, tokenizer = loaded
    ids = chat_renderer(model, tokenizer).prompt([Message("user", "Tell a story about a boat. " * 8)]).tolist()
    assert len(ids) > 60
    requests = [Request(ids, 6, Sampling(temperature=1.0, seed=seed)) for seed in range(4)]
    model.double()
    try:
        together = dict(Engine(model, step_tokens=48).run(requests))
        for number, request in enumerate(requests):
            engine = Engine(model)
            assert engine.wait(engine.submit(request)).ids == together[number].ids
        assert len({tuple(generation.ids) for generation in together.values()}) > 1
    finally:
        model.float()
