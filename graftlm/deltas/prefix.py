"""Prefix-Tuning: Optimizing Continuous Prompts for Generation. Li and Liang 2021, arXiv:2101.00190, section 4.

    attention sees [K_P; K], [V_P; V]      in each layer; K_P, V_P [p, key/value heads, size of a head] are learnt

    (K_P, V_P) of all layers = P                          without reparameterisation
                             = U tanh(D P_i + d) + u      with it (equation 3): P [p, d_model], one network for all

With grouped heads the prefix has as many heads as there are keys. Fresh values are small and random: the prefix takes
attention from the start, so the fresh delta is not the identity (nor is the paper's).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftlm.config.schema import Count, PositiveCount, config
from graftlm.deltas.base import DeltaConfig, InputDelta, PeftLayout, Site, Targets


@config
class PrefixConfig(DeltaConfig):
    method: Literal["prefix"] = "prefix"
    p: PositiveCount = 20
    """Positions of the prefix."""
    reparameterise: Count = 0
    """Width of the hidden layer of the network that makes the prefix; 0 for none."""
    targets: Targets = "model"


class Prefix(InputDelta):
    family = "addition"
    paper = "Li and Liang 2021, arXiv:2101.00190"
    formula = (
        "p * 2 * layers * kv_heads * head_dim if not reparameterise else "
        "p * d_out + reparameterise * (d_out + 1) + 2 * layers * kv_heads * head_dim * (reparameterise + 1)"
    )
    learning_rate = 0.128
    starts_away = "attention is shared with the prefix from the first step on"
    peft = PeftLayout(
        type="PREFIX_TUNING",
        tensors={"P": "prompt_embeddings"},
        fields={"p": "num_virtual_tokens"},
        constants={"prefix_projection": False},
        harmless=("encoder_hidden_size", "num_transformer_submodules"),
        facts=lambda site, config: {
            "num_layers": (site.heads or (0, 0, 0))[0],
            "num_attention_heads": (site.heads or (0, 0, 0))[1],
            "token_dim": (site.heads or (0, 0, 0))[1] * (site.heads or (0, 0, 0))[2],
        },
        why_not=lambda config: "PEFT stores no network that makes the prefix" if config.reparameterise else "",
    )

    def __init__(self, site: Site, config: PrefixConfig) -> None:
        super().__init__(site, config)
        assert site.heads is not None
        layers, heads, size = site.heads
        self.shape = (config.p, layers, 2, heads, size)
        width, hidden = 2 * layers * heads * size, config.reparameterise
        draw = site.generator()
        self.P = nn.Parameter(0.02 * torch.randn(config.p, site.d_out if hidden else width, generator=draw))
        if hidden:
            self.D = nn.Parameter(torch.randn(hidden, site.d_out, generator=draw) / site.d_out**0.5)
            self.d = nn.Parameter(torch.zeros(hidden))
            self.U = nn.Parameter(torch.randn(width, hidden, generator=draw) / hidden**0.5)
            self.u = nn.Parameter(torch.zeros(width))

    def prefix(self) -> Tensor:
        P: Tensor = self.P
        if hasattr(self, "D"):
            P = F.linear(torch.tanh(F.linear(P, self.D, self.d)), self.U, self.u)
        return P.view(self.shape).permute(1, 2, 3, 0, 4)
