"""Deltas into a base, each with a weight: yields new weights, changes nothing.

    W* = W + sum_i w_i (W_i - W)        W_i what delta i alone makes of W; biases alike

The average is taken of weights, not of factors, so it means the same for every mergeable method: one delta with weight
1 is that delta, exactly, whatever its scale, magnitudes or biases are; weight 0 is the base.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from graftlm.model.hosts import LayerHost
from graftlm.model.registry import delta_names, hosts
from graftlm.model.state_dict import mergeable, merged_tensors


def merge(model: nn.Module, weights: Mapping[str, float]) -> Iterator[tuple[str, Tensor]]:
    """The base's state dict with each named delta of the model folded in by its weight, as (name, float32 tensor).

    One layer is made at a time, when it is asked for: `dict(merge(...))` is the whole, `merge_into(..., tensors=...)`
    writes it. Raises TargetError at once for a name that is no delta of the model and for a delta that is no change of
    weights. Which deltas are active does not matter, and stays.
    """
    members = [(weight, delta_names(model, [name])) for name, weight in weights.items()]
    changes = {}
    for site, host in hosts(model).items():
        here = [(weight, [name for name in names if name in host.deltas]) for weight, names in members]
        if here := [(weight, names) for weight, names in here if names]:
            for _, names in here:
                mergeable(host, names)
            changes[site] = partial(_weighted, mergeable(host, here[0][1]), here)
    return merged_tensors(model, changes)


def _weighted(host: LayerHost, here: Sequence[tuple[float, Sequence[str]]]) -> tuple[Tensor, Tensor | None]:
    """(W*, b*) of the layer of a host, float32."""
    W, b = host.view.weight, host.view.bias
    total, shift = W.clone(), None if b is None else b.clone()
    for weight, names in here:
        W_i, b_i = host.effective(names=names)
        total += weight * (W_i - W)
        if b_i is not None:
            shift = torch.zeros_like(b_i) if shift is None else shift
            shift += weight * (b_i if b is None else b_i - b)
    return total, shift
