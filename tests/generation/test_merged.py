"""Weights with an adapter merged into them: the same answers, made when it pays, given up when anything changes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from graftlm.deltas import METHODS
from graftlm.generation import merged
from graftlm.generation.engine import Engine
from graftlm.generation.requests import Request
from graftlm.model import plans
from graftlm.model.attach import attach
from graftlm.model.factors import attach_factors, detach_factors
from graftlm.model.hosts import LayerHost
from graftlm.model.registry import hosts, trainable
from graftlm.system import Memory
from graftlm.testing.deltas import attach_tiny, close, move
from tests.errors import raises
from tests.generation.test_generate import varied
from tests.generation.test_many_adapters import Row, answers, by_itself, factors, ids_of, with_factors


def merging(model: Any, after: int = 3, **options: Any) -> Engine:
    return Engine(model, merge_after=after, **options)


def merged_hosts(engine: Engine) -> list[LayerHost]:
    assert engine._copy is not None
    found = [module for module in engine._copy[1].model.modules() if isinstance(module, LayerHost)]
    return [host for host in found if host.merged is not None]


@pytest.mark.parametrize("row", [{"a": 1.0}, {"a": 0.5, "c": -0.25}, {"d": 1.0}, {"the-lora": 1.0, "b": 2.0}])
def test_merged_answers_are_those_of_each_request_alone(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_factors(varied(head_dim=16))
    attach_tiny("lora", model, delta="the-lora")
    move(model, scale=0.1)
    engine = merging(model)
    asked = [(ids_of(3 + 5 * n, n), row) for n in range(4)]
    wanted = [by_itself(model, ids, row, 12) for ids, _ in asked]
    scored = Request(asked[2][0], 12, adapters=row, logprobs=1, prompt_logprobs=1)
    other_engine = Engine(model)
    plain = other_engine.wait(other_engine.submit(scored))
    changed: list[Any] = []
    computed = plans.ManyLowRank.__call__
    monkeypatch.setattr(plans.ManyLowRank, "__call__", lambda *args: changed.append(args) or computed(*args))
    assert answers(engine, asked, 12) == wanted
    assert engine.merging is not None
    sites = [host for host in hosts(model).values() if any(n in host.factors or n in host.deltas for n in row)]
    assert len(changed) == 3 * len(sites), "three passes; from the fourth on W' alone"
    changed.clear()
    engine.merging.before_pass = lambda copy, rows: None  # type: ignore[method-assign]
    engine._read_weights = lambda: None  # type: ignore[method-assign]
    again = engine.wait(engine.submit(scored))
    assert not changed
    for found, other in ((again.logprobs, plain.logprobs), (again.prompt_logprobs, plain.prompt_logprobs)):
        pairs = [(a, b) for a, b in zip(found, other, strict=True) if a is not None and b is not None]
        ours, theirs = (torch.tensor([pair[side].logprob for pair in pairs]) for side in (0, 1))
        close(ours, theirs, "log-probabilities of the merged weights", 5e-5)


def test_a_merged_weight_is_w_and_its_changes() -> None:
    model = with_factors(varied(head_dim=16))
    engine = merging(model, 1)
    answers(engine, [(ids_of(5, 1), {"a": 0.5, "c": 2.0})], 4)
    copied = engine._inference_copy().model
    for name, host in hosts(model).items():
        A, B = zip(*(host.factors[key] for key in "ac"), strict=True)
        W = host.view.weight.double() + sum(  # type: ignore[attr-defined]
            share * (b.double() @ a.double()) for share, a, b in zip((0.5, 2.0), A, B, strict=True)
        )
        x = torch.randn(3, W.shape[1], generator=torch.Generator().manual_seed(1))
        found = copied.get_submodule(name).merged
        assert found is not None
        error: Tensor = (found[1](x).double() - x.double() @ W.T).abs().max()
        assert float(error) <= 1e-5 * float((x.double() @ W.T).abs().max())


def test_other_rows_are_not_merged_and_those_of_the_copy_come_back_to_it() -> None:
    model = with_factors(varied(head_dim=16))
    engine, ids = merging(model, prefix_tokens=64), ids_of(9, 2)
    assert engine.merging is not None

    def check(*rows: Row, merged: Row | None) -> None:
        assert answers(engine, [(ids, row) for row in rows]) == [by_itself(model, ids, row, 8) for row in rows]
        assert engine.merging is not None
        assert engine.merging.row == merged

    check({"a": 1.0}, {"b": 1.0}, merged=None)
    check({}, merged=None)
    check({"a": 1.0}, {"a": 1.0}, merged={"a": 1.0})
    kept = [host.merged for host in merged_hosts(engine)]
    check({"a": 1.0}, {"b": 1.0}, {}, merged={"a": 1.0})
    check({"a": 1.0}, merged={"a": 1.0})
    assert [host.merged for host in merged_hosts(engine)] == kept
    check({"a": 0.5}, merged={"a": 0.5})
    assert len(merged_hosts(engine)) == len(kept), "one copy at a time"


def test_a_copy_goes_with_its_deltas() -> None:
    model = with_factors(varied(head_dim=16))
    attach(model, METHODS["lora"].config(method="lora"), name="module")
    move(model, scale=0.3)
    engine, ids = merging(model, prefix_tokens=64), ids_of(9, 2)
    assert engine.merging is not None
    before = answers(engine, [(ids, ("a",))])
    assert engine.merging.row == {"a": 1.0}
    detach_factors(model, "a")
    attach_factors(model, "a", factors(model, 4, 77))
    after = answers(engine, [(ids, ("a",))])
    assert after == [by_itself(model, ids, {"a": 1.0}, 8)]
    assert after != before
    assert answers(engine, [(ids, ("module",))]) == [by_itself(model, ids, {"module": 1.0}, 8)]
    assert engine.merging.row == {"module": 1.0}
    with torch.no_grad():
        for parameter in trainable(model).values():  # it learns while nothing runs
            parameter.mul_(-1)
    assert answers(engine, [(ids, ("module",))]) == [by_itself(model, ids, {"module": 1.0}, 8)]
    with torch.no_grad():
        for host in hosts(model).values():
            host.base.weight.mul_(0.9)  # type: ignore[union-attr, operator]
    assert answers(engine, [(ids, ("module",))]) == [by_itself(model, ids, {"module": 1.0}, 8)]


def test_what_has_no_factors_stays_as_it_is() -> None:
    model = with_factors(varied(head_dim=16))
    for method in ("oft", "houlsby"):
        attach_tiny(method, model, delta=f"the-{method}")
    move(model, scale=0.2)
    engine, ids = merging(model), ids_of(9, 2)
    assert engine.merging is not None
    for row, merges in (
        ({"the-oft": 1.0}, False),
        ({"the-houlsby": 1.0, "d": 1.0}, True),
        ({"the-oft": 1, "a": 1}, False),
    ):
        assert answers(engine, [(ids, row)]) == [by_itself(model, ids, row, 8)]
        assert (engine.merging.row == row) == merges
        assert bool(engine.merging.why_not) != merges


def test_nothing_is_merged_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_factors(varied(head_dim=16))
    engine, ids = merging(model), ids_of(9, 2)
    monkeypatch.setattr(merged, "memory", lambda: Memory(1.0, 0.1))
    assert answers(engine, [(ids, ("a",))]) == [by_itself(model, ids, {"a": 1.0}, 8)]
    assert engine.merging is not None
    assert engine.merging.row is None
    assert "0.10 GiB are free" in engine.merging.why_not


def test_models_whose_weights_cannot_be_merged_are_refused() -> None:
    model = varied(head_dim=16)
    with raises("target/merge-not-possible", match="prepack is off"):
        merging(model, prepack=False)
    with raises("target/merge-not-possible", match="bfloat16 on cpu"):
        merging(varied(head_dim=16).to(torch.bfloat16))
