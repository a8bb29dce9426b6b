"""NEFTune: noise on the embeddings of what is trained on (Jain et al. 2023, arXiv:2310.05914, algorithm 1).

    X <- X + alpha / sqrt(L d) * E        X [L, d] the embeddings of a row, E uniform in [-1, 1]

Where something learns alone: evaluation, generation and the reference of a preference see no noise. L is the length of
the row, not of the pack that it lies in, and its noise depends on the seed, the step and the row: how rows are packed
changes nothing. (What stands after the last token that is trained on is not computed here, so it is not counted in L.)

A beginning that several rows share is computed once, and would have one noise for rows of several lengths: such packs
are refused, set train.prefix_sharing: false.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from graftlm.config.schema import PositiveRate, config
from graftlm.data.batches.pack import Pack
from graftlm.errors import TrainingError
from graftlm.training.callback import Callback, CallbackConfig, part_that_makes_passes
from graftlm.training.state import TrainingState


@config
class NeftuneConfig(CallbackConfig):
    name: Literal["neftune"] = "neftune"
    alpha: PositiveRate = 5.0
    """The size of the noise: 5 to 15 in the paper."""


class Neftune(Callback):
    paper = "Jain et al. 2023, arXiv:2310.05914"
    cost = "none, but beginnings cannot be shared"

    @classmethod
    def conflict_in(cls, recipe: Any) -> str:
        if part := part_that_makes_passes(recipe):
            return f"it adds noise to the policy alone, and {part} compares it with another model: drop one"
        return ""

    @contextmanager
    def during(self, training: TrainingState) -> Iterator[None]:
        def noisy(module: Any, args: Any, X: Tensor) -> Tensor:
            if training.pack is None or not torch.is_grad_enabled():
                return X  # a reference or a probe: nothing learns from it
            return X + self._noise(training, training.pack, X.shape[-1]).to(X)

        embeddings: Any = training.model.get_input_embeddings()  # type: ignore[operator]
        hook = embeddings.register_forward_hook(noisy)
        try:
            yield
        finally:
            hook.remove()

    def _noise(self, training: TrainingState, pack: Pack, d: int) -> Tensor:
        """[1, T, d]"""
        if shared := [rows for rows in pack.where if len(rows) > 1]:
            names = " and ".join(dict.fromkeys(shared[0][:2]))
            raise TrainingError(
                f"callbacks: neftune: rows of {names} share their beginning, so they cannot have a noise each. "
                "Set train: {prefix_sharing: false}",
                code="conflicting-settings",
            )
        parts = []
        for (row,), L in zip(pack.where, pack.lengths, strict=True):
            E = 2 * torch.rand(L, d, generator=training.generator(f"neftune/{row}")) - 1
            parts.append(self.config.alpha / (L * d) ** 0.5 * E)
        return torch.cat(parts)[None]
