"""The rank of the product B A that an init starts."""

from torch import Tensor

from graftlm.deltas.base import Delta


def rank(part: Delta) -> int:
    """r, the number of rows of A [r, d_in]."""
    assert isinstance(part.A, Tensor)
    return len(part.A)
