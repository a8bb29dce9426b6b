"""LoRA-SP: a random half of the parameters stays as it started (Wu et al. 2024, arXiv:2403.08822).

    G <- G * m        m of the shape of each tensor, 0 or 1 by the seed and the tensor's name, the same at every step

Adam leaves an element alone whose gradient was never other than zero. `whole` freezes whole tensors in place of
elements: that saves their moments and gradients, which a mask does not.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from graftlm.config.schema import Flag, Share, config
from graftlm.training.callback import Callback, CallbackConfig
from graftlm.training.state import TrainingState


@config
class LoraSpConfig(CallbackConfig):
    name: Literal["lora-sp"] = "lora-sp"
    frozen: Share = 0.5
    """The share of the elements (or tensors) that do not learn."""
    whole: Flag = False
    """Freeze whole tensors."""


class LoraSp(Callback):
    paper = "Wu et al. 2024, arXiv:2403.08822"
    cost = "none; with `whole` it saves moments and gradients of the share that is frozen"

    def refusal(self, training: TrainingState) -> str:
        if any(group.get("weight_decay") for group in training.optimizer.param_groups):
            return "weight decay would move what it keeps: set train.weight_decay: 0"
        return ""

    def on_start(self, training: TrainingState) -> None:
        parameters, start = training.parameters(), replace(training, done=0)  # the same masks after a resume
        self.masks: dict[str, Tensor] = {}
        if self.config.whole:
            order = torch.randperm(len(parameters), generator=start.generator("lora-sp")).tolist()
            frozen_numbers = {order[i] for i in range(round(self.config.frozen * len(order)))}
            for i, p in enumerate(parameters.values()):
                p.requires_grad_(i not in frozen_numbers)
        else:
            self.masks = {name: self._mask(start, name, p) for name, p in parameters.items()}

    def _mask(self, start: TrainingState, name: str, p: nn.Parameter) -> Tensor:  # bool, of the shape of p
        uniform = torch.rand(p.shape, generator=start.generator(f"lora-sp/{name}"))
        return uniform.ge(self.config.frozen).to(p.device)

    @torch.no_grad()
    def on_grads(self, training: TrainingState) -> None:
        for name, p in training.parameters().items():
            if p.grad is not None and name in self.masks:
                p.grad *= self.masks[name]

    def on_end(self, training: TrainingState) -> None:
        for p in training.parameters().values():
            p.requires_grad_(True)
