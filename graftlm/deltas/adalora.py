"""AdaLoRA: Adaptive Budget Allocation. Zhang et al. 2023, arXiv:2303.10512, equations 3 and 4.

    dW = s P diag(E) Q        P [d_out, r]  E [r, 1]  Q [r, d_in]        s = alpha / r

    loss + gamma (||P^T P - I||^2 + ||Q Q^T - I||^2)     for each site (equation 4, section 3.2)

E is at zero and P, Q are Gaussian. The paper leaves their deviation open: 1 / sqrt(d) here, which is what P^T P = I
asks for (the authors' code: 0.02 at every width). That code and PEFT add gamma times the mean over all P and Q of norms
that are not squared, and PEFT divides by r + 1e-5; the former is a departure from the paper, the latter we keep.

At the default rate P and Q stay nearly orthogonal. Larger rates may learn more in a few steps, but move P and Q so far
in each that the penalty cannot hold them, and the triplets' scores then compare vectors of different lengths.

This is the parameterisation alone. Which triplets live is decided by a callback, by zeros in E.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from graftlm.config.schema import PositiveCount, PositiveRate, Rate, config
from graftlm.deltas.base import AdditiveDelta, DeltaConfig, PeftLayout, Site

UNUSED = ("alora_invocation_tokens", "arrow_config", "corda_config", "eva_config", "kasa_config", "layer_replication",
          "lora_ga_config", "megatron_config", "monteclora_config", "target_parameters",
          "trainable_token_indices", "use_bdlora", "velora_config")  # fmt: skip
"""Keys of PEFT's LORA that its ADALORA inherits, None where they mean nothing."""


@config
class AdaLoraConfig(DeltaConfig):
    method: Literal["adalora"] = "adalora"
    r: PositiveCount = 12
    """The rank before any is pruned; s goes by it to the end."""
    alpha: PositiveRate = 32
    orthogonality: Rate = 0.1
    """The gamma of the paper."""


def with_pruned(config_json: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """PEFT leaves pruned triplets out of its file and says which they were: here they are triplets of zeros."""
    whole = dict(tensors)
    for name, rank_mask in (config_json.get("rank_pattern") or {}).items():
        at, site = torch.tensor(rank_mask).nonzero()[:, 0], "base_model.model." + name.removesuffix(".lora_E")
        for end, dim in (("lora_E", 0), ("lora_A", 0), ("lora_B", 1)):
            part = tensors.get(f"{site}.{end}")
            if part is not None and part.shape[dim] == len(at):
                shape = [len(rank_mask) if d == dim else n for d, n in enumerate(part.shape)]
                whole[f"{site}.{end}"] = part.new_zeros(shape).index_copy(dim, at, part)
    return whole


class AdaLora(AdditiveDelta):
    family = "reparameterisation"
    paper = "Zhang et al. 2023, arXiv:2303.10512"
    callbacks = ("adalora", "bilora", "increlora")
    formula = "r * (d_in + d_out + 1)"
    learning_rate = 0.032
    peft = PeftLayout(
        type="ADALORA",
        tensors={"P": "lora_B", "E": "lora_E", "Q": "lora_A"},
        fields={"r": "init_r", "alpha": "lora_alpha", "dropout": "lora_dropout"},
        defaults={"lora_alpha": 8},
        constants={
            **dict.fromkeys(UNUSED),
            **dict.fromkeys(("ensure_weight_tying", "lora_bias", "use_dora", "use_qalora"), False),
            "bias": "none",
            "loftq_config": {},
        },
        harmless=(
            "alpha_pattern",
            "rank_pattern",
            "use_rslora",
            "beta1",
            "beta2",
            "deltaT",
            "orth_reg_weight",
            "r",
            "tfinal",
            "tinit",
        ),
        facts=lambda site, config: {"target_r": config.r, "total_step": 1},
        read=lambda stored, tensors: with_pruned(stored, tensors),
    )

    def __init__(self, site: Site, config: AdaLoraConfig) -> None:
        super().__init__(site, config)
        draw = site.generator()
        self.P = nn.Parameter(torch.randn(site.d_out, config.r, generator=draw) / site.d_out**0.5)
        self.E = nn.Parameter(torch.zeros(config.r, 1))
        self.Q = nn.Parameter(torch.randn(config.r, site.d_in, generator=draw) / site.d_in**0.5)
        self.scale = config.alpha / (config.r + 1e-5)
        self.orthogonality = config.orthogonality

    def penalty(self) -> Tensor | None:
        if not self.orthogonality:
            return None
        I = self.E.new_ones(len(self.E)).diag()  # noqa: E741
        return self.orthogonality * ((self.P.T @ self.P - I).square().sum() + (self.Q @ self.Q.T - I).square().sum())

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.E * self.Q, self.scale * self.P
