"""Distillation: the policy takes after the whole next-token distributions of a teacher, not after one token of each.

    forward  D = KL(p_T || p)                    = sum_v p_T (log p_T - log p)    the policy covers all that is likely
    reverse  D = KL(p || p_T)                    = sum_v p (log p - log p_T)      it keeps to what is likeliest
    jsd      D = beta KL(p_T || m) + (1 - beta) KL(p || m),   m = beta p_T + (1 - beta) p

    L = sum_i w_i ( alpha (-log p(target_i)) + (1 - alpha) T^2 D_i ) / sum_i w_i

The divergences are those of GKD (Agarwal et al. 2024, arXiv:2306.13649, equation 1). p and p_T are softmaxes over the
vocabulary of logits divided by the temperature T (but not in log p(target)); with T^2 the gradients stay of one size,
whatever T is (Hinton et al. 2015, arXiv:1503.02531, section 2). alpha is `supervised_weight`. With forward, and an
alpha between, it is the loss of KD-LoRA (Azimi et al. 2024, arXiv:2410.20777): a larger teacher that was tuned, and a
smaller student with LoRA.
"""

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, Strict, model_validator
from torch import Tensor

from graftlm.config.dtypes import Dtype, Quantization, instead_of_store
from graftlm.config.schema import PositiveRate, Weight, config
from graftlm.losses.base import Batch, LossConfig, LossSum, tokens

Between = Annotated[float, Strict(), Field(gt=0, lt=1)]
Divergence = Literal["forward", "reverse", "jsd"]


@config
class DistillationConfig(LossConfig):
    name: Literal["distillation"] = "distillation"
    teacher: str | None = None
    """Another base with the same tokenizer (a name, a folder, a .gguf file or a hub id), which is loaded beside the
    recipe's own, or the folder of an adapter for the recipe's base. Without one it is the base without its deltas,
    which the policy is then held to."""
    teacher_adapter: str | None = None
    """The folder of an adapter that is put on a teacher which is another base."""
    teacher_dtype: Dtype = "auto"
    """Dtype of a teacher that is another base, as `base.dtype`."""
    teacher_quantization: Quantization = "none"
    """Quantization of a teacher that is another base, as `base.quantization`."""
    REPLACED: ClassVar[Mapping[str, Callable[[object], str]]] = {"teacher_store": instead_of_store("loss", "teacher_")}
    """Keys of earlier versions, and what took their place."""
    divergence: Divergence = "forward"
    """forward covers all that the teacher finds likely, reverse keeps to what is likeliest, jsd lies between."""
    beta: Between | None = None
    """Only jsd (0.5 if not given): the teacher's share of the mixture."""
    temperature: PositiveRate = 1.0
    """What logits of both are divided by; above 1 unlikely tokens count for more."""
    supervised_weight: Weight = 0.0
    """How much of the loss is that of `supervised`, on the rows' own tokens; the rest is distillation."""

    @model_validator(mode="after")
    def _options_are_used(self) -> "DistillationConfig":
        if self.beta is not None and self.divergence != "jsd":
            raise ValueError(f"beta is for the divergence jsd; {self.divergence} has none")
        if self.teacher is None and self.teacher_adapter is not None:
            raise ValueError("teacher_adapter is put on a teacher that is another base: name that base in teacher")
        return self

    @property
    def makes_passes(self) -> bool:
        return True

    def conflict_in(self, recipe: Any) -> str:
        if self.teacher is not None or self.supervised_weight:
            return ""
        return (
            "loss distillation needs a teacher: another base, or the folder of an adapter for it. Without one the "
            "policy is held to its own base, which is useful beside a supervised_weight only"
        )


def value(config: DistillationConfig, policy: Tensor, reference: Tensor | None, batch: Batch) -> LossSum:
    assert batch.divergences is not None, "distillation needs divergences from its teacher"
    count = tokens(config, batch)
    imitation = -(batch.weights * policy).sum()
    divergence = (batch.weights * batch.divergences).sum()
    share = config.supervised_weight
    metrics = {"divergence": (divergence.detach(), count), "supervised_loss": (imitation.detach(), count)}
    return LossSum(share * imitation + (1 - share) * config.temperature**2 * divergence, count, metrics)


def distance(config: DistillationConfig, z: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """D of logits z [n, V] from the teacher's [n, V], both float: (D [n] in nats, its gradient for z [n, V])."""
    T = config.temperature
    values, grad = divergence(config.divergence, config.beta or 0.5, z / T, teacher / T)
    return values, grad.div_(T)


def divergence(kind: Divergence, beta: float, z: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """As `distance`, at temperature 1."""
    log_p, log_q = z.log_softmax(-1), teacher.log_softmax(-1)
    p = log_p.exp()
    if kind == "forward":
        q = log_q.exp()
        return (q * (log_q - log_p)).sum(-1), p.sub_(q)
    if kind == "reverse":
        other, share = log_q, 1.0
    else:
        other, share = torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta)), 1 - beta
    ratio = log_p - other
    found = (p * ratio).sum(-1)
    grad = (p * (ratio - found[:, None])).mul_(share)  # what p adds to the mixture cancels
    if kind == "jsd":
        found = share * found + beta * (log_q.exp() * (log_q - other)).sum(-1)
    return found, grad
