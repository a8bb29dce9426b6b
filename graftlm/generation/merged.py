"""Weights with the changes of a row in them, for passes in which the same adapters act on every token.

    W' = W + sum of share B A        then x W'^T + b in place of x W^T + b + sum of share (x A^T) B^T

With `merge_after`, an engine makes one merged copy at a time, when that many passes in a row had the same
adapters with factors. It stays until another row takes its place, and serves whenever its row comes again. In float32
alone: in half precision a merged weight loses most of a young delta (docs/decisions/042).
"""

from collections.abc import Sequence
from typing import Any

import torch

from graftlm.errors import TargetError
from graftlm.generation.inference_copy import InferenceCopy
from graftlm.kernels.prepacked import PrepackedProduct, packed_bytes
from graftlm.model.acting import widened
from graftlm.model.hosts import LayerHost
from graftlm.model.routes import Row
from graftlm.system import memory

SPARE_GIB = 0.25
"""What must be free beside a merged copy."""


def check_merging(model: Any, *, prepack: bool, reason: str) -> None:
    """Raise TargetError where no weight of a model can be merged. `reason`: why the engine does not run it itself."""
    if reason or not prepack or model.dtype != torch.float32 or model.device.type != "cpu":
        why = reason or (f"this one is in {str(model.dtype).removeprefix('torch.')} on {model.device.type}")
        raise TargetError(
            "merge_after makes a second prepacked copy of the weights of a float32 model on a CPU, with prepack=True: "
            f"{why if prepack else 'prepack is off'}. Leave merge_after out",
            code="merge-not-possible",
        )


class Merging:
    """Which row the next pass has in common, since when, and the copy that was merged for one."""

    def __init__(self, after: int) -> None:
        self.after = after
        """Passes in a row with the same row before it is merged."""
        self.row: Row | None = None
        """The row whose merged weights are in memory."""
        self.why_not = ""
        """Why the last row that was due was not merged; empty where it was."""
        self._last: Row | None = None
        self._count = 0
        self._hosts: list[LayerHost] = []

    def drop(self) -> None:
        """Give the merged weights up: what they were made of may have changed."""
        for host in self._hosts:
            host.merged = None
        self._hosts, self.row = [], None
        self._last, self._count = None, 0

    def before_pass(self, copy: InferenceCopy, rows: Sequence[Row]) -> None:
        """`rows` of the requests of the pass that comes next. Merges where it is time to."""
        first = rows[0]
        if not first or any(row != first for row in rows):
            self._last, self._count = None, 0
            return
        self._count = self._count + 1 if first == self._last else 1
        self._last = first
        if self._count == self.after + 1 and first != self.row:
            self._merge(copy, first)

    def _merge(self, copy: InferenceCopy, row: Row) -> None:
        hosts = [module for module in copy.model.modules() if isinstance(module, LayerHost) and _can_merge(module, row)]
        needed = sum(packed_bytes(host.weight) for host in hosts) / 2**30
        self.drop()
        self._last, self._count = row, self.after + 1
        self.why_not = "" if hosts else "no layer has changes with factors alone"
        if needed + SPARE_GIB > (free := memory().free_gib):
            self.why_not = f"merged weights take {needed:.2f} GiB, and {free:.2f} GiB are free"
        if self.why_not:
            return
        for host in hosts:
            host.merged = (row,), _merged(host, row)
        self._hosts, self.row = hosts, row


def _can_merge(host: LayerHost, row: Row) -> bool:
    """Whether nothing acts at a layer but changes with factors, and it can be prepacked."""
    here = host.here(row)
    base: Any = vars(host.base).get("forward")
    if not here or not isinstance(base, PrepackedProduct):
        return False
    found = host.parts_at(here).split
    return bool(found.fast) and not (found.slow or found.folded or found.others)


def _merged(host: LayerHost, row: Row) -> PrepackedProduct:
    W = host.view.weight.clone()
    for A, B, share in host.parts_at(host.here(row)).split.fast:
        W.addmm_(widened(B), widened(A), alpha=share)
    return PrepackedProduct(W, host.view.stored_bias)
