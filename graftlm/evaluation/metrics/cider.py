"""CIDEr-D (Vedantam et al. 2015, arXiv:1411.5726, section 7), from 0 to 10, in the form of the COCO evaluation:

    CIDEr-D = 10/4 sum_{n=1..4} mean over references r of
              exp(-(l_a - l_r)^2 / (2 sigma^2)) * min(g_n(a), g_n(r)) . g_n(r) / (|g_n(a)| |g_n(r)|),    sigma = 6
    g_n: TF-IDF of each n-gram, tf * ln(items / items with the n-gram in a reference)

l counts bigrams and tf is a count, as in pycocoevalcap. IDF is that of the references given, so a score depends on the
corpus, and a corpus of one item has 0. Words are `words.tokens` without punctuation, where the COCO evaluation has
Stanford's tokenizer.
"""

from collections import Counter
from collections.abc import Sequence
from math import exp, log, sqrt
from typing import Literal

from graftlm.config.schema import config
from graftlm.evaluation.metrics.base import Answer, Array, MetricConfig, MetricRow, references, scores
from graftlm.evaluation.metrics.words import ngrams, tokens

ORDER = 4
SIGMA = 6.0

Vector = dict[tuple[str, ...], float]


@config
class CiderConfig(MetricConfig):
    name: Literal["cider"] = "cider"


def cider(answers: Sequence[Sequence[str]], wanted: Sequence[Sequence[Sequence[str]]]) -> list[float]:
    """The score of each answer [words] by its references [[words], ...]."""
    seen = Counter(
        g for refs in wanted for g in {g for ref in refs for n in range(1, ORDER + 1) for g in ngrams([*ref], n)}
    )
    items = log(len(wanted))

    def vectors(words: Sequence[str]) -> list[Vector]:
        counts = (Counter(ngrams([*words], n)) for n in range(1, ORDER + 1))
        return [{g: tf * (items - log(max(1, seen[g]))) for g, tf in each.items()} for each in counts]

    def score(answer: Sequence[str], refs: Sequence[Sequence[str]]) -> float:
        own, total = vectors(answer), 0.0
        for ref in refs:
            near = exp(-((max(0, len(answer) - 1) - max(0, len(ref) - 1)) ** 2) / (2 * SIGMA**2))
            total += near * sum(_cosine(a, r) for a, r in zip(own, vectors(ref), strict=True))
        return 10 * total / (ORDER * len(refs))

    return [score(answer, refs) for answer, refs in zip(answers, wanted, strict=True)]


def _cosine(answer: Vector, reference: Vector) -> float:
    common = sum(min(x, reference[g]) * reference[g] for g, x in answer.items() if g in reference)
    size = sqrt(sum(x * x for x in answer.values())) * sqrt(sum(x * x for x in reference.values()))
    return common / size if size else 0.0


def _words(text: str) -> list[str]:
    return [each for each in tokens(text) if each[0].isalnum() or each[0] == "_"]


def parts(config: CiderConfig, items: Sequence[Answer]) -> Array:
    wanted = [[_words(each) for each in references(item, config.name)] for item in items]
    return scores(cider([_words(item.text) for item in items], wanted))


ROWS = {"cider": MetricRow(CiderConfig, (Answer,), parts, high=10.0)}
