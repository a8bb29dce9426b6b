"""A second module tree over the same tensors, for generation: the model itself is neither patched nor switched.

Every module is copied without its tensors, which both trees share. The copy has a config of its own, in which attention
is that of `attention.py`, and its frozen linear layers multiply by `PrepackedProduct` where that can be. So a model may
generate, train and answer direct calls from several threads, and nothing has to be undone.
"""

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch.nn.functional as F

from graftlm.generation.attention import NAME
from graftlm.kernels import cpu
from graftlm.kernels.backend import OURS, TORCH, Backend
from graftlm.kernels.prepacked import PrepackedProduct, can_prepack
from graftlm.model.hosts import Host, LayerHost
from graftlm.passes.packed_attention import Forward, faster_forwards

Products = dict[tuple[int, int], PrepackedProduct]
"""(id of a weight, id of its bias) -> the product with them, made once for all copies."""


class InferenceCopy(NamedTuple):
    model: Any
    known: list[dict[Any, Any]]
    """What its hosts remember of their deltas."""

    def forget(self) -> None:
        """Read the deltas anew: they may have learnt."""
        for each in self.known:
            each.clear()


def inference_copy(model: Any, products: Products | None) -> InferenceCopy:
    """The copy; `products` None: no weight is prepacked."""
    copying = _Copying(dict(faster_forwards(model)), _backend(model), products)
    return InferenceCopy(copying.copy_of(model), copying.known)


def _backend(model: Any) -> Backend:
    """What computes norms and gated units."""
    weight = next(model.parameters())
    return TORCH_INFERENCE if cpu.unavailable(weight.device, weight.dtype) else OURS


TORCH_INFERENCE = replace(
    TORCH,
    rms_norm=lambda x, gain, eps: F.rms_norm(x, gain.shape, gain.to(x.dtype), eps),
    silu_gate=lambda gate, up: F.silu(gate).mul_(up),
)
"""Without gradients torch's own operations are enough."""


class _Copying:
    def __init__(self, faster: Mapping[Any, Forward], backend: Backend, products: Products | None) -> None:
        self.faster, self.backend, self.products = faster, backend, products
        self.configs: dict[int, Any] = {}
        self.known: list[dict[Any, Any]] = []

    def copy_of(self, module: Any) -> Any:
        new = copy.copy(module)
        deltas = module.deltas if isinstance(module, Host) else None  # the very same: they learn, come and go
        children = module._modules.items()
        new.__dict__["_modules"] = {
            name: child if child is None or child is deltas else self.copy_of(child) for name, child in children
        }
        config = module.__dict__.get("config")
        if hasattr(config, "_attn_implementation"):
            new.__dict__["config"] = self._attending_here(config)
        if self.products is not None and can_prepack(module):
            new.__dict__["forward"] = self._product(module, self.products)
        elif module in self.faster:
            new.__dict__["forward"] = partial(self.faster[module], new, self.backend)
        if isinstance(module, LayerHost):
            new.__dict__["view"] = view = copy.copy(module.view)
            view.layer = new.base
            new.__dict__["bare"] = view
            new.__dict__["remembers"] = True
            new.__dict__["merged"] = None
            new.known.clear()  # of an earlier copy: deltas may have learnt since
            self.known.append(new.known)
            product = new.base.__dict__.get("forward")
            if isinstance(product, PrepackedProduct):
                vars(view).update(fused=product.low_rank, plus=product.plus)
                new.__dict__["bare"] = product
        return new

    def _product(self, layer: Any, products: Products) -> PrepackedProduct:
        key = id(layer.weight), id(layer.bias)
        if key not in products:
            products[key] = PrepackedProduct(layer.weight, layer.bias)
        return products[key]

    def _attending_here(self, config: Any) -> Any:
        if id(config) not in self.configs:
            self.configs[id(config)] = copy.deepcopy(config)
            self.configs[id(config)]._attn_implementation = NAME
        return self.configs[id(config)]
