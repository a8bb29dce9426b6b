"""Rows of a certain length: a filter, not a ranking. Every row within the bounds has the same score.

left out unless   least <= tokens of the answers <= most   and   least_prompt <= tokens before the last answer
                  <= most_prompt
"""

from typing import Literal

import numpy as np

from graftlm.config.schema import Count, PositiveCount, config
from graftlm.selection.base import LEFT_OUT, Pool, Scores, SelectorConfig, last_answer
from graftlm.selection.longest import answer_lengths


@config
class LengthConfig(SelectorConfig):
    by: Literal["length"] = "length"
    least: Count = 1
    """Tokens of a row's answers together."""
    most: PositiveCount | None = None
    least_prompt: Count = 0
    """Tokens before the last answer, the template's own among them."""
    most_prompt: PositiveCount | None = None


def score(config: LengthConfig, pool: Pool) -> Scores:
    answers, prompts = answer_lengths(pool), np.zeros(len(pool), np.float32)
    for number, rendered in pool.rendered():
        prompts[number] = max(prompts[number], last_answer(rendered)[0])
    fits = pool.usable & (answers >= config.least) & (prompts >= config.least_prompt)
    fits &= (answers <= (config.most or np.inf)) & (prompts <= (config.most_prompt or np.inf))
    return np.where(fits, 0, LEFT_OUT).astype(np.float32)
