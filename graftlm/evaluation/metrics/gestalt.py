"""Gestalt similarity (Ratcliff and Obershelp, as in Python's difflib): how alike two texts are.

    ratio(a, b) = 2 M / (|a| + |b|)

M characters are in matching blocks: the longest common block, and on each side of it the same again.

gestalt         the best ratio of the answer with a reference, from 0 to 1
nearest_choice  1 where the choice with the best ratio is a right one: for choices that a model answers in words. The
                choices are the row's field `choices`; of equal ones the first is taken
"""

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Literal

from graftlm.config.schema import config
from graftlm.evaluation.metrics.base import Answer, Array, MetricConfig, MetricRow, field_of, references, scores


@config
class GestaltConfig(MetricConfig):
    name: Literal["gestalt"] = "gestalt"


@config
class NearestChoiceConfig(MetricConfig):
    name: Literal["nearest_choice"] = "nearest_choice"


def gestalt(answer: str, reference: str) -> float:
    """Without difflib's heuristic for frequent characters, which would ignore most of a long text."""
    return SequenceMatcher(None, reference, answer, autojunk=False).ratio()


def nearest_choice(answer: str, choices: Sequence[str]) -> int:
    """The number of the choice that is most like the answer."""
    return max(range(len(choices)), key=lambda number: gestalt(answer, choices[number]))


def gestalt_parts(config: GestaltConfig, items: Sequence[Answer]) -> Array:
    return scores([max(gestalt(item.text, each) for each in references(item, config.name)) for item in items])


def nearest_parts(config: NearestChoiceConfig, items: Sequence[Answer]) -> Array:
    found = []
    for item in items:
        choices = [str(each) for each in field_of(item, "choices", config.name)]
        found.append(float(choices[nearest_choice(item.text, choices)] in references(item, config.name)))
    return scores(found)


ROWS = {
    "gestalt": MetricRow(GestaltConfig, (Answer,), gestalt_parts),
    "nearest_choice": MetricRow(NearestChoiceConfig, (Answer,), nearest_parts),
}
