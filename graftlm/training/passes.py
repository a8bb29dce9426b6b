"""How packs go through a model: what a recipe says of forward and backward passes."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import nn

from graftlm.kernels.backend import TORCH, Backend
from graftlm.passes.packed_attention import packed_attention
from graftlm.passes.recompute import offloaded, recomputed_layers


@dataclass(frozen=True)
class Passes:
    """The settings of forward and backward passes (`data.pack`, `train.checkpointing`, `train.offload`) and the
    backend that computes them."""

    packed: bool = True
    checkpointing: bool = False
    offload: bool = False
    backend: Backend = TORCH

    @contextmanager
    def through(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model computes passes in this way; held over forward and backward pass."""
        with ExitStack() as stack:
            if self.packed:
                stack.enter_context(packed_attention(model, self.backend))
            if self.checkpointing:
                stack.enter_context(recomputed_layers(model))
            if self.offload:
                stack.enter_context(offloaded(model))
            yield
