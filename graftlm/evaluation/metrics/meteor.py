"""METEOR (Lavie and Agarwal 2007, "METEOR: An Automatic Metric for MT Evaluation with High Levels of Correlation with
Human Judgments", section 2), the best of the references, without WordNet:

    Fmean = P R / (alpha P + (1 - alpha) R),    alpha = 0.9
    METEOR = (1 - gamma (chunks / matches)^beta) Fmean,    beta = 3, gamma = 0.5

Words are matched if they are equal, and those that are left if their stems are (Porter 1980). The third stage of the
paper, synonyms of WordNet, needs a download and is left out, so scores are a little lower than with it. Words are
aligned from the end as in NLTK, where the paper takes the alignment with the fewest crossings.

m equal words in one chunk have 1 - 0.5 / m^3: even the reference itself is below 1.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from graftlm.config.schema import config
from graftlm.evaluation.metrics.base import Answer, Array, MetricConfig, MetricRow, references, scores
from graftlm.evaluation.metrics.words import stem, tokens

ALPHA, BETA, GAMMA = 0.9, 3.0, 0.5


@config
class MeteorConfig(MetricConfig):
    name: Literal["meteor"] = "meteor"


def meteor(answer: Sequence[str], wanted: Sequence[Sequence[str]]) -> float:
    """The best score of an answer, in words, by one of the references."""
    return max(_score(answer, each) for each in wanted)


def _score(answer: Sequence[str], reference: Sequence[str]) -> float:
    matches = aligned(answer, reference)
    if not matches:
        return 0.0
    precision, recall = len(matches) / len(answer), len(matches) / len(reference)
    mean = precision * recall / (ALPHA * precision + (1 - ALPHA) * recall)
    follows = sum(j == i + 1 and b == a + 1 for (i, a), (j, b) in pairwise(matches))
    penalty: float = GAMMA * ((len(matches) - follows) / len(matches)) ** BETA
    return (1 - penalty) * mean


def aligned(answer: Sequence[str], reference: Sequence[str]) -> list[tuple[int, int]]:
    """(place in the answer, place in the reference) of words that match, in the order of the answer."""
    found: list[tuple[int, int]] = []
    mine, theirs = list(range(len(answer))), list(range(len(reference)))
    for form in (str, stem):
        places: dict[str, list[int]] = {}
        for at in theirs:
            places.setdefault(form(reference[at]), []).append(at)
        new = [(at, there.pop()) for at in reversed(mine) if (there := places.get(form(answer[at])))]
        found += new
        mine = [at for at in mine if at not in {a for a, _ in new}]
        theirs = [at for at in theirs if at not in {b for _, b in new}]
    return sorted(found)


def parts(config: MeteorConfig, items: Sequence[Answer]) -> Array:
    return scores(
        [meteor(tokens(item.text), [tokens(each) for each in references(item, config.name)]) for item in items]
    )


ROWS = {"meteor": MetricRow(MeteorConfig, (Answer,), parts)}
