"""Random changes of one site, for the tests of rules and spaces."""

import torch
from torch import Tensor

from graftlm.combine.compose import compose_changes
from graftlm.combine.core import Change
from graftlm.combine.rules import COMPOSERS
from graftlm.combine.rules.base import Convention, MomentRule, Rule
from graftlm.combine.spaces import Space

D_OUT, D_IN = 13, 17


def change(r: int, seed: int, scale: float = 1.0, *, dtype: torch.dtype = torch.float64) -> Change:
    random = torch.Generator().manual_seed(seed)
    A = torch.randn(r, D_IN, generator=random, dtype=torch.float64)
    B = torch.randn(D_OUT, r, generator=random, dtype=torch.float64)
    return Change(A.to(dtype), B.to(dtype), scale)


def changes(*ranks: int) -> list[Change]:
    """One for each rank, with different scales."""
    return [change(r, seed, 0.5 + seed) for seed, r in enumerate(ranks)]


def in_other_factors(one: Change, seed: int) -> Change:
    """The same change as (B R, R^-1 A)."""
    r = len(one.A)
    R = torch.randn(r, r, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 2 * torch.eye(r)
    return Change(torch.linalg.solve(R, one.A.double()), one.B.double() @ R, one.scale)


def rule_of(name: str, convention: Convention | None = None, **options: object) -> Rule:
    row = COMPOSERS[name]
    return row.rule(row.config(name=name, **options), convention)


def moment(one: Change) -> Tensor:
    """A second moment [d_in, d_in] that depends on the change alone, of full rank."""
    D = one.matrix()
    return D.T @ D / D.square().sum() + torch.diag(torch.linspace(0.1, 0.5, D.shape[1], dtype=D.dtype))


def composed(
    given: list[Change],
    weights: list[float],
    rule: Rule,
    space: Space | None = None,
    *,
    rank: int | None = None,
    seed: int = 0,
    moments: list[Tensor] | None = None,
) -> Tensor:
    """D of the composition of one site; rules that need moments take those of `moment` by default."""
    generator = torch.Generator().manual_seed(seed)
    if moments is None and isinstance(rule, MomentRule) and rule.needs_moments:
        moments = [moment(one) for one in given]
    (X, Y, _), _ = compose_changes(
        given, weights, rule, space or rule.spaces[0], rank=rank, generator=generator, moments=moments
    )
    return rule.scale * X @ Y
