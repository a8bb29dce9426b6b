"""Weights under the names that they have in the base: the base's own, and with the active deltas folded in."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from graftlm.errors import TargetError
from graftlm.model.layers.hosts import Host, LayerHost
from graftlm.model.layers.quantize import QuantizedLinear
from graftlm.model.layers.registry import SHARED, hosts


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The frozen base's own parameters by the names that they have without any host; tied ones once."""
    found, ours = hosts(model), tuple(_ours(model))
    return {_without_host(name, found): p for name, p in model.named_parameters() if not name.startswith(ours)}


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the frozen base as it is kept, quantized weights included, under its own names; no copies."""
    found, ours = hosts(model), tuple(_ours(model))
    return {_without_host(key, found): t for key, t in model.state_dict().items() if not key.startswith(ours)}


def merged_state(model: nn.Module, *, dtype: torch.dtype | None = torch.float32) -> dict[str, Tensor]:
    """Return the state dict of the base with the active deltas folded in: new tensors under the base's own names.

    `dtype=None` keeps the base's own. Nothing in the model is changed. Tensors that share memory in the model (a tied
    head) share it here too, unless a delta sits on one of them. Raises TargetError where an active delta is no change
    of weights, or would need a bias where the layer can have none.
    """
    found, ours = hosts(model), tuple(_ours(model))
    changed: dict[str, Tensor | None] = {}
    with torch.no_grad():
        for name, host in found.items():
            if host.active and isinstance(host, LayerHost):
                W, b = host.effective()
                to = dtype or host.view.dtype
                # A delta may return the base's own W or b: a copy, so that whoever edits the state edits no model.
                kept = host.view.store(W)
                changed[f"{name}.weight"] = kept.to(to, copy=True, memory_format=torch.contiguous_format)
                changed[f"{name}.bias"] = None if b is None else b.to(to, copy=True)
            elif host.active:
                delta = host.on()[0]
                raise TargetError(
                    f"delta {host.active[0]!r} ({type(delta).__name__}) cannot be merged: {delta.not_mergeable}",
                    code="not-mergeable",
                )
        state: dict[str, Tensor] = {}
        converted: dict[tuple[int, torch.Size], Tensor] = {}
        quantized = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
        packed = {f"{name}.{key}" for name, layer in quantized.items() for key in layer.tensors()}
        for key, tensor in model.state_dict().items():
            if key.startswith(ours) or key in packed:
                continue
            name = _without_host(key, found)
            if (new := changed.pop(name, None)) is not None:
                state[name] = new
                continue
            identity = (tensor.data_ptr(), tensor.shape)
            if identity not in converted:
                to = dtype or tensor.dtype
                converted[identity] = tensor.to(to, copy=True) if tensor.is_floating_point() else tensor.clone()
            state[name] = converted[identity]
        for key, layer in quantized.items():
            name = _without_host(f"{key}.weight", found)
            if name not in changed:
                W = layer.dequantized(dtype or layer.dtype)
                state[name] = W.T.contiguous() if layer.transposed else W
        # What has no tensor of its name in the base: a bias that is new, and the weight of a quantized layer.
        state.update({name: tensor for name, tensor in changed.items() if tensor is not None})
    return state


def _ours(model: nn.Module) -> set[str]:
    """The beginnings of the names of all tensors in the model that do not belong to the base."""
    names = {f"{name}.deltas." for name, module in model.named_modules() if isinstance(module, Host)}
    return names | {f"{SHARED}."}


def _without_host(key: str, found: Mapping[str, Host]) -> str:
    site, dot, rest = key.rpartition(".base.")
    return f"{site}.{rest}" if dot and site in found else key
