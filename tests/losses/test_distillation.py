"""Divergences of whole distributions: against plain equations with autograd, and against TRL's generalised JSD."""

import math
import os
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graftlm.losses import LOSSES, Batch
from graftlm.losses.distillation import DistillationConfig, distance, divergence

CASES: list[dict[str, Any]] = [
    {"divergence": "forward"},
    {"divergence": "reverse"},
    {"divergence": "jsd"},
    {"divergence": "jsd", "beta": 0.1},
    {"divergence": "forward", "temperature": 2.5},
    {"divergence": "reverse", "temperature": 0.5},
    {"divergence": "jsd", "beta": 0.8, "temperature": 3.0},
]


def drawn(seed: int = 0, rows: int = 7, vocabulary: int = 23) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    z, teacher = (3 * torch.randn(rows, vocabulary, generator=draw, dtype=torch.float64) for _ in "ab")
    return z.requires_grad_(), teacher


def plain(z: Tensor, teacher: Tensor, options: dict[str, Any]) -> Tensor:
    """Each row's divergence as the equations have it, differentiable in z."""
    T, beta = options.get("temperature", 1.0), options.get("beta", 0.5)
    p, q = (z / T).softmax(-1), (teacher / T).softmax(-1)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(-1)

    m = beta * q + (1 - beta) * p
    found = {"forward": kl(q, p), "reverse": kl(p, q), "jsd": beta * kl(q, m) + (1 - beta) * kl(p, m)}
    return found[options["divergence"]]


@pytest.mark.parametrize("options", CASES)
def test_values_and_gradients_are_those_of_the_equations(options: dict[str, Any]) -> None:
    z, teacher = drawn()
    wanted = plain(z, teacher, options)
    by = torch.linspace(-1, 2, len(z), dtype=torch.float64)
    (gradient,) = torch.autograd.grad((by * wanted).sum(), z)
    values, found = distance(DistillationConfig(**options), z.detach(), teacher)
    torch.testing.assert_close(values, wanted.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found * by[:, None], gradient, rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module")
def trl() -> Any:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.gkd import GKDTrainer
    return GKDTrainer.generalized_jsd_loss


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_loss_of_a_batch_is_that_of_trl(trl: Any, options: dict[str, Any], dtype: torch.dtype) -> None:
    """TRL's beta is 0 for forward and 1 for reverse; it has no T^2."""
    z, teacher = drawn(1)
    z = z.detach().to(dtype).requires_grad_()
    beta = {"forward": 0.0, "reverse": 1.0}.get(options["divergence"], options.get("beta", 0.5))
    T = options.get("temperature", 1.0)
    labels = torch.tensor([[5, -100, 3, 0, -100, 1, 2]])
    wanted = trl(z[None], teacher.to(dtype)[None], labels, beta, T)
    (gradient,) = torch.autograd.grad(wanted, z)

    seen = labels[0] >= 0
    values, grads = distance(DistillationConfig(**options), z.detach()[seen], teacher.to(dtype)[seen])
    divergences = values.requires_grad_()
    batch = Batch(torch.ones(int(seen.sum())), divergences=divergences)
    made = LOSSES["distillation"].value(DistillationConfig(**options), torch.zeros(5, dtype=dtype), None, batch)
    loss = made.sum / made.count
    (by,) = torch.autograd.grad(loss, divergences)
    ours = torch.zeros_like(z).index_copy(0, seen.nonzero()[:, 0], grads * by[:, None])
    tolerance = {"rtol": 1e-6, "atol": 1e-9 if dtype == torch.float64 else 1e-6}
    torch.testing.assert_close(loss.detach(), T**2 * wanted.detach(), **tolerance)
    torch.testing.assert_close(ours, T**2 * gradient, **tolerance)


def test_a_mix_of_distillation_and_imitation_is_the_loss_of_kd_lora() -> None:
    """As Hinton's equation is written in torch: alpha CE + (1 - alpha) T^2 KL, with weights of tokens."""
    z, teacher = (each.detach() for each in drawn(2))
    targets, weights = torch.arange(7), torch.linspace(0.2, 1, 7, dtype=torch.float64)
    soft = F.kl_div(F.log_softmax(z / 2, -1), F.softmax(teacher / 2, -1), reduction="none").sum(-1) * 4
    hard = F.cross_entropy(z, targets, reduction="none")
    wanted = (weights * (0.3 * hard + 0.7 * soft)).sum() / weights.sum()
    config = DistillationConfig(temperature=2.0, supervised_weight=0.3)
    values, _ = distance(config, z, teacher)
    made = LOSSES["distillation"].value(config, -hard, None, Batch(weights, divergences=values))
    assert float(made.sum / made.count) == pytest.approx(float(wanted), rel=1e-9)
    assert float(made.metrics["supervised_loss"][0]) == pytest.approx(float((weights * hard).sum()))
    assert float(made.metrics["divergence"][0]) == pytest.approx(float((weights * soft).sum()) / 4)


@pytest.mark.parametrize("options", CASES)
def test_who_is_like_its_teacher_is_at_no_distance_and_learns_nothing(options: dict[str, Any]) -> None:
    z = drawn(3)[0].detach().float()
    values, grads = distance(DistillationConfig(**options), z, z.clone())
    exact = options["divergence"] != "jsd"  # its mixture is rounded
    assert values.abs().max() <= (0 if exact else 1e-6)
    assert grads.abs().max() <= (0 if exact else 1e-6)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_a_teacher_that_is_certain_gives_finite_numbers(kind: Any) -> None:
    z, teacher = torch.zeros(1, 4), torch.tensor([[1000.0, 0.0, 0.0, 0.0]])
    values, grads = divergence(kind, 0.5, z, teacher)
    assert values.isfinite().all()
    assert grads.isfinite().all()
    assert float(divergence("forward", 0.5, z, teacher)[0]) == pytest.approx(math.log(4))
