"""Deltas into a base, each with a weight: returns new weights, changes nothing.

    W* = W + sum_i w_i (W_i - W)        W_i what delta i alone makes of W; biases alike

The average is taken of weights, not of factors, so it means the same for every mergeable method: one delta with weight
1 is that delta, exactly, whatever its scale, magnitudes or biases are; weight 0 is the base.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from graftlm.model.layers.modes import activate, deltas_off
from graftlm.model.layers.state_dict import merged_state


def merge(model: nn.Module, weights: Mapping[str, float]) -> dict[str, Tensor]:
    """The base's state dict with each named delta of the model folded in by its weight, float32.

    Raises TargetError for a name that is no delta of the model and for a delta that is no change of weights. The model
    is as it was afterwards, the active deltas included.
    """
    with deltas_off(model):  # which also puts back what was active
        base = merged_state(model)
        total = dict(base)
        for name, weight in weights.items():
            activate(model, name)
            for key, tensor in merged_state(model).items():
                own = base.get(key)
                if own is None:  # a bias that the base has not
                    total[key] = total.get(key, torch.zeros_like(tensor)) + weight * tensor
                elif not torch.equal(tensor, own):
                    total[key] = total[key] + weight * (tensor - own)
    return total
