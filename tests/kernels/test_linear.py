"""Frozen and low-rank layers, gates and norms against the plain equations in their docstrings, gradients included."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from graftlm.kernels import linear
from graftlm.kernels.linear import low_rank_linear, rms_norm, silu_gate
from tests.kernels.equations import assert_small_increments_stay, normal, same
from tests.peers import relative_error


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (2, 5), (2, 3, 4), ()])
def test_low_rank_linear_is_its_equation(shape: tuple[int, ...], bias: bool) -> None:
    W, b = normal(10, 6, seed=0), normal(10, seed=1) if bias else None
    x, A, B = normal(*shape, 6, seed=2), normal(3, 6, seed=3), normal(10, 3, seed=4)
    same(
        lambda x, A, B: low_rank_linear(x, W, b, A, B),
        lambda x, A, B: F.linear(x, W, b) + x @ A.T @ B.T,
        [x, A, B],
    )


def test_low_rank_linear_takes_a_transposed_weight_and_rows_that_are_not_contiguous() -> None:
    W, A, B = normal(6, 10, seed=0).T, normal(3, 6, seed=3), normal(10, 3, seed=4)
    same(
        lambda x, A, B: low_rank_linear(x.transpose(0, 1), W, None, A, B),
        lambda x, A, B: x.transpose(0, 1) @ W.T + x.transpose(0, 1) @ A.T @ B.T,
        [normal(4, 5, 6, seed=2), A, B],
    )


def test_low_rank_linear_of_the_first_layer_needs_no_gradient_of_x() -> None:
    x, W = normal(5, 6, seed=2), normal(10, 6, seed=0)
    same(
        lambda A, B: low_rank_linear(x, W, None, A, B),
        lambda A, B: x @ W.T + x @ A.T @ B.T,
        [normal(3, 6, seed=3), normal(10, 3, seed=4)],
    )
    assert x.grad is None


def test_low_rank_linear_keeps_x_only_where_A_learns() -> None:
    W, A, B = normal(10, 6, seed=0), normal(3, 6, seed=3), normal(10, 3, seed=4)
    same(
        lambda x, B: low_rank_linear(x, W, None, A, B),
        lambda x, B: x @ W.T + x @ A.T @ B.T,
        [normal(5, 6, seed=2), B],
    )
    for learns in (True, False):
        y = low_rank_linear(normal(5, 6, seed=2), W, None, A.requires_grad_(learns), B.requires_grad_())
        node = y.grad_fn.next_functions[0][0] if not hasattr(y.grad_fn, "saved_tensors") else y.grad_fn
        assert any(t is not None and t.shape == (5, 6) for t in node.saved_tensors) is learns


def test_low_rank_linear_gives_no_gradient_to_the_frozen_weight_and_changes_no_argument() -> None:
    arguments = [
        normal(5, 6, seed=2),
        normal(10, 6, seed=0),
        normal(10, seed=1),
        normal(3, 6, seed=3),
        normal(10, 3, seed=4),
    ]
    before = [t.clone() for t in arguments]
    for number in (0, 3, 4):
        arguments[number].requires_grad_()
    low_rank_linear(*arguments).sum().backward()
    assert all(torch.equal(a.detach(), b) for a, b in zip(arguments, before, strict=True))
    assert arguments[1].grad is None
    assert arguments[2].grad is None


FROZEN = normal(10, 6, seed=0), normal(10, seed=1)


def with_gain(x: Tensor, A: Tensor, B: Tensor, gain: Tensor) -> Tensor:
    return low_rank_linear(x, *FROZEN, A, B, gain)


def plainly_with_gain(x: Tensor, A: Tensor, B: Tensor, gain: Tensor) -> Tensor:
    W, b = FROZEN
    return gain * (x @ W.T + x @ A.T @ B.T) + b


ARGUMENTS = [(4, 6), (3, 6), (10, 3), (10,)]


def test_low_rank_linear_is_the_same_when_it_is_computed_again_for_the_backward_pass() -> None:
    same(
        lambda *args: checkpoint(with_gain, *args, use_reentrant=False),
        plainly_with_gain,
        [normal(*shape, seed=n + 2) for n, shape in enumerate(ARGUMENTS)],
    )


def test_low_rank_linear_is_the_same_when_it_is_compiled() -> None:
    same(
        torch.compile(with_gain, backend="aot_eager", fullgraph=True),
        plainly_with_gain,
        [normal(*shape, seed=n + 2) for n, shape in enumerate(ARGUMENTS)],
    )


def test_low_rank_linear_under_autocast_has_the_dtype_asked_for_and_float32_gradients() -> None:
    inputs = [normal(*shape, seed=n + 2).requires_grad_() for n, shape in enumerate(ARGUMENTS)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = with_gain(*inputs)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    found = [t.grad.clone() for t in inputs if t.grad is not None]
    plain = [t.detach().requires_grad_() for t in inputs]
    wanted = plainly_with_gain(*plain)
    wanted.sum().backward()
    assert relative_error(out.float(), wanted) <= 2**-6
    for ours, t in zip(found, plain, strict=True):
        assert ours.dtype == torch.float32
        assert t.grad is not None
        assert relative_error(ours, t.grad) <= 2**-5


def test_low_rank_linear_in_bf16_keeps_float32_gradients_for_the_factors() -> None:
    x, W = normal(50, 6, seed=2), normal(10, 6, seed=0)
    factors = [normal(3, 6, seed=3).requires_grad_(), normal(10, 3, seed=4).requires_grad_()]
    out = low_rank_linear(x.bfloat16(), W.bfloat16(), None, *factors)
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    A, B = (f.detach() for f in factors)
    # bf16 has 8 bits of mantissa: one part in 2**8 for each of the few roundings on the way
    assert relative_error(out.float(), x @ W.T + x @ A.T @ B.T) <= 2**-6
    for factor, wanted in zip(factors, (B.sum(0)[:, None] * x.sum(0), (x @ A.T).sum(0).expand(10, 3)), strict=True):
        assert factor.grad is not None
        assert factor.grad.dtype == torch.float32
        assert relative_error(factor.grad, wanted) <= 2**-5


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e3])
@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8), (1, 4, 3, 8)])
def test_rms_norm_is_its_equation(shape: tuple[int, ...], size: float) -> None:
    gain = normal(8, seed=1)
    same(
        lambda x: rms_norm(x, gain, 1e-6),
        lambda x: x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * gain,
        [size * normal(*shape, seed=0)],
    )


@pytest.mark.parametrize("at_once", [1, 40, 10_000])
@pytest.mark.parametrize("shape", [(3, 8), (2, 5, 8), (8,)])
def test_element_wise_work_in_pieces_is_its_equation(
    shape: tuple[int, ...], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "ELEMENTS_AT_ONCE", at_once)
    same(silu_gate, lambda gate, up: gate * gate.sigmoid() * up, [normal(*shape, seed=0), normal(*shape, seed=2)])


def test_rms_norm_of_zeros_is_zero_with_a_finite_gradient() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    rms_norm(x, torch.ones(8), 1e-6).sum().backward()
    assert x.grad is not None
    assert relative_error(x.grad, torch.full((2, 8), 1e3)) <= 1e-5  # 1 / sqrt(eps)


@pytest.mark.parametrize("gain", [None, torch.ones(512)])
def test_what_a_young_delta_adds_is_not_lost_beside_what_it_is_added_to(gain: Tensor | None) -> None:
    assert_small_increments_stay(lambda *arguments: low_rank_linear(*arguments, gain))
