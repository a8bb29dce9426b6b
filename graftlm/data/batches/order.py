"""The order of an epoch where it is not drawn alone: a curriculum, from rows with a low score to those with a high one.

Every epoch runs through all examples in this order. The seed decides among those that are alike and, where the order
is cut into parts, within each part; both anew in every epoch. So what comes when follows from rows, recipe and seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from graftlm.data.batches.pack import Example, Group
from graftlm.data.sources.source import LENGTH, SELECTED, OrderConfig, Row
from graftlm.errors import DataError


@dataclass(frozen=True)
class Curriculum:
    order: OrderConfig
    keys: NDArray[np.float64]
    """The sort key of each example: [examples]."""

    def batches(self, size: int, steps: int, seed: int) -> list[list[int]]:
        """The rows of each step, as `pack.batches` has them: `steps` lists of `size` indices, epoch after epoch."""
        assert len(self.keys) > 0
        sign = -1 if self.order.highest_first else 1
        indices: list[int] = []
        epoch = 0
        while len(indices) < steps * size:
            draw = np.random.default_rng((seed, epoch))
            permutation = draw.permutation(len(self.keys))
            order = permutation[np.argsort(sign * self.keys[permutation], kind="stable")]
            if self.order.parts is not None:
                order = np.concatenate([draw.permutation(p) for p in np.array_split(order, self.order.parts)])
            indices.extend(order.tolist())
            epoch += 1
        return [indices[i * size : (i + 1) * size] for i in range(steps)]


def curriculum(
    order: OrderConfig | None, rows: Sequence[Row], examples: Sequence[Example | Group]
) -> Curriculum | None:
    """The order of these examples, which are of these rows; all that one row is rendered to has its score. None where
    no order is asked for; DataError where a row has no score."""
    if order is None:
        return None
    if order.by == LENGTH:
        return Curriculum(order, np.array([len(example) for example in examples], np.float64))
    scores = {row.where: row.score for row in rows}
    without = [where for where, score in scores.items() if score is None]
    if without:
        why = "no selector has scored the rows: name one in `select`" if order.by == SELECTED else "it has no score"
        raise DataError(f"data.order: by {order.by}: {without[0]}: {why}", code="missing-score")
    return Curriculum(order, np.array([scores[example.where] for example in examples], np.float64))
