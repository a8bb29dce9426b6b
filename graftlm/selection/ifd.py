"""IFD, instruction-following difficulty: From Quantity to Quality. Li et al. 2023, arXiv:2308.12032, section 2.2.

    IFD(Q, A) = PPL(A | Q) / PPL(A)        PPL(A | Q) = exp(s(A | Q))
    s(A | Q)  = -1/N sum_i log p(a_i | Q, a_<i)        s(A) the same without Q;  A = a_1 ... a_N

High: the question helps little with the answer, so there is something to learn. 1 or more: it does not help at all,
the two may not belong together, and the row is left out. That paper divides s by s; Superfiltering (Li et al. 2024,
arXiv:2402.00530, equation 3) and the authors' later code divide perplexities. 1 is the same in both.

A is the last answer of a conversation, without what ends it, and Q all before. Alone, A stands after what the template
writes before an answer (in ChatML the end of the user's turn and the assistant's header), as the authors have it stand
after "### Response:": its first token has to be predicted from something.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from graftlm.config.schema import config
from graftlm.data.batches.pack import Example
from graftlm.data.chat.roles import Rendered, Role
from graftlm.data.sources.source import Row
from graftlm.errors import DataError
from graftlm.selection.base import LEFT_OUT, Pool, Scores, SelectorConfig, last_answer, losses


@config
class IfdConfig(SelectorConfig):
    by: Literal["ifd"] = "ifd"
    ratio: Literal["perplexity", "loss"] = "perplexity"
    """What is divided by what: perplexities, or their logarithms, as in the first paper."""


def score(config: IfdConfig, pool: Pool) -> Scores:
    found = ratios(pool, pool.rows, config.ratio)
    return np.where(pool.usable & (found < 1), found, LEFT_OUT).astype(np.float32)


def ratios(pool: Pool, rows: Sequence[Row], ratio: str) -> NDArray[np.float64]:
    """IFD of each row [n]; nan where there is no question, or the answer does not fit within max_tokens."""
    pairs = {number: pair for number, row in enumerate(rows) if (pair := with_and_without(pool, row)) is not None}
    if not pairs:
        raise DataError(
            "no row has both a question and an answer within data.max_tokens: IFD compares the two", code="no-rows-left"
        )
    conditional, alone = zip(*pairs.values(), strict=True)
    with_question, without = losses(pool, conditional, "given Q"), losses(pool, alone, "alone")
    found = np.full(len(rows), np.nan)
    found[list(pairs)] = with_question / without if ratio == "loss" else np.exp(with_question - without)
    return found


def with_and_without(pool: Pool, row: Row) -> tuple[Example, Example] | None:
    """The row's last answer after its question, and after the template's header alone."""
    rendered = pool.renderer.rows(row.messages, row.tools, row.variables)[-1]
    start, end = last_answer(rendered)
    header = start - _written_before(rendered, start)
    if header == 0 or start == end or end > pool.data.max_tokens:  # no question, no answer, or not all of it
        return None
    weights = np.zeros(end, np.float32)
    weights[start:end] = 1
    begin = min(header, start - 1)  # one token at least, for the first to be predicted from
    return Example(rendered.ids[:end], weights, row.where), Example(rendered.ids[begin:end], weights[begin:], row.where)


def _written_before(rendered: Rendered, start: int) -> int:
    """How many tokens right before `start` the template wrote by itself."""
    is_template = np.isin(rendered.roles[:start][::-1], (int(Role.SPECIAL), int(Role.BOILERPLATE)))
    return int(is_template.argmin()) if not is_template.all() else start
