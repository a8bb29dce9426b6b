"""MoRA: High-Rank Updating for Parameter-Efficient Fine-Tuning. Jiang et al. 2024, arXiv:2405.12130, section 4.

    h = W x + decompress(M compress(x))        M [k, k], at first 0, k = floor(sqrt((d_in + d_out) r))

M has the size of LoRA's two matrices together. Neither operator has parameters; both work on chunks of k elements:

    sharing (equation 6)     compress: the sum of the chunks of x            decompress: the result, again and again
    rotation (equation 9)    compress: chunk j of x turned as in RoPE, by    decompress: the results, M times each
                             j theta_i, theta_i = 10000^(-2 i / k)           chunk, end to end
    truncation               compress: the first chunk of x                  decompress: the result, then zeros

The paper takes rotation for small r and sharing for large. What it leaves open is as in the authors' code: where k does
not divide d_in, the last chunk is filled up with the beginning of x; component i of a chunk turns with i + k / 2, for
which k is made even; outputs are cut at d_out, or begin again where they are too few. The code rounds k, the paper
floors it; here k is also no larger than the layer, beyond which M would have parts that nothing reads.
"""

from math import isqrt
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftlm.config.schema import PositiveCount, config
from graftlm.deltas.base import AdditiveDelta, Base, DeltaConfig, Site


@config
class MoraConfig(DeltaConfig):
    method: Literal["mora"] = "mora"
    r: PositiveCount = 8
    """The rank of the LoRA that has as many parameters."""
    type: Literal["rotation", "sharing", "truncation"] = "rotation"


class Mora(AdditiveDelta):
    family = "reparameterisation"
    paper = "Jiang et al. 2024, arXiv:2405.12130"
    formula = "k * k"
    learning_rate = 2e-3
    cos: Tensor
    sin: Tensor

    def __init__(self, site: Site, config: MoraConfig) -> None:
        super().__init__(site, config)
        self.way = config.type
        self.k = min(isqrt((site.d_in + site.d_out) * config.r), site.d_in, site.d_out)
        if self.way == "rotation":
            self.k = max(self.k // 2 * 2, 2)
        self.chunks = -(-site.d_in // self.k)
        self.M = nn.Parameter(torch.zeros(self.k, self.k))
        if self.way == "rotation":
            theta = 10000.0 ** (-torch.arange(0, self.k, 2) / self.k)
            angle = torch.outer(torch.arange(self.chunks), theta).repeat(1, 2)[:, None]  # [chunks, 1, k]
            self.register_buffer("cos", angle.cos(), persistent=False)
            self.register_buffer("sin", angle.sin(), persistent=False)

    def matrix(self) -> Tensor:
        d_in, d_out, k = self.site.d_in, self.site.d_out, self.k
        if self.way == "truncation":
            return F.pad(self.M, (0, d_in - k, 0, d_out - k))
        wide = torch.block_diag(*self._turned()) if self.way == "rotation" else self.M.repeat(1, self.chunks)
        beyond = wide[:, d_in:]  # columns that read the beginning of x for a second time
        dW = wide[:, :d_in] + F.pad(beyond, (0, d_in - beyond.shape[1]))
        return dW.repeat(-(-d_out // len(dW)), 1)[:d_out]

    def increment(self, x: Tensor, base: Base) -> Tensor:
        d_in, d_out, k = self.site.d_in, self.site.d_out, self.k
        if self.way == "truncation":
            return F.pad(x[..., :k] @ self.M.T, (0, d_out - k))
        if beyond := self.chunks * k - d_in:
            x = torch.cat([x, x[..., :beyond]], dim=-1)
        parts = x.unflatten(-1, (self.chunks, k))
        if self.way == "rotation":
            used = min(self.chunks, -(-d_out // k))  # what the other chunks become is cut off
            rows = parts[..., :used, :].flatten(0, -3).transpose(0, 1)  # [chunks, T, k]
            y = (rows @ self._turned()[:used].mT).transpose(0, 1).flatten(1).unflatten(0, x.shape[:-1])
        else:
            y = parts.sum(-2) @ self.M.T
        times = -(-d_out // y.shape[-1])
        return torch.cat([y] * times, dim=-1)[..., :d_out] if times > 1 else y[..., :d_out]

    def _turned(self) -> Tensor:
        """M R_j [chunks, k, k], with R_j the rotation of chunk j: cheaper than to turn every x."""
        left, right = self.M.chunk(2, dim=1)
        return self.M * self.cos + torch.cat([right, -left], dim=1) * self.sin
