"""Prompts -> answers, as ids: greedy or sampled, many at once."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from graftlm.generation.engine import Engine
from graftlm.generation.grammar import CompiledGrammar
from graftlm.generation.requests import Ids, Request
from graftlm.generation.sampling import Sampling
from graftlm.model.routes import Row


def generate(
    model: Any,
    prompts: Sequence[Ids],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    grammar: CompiledGrammar | None = None,
    seed: int = 0,
    stop_when: Callable[[list[int]], bool] | None = None,
    keep_stop: bool = False,
    on_token: Callable[[int], None] | None = None,
    engine: Engine | None = None,
    adapters: Sequence[str] | Row | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """Yield (index of the prompt, new ids without the one that stops), in the order in which the answers end.

    `temperature` to `frequency_penalty`: `Sampling`, and its ValueError. The answer to prompt i is drawn with the
    seed `seed` + i. An answer ends at one of `stop_ids`, and where `stop_when` of its ids so far is true; these ids
    are kept. `grammar`: what every answer must be. `keep_stop`: an answer that ended at a stop id keeps it.
    `on_token` is called with each new id, and needs a single prompt. `engine` is one of this model that exists
    already; without it one is made for this call, which holds no second copy of weights. `adapters`: as in `Request`.
    """
    assert on_token is None or len(prompts) == 1, "only a single answer can be streamed"
    sampling = Sampling(
        temperature,
        top_k,
        top_p,
        min_p,
        repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
    )
    engine = engine or Engine(model, prepack=False)
    requests = [
        Request(
            ids,
            max_new_tokens,
            replace(sampling, seed=seed + number),
            stop_ids=tuple(stop_ids),
            stop_when=stop_when,
            on_token=on_token,
            grammar=grammar,
            adapters=adapters,
        )
        for number, ids in enumerate(prompts)
    ]
    for number, generation in engine.run(requests):
        yield number, generation.ids if keep_stop else generation.answer_ids
