"""SM3 element by element, as the paper's algorithm has it, for matrices and vectors."""

import math

import pytest
import torch
from torch import nn

from graftlm.optim.sm3 import Sm3, Sm3Config
from graftlm.training.state import ParameterGroup


def element_by_element(W: list[list[float]], gradients: list[list[list[float]]], rate: float, b: float) -> None:
    n, m = len(W), len(W[0])
    r, c, M = [0.0] * n, [0.0] * m, [[0.0] * m for _ in range(n)]
    for G in gradients:
        N = [[min(r[i], c[j]) + G[i][j] ** 2 for j in range(m)] for i in range(n)]
        r = [max(N[i]) for i in range(n)]
        c = [max(N[i][j] for i in range(n)) for j in range(m)]
        for i in range(n):
            for j in range(m):
                step = G[i][j] / math.sqrt(N[i][j]) if N[i][j] else 0.0
                M[i][j] = b * M[i][j] + (1 - b) * step
                W[i][j] -= rate * M[i][j]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_its_steps_are_those_of_the_paper(momentum: float) -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(3, 5), [torch.randn(3, 5) for _ in range(4)]
    gradients[0][1] = 0
    gradients[0][:, 2] = 0
    W = start.tolist()
    element_by_element(W, [G.tolist() for G in gradients], 0.1, momentum)
    p = nn.Parameter(start.clone())
    optimizer = Sm3(Sm3Config(momentum=momentum)).make([ParameterGroup({"p": p}, 0.1)], weight_decay=0.0)
    for G in gradients:
        p.grad = G.clone()
        optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor(W), rtol=1e-5, atol=1e-6)
    assert sum(t.numel() for t in optimizer.state[p].values()) == 3 + 5 + (15 if momentum else 0)


@pytest.mark.parametrize("shape", [(6,), ()])
def test_a_vector_has_the_sum_of_its_squares(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.zeros(shape))
    q = nn.Parameter(torch.zeros(shape))
    optimizer = Sm3(Sm3Config(momentum=0.0)).make([ParameterGroup({"p": p}, 0.1)], weight_decay=0.0)
    adagrad = torch.optim.Adagrad([q], lr=0.1, eps=0.0)
    for _ in range(3):
        p.grad = torch.randn(shape)
        q.grad = p.grad.clone()
        optimizer.step()
        adagrad.step()
    torch.testing.assert_close(p, q)
