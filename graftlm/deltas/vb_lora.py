"""VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks. Li et al. 2024, arXiv:2405.15179, section 3.

    h = W x + B A x        A [r, d_in] and B [d_out, r], cut into sub-vectors of length b: rows of A, columns of B
    sub-vector = sum_(i in top-k) softmax(z_top-k)_i bank_i        z [h], one for each sub-vector; bank [h, b]

One bank serves all sites; b must divide the sizes of every layer. Logits and bank learn; only the k largest logits of a
sub-vector act, so that after training k - 1 weights and k indices are all that it needs. The bank starts at
U(-0.02, 0.02), logits at N(0, 0.1^2) as in PEFT (the authors' code for GLUE has 0.01). No factor is in front of B A.

The paper gives the bank a learning rate of 1e-3 and the logits 1e-2; here one rate is for both, as in the authors' run
on mathematics.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from graftlm.config.schema import PositiveCount, PositiveRate, config
from graftlm.deltas.base import AdditiveDelta, DeltaConfig, PeftLayout, Shared, Site
from graftlm.errors import TargetError


@config
class VbLoraConfig(DeltaConfig):
    method: Literal["vb-lora"] = "vb-lora"
    r: PositiveCount = 4
    num_vectors: PositiveCount = 256
    """h: 90 for RoBERTa-large, 2048 for Llama 2 7B in the paper."""
    vector_length: PositiveCount = 64
    """b: 256 in the paper, which does not divide the sizes of small models."""
    top_k: PositiveCount = 2
    """With 1 the bank learns alone: a softmax over one logit has no gradient."""
    bank_bound: PositiveRate = 0.02
    logits_std: PositiveRate = 0.1

    def share(self, sites: Sequence[Site]) -> Shared:
        return Bank(self, sites[0].generator())


class Bank(Shared):
    def __init__(self, config: VbLoraConfig, generator: torch.Generator) -> None:
        super().__init__()
        uniform = 2 * torch.rand(config.num_vectors, config.vector_length, generator=generator) - 1
        self.bank = nn.Parameter(config.bank_bound * uniform)


class VbLora(AdditiveDelta):
    family = "reparameterisation"
    paper = "Li et al. 2024, arXiv:2405.15179"
    formula = "r * num_vectors * (d_in + d_out) // vector_length"
    shared_formula = "num_vectors * vector_length"
    starts_away = "A and B come from one bank, so that B cannot be zero while A is not: the paper starts close to zero"
    learning_rate = 0.016
    peft = PeftLayout(
        type="VBLORA",
        tensors={"z_A": "vblora_logits_A", "z_B": "vblora_logits_B"},
        fields={
            "r": "r",
            "num_vectors": "num_vectors",
            "vector_length": "vector_length",
            "top_k": "topk",
            "bank_bound": "init_vector_bank_bound",
            "logits_std": "init_logits_std",
            "dropout": "vblora_dropout",
        },
        defaults={"vector_length": 256},
        constants={"bias": "none", "save_only_topk_weights": False},
        shared={"bank": "vblora_vector_bank"},
    )

    def __init__(self, site: Site, config: VbLoraConfig) -> None:
        super().__init__(site, config)
        r, h, b, self.top_k = config.r, config.num_vectors, config.vector_length, config.top_k
        if site.d_in % b or site.d_out % b:
            raise TargetError(
                f"vb-lora: vector_length {b} does not divide {site.d_in} and {site.d_out} of {site.name}",
                code="indivisible-layer",
            )
        if config.top_k > h or not isinstance(site.shared, Bank) or site.shared.bank.shape != (h, b):
            raise TargetError(
                f"vb-lora: top_k {config.top_k} of {h} vectors of {b} at {site.name}: the bank has others",
                code="vector-bank-mismatch",
            )
        generator = site.generator()
        self.z_A = nn.Parameter(config.logits_std * torch.randn(r, site.d_in // b, h, generator=generator))
        self.z_B = nn.Parameter(config.logits_std * torch.randn(site.d_out // b, r, h, generator=generator))

    def factors(self) -> tuple[Tensor, Tensor]:
        A = self._sub_vectors(self.z_A).flatten(1)
        B = self._sub_vectors(self.z_B).mT.flatten(0, 1)
        return A, B

    def _sub_vectors(self, logits: Tensor) -> Tensor:
        """[.. h] -> [.. b]."""
        assert isinstance(self.site.shared, Bank)
        largest, indices = logits.topk(self.top_k, dim=-1)
        return (largest.softmax(-1)[..., None] * self.site.shared.bank[indices]).sum(-2)
