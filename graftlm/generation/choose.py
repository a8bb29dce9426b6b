"""The next token of every request whose prompt is read: chosen, with its log-probability, and added to the answer."""

from collections.abc import Sequence

from torch import Tensor

from graftlm.generation.logprobs import of_tokens
from graftlm.generation.requests import Generation
from graftlm.generation.sampling import Chooser, next_tokens


def add_next(logits: Tensor, generations: Sequence[Generation], choosers: Sequence[Chooser]) -> list[int]:
    """The new ids, by logits [n, V] of n requests."""
    tokens = next_tokens(logits, choosers)
    logprobs = of_tokens(logits, tokens, [generation.request.logprobs for generation in generations])
    for generation, chooser, token, logprob in zip(generations, choosers, tokens, logprobs, strict=True):
        if chooser.matcher is not None and chooser.matcher.error is not None:
            generation.fail(chooser.matcher.error)
        generation.add(token, logprob, is_last=chooser.is_complete)
    return tokens


def chooser_of(generation: Generation) -> Chooser:
    request = generation.request
    matcher = request.grammar.matcher() if request.grammar is not None else None
    return Chooser(request.sampling, map(int, request.ids), matcher)
