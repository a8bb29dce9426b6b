"""BLEU, chrF, chrF++ and TER of a corpus, by sacrebleu (Post 2018, arXiv:1804.08771), from 0 to 100.

    BLEU    100 BP exp(1/4 sum_n ln p_n), p_n the share of the answers' n-grams that are in a reference (Papineni et
            al. 2002); BP = min(1, exp(1 - r/c)) for c words of answers and r of references
    chrF    100 (1 + b^2) P R / (b^2 P + R), b = 2, P and R averaged over orders 1 to 6 of characters (Popovic 2015);
            chrF++ has words of order 1 and 2 as well (Popovic 2017)
    TER     100 edits / words of a reference (Snover et al. 2006): the lower the better

The parts of an item are sacrebleu's own counts, so the value is that of its `corpus_score`, with its defaults, which
lm-eval 0.4.13 takes too. What is made of the counts is written here for many sums at once, as a bootstrap has them.
"""

from collections.abc import Sequence
from functools import cache, partial
from typing import Any, Literal

import numpy as np

from graftlm.config.schema import config
from graftlm.errors import RecipeError
from graftlm.evaluation.metrics.base import UNBOUNDED, Answer, Array, MetricConfig, MetricRow, references

BETA = 2.0
"""Of chrF: recall counts so much more than precision."""


@config
class BleuConfig(MetricConfig):
    name: Literal["bleu"] = "bleu"


@config
class ChrfConfig(MetricConfig):
    name: Literal["chrf"] = "chrf"


@config
class ChrfPlusPlusConfig(MetricConfig):
    name: Literal["chrf++"] = "chrf++"


@config
class TerConfig(MetricConfig):
    name: Literal["ter"] = "ter"


@cache
def _metric(name: str) -> Any:
    """sacrebleu's object; RecipeError where it is not installed."""
    try:
        from sacrebleu.metrics import BLEU, CHRF, TER
    except ImportError:
        raise RecipeError(
            f"metric {name!r}: sacrebleu is not installed here: pip install 'graftlm[eval]'", code="missing-package"
        ) from None
    made = {"bleu": BLEU, "chrf": CHRF, "chrf++": partial(CHRF, word_order=2), "ter": TER}
    return made[name]()


def parts(config: MetricConfig, items: Sequence[Answer]) -> Array:
    metric = _metric(config.name)
    wanted = [references(item, config.name) for item in items]
    most = max(map(len, wanted))
    streams = [[each[n] if n < len(each) else None for each in wanted] for n in range(most)]
    # Not of the public interface: sacrebleu's own bootstrap is made of it. A test compares with `corpus_score`.
    return np.asarray(metric._extract_corpus_statistics([item.text for item in items], streams), dtype=float)


def bleu(sums: Array) -> Array:
    """Of words of answers and references, n-grams in common and n-grams, for n from 1 to 4: [..., 2 + 4 + 4].

    The m-th order without a common n-gram counts as one of 2^m (sacrebleu's `exp`, as mteval-v13a has it).
    """
    answers, wanted, correct, total = sums[..., 0], sums[..., 1], sums[..., 2:6], sums[..., 6:]
    missing = correct == 0
    smooth = np.where(missing, 0.5 ** np.cumsum(missing, axis=-1), correct)
    precision = np.divide(smooth, total, out=np.zeros_like(smooth), where=total > 0)
    defined = (total > 0).all(-1) & ~missing.all(-1)
    mean = np.exp(np.log(np.where(defined[..., None], precision, 1)).mean(-1))
    brevity = np.exp(np.minimum(0, 1 - np.divide(wanted, answers, out=np.ones_like(wanted), where=answers > 0)))
    found: Array = np.where(defined, 100 * brevity * mean, 0.0)
    return found


def chrf(sums: Array) -> Array:
    """Of n-grams of answers, of references, and in common, for each order [..., 3 orders]."""
    answers, wanted, common = np.moveaxis(sums.reshape(*sums.shape[:-1], -1, 3), -1, 0)
    there = (answers > 0) & (wanted > 0)
    orders = np.maximum(there.sum(-1), 1)
    precision = np.divide(common, answers, out=np.zeros_like(common), where=there).sum(-1) / orders
    recall = np.divide(common, wanted, out=np.zeros_like(common), where=there).sum(-1) / orders
    above, below = 100 * (1 + BETA**2) * precision * recall, BETA**2 * precision + recall
    found: Array = np.divide(above, below, out=np.zeros_like(above), where=below > 0)
    return found


def ter(sums: Array) -> Array:
    """Of edits and words of references [..., 2]."""
    edits, words = sums[..., 0], sums[..., 1]
    found: Array = 100 * np.divide(edits, words, out=np.asarray(edits > 0, dtype=float), where=words > 0)
    return found


ROWS = {
    name: MetricRow(of, (Answer,), parts, value, high=high, higher_is_better=name != "ter")
    for name, of, value, high in (
        ("bleu", BleuConfig, bleu, 100.0),
        ("chrf", ChrfConfig, chrf, 100.0),
        ("chrf++", ChrfPlusPlusConfig, chrf, 100.0),
        ("ter", TerConfig, ter, UNBOUNDED),
    )
}
