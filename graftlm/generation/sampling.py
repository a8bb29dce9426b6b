"""The next token of each request: the likeliest, or one drawn by the request's own random numbers.

What a request draws depends on its seed and its logits alone, so it is the same in any company. n requests, V ids.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from graftlm.generation.grammar import Matcher, mask_logits

Bias = tuple[tuple[int, float], ...]
"""(id, what is added to its logit)."""


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. temperature 0 is greedy.

    First the logits are changed, in this order, which greedy answers heed too:
    1. A grammar (`Request.grammar`) leaves only the ids with which the answer can go on.
    2. `logit_bias`: a number is added to the logits of these ids, from -100 to 100.
    3. `repetition_penalty`: positive logits of ids that stand in the prompt or the answer are divided by it, negative
       ones multiplied (Keskar et al. 2019, arXiv:1909.05858).
    4. `presence_penalty` is taken off once for each id that stands in the answer, `frequency_penalty` as often as it
       stands there; from -2 to 2, as OpenAI has them. The prompt does not count.

    Above 0 they are then divided by the temperature, and an id is drawn among the `top_k` likeliest (0: all of them),
    among the likeliest that together have the probability `top_p` (Holtzman et al. 2019, arXiv:1904.09751), and among
    those that have at least `min_p` times the probability of the likeliest (Nguyen et al. 2024, arXiv:2407.01082), in
    this order. ValueError for a number out of its range, and where one of these three is given at temperature 0, at
    which it would do nothing.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Bias = ()

    def __post_init__(self) -> None:
        for name, (fits, range_) in _RANGES.items():
            value = getattr(self, name)
            if not (math.isfinite(value) and fits(value)):
                raise ValueError(f"{name} is {range_}, not {value}")
        for token, bias in self.logit_bias:
            if token < 0 or not -100 <= bias <= 100:
                raise ValueError(f"logit_bias: a number from -100 to 100 for a token id, not {bias} for {token}")
        given = {"top_p": self.top_p < 1, "top_k": self.top_k > 0, "min_p": self.min_p > 0}
        if self.temperature == 0 and any(given.values()):
            names = " and ".join(name for name, is_given in given.items() if is_given)
            raise ValueError(
                f"{names}: temperature 0 takes the likeliest token, so nothing is sampled; set a temperature"
            )


_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda value: value >= 0, "0 or more"),
    "top_k": (lambda value: value >= 0, "0 (all ids) or more"),
    "top_p": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "min_p": (lambda value: 0 <= value <= 1, "from 0 to 1"),
    "repetition_penalty": (lambda value: value > 0, "above 0"),
    "presence_penalty": (lambda value: -2 <= value <= 2, "from -2 to 2"),
    "frequency_penalty": (lambda value: -2 <= value <= 2, "from -2 to 2"),
}

GREEDY = Sampling()


class Chooser:
    """Chooses the tokens of one request, one after the other."""

    def __init__(self, sampling: Sampling, prompt: Iterable[int], matcher: Matcher | None = None) -> None:
        self.sampling, self.matcher = sampling, matcher
        self.settings = Sampling(sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
        """What requests whose ids are drawn together have in common."""
        self.random = np.random.default_rng(sampling.seed)
        self.repeats = sampling.repetition_penalty != 1
        self.counts = bool(sampling.presence_penalty or sampling.frequency_penalty)
        self.seen = set(map(int, prompt)) if self.repeats else set[int]()
        self.answer = Counter[int]()
        """How often each id stands in the answer."""

    @property
    def changes(self) -> bool:
        """Whether it changes logits."""
        return bool(self.matcher or self.sampling.logit_bias or self.seen or self.answer)

    def change(self, logits: Tensor) -> None:
        """Add the bias to logits [V] and take the penalties off, in place."""
        sampling = self.sampling
        if sampling.logit_bias:
            ids, bias = zip(*sampling.logit_bias, strict=True)
            logits[torch.tensor(ids, device=logits.device)] += logits.new_tensor(bias)
        if self.seen:
            at = torch.tensor(list(self.seen), device=logits.device)
            values, penalty = logits[at], sampling.repetition_penalty
            logits[at] = torch.where(values > 0, values / penalty, values * penalty)
        if self.answer:
            at = torch.tensor(list(self.answer), device=logits.device)
            counts = logits.new_tensor(list(self.answer.values()))
            logits[at] -= sampling.presence_penalty + sampling.frequency_penalty * counts

    def took(self, token: int) -> None:
        if self.repeats:
            self.seen.add(token)
        if self.counts:
            self.answer[token] += 1
        if self.matcher is not None:
            self.matcher.take(token)

    @property
    def is_complete(self) -> bool:
        """Whether the grammar allows nothing more."""
        return self.matcher is not None and self.matcher.is_complete


@torch.no_grad()
def next_tokens(logits: Tensor, choosers: Sequence[Chooser]) -> list[int]:
    """One id for each row of logits [n, V], which stay as they are, by the chooser of that row."""
    changed = _changed(logits, choosers)
    alike: dict[Sampling, list[int]] = {}
    for row, chooser in enumerate(choosers):
        alike.setdefault(chooser.settings, []).append(row)
    tokens = [0] * len(choosers)
    for settings, rows in alike.items():
        own = changed if len(rows) == len(changed) else changed[rows]
        points = [choosers[row].random.random() for row in rows] if settings.temperature > 0 else []
        found = _drawn(own, settings, points) if points else own.argmax(dim=1).tolist()
        for row, token in zip(rows, found, strict=True):
            tokens[row] = int(token)
    for chooser, token in zip(choosers, tokens, strict=True):
        chooser.took(token)
    return tokens


def _changed(logits: Tensor, choosers: Sequence[Chooser]) -> Tensor:
    """Logits [n, V] in float32 with what the choosers change; a copy, unless they change nothing."""
    rows = [row for row, chooser in enumerate(choosers) if chooser.changes]
    logits = logits.to(torch.float32, copy=bool(rows))
    if any(chooser.matcher for chooser in choosers):
        mask_logits(logits, [chooser.matcher for chooser in choosers])
    for row in rows:
        choosers[row].change(logits[row])
    return logits


def _drawn(logits: Tensor, settings: Sampling, points: Sequence[float]) -> list[int]:
    """The ids at these points, from 0 to 1, of the cumulative distributions: logits [n, V]."""
    if settings.temperature != 1:
        logits = logits / settings.temperature
    ids = None
    if settings.top_k or settings.top_p < 1:
        count = min(settings.top_k or logits.shape[1], logits.shape[1])
        logits, ids = logits.topk(count, dim=1)  # the likeliest first
    probabilities = logits.softmax(dim=1)
    if settings.top_p < 1:
        before = probabilities.cumsum(dim=1, dtype=torch.float64) - probabilities
        probabilities = probabilities.masked_fill(before >= settings.top_p, 0)
    if settings.min_p > 0:
        largest = probabilities.max(dim=1, keepdim=True).values
        probabilities = probabilities.masked_fill(probabilities < settings.min_p * largest, 0)
    # in float64: over 50,000 ids, sums in float32 are off by more than the rarest of them
    sums = probabilities.cumsum(dim=1, dtype=torch.float64)
    total = sums[:, -1:].clone()
    wanted = torch.tensor(points, dtype=torch.float64, device=sums.device)[:, None] * total
    # below the total, which is reached at the last id that can be drawn
    wanted = torch.minimum(wanted, torch.nextafter(total, torch.zeros_like(total)))
    places = torch.searchsorted(sums, wanted, right=True)
    return [int(one) for one in (places if ids is None else ids.gather(1, places))[:, 0].tolist()]
