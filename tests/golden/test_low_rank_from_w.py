"""Methods that are made of W's own parts or of random ones, against their equations written out in another way.

None of them is in PEFT 0.21.2. Each reference multiplies the tensors in the order of the paper's equation, with full
matrices or loops; that the frozen tensors are what the paper says is asked of them apart from that.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from graftlm.deltas.eigenlorax import principal_directions
from graftlm.deltas.intrinsic import Intrinsic
from graftlm.deltas.linalg import orthonormal, pivots, top_singular, top_singular_fast
from graftlm.model.registry import hosts, shared_of
from graftlm.testing.deltas import attach_tiny, close
from graftlm.testing.tiny import tiny_gpt2, tiny_model
from tests.errors import raises
from tests.golden.check import Reference, against_reference

SCALE = 6 / 4  # alpha / r of the small configs


def one_hot(x: Tensor, W: Tensor) -> Tensor:
    return x if x.is_floating_point() else torch.eye(W.shape[1], dtype=W.dtype)[x]


def plus(y: Tensor, b: Tensor | None) -> Tensor:
    return y if b is None else y + b


def lora_mini(t: Any, W: Tensor, b: Tensor | None, x: Tensor, d: Any) -> Tensor:
    x = one_hot(x, W)
    inner = x @ t["A_aux"].T @ t["A_train"].T
    return plus(x @ W.T + SCALE * (inner @ t["B_train"].T @ t["B_aux"].T), b)


def nola(t: Any, W: Tensor, b: Tensor | None, x: Tensor, d: Any) -> Tensor:
    d_out, d_in = W.shape
    A, B = W.new_zeros(4, d_in), W.new_zeros(d_out, 4)
    for i in range(6):
        A = A + t["a"][i] * t["shared.A"][i, :d_in].T
        B = B + t["b"][i] * t["shared.B"][i, :d_out]
    return plus(one_hot(x, W) @ (W + SCALE * (B @ A)).T, b)


def loldu(t: Any, W: Tensor, b: Tensor | None, x: Tensor, d: Any) -> Tensor:
    residual = W - SCALE * t["PL"] @ torch.diag(t["D"]) @ t["U"]
    s = t.get("s", SCALE)
    return plus(one_hot(x, W) @ (residual + s * t["PL"] @ torch.diag(t["D"] + t["dz"]) @ t["U"]).T, b)


def nora(t: Any, W: Tensor, b: Tensor | None, x: Tensor, d: Any) -> Tensor:
    values = torch.stack([u @ W @ v for u, v in zip(t["B_outer"].T, t["A_outer"], strict=True)]).detach()
    left, right = torch.diag(values[:3].sqrt()), torch.eye(3, 4, dtype=W.dtype)
    residual = W - t["B_outer"] @ right.T @ left @ left @ right @ t["A_outer"]
    x = one_hot(x, W)
    outer = x @ t["A_outer"].T
    return plus(x @ residual.T + outer @ t["A_inner"].T @ t["B_inner"].T @ t["B_outer"].T, b)


def pmss(t: Any, W: Tensor, b: Tensor | None, x: Tensor, d: Any) -> Tensor:
    return plus(one_hot(x, W) @ (W + torch.einsum("oi,ij,jk->ok", t["C"], t["U"], t["R"])).T, b)


def melora(t: Any, W: Tensor, b: Tensor | None, x: Tensor, d: Any) -> Tensor:
    parts = []
    for A, B, part in zip(t["A"], t["B"], x.chunk(4, dim=-1), strict=True):
        parts.append(SCALE * (B @ (A @ part.T)).T)
    return plus(x @ W.T + torch.cat(parts, dim=-1), b)


def lamda(t: Any, W: Tensor, b: Tensor | None, x: Tensor, d: Any) -> Tensor:
    x = one_hot(x, W)
    inner = x @ t["PMA"].T
    residual = W - SCALE * (t["start_B"] @ t["PMA"])
    return plus(x @ residual.T + SCALE * (inner @ t["S"].T @ t["PMB"].T), b)


def eigenlorax(t: Any, W: Tensor, b: Tensor | None, x: Tensor, d: Any) -> Tensor:
    x = one_hot(x, W)
    return plus(x @ W.T + x @ t["V_A"].T @ t["a_A"].T @ t["a_B"].T @ t["V_B"].T, b)


def rows_of_P(delta: Intrinsic, total: int) -> Tensor:
    """The rows of P [d_out * d_in, d] that belong to a site."""
    d_out, d_in, d = delta.site.d_out, delta.site.d_in, 50
    P = torch.zeros(d_out * d_in, d, dtype=torch.float64)
    for i in range(d_out):
        for j in range(d_in):
            place = (int(delta.g[i]) + int(delta.h[j])) % d
            P[i * d_in + j, place] = float(delta.s[i]) * float(delta.t[j]) * (d / total) ** 0.5
    return P


def intrinsic(t: Any, W: Tensor, b: Tensor | None, x: Tensor, d: Any) -> Tensor:
    total = round(50 / d.site.shared.c**2)
    return plus(x @ (W + (rows_of_P(d, total) @ t["shared.theta"]).view_as(W)).T, b)


REFERENCES: dict[str, Reference] = {
    "lora-mini": lora_mini,
    "nola": nola,
    "loldu": loldu,
    "nora": nora,
    "pmss": pmss,
    "melora": melora,
    "lamda": lamda,
    "eigenlorax": eigenlorax,
    "intrinsic": intrinsic,
}


@pytest.mark.parametrize("name", REFERENCES)
def test_against_its_equation(name: str) -> None:
    against_reference(name, REFERENCES[name])


@pytest.mark.parametrize("name", sorted(REFERENCES.keys() - {"intrinsic"}))
def test_on_gpt2_whose_weights_are_transposed_against_its_equation(name: str) -> None:
    against_reference(name, REFERENCES[name], base=tiny_gpt2)


@pytest.mark.parametrize("name", sorted(REFERENCES.keys() - {"melora", "intrinsic"}))
def test_on_embeddings_against_its_equation(name: str) -> None:
    against_reference(name, REFERENCES[name], targets=("embed_tokens",))


def test_loldu_with_a_scale_that_learns_too() -> None:
    against_reference("loldu", loldu, train_scale=True)


# What the frozen tensors are --------------------------------------------------------------------------------------


def deltas(name: str, **changes: Any) -> list[Any]:
    return [host.on()[0] for host in hosts(attach_tiny(name, tiny_model(), **changes)).values()]


def test_loldu_is_made_of_a_decomposition_of_w() -> None:
    for delta in deltas("loldu", r=100):
        k = min(delta.site.d_in, delta.site.d_out)
        assert delta.dz.shape == (k,), "no more than the diagonal has"
        close(delta.PL @ torch.diag(delta.D) @ delta.U, delta.site.W(), "P L D U is W")
        assert torch.equal(delta.U, delta.U.triu())
        close(delta.U.diagonal(), torch.ones(k), "diagonal of U")
        ones = delta.PL == 1
        order = torch.stack([ones[:, column].int().argmax() for column in range(k)])
        assert order.unique().numel() == k, "each column of P L has its one in a row of its own"
        assert torch.equal(delta.PL[order], delta.PL[order].tril()), "which a permutation puts on the diagonal"
        assert float(delta.PL.abs().max()) <= 1, "with pivots"


@pytest.mark.parametrize("name", ["nora", "lamda"])
def test_the_spectral_ones_hold_singular_vectors_of_w(name: str) -> None:
    for delta in deltas(name):
        U, V = (delta.B_outer, delta.A_outer) if name == "nora" else (delta.PMB, delta.PMA)
        close(U.T @ U, torch.eye(4), "columns of U")
        close(V @ V.T, torch.eye(4), "rows of V^T")
        W = delta.site.W()
        values = U.T @ W @ V.T
        close(values, torch.diag(values.diagonal()), "U^T W V is diagonal")
        exact = torch.linalg.svdvals(W)[:4]
        assert bool((values.diagonal() <= exact * (1 + 1e-5)).all())
        assert bool((values.diagonal() >= exact * 0.97).all()), "nearly the greatest, of a spectrum that is flat"
        if name == "lamda":
            close(delta.S, values, "the fresh S")
            close(delta.start_B, U @ values, "what is taken off W")
        else:
            close(delta.B_inner @ delta.A_inner, torch.diag(values.diagonal() * torch.tensor([1, 1, 1, 0])), "B' A'")


def test_the_rank_of_a_change_is_what_the_method_promises() -> None:
    ranks = {"lora-mini": 3, "nola": 4, "loldu": 4, "nora": 4, "pmss": 4, "melora": 16, "eigenlorax": 4}
    for name, rank in ranks.items():
        for delta in deltas(name):
            for parameter in delta.parameters():
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
            with torch.no_grad():
                assert int(torch.linalg.matrix_rank(delta.matrix())) == min(rank, delta.site.d_out, delta.site.d_in)


def test_pmss_takes_rows_and_columns_of_w() -> None:
    for delta in deltas("pmss"):
        W = delta.site.W()
        for mine, theirs in ((delta.C.T, W.T), (delta.R, W)):
            assert all((theirs == row).all(1).any() for row in mine)
            assert mine.unique(dim=0).shape == mine.shape


def test_melora_asks_for_slices_that_come_out_even() -> None:
    with raises("target/indivisible-layer", match="minis is 5, .* 32 inputs and 32 outputs of model"):
        attach_tiny("melora", tiny_model(), minis=5)


def test_nola_starts_as_large_as_lora() -> None:
    model = attach_tiny("nola", tiny_model(hidden_size=256, head_dim=64), targets=("down_proj", "up_proj"), bases=400)
    for host in hosts(model).values():
        (delta,) = host.on()
        A = delta.factors()[0].detach()
        assert abs(float(A.std()) * (3 * delta.site.d_in) ** 0.5 - 1) < 0.15


def test_intrinsic_keeps_lengths() -> None:
    """The columns of P, over all sites, are orthogonal and of length one on the average; |P theta| = |theta|."""
    model = attach_tiny("intrinsic", tiny_model())
    found = [host.on()[0] for host in hosts(model).values()]
    total = sum(delta.site.d_in * delta.site.d_out for delta in found)
    P = torch.cat([rows_of_P(delta, total) for delta in found])
    products = P.T @ P
    close(products, torch.diag(products.diagonal()), "columns of P")
    assert abs(float(products.diagonal().mean()) - 1) < 1e-5
    assert float(products.diagonal().std()) < 0.2
    shared: Any = shared_of(model, "default")
    with torch.no_grad():
        shared.theta.copy_(torch.randn(50, generator=torch.Generator().manual_seed(0)))
        moved = torch.cat([delta.matrix().flatten() for delta in found])
    assert abs(float(moved.norm() / shared.theta.detach().norm()) - 1) < 0.2


def test_principal_directions_are_those_of_the_covariance_and_then_random_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(3, 20, generator=generator)
    factors = [
        (torch.randn(4, 3, generator=generator) @ basis, torch.randn(30, 4, generator=generator)) for _ in range(5)
    ]
    V_A, V_B = principal_directions(factors, 6, generator)
    assert V_A.shape == (6, 20)
    assert V_B.shape == (30, 6)
    close(V_A @ V_A.T, torch.eye(6), "rows of V_A")
    close(V_B.T @ V_B, torch.eye(6), "columns of V_B")
    for columns, V in ((torch.cat([A for A, _ in factors]).T, V_A[:3].T), (torch.cat([B for _, B in factors], 1), V_B)):
        vectors = torch.linalg.eigh(columns.double().cov()).eigenvectors.flip(1)[:, : V.shape[1]]
        close((V.double() * vectors).sum(0).abs(), torch.ones(V.shape[1]), "cosines with the covariance's eigenvectors")
    close(factors[2][0] @ V_A.T @ V_A, factors[2][0], "an adapter of the subspace is found again")


def test_eigenlorax_takes_directions_of_other_adapters() -> None:
    (delta,) = deltas("eigenlorax", targets=("layers.0.mlp.up_proj",))
    generator = torch.Generator().manual_seed(1)
    A, B = torch.randn(4, 32, generator=generator), torch.randn(48, 4, generator=generator)
    for have, made in zip((delta.V_A, delta.V_B), principal_directions([(A, B)], 6, generator), strict=True):
        have.copy_(made)
    assert not delta.matrix().any(), "other directions leave the fresh delta the identity"


# The linear algebra -----------------------------------------------------------------------------------------------


def decaying(m: int, n: int, rate: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    U, V = (orthonormal(torch.randn(d, 20, generator=generator)) for d in (m, n))
    return (U * rate ** torch.arange(20)) @ V.T


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
def test_top_singular_exactly_and_fast(shape: tuple[int, int]) -> None:
    W = decaying(*shape, rate=0.7)
    U, S, Vh = top_singular(W, 5)
    close(S, 0.7 ** torch.arange(5), "singular values")
    close(W @ Vh.T, U * S, "W V = U S")
    fast = top_singular_fast(W, 5, torch.Generator().manual_seed(0), oversampling=5)
    for mine, wanted, what in zip(fast, (U, S, Vh), ("U", "S", "Vh"), strict=True):
        close(mine, wanted, f"{what} of the fast one")
    again = top_singular_fast(W, 5, torch.Generator().manual_seed(0), oversampling=5)
    assert all(torch.equal(a, b) for a, b in zip(fast, again, strict=True))


def test_signs_do_not_hang_on_a_rounding() -> None:
    U, _, Vh = top_singular(decaying(60, 40, rate=0.7), 5)
    for mine, wanted in zip(top_singular(decaying(60, 40, rate=0.7).bfloat16().float(), 5)[::2], (U, Vh), strict=True):
        close(mine, wanted, "vectors of a rounded matrix", tolerance=0.05)
    assert bool(((U > 0) * U.square()).sum(0).ge(0.5).all())


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_pivots_are_each_the_farthest_from_the_span_of_those_before(shape: tuple[int, int]) -> None:
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    chosen = pivots(W, 8).tolist()
    assert len(set(chosen)) == 8
    for step, column in enumerate(chosen):
        before = W[:, chosen[:step]]
        rest = W - before @ torch.linalg.pinv(before) @ W if step else W
        assert int(rest.norm(dim=0).argmax()) == column


def test_pivots_of_a_matrix_of_low_rank_are_still_different_columns() -> None:
    W = torch.outer(torch.arange(1.0, 6.0), torch.arange(1.0, 8.0))
    assert pivots(W, 5)[0] == 6
    assert len(set(pivots(W, 5).tolist())) == 5


def test_orthonormal_keeps_the_directions_of_columns_that_are_so_already() -> None:
    Q = orthonormal(torch.randn(10, 6, generator=torch.Generator().manual_seed(0)))
    close(Q.T @ Q, torch.eye(6), "columns")
    close(orthonormal(Q), Q, "a second time")
