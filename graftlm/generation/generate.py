"""Prompts -> answers, as ids: greedy or sampled, many at once, or streamed token by token."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from graftlm.system import preserve_global_state

Ids = Sequence[int] | np.ndarray[Any, np.dtype[np.int32]]


class _EachToken(BaseStreamer):  # type: ignore[misc]
    def __init__(self, on_token: Callable[[int], None]) -> None:
        self.on_token = on_token
        self.seen_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if self.seen_prompt:
            self.on_token(int(value.reshape(-1)[0]))
        self.seen_prompt = True

    def end(self) -> None:
        pass


class _Complete(StoppingCriteria):  # type: ignore[misc]
    """Says of each row whether its new ids, from column `width` on, are a complete answer."""

    def __init__(self, width: int, complete: Callable[[list[int]], bool]) -> None:
        self.width, self.complete = width, complete

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        done = [self.complete(row) for row in input_ids[:, self.width :].tolist()]
        return torch.tensor(done, device=input_ids.device)


def check_sampling(*, temperature: float, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0) -> None:
    """Raise ValueError for what chooses among sampled ids where nothing is sampled."""
    given = {"top_p": top_p < 1, "top_k": top_k > 0, "min_p": min_p > 0}
    if temperature == 0 and any(given.values()):
        names = " and ".join(name for name, is_given in given.items() if is_given)
        raise ValueError(f"{names}: temperature 0 takes the likeliest token, so nothing is sampled; set a temperature")


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
    seed: int = 0,
    stop_when: Callable[[list[int]], bool] | None = None,
    batch_tokens: int = 2048,
    part: tuple[int, int] = (0, 1),
    keep_stop: bool = False,
    on_token: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """Yield (index of the prompt, new ids without the one that stops), in batches of prompts of similar length.

    A batch is at most `batch_tokens` of prompts, padding included (a longer one is a batch of its own): memory grows
    with it. `part=(i, n)`: only every n-th batch, from the i-th; the n parts together are the whole. `keep_stop`: an
    answer that ended keeps the id that ended it, and one that was cut has none.

    temperature 0 is greedy, whatever settings the model came with. Above 0, an id is drawn among the `top_k` likeliest
    (0: all of them), among the likeliest that together have the probability `top_p` (Holtzman et al. 2019,
    arXiv:1904.09751), and among those that have at least `min_p` times the probability of the likeliest (Nguyen et al.
    2024, arXiv:2407.01082); they act in this order, on logits that were divided by the temperature before. Raises
    ValueError where one of these is given at temperature 0, at which it would do nothing.

    `repetition_penalty`: positive logits of ids that stand in the prompt or the answer are divided by it, negative ones
    multiplied (Keskar et al. 2019, arXiv:1909.05858); greedy answers heed it too. An answer ends where `stop_when` of
    its ids so far is true; these ids are kept. `on_token` is called with each new id, and needs a single prompt.
    """
    assert on_token is None or len(prompts) == 1, "only a single answer can be streamed"
    check_sampling(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    settings = _settings(stop_ids, max_new_tokens, temperature, top_p, top_k, min_p, repetition_penalty)
    for number, (chosen, waiting) in enumerate(_batches(prompts, batch_tokens)):
        if number % part[1] != part[0]:
            continue
        ids, mask = _padded([prompts[i] for i in chosen])
        width = ids.shape[1]
        with preserve_global_state(), _nothing_shipped(model), _whole_rows(model):
            torch.manual_seed(seed + waiting)
            answered = model.generate(
                ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=settings,
                streamer=_EachToken(on_token) if on_token else None,
                stopping_criteria=StoppingCriteriaList([_Complete(width, stop_when)]) if stop_when else None,
            )
        for row, i in enumerate(chosen):
            new = answered[row, width:].tolist()
            stop = next((n for n, token in enumerate(new) if token in stop_ids), len(new))
            new = new[: stop + keep_stop]
            if stop_when:  # the batch goes on until its last answer is complete
                complete = next((n for n in range(1, len(new) + 1) if stop_when(new[:n])), len(new))
                new = new[:complete]
            yield i, new


def _settings(
    stop_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float,
    repetition_penalty: float,
) -> GenerationConfig:
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p or None}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        eos_token_id=list(stop_ids),
        pad_token_id=stop_ids[0] if stop_ids else 0,
        repetition_penalty=None if repetition_penalty == 1.0 else repetition_penalty,
        **(sampling if temperature > 0 else {}),
    )


def _batches(prompts: Sequence[Ids], tokens: int) -> Iterator[tuple[list[int], int]]:
    """(indices of prompts of similar length, how many prompts come after them), each batch of so many tokens at most,
    padding included; the shortest prompts first."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    while order:
        size = 1
        while size < len(order) and (size + 1) * len(prompts[order[size]]) <= tokens:
            size += 1
        chosen, order = order[:size], order[size:]
        yield chosen, len(order)


def _padded(prompts: Sequence[Ids]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, attention mask), int64 [prompts, longest], padded on the left: every answer begins in the same column."""
    width = max(map(len, prompts))
    # What pads a row is not attended to, but it counts as repeated: so it is an id that the row has anyway.
    ids = torch.tensor([[int(prompt[0]) if len(prompt) else 0] * width for prompt in prompts])
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.as_tensor(np.asarray(prompt, np.int64))
        mask[row, width - len(prompt) :] = 1
    return ids, mask
