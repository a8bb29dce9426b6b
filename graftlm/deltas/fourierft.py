"""FourierFT: Parameter-Efficient Fine-Tuning with Discrete Fourier Transform. Gao et al. 2024, arXiv:2405.03003.

    dW = alpha Re(IDFT2(F))        F [d_out, d_in], zero but for n entries, which are the same in all layers of a size
    dW[p, q] = alpha / (d_out d_in) sum_l c_l cos(2 pi (u_l p / d_out + v_l q / d_in))        c [n] is trained

The entries (u_l, v_l) are drawn with a seed of their own, as in PEFT. The paper starts c at N(0, 1); here it starts at
zero. dW is linear in c, so that the start is a fixed noise on W that training never sees; in a layer of 576 x 576 it is
as large as W. The same normalisation makes dW shrink as a layer grows: small models want a smaller learning rate.

y is never computed through dW: two short transforms do it, of x along d_in and of the result along d_out. Since x is
real, half of each spectrum is enough: an entry in the other half is the conjugate of its mirror image.
"""

from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn

from graftlm.config.schema import Count, PositiveCount, PositiveRate, config
from graftlm.deltas.base import AdditiveDelta, Base, DeltaConfig, PeftLayout, Site, peft_needs_a_dot


@config
class FourierFTConfig(DeltaConfig):
    method: Literal["fourierft"] = "fourierft"
    n_frequency: PositiveCount = 1000
    alpha: PositiveRate = 300
    entry_seed: Count = 777
    """Draws the entries. It does not follow the run's seed."""


@cache
def entries(d_out: int, d_in: int, n: int, seed: int) -> Tensor:
    """(u, v) of each entry, int64 [2, n]."""
    places = torch.randperm(d_out * d_in, generator=torch.Generator().manual_seed(seed))[:n]
    return torch.stack([places // d_in, places % d_in])


class FourierFT(AdditiveDelta):
    family = "reparameterisation"
    paper = "Gao et al. 2024, arXiv:2405.03003"
    formula = "min(n_frequency, d_in * d_out)"
    learning_rate = 4e-2
    peft = PeftLayout(
        type="FOURIERFT",
        tensors={"c": "fourierft_spectrum"},
        fields={"n_frequency": "n_frequency", "alpha": "scaling", "entry_seed": "random_loc_seed"},
        patterns={"n_frequency": "n_frequency_pattern"},
        defaults={"scaling": 150.0},
        constants={"bias": "none"},
        why_not=peft_needs_a_dot("n_frequency", "n_frequency_pattern"),
    )
    at: Tensor
    read: Tensor
    write: Tensor
    gain: Tensor

    def __init__(self, site: Site, config: FourierFTConfig) -> None:
        super().__init__(site, config)
        d_in, d_out = site.d_in, site.d_out
        self.scale = config.alpha
        u, v = entries(d_out, d_in, config.n_frequency, config.entry_seed)
        mirrored = 2 * v > d_in  # (u, v) and (-u, -v) give the same cosine
        row = torch.where(mirrored, -u % d_out, u)
        other_half = 2 * row > d_out
        write = torch.where(other_half, d_out - row, row)
        once = (write == 0) | (2 * write == d_out)  # irfft counts every other frequency twice
        gain = torch.where(once, 1.0, 0.5) / d_in
        sine = torch.where(other_half, gain, -gain) * ~once  # of those that count once irfft wants no sine
        self.c = nn.Parameter(torch.zeros(len(u)))
        self.register_buffer("at", u * d_in + v, persistent=False)
        self.register_buffer("read", torch.where(mirrored, -v % d_in, v), persistent=False)
        self.register_buffer("write", write, persistent=False)
        self.register_buffer("gain", torch.stack([gain, sine], dim=1), persistent=False)

    def matrix(self) -> Tensor:
        d_in, d_out = self.site.d_in, self.site.d_out
        F = self.c.new_zeros(d_out * d_in).index_copy(0, self.at, self.c).view(d_out, d_in)
        dW: Tensor = self.scale * torch.fft.ifft2(F).real
        return dW

    def increment(self, x: Tensor, base: Base) -> Tensor:
        d_out = self.site.d_out
        spectrum = torch.fft.rfft(x.float())[..., self.read]
        parts = torch.view_as_real(spectrum) * (self.gain * (self.scale * self.c)[:, None])  # [.. n, 2]
        mixed = parts.new_zeros(*x.shape[:-1], d_out // 2 + 1, 2).index_add(-2, self.write, parts)
        dy: Tensor = torch.fft.irfft(torch.view_as_complex(mixed), n=d_out)
        return dy
