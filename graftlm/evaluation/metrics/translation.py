"""BLEU, chrF, chrF++ and TER of a corpus, by sacrebleu (Post 2018, arXiv:1804.08771), from 0 to 100.

    BLEU    100 BP exp(1/4 sum_n ln p_n), p_n the share of the answers' n-grams that are in a reference (Papineni et
            al. 2002); BP = min(1, exp(1 - r/c)) for c words of answers and r of references
    chrF    100 (1 + b^2) P R / (b^2 P + R), b = 2, P and R averaged over orders 1 to 6 of characters (Popovic 2015);
            chrF++ has words of order 1 and 2 as well (Popovic 2017)
    TER     100 edits / words of a reference (Snover et al. 2006): the lower the better

The parts of an item are sacrebleu's own counts, so the value is that of its `corpus_score`, with its defaults, which
lm-eval 0.4.13 takes too.
"""

from collections.abc import Sequence
from functools import cache, partial
from typing import Any, Literal

import numpy as np

from graftlm.config.schema import config
from graftlm.errors import RecipeError
from graftlm.evaluation.metrics.base import UNBOUNDED, Answer, Array, MetricConfig, MetricRow, references


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
    # Not of the public interface: sacrebleu's own bootstrap is made of these two. A test compares with `corpus_score`.
    return np.asarray(metric._extract_corpus_statistics([item.text for item in items], streams), dtype=float)


def _value(name: str, sums: Array) -> Array:
    metric = _metric(name)
    found = [metric._compute_score_from_stats(list(each)).score for each in sums.reshape(-1, sums.shape[-1])]
    return np.asarray(found, dtype=float).reshape(sums.shape[:-1])


ROWS = {
    name: MetricRow(of, (Answer,), parts, partial(_value, name), high=high, higher_is_better=name != "ter")
    for name, of, high in (
        ("bleu", BleuConfig, 100.0),
        ("chrf", ChrfConfig, 100.0),
        ("chrf++", ChrfPlusPlusConfig, 100.0),
        ("ter", TerConfig, UNBOUNDED),
    )
}
