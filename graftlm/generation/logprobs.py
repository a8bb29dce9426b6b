"""Log-probabilities of tokens, as the model itself gives them.

They are of its own distribution: log_softmax in float32 of the logits as they come, before grammar, bias, penalties and
temperature. So they are the same for every way to sample, and those that a plain forward pass gives; vLLM's default
(`logprobs_mode: raw_logprobs`) is the same. What is drawn may have a low one, and under a grammar often has. n rows, V
ids.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class TokenLogprob(NamedTuple):
    logprob: float
    """ln p of the token itself."""
    likeliest: list[tuple[int, float]]
    """(id, ln p) of as many as were asked for, the likeliest first. The token itself need not be among them."""


@torch.no_grad()
def of_tokens(logits: Tensor, tokens: Sequence[int], counts: Sequence[int | None]) -> list[TokenLogprob | None]:
    """The log-probability of a token for each row of logits [n, V], with `counts` of the likeliest; None: unwanted."""
    rows = [row for row, count in enumerate(counts) if count is not None]
    found: list[TokenLogprob | None] = [None] * len(tokens)
    if not rows:
        return found
    own = (logits if len(rows) == len(logits) else logits[rows]).float().log_softmax(dim=1)
    ids = torch.tensor([[tokens[row]] for row in rows], device=own.device)
    chosen = own.gather(1, ids)[:, 0].tolist()
    values, at = own.topk(max(counts[row] or 0 for row in rows), dim=1)
    pairs = [list(zip(*each, strict=True)) for each in zip(at.tolist(), values.tolist(), strict=True)]
    for row, logprob, likeliest in zip(rows, chosen, pairs, strict=True):
        found[row] = TokenLogprob(logprob, likeliest[: counts[row]])
    return found


def prompt_reader(
    prompt: Sequence[int], count: int, begin: int, found: list[TokenLogprob | None]
) -> Callable[[int, Tensor], None]:
    """What is called with logits [n, V] after the tokens of a prompt from `start` on, part by part and in order: it
    appends to `found` a log-probability for every token that they predict, from token `begin` on. Tokens before that
    one, and the first of all, have None."""

    def read(start: int, logits: Tensor) -> None:
        if not found:
            found.extend([None] * max(1, begin))
        logits = logits[max(0, begin - 1 - start) :]
        tokens = list(map(int, prompt[len(found) : len(found) + len(logits)]))
        found.extend(of_tokens(logits[: len(tokens)], tokens, [count] * len(tokens)))

    return read
