"""F1 of what two texts have in common.

    P = |A n B| / |A|,    R = |A n B| / |B|,    F1 = 2 P R / (P + R)

token_f1  A, B: multisets of the words of answer and reference, as SQuAD's script has them (Rajpurkar et al. 2016,
          arXiv:1606.05250); the best of the references. Two texts without words are equal: 1 (SQuAD 2.0's script).
set_f1    A, B: sets of the entries of a list, such as labels or entities: "red, blue". The references of a row are the
          lists that would be right.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from pydantic import field_validator

from graftlm.config.schema import config
from graftlm.evaluation.metrics.base import Answer, Array, MetricConfig, MetricRow, references, scores
from graftlm.evaluation.metrics.words import squad_text


@config
class TokenF1Config(MetricConfig):
    name: Literal["token_f1"] = "token_f1"


@config
class SetF1Config(MetricConfig):
    name: Literal["set_f1"] = "set_f1"
    separator: str = ","
    """What stands between the entries. White space around them and upper case do not count."""

    @field_validator("separator")
    @classmethod
    def _not_empty(cls, separator: str) -> str:
        if not separator:
            raise ValueError("an empty separator: give the text between two entries")
        return separator


def f1(answer: Counter[str], wanted: Counter[str]) -> float:
    common, sizes = (answer & wanted).total(), answer.total() + wanted.total()
    return 2 * common / sizes if sizes else 1.0


def token_f1(answer: str, wanted: Sequence[str]) -> float:
    words = Counter(squad_text(answer).split())
    return max(f1(words, Counter(squad_text(each).split())) for each in wanted)


def set_f1(answer: str, wanted: Sequence[str], separator: str = ",") -> float:
    return max(f1(_entries(answer, separator), _entries(each, separator)) for each in wanted)


def _entries(text: str, separator: str) -> Counter[str]:
    """Each entry once."""
    entries = (" ".join(each.casefold().split()) for each in text.split(separator))
    return Counter({entry for entry in entries if entry})


def token_parts(config: TokenF1Config, items: Sequence[Answer]) -> Array:
    return scores([token_f1(item.text, references(item, config.name)) for item in items])


def set_parts(config: SetF1Config, items: Sequence[Answer]) -> Array:
    return scores([set_f1(item.text, references(item, config.name), config.separator) for item in items])


ROWS = {
    "token_f1": MetricRow(TokenF1Config, (Answer,), token_parts),
    "set_f1": MetricRow(SetF1Config, (Answer,), set_parts),
}
