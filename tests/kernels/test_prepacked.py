"""Products with prepacked weights, against plain ones in float64."""

import pytest
import torch
from torch import nn

from graftlm.kernels.linear import low_rank_linear
from graftlm.kernels.prepacked import PrepackedProduct, _Panels, can_prepack


def layer(dtype: torch.dtype, *, bias: bool, d_in: int = 48, d_out: int = 80) -> nn.Linear:
    torch.manual_seed(0)
    made = nn.Linear(d_in, d_out, bias=bias).to(dtype).requires_grad_(False)
    if not can_prepack(made):
        pytest.skip(f"oneDNN has no products in {dtype} here")
    return made


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("shape", [(1, 1, 48), (1, 5, 48), (300, 48)])
def test_the_product_is_that_of_the_layer(
    bias: bool, dtype: torch.dtype, tolerance: float, shape: tuple[int, ...]
) -> None:
    plain = layer(dtype, bias=bias)
    x = torch.randn(shape).to(dtype)
    wanted = torch.nn.functional.linear(x.double(), plain.weight.double(), plain.bias.double() if bias else None)
    found = PrepackedProduct(plain.weight, plain.bias)(x)
    assert found.dtype == dtype
    assert float((found.double() - wanted).abs().max() / wanted.abs().max()) < tolerance


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("rows", [*range(1, 10), 12, 13, 17, 70])
@pytest.mark.parametrize(("d_in", "d_out"), [(6, 48), (34, 97), (7, 16), (2500, 50), (1024, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_shapes(dtype: torch.dtype, d_in: int, d_out: int, rows: int, added: bool) -> None:
    """Within the bound for sums in any order, n u sum |x| |w| (Higham 2002, 3.1), and a rounding to the dtype."""
    plain = layer(dtype, bias=True, d_in=d_in, d_out=d_out)
    x, more = torch.randn(rows, d_in).to(dtype), torch.randn(rows, d_out).to(dtype)
    product = PrepackedProduct(plain.weight, plain.bias)
    found = product.plus(x, more.clone()) if added else product(x)
    wanted = torch.nn.functional.linear(x.double(), plain.weight.double(), plain.bias.double())
    wanted = wanted + more.double() if added else wanted
    sizes = x.double().abs() @ plain.weight.double().abs().T + plain.bias.double().abs() + more.double().abs()
    rounding = wanted.abs() * torch.finfo(dtype).eps / 2
    bound = (d_in + 2) * 2**-24 * sizes + (1.01 * rounding if dtype == torch.bfloat16 else 0)
    assert bool(((found.double() - wanted).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_in_every_batch_and_on_every_number_of_threads(dtype: torch.dtype) -> None:
    plain = layer(dtype, bias=True, d_in=2100, d_out=200)
    product = PrepackedProduct(plain.weight, plain.bias)
    if not isinstance(product.layout, _Panels):
        pytest.skip("oneDNN chooses an order of additions for every shape")
    x = torch.randn(37, 2100).to(dtype)
    whole, threads = product(x), torch.get_num_threads()
    try:
        for count, size in ((1, 1), (2, 5), (1, 8), (2, 30)):
            torch.set_num_threads(count)
            assert torch.equal(torch.cat([product(part) for part in x.split(size)]), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_of_the_weights_width_or_dtype_is_refused_and_never_read_as_if_it_were(dtype: torch.dtype) -> None:
    plain = layer(dtype, bias=True)
    product = PrepackedProduct(plain.weight, plain.bias)
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    with pytest.raises(RuntimeError):
        product(torch.randn(3, 32).to(dtype))
    with pytest.raises(RuntimeError):
        product(torch.randn(3, 48).to(other))
    assert product(torch.randn(0, 48).to(dtype)).shape == (0, 80)


def test_a_bias_and_an_addend_may_have_another_dtype() -> None:
    plain = layer(torch.bfloat16, bias=False)
    x, bias, more = torch.randn(5, 48).bfloat16(), torch.randn(80), torch.randn(5, 80)
    product = PrepackedProduct(plain.weight, bias)
    if not isinstance(product.layout, _Panels):
        pytest.skip("oneDNN refuses them")
    wanted = x.double() @ plain.weight.double().T + bias.double() + more.double()
    assert float((product.plus(x, more).double() - wanted).abs().max() / wanted.abs().max()) < 8e-3


def test_rows_that_do_not_lie_together_and_an_addend_of_one_row() -> None:
    plain = layer(torch.float32, bias=False)
    product = PrepackedProduct(plain.weight, None)
    x, more = torch.randn(48, 6).T, torch.randn(80)
    wanted = x.double() @ plain.weight.double().T + more.double()
    assert torch.allclose(product.plus(x, more.expand(6, 80)).double(), wanted, atol=1e-5)


@pytest.mark.parametrize("gain", [False, True])
def test_what_a_young_delta_adds_survives_the_rounding_of_bfloat16(gain: bool) -> None:
    """The sum is rounded once, as in training: added to what was rounded already, most of a small change is lost."""
    plain = layer(torch.bfloat16, bias=True)
    x = torch.randn(64, 48).bfloat16()
    A, B = torch.randn(4, 48), 1e-3 * torch.randn(80, 4)
    g = 1 + 0.1 * torch.randn(80) if gain else None
    product = PrepackedProduct(plain.weight, plain.bias)
    found = product.low_rank(x, plain.weight, plain.bias, A, B, g)
    trained = low_rank_linear(x, plain.weight, plain.bias, A, B, g)
    W, factors = plain.weight.double(), B.double() @ A.double()
    scale = 1 if g is None else g.double()
    exact, without = (scale * (x.double() @ M.T) + plain.bias.double() for M in (W + factors, W))

    def error(y: torch.Tensor) -> float:
        return float((y.double() - exact).norm() / exact.norm())

    assert error(found) < 1.1 * error(trained)
    changed = found.double() - product.low_rank(x, plain.weight, plain.bias, A, 0 * B, g).double()
    wanted = exact - without
    assert float((changed * wanted).sum() / (wanted * wanted).sum()) == pytest.approx(1, abs=0.1)


def test_a_weight_that_changed_is_known_to_be_stale() -> None:
    plain = layer(torch.float32, bias=False)
    product = PrepackedProduct(plain.weight, None)
    assert not product.is_stale
    plain.weight.add_(1)
    assert product.is_stale


def test_subclasses_and_layers_with_a_forward_of_their_own_are_left_alone() -> None:
    class Other(nn.Linear):
        pass

    changed = nn.Linear(16, 16)
    changed.forward = lambda x: 2 * x  # type: ignore[method-assign]
    assert not can_prepack(Other(16, 16))
    assert not can_prepack(changed)
    assert not can_prepack(nn.Linear(16, 16).double())
