"""Attention of one new token of each of several requests to its own cache, by `cpu.cpp`: float32 and bfloat16.

out[t] = sum_j softmax_j(scale q[t] . k_j) v_j
"""

import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from graftlm.kernels import cpu

LARGEST_GROUP = 64
"""Query heads that share a key head, at most."""


class NewToken(NamedTuple):
    """A request's new token and its cache, as `cpu.cpp` reads them."""

    token: int
    """Its place among the tokens of the pass."""
    keys: Tensor
    """[G, capacity, D]; the place of the new token is free."""
    values: Tensor
    always: int
    """The first so many tokens of the cache are seen whatever the window is."""
    first: int
    """The first of the other positions that is seen."""
    length: int
    """Tokens in the cache, the new one included."""


def serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attend_new` computes attention of q [1, H, T, D] to keys and values like k and v [1, G, T, D]."""
    if q.device.type != "cpu" or q.dtype not in (torch.float32, torch.bfloat16) or sys.platform != "linux":
        return False
    sizes = q.shape[3] % cpu.LANES == 0 and v.shape[3] % cpu.LANES == 0
    return sizes and q.shape[1] // k.shape[1] <= LARGEST_GROUP and bool(cpu.library_digest())


def attend_new(q: Tensor, k: Tensor, v: Tensor, out: Tensor, tokens: Sequence[NewToken], scale: float) -> None:
    """Write the new keys and values into the caches, and the attention of the new tokens into `out` [T, H, D_v].

    q [1, H, T, D], k [1, G, T, D], v [1, G, T, D_v].
    """
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    table = np.array(
        [
            (
                one.token,
                one.keys.data_ptr(),
                one.values.data_ptr(),
                one.keys.stride(0),
                one.values.stride(0),
                one.always,
                one.first,
                one.length,
            )
            for one in tokens
        ],
        dtype=np.int64,
    )
    strides = np.array([t.stride(n) for t in (q, k, v) for n in (2, 1)], dtype=np.int64)
    name = str(q.dtype).removeprefix("torch.")
    getattr(cpu.library(), f"attend_new_{name}")(
        *(t.data_ptr() for t in (q, k, v)),
        strides.ctypes.data,
        out.data_ptr(),
        table.ctypes.data,
        *(len(tokens), q.shape[1], k.shape[1], q.shape[3], v.shape[3]),
        scale,
        torch.get_num_threads(),
    )
