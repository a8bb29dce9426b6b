"""Factors for answers alone: what they change, what they refuse, and that nothing stays."""

from typing import Any

import pytest
import torch

from graftlm.deltas.lora import LoraConfig
from graftlm.model.attach import attach, detach
from graftlm.model.factors import attach_factors, detach_factors
from graftlm.model.modes import activate, by_row, deltas_still
from graftlm.model.registry import attachment, deltas_by_site, hosts, trainable
from graftlm.testing import tiny_model
from graftlm.testing.deltas import close, ids, logits, move
from tests.errors import raises

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


def some(model: Any, *sites: str, r: int = 3) -> Any:
    torch.manual_seed(r)
    sizes = {site: model.get_submodule(site).weight.shape for site in sites}
    return {site: (torch.randn(r, d_in), torch.randn(d_out, r)) for site, (d_out, d_in) in sizes.items()}


@torch.no_grad()
def under(model: Any, row: Any) -> torch.Tensor:
    with by_row(model, [row] * 2):
        found: torch.Tensor = model(ids()).logits
    return found


def test_a_row_that_names_them_has_the_weights_plus_their_product() -> None:
    model, changed = tiny_model(), tiny_model()
    factors = some(model, Q, DOWN)
    attach_factors(model, "one", factors)
    with torch.no_grad():
        for site, (A, B) in factors.items():
            changed.get_submodule(site).weight.add_(0.5 * B @ A)
    close(under(model, {"one": 0.5}), logits(changed), "half of it")
    plain = logits(tiny_model())
    assert torch.equal(logits(model), plain), "they are not active by themselves"
    assert torch.equal(under(model, ()), plain)


def test_they_are_no_parameters_and_no_deltas() -> None:
    model = tiny_model()
    attach_factors(model, "one", some(model, Q, DOWN))
    assert not trainable(model)
    assert list(deltas_by_site(model)) == []
    assert all(".factors" not in key for key in model.state_dict())
    with raises("target/factors-alone"):
        activate(model, "one")
    with raises("target/name-taken"):
        attach(model, LoraConfig(), name="one")
    with raises("target/name-taken"):
        attach_factors(model, "one", _of_hosts(model))


def test_all_that_was_there_before_comes_back() -> None:
    model = tiny_model()
    modules, before = dict(model.named_modules()), logits(model)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    attach_factors(model, "one", some(model, Q))
    attach_factors(model, "two", some(model, DOWN))
    detach_factors(model, "one")
    assert set(hosts(model)) == {Q, DOWN}, "a host stays for the next one"
    detach(model, "two")
    assert dict(model.named_modules()) == modules
    assert {name for name, p in model.named_parameters() if p.requires_grad} == learning
    assert torch.equal(logits(model), before)
    attach_factors(model, "one", some(model, Q, DOWN))
    detach_factors(model, "one")
    detach(model)
    assert dict(model.named_modules()) == modules


def test_hosts_and_the_freezing_of_the_base_are_shared_with_deltas() -> None:
    model = tiny_model()
    factors = some(model, Q, DOWN)
    attach(model, LoraConfig(r=2), name="lora")
    structure = attachment(model).structure
    attach_factors(model, "one", factors)
    assert attachment(model).structure == structure, "all of its hosts were there"
    move(model)
    detach(model, "lora")
    assert set(hosts(model)) == {Q, DOWN}
    assert not [name for name, p in model.named_parameters() if p.requires_grad]
    detach(model)
    assert not hosts(model)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda factors: {**factors, Q: (factors[Q][0], factors[Q][1].T)}, "target/factors-do-not-fit"),
        (lambda factors: {**factors, Q: (factors[Q][0][:2], factors[Q][1])}, "target/factors-do-not-fit"),
        (lambda factors: {**factors, Q: (factors[Q][0].int(), factors[Q][1])}, "target/factors-do-not-fit"),
        (lambda factors: {**factors, "model.layers.0.self_attn": factors[Q]}, "target/no-layer-matches"),
        (lambda factors: {**factors, "model.layers.7.self_attn.q_proj": factors[Q]}, "target/no-layer-matches"),
        (lambda factors: {}, "target/no-layer-matches"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_model_is_as_it_was(change: Any, code: str) -> None:
    model = tiny_model()
    modules = dict(model.named_modules())
    with raises(code):
        attach_factors(model, "one", change(some(model, Q, DOWN)))
    assert dict(model.named_modules()) == modules
    assert not attachment(model).factors
    with raises("target/no-such-delta"):
        detach_factors(model, "one")
    with raises("target/factors-do-not-fit"):
        attach_factors(model, "one", some(model, Q), dtype=torch.float16)


def test_they_are_kept_as_they_come_or_in_the_dtype_that_is_asked_for() -> None:
    model = tiny_model()
    factors = some(model, Q)
    attach_factors(model, "one", factors)
    attach_factors(model, "two", factors, dtype=torch.bfloat16)
    held = hosts(model)[Q].factors
    assert held["one"].A is factors[Q][0] or held["one"].A.data_ptr() == factors[Q][0].data_ptr(), "no copy"
    assert torch.equal(held["two"].B, factors[Q][1].bfloat16())


def test_only_the_deltas_of_a_pass_are_held_still() -> None:
    model = tiny_model()
    for name in ("one", "two"):
        attach(model, LoraConfig(dropout=0.5), name=name)
    attach_factors(model, "three", _of_hosts(model))
    model.train()
    with deltas_still(model, {"one", "three"}):
        assert {name: delta.training for name, _, delta in deltas_by_site(model)} == {"one": False, "two": True}
    assert all(delta.training for _, _, delta in deltas_by_site(model))


def _of_hosts(model: Any) -> Any:
    host: Any = hosts(model)[Q]
    return {Q: (torch.ones(1, host.view.d_in), torch.ones(host.view.d_out, 1))}
