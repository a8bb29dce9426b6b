"""Memory of a step: bytes in use, gradients, state of the optimizer, compiled kernels."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from graftlm.data.batches.pack import Pack
from graftlm.kernels.backend import TORCH, Backend
from graftlm.model.registry import parameters_of, trainable
from graftlm.planning.bench import one_pass
from graftlm.planning.layers import objective_of
from graftlm.planning.packs import Shape
from graftlm.recipe import Recipe
from graftlm.system import kernel_cache_capacity, memory
from graftlm.training.callback import Optimizer
from graftlm.training.state import TrainingState

GIB = 2**30

HEAP = 1.2
"""Resident memory of activations over the bytes in use. The heap is full of holes: tensors of a step are freed in
another order and with other shapes than they come. Measured: 1.05 in a first step, 1.1 to 1.25 after some more."""

HEAP_WITH_KERNELS = 1.0
"""The same where our kernels compute: tensors are fewer, and of few sizes. Measured: 0.9 to 1.1."""

HEAP_CHECKPOINTED = 2.3
"""The same with checkpointing, where what is kept is small and lies strewn among what is not: 2.1 to 2.7."""

KERNEL_GIB = 1.0 / 1024
"""Memory of a compiled kernel. torch keeps one for every shape of a half-precision product on a CPU, up to
`kernel_cache_capacity`. Packs of ever new lengths fill the cache. One is 0.63 MiB by itself, and 1.0 with the holes
that it pins: see docs/log.md."""

LIBRARIES_GIB = 0.15
"""What is imported, mapped and cached after this moment, on the way through a run."""

Product = tuple[str, tuple[tuple[int, ...], ...]]
"""A matrix product by its name and the shapes of its factors."""

PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_, torch.ops.aten.bmm, torch.ops.aten.baddbmm}


class LiveBytes(TorchDispatchMode):
    """Inside, `peak` is the most bytes that tensors made inside held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now: int = 0
        self.peak: int = 0
        self.storages: set[int] = set()
        self.products: set[Product] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.storages | inputs:
                    self.storages.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        if func.overloadpacket in PRODUCTS and out.dtype != torch.float32:
            self.products.add((str(func), tuple(tuple(t.shape) for t in args if isinstance(t, Tensor))))
        return out

    def _free(self, key: int, size: int) -> None:
        self.storages.discard(key)
        self.now -= size


def live_bytes(
    recipe: Recipe, model: Any, pack: Pack, products: set[Product] | None = None, backend: Backend = TORCH
) -> int:
    """The most bytes in use at one time of a forward and backward pass; gradients of parameters were there before.

    The half-precision products that ran are added to `products`.
    """
    for parameter in trainable(model).values():
        parameter.grad = torch.zeros_like(parameter)
    live = LiveBytes()
    with recipe.setup().passes(backend).through(model), live:
        one_pass(model, pack, objective_of(recipe))
    if products is not None:
        products |= live.products
    return live.peak


def update_bytes(recipe: Recipe, model: Any, several_packs: bool) -> tuple[int, int]:
    """Bytes of gradients and of the optimizer's state, as the optimizer and the callbacks say."""
    callbacks = recipe.setup().make_callbacks()
    parameters = [p for name in recipe.all_deltas() for p in parameters_of(model, name)]
    unmade = torch.optim.SGD([torch.zeros(1)], lr=0.0)
    training = TrainingState(model, recipe.all_deltas(), unmade, total=recipe.train.steps or 1, seed=recipe.train.seed)
    idle = {id(p) for callback in callbacks for p in callback.idle_parameters(training)}
    learning = [p for p in parameters if id(p) not in idle]
    gradients = [4 * p.numel() for p in learning]
    (optimizer,) = (callback for callback in callbacks if isinstance(callback, Optimizer))
    one_alive = optimizer.fused and not several_packs
    return (max if one_alive else sum)(gradients), sum(map(optimizer.state_bytes, learning))


def kernel_count(products: set[Product], shape: Shape) -> int:
    """How many kernels a run will have compiled: those of the largest pack, for every length that there is.

    The shapes of attention's products, which are batched, follow from the pack's segments, those of all others from
    the pack.
    """
    of_segments = sum("bmm" in name for name, _ in products)
    of_packs = len(products) - of_segments
    segments = len(set(shape.largest.lengths))
    return min(kernel_cache_capacity(), int(of_packs * shape.lengths[0] + of_segments / segments * shape.lengths[1]))


def free_gib(device: torch.device) -> float:
    """What this process could take: of the machine's memory (or the container's), or of the GPU's."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0]) / GIB
    return memory().free_gib
