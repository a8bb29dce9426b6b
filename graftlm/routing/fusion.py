"""Adapters of which the parameters are averaged, on the model for one request.

    A = sum_n w_n A_n,  B = sum_n w_n B_n          B_n with the scale of its adapter

B A has products of one adapter's B_n with another's A_n, so this is no weighted sum of the adapters.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import torch

from graftlm.adapters.factors import Factors
from graftlm.errors import AdapterError
from graftlm.generation.engine import model_lock
from graftlm.model.factors import attach_factors, detach_factors

_NUMBERS = itertools.count(1)


def fused(adapters: Mapping[str, Factors], weights: Mapping[str, float]) -> Factors:
    """The factors with these weights; a layer that some lack has those of the others. AdapterError: ranks differ."""
    found: Factors = {}
    for site in dict.fromkeys(site for name in weights for site in adapters[name]):
        here = [(weights[name], *adapters[name][site]) for name in weights if site in adapters[name]]
        if len({len(A) for _, A, _ in here}) > 1:
            raise AdapterError(
                f"{site}: ranks {', '.join(str(len(A)) for _, A, _ in here)}: factors of different ranks have no sum. "
                "Average the outputs: by mixture",
                code="ranks-differ",
            )
        A = torch.stack([weight * A.float() for weight, A, _ in here]).sum(0)
        found[site] = A, torch.stack([weight * B.float() for weight, _, B in here]).sum(0)
    return found


class Fusion:
    """On the model from here on until `close`. It acts on requests that name `delta`."""

    def __init__(self, model: Any, factors: Factors) -> None:
        self.model, self.delta = model, f"graft-fusion-{next(_NUMBERS)}"
        with model_lock(model):
            attach_factors(model, self.delta, factors)

    def close(self) -> None:
        with model_lock(self.model):
            detach_factors(self.model, self.delta)
