"""DPO (Rafailov et al. 2023, arXiv:2305.18290) and the links that others put in the place of its sigmoid.

With the reward of an answer r(y) = log pi(y|x) / pi_ref(y|x) [N] and the margin m = beta (r(y_w) - r(y_l)) [P]:

    sigmoid  -log s(m)                                              equation 7 there
    hinge    max(0, 1 - m)                                          SLiC, Zhao et al. 2023, arXiv:2305.10425, on rewards
    ipo      (r(y_w)/|y_w| - r(y_l)/|y_l| - 1 / (2 beta))^2         Azar et al. 2023, arXiv:2310.12036, equation 17
    robust   (-(1-e) log s(m) + e log s(-m)) / (1 - 2e)             Chowdhury et al. 2024, arXiv:2403.00409
    exo      s(m) (log s(m) - log(1-e)) + s(-m) (log s(-m) - log e) Ji et al. 2024, arXiv:2402.00856, equation 16, K = 2

s is the logistic function, e the share of pairs that are thought to be the wrong way round. IPO is printed without the
division by |y|; its authors train with it (as TRL found out from them), and without it long answers alone decide.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, Strict, model_validator
from torch import Tensor

from graftlm.config.schema import PositiveRate, config
from graftlm.losses.base import Batch, ComparedConfig, LossSum, lengths, log_ratios, of_pairs, pair_metrics, pairs

Noise = Annotated[float, Strict(), Field(gt=0, lt=0.5)]


@config
class DpoConfig(ComparedConfig):
    name: Literal["dpo"] = "dpo"
    link: Literal["sigmoid", "hinge", "ipo", "robust", "exo"] = "sigmoid"
    """What is minimised of a pair's margin; sigmoid is DPO itself."""
    beta: PositiveRate = 0.1
    """How strongly the policy is held to the reference; in ipo 1 / (2 beta) is the margin that is aimed at."""
    noise: Noise | None = None
    """Only robust (0.1 if not given) and exo (0.001): the share of pairs that are thought to be the wrong way round."""

    @model_validator(mode="after")
    def _noise_is_used(self) -> "DpoConfig":
        if self.noise is not None and self.link not in NOISE:
            raise ValueError(f"noise is for the links robust and exo; link {self.link} has none")
        return self


NOISE = {"robust": 0.1, "exo": 1e-3}


def value(config: DpoConfig, policy: Tensor, reference: Tensor | None, batch: Batch) -> LossSum:
    ratios = log_ratios(policy, reference, batch)
    chosen, rejected = of_pairs(ratios, batch)
    m = config.beta * (chosen - rejected)
    e = config.noise or NOISE.get(config.link, 0.0)
    if config.link == "sigmoid":
        losses = -F.logsigmoid(m)
    elif config.link == "hinge":
        losses = torch.relu(1 - m)
    elif config.link == "ipo":
        of_token_w, of_token_l = of_pairs(ratios / lengths(batch, policy), batch)
        losses = (of_token_w - of_token_l - 1 / (2 * config.beta)).square()
    elif config.link == "robust":
        losses = (e * F.logsigmoid(-m) - (1 - e) * F.logsigmoid(m)) / (1 - 2 * e)
    else:
        log_e, log_rest = torch.tensor(e, dtype=m.dtype).log(), torch.tensor(-e, dtype=m.dtype).log1p()
        losses = m.sigmoid() * (F.logsigmoid(m) - log_rest) + (-m).sigmoid() * (F.logsigmoid(-m) - log_e)
    return LossSum(losses.sum(), pairs(config, batch), pair_metrics(policy, config.beta * ratios, batch))
