"""INITS: the table of starting values. An init is a function `(site, delta) -> {parameter name: tensor}`.

What it returns replaces the parameters that the method's own constructor made; the base is never edited.
"""

from collections.abc import Callable

from torch import Tensor

from graftlm.deltas.base import Delta, Site


def zero(site: Site, delta: Delta) -> dict[str, Tensor]:
    """The method's own start, at which the delta is zero and the model is the base."""
    return {}


INITS: dict[str, Callable[[Site, Delta], dict[str, Tensor]]] = {"zero": zero}
