"""Memory for time: what autograd keeps between the forward and the backward pass, made again or put elsewhere.

Both are contexts around forward and backward pass, like `packed_attention`. They change no number.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from graftlm.errors import TrainingError
from graftlm.kernels.attention import LAYOUT, SegmentLayout, use_layout
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
        raise TrainingError(
            f"train.checkpointing: {type(model).__name__} has no list of decoder layers to recompute",
            code="no-decoder-layers",
        )
    with computing_by((layer, partial(_recomputed, layer, layer.forward)) for layer in layers):
        yield


def is_recomputed(model: nn.Module) -> bool:
    """Whether `recomputed_layers` holds this model at present."""
    forwards = (vars(layer).get("forward") for layer in transformer_layers(model).values())
    return any(isinstance(forward, partial) and forward.func is _recomputed for forward in forwards)


@contextmanager
def computing_by(forwards: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Inside, each module computes by the function beside it; afterwards by what it did before, be that its class's
    `forward` or one that somebody set on the module itself."""
    ours = dict(forwards)
    before = {module: vars(module).get("forward") for module in ours}
    for module, forward in ours.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, forward in ours.items():
            if vars(module).get("forward") is forward:  # else somebody set another one meanwhile
                del module.forward
                if (theirs := before[module]) is not None:
                    module.forward = theirs


def _recomputed(layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    # While a prompt is recorded nothing is recomputed: a second run would find the prompt before itself.
    if not torch.is_grad_enabled() or is_recording(layer):
        return forward(*args, **kwargs)
    return checkpoint(partial(_by_layout, LAYOUT.get(), forward), *args, use_reentrant=False, **kwargs)


def _by_layout(layout: SegmentLayout | None, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The pass of a layer, with the layout of the forward pass in the backward pass too, whatever thread runs it."""
    with use_layout(layout):
        return forward(*args, **kwargs)


@contextmanager
def offloaded(model: nn.Module) -> Iterator[None]:
    """Inside, activations wait for the backward pass in the machine's memory, and the device holds those in use.

    Weights are kept for the backward pass too, and stay where they are.
    """
    weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}

    def away(tensor: Tensor) -> tuple[torch.device, Tensor]:
        stays = tensor.untyped_storage().data_ptr() in weights
        return tensor.device, tensor if stays else tensor.to("cpu")

    def back(device_and_tensor: tuple[torch.device, Tensor]) -> Tensor:
        return device_and_tensor[1].to(device_and_tensor[0])

    with torch.autograd.graph.saved_tensors_hooks(away, back):
        yield
