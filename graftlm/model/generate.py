"""Prompts -> answers, as ids: greedy or sampled, many at once, or streamed token by token."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig
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
    seed: int = 0,
    batch_tokens: int = 2048,
    part: tuple[int, int] = (0, 1),
    keep_stop: bool = False,
    on_token: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """Yield (index of the prompt, new ids without the one that stops), in batches of prompts of similar length.

    A batch is at most `batch_tokens` of prompts, padding included (a longer one is a batch of its own): memory grows
    with it. `part=(i, n)`: only every n-th batch, from the i-th; the n parts together are the whole. `keep_stop`: an
    answer that ended keeps the id that ended it, and one that was cut has none.

    temperature 0 is greedy, whatever settings the model came with. `on_token` is called with each new id, and needs a
    single prompt.
    """
    assert on_token is None or len(prompts) == 1, "only a single answer can be streamed"
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        eos_token_id=list(stop_ids),
        pad_token_id=stop_ids[0] if stop_ids else 0,
        **({"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}),
    )
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    number = -1
    while order:
        number, size = number + 1, 1
        while size < len(order) and (size + 1) * len(prompts[order[size]]) <= batch_tokens:
            size += 1
        chosen, order = order[:size], order[size:]
        if number % part[1] != part[0]:
            continue
        width = len(prompts[chosen[-1]])
        ids = torch.zeros(len(chosen), width, dtype=torch.long)
        mask = torch.zeros(len(chosen), width, dtype=torch.long)
        for row, i in enumerate(chosen):  # on the left, so that every answer begins in the same column
            ids[row, width - len(prompts[i]) :] = torch.as_tensor(np.asarray(prompts[i], np.int64))
            mask[row, width - len(prompts[i]) :] = 1
        with preserve_global_state(), _nothing_shipped(model), _whole_rows(model):
            torch.manual_seed(seed + len(order))
            answered = model.generate(
                ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=settings,
                streamer=_EachToken(on_token) if on_token else None,
            )
        for row, i in enumerate(chosen):
            new = answered[row, width:].tolist()
            stop = next((n for n, token in enumerate(new) if token in stop_ids), len(new))
            yield i, new[: stop + keep_stop]
