"""ROUGE-L F1 (Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", section 3), the best of the
references:

    P = LCS(a, r) / |a|,    R = LCS(a, r) / |r|,    F1 = 2 P R / (P + R) = 2 LCS / (|a| + |r|)
"""

from collections.abc import Sequence
from typing import Literal

from graftlm.config.schema import config
from graftlm.data.quality.minhash import words_of
from graftlm.evaluation.metrics.base import Answer, Array, MetricConfig, MetricRow, references, scores


@config
class RougeLConfig(MetricConfig):
    name: Literal["rouge_l"] = "rouge_l"


def rouge_l(reference: str, answer: str) -> float:
    """ROUGE-L F1: the longest common subsequence of words, lower case, against both lengths.

    Words are those of `words_of`, in any script. For ASCII text that is the score of Google's rouge-score without
    stemming, which knows ASCII words only.
    """
    a, b = words_of(reference), words_of(answer)
    row = [0] * (len(b) + 1)
    for word in a:
        before = 0
        for i, other in enumerate(b, start=1):
            before, row[i] = row[i], before + 1 if word == other else max(row[i], row[i - 1])
    common = row[-1]
    return 2 * common / (len(a) + len(b)) if common else 0.0


def parts(config: RougeLConfig, items: Sequence[Answer]) -> Array:
    return scores([max(rouge_l(each, item.text) for each in references(item, config.name)) for item in items])


ROWS = {"rouge_l": MetricRow(RougeLConfig, (Answer,), parts)}
