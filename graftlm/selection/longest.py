"""Longest responses: Long Is More for Alignment. Zhao et al. 2024, arXiv:2402.04833, section 2.

    score(z) = the number of tokens of the answers of row z

The paper takes the 1,000 rows with the longest responses, counted in tokens. Tokens that end an answer do not count.
"""

from typing import Literal

import numpy as np

from graftlm.config.schema import config
from graftlm.data.chat.roles import Role
from graftlm.selection.base import LEFT_OUT, Pool, Scores, SelectorConfig


@config
class LongestConfig(SelectorConfig):
    by: Literal["longest"] = "longest"


def score(config: LongestConfig, pool: Pool) -> Scores:
    return np.where(pool.usable, answer_lengths(pool), LEFT_OUT).astype(np.float32)


def answer_lengths(pool: Pool) -> Scores:
    """The tokens of all answers of each row: [n]."""
    found = np.zeros(len(pool), np.float32)
    for number, rendered in pool.rendered():
        found[number] += (rendered.roles == Role.ASSISTANT).sum()
    return found
