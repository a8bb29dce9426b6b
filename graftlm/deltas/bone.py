"""Bone, later MiSS: weights changed by shards that share one matrix. Kang 2024, arXiv:2409.15371.

    dW_j = D^T                   D [r, d_out]: W cut into slices W_j of r columns, the last one perhaps narrower
    dW_ij = W_ij b_i + b_i       `bat`: W cut into blocks W_ij of r x r; b [d_out / r, r, r], one for each row of blocks

The trained matrix starts at zero. The simple form is the later versions' recommendation, `bat` the first version's
block affine transformation: dW then has more rank than r, and follows W. Simple, dW is a product: D^T [I I I ...].

PEFT calls both MISS (`init_weights` True and "bat"); its "mini" repeats a narrower D and is not here.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from graftlm.config.schema import Flag, PositiveCount, config
from graftlm.deltas.base import AdditiveDelta, DeltaConfig, PeftLayout, Site
from graftlm.errors import TargetError


@config
class BoneConfig(DeltaConfig):
    method: Literal["bone"] = "bone"
    r: PositiveCount = 64
    bat: Flag = False
    """Block affine: it needs an r that divides the sizes of every layer, and a product as large as W in each step."""


def init_weights(site: Site, config: BoneConfig) -> dict[str, Any]:
    return {"init_weights": "bat" if config.bat else True, "mini_r": 1}


class Bone(AdditiveDelta):
    family = "reparameterisation"
    paper = "Kang 2024, arXiv:2409.15371"
    formula = "d_out * r"
    learning_rate = 4e-4
    peft = PeftLayout(
        type="MISS",
        tensors={"D": "miss_block"},
        fields={"r": "r", "dropout": "miss_dropout"},
        constants={"bias": "none"},
        facts=init_weights,
        translate=lambda stored: {"bat": stored.get("init_weights") == "bat"},
    )
    shards: Tensor

    def __init__(self, site: Site, config: BoneConfig) -> None:
        super().__init__(site, config)
        r, self.bat = config.r, config.bat
        if r > site.d_in or (self.bat and (site.d_in % r or site.d_out % r)):
            raise TargetError(
                f"bone: r = {r} does not fit the {site.d_out} x {site.d_in} weight of {site.name}",
                code="rank-too-large",
            )
        self.D = nn.Parameter(torch.zeros((site.d_out // r, r, r) if self.bat else (r, site.d_out)))
        shards = torch.eye(r).repeat(1, -(-site.d_in // r))[:, : site.d_in]
        self.register_buffer("shards", None if self.bat else shards, persistent=False)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        return None if self.bat else (self.shards, self.D.T)

    def matrix(self) -> Tensor:
        if not self.bat:
            return self.D.T @ self.shards
        blocks = self.site.W().unflatten(0, self.D.shape[:2]).unflatten(2, (-1, len(self.D[0])))  # [i, r, j, r]
        changed = torch.einsum("iajb,ibc->iajc", blocks, self.D) + self.D[:, :, None]
        return changed.flatten(2).flatten(0, 1)
