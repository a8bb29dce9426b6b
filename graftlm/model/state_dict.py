"""Weights under the names that they have in the base: the base's own, and with the active deltas folded in."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from graftlm.deltas.base import WeightDelta
from graftlm.model.hosts import Host, LayerHost, cannot_merge
from graftlm.model.quantize import QuantizedLinear
from graftlm.model.registry import SHARED, hosts


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
    return dict(merged_tensors(model, active_changes(model), dtype=dtype))


Changes = Mapping[str, Callable[[], tuple[Tensor, Tensor | None]]]
"""Site -> a function that makes (W', b') of the layer there, float32, W' [d_out, d_in]."""


def active_changes(model: nn.Module) -> Changes:
    """What the active deltas make of each layer; TargetError where one of them is no change of weights."""
    return {name: mergeable(host, host.active).effective for name, host in hosts(model).items() if host.active}


def mergeable(host: Host, names: Sequence[str]) -> LayerHost:
    """The host, on which these deltas are changes of weights; TargetError where one of them is none."""
    for name in names:
        if not isinstance(host, LayerHost) or not isinstance(host.deltas[name], WeightDelta):
            raise cannot_merge(name, host.deltas[name])
    assert isinstance(host, LayerHost), "there is at least one name"
    return host


@torch.no_grad()
def merged_tensors(
    model: nn.Module, changes: Changes, *, dtype: torch.dtype | None = torch.float32
) -> Iterator[tuple[str, Tensor]]:
    """The state dict of the base with changes folded in, one layer at a time: (name in the base, new tensor).

    `dtype=None` keeps the base's own. What shares memory in the model, unless it is changed, comes one after another as
    one tensor. Everything else is in the model's order; a bias that the base has not follows its weight.
    """
    found, ours = hosts(model), tuple(_ours(model))
    quantized = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    layer_of_key = {f"{name}.{key}": name for name, layer in quantized.items() for key in layer.tensors()}
    changed_keys = {f"{site}.{kind}" for site in changes for kind in ("weight", "bias")}
    state = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(ours)}
    tied: dict[tuple[int, torch.Size], list[str]] = {}
    for key, tensor in state.items():
        if key not in layer_of_key and (name := _without_host(key, found)) not in changed_keys:
            tied.setdefault(_identity(tensor), []).append(name)
    done: set[str] = set()
    for key, tensor in state.items():
        name = _without_host(f"{layer_of_key[key]}.weight" if key in layer_of_key else key, found)
        site = name.rpartition(".")[0]
        if name in done:
            continue
        if name in changed_keys and f"{site}.weight" not in done:
            new = _changed(found[site], site, changes[site], dtype)
        elif key in layer_of_key:
            new = {name: _dequantized(quantized[layer_of_key[key]], dtype)}
        else:
            new = dict.fromkeys(tied.get(_identity(tensor), [name]), _copy(tensor, dtype))
        done.update(new)
        yield from new.items()
        del new  # before the next is made


def _changed(
    host: Host, site: str, change: Callable[[], tuple[Tensor, Tensor | None]], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    assert isinstance(host, LayerHost)
    W, b = change()
    # A delta may return the base's own W or b: a copy, so that whoever edits the state edits no model.
    to, laid_out = dtype or host.view.dtype, host.view.store(W)
    new = {f"{site}.weight": laid_out.to(to, copy=True, memory_format=torch.contiguous_format)}
    return new if b is None else new | {f"{site}.bias": b.to(to, copy=True)}


def _dequantized(layer: QuantizedLinear, dtype: torch.dtype | None) -> Tensor:
    W = layer.dequantized(dtype or layer.dtype)
    return W.T.contiguous() if layer.transposed else W


def _copy(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype or tensor.dtype, copy=True) if tensor.is_floating_point() else tensor.clone()


def _identity(tensor: Tensor) -> tuple[int, torch.Size]:
    return tensor.data_ptr() or id(tensor), tensor.shape


def _ours(model: nn.Module) -> set[str]:
    """The beginnings of the names of all tensors in the model that do not belong to the base."""
    names = {f"{name}.deltas." for name, module in model.named_modules() if isinstance(module, Host)}
    return names | {f"{SHARED}."}


def _without_host(key: str, found: Mapping[str, Host]) -> str:
    site, dot, rest = key.rpartition(".base.")
    return f"{site}.{rest}" if dot and site in found else key
