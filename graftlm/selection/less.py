"""LESS: Selecting Influential Data for Targeted Instruction Tuning. Xia et al. 2024, arXiv:2402.04333, section 4.

    score(z) = max_j mean_{z' in D_j} sum_i eta_i cos( P grad l(z'; theta_i), P Gamma(z; theta_i) )
    Gamma(z; theta) = m / (sqrt(v) + eps)                       Adam's next step on row z alone
    m = (beta1 m_i + (1 - beta1) g) / (1 - beta1^(t+1))         g = grad l(z; theta_i) [p]: of LoRA's tensors
    v = (beta2 v_i + (1 - beta2) g^2) / (1 - beta2^(t+1))       m_i, v_i, t: the optimizer's state at theta_i

l is the mean loss over a row's supervised tokens. LoRA is trained on a share of the rows (`warmup_share`); theta_i is
its state after epoch i, eta_i that epoch's mean learning rate, D_j a group of the target's rows. Gradients of the
target are plain, as in the paper. Bias is corrected and eps added as AdamW does it, so that Gamma is the step that
training would take; the authors' code leaves the first out, which cos does not see, and adds eps under the root.

P [d, p] preserves inner products on average. The paper draws all its entries from +-1; here each column has one entry,
of random sign, in a random place (Kane and Nelson 2012, arXiv:1012.1577): the same mean and the same variance of
products for p additions a row in place of p d.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from graftlm.config.schema import Count, Flag, PositiveCount, PositiveRate, config
from graftlm.data.batches.pack import Example, batches
from graftlm.data.sources.source import SourceConfig
from graftlm.deltas.lora import Lora, LoraConfig
from graftlm.kernels.backend import TORCH
from graftlm.model.attach import attach, detach
from graftlm.model.registry import parameters_of
from graftlm.optim.adamw import adamw
from graftlm.passes.autotune import fastest_backend
from graftlm.passes.forward import log_probs
from graftlm.selection.base import LEFT_OUT, Pool, PositiveShare, Scores, SelectorConfig
from graftlm.training.loop import TrainStep
from graftlm.training.passes import Passes
from graftlm.training.schedule import warmup_cosine
from graftlm.training.state import TrainingState

NAME = "select-less"


@config
class LessConfig(SelectorConfig):
    by: Literal["less"] = "less"
    target: str | SourceConfig
    """A few rows of the kind that is wanted; none of them may be among those that the result is measured on."""
    subtasks: Flag = False
    """Score by the subtask of the target that a row helps most (rows with the same `group`), not by their mean."""
    warmup_share: PositiveShare = 0.05
    """Of the rows, to train LoRA on before gradients are taken; ten batches at least."""
    epochs: PositiveCount = 4
    """Over the rows of the warm-up; gradients are taken after each."""
    batch_rows: PositiveCount = 8
    learning_rate: PositiveRate | None = None
    """The largest of the warm-up; by default LoRA's."""
    r: PositiveCount = 8
    alpha: PositiveRate = 16
    dimensions: PositiveCount = 8192
    """d above."""
    seed: Count = 0


def score(config: LessConfig, pool: Pool) -> Scores:
    target = pool.other(config.target)
    targets = [examples for examples in target.examples if examples]
    model, usable = pool.model, np.flatnonzero(pool.usable)
    attach(model, LoraConfig(r=config.r, alpha=config.alpha), name=NAME, seed=config.seed)
    try:
        found, weight = torch.zeros(len(usable), len(targets)), 0.0
        parameters = parameters_of(model, NAME)
        project = Projection([p.numel() for p in parameters], config.dimensions, config.seed)
        for epoch, (optimizer, rate) in enumerate(_warmup(config, pool, parameters, usable), start=1):
            plain = [project(gradient(pool, parameters, examples)) for examples in targets]
            aims = nn.functional.normalize(torch.stack(plain))
            for place, number in enumerate(usable.tolist()):
                step = adam_step(optimizer, parameters, gradient(pool, parameters, pool.examples[number]))
                found[place] += rate * (aims @ nn.functional.normalize(project(step), dim=0)).cpu()
                pool.progress(f"epoch {epoch}/{config.epochs}", place + 1, len(usable))
            weight += rate
    finally:
        detach(model, NAME)
    groups = [row.group for row, examples in zip(target.rows, target.examples, strict=True) if examples]
    groups = groups if config.subtasks else [""] * len(groups)
    means = [found[:, torch.tensor([g == group for g in groups])].mean(1) for group in dict.fromkeys(groups)]
    scores = np.full(len(pool), LEFT_OUT, np.float32)
    scores[usable] = (torch.stack(means).amax(0) / weight).numpy()
    return scores


def _warmup(
    config: LessConfig, pool: Pool, parameters: Sequence[nn.Parameter], usable: NDArray[np.int64]
) -> Iterator[tuple[torch.optim.Optimizer, float]]:
    """Train LoRA on some of the rows; after each epoch yield the optimizer and the epoch's mean learning rate."""
    count = min(len(usable), max(10 * config.batch_rows, round(config.warmup_share * len(usable))))
    warmup_rows = np.random.default_rng(config.seed).choice(usable, count, replace=False)
    examples = [example for number in warmup_rows for example in pool.examples[number]]
    per_epoch = max(1, round(len(examples) / config.batch_rows))
    plan = batches(len(examples), config.batch_rows, config.epochs * per_epoch, config.seed)
    optimizer = adamw([(parameters, config.learning_rate or Lora.learning_rate)], weight_decay=0.0)
    rates = []
    backend = TORCH
    if pool.data.pack:
        backend = fastest_backend(pool.model, list(pool.packs([examples[i] for i in plan[0]])), passes=len(plan))
    schedule = warmup_cosine(steps=len(plan), warmup_steps=round(0.03 * len(plan)))
    passes = Passes(packed=pool.data.pack, backend=backend)
    training = TrainingState(pool.model, {}, optimizer)
    train_step = TrainStep(training, "supervised", schedule, clip=1.0, passes=passes)
    for step in train_step.over(list(pool.packs([examples[i] for i in rows])) for rows in plan):
        rates.append(step.learning_rate)
        if step.number % per_epoch == 0:
            yield optimizer, float(np.mean(rates))
            rates.clear()


def gradient(pool: Pool, parameters: Sequence[Tensor], examples: Sequence[Example]) -> list[Tensor]:
    """The gradient of one row's mean loss over its supervised tokens, by each parameter, float32."""
    count = float(sum(example.weights.sum() for example in examples))
    total: list[Tensor] = []
    with pool.attention():
        for pack in pool.packs(examples):
            loss = -(log_probs(pool.model, pack) * pack.weights).sum() / count
            found = torch.autograd.grad(loss, parameters)
            total = [a + b for a, b in zip(total, found, strict=True)] if total else list(found)
    return total


def adam_step(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], found: Sequence[Tensor]) -> list[Tensor]:
    """Gamma: AdamW's next step for these gradients, over its learning rate and without weight decay."""
    (beta1, beta2), eps = optimizer.defaults["betas"], optimizer.defaults["eps"]
    directions = []
    for parameter, g in zip(parameters, found, strict=True):
        state = optimizer.state[parameter]
        t = float(state["step"]) + 1
        m = (beta1 * state["exp_avg"] + (1 - beta1) * g) / (1 - beta1**t)
        v = (beta2 * state["exp_avg_sq"] + (1 - beta2) * g.square()) / (1 - beta2**t)
        directions.append(m / (v.sqrt() + eps))
    return directions


class Projection:
    """P: tensors of these sizes -> [d]. Each element is added to a random one of d sums, with a random sign."""

    def __init__(self, sizes: Sequence[int], d: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.d = d
        # Where it goes, and with which sign: those from d on are subtracted.
        self.places = [torch.randint(2 * d, (size,), generator=generator, dtype=torch.int32) for size in sizes]

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        sums = torch.zeros(2 * self.d, device=tensors[0].device)
        for places, tensor in zip(self.places, tensors, strict=True):
            sums.index_add_(0, places.to(tensor.device), tensor.reshape(-1).float())
        return sums[: self.d] - sums[self.d :]
