"""INITS: the table of starting values. An init is a function `(site, delta) -> {tensor name: value}`.

What it returns replaces what the method's own constructor made. The base is never edited: where dW is then not zero,
the plumbing records -dW as a fixed offset, so that the fresh delta changes nothing (docs/decisions/003).
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from graftlm.deltas.base import Delta, Site


@dataclass(frozen=True)
class Init:
    """A row of the table."""

    make: Callable[[Site, Delta], dict[str, Tensor]]
    paper: str
    tensors: tuple[str, ...] = ("A", "B")
    """The tensors that it sets; a method that has not all of them, once, does not admit it."""
    needs: tuple[str, ...] = ()
    """What it reads from `site.statistics`: gradient [d_out, d_in], second_moment [d_in, d_in]."""
    starts_at_base: bool = True
    """False where the paper wants the fresh delta to move the model: no offset is recorded."""


def zero(site: Site, delta: Delta) -> dict[str, Tensor]:
    """The method's own start, at which the delta is zero and the model is the base."""
    return {}


INITS: dict[str, Init] = {
    "zero": Init(zero, "the method's own paper", tensors=()),
}
