"""Duplicates left out: a filter. Of rows that say the same, the first stays.

    exact     the same messages, but for letter case and white space
    similar   cos(x_i, x_j) >= s for a row j that stays      SemDeDup: Abbas et al. 2023, arXiv:2303.09540, section 3

x [d] is the embedding of a row. The paper compares within clusters; here every row is compared with all that stay.
"""

from typing import Annotated, Literal

import numpy as np
from pydantic import Field, Strict

from graftlm.config import config
from graftlm.training.select.base import LEFT_OUT, Pool, Scores, SelectorConfig, embeddings


@config
class DedupConfig(SelectorConfig):
    by: Literal["dedup"] = "dedup"
    similar: Annotated[float, Strict(), Field(gt=0, le=1)] | None = None
    """Leave out, too, what is at least so similar (0.95, say) to a row that stays; without it only exact duplicates."""


def score(config: DedupConfig, pool: Pool) -> Scores:
    stays, seen = pool.usable, set[tuple[str, ...]]()
    for number, row in enumerate(pool.rows):
        said = tuple(f"{m.role}: {' '.join(m.content.casefold().split())}" for m in row.messages)
        stays[number] &= said not in seen
        if stays[number]:
            seen.add(said)
    if config.similar is not None:
        points, kept = embeddings(pool), list[int]()
        for number in np.flatnonzero(stays).tolist():
            if kept and float((points[kept] @ points[number]).max()) >= config.similar:
                stays[number] = False
            else:
                kept.append(number)
    return np.where(stays, 0, LEFT_OUT).astype(np.float32)
