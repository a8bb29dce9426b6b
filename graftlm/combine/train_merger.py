"""The network of LoRA.rar (`rules/lora_rar.py`), trained on pairs of a library of adapters.

    min over the network of the mean over pairs and layers of ZipLoRA's objective (`rules/ziplora.py`), without rows

A step of Adam draws one pair and sees all layers that both change. The paper compares the outputs of a whole image
generator on prompts; here each layer is compared by itself, as in `ziplora`, so neither base nor rows are needed beside
the adapters. Learning rate and balance are those of the released code.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graftlm.adapters.adapter import Adapter
from graftlm.combine.changes import changes_of
from graftlm.combine.compose import check_one_base, loaded, read_adapters
from graftlm.combine.core import Change
from graftlm.combine.rules.lora_rar import HIDDEN, Merger, squared_norm
from graftlm.combine.rules.ziplora import Inputs, loss_and_gradient
from graftlm.errors import RecipeError

Library = Sequence[Mapping[str, Change]]
"""For each adapter, site -> its change."""


class TrainedMerger(NamedTuple):
    """A network and how its training went."""

    merger: Merger
    losses: list[float]
    """Of each step, before it: the mean of the objective over the layers of the pair."""


def train_merger(
    model_or_base: Any,
    adapters: Sequence[Adapter | str | Path],
    *,
    steps: int = 500,
    learning_rate: float = 0.01,
    balance: float = 0.01,
    hidden: int = HIDDEN,
    seed: int = 0,
) -> TrainedMerger:
    """Train a network on all pairs of these adapters of one base; `.merger.save(file)` keeps it.

    The model is left as it was. Raises RecipeError for fewer than two adapters, and what `compose` raises for adapters
    without exact low-rank factors or of different bases.
    """
    members = read_adapters(adapters)
    check_one_base(members)
    model = loaded(model_or_base)
    with ExitStack() as stack:
        each = [
            stack.enter_context(changes_of(model, member, f"merger-{number}", needs_rank=True))
            for number, member in enumerate(members)
        ]
        library = [{site: change() for site, change in changes.items()} for changes in each]
    return train_on(library, steps, learning_rate=learning_rate, balance=balance, hidden=hidden, seed=seed)


def train_on(
    library: Library, steps: int, *, learning_rate: float, balance: float, hidden: int, seed: int
) -> TrainedMerger:
    """As `train_merger`, of changes."""
    pairs = [pair for pair in combinations(range(len(library)), 2) if library[pair[0]].keys() & library[pair[1]].keys()]
    if not pairs:
        raise RecipeError(
            f"{len(library)} adapters have no pair that changes the same layer: a network for lora-rar learns from "
            "pairs, so give two adapters or more",
            code="unusable-settings",
        )
    merger = Merger.new([len(change.B) for own in library for change in own.values()], seed=seed, hidden=hidden)
    parameters = [tensor.requires_grad_() for tensor in merger.tensors.values()]
    adam, random = torch.optim.Adam(parameters, lr=learning_rate), torch.Generator().manual_seed(seed)
    losses = []
    with torch.enable_grad():
        for _ in range(steps):
            adam.zero_grad()
            first, second = (library[i] for i in pairs[int(torch.randint(len(pairs), (), generator=random))])
            sites = [site for site in first if site in second]
            losses.append(sum(backward(merger, first[s], second[s], balance, len(sites)) for s in sites))
            adam.step()
    return TrainedMerger(Merger({key: tensor.detach() for key, tensor in merger.tensors.items()}), losses)


def objective(merger: Merger | None, first: Change, second: Change, balance: float) -> float:
    """ZipLoRA's objective of the weights that a network gives two changes; None: of weights 1, the sum."""
    with torch.no_grad():
        larger, smaller = _by_size(first, second)
        m = torch.ones(2, first.A.shape[1]) if merger is None else merger.weights(larger, smaller)
        return _objective(m, larger, smaller, balance)[0]


def backward(merger: Merger, first: Change, second: Change, balance: float, sites: int) -> float:
    """This layer's share of the loss of a step; its gradient is added to those of the network."""
    larger, smaller = _by_size(first, second)
    m = merger.weights(larger, smaller)
    loss, gradient = _objective(m.detach(), larger, smaller, balance)
    m.backward(gradient / sites)
    return loss / sites


def _by_size(first: Change, second: Change) -> list[list[Tensor]]:
    """(B with its scale, A) of both, float32, the larger change first."""
    factors = [[change.scale * change.B.float(), change.A.float()] for change in (first, second)]
    return sorted(factors, key=squared_norm, reverse=True)


def _objective(m: Tensor, larger: list[Tensor], smaller: list[Tensor], balance: float) -> tuple[float, Tensor]:
    """With M_i = Q^T D_i, where Q are orthonormal columns that span the outputs of both: all norms are the same."""
    R = torch.linalg.qr(torch.cat([larger[0], smaller[0]], dim=1), mode="r").R
    parts = R.split([larger[0].shape[1], smaller[0].shape[1]], dim=1)
    stacked = torch.stack([part @ A for part, (_, A) in zip(parts, (larger, smaller), strict=True)])
    return loss_and_gradient(m, stacked, [1.0, 1.0], [Inputs(rows=M) for M in stacked], balance)
