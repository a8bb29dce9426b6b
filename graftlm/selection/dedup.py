"""Duplicates left out: a filter. Of rows that say the same, the first stays.

    exact      the same messages, but for letter case and white space
    near       J(A, B) = |A n B| / |A u B| >= near        A, B: the word 5-grams of two rows (`data/quality/minhash.py`)
    similar    cos(x_i, x_j) >= similar for a row j that stays      SemDeDup: Abbas et al. 2023, arXiv:2303.09540

x [d] is the embedding of a row. That paper compares within clusters; here every row is compared with all that stay.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, Strict

from graftlm.config.schema import config
from graftlm.data.quality.minhash import LEAST, NEAR_WORDS, WordNumbers, grams, near_duplicates
from graftlm.selection.base import LEFT_OUT, Pool, Scores, SelectorConfig, embeddings

Likeness = Annotated[float, Strict(), Field(gt=0, le=1)]


@config
class DedupConfig(SelectorConfig):
    by: Literal["dedup"] = "dedup"
    near: Likeness | None = LEAST
    """Leave out, too, what shares so many of its word 5-grams with an earlier row, directly or through others; null:
    exact duplicates alone."""
    similar: Likeness | None = None
    """Leave out, too, what is at least so similar (0.95, say) by its embedding to a row that stays."""


def score(config: DedupConfig, pool: Pool) -> Scores:
    firsts: dict[str, int] = {}  # a row of more weight comes several times, and stays or goes as a whole
    first = np.array([firsts.setdefault(row.where, number) for number, row in enumerate(pool.rows)], np.int64)
    stays, seen = pool.usable & (first == np.arange(len(pool))), set[tuple[str, ...]]()
    for number in np.flatnonzero(stays).tolist():
        row = pool.rows[number]
        row_text = tuple(f"{m.role}: {' '.join(m.all_text.casefold().split())}" for m in row.messages)
        stays[number] = row_text not in seen
        seen.add(row_text)
    if config.near is not None:
        remaining = np.flatnonzero(stays)
        texts = ["\n".join(m.all_text for m in pool.rows[number].messages) for number in remaining.tolist()]
        stays[remaining[later_ones(texts, config.near)]] = False
    if config.similar is not None:
        points, indices = embeddings(pool), list[int]()
        for number in np.flatnonzero(stays).tolist():
            if indices and float((points[indices] @ points[number]).max()) >= config.similar:
                stays[number] = False
            else:
                indices.append(number)
    return np.where(stays[first], 0, LEFT_OUT).astype(np.float32)


def later_ones(texts: Sequence[str], least: float) -> list[int]:
    """The texts that are nearly the same as an earlier one, directly or through others."""
    words = WordNumbers()
    pairs = near_duplicates([grams(words.of(text), NEAR_WORDS) for text in texts], least)
    earlier = list(range(len(texts)))  # of a group: an earlier text of it, itself for the first

    def first(text: int) -> int:
        while earlier[text] != text:
            text = earlier[text]
        return text

    for a, b, _ in pairs:
        low, high = sorted((first(a), first(b)))
        earlier[high] = low
    return [text for text, leader in enumerate(earlier) if leader != text]
