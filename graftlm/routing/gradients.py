"""What a text would teach the base, as a vector: the gradient of its own loss at the layers that adapters change.

    L = mean over tokens of -log p(x_t | x_<t);  u = dL/dB at B = 0 of y = W x + B A x,  A [r, d_in] random and fixed

This is the gradient of W on its right multiplied by A^T: a random projection of it to r columns (as of a LoRA at its
start, which is why B = 0 and A is what a LoRA begins with). Vectors have length 1.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graftlm.data.batches.pack import Example, collate
from graftlm.generation.engine import model_lock
from graftlm.model.factors import attach_routed, detach_factors
from graftlm.model.modes import by_row, deltas_still
from graftlm.model.sites import site_seed
from graftlm.passes.forward import log_probs

_NUMBERS = itertools.count(1)


class Gradients:
    """Vectors of texts for one model and the same layers."""

    def __init__(self, model: Any, sizes: Mapping[str, tuple[int, int]], r: int, seed: int) -> None:
        """`sizes`: site -> (d_out, d_in)."""
        self.model = model
        self.A, self.B = dict[str, Tensor](), dict[str, Tensor]()
        for site in sorted(sizes):
            d_out, d_in = sizes[site]
            random = torch.Generator().manual_seed(site_seed(seed, site))
            self.A[site] = (torch.randn(r, d_in, generator=random) / d_in**0.5).to(model.device)
            self.B[site] = torch.zeros(d_out, r, device=model.device, requires_grad=True)

    def of(self, ids: Sequence[int]) -> Tensor:
        """u of a text of two tokens at least, all layers end to end, of length 1."""
        delta = f"graft-gradient-{next(_NUMBERS)}"
        weights = np.ones(len(ids), dtype=np.float32)
        weights[0] = 0  # nothing predicts the first token
        pack = collate([Example(np.asarray(ids, dtype=np.int32), weights, "prompt")]).to(self.model.device)
        factors = {site: (A, self.B[site]) for site, A in self.A.items()}
        with model_lock(self.model), torch.enable_grad():
            attach_routed(self.model, delta, {delta: factors}, lambda site, _: lambda x, inner: x.new_ones(len(x), 1))
            try:
                with deltas_still(self.model), by_row(self.model, [{delta: 1.0}]):
                    loss = -log_probs(self.model, pack).mean()
                    found = torch.autograd.grad(loss, list(self.B.values()))
            finally:
                detach_factors(self.model, delta)
        u = torch.cat([each.flatten() for each in found])
        unit: Tensor = u / u.norm().clamp_min(1e-30)
        return unit
