"""C3A: Parameter-Efficient Fine-Tuning via Circular Convolution. Chen et al. 2024, arXiv:2407.19342.

    dW = [C(w_ij)] / d_in                     W cut into blocks of b x b; w_ij [b] of block row i and block column j
    C(w)[p, q] = w[(q - p) mod b]             circulant: the first row is w, each row is the one above turned by one
    C(w) x = FFT(FFT(w) * IFFT(x))            for x [b]: products of two spectra, element by element

A block has b numbers and up to full rank. w is [d_out / b, d_in / b, b]; b must divide the sizes of every layer.

The division by d_in is PEFT's. It makes dW shrink as a layer grows, so that the learning rate is large (PEFT's page on
C3A has 0.1). PEFT starts w at Xavier-uniform by default; here it starts at zero. dW is linear in w, so that the start
would be a fixed noise on W. The backward pass of PEFT 0.21.2 is its own, and gives x another gradient than that of its
forward pass; ours are the forward pass's.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from graftlm.config.schema import PositiveCount, config
from graftlm.deltas.base import AdditiveDelta, Base, DeltaConfig, PeftLayout, Site, check_divides, peft_needs_a_dot


@config
class C3aConfig(DeltaConfig):
    method: Literal["c3a"] = "c3a"
    block: PositiveCount = 64
    """Width b of a block: a divisor of the inputs and outputs of every layer. Larger is fewer parameters."""


class C3a(AdditiveDelta):
    family = "reparameterisation"
    paper = "Chen et al. 2024, arXiv:2407.19342"
    formula = "d_in * d_out // block"
    learning_rate = 0.4
    peft = PeftLayout(
        type="C3A",
        tensors={"w": "c3a_kernel"},
        fields={"block": "block_size"},
        patterns={"block": "block_size_pattern"},
        defaults={"block_size": 256},
        constants={"bias": "none"},
        why_not=peft_needs_a_dot("block", "block_size_pattern"),
    )

    def __init__(self, site: Site, config: C3aConfig) -> None:
        super().__init__(site, config)
        b = config.block
        check_divides(b, "c3a: block", site)
        self.w = nn.Parameter(torch.zeros(site.d_out // b, site.d_in // b, b))

    def matrix(self) -> Tensor:
        b = self.w.shape[2]
        turned = torch.cat([self.w, self.w], dim=2).unfold(2, b, 1)[:, :, 1:].flip(2)  # [i, j, p, q]
        return turned.transpose(1, 2).flatten(2).flatten(0, 1) / self.site.d_in

    def increment(self, x: Tensor, base: Base) -> Tensor:
        b = self.w.shape[2]
        blocks = torch.fft.rfft(x.float().unflatten(-1, (-1, b)))  # [.. j, b / 2 + 1]; x is real: half is enough
        mixed = torch.einsum("...jk,ijk->...ik", blocks, torch.fft.rfft(self.w).conj())
        dy: Tensor = torch.fft.irfft(mixed, n=b).flatten(-2) / self.site.d_in
        return dy
