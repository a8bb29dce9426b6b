"""NIST (Doddington 2002, "Automatic Evaluation of Machine Translation Quality Using N-gram Co-Occurrence Statistics",
equations 2 and 3), from 0 up:

    NIST = sum_{n=1..5} [sum of Info(g) over common n-grams g / n-grams of the answers] * BP
    Info(w1 .. wn) = log2(count of w1 .. w(n-1) in the references / count of w1 .. wn)
    BP = exp(beta ln^2 min(1, L_answers / L_references)),    beta such that BP = 0.5 for a ratio of 2/3

Of several references the one with the best precision counts, for each order, as in NLTK's `corpus_nist`. Words are
those of `words.tokens`; mteval's own tokenizer is not built. An order without n-grams adds nothing.
"""

from collections import Counter
from collections.abc import Sequence
from math import log, log2
from typing import Literal

import numpy as np

from graftlm.config.schema import config
from graftlm.evaluation.metrics.base import UNBOUNDED, Answer, Array, MetricConfig, MetricRow, references
from graftlm.evaluation.metrics.words import ngrams, tokens

ORDER = 5
BETA = log(0.5) / log(1.5) ** 2

Words = list[str]


@config
class NistConfig(MetricConfig):
    name: Literal["nist"] = "nist"


def information(corpus: Sequence[Sequence[Words]]) -> dict[tuple[str, ...], float]:
    """n-gram -> Info, by all references of a corpus."""
    counts = Counter(g for refs in corpus for ref in refs for n in range(1, ORDER + 1) for g in ngrams(ref, n))
    words = sum(len(ref) for refs in corpus for ref in refs)
    return {g: log2((counts[g[:-1]] if len(g) > 1 else words) / count) for g, count in counts.items()}


def counts_of(answer: Words, wanted: Sequence[Words], info: dict[tuple[str, ...], float]) -> list[float]:
    """Information in common and number of n-grams for each order, then words of references and answer (each order
    may have another reference)."""
    above, below, lengths = list[float](), list[float](), 0
    for n in range(1, ORDER + 1):
        own = Counter(ngrams(answer, n))
        found = []
        for ref in wanted:
            common = sum(info[g] * count for g, count in (own & Counter(ngrams(ref, n))).items())
            found.append((common / own.total() if own else 0.0, common, own.total(), len(ref)))
        _, common, total, length = max(found)
        above.append(common)
        below.append(total)
        lengths += length
    return [*above, *below, lengths, ORDER * len(answer)]


def value(sums: Array) -> Array:
    above, below = sums[..., :ORDER], sums[..., ORDER : 2 * ORDER]
    precision = np.divide(above, below, out=np.zeros_like(above), where=below > 0).sum(-1)
    share = np.minimum(1, sums[..., -1] / np.maximum(sums[..., -2], 1))
    penalty = np.exp(BETA * np.log(np.maximum(share, 1e-300)) ** 2)
    found: Array = precision * penalty
    return found


def parts(config: NistConfig, items: Sequence[Answer]) -> Array:
    wanted = [[tokens(each) for each in references(item, config.name)] for item in items]
    info = information(wanted)
    return np.asarray([counts_of(tokens(item.text), refs, info) for item, refs in zip(items, wanted, strict=True)])


ROWS = {"nist": MetricRow(NistConfig, (Answer,), parts, value, high=UNBOUNDED)}
