"""Kin of LoRA that PEFT has not: each against its equation read another way, and the facts that its paper states."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from graftlm.config.schema import build
from graftlm.deltas import METHODS
from graftlm.model.attach import attach
from graftlm.model.hosts import LayerHost
from graftlm.model.modes import activate
from graftlm.model.registry import hosts, shared_of
from graftlm.testing.deltas import attach_tiny, close, ids, logits, move, perturbed, tiny_config
from graftlm.testing.tiny import tiny_gpt2, tiny_model
from tests.errors import raises
from tests.golden.check import against_reference

Tensors = Mapping[str, Tensor]
FREE = ("q_proj", "up_proj", "down_proj")
"""A square, a tall and a wide layer."""


def deltas(model: Any) -> dict[str, Any]:
    return {site: host.on()[0] for site, host in hosts(model).items() if isinstance(host, LayerHost)}


# Each against another reading of its equation --------------------------------------------------------------------


def dvora(t: Tensors, W: Tensor, b: Tensor | None, x: Tensor, delta: Any) -> Tensor:
    """Row by row of W'; the norm of each row is a number, not a function of b and d."""
    rows = []
    for i in range(delta.site.d_out):
        step = sum(
            t["V.b"][i] * t["shared.B"][i, k] * t["V.d"][k] * t["shared.A"][k, : delta.site.d_in]
            for k in range(len(t["V.d"]))
        )
        v = W[i] + step
        rows.append(t["m"][i] * v / float(v.detach().norm()))
    return x @ torch.stack(rows).T


def tied_lora(t: Tensors, W: Tensor, b: Tensor | None, x: Tensor, delta: Any) -> Tensor:
    shape = f"{delta.site.d_in}x{delta.site.d_out}"
    A, B = t[f"shared.A_{shape}"], t[f"shared.B_{shape}"]
    return x @ W.T + x @ (t["v"].diag() @ B @ t["u"].diag() @ A).T


def lora_xs(t: Tensors, W: Tensor, b: Tensor | None, x: Tensor, delta: Any) -> Tensor:
    """U_r S_r is W V_r: what W sends the rows of A to. That these are the right rows is tested below."""
    V = t["A"].T
    return x @ W.T + 6 / 4 * (x @ V) @ t["R"].T @ (W @ V).T


def moslora(t: Tensors, W: Tensor, b: Tensor | None, x: Tensor, delta: Any) -> Tensor:
    """Every subspace of A with every subspace of B: the sum over all pairs (i, j) of M_ij b_i a_j^T."""
    y = x @ W.T
    for i in range(4):
        for j in range(4):
            y = y + 6 / 4 * t["M"][i, j] * torch.outer(x @ t["A"][j], t["B"][:, i])
    return y


def nlora(t: Tensors, W: Tensor, b: Tensor | None, x: Tensor, delta: Any) -> Tensor:
    return x @ W.T + 6 / 4 * torch.einsum("ti,ki,lk,ol->to", x, t["A"], t["N"], t["B"])


def multilora(t: Tensors, W: Tensor, b: Tensor | None, x: Tensor, delta: Any) -> Tensor:
    y = x @ W.T
    for i, (A, B) in enumerate(zip(t["A"].split(4), t["B"].split(4, dim=1), strict=True)):
        y = y + t["s"][:, i] * (x @ A.T @ B.T)
    return y


def block_lora(t: Tensors, W: Tensor, b: Tensor | None, x: Tensor, delta: Any) -> Tensor:
    """A LoRA of rank r whose A has the one block over and over."""
    blocks = t["B"].shape[1] // len(t["A"])
    return x @ W.T + 6 / 4 * x @ (t["B"] @ torch.cat([t["A"]] * blocks)).T


def qa_lora(t: Tensors, W: Tensor, b: Tensor | None, x: Tensor, delta: Any) -> Tensor:
    """Algorithm 1 as it stands: the mean over a group by a pooling layer, times its size, then LoRA on what is left."""
    size = delta.config.group
    full = torch.nn.functional.pad(x, (0, -x.shape[1] % size))  # the last group may be shorter
    pooled = torch.nn.AvgPool1d(size)(full[:, None])[:, 0] * size
    return x @ W.T + 6 / 4 * (pooled @ t["A"].T) @ t["B"].T


REFERENCES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "dvora": ("dvora", dvora, {}),
    "tied-lora": ("tied-lora", tied_lora, {}),
    "tied-lora, TL5": ("tied-lora", tied_lora, {"train_u": False, "train_v": False}),
    "tied-lora, vectors alone": ("tied-lora", tied_lora, {"train_A": False, "train_B": False}),
    "lora-xs": ("lora-xs", lora_xs, {}),
    "moslora": ("moslora", moslora, {}),
    "moslora, orthogonal": ("moslora", moslora, {"mixer": "orthogonal"}),
    "nlora": ("nlora", nlora, {}),
    "nlora, intermediate": ("nlora", nlora, {"train": "intermediate"}),
    "multilora": ("multilora", multilora, {}),
    "multilora, one number a part": ("multilora", multilora, {"per_output": False, "parts": 2}),
    "block-lora": ("block-lora", block_lora, {}),
    "block-lora, four blocks": ("block-lora", block_lora, {"blocks": 4}),
    "qa-lora": ("qa-lora", qa_lora, {}),
    "qa-lora, even groups": ("qa-lora", qa_lora, {"group": 16}),
}


@pytest.mark.parametrize("case", REFERENCES)
@pytest.mark.parametrize("base", [tiny_model, tiny_gpt2])
def test_against_the_equation(case: str, base: Any) -> None:
    name, reference, changes = REFERENCES[case]

    def with_bias(t: Tensors, W: Tensor, b: Tensor | None, x: Tensor, delta: Any) -> Tensor:
        y: Tensor = reference(t, W, b, x, delta)
        return y if b is None else y + b

    against_reference(name, with_bias, base=base, **changes)


@pytest.mark.parametrize("name", ["tied-lora", "lora-xs", "moslora", "nlora", "multilora", "block-lora"])
def test_on_embeddings(name: str) -> None:
    """On one-hot rows, an embedding is a linear layer: the same reference."""
    reference = REFERENCES[name][1]

    def one_hot(t: Tensors, W: Tensor, b: Tensor | None, x: Tensor, delta: Any) -> Tensor:
        y: Tensor = reference(t, W, b, torch.nn.functional.one_hot(x, delta.site.d_in).double(), delta)
        return y

    against_reference(name, one_hot, targets=("embed_tokens",))


# What the papers state -------------------------------------------------------------------------------------------


def test_dvora_starts_at_the_norms_of_w_and_turns_the_direction_alone() -> None:
    model = attach_tiny("dvora", tiny_model(), targets=FREE)
    for delta in deltas(model).values():
        W = delta.site.W()
        assert torch.equal(delta.m, W.norm(dim=1))
        with torch.no_grad():
            delta.V.b.add_(0.3)
        changed, _ = delta.effective(W, None)
        assert not torch.allclose(changed, W)
        close(changed.norm(dim=1), delta.m, "||W'|| of each row is m, whatever b and d are")


def test_dvora_is_vera_with_m_that_follows_the_norm() -> None:
    """Where m is the norm of V, the two are the same function (and share the same projections)."""
    model = perturbed("vera", tiny_model(), targets=FREE)
    wanted = logits(model)
    attach(model, tiny_config("dvora", targets=FREE), name="second")
    shared = shared_of(model, "second")
    assert shared is not None
    shared.load_state_dict(shared_of(model, "default").state_dict())  # type: ignore[union-attr]
    for host in hosts(model).values():
        vera, second = (host.deltas[name] for name in ("default", "second"))
        with torch.no_grad():
            second.V.load_state_dict(vera.state_dict())
            second.m.copy_((vera.site.W() + vera.matrix()).norm(dim=1))
    activate(model, "second")
    close(logits(model), wanted, "dvora at the norm of V against vera")


def test_tied_lora_has_one_pair_for_each_shape_and_vectors_for_each_site() -> None:
    """Table 1, TL6: r (d_in + d_out) once, not for each layer, and r + d_out for each site."""
    model = attach_tiny("tied-lora", tiny_model(), targets=("q_proj",))
    found = deltas(model)
    assert len(found) == 2  # one in each layer
    shared = next(iter(found.values())).site.shared
    assert sum(p.numel() for p in shared.parameters()) == 4 * (32 + 32)
    assert [sum(p.numel() for p in delta.parameters()) for delta in found.values()] == [4 + 32] * 2
    for delta in found.values():
        assert bool((delta.u == 1).all())
        assert bool((delta.v == 1).all())
        assert not delta.factors()[1].any()
    move(model)
    first, second = (delta.matrix() for delta in found.values())
    assert not torch.equal(first, second), "u and v make them differ"


def test_tied_lora_with_the_same_vectors_is_the_same_in_every_layer() -> None:
    """TL5: no vectors are trained, all sites of a shape have one dW."""
    model = perturbed("tied-lora", tiny_model(), targets=("q_proj", "o_proj"), train_u=False, train_v=False)
    first, *others = (delta.matrix() for delta in deltas(model).values())
    assert len(others) == 3
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize(
    ("trained", "zero"), [("ABuv", "B"), ("AB", "B"), ("uv", "v"), ("Av", "v"), ("Au", "u"), ("A", "A"), ("B", "B")]
)
def test_tied_lora_starts_at_the_base_and_learns_whatever_is_trained(trained: str, zero: str) -> None:
    flags = {f"train_{name}": name in trained for name in "ABuv"}
    model = tiny_model()
    before = logits(model)
    attach_tiny("tied-lora", model, **flags)
    close(logits(model), before, f"training {trained}")
    delta = next(iter(deltas(model).values()))
    tensors = {"u": delta.u, "v": delta.v} | {
        name: getattr(delta.site.shared, f"{name}_{delta.site.d_in}x{delta.site.d_out}") for name in "AB"
    }
    assert {name for name, tensor in tensors.items() if not tensor.any()} == {zero}
    assert {name for name, tensor in tensors.items() if tensor.requires_grad} == set(trained)
    model(ids()).logits.square().sum().backward()
    assert bool(tensors[zero].grad.any()), "the tensor at zero has a gradient, so all the others will"


def test_tied_lora_that_trains_nothing_is_refused() -> None:
    tree = {f"train_{name}": False for name in "ABuv"}
    with raises("recipe/invalid-value", match="none of A, B, u, v is trained"):
        build(METHODS["tied-lora"].config, tree, source="recipe.yaml")


def top_eigenvectors(S: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """(values [r], vectors [n, r]) of a symmetric S, greatest first, in double precision."""
    values, vectors = torch.linalg.eigh(S.double())
    return values[-r:].flip(0).float(), vectors[:, -r:].flip(1).float()


def test_lora_xs_keeps_the_four_greatest_singular_values_of_w() -> None:
    """Found here from W W^T, with no singular value decomposition; r^2 parameters at any width."""
    model = attach_tiny("lora-xs", tiny_model(), targets=FREE)
    for site, delta in deltas(model).items():
        W = delta.site.W()
        squares, U = top_eigenvectors(W.double() @ W.double().T, 4)
        close(delta.B @ delta.A, U @ U.T @ W, f"{site}: the projection of W on its principal columns")
        close(delta.B.T @ delta.B, squares.diag(), f"{site}: the columns of B are orthogonal, as long as S")
        close(delta.A @ delta.A.T, torch.eye(4), f"{site}: the rows of A are orthonormal")
        assert {name: list(p.shape) for name, p in delta.named_parameters()} == {"R": [4, 4]}
        assert not delta.R.any()


def test_lora_xs_with_power_iterations_finds_the_same_subspace() -> None:
    """What the authors' code computes; random weights have no gap, so that it needs more rounds than theirs."""
    model = attach_tiny("lora-xs", tiny_model(), targets=FREE, power_iterations=40)
    for site, delta in deltas(model).items():
        W = delta.site.W()
        _, V = top_eigenvectors(W.T @ W, 4)
        close(delta.A.T @ delta.A, V @ V.T, f"{site}: the projector on the rows of A")
        close(delta.B, W @ delta.A.T, f"{site}: B is W V_r")


def test_lora_xs_draws_the_fresh_r_as_in_the_paper() -> None:
    model = attach_tiny("lora-xs", tiny_model(), r=16, deviation=1e-5)
    drawn = torch.cat([delta.R.detach().flatten() for delta in deltas(model).values()])
    assert 0.9e-5 < float(drawn.std()) < 1.1e-5


def test_lora_xs_takes_no_more_singular_values_than_there_are() -> None:
    model = attach_tiny("lora-xs", tiny_model(), targets=("k_proj", "q_proj"), r=64)
    for delta in deltas(model).values():
        assert list(delta.R.shape) == [delta.site.d_out] * 2
        close(delta.B @ delta.A, delta.site.W(), "all of W")


def test_moslora_with_the_mixer_at_one_is_lora() -> None:
    model = perturbed("moslora", tiny_model(), targets=FREE)
    plain = attach_tiny("lora", tiny_model(), targets=FREE)
    for mixed, delta in zip(deltas(model).values(), deltas(plain).values(), strict=True):
        with torch.no_grad():
            mixed.M.copy_(torch.eye(4))
            delta.A.copy_(mixed.A)
            delta.B.copy_(mixed.B)
    close(logits(model), logits(plain), "moslora with M = 1 against lora")


def test_moslora_starts_as_the_paper_says() -> None:
    """B at zero; A and M uniform up to 1 / sqrt(columns), or M orthogonal."""
    for delta in deltas(attach_tiny("moslora", tiny_model(), r=16)).values():
        assert not delta.B.any()
        for tensor, bound in ((delta.A, delta.site.d_in**-0.5), (delta.M, 0.25)):
            assert 0.9 * bound < float(tensor.detach().abs().max()) <= bound
    for delta in deltas(attach_tiny("moslora", tiny_model(), r=16, mixer="orthogonal")).values():
        close(delta.M @ delta.M.T, torch.eye(16), "an orthogonal mixer")


def test_inttune_trains_the_intermediate_matrix_between_rows_and_columns_of_w() -> None:
    model = attach_tiny("nlora", tiny_model(), targets=FREE, train="intermediate")
    for delta in deltas(model).values():
        W = delta.site.W()
        assert torch.equal(delta.A, W[:4])
        assert torch.equal(delta.B, W[:, :4])
        assert {name: list(p.shape) for name, p in delta.named_parameters()} == {"N": [4, 4]}
        assert not delta.N.any()


def test_inttune_from_zero_is_inttune_from_nystrom_less_where_it_started() -> None:
    """The paper's parameters (N from N0, B N0 A taken out of W) and ours (N from 0): one function, one gradient."""
    model = perturbed("nlora", tiny_model(), targets=FREE, train="intermediate")
    for delta in deltas(model).values():
        W, s = delta.site.W(), 6 / 4
        N0 = torch.linalg.pinv(W[:4, :4].double())
        B, A = W[:, :4].double(), W[:4].double()
        N = (N0 + delta.N.detach().double()).requires_grad_()
        theirs = W.double() - s * B @ N0 @ A + s * B @ N @ A
        close((W + delta.matrix()).double(), theirs, "W'")
        direction = torch.linspace(-1, 1, W.numel()).view_as(W)
        (ours,) = torch.autograd.grad((delta.matrix() * direction).sum(), delta.N)
        (wanted,) = torch.autograd.grad((theirs * direction).sum(), N)
        close(ours.double(), wanted, "gradient of N")


def test_nlora_starts_as_structured_lora() -> None:
    for delta in deltas(attach_tiny("nlora", tiny_model(), r=16)).values():
        assert not delta.B.any()
        assert 0.9 * 0.25 < float(delta.N.detach().abs().max()) <= 0.25


def test_multilora_is_the_sum_of_its_parts_and_starts_with_none_of_them_at_zero() -> None:
    model = attach_tiny("multilora", tiny_model(), targets=FREE)
    for delta in deltas(model).values():
        assert not delta.s.any()
        for tensor, bound in ((delta.A, delta.site.d_in**-0.5), (delta.B, 0.5)):  # 1 / sqrt(4)
            assert 0.9 * bound < float(tensor.detach().abs().max()) <= bound
    move(model)
    for delta in deltas(model).values():
        assert int(torch.linalg.matrix_rank(delta.matrix())) == 3 * 4


def test_block_lora_is_a_lora_of_a_rank_n_times_smaller_whose_b_steps_n_times_as_far() -> None:
    model = perturbed("block-lora", tiny_model(), targets=FREE, r=8, blocks=4)
    for delta in deltas(model).values():
        assert int(torch.linalg.matrix_rank(delta.matrix())) == 2
        assert sum(p.numel() for p in delta.parameters()) == 2 * delta.site.d_in + 8 * delta.site.d_out
    model(ids()).logits.square().sum().backward()
    for delta in deltas(model).values():
        first, *others = delta.B.grad.split(2, dim=1)
        assert all(torch.equal(first, other) for other in others)


def test_blocks_that_do_not_divide_the_rank_are_refused() -> None:
    with raises("recipe/invalid-value", match="make it a multiple"):
        build(METHODS["block-lora"].config, {"r": 5, "blocks": 2}, source="recipe.yaml")
