"""What a method is: up to three faces of one equation, and all that it may know about its place.

    Delta.forward(x, y, base) -> y'          x [.. d_in], y = base(x) [.. d_out]
     `- WeightDelta.effective(W, b)          -> (W', b'): mergeable
         `- AdditiveDelta.matrix()           -> dW with W' = W + dW
             .factors()                      -> (A, B) with dW = B A exactly, scale folded in, or None

A method file overrides the most special face that its equation has and nothing else; the others are derived here.
Tensors are float32 and dense: dtype, device, quantiser and dropout are the plumbing's (`graftlm/model/`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, final

import torch
from torch import Tensor, nn

from graftlm.config import Share, config

Targets = str | tuple[str, ...]


@dataclass(frozen=True)
class Site:
    """A place in the model where a delta sits.

    `weight()` is W, float32 [d_out, d_in], or None at a sub-layer. `rows=(a, b)` is a part of a fused projection,
    `expert=e` one expert of a fused stack. `seed` differs from site to site and is the same in every run.
    """

    name: str
    d_in: int
    d_out: int
    weight: Callable[[], Tensor | None]
    seed: int
    rows: tuple[int, int] | None = None
    expert: int | None = None

    def generator(self) -> torch.Generator:
        """Random numbers that depend on the run's seed and on this site's name alone."""
        return torch.Generator().manual_seed(self.seed)


class Base(Protocol):
    """A view of a frozen layer of any kind (linear, transposed, quantised ...), made by `graftlm/model/bases.py`."""

    @property
    def weight(self) -> Tensor:
        """W as float32 [d_out, d_in]."""

    @property
    def bias(self) -> Tensor | None:
        """b as float32 [d_out], or None."""

    def __call__(self, x: Tensor) -> Tensor:
        """The frozen layer itself: x [.. d_in] -> [.. d_out]."""

    def apply(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """What the layer would return with these weights: x W^T + b."""

    def take(self, x: Tensor, A: Tensor) -> Tensor:
        """x A^T for A [r, d_in] (a look-up, where the layer is an embedding)."""


@config
class DeltaConfig:
    """What every method has: where it sits, how it starts, and what differs from place to place."""

    method: str
    init: str = "zero"
    targets: Targets = "all-linear"
    """`all-linear` (every linear layer but the output head), a regular expression for the whole name, or suffixes."""
    dropout: Share = 0.0
    """Probability of zeroing an element of x on its way into the delta (the base always sees the whole x)."""
    patterns: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Regular expression for the end of a site's name -> fields that are different there. The first match counts."""

    def at(self, **overrides: Any) -> "DeltaConfig":
        """This config with other values for some fields; used for the sites of one pattern."""
        return replace(self, **overrides)


@dataclass(frozen=True)
class PeftLayout:
    """How PEFT spells a method on disk: its type, our tensor -> its suffix, our field -> its key (and pattern key)."""

    type: str
    tensors: Mapping[str, str]
    fields: Mapping[str, str]
    patterns: Mapping[str, str] = field(default_factory=dict)


class Delta(nn.Module):
    """A trained change at one site. Constructed as `Method(site, config)`; its parameters start as the paper says."""

    family: ClassVar[str]
    """addition, specification or reparameterisation"""
    paper: ClassVar[str]
    formula: ClassVar[str]
    """The number of trainable parameters at a site, as an expression over the config's fields, d_in and d_out."""
    peft: ClassVar[PeftLayout | None] = None
    wants_y: ClassVar[bool] = True
    """False where the method ignores y, so that the base product is not computed for nothing."""

    def __init__(self, site: Site, config: DeltaConfig) -> None:
        super().__init__()
        self.site = site
        self.config = config

    def forward(self, x: Tensor, y: Tensor, base: Base) -> Tensor:
        """The layer's output y' with this delta on: x [.. d_in], y = base(x) [.. d_out]."""
        raise NotImplementedError


class WeightDelta(Delta):
    """A delta that is a change of weights, and so can be merged."""

    wants_y = False

    def effective(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """THE EQUATION: (W [d_out, d_in], b [d_out] or None) -> (W', b'). Pure: the arguments are not changed."""
        raise NotImplementedError

    def forward(self, x: Tensor, y: Tensor, base: Base) -> Tensor:
        return base.apply(x, *self.effective(base.weight, base.bias))


class AdditiveDelta(WeightDelta):
    """W' = W + dW."""

    wants_y = True

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """(A [r, d_in], B [d_out, r]) with dW = B A exactly and every scale folded in, or None where there are none.

        The face that pays: the fused training step, serving many adapters at once and the export to plain LoRA are
        written once against it.
        """
        return None

    def matrix(self) -> Tensor:
        """dW [d_out, d_in]."""
        factors = self.factors()
        if factors is None:
            raise NotImplementedError(f"{type(self).__name__} defines neither factors() nor matrix()")
        A, B = factors
        return B @ A

    def increment(self, x: Tensor, base: Base) -> Tensor:
        """dy = x dW^T: x [.. d_in] -> [.. d_out]. Must equal base.apply(x, matrix(), None)."""
        factors = self.factors()
        if factors is None:
            return base.apply(x, self.matrix(), None)
        A, B = factors
        return base.take(x, A.to(x.dtype)) @ B.to(x.dtype).T

    @final
    def effective(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return W + self.matrix(), b

    def forward(self, x: Tensor, y: Tensor, base: Base) -> Tensor:
        return y + self.increment(x, base)


class InputDelta(nn.Module):
    """A delta on what goes into the model (prompt, prefix): attached to the model, not to a layer."""

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The model's keyword arguments, changed."""
        raise NotImplementedError
