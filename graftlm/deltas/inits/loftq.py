"""LoftQ: LoRA-Fine-Tuning-aware Quantization. Li et al. 2023, arXiv:2310.08659, equation 6 and algorithm 1.

    min over A, B of || W - Q - s B A ||_F        W - Q = U S V^T    B = U_r (S_r / s)^1/2    A = (S_r / s)^1/2 V_r^T

    A [r, d_in]  B [d_out, r]  W the weight before quantizing  Q the quantized one  s: the method's own factor

The fresh delta is not zero: it takes the base back towards W. The paper then quantizes W - s B A in the place of W, and
repeats. Here Q is everybody's and stays (docs/decisions/026), which is the paper's algorithm at its first step (T = 1)
and PEFT's replace_lora_weights_loftq.
"""

from torch import Tensor

from graftlm.deltas.base import Delta, Site
from graftlm.deltas.inits._rank import rank
from graftlm.deltas.linalg import top_singular


def loftq(site: Site, part: Delta) -> dict[str, Tensor]:
    U, S, Vh = top_singular(site.original() - site.W(), rank(part))
    root = (S / part.scale).sqrt()
    return {"A": root[:, None] * Vh, "B": U * root}
