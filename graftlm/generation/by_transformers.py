"""Answers by the model's own `generate`, for models that the engine's passes do not fit: the same requests, the same
choice of tokens, the same way to stop."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from graftlm.generation.choose import add_next, chooser_of
from graftlm.generation.logprobs import prompt_reader
from graftlm.generation.requests import Generation
from graftlm.model.modes import by_row
from graftlm.system import preserve_global_state


class _Choose(LogitsProcessor):  # type: ignore[misc]
    """Chooses the token of each answer, appends it there, and leaves transformers no other."""

    def __init__(self, generations: Sequence[Generation]) -> None:
        self.generations = generations
        self.choosers = [chooser_of(each) for each in generations]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        going = [n for n, generation in enumerate(self.generations) if generation.finish is None]
        chosen = torch.zeros(len(scores), dtype=torch.long, device=scores.device)
        if going:
            some = [self.generations[n] for n in going]
            for n, token in zip(going, add_next(scores[going], some, [self.choosers[n] for n in going]), strict=True):
                chosen[n] = token
        return torch.full_like(scores, float("-inf")).scatter(1, chosen[:, None], 0.0)


class _Finished(StoppingCriteria):  # type: ignore[misc]
    def __init__(self, generations: Sequence[Generation]) -> None:
        self.generations = generations

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        for generation in self.generations:
            generation.expire()
        return torch.tensor([each.finish is not None for each in self.generations], device=input_ids.device)


@contextmanager
def _nothing_shipped(model: Any) -> Iterator[None]:
    """Inside, the settings that came with the model (a penalty for repetition, say) do not fill in ours."""
    shipped, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = shipped


@contextmanager
def _whole_rows(model: Any) -> Iterator[None]:
    """Inside, the output head gets its input in one piece of memory.

    transformers hands it the last position of each row as a strided view, and on a CPU torch then copies the head's
    weight once a row: 56 MB times the rows of a batch, for SmolLM2.
    """
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def answer_batch(model: Any, generations: Sequence[Generation]) -> None:
    """Answer requests with the same deltas and prompts of one length; returns when every one is finished.

    Prompts of several lengths would be padded, and some models see the padding: in their positions or their state.
    """
    ids = torch.tensor([list(map(int, each.request.ids)) for each in generations], device=model.device)
    settings = GenerationConfig(
        max_new_tokens=max(each.request.max_new_tokens for each in generations), do_sample=False, pad_token_id=0
    )
    for each in generations:
        _read_prompt(model, each)
    rows = by_row(model, [each.row for each in generations])
    with preserve_global_state(), _nothing_shipped(model), _whole_rows(model), rows:
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=settings,
            logits_processor=LogitsProcessorList([_Choose(generations)]),
            stopping_criteria=StoppingCriteriaList([_Finished(generations)]),
        )


def _read_prompt(model: Any, generation: Generation) -> None:
    """The log-probabilities of a prompt, where they are wanted, by a forward pass of its own."""
    request = generation.request
    if request.prompt_logprobs is None:
        return
    ids = list(map(int, request.ids))
    with by_row(model, [generation.row]):
        logits = model(torch.tensor([ids], device=model.device), use_cache=False).logits[0]
    begin, found = request.prompt_logprobs_from, generation.prompt_logprobs
    prompt_reader(ids, request.prompt_logprobs, begin, found)(0, logits)
