"""Which deltas act on which tokens of a pass, where the tokens of several requests lie end to end in one row.

A route belongs to the context that entered it (a thread, say), not to the model: passes of several threads over one
model have routes of their own. `modes.by_row` is the same for a batch of padded rows.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from torch import Tensor

from graftlm.errors import TargetError
from graftlm.kernels.many_low_rank import Bounds

Row = Mapping[str, float]
"""What one row of a batch has: delta -> its weight, in the order in which they act."""


@dataclass(frozen=True)
class Span:
    """Tokens start .. stop of a pass, and the deltas that act on them."""

    start: int
    stop: int
    row: Row


@dataclass(frozen=True, eq=False)
class Rows:
    """Which deltas act on one span after the other, wherever these begin and end."""

    rows: tuple[Row, ...]


@lru_cache(256)
def _rows(items: tuple[tuple[tuple[str, float], ...], ...]) -> Rows:
    return Rows(tuple(map(dict, items)))


@dataclass(frozen=True)
class Route:
    """The spans of a pass in order: they cover its tokens without a gap."""

    spans: tuple[Span, ...]
    wholes: dict[int, Bounds] = field(default_factory=dict, compare=False)

    @cached_property
    def tokens(self) -> int:
        return self.spans[-1].stop

    @cached_property
    def rows(self) -> "Rows":
        """The rows in order: the same object in every pass that has the same."""
        return _rows(tuple(tuple(span.row.items()) for span in self.spans))

    @cached_property
    def bounds(self) -> Bounds:
        return Bounds([(span.start, span.stop) for span in self.spans])

    def whole(self, tokens: int) -> Bounds:
        """All of `tokens` tokens as one span."""
        if tokens not in self.wholes:
            self.wholes[tokens] = Bounds([(0, tokens)])
        return self.wholes[tokens]

    def token_dimension(self, x: Tensor, where: str) -> int:
        """The dimension of x along which its tokens lie: x is [1, tokens, ..] or [tokens, ..]."""
        for dimension in (1, 0):
            if x.dim() > dimension and x.shape[dimension] == self.tokens and (dimension == 0 or x.shape[0] == 1):
                return dimension
        raise TargetError(
            f"{where} gets a tensor {tuple(x.shape)} in a pass of {self.tokens} tokens, so it cannot be told which "
            "part of it belongs to which request (a router may have chosen tokens). Run requests with different "
            "adapters one after the other",
            code="rows-not-separable",
        )


ROUTE: ContextVar[Route | None] = ContextVar("graft_route", default=None)


@contextmanager
def use_route(route: Route | None) -> Iterator[None]:
    """Inside, the deltas of every model act as this route says, whatever is active."""
    token = ROUTE.set(route)
    try:
        yield
    finally:
        ROUTE.reset(token)


def tokens_of(route: Route, x: Tensor, part: slice, where: str) -> Tensor:
    """The tokens `part` of x; `slice(None)` is all of them."""
    if part == slice(None):
        return x
    return x.narrow(route.token_dimension(x, where), part.start, part.stop - part.start)
