"""DyLoRA: each step draws its rank, so that any is good afterwards. Valipour et al. 2022, arXiv:2210.07558, section 3
and Algorithm 1.

    each step:  b ~ U{least .. r};  forward, backward and update with A[:b] and B[:, :b] (method dylora)
    frozen:     the same forward, but only row A[b-1] and column B[:, b-1] are updated (the paper's cheaper variant)

One b for all sites and all rows of a step, and alpha / b in front, as in the authors' code (huawei-noah/KD-NLP: it
multiplies each factor by sqrt(r / b), and LoRA's alpha / r stands before both). What lies beyond b has a zero gradient;
Adam's momentum goes on moving it a little, there and here. In the frozen variant the first two steps update the whole
block: before B has moved, A has no gradient. The paper's other distributions of b are left out.

After training any rank is a LoRA: `use_rank(model, 8)` cuts a model's DyLoRA to its first 8 ranks, and it is saved,
merged and exported so; `use_rank(model, None)` gives all back. In an adapter folder it is `"rank": 8` under `config` in
graftlm.json.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from graftlm.config.schema import Flag, PositiveCount, config
from graftlm.deltas.dylora import DyLora
from graftlm.errors import TargetError
from graftlm.model.registry import attachment, deltas_by_site
from graftlm.training.callback import Callback, CallbackConfig, needs_method
from graftlm.training.state import TrainingState


@config
class DyLoraCallbackConfig(CallbackConfig):
    name: Literal["dylora"] = "dylora"
    least: PositiveCount = 1
    """The smallest rank that is drawn."""
    frozen: Flag = False
    """Update only the last of the ranks that a step uses."""


class DyLoraCallback(Callback):
    paper = "Valipour et al. 2022, arXiv:2210.07558"
    cost = "none: a step costs what LoRA of the rank drawn does"

    def refusal(self, training: TrainingState) -> str:
        if reason := needs_method(training, "dylora"):
            return reason
        r = min(len(delta.A) for delta in _deltas(training))
        return f"least {self.config.least} is more than r {r}" if self.config.least > r else ""

    @contextmanager
    def during(self, training: TrainingState) -> Iterator[None]:
        before: list[tuple[DyLora, int]] = [(delta, delta.rank) for delta in _deltas(training)]
        for delta, r in before:
            delta.use(min(self.rank_of_step(training), r))
        try:
            yield
        finally:
            for delta, r in before:
                delta.use(r)

    def rank_of_step(self, training: TrainingState) -> int:
        """b of this step: where sites differ in r, drawn for the greatest and cut to each site's own."""
        r = max(len(delta.A) for delta in _deltas(training))
        return int(torch.randint(self.config.least, r + 1, (1,), generator=training.generator("dylora")))

    def on_grads(self, training: TrainingState) -> None:
        if not self.config.frozen or training.done < 2:
            return
        for delta in _deltas(training):
            last = min(self.rank_of_step(training), len(delta.A)) - 1
            for gradient in (delta.A.grad, None if delta.B.grad is None else delta.B.grad.T):
                if gradient is not None:
                    gradient[:last] = 0


def _deltas(training: TrainingState) -> list[DyLora]:
    return [delta for _, _, delta in training.sites() if isinstance(delta, DyLora)]


def use_rank(model: nn.Module, rank: int | None, *, name: str = "default") -> None:
    """Cut the DyLoRA `name` on this model to its first `rank` ranks everywhere (None: all), from now on and when saved.

    Raises TargetError for another method and for a rank that a site has not; nothing is changed then.
    """
    record = attachment(model)
    config: Any = record.configs.get(name)
    if config is None or config.method != "dylora":
        raise TargetError(
            f"{name!r} is no DyLoRA of this model, so it has no ranks to choose from", code="not-a-dylora"
        )
    deltas = [delta for other, _, delta in deltas_by_site(model) if other == name and isinstance(delta, DyLora)]
    least = min(len(delta.A) for delta in deltas)
    if rank is not None and not 1 <= rank <= least:
        raise TargetError(
            f"rank {rank}: the DyLoRA {name!r} can be cut to anything from 1 to {least}", code="rank-out-of-range"
        )
    for delta in deltas:
        delta.use(rank)
    record.configs[name] = replace(config, rank=rank)
