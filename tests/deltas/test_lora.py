"""LoRA against PEFT's, whole tensors; and the facts that its file states."""

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from graftlm.deltas import METHODS
from graftlm.deltas.base import Site
from graftlm.deltas.inits import INITS
from graftlm.deltas.lora import Lora, LoraConfig
from graftlm.model.attach import attach
from graftlm.model.registry import hosts
from graftlm.testing import tiny_model
from graftlm.testing.deltas import ids
from tests.peers import copy_factors, factors_of_ours, factors_of_peft, peft_model, relative_error

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "lora": ("llama", {"r": 4, "alpha": 6}, {"r": 4, "lora_alpha": 6}),
    "rslora": ("llama", {"r": 4, "alpha": 6, "rslora": True}, {"r": 4, "lora_alpha": 6, "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "r": 4,
            "alpha": 6,
            "patterns": {
                "q_proj": {"r": 2, "alpha": 3},
                r"layers\.1\.mlp\.up_proj": {"r": 7},
                "down_proj": {"alpha": 9},
            },
        },
        {
            "r": 4,
            "lora_alpha": 6,
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7},
            "alpha_pattern": {"q_proj": 3, "down_proj": 9},
        },
    ),
    "patterns and rslora": (
        "llama",
        {"r": 4, "alpha": 6, "rslora": True, "patterns": {"v_proj": {"r": 9}}},
        {"r": 4, "lora_alpha": 6, "use_rslora": True, "rank_pattern": {"v_proj": 9}},
    ),
    "gpt2": ("gpt2", {"r": 4, "alpha": 6}, {"r": 4, "lora_alpha": 6}),
    "gpt2 patterns": (
        "gpt2",
        {"r": 4, "alpha": 6, "rslora": True, "patterns": {"c_attn": {"r": 3, "alpha": 5}}},
        {
            "r": 4,
            "lora_alpha": 6,
            "use_rslora": True,
            "rank_pattern": {"c_attn": 3},
            "alpha_pattern": {"c_attn": 5},
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_every_gradient_are_those_of_peft(case: str) -> None:
    kind, ours, theirs = CASES[case]
    model, peer = tiny_model(kind), peft_model(tiny_model(kind), **theirs)
    attach(model, LoraConfig(**ours))
    copy_factors(factors_of_peft(peer), factors_of_ours(model))
    outputs = []
    for each in (model, peer):
        out = each(ids()).logits
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        outputs.append(out)
    assert relative_error(outputs[0], outputs[1]) <= 1e-5
    wanted = factors_of_peft(peer)
    for key, parameter in factors_of_ours(model).items():
        assert relative_error(parameter.grad, wanted[key].grad) <= 1e-5, key


def site(d_in: int = 24, d_out: int = 40, seed: int = 3) -> Site:
    return Site("a.b", d_in, d_out, lambda: torch.zeros(d_out, d_in), seed)


def test_the_increment_is_s_b_a_x_written_out_by_hand() -> None:
    delta = Lora(Site("a", 2, 3, lambda: None, 0), LoraConfig(r=1, alpha=4))
    with torch.no_grad():
        delta.A.copy_(torch.tensor([[1.0, 2.0]]))
        delta.B.copy_(torch.tensor([[1.0], [0.0], [-1.0]]))
    # s = 4 / 1; A x = 1 * 3 + 2 * 5 = 13; s B A x = 4 * (13, 0, -13)
    assert (delta.matrix() @ torch.tensor([3.0, 5.0])).tolist() == [52.0, 0.0, -52.0]


@pytest.mark.parametrize(("r", "alpha"), [(1, 1.0), (4, 6.0), (16, 32.0), (64, 16.0)])
def test_the_scale_is_alpha_over_r_and_over_its_root_for_rslora(r: int, alpha: float) -> None:
    assert Lora(site(), LoraConfig(r=r, alpha=alpha)).scale == pytest.approx(alpha / r, rel=1e-12)
    assert Lora(site(), LoraConfig(r=r, alpha=alpha, rslora=True)).scale == pytest.approx(
        alpha / math.sqrt(r), rel=1e-12
    )


def test_a_starts_uniform_within_one_over_the_root_of_d_in_and_b_at_zero() -> None:
    delta = Lora(site(d_in=400, d_out=10), LoraConfig(r=50))
    bound = 1 / math.sqrt(400)
    A = delta.A.detach()
    assert A.shape == (50, 400)
    assert float(A.abs().max()) <= bound
    # 20,000 draws: the mean and the spread of U(-a, a) are 0 and a / sqrt(3), within five standard errors
    spread = bound / math.sqrt(3)
    assert abs(float(A.mean())) < 5 * spread / math.sqrt(20_000)
    assert float(A.std()) == pytest.approx(spread, rel=0.02)
    assert float(A.max()) > 0.99 * bound
    assert float(A.min()) < -0.99 * bound
    assert not delta.B.any()


def test_each_site_has_a_start_of_its_own_that_depends_on_seed_and_name_alone() -> None:
    def starts(seed: int, targets: tuple[str, ...]) -> dict[str, torch.Tensor]:
        model = attach(tiny_model(), LoraConfig(r=4), targets=targets, seed=seed)
        return {name: host.deltas["default"].A.detach() for name, host in hosts(model).items()}  # type: ignore[union-attr]

    wide, narrow, other = starts(0, ("q_proj", "o_proj")), starts(0, ("o_proj",)), starts(1, ("o_proj",))
    assert len({tuple(A.flatten().tolist()) for A in wide.values()}) == len(wide) == 4
    for name, A in narrow.items():
        assert torch.equal(A, wide[name]), "a site's start must not depend on which others there are"
        assert not torch.equal(A, other[name])


def test_making_a_delta_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    Lora(site(), LoraConfig())
    assert torch.equal(torch.get_rng_state(), before)


def test_the_row_of_the_table_says_what_lora_is() -> None:
    row = METHODS["lora"]
    assert row.config is LoraConfig
    assert row.delta is Lora
    assert row.mergeable
    assert row.has_factors
    assert Lora.paper == "Hu et al. 2021, arXiv:2106.09685"
    assert Lora.family == "reparameterisation"
    delta = Lora(site(), LoraConfig(r=5))
    assert sum(p.numel() for p in delta.parameters()) == 5 * (24 + 40)
    assert {p.dtype for p in delta.parameters()} == {torch.float32}


def test_the_zero_init_is_in_the_table_and_changes_nothing() -> None:
    delta = Lora(site(), LoraConfig())
    assert INITS["zero"].make(site(), delta) == {}


@pytest.mark.parametrize(
    "bad",
    [{"r": 0}, {"r": 1.5}, {"alpha": 0}, {"alpha": float("nan")}, {"rslora": "yes"}, {"dropout": 1.0}, {"rank": 8}],
)
def test_a_config_that_makes_no_sense_cannot_be_made(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(bad))):
        LoraConfig(**bad)
