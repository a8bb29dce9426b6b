"""Diff pruning's last part: magnitude pruning. Guo, Rush and Kim 2020, arXiv:2012.07463, section 3.2.

    after the share `after` of the run:    z_i = 1 for the share `density` of all sites' entries with the greatest
                                           |dW_i|, z_i = 0 for the others, z_g = 1, w_i = dW_i
    from then on:                          w learns, the gates do not

dW [d_out, d_in] is that of the gates without noise. A gate is made yes or no by an alpha of 50 or -50, far beyond what
the noise can move, so the method needs no mask. The paper prunes once training is done and then tunes on for some
epochs; here both are one run.
"""

from typing import Literal

import torch

from graftlm.config.schema import Share, config
from graftlm.deltas.diff_pruning import DiffPruning
from graftlm.training.callback import Callback, CallbackConfig, needs_method
from graftlm.training.state import TrainingState

SURE = 50.0
"""An alpha at which the gate is 0 or 1 exactly, whatever the noise."""


@config
class DiffPruningCallbackConfig(CallbackConfig):
    name: Literal["diff-pruning"] = "diff-pruning"
    density: Share = 0.005
    """Share of the entries that may differ from the base, over all sites together."""
    after: Share = 0.6
    """Share of the run before the pruning."""


class DiffPruningCallback(Callback):
    paper = "Guo, Rush and Kim 2020, arXiv:2012.07463"
    cost = "once, a sort of all entries; none before and after"

    def refusal(self, training: TrainingState) -> str:
        if reason := needs_method(training, "diff-pruning"):
            return reason
        return "" if self._when(training) >= 1 else "there is no step before the pruning"

    def on_grads(self, training: TrainingState) -> None:
        if training.done >= self._when(training):
            for delta in _deltas(training):
                for gate in (delta.a, delta.a_group):
                    if gate is not None:
                        gate.grad = None

    @torch.no_grad()
    def on_step(self, training: TrainingState) -> None:
        if training.done != self._when(training):
            return
        deltas = _deltas(training)
        changes = [delta.matrix() for delta in deltas]  # without a gradient there is no noise
        sizes = torch.cat([change.abs().flatten() for change in changes])
        count = max(1, int(self.config.density * len(sizes)))
        mask = torch.zeros_like(sizes, dtype=torch.bool).index_fill_(0, sizes.topk(count).indices, True)
        parts = mask.split([change.numel() for change in changes])
        for delta, change, part in zip(deltas, changes, parts, strict=True):
            delta.w.copy_(change)
            open_ = part.view_as(change)
            delta.a.copy_((torch.where(open_, SURE, -SURE) - delta.gate) / delta.gate_speed)
            if delta.a_group is not None:
                delta.a_group.fill_((SURE - delta.gate) / delta.gate_speed)
            for p in delta.parameters():
                training.optimizer.state.pop(p, None)
        training.events.append({"event": "pruned", "callback": "diff-pruning", "kept": count, "of": len(sizes)})

    def _when(self, training: TrainingState) -> int:
        return int(self.config.after * training.total)


def _deltas(training: TrainingState) -> list[DiffPruning]:
    return [delta for _, _, delta in training.sites() if isinstance(delta, DiffPruning)]
