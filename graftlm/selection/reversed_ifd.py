"""Reversed IFD: Selective Reflection-Tuning. Li et al. 2024, arXiv:2402.10110, section 2.3.

    r-IFD(x, y) = PPL(x | y') / PPL(x)        x the question, y' a prompt that shows the answer y and asks for x

Low: the question can be guessed from the answer, so the two belong together. 1 or more: the answer is no help, and the
row is left out. Kept are the lowest; the paper uses it beside IFD, which `select` does with both in turn.
"""

from dataclasses import replace
from typing import Literal

import numpy as np

from graftlm.config.schema import config
from graftlm.data.sources.formats import Message
from graftlm.data.sources.source import Row
from graftlm.selection.base import LEFT_OUT, Pool, Scores, SelectorConfig
from graftlm.selection.ifd import ratios

ASKED = "Here is an answer:\n\n{answer}\n\nWrite the question or the instruction that it answers."


@config
class ReversedIfdConfig(SelectorConfig):
    by: Literal["reversed-ifd"] = "reversed-ifd"
    ratio: Literal["perplexity", "loss"] = "perplexity"
    """What is divided by what: perplexities, or their logarithms."""


def score(config: ReversedIfdConfig, pool: Pool) -> Scores:
    turned = [turned_around(row) for row in pool.rows]
    found = np.full(len(pool), np.nan)
    found[[row is not None for row in turned]] = ratios(pool, [row for row in turned if row is not None], config.ratio)
    return np.where(pool.usable & (found < 1), -found, LEFT_OUT).astype(np.float32)


def turned_around(row: Row) -> Row | None:
    """A conversation that asks for the last question of a row, given its last answer; None where there is no pair."""
    answers = [i for i, m in enumerate(row.messages) if m.role == "assistant" and i > 0]
    if not answers or row.messages[answers[-1] - 1].role != "user":
        return None
    question, answer = row.messages[answers[-1] - 1].content, row.messages[answers[-1]].content
    if not question.strip():
        return None
    return replace(
        row, tools=(), messages=[Message("user", ASKED.format(answer=answer)), Message("assistant", question)]
    )
