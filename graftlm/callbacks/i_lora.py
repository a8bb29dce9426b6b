"""I-LoRA: a fast learner, its slow mean, and rows seen before that tie one to the other. Ren et al. 2024,
arXiv:2402.18865, section 4.

    S <- a S + (1 - a) W                      after every step; W what learns (fast), S its mean (slow), at first W
    L = (L_now + L_before) / 2 + gamma mse    mse = mean (h_W - h_S)^2 over layers, tokens and d, on the rows before

    h [T, d]  what each decoder layer puts out; no gradient through h_S      a `decay`      gamma `tie`

What is evaluated and saved is S, as in ema.py. It is for a model that learns one task after another: the rows "before"
are a small sample of what it learnt earlier, replayed so that it is not forgotten. Here they are the inner split, a
twentieth of all that the recipe names: list what was learnt before beside what is new in `data.train`, on a base with
the earlier adapter merged in (`graft merge`). As many rows as a step has are replayed each time.

Departures: the authors' buffer is a sample of whatever went by, ours one of the recipe's rows, drawn by the seed. Their
code ties only where h_W < h_S, which the mean square of the text does not, and has a = 0.25, with which S is hardly
slower than W.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from graftlm.callbacks.ema import Ema
from graftlm.config.schema import Rate, Share, config
from graftlm.model.sites import transformer_layers
from graftlm.training.callback import CallbackConfig, needs_inner_split, part_that_makes_passes
from graftlm.training.state import TrainingState


@config
class ILoraConfig(CallbackConfig):
    name: Literal["i-lora"] = "i-lora"
    decay: Share = 0.99
    """The share of the slow learner that a step keeps: 1 / (1 - decay) steps count."""
    tie: Rate = 1.0
    """How strongly hidden states of the fast learner are held to those of the slow one."""


class ILora(Ema):
    paper = "Ren et al. 2024, arXiv:2402.18865"
    cost = "a copy of what is trained; each step runs as many rows of the inner split twice and keeps hidden states"
    inner_share: ClassVar[float] = 0.05

    @classmethod
    def conflict_in(cls, recipe: Any) -> str:
        if part := part_that_makes_passes(recipe):
            return f"it ties the hidden states of the pass that learns, and {part} makes other passes: drop one"
        return super().conflict_in(recipe)

    def refusal(self, training: TrainingState) -> str:
        return needs_inner_split(training)

    def on_grads(self, training: TrainingState) -> None:
        assert training.inner_loss is not None
        slow: list[Tensor] = []

        def keep(h: Tensor) -> None:
            slow.append(h.detach())

        with self.evaluating(training), torch.no_grad(), _each_layer(training, keep):
            training.inner_loss(False)
        count, remaining = sum(h.numel() for h in slow), iter(slow)

        def tie(h: Tensor) -> None:
            """Add d(2 gamma mse)/dh to the gradient of h: the factor 2 goes with the halving below."""
            other = next(remaining)
            if h.requires_grad:
                strength = 4 * self.config.tie / count
                here = h.detach()
                h.register_hook(lambda g: g + strength * (here - other))

        with _each_layer(training, tie):
            training.inner_loss(True)
        for p in training.parameters().values():
            if p.grad is not None:
                p.grad /= 2


@contextmanager
def _each_layer(training: TrainingState, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Inside, `see` is called with what each decoder layer puts out."""

    def after(layer: object, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        see(output if isinstance(output, Tensor) else output[0])

    hooks = [layer.register_forward_hook(after) for layer in transformer_layers(training.model).values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
