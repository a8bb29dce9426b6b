"""Small parameters of a router, learnt on rows while base and adapters are frozen."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graftlm.adapters.factors import Factors
from graftlm.data.batches.pack import Example, batches, collate
from graftlm.generation.engine import model_lock
from graftlm.model.factors import attach_routed, detach_factors
from graftlm.model.modes import by_row, deltas_still
from graftlm.model.routed import Experts, Gates
from graftlm.passes.forward import log_probs

_NUMBERS = itertools.count(1)

WARMUP = 0.1
"""Share of the steps in which the learning rate rises from 0."""


def fit(
    model: Any,
    adapters: Mapping[str, Factors],
    gates: Callable[[str, Experts], Gates],
    parameters: Sequence[Tensor],
    examples: Sequence[Example],
    *,
    steps: int,
    learning_rate: float,
    batch_rows: int,
    seed: int,
    before_row: Callable[[Example], None] = lambda row: None,
) -> list[float]:
    """Change `parameters`, of which `gates` are made, by AdamW without decay to lower the loss of the answers.

    `before_row` is called before the pass over a row, for gates that depend on all of it. Returns the loss of each
    step in nats a token. Holds the model's lock; the model is then as it was.
    """
    delta, losses = f"graft-fit-{next(_NUMBERS)}", list[float]()
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0)
    with model_lock(model):
        attach_routed(model, delta, adapters, gates)
        try:
            with torch.enable_grad(), deltas_still(model), by_row(model, [{delta: 1.0}]):
                for step, rows in enumerate(batches(len(examples), min(batch_rows, len(examples)), steps, seed)):
                    for group in optimizer.param_groups:
                        group["lr"] = learning_rate * min(1.0, (step + 1) / max(1.0, WARMUP * steps))
                    optimizer.zero_grad()
                    losses.append(_backward(model, [examples[row] for row in rows], before_row))
                    optimizer.step()
        finally:
            detach_factors(model, delta)
    return losses


def _backward(model: Any, examples: Sequence[Example], before_row: Callable[[Example], None]) -> float:
    """The mean loss over the tokens of these rows, one row at a time; its gradient is added up."""
    total, packs = 0.0, [collate([one]).to(model.device) for one in examples]
    count = sum(float(pack.weights.sum()) for pack in packs)
    for example, pack in zip(examples, packs, strict=True):
        before_row(example)
        loss = -(pack.weights * log_probs(model, pack)).sum() / count
        loss.backward()
        total += float(loss.detach())
    return total
