"""Rows -> packs: rows lie end to end with positions that restart, and the loss is a list of triples.

A loss triple is (hidden row, target, weight): the hidden state at `hidden_rows[i]` predicts `targets[i]`. Rows never
predict across their boundary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Example:
    """A row ready to train on: ids int32 [n], weights float32 [n] (the weight of token i as a target), its place."""

    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    where: str

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Pack:
    """One forward pass: ids and positions [1, T], the lengths of its segments, and S loss triples."""

    ids: Tensor
    positions: Tensor
    lengths: list[int]
    hidden_rows: Tensor
    targets: Tensor
    weights: Tensor
    where: list[str]

    def to(self, device: torch.device) -> "Pack":
        moved = {k: getattr(self, k).to(device) for k in ("ids", "positions", "hidden_rows", "targets", "weights")}
        return Pack(**moved, lengths=self.lengths, where=self.where)


def collate(examples: Sequence[Example]) -> Pack:
    """Lay examples end to end."""
    ids = torch.from_numpy(np.concatenate([e.ids for e in examples]).astype(np.int64))
    weights = torch.from_numpy(np.concatenate([e.weights for e in examples]))
    lengths = [len(e) for e in examples]
    trained = weights.nonzero()[:, 0]
    return Pack(
        ids=ids[None],
        positions=torch.cat([torch.arange(n) for n in lengths])[None],
        lengths=lengths,
        hidden_rows=trained - 1,  # weights[0] of a row is 0, so this never reaches into the row before
        targets=ids[trained],
        weights=weights[trained],
        where=[e.where for e in examples],
    )


def pack(examples: Sequence[Example], tokens: int) -> list[Pack]:
    """Split a batch into packs of at most `tokens` (a longer row has a pack of its own), longest rows first.

    Splitting changes memory, never the result: the loss is a sum over triples.
    """
    bins: list[list[Example]] = []
    for example in sorted(examples, key=len, reverse=True):
        room = (b for b in bins if sum(map(len, b)) + len(example) <= tokens)
        chosen = next(room, None)
        if chosen is None:
            bins.append([example])
        else:
            chosen.append(example)
    return [collate(b) for b in bins]


def batches(count: int, size: int, steps: int, seed: int) -> list[list[int]]:
    """The rows of each step: `steps` lists of `size` indices, epoch after epoch, each epoch in an order of its own."""
    assert count > 0
    generator = np.random.default_rng(seed)
    order: list[int] = []
    while len(order) < steps * size:
        order.extend(generator.permutation(count).tolist())
    return [order[i * size : (i + 1) * size] for i in range(steps)]
