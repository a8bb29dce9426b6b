"""GaLore against Adam on P^T G with P from a singular value decomposition, for both ways a matrix can lie."""

from typing import Any

import pytest
import torch
from torch import nn

from graftlm.optim.coap import Coap, CoapConfig
from graftlm.optim.galore import Galore, GaloreConfig
from graftlm.training.state import ParameterGroup
from tests.callbacks.tables import TABLE


def by_svd(W: torch.Tensor, gradients: list[torch.Tensor], r: int, every: int, scale: float, rate: float) -> None:
    """W is changed in place; torch.optim.Adam moves a tensor of the projected shape, and what it moved is put back."""
    wide = W.shape[0] <= W.shape[1]
    low = nn.Parameter(torch.zeros(r, W.shape[1]) if wide else torch.zeros(W.shape[0], r))
    adam = torch.optim.Adam([low], lr=rate)
    for step, G in enumerate(gradients):
        if step % every == 0:
            U, _, Vh = torch.linalg.svd(G, full_matrices=False)
        before = low.detach().clone()
        low.grad = U[:, :r].T @ G if wide else G @ Vh[:r].T
        adam.step()
        moved = low.detach() - before
        W += scale * (U[:, :r] @ moved if wide else moved @ Vh[:r])


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (16, 16)])
def test_its_steps_are_those_of_the_paper(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), [torch.randn(shape) for _ in range(6)]
    W = start.clone()
    by_svd(W, gradients, 4, 6, 0.25, 0.1)
    p = nn.Parameter(start.clone())
    optimizer = Galore(GaloreConfig(rank=4, every=6)).make([ParameterGroup({"p": p}, 0.1)], weight_decay=0.0)
    for G in gradients:
        p.grad = G.clone()
        optimizer.step()
    torch.testing.assert_close(p.detach(), W, rtol=1e-4, atol=1e-5)
    assert {tuple(t.shape) for t in optimizer.state[p].values() if torch.is_tensor(t)} == {
        (min(shape), 4),
        (4, max(shape)),
    }


def test_the_projection_is_taken_anew() -> None:
    """One after each step, so that what is kept of the moments is little: the paper's sign of P is open, so r = 1 and
    positive gradients, whose first singular vector is positive or negative as a whole."""
    torch.manual_seed(0)
    gradients = [torch.rand(6, 9) + 0.1 for _ in range(3)]
    p = nn.Parameter(torch.zeros(6, 9))
    optimizer = Galore(GaloreConfig(rank=1, every=1, scale=1.0)).make([ParameterGroup({"p": p}, 0.1)], weight_decay=0.0)
    for G in gradients:
        p.grad = G.clone()
        optimizer.step()
        u = torch.linalg.svd(G)[0][:, 0]
        torch.testing.assert_close(optimizer.state[p]["P"][:, 0].abs(), u.abs(), rtol=1e-4, atol=1e-5)


def test_what_is_small_keeps_adam() -> None:
    torch.manual_seed(0)
    p, q = nn.Parameter(torch.randn(3, 20)), nn.Parameter(torch.randn(7))
    same = [nn.Parameter(t.detach().clone()) for t in (p, q)]
    optimizer = Galore(GaloreConfig(rank=3)).make([ParameterGroup({"p": p, "q": q}, 0.1)], weight_decay=0.1)
    adam = torch.optim.AdamW(same, lr=0.1, weight_decay=0.1)
    for _ in range(3):
        for ours, theirs in zip((p, q), same, strict=True):
            ours.grad = torch.randn(ours.shape)
            theirs.grad = ours.grad.clone()
        optimizer.step()
        adam.step()
    torch.testing.assert_close(p, same[0])
    torch.testing.assert_close(q, same[1])


def test_a_gradient_of_zero_gives_no_projection() -> None:
    p = nn.Parameter(torch.ones(5, 8))
    optimizer = Galore(GaloreConfig(rank=2)).make([ParameterGroup({"p": p}, 0.1)], weight_decay=0.0)
    p.grad = torch.zeros(5, 8)
    optimizer.step()
    assert not optimizer.state[p]
    assert torch.equal(p.detach(), torch.ones(5, 8))


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
@pytest.mark.parametrize("callback", [GaloreConfig(rank=4, every=2), CoapConfig(rank=4, every=2, factor=2)])
def test_the_signs_of_singular_vectors_do_not_matter(
    callback: Any, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another library of linear algebra gives other signs: here at random, over several new P."""
    found = []
    for seed in (None, 1, 2):
        signs = torch.Generator().manual_seed(seed or 0)

        def flipped(P: torch.Tensor, seed: int | None = seed, signs: torch.Generator = signs) -> torch.Tensor:
            random = torch.randint(2, (P.shape[1],), generator=signs) * 2.0 - 1
            return P if seed is None else P * random.to(P)

        made = TABLE[callback.name].callback(callback)
        renew = made.renew

        def renewed(state: dict[str, Any], G: torch.Tensor, renew: Any = renew, flipped: Any = flipped) -> None:
            before = state.get("P")
            renew(state, G)
            if before is None or state["P"] is not before:
                state["P"] = flipped(state["P"])

        monkeypatch.setattr(made, "renew", renewed)
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(shape, dtype=torch.float64))
        optimizer = made.make([ParameterGroup({"p": p}, 0.1)], weight_decay=0.0)
        common = torch.randn(shape, dtype=torch.float64)  # gradients that have something to do with each other
        for _ in range(7):
            p.grad = common + 0.3 * torch.randn(shape, dtype=torch.float64)
            optimizer.step()
        found.append(p.detach().clone())
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-9)


def test_by_default_projected_matrices_have_the_rate_of_the_method() -> None:
    callback = Galore(GaloreConfig(scale=0.25))
    assert callback.default_rate(1e-3) * 0.25 == pytest.approx(1e-3)
    assert Coap(CoapConfig()).default_rate(1e-3) == pytest.approx(1e-3)
