"""Memory for time: what autograd keeps between the forward and the backward pass, made again or put elsewhere.

Both are contexts around forward and backward pass, like `packed_attention`. They change no number.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from graftlm.errors import TrainingError
from graftlm.model.prefix import is_recording
from graftlm.model.sites import transformer_layers


@contextmanager
def recomputed_layers(model: nn.Module) -> Iterator[None]:
    """Inside, each decoder layer keeps its input alone, and runs again in the backward pass (checkpointing).

    transformers' own switch acts in training mode only, and the base stays in evaluation mode. Random numbers
    (dropout) are drawn again as they were. A layer below the lowest site keeps nothing and does not run again. Raises
    TrainingError for a model without decoder layers.
    """
    layers = list(transformer_layers(model).values())
    if not layers:
        raise TrainingError(f"train.checkpointing: {type(model).__name__} has no list of decoder layers to recompute")
    for layer in layers:
        layer.forward = partial(_recomputed, layer, layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def is_recomputed(model: nn.Module) -> bool:
    """Whether `recomputed_layers` holds this model at present."""
    return any("forward" in vars(layer) for layer in transformer_layers(model).values())


def _recomputed(layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    # What a prompt lets the layers say beforehand is kept: a second run would find it standing before itself.
    if not torch.is_grad_enabled() or is_recording(layer):
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


@contextmanager
def offloaded(model: nn.Module) -> Iterator[None]:
    """Inside, activations wait for the backward pass in the machine's memory, and the device holds those in use.

    Weights are kept for the backward pass too, and stay where they are.
    """
    weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}

    def away(tensor: Tensor) -> tuple[torch.device, Tensor]:
        stays = tensor.untyped_storage().data_ptr() in weights
        return tensor.device, tensor if stays else tensor.to("cpu")

    def back(kept: tuple[torch.device, Tensor]) -> Tensor:
        return kept[1].to(kept[0])

    with torch.autograd.graph.saved_tensors_hooks(away, back):
        yield
