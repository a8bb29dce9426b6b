"""Bands of perplexity. Marion et al. 2023, When Less Is More, arXiv:2309.04564, section 3.

    PPL(z) = exp(1/|z| sum_t -log p(z_t | z_<t))        over the supervised tokens of row z, under the base
    low:  -PPL      high:  PPL      middle:  -|rank(PPL) / (n - 1) - 1/2|

The paper prunes pretraining text by whole rows and finds the middle best; here the tokens are those that training
would train, so the band is of answers, given their questions.
"""

from typing import Literal

import numpy as np

from graftlm.config.schema import config
from graftlm.selection.base import LEFT_OUT, Pool, Scores, SelectorConfig, row_losses


@config
class PerplexityConfig(SelectorConfig):
    by: Literal["perplexity"] = "perplexity"
    band: Literal["low", "middle", "high"] = "middle"
    """Which rows come first: what the base finds likely, what it finds neither likely nor unlikely, or the rest."""


def score(config: PerplexityConfig, pool: Pool) -> Scores:
    loss = row_losses(pool, "perplexity")
    usable = pool.usable
    if config.band == "middle":  # by rank: half of the rows lie on either side
        rank = np.empty(usable.sum())
        rank[np.argsort(loss[usable], kind="stable")] = np.arange(len(rank))
        loss[usable] = -np.abs(rank / max(1, len(rank) - 1) - 0.5)
    elif config.band == "low":
        loss = -loss  # the loss is the logarithm of the perplexity: the same order
    return np.where(usable, loss, LEFT_OUT).astype(np.float32)
