"""How well a model predicts texts. T tokens, W words, B UTF-8 bytes in all, and the sum of ln p over all tokens:

nats_per_token     -sum ln p / T
token_perplexity   exp(-sum ln p / T)
word_perplexity    exp(-sum ln p / W),    words are what stands between white space, as in lm-eval 0.4.13
byte_perplexity    exp(-sum ln p / B)
bits_per_byte      -sum ln p / (B ln 2): does not depend on the tokenizer
perplexity         exp(-sum ln p / texts), which is lm-eval's (for a text of one word, as in LAMBADA)
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from math import log
from typing import Literal

import numpy as np

from graftlm.config.schema import config
from graftlm.evaluation.metrics.base import UNBOUNDED, Array, Likelihood, MetricConfig, MetricRow, ratio


@config
class NatsPerTokenConfig(MetricConfig):
    name: Literal["nats_per_token"] = "nats_per_token"


@config
class TokenPerplexityConfig(MetricConfig):
    name: Literal["token_perplexity"] = "token_perplexity"


@config
class WordPerplexityConfig(MetricConfig):
    name: Literal["word_perplexity"] = "word_perplexity"


@config
class BytePerplexityConfig(MetricConfig):
    name: Literal["byte_perplexity"] = "byte_perplexity"


@config
class BitsPerByteConfig(MetricConfig):
    name: Literal["bits_per_byte"] = "bits_per_byte"


@config
class PerplexityConfig(MetricConfig):
    name: Literal["perplexity"] = "perplexity"


def words(text: str) -> int:
    """lm-eval's `count_words`: white space at an end makes an empty word there."""
    return len(re.split(r"\s+", text))


def _parts(size: Callable[[Likelihood], int], unit: float, config: MetricConfig, items: Sequence[Likelihood]) -> Array:
    return np.asarray([(-item.log_prob / unit, size(item)) for item in items], dtype=float)


def rate(sums: Array) -> Array:
    return ratio(sums[..., 0], sums[..., 1])


def exp_rate(sums: Array) -> Array:
    found: Array = np.exp(rate(sums))
    return found


def _tokens(item: Likelihood) -> int:
    return item.tokens


def _words(item: Likelihood) -> int:
    return words(item.text)


def _bytes(item: Likelihood) -> int:
    return len(item.text.encode())


def _one(item: Likelihood) -> int:
    return 1


def _row(
    of: type[MetricConfig],
    size: Callable[[Likelihood], int],
    value: Callable[[Array], Array],
    low: float,
    unit: float = 1.0,
) -> MetricRow:
    return MetricRow(of, (Likelihood,), partial(_parts, size, unit), value, low, UNBOUNDED, higher_is_better=False)


ROWS = {
    "nats_per_token": _row(NatsPerTokenConfig, _tokens, rate, 0.0),
    "token_perplexity": _row(TokenPerplexityConfig, _tokens, exp_rate, 1.0),
    "word_perplexity": _row(WordPerplexityConfig, _words, exp_rate, 1.0),
    "byte_perplexity": _row(BytePerplexityConfig, _bytes, exp_rate, 1.0),
    "bits_per_byte": _row(BitsPerByteConfig, _bytes, rate, 0.0, log(2)),
    "perplexity": _row(PerplexityConfig, _one, exp_rate, 1.0),
}
