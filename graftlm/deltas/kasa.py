"""KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models. Wang et al. 2024, arXiv:2412.06071.

    h = (W - N) x + s U diag(sigma) V x        U [d_out, r]  sigma [r]  V [r, d_in]  s = alpha / r
    N = the sum of the smallest singular components of W, which count as noise: N = N_B N_A, frozen
    loss + sum over sites (beta ||sigma||^2 + gamma (||U^T U - I|| + ||V V^T - I||))        Frobenius norms

N is taken out for good, so the fresh delta is not the identity: with an offset that gave N back, nothing would be left
of the truncation. The base is never edited: -N is a part of dW, kept with the adapter. U starts at zero, sigma at
N(0, 1) and V as LoRA's A, as in the authors' code.

How much is cut off. `cut: code` is the authors' code: W keeps its first d_in - r components. So a square or tall layer
loses r of them, and a layer with d_out <= d_in - r loses none. `cut: paper` is the text, and PEFT: r components of
every layer. The authors' own tasks adapt square layers, where both are the same. In SmolLM2 the last components of
v_proj (192 x 576) are no noise: without r of them the loss of a text is 6.8 nats, with all of them 1.9.

The code differs from the paper in its penalty: it takes U U^T and V^T V (d x d) and divides by the number of layers.
The paper is followed.

PEFT (`kasa_config`) computes what `cut: paper` does. It edits its base, and finds N anew when it loads. Its folders are
read: that takes an SVD of every layer, as a new `kasa` does, where ours hold N. Folders of `cut: paper` are written in
its layout; it ignores the two tensors of N in them. On a base in bf16 PEFT also rounds W - N to bf16.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from graftlm.config.schema import PositiveCount, PositiveRate, Rate, config
from graftlm.deltas.base import AdditiveDelta, DeltaConfig, PeftLayout, Site
from graftlm.errors import TargetError


@config
class KasaConfig(DeltaConfig):
    method: Literal["kasa"] = "kasa"
    r: PositiveCount = 8
    alpha: PositiveRate = 16
    beta: Rate = 1e-4
    """Weight of the squared singular values in the loss."""
    gamma: Rate = 1e-3
    """Weight of the distance of U and V from orthogonality in the loss."""
    cut: Literal["code", "paper"] = "code"
    """How many components W loses: all after the first d_in - r (the authors' code), or r of every layer."""


def noise(site: Site, cut: int) -> dict[str, Tensor]:
    """N of the last `cut` components of W, as N_A [cut, d_in] and N_B [d_out, cut]."""
    U, S, Vh = torch.linalg.svd(site.W(), full_matrices=False)
    first = len(S) - cut
    return {"N_A": Vh[first:], "N_B": U[:, first:] * S[first:]}


def settings_of(stored: dict[str, Any]) -> dict[str, Any]:
    """beta and gamma of PEFT's config."""
    given = stored.get("kasa_config") or {}
    return {key: float(given[key]) for key in ("beta", "gamma") if key in given} | {"cut": "paper"}


NAMES = {"V": "lora_A.weight", "U": "lora_B.weight", "sigma": "lora_diag", "N_A": "kasa_noise.A", "N_B": "kasa_noise.B"}


def why_not(config: KasaConfig) -> str:
    return "" if config.cut == "paper" else "PEFT cuts r components of every layer: set cut to paper"


class Kasa(AdditiveDelta):
    family = "reparameterisation"
    paper = "Wang et al. 2024, arXiv:2412.06071"
    formula = "r * (d_in + d_out + 1)"
    learning_rate = 2e-3
    peft = PeftLayout(
        type="LORA",
        tensors=NAMES,
        fields={"r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"},
        patterns={"r": "rank_pattern", "alpha": "alpha_pattern"},
        constants={"use_dora": False, "use_rslora": False},
        defaults={"r": 8, "lora_alpha": 8},
        facts=lambda site, config: {"kasa_config": {"beta": config.beta, "gamma": config.gamma}},
        translate=settings_of,
        mark="kasa_config",
        derive=lambda site, config: noise(site, config.r),
        why_not=why_not,
    )
    starts_away = "the paper removes the smallest singular components of W, for good"
    N_A: Tensor
    N_B: Tensor

    def __init__(self, site: Site, config: KasaConfig) -> None:
        super().__init__(site, config)
        r, d_in, d_out = config.r, site.d_in, site.d_out
        cut = r if config.cut == "paper" else max(0, min(d_in, d_out) - max(0, d_in - r))
        if cut >= min(d_in, d_out):
            raise TargetError(
                f"kasa: with r = {r} nothing is left of the {d_out} x {d_in} weight of {site.name}",
                code="rank-too-large",
            )
        generator = site.generator()
        self.V = nn.Parameter((2 * torch.rand(r, d_in, generator=generator) - 1) / d_in**0.5)
        self.sigma = nn.Parameter(torch.randn(r, generator=generator))
        self.U = nn.Parameter(torch.zeros(d_out, r))
        self.register_buffer("N_A", torch.zeros(cut, d_in))
        self.register_buffer("N_B", torch.zeros(d_out, cut))
        self.cut, self.beta, self.gamma = cut, config.beta, config.gamma
        self.scale = config.alpha / r

    def start(self) -> None:
        if self.cut:
            for key, tensor in noise(self.site, self.cut).items():
                self.get_buffer(key).copy_(tensor)

    def factors(self) -> tuple[Tensor, Tensor]:
        return torch.cat([self.V, self.N_A]), torch.cat([self.scale * self.sigma * self.U, -self.N_B], dim=1)

    def penalty(self) -> Tensor:
        one = torch.ones_like(self.sigma).diag()
        uneven = (self.U.T @ self.U - one).norm() + (self.V @ self.V.T - one).norm()
        total: Tensor = self.beta * self.sigma.square().sum() + self.gamma * uneven
        return total
