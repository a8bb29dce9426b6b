"""VeLoRA: what the gradient of A needs of x is kept as one number a group. Miles et al. 2024, arXiv:2405.17991,
algorithm 1.

    x [T, d_in] in g groups of m = d_in / g elements each:      z[t, i] = x[t, i] . v          is kept, [T, g]
    in the backward pass:      x^[t, i] = z[t, i] v             in place of x in dL/dA = (dL/dh B s)^T x^

    v [m]  of each site, of length 1: the mean of all groups of the first pack, fixed from then on      g `groups`

The forward pass, the gradient of B and what goes on to the layers below are exact. What is saved is a layer's input,
and it is saved for the trained matrix that multiplies it alone, A in LoRA and D in `full`: a frozen W needs none. So
with lora-fa, which freezes A, there is nothing to save.

Departures: the authors compress at the value and down projections and scale the gradient by 0.1 when fine-tuning; here
all sites are, as sites that share their input (q, k, v) keep it as long as one of them does, and Adam would divide a
scale out again. With train.checkpointing nothing is kept between the passes in the first place.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from graftlm import distributed
from graftlm.config.schema import PositiveCount, config
from graftlm.errors import TrainingError
from graftlm.model.registry import hosts
from graftlm.passes.recompute import is_recomputed
from graftlm.training.callback import Callback, CallbackConfig
from graftlm.training.state import TrainingState

METHODS = ("lora", "dora", "full")
"""In these x is multiplied by matrices and does nothing else, so that only their gradients need it."""


@config
class VeloraConfig(CallbackConfig):
    name: Literal["velora"] = "velora"
    groups: PositiveCount = 32
    """g: numbers that are kept of each token; more are nearer to x, and take more memory."""


class CompressedInput(NamedTuple):
    """x [.., d_in] as it is stored for the backward pass."""

    z: Tensor
    v: Tensor
    shape: torch.Size


class Velora(Callback):
    paper = "Miles et al. 2024, arXiv:2405.17991"
    cost = "one number in place of d_in / groups for each input that is kept; the gradient of A is approximate"

    def refusal(self, training: TrainingState) -> str:
        if others := {c.method for c in training.deltas.values()} - set(METHODS):
            return f"of {', '.join(METHODS)} it is known that only a matrix's gradient needs x, of {min(others)} not"
        if any(c.dropout for c in training.deltas.values()):
            return "dropout makes of each x another one, and keeps it: leave dropout out"
        if distributed.count() > 1:
            return "each process would find another v in its rows"
        for _, site, delta in training.sites():
            if delta.site.kind == "linear" and delta.site.d_in % self.config.groups:
                return f"the {delta.site.d_in} inputs of {site} are no {self.config.groups} groups of the same size"
        return ""

    @contextmanager
    def during(self, training: TrainingState) -> Iterator[None]:
        names = {site for _, site, delta in training.sites() if delta.site.kind == "linear"}
        with ExitStack() as stack:
            for site, host in hosts(training.model).items():
                if site in names:
                    stack.enter_context(self._inside(training, site, host))
            yield

    @contextmanager
    def _inside(self, training: TrainingState, site: str, host: nn.Module) -> Iterator[None]:
        """Inside, what the host saves of its input is compressed."""
        saving = ExitStack()

        def before(host: nn.Module, args: tuple[Tensor, ...]) -> None:
            if torch.is_grad_enabled():
                if is_recomputed(training.model):
                    raise TrainingError(
                        "callbacks: velora: train.checkpointing keeps no such inputs: set one of both",
                        code="conflicting-settings",
                    )
                saving.enter_context(torch.autograd.graph.saved_tensors_hooks(self._keeper(site, args[0]), restored))

        def after(host: nn.Module, args: Any, output: Any) -> None:
            saving.close()

        hooks = [host.register_forward_pre_hook(before), host.register_forward_hook(after, always_call=True)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _keeper(self, site: str, x: Tensor) -> Callable[[Tensor], Tensor | CompressedInput]:
        memory, count = x.untyped_storage().data_ptr(), x.numel()

        def keep(tensor: Tensor) -> Tensor | CompressedInput:
            if tensor.untyped_storage().data_ptr() != memory or tensor.numel() != count:
                return tensor
            parts = tensor.detach().reshape(-1, self.config.groups, tensor.shape[-1] // self.config.groups)
            v = self._direction(site, parts)
            return CompressedInput(parts @ v, v, tensor.shape)

        return keep

    def _direction(self, site: str, parts: Tensor) -> Tensor:
        if (found := self.tensors.get(site)) is None:
            found = parts.float().mean((0, 1))
            found = found / found.norm().clamp_min(1e-12)
            if found.isfinite().all():  # else this step is not taken, and the next one finds v
                self.tensors[site] = found
        return found.to(parts)


def restored(x: Tensor | CompressedInput) -> Tensor:
    return x if isinstance(x, Tensor) else (x.z[..., None] * x.v).reshape(x.shape)
