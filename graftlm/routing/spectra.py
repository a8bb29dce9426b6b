"""What token routers ask of D_e = B_e A_e, without a matrix of the layer's size.

B_e = Q_e R_e, A_e^T = P_e T_e          Q_e, P_e orthonormal; R_e, T_e [r, r]
D_e = Q_e (R_e T_e^T) P_e^T             so singular values and vectors are those of the r x r core
||D_e x|| = ||R_e A_e x||
"""

import torch
from torch import Tensor

from graftlm.model.routed import Experts


def top_directions(experts: Experts) -> Tensor:
    """The right singular vector of each D_e with the largest singular value [n, d_in], of length 1; 0 where D_e is 0.

    Exact also where the second singular value is nearly as large, where power iteration is not. Its sign is arbitrary.
    """
    P, T = torch.linalg.qr(experts.A.double().transpose(1, 2))
    R = torch.linalg.qr(experts.B.double(), mode="r").R
    _, S, Vh = torch.linalg.svd(R @ T.transpose(1, 2), full_matrices=False)
    found = (P @ Vh[:, 0, :, None]).squeeze(-1)
    return torch.where(S[:, :1] > 0, found, 0.0).to(experts.A.dtype)


def triangles(experts: Experts) -> Tensor:
    """R_e [n, min(r, d_out), r] for `change_norms`."""
    found: Tensor = torch.linalg.qr(experts.B.double(), mode="r").R.to(experts.B.dtype)
    return found


def change_norms(triangles: Tensor, inner: Tensor) -> Tensor:
    """||D_e x|| [T, n] of all A_e x [T, n, r]."""
    found: Tensor = torch.einsum("nqr,tnr->tnq", triangles, inner).norm(dim=-1)
    return found
