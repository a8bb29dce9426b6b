"""LOMO: each gradient is used and forgotten as soon as the backward pass made it (Lv et al. 2023, arXiv:2306.09782).

    p <- p - eta c g        the moment that g is known; then g is dropped, so only one gradient is alive at a time
    c = min(1, clip / n)    n the norm of the gradient of all parameters together, known from a pass before this one

    g   gradient of the step with respect to p, of its shape
    eta the recipe's learning rate: of plain SGD, so 10 to 1000 times what AdamW wants. Where the recipe gives none it
        is RATE times the method's, which was found with AdamW

It is SGD, so it has no state either. The norm costs every step a second time: forward and backward pass go through once
to sum the squares (section 3.3), and again to act. That second pass is also what lets a step that is not finite change
nothing. With `largest` there is a single pass and every element of g is cut at it instead, the paper's other choice.

A step of several packs is exact: gradients add up until the last pack, whose backward pass uses them. So they are all
alive then, as in any optimizer; where memory counts, let a step be one pack (train.pack_tokens, or fewer batch_rows).
"""

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from graftlm import distributed
from graftlm.config.schema import PositiveRate, config
from graftlm.errors import TrainingError
from graftlm.model.registry import penalty
from graftlm.training.callback import Optimizer, OptimizerConfig, torch_groups
from graftlm.training.state import ParameterGroup, TrainingState

RATE = 250.0
"""8 steps of 4 rows of docstrings on SmolLM2, full: the held-out loss falls by 0.57 nats, with AdamW by 0.83."""


@config
class LomoConfig(OptimizerConfig):
    name: Literal["lomo"] = "lomo"
    largest: PositiveRate | None = None
    """One pass a step, not two: each element of the gradient is cut at this, and train.clip does nothing."""


class Acted(torch.optim.Optimizer):
    """Groups, rates and state for what acts in the backward pass; nothing is left to do when that ends."""

    def step(self, closure: None = None) -> None: ...  # type: ignore[override]


class Fused(Optimizer):
    """An optimizer that updates each parameter as soon as its gradient is whole."""

    fused = True

    @abstractmethod
    def act(self, training: TrainingState, group: dict[str, Any], p: nn.Parameter, g: Tensor) -> None:
        """Change p by its gradient g; `training.optimizer.state[p]` is what may be kept of it."""

    def refusal(self, training: TrainingState) -> str:
        if distributed.count() > 1:
            return "it acts on gradients before those of the other processes are added: galore and adamw-8bit do not"
        with torch.no_grad():
            penalised = penalty(training.model) is not None
        return "the penalty of this method is added after the backward pass, in which this acts" if penalised else ""

    def make(self, groups: Sequence[ParameterGroup], *, weight_decay: float) -> torch.optim.Optimizer:
        return Acted(torch_groups(groups), {"weight_decay": weight_decay})

    @contextmanager
    def during(self, training: TrainingState) -> Iterator[None]:
        squares: list[Tensor] = []

        def take(group: dict[str, Any], p: nn.Parameter) -> None:
            g, p.grad = p.grad, None
            assert g is not None
            squares.append(torch.linalg.vector_norm(g).square())  # no copy of g beside it
            if training.rehearsal:
                return
            if not self.rehearses and not torch.isfinite(squares[-1]):
                raise TrainingError(
                    f"{self.config.name}: a gradient of step {training.done + 1} is not finite, and a part of the step "
                    "has been taken already. Go on from the last checkpoint (--resume) with a lower learning rate"
                    + (", or without `largest`: then it is found in time" if hasattr(self.config, "largest") else ""),
                    code="not-finite",
                )
            with torch.no_grad():
                self.act(training, group, p, g)

        def arrived(group: dict[str, Any], p: nn.Parameter) -> None:
            if training.last_pack:
                take(group, p)

        groups = training.optimizer.param_groups
        learning = [(group, p) for group in groups for p in group["params"] if p.requires_grad]
        hooks = [p.register_post_accumulate_grad_hook(partial(arrived, group)) for group, p in learning]
        try:
            yield
            if training.last_pack:  # what earlier packs have a gradient for and the last has not (experts)
                for group, p in learning:
                    if p.grad is not None:
                        take(group, p)
                training.norm = math.sqrt(sum(map(float, squares)))
        finally:
            for hook in hooks:
                hook.remove()


class Lomo(Fused):
    paper = "Lv et al. 2023, arXiv:2306.09782"
    cost = "no state and one gradient at a time; every step is computed twice, or once with `largest`"

    def __init__(self, config: LomoConfig) -> None:
        super().__init__(config)
        self.rehearses = config.largest is None

    def default_rate(self, rate: float) -> float:
        return RATE * rate

    def state_bytes(self, parameter: nn.Parameter) -> int:
        return 0

    def act(self, training: TrainingState, group: dict[str, Any], p: nn.Parameter, g: Tensor) -> None:
        if self.config.largest is not None:
            g.clamp_(-self.config.largest, self.config.largest)
        else:
            g.mul_(min(1.0, training.clip / (training.norm + 1e-6)))  # as clip_grad_norm_ does
        p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(g, alpha=group["lr"])
