"""Flora's momentum against the same with its directions as plain matrices, and against a momentum of full size."""

import pytest
import torch
from torch import nn

from graftlm.optim.flora_compression import FloraCompression, FloraCompressionConfig, FloraOptimizer
from graftlm.training.state import ParameterGroup


def optimizer_of(p: nn.Parameter, **options: object) -> FloraOptimizer:
    callback = FloraCompression(FloraCompressionConfig(**options))  # type: ignore[arg-type]
    made = callback.make([ParameterGroup({"p": p}, 0.1)], weight_decay=0.0)
    assert isinstance(made, FloraOptimizer)
    return made


def scaled(gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    """Adafactor's: each divided by the root of its factored second moment."""
    row, column, found = 0, 0, []
    for t, G in enumerate(gradients, start=1):
        b = 1 - t**-0.8
        row = b * row + (1 - b) * (G**2 + 1e-30).mean(dim=1, keepdim=True)
        column = b * column + (1 - b) * (G**2 + 1e-30).mean(dim=0, keepdim=True)
        found.append(G / (row @ column / row.mean()).sqrt())
    return found


def cut(U: torch.Tensor) -> torch.Tensor:
    return U / max(1.0, float((U**2).mean()) ** 0.5)


@pytest.mark.parametrize("shape", [(10, 24), (24, 10)])
def test_its_steps_are_those_of_the_paper(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), [torch.randn(shape) for _ in range(7)]
    p = nn.Parameter(start.clone())
    optimizer = optimizer_of(p, rank=4, every=3)
    A = [optimizer.directions("p", period, 10) for period in range(3)]
    assert all(tuple(a.shape) == (4, 10) for a in A)
    assert not torch.equal(A[0], A[1])

    W, wide = start.clone(), shape[0] < shape[1]
    C = torch.zeros(4, 24)
    for step, N in enumerate(scaled(gradients)):
        now = A[step // 3]
        before = A[max(0, step - 1) // 3]
        N = N if wide else N.T
        U = 0.1 * N + 0.9 * before.T @ C
        if step in (3, 6):
            C = now @ before.T @ C
        C = 0.9 * C + 0.1 * now @ N
        W -= 0.1 * cut(U if wide else U.T)
    for G in gradients:
        p.grad = G.clone()
        optimizer.step()
    torch.testing.assert_close(p.detach(), W, rtol=1e-4, atol=1e-5)


def test_in_the_mean_it_is_a_momentum_of_full_size() -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(10, 24) for _ in range(2)]
    one, two = scaled(gradients)
    wanted = 0.1 * two + 0.9 * 0.1 * one  # what step 2 adds before it is cut
    total, count = torch.zeros(10, 24), 3000
    p = nn.Parameter(torch.zeros(10, 24))
    for seed in range(count):
        optimizer = optimizer_of(p, rank=4, every=1000)
        optimizer.seed = seed
        A = optimizer.directions("p", 0, 10)
        total += 0.1 * two + 0.9 * A.T @ (0.1 * A @ one)
    error = (total / count - wanted).norm() / (0.09 * one).norm()
    assert float(error) < 5 * ((10 + 1) / 4 / count) ** 0.5


def test_what_is_small_has_a_momentum_of_full_size() -> None:
    p = nn.Parameter(torch.zeros(3, 20))
    optimizer = optimizer_of(p, rank=3)
    gradients = [torch.randn(3, 20) for _ in range(3)]
    M, W = torch.zeros(3, 20), torch.zeros(3, 20)
    for G, N in zip(gradients, scaled(gradients), strict=True):
        M = 0.9 * M + 0.1 * N
        W -= 0.1 * cut(M)
        p.grad = G.clone()
        optimizer.step()
    torch.testing.assert_close(p.detach(), W, rtol=1e-4, atol=1e-6)
