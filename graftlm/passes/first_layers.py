"""The first layers of a decoder in float32, without a copy of the rest: there a mistake is larger than rounding."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.model.hosts import LayerHost
from graftlm.model.sites import decoder_of, transformer_layers

HALF = (torch.bfloat16, torch.float16)


@contextmanager
def first_layers_in_float32(model: nn.Module) -> Iterator[Any]:
    """Inside, the decoder has its first layers only, up to the first one of the last kind, and computes in float32;
    outside it is as before, with the very same tensors. Gives the decoder.

    Only what these layers hold is copied. Embeddings are looked up in their own dtype, and what was found is cast.
    """
    decoder = decoder_of(model)
    assert decoder is not None
    with _first_layers(model), _in_float32(decoder):
        yield decoder


@contextmanager
def _first_layers(model: nn.Module) -> Iterator[None]:
    layers = transformer_layers(model)
    if not layers:
        yield
        return
    of_all = model.get_submodule(next(iter(layers)).rpartition(".")[0])
    before = dict(of_all._modules)
    for name in list(before)[_enough(list(layers.values())) :]:
        del of_all._modules[name]
    try:
        yield
    finally:
        of_all._modules.clear()
        of_all._modules.update(before)


def _enough(layers: list[nn.Module]) -> int:
    """How many layers from the first on have one of every kind among them; two at least."""
    kinds = [_kind(layer) for layer in layers]
    return max(2, 1 + max(kinds.index(kind) for kind in kinds))


def _kind(layer: nn.Module) -> Any:
    """The classes of its modules, and their settings (a window, a kind of attention), their number left out."""
    return [
        (name, type(module), [(k, v) for k, v in vars(module).items() if isinstance(v, str) or k in WINDOWS])
        for name, module in layer.named_modules()
    ]


WINDOWS = ("sliding_window", "is_sliding", "window_size", "use_rope", "no_rope")
"""Settings of an attention layer that differ from layer to layer and are no words."""


@contextmanager
def _in_float32(decoder: nn.Module) -> Iterator[None]:
    hooks = []
    before: list[tuple[dict[str, Any], str, Tensor]] = []
    casts: dict[int, Any] = {}  # weights that several layers have in common stay common
    for module in decoder.modules():
        if isinstance(module.base if isinstance(module, LayerHost) else module, nn.Embedding):
            hooks.append(module.register_forward_hook(lambda layer, inputs, out: out.float()))
            continue
        tensors: dict[str, Any]
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.dtype in HALF:
                    before.append((tensors, name, tensor))
    try:
        for tensors, name, tensor in before:
            if id(tensor) not in casts:
                casts[id(tensor)] = _cast(tensor)
            tensors[name] = casts[id(tensor)]
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for tensors, name, tensor in before:
            tensors[name] = tensor


def _cast(tensor: Tensor) -> Tensor:
    wide = tensor.detach().float()
    return nn.Parameter(wide, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else wide
