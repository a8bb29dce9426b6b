"""Exact match: 1 where the answer is one of the row's own answers, else 0.

`normalize: squad` compares as the script of SQuAD does (Rajpurkar et al. 2016, arXiv:1606.05250): lower case, without
punctuation, articles and double spaces. `regexes_to_ignore` to `ignore_numbers` are those of lm-eval 0.4.13's
`exact_match`, which without them compares texts as they are. Here white space at the ends never counts: answers come
without it.
"""

import re
import string
from collections.abc import Sequence
from typing import Literal
from unicodedata import normalize

from graftlm.config.schema import Flag, Pattern, config
from graftlm.evaluation.metrics.base import Answer, Array, MetricConfig, MetricRow, references, scores
from graftlm.evaluation.metrics.words import squad_text


@config
class ExactMatchConfig(MetricConfig):
    name: Literal["exact_match"] = "exact_match"
    normalize: Literal["none", "squad"] = "none"
    take: Pattern | None = None
    """A regular expression: the first group (or all) of its last match is compared, in place of the whole text. Without
    a match the answer is wrong."""
    regexes_to_ignore: tuple[Pattern, ...] = ()
    """What is taken out of both texts first."""
    ignore_case: Flag = False
    ignore_punctuation: Flag = False
    """Leave out ASCII punctuation."""
    ignore_numbers: Flag = False
    """Leave out the digits 0 to 9."""


def exact_match(answer: str, wanted: Sequence[str], config: ExactMatchConfig | None = None) -> float:
    """1 where the answer is the same as one of the wanted texts."""
    config = config or ExactMatchConfig()
    found = compared(answer, config)
    return float(found is not None and found in [compared(each, config) for each in wanted])


def compared(text: str, config: ExactMatchConfig) -> str | None:
    """What is compared of a text; None where `take` has no match."""
    if config.take is not None:
        matches = list(re.finditer(config.take, text))
        if not matches:
            return None
        text = matches[-1][1 if matches[-1].re.groups else 0] or ""
    for pattern in config.regexes_to_ignore:
        text = re.sub(pattern, "", text)
    text = normalize("NFC", text)
    out = string.punctuation * config.ignore_punctuation + string.digits * config.ignore_numbers
    text = (text.casefold() if config.ignore_case else text).translate(str.maketrans("", "", out))
    return squad_text(text) if config.normalize == "squad" else text.strip()


def parts(config: ExactMatchConfig, items: Sequence[Answer]) -> Array:
    return scores([exact_match(item.text, references(item, config.name), config) for item in items])


ROWS = {"exact_match": MetricRow(ExactMatchConfig, (Answer,), parts)}
