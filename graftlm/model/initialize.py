"""The start of a delta: the tensors of its init, and the offset that makes the model its base again."""

from collections.abc import Sequence

import torch
from torch import Tensor

from graftlm.deltas import METHODS
from graftlm.deltas.base import AdditiveDelta, Delta, DeltaConfig, Site, WeightDelta
from graftlm.deltas.inits import INITS
from graftlm.errors import TargetError
from graftlm.plugins import load_plugins

ROUNDING = 1e-6
"""Share of the sum of absolute products up to which B A counts as zero: what float32 leaves of one that cancels."""


def needed_statistics(config: DeltaConfig) -> tuple[str, ...]:
    """What a delta with this config wants to know of the data before it starts: gradient, fisher, second_moment."""
    load_plugins("graftlm.methods")
    return tuple(dict.fromkeys((*METHODS[config.method].delta.needs, *INITS[config.init].needs)))


def initialize(site: Site, delta: Delta, name: str) -> None:
    """Lay the init's tensors over the delta's own; where dW is then not zero, record an offset that makes it so."""
    init = INITS[name]
    if init.tensors:
        part = part_with(delta, init.tensors, name)
        try:
            values = init.make(site, part)
        except TargetError as error:
            raise type(error)(f"init: {name!r} at {site.name}: {error}", code=error.slug) from None
        for key, value in values.items():
            own = part.get_parameter(key) if key in dict(part.named_parameters(recurse=False)) else part.get_buffer(key)
            if own.shape != value.shape:
                raise TargetError(
                    f"init {name!r} does not fit {delta.config.method!r} at {site.name}: {key} is {list(own.shape)}, "
                    f"the init makes {list(value.shape)}",
                    code="init-unfit-for-method",
                )
            own.copy_(value)
        factors = part.factors() if isinstance(part, AdditiveDelta) else None
        splits = init.tensors == ("A", "B") and "B" in values
        if factors is not None and splits and not _is_product(part, *factors):
            raise TargetError(
                f"init: {name!r} starts from a B A of its own; {delta.config.method!r} has another product, so it "
                "would start from something else. `init: zero` is the method's own start",
                code="init-unfit-for-method",
            )
        if init.starts_at_base:
            _keep_the_base(site, delta, factors, name)


def _keep_the_base(site: Site, delta: Delta, factors: tuple[Tensor, Tensor] | None, name: str) -> None:
    """Record the offset with which the fresh delta is the base again; refuse an init for which there is none."""
    if factors is not None:
        A, B = (factor.detach().clone() for factor in factors)
        if float((B @ A).abs().max()) <= ROUNDING * float((B.abs() @ A.abs()).max()):
            return
        if isinstance(delta, WeightDelta):
            delta.offset_A, delta.offset_B = A, B
            return
    elif isinstance(delta, WeightDelta):
        W, b = site.W().cpu(), torch.zeros(site.d_out) if site.has_bias else None
        new_W, shift = delta.effective(W, b)
        if torch.allclose(new_W, W, atol=ROUNDING * float(W.abs().max())) and (shift is None or not shift.any()):
            return
    raise TargetError(
        f"init: {name!r} would move the model: what {delta.config.method!r} adds to W is no fixed B A, "
        "so it cannot be taken out of W beforehand. `init: zero` is the method's own start",
        code="init-moves-model",
    )


def _is_product(part: Delta, A: Tensor, B: Tensor) -> bool:
    """Whether the factors of a delta are its own tensors A and s B."""
    own = {**dict(part.named_parameters()), **dict(part.named_buffers())}
    pairs = ((A, own["A"]), (B, part.scale * own["B"]))
    return all(product.shape == tensor.shape and torch.allclose(product, tensor) for product, tensor in pairs)


def part_with(delta: Delta, tensors: Sequence[str], name: str) -> Delta:
    """The delta itself or the one inside of it that has all these tensors: what an init starts."""
    matching_parts = [
        part
        for part in delta.modules()
        if isinstance(part, Delta) and all(isinstance(getattr(part, key, None), Tensor) for key in tensors)
    ]
    if len(matching_parts) == 1:
        return matching_parts[0]
    own = ", ".join(sorted(key for key, _ in delta.named_parameters())) or "nothing"
    raise TargetError(
        f"init: {name!r} sets {' and '.join(tensors)} of one low-rank product; {delta.config.method!r} has "
        f"{'several' if matching_parts else own}, so the pair has no meaning. `init: zero` is the method's own start",
        code="init-unfit-for-method",
    )
