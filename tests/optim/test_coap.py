"""COAP: its directions by finite differences of its objective, and by a projected singular value decomposition."""

import pytest
import torch
from torch import nn

from graftlm.optim.coap import Coap, CoapConfig, corrected
from graftlm.training.state import ParameterGroup


def objective(P: torch.Tensor, M: torch.Tensor, G: torch.Tensor) -> float:
    error = ((P @ P.T @ G - G) ** 2).mean()
    back = P @ M
    cosines = [float(back[i] @ G[i] / (back[i].norm() * G[i].norm())) for i in range(len(G))]
    return float(error) * (1 - sum(cosines) / len(cosines))


@pytest.mark.parametrize("size", [0.1, 3.0])  # a gradient of L within the norm of 1, and one beyond it
def test_a_correction_goes_down_the_objective(size: float) -> None:
    torch.manual_seed(0)
    P = torch.linalg.qr(torch.randn(8, 3)).Q.double()
    M, G = torch.randn(3, 11).double(), size * torch.randn(8, 11).double()
    slope = torch.zeros_like(P)
    for i in range(8):
        for j in range(3):
            step = torch.zeros_like(P)
            step[i, j] = 1e-5
            slope[i, j] = (objective(P + step, M, G) - objective(P - step, M, G)) / 2e-5
    assert (float(slope.norm()) > 1) == (size > 1)
    torch.testing.assert_close(
        corrected(P, M, G), P - 0.1 * slope / max(1.0, float(slope.norm())), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("shape", [(8, 11), (11, 8)])
def test_when_directions_change_and_how(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.zeros(shape))
    optimizer = Coap(CoapConfig(rank=3, every=2, factor=2)).make([ParameterGroup({"p": p}, 0.1)], weight_decay=0.0)
    state, before = optimizer.state[p], None
    for step in range(9):
        G = torch.randn(shape)
        G = G if shape[0] < shape[1] else G.T
        if step:
            before, M = state["P"].clone(), state["M"].clone()
        p.grad = G.clone() if shape[0] < shape[1] else G.T.clone()
        optimizer.step()
        P = state["P"]
        if before is None:
            U = torch.linalg.svd(G)[0][:, :3]
            torch.testing.assert_close(P @ P.T, U @ U.T, rtol=1e-4, atol=1e-5)
        elif step % 4 == 0:  # the leading directions of G as seen through the old ones
            Y = G.T @ before
            seen = Y @ torch.linalg.solve(Y.T @ Y, Y.T) @ G.T  # of rank 3: its row space is that of P
            torch.testing.assert_close(P.T @ P, torch.eye(3), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(seen @ P @ P.T, seen, rtol=1e-4, atol=1e-4)
        elif step % 2 == 0:
            torch.testing.assert_close(P, corrected(before, M, G))
        else:
            assert torch.equal(P, before)
