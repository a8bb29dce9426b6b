"""How much the gradient of a batch is noise: the simple noise scale of McCandlish et al. 2018, arXiv:1812.06162.

The gradient of a batch of B rows is the true gradient G plus noise of covariance S / B. Their simple noise scale is

    B_simple = tr(S) / |G|^2                                                                          (equation 2.9)

rows: with batches much smaller than that, twice the rows save half the steps; with much larger ones, they save nothing.
At B_simple rows a run needs twice the fewest steps and twice the fewest rows. Both terms follow from squared norms of
gradients over few and over many rows (appendix A.1); here the few are batches or packs, the many all of them together.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor


class NoiseScale:
    """Adds up gradients over rows that were drawn at random, all at one place of the parameters.

    Costs two float32 vectors of the size of what is trained, and a pass over them for each gradient.
    """

    def __init__(self) -> None:
        self.count = 0
        self.rows = 0
        self._sum: Tensor | None = None
        self._squares = 0.0

    def add(self, gradient: Iterable[Tensor], rows: int) -> None:
        """The gradient of the mean loss over so many rows."""
        whole = torch.cat([part.detach().float().flatten() for part in gradient])
        self._sum = whole if self._sum is None else self._sum + whole
        self._squares += float(whole.square().sum())
        self.rows += rows
        self.count += 1

    def found(self) -> dict[str, float | int | None]:
        """`noise_rows` is B_simple in rows, None where the gradients are too few to tell G from the noise.

        `least_rows` is then what it is more than: as many as were looked at.
        """
        assert self._sum is not None
        assert self.count > 1, "noise is what differs between gradients: add two or more"
        few, many = self.rows / self.count, float(self.rows)
        small = self._squares / self.count
        big = float((self._sum / self.count).square().sum())
        true = (many * big - few * small) / (many - few)
        trace = (small - big) / (1 / few - 1 / many)
        # Without any true gradient |mean|^2 would be small / count on the average: so near to it nothing is resolved.
        resolved = big > RESOLVED * small / self.count
        return {
            "noise_rows": trace / true if resolved else None,
            "least_rows": None if resolved else self.rows,
            "gradients": self.count,
            "rows": self.rows,
        }


RESOLVED = 2.0
"""The mean of all gradients must be so many times larger, squared, than noise alone would make it."""


def batch_for(found: dict[str, float | int | None]) -> int | None:
    """Rows of a step that the noise suggests: the power of two nearest to B_simple, or None where that is not known."""
    noise = found["noise_rows"]
    return None if noise is None else 2 ** max(0, round(math.log2(max(1.0, noise))))
