"""The noise scale: against its definition, on gradients whose mean and covariance are known."""

import pytest
import torch

from graftlm.planning.noise_scale import NoiseScale, batch_for


def gradients(count: int, rows: int, size: int, *, true: float, noise: float) -> list[torch.Tensor]:
    """Means over `rows` rows each, of which one has gradient `true` and a standard deviation `noise` everywhere."""
    generator = torch.Generator().manual_seed(5)
    drawn = torch.randn(count, rows, size, generator=generator, dtype=torch.float64)
    return list((true + noise * drawn).mean(1))


@pytest.mark.parametrize(("rows", "count"), [(1, 64), (4, 32), (16, 32)])
def test_the_scale_is_the_ratio_of_variance_and_squared_gradient(rows: int, count: int) -> None:
    noise = NoiseScale()
    for gradient in gradients(count, rows, 4000, true=0.1, noise=0.5):
        noise.add((gradient[:1000].view(10, 100), gradient[1000:]), rows)
    found = noise.found()
    assert found["noise_rows"] == pytest.approx(0.5**2 / 0.1**2, rel=0.1), "tr(S) / |G|^2, size cancels"
    assert (found["gradients"], found["rows"]) == (count, rows * count)
    assert batch_for(found) in (16, 32)


def test_it_is_the_formula_of_the_paper_for_a_small_and_a_large_batch() -> None:
    few = gradients(8, 2, 50, true=0.3, noise=0.4)
    noise = NoiseScale()
    for gradient in few:
        noise.add([gradient], 2)
    small = sum(float(g @ g) for g in few) / 8
    large = torch.stack(few).mean(0)
    big = float(large @ large)
    true = (16 * big - 2 * small) / (16 - 2)
    trace = (small - big) / (1 / 2 - 1 / 16)
    assert noise.found()["noise_rows"] == pytest.approx(trace / true, rel=1e-5)


def test_rows_that_all_agree_have_no_noise() -> None:
    noise = NoiseScale()
    for _ in range(3):
        noise.add([torch.ones(7)], 4)
    assert noise.found()["noise_rows"] == pytest.approx(0.0, abs=1e-6)
    assert batch_for(noise.found()) == 1


def test_nothing_but_noise_is_said_to_be_more_than_was_looked_at() -> None:
    noise = NoiseScale()
    for gradient in gradients(16, 4, 4000, true=0.0, noise=1.0):
        noise.add([gradient], 4)
    found = noise.found()
    assert found["noise_rows"] is None
    assert found["least_rows"] == 64
    assert batch_for(found) is None
