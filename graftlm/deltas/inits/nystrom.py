"""NLoRA's start from rows and columns of W. Guo et al. 2025, arXiv:2502.14482, figure 3.

    A = W[:r, :]    N = W[:r, :r]    B = W[:, :r]        W' = W + s B N A

    A [r, d_in]  N [r, r]  B [d_out, r]

The approximation after Nystrom, W ~ B N^+ A, has the pseudo-inverse of N in the middle. The authors' figure and their
code (where the pseudo-inverse is commented out) copy the block itself, which costs nothing and is well conditioned;
so here. Their code leaves W whole, so that their model starts a little away from the base. Here s B N A is taken out.
"""

from torch import Tensor

from graftlm.deltas.base import Delta, Site
from graftlm.deltas.inits._rank import rank


def nystrom(site: Site, part: Delta) -> dict[str, Tensor]:
    r, W = rank(part), site.W()
    return {"A": W[:r], "N": W[:r, :r], "B": W[:, :r]}
