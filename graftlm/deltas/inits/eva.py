"""EVA: Explained Variance Adaptation. Paischer et al. 2024, arXiv:2410.07170, theorems 3.1 and 3.2.

    X = U S V^T    A = V_r^T [r, d_in]        X [tokens, d_in]: what the layer reads in some batches

The right singular vectors of X are the eigenvectors of X^T X, which is what is gathered. B stays as the method starts
it: at zero, wherever it is trained. Among all orthonormal A this one keeps the most of x, and so gives B the greatest
gradient (theorem 3.2). The authors' code and PEFT take the mean from X first; the theorems do not. The paper also
moves ranks between layers by the variance that they explain: that is a callback, not a start.
"""

import torch
from torch import Tensor

from graftlm.deltas.base import Delta, Site
from graftlm.deltas.inits._rank import rank


def eva(site: Site, part: Delta) -> dict[str, Tensor]:
    directions = torch.linalg.eigh(site.statistics["second_moment"]).eigenvectors  # in ascending order
    return {"A": directions[:, -rank(part) :].flip(1).T}
