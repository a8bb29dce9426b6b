"""Routers of tokens: their scores against dense matrices, and what must hold of any router."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import ArrowConfig as PeftArrowConfig
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from torch import Tensor

from graftlm.deltas.dora import DoraConfig
from graftlm.deltas.lora import LoraConfig
from graftlm.generation.engine import Engine
from graftlm.generation.requests import Request
from graftlm.model.attach import attach
from graftlm.model.registry import attachment, known_hosts
from graftlm.model.routed import Experts, RoutedFactors
from graftlm.routing.base import RouterConfig
from graftlm.routing.routers import ADAPTER_ROUTERS
from graftlm.routing.routers.arrow import ArrowConfig
from graftlm.routing.routers.lag import LagConfig
from graftlm.routing.routers.phatgoose import Phatgoose, PhatgooseConfig, write_gates
from graftlm.routing.routers.spectr import SpectrConfig
from graftlm.routing.routing import Routing
from graftlm.routing.spectra import change_norms, top_directions, triangles
from tests.errors import raises
from tests.generation.adapters import base, write_adapter
from tests.routing.libraries import SITES, TOKENIZER, Library, in_another_gauge, logits, pool_of, random_library

CONFIGS = [
    ArrowConfig(),
    ArrowConfig(top_k=2, temperature=0.3),
    SpectrConfig(),
    SpectrConfig(top_k=1),
    LagConfig(filter_k=2),
    PhatgooseConfig(),
]
every_router = pytest.mark.parametrize("config", CONFIGS, ids=str)
IDS = [5, 17, 44, 90, 8, 201, 33, 60, 7]
OTHER = [9, 4, 150, 61, 2, 77]


@pytest.fixture
def routed(tmp_path: Path) -> Iterator[Any]:
    """routed(library, config) -> (routing, the name of its mixture, its model)"""
    made: list[Routing] = []

    def make(library: Library, config: RouterConfig, folder: str = "library") -> tuple[Routing, str, Any]:
        pool = pool_of(library, tmp_path / folder)
        if isinstance(config, PhatgooseConfig):
            prints = {one.name: one.fingerprint for one in pool.registered()}
            gates = {
                prints[name]: {site: gate(name, len(A[0])) for site, (A, _) in library[name].items()} for name in prints
            }
            write_gates(tmp_path / f"{folder}.safetensors", gates)
            config = replace(config, gates=str(tmp_path / f"{folder}.safetensors"))
        routing = Routing(pool, TOKENIZER, config)
        made.append(routing)
        assert routing.mixture is not None
        return routing, routing.mixture.delta, routing.pool.model

    yield make
    for routing in made:
        routing.close()


def gate(name: str, size: int) -> Tensor:
    """The v of an adapter, for a layer of this width."""
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(map(ord, name))))


def gates_at(config: Any, experts: Experts) -> Any:
    router = ADAPTER_ROUTERS[config.name].router(config)
    if isinstance(router, Phatgoose):
        router.gates_of = {name: {"site": gate(name, experts.A.shape[2])} for name in experts.names}
    return router.gates("site", experts)


def some_experts(n: int = 4, r: int = 3, d_in: int = 12, d_out: int = 9) -> Experts:
    torch.manual_seed(n * r)
    return Experts.of({f"e{i}": (torch.randn(r - i % 2, d_in), torch.randn(d_out, r - i % 2)) for i in range(n)})


def dense(experts: Experts) -> Tensor:
    """D_e [n, d_out, d_in] in float64."""
    return experts.B.double() @ experts.A.double()


# Scores --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.5, 0.9, 0.99])
def test_the_directions_of_arrow_are_those_of_the_dense_svd_where_power_iteration_is_not(ratio: float) -> None:
    torch.manual_seed(3)
    n, d_out, d_in, S = 6, 40, 50, torch.tensor([1.0, ratio, 0.9 * ratio, 0.1]).double()
    U, V = (torch.linalg.qr(torch.randn(n, d, 4).double()).Q for d in (d_out, d_in))
    R = torch.randn(n, 4, 4).double()
    experts = Experts(tuple("abcdef"), (R.inverse() @ V.transpose(1, 2)).float(), ((U * S) @ R).float())
    wanted = torch.linalg.svd(dense(experts)).Vh[:, 0]
    ours = (top_directions(experts).double() * wanted).sum(1).abs()
    assert ours.min() >= 0.9999
    theirs = [
        ArrowLoraLinearLayer.top_right_singular_vec_from_BA(SimpleNamespace(rng_seed=0), A, B)
        for A, B in zip(experts.A, experts.B, strict=True)
    ]
    cosines = (torch.stack(theirs).double() * wanted).sum(1).abs()
    assert (cosines.min() > 0.9999) == (ratio == 0.5)


def test_an_adapter_that_changes_nothing_has_no_direction() -> None:
    experts = some_experts()
    experts.B[1] = 0
    found = top_directions(experts)
    assert torch.equal(found[1], torch.zeros(12))
    assert torch.allclose(found[[0, 2, 3]].norm(dim=1), torch.ones(3))


def test_norms_of_changes_are_those_of_dense_products() -> None:
    experts, x = some_experts(), torch.randn(7, 12)
    inner = torch.einsum("td,nrd->tnr", x, experts.A)
    wanted = torch.einsum("nod,td->tno", dense(experts), x.double()).norm(dim=2)
    assert torch.allclose(change_norms(triangles(experts), inner).double(), wanted, rtol=1e-5)


def by_hand(config: Any, experts: Experts, x: Tensor) -> Tensor:
    """The weights [T, n] by the equations, in float64, token by token."""
    D, found = dense(experts), torch.zeros(len(x), len(experts.names)).double()
    for t, each in enumerate(x.double()):
        arrow = [abs(float(torch.linalg.svd(d).Vh[0] @ each)) for d in D]
        spectr = [float((d @ each).norm()) for d in D]
        among = range(len(D))
        goose = [normed(gate(name, len(each)).double()) @ normed(each) / len(each) ** 0.5 for name in experts.names]
        scores = {"arrow": arrow, "phatgoose": list(map(float, goose))}.get(config.name, spectr)
        if config.name == "lag":
            among = sorted(among, key=lambda e: -arrow[e])[: config.filter_k]
        top = sorted(among, key=lambda e: -scores[e])[: config.top_k]
        temperature = getattr(config, "temperature", 1.0)
        found[t, top] = (torch.tensor([scores[e] for e in top]).double() / temperature).softmax(0)
    return found


def normed(v: Tensor) -> Tensor:
    return (v - v.mean()) / (v.var(correction=0) + 1e-5).sqrt()


@every_router
def test_weights_are_those_of_the_equations(config: Any) -> None:
    experts, x = some_experts(), 0.5 * torch.randn(20, 12)
    g = gates_at(config, experts)(x, torch.einsum("td,nrd->tnr", x, experts.A))
    assert torch.allclose(g.double(), by_hand(config, experts, x), atol=1e-5)
    assert torch.allclose(g.sum(1), torch.ones(20))


def test_arrow_changes_a_layer_as_peft_s_does_where_its_directions_are_right() -> None:
    torch.manual_seed(0)
    strong = torch.tensor([10.0, 0.3, 0.2])
    experts = Experts.of({f"task_{i}": (torch.randn(3, 12) * strong[:, None], torch.randn(9, 3)) for i in range(4)})
    config = PeftArrowConfig(top_k=2, router_temperature=0.7)
    config.task_adapter_names = list(experts.names)
    theirs = ArrowLoraLinearLayer(12, config)
    A, B = (
        {name: SimpleNamespace(weight=t) for name, t in zip(experts.names, stack, strict=True)}
        for stack in (experts.A, experts.B)
    )
    theirs.build_prototypes(A, B)
    x = 0.1 * torch.randn(2, 5, 12)
    wanted = theirs(x, A, B, torch.nn.Identity(), dict.fromkeys(experts.names, 1.0))
    router = ADAPTER_ROUTERS["arrow"].router(ArrowConfig(top_k=2, temperature=0.7))
    y = torch.randn(2, 5, 9)
    found = RoutedFactors(experts, router.gates("site", experts))(x, y, None)
    assert torch.allclose(found - y, wanted, atol=1e-4)


@pytest.mark.parametrize("config", [ArrowConfig(top_k=1), SpectrConfig(top_k=1), LagConfig(filter_k=2)], ids=str)
def test_a_planted_library_is_routed_without_a_mistake(config: Any) -> None:
    """Adapters whose row spaces are orthogonal, and inputs that lie in one of them."""
    torch.manual_seed(2)
    rows = torch.linalg.qr(torch.randn(24, 24)).Q.reshape(8, 3, 24)
    factors = {f"e{i}": (torch.randn(3, 3) @ rows[i], torch.randn(9, 3)) for i in range(8)}
    experts, mine = Experts.of(factors), torch.arange(8).repeat_interleave(50)
    x = torch.einsum("tr,trd->td", torch.randn(400, 3), rows[mine])
    gates = ADAPTER_ROUTERS[config.name].router(config).gates("site", experts)
    g = gates(x, torch.einsum("td,nrd->tnr", x, experts.A))
    assert torch.equal(g.argmax(1), mine)
    assert torch.allclose(g.max(1).values, torch.ones(400))


# On a model ----------------------------------------------------------------------------------------------------------


def by_hooks(library: Library, config: Any, ids: list[int]) -> Tensor:
    """Logits of a plain base whose layers are changed by hooks, a token and an adapter at a time."""
    model = base()

    def change(site: str, module: Any, args: Any, y: Tensor) -> Tensor:
        x, names = args[0][0], sorted(library)
        experts = Experts.of({name: library[name][site] for name in names})
        g = by_hand(config, experts, x)
        rows = [sum(g[t, e] * (D @ each) for e, D in enumerate(dense(experts))) for t, each in enumerate(x.double())]
        return y + torch.stack(rows).to(y.dtype)[None]

    for site in SITES:
        model.get_submodule(site).register_forward_hook(partial(change, site))
    with torch.no_grad():
        found: Tensor = model(torch.tensor([ids]), use_cache=False).logits[0]
    return found


@every_router
def test_every_token_has_its_mixture_at_every_layer(routed: Any, config: Any) -> None:
    library = random_library("a", "b", "c", ranks=(3, 2))
    _, delta, model = routed(library, config)
    assert torch.allclose(logits(model, IDS, {delta: 1.0}), by_hooks(library, config, IDS), atol=1e-4)


@every_router
def test_one_adapter_is_that_adapter(routed: Any, config: Any) -> None:
    routing, delta, model = routed(random_library("only"), config)
    with routing.pool.acquire("only") as lease:
        wanted = logits(model, IDS, lease.adapters)
    assert torch.allclose(logits(model, IDS, {delta: 1.0}), wanted, atol=1e-5)
    assert not torch.allclose(logits(model, IDS, {}), wanted, atol=1e-2)


@every_router
def test_the_order_of_the_library_changes_nothing(routed: Any, config: Any) -> None:
    library = random_library("a", "b", "c")
    _, delta, model = routed(library, config)
    _, other_delta, other = routed({name: library[name] for name in ("c", "a", "b")}, config)
    assert torch.equal(logits(model, IDS, {delta: 1.0}), logits(other, IDS, {other_delta: 1.0}))


@every_router
def test_other_factors_of_the_same_adapters_change_nothing(routed: Any, config: Any) -> None:
    library = random_library("a", "b", "c")
    _, delta, model = routed(library, config)
    _, other_delta, other = routed(in_another_gauge(library), config, "gauge")
    assert torch.allclose(logits(model, IDS, {delta: 1.0}), logits(other, IDS, {other_delta: 1.0}), atol=1e-4)


@every_router
def test_answers_with_a_cache_are_those_of_whole_passes(routed: Any, config: Any) -> None:
    _, delta, model = routed(random_library("a", "b", "c"), config)
    for step_tokens in (512, 4):
        engine = Engine(model, step_tokens=step_tokens)
        found = engine.wait(engine.submit(Request(IDS, 8, adapters={delta: 1.0}, logprobs=0)))
        ids = list(IDS)
        for token, given in zip(found.ids, found.logprobs, strict=True):
            wanted = logits(model, ids, {delta: 1.0})[-1].log_softmax(0)
            assert token == int(wanted.argmax())
            assert given.logprob == pytest.approx(float(wanted[token]), abs=1e-4)
            ids.append(token)


@every_router
def test_other_requests_of_a_batch_are_unchanged_bit_for_bit(routed: Any, config: Any) -> None:
    routing, delta, model = routed(random_library("a", "b", "c"), config)
    with routing.pool.acquire("b") as lease, routing.pool.acquire("c") as third:
        rows = [{}, lease.adapters, {delta: 1.0}, lease.adapters, {}]

        def answers(rows: list[Any]) -> list[Any]:
            engine = Engine(model, step_tokens=7)
            asked = [Request(IDS[n:] + OTHER[: n + 1], 6, adapters=row, logprobs=0) for n, row in enumerate(rows)]
            return [(one.ids, one.logprobs) for _, one in sorted(engine.run(asked), key=lambda each: each[0])]

        mixed, plain = answers(rows), answers([*rows[:2], third.adapters, *rows[3:]])
        assert mixed[2] != plain[2]
        assert [mixed[n] for n in (0, 1, 3, 4)] == [plain[n] for n in (0, 1, 3, 4)]


def test_a_mixture_is_there_with_a_weight_and_beside_other_deltas(routed: Any) -> None:
    routing, delta, model = routed(random_library("only"), ArrowConfig())
    with routing.pool.acquire({"only": 0.5}) as lease:
        assert torch.allclose(logits(model, IDS, {delta: 0.5}), logits(model, IDS, lease.adapters), atol=1e-5)
    with routing.pool.acquire({"only": 2.0}) as lease:
        (name,) = lease.adapters
        both = logits(model, IDS, {name: 1.0, delta: 1.0})
        assert torch.allclose(both, logits(model, IDS, lease.adapters), atol=1e-4)


def test_a_base_in_bfloat16_has_mixtures_summed_in_float32() -> None:
    experts, x, y = some_experts(), torch.randn(1, 6, 12).bfloat16(), torch.randn(1, 6, 9).bfloat16()
    router = ADAPTER_ROUTERS["spectr"].router(SpectrConfig())
    factors = RoutedFactors(experts, router.gates("site", experts))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = factors(x, y, None)
    wanted = y + factors(x.float(), torch.zeros(1, 6, 9), None).bfloat16()
    assert torch.equal(found, wanted)


def test_the_weights_of_a_text_can_be_watched(routed: Any) -> None:
    library = random_library("a", "b")
    del library["b"][SITES[2]]  # type: ignore[attr-defined]
    routing, _, _ = routed(library, ArrowConfig(top_k=1))
    seen = routing.mixture.watch(IDS)
    assert set(seen) == set(SITES)
    assert seen[SITES[0]].names == ("a", "b")
    assert seen[SITES[0]].weights.shape == (len(IDS), 2)
    assert torch.equal(seen[SITES[2]].weights, torch.ones(len(IDS), 1)), "an adapter without the layer is none there"


# The library ---------------------------------------------------------------------------------------------------------


def test_an_adapter_without_factors_is_refused_and_may_be_left_out(tmp_path: Path) -> None:
    pool = pool_of(random_library("a", "b"), tmp_path)
    pool.register("dora", write_adapter(tmp_path / "dora", 3, DoraConfig(r=2)))
    with raises("adapter/no-low-rank-factors", "dora"):
        Routing(pool, TOKENIZER, ArrowConfig())
    assert not attachment(pool.model).factors
    routing = Routing(pool, TOKENIZER, ArrowConfig(among=("a", "b")))
    assert routing.library.names == ("a", "b")
    routing.close()
    with raises("adapter/not-registered", "'b'"):
        Routing(pool, TOKENIZER, ArrowConfig(among=("a", "bb")))


def test_factors_on_embeddings_are_refused(tmp_path: Path) -> None:
    pool = pool_of(random_library("a"), tmp_path)
    pool.register("wide", write_adapter(tmp_path / "wide", 1, LoraConfig(r=2, targets=("q_proj", "embed_tokens"))))
    with raises("target/not-a-linear-layer"):
        Routing(pool, TOKENIZER, ArrowConfig())


def test_adapters_may_come_and_go_while_requests_hold_the_mixture(tmp_path: Path) -> None:
    library = random_library("a", "b", "c")
    pool = pool_of({name: library[name] for name in ("a", "b")}, tmp_path)
    model, routing = pool.model, Routing(pool, TOKENIZER, ArrowConfig())
    first = routing.route(IDS)
    assert first.shown == "arrow(a+b)"
    before = logits(model, IDS, first.lease.adapters)
    pool_of({"c": library["c"]}, tmp_path)
    pool.register("c", tmp_path / "c")
    with routing.route(IDS) as second:
        assert second.shown == "arrow(a+b+c)"
        assert second.lease.fingerprint != first.lease.fingerprint
        assert second.lease.adapters != first.lease.adapters
        assert torch.equal(logits(model, IDS, first.lease.adapters), before)
    first.lease.release()
    first.lease.release()
    (mixture,) = attachment(model).factors
    assert mixture in second.lease.adapters
    with routing.route(IDS) as third:
        assert third.lease.adapters == second.lease.adapters
        routing.close()
        assert third.lease.adapters.keys() <= attachment(model).factors.keys(), "it is still held"
    assert not attachment(model).factors
    assert all(not host.factors for host in known_hosts(model).values())


def test_without_adapters_the_base_answers(tmp_path: Path) -> None:
    pool = pool_of(random_library("a"), tmp_path)
    pool.unregister("a")
    with Routing(pool, TOKENIZER, ArrowConfig()).route(IDS) as chosen:
        assert (chosen.shown, dict(chosen.lease.adapters)) == ("base", {})


def test_a_mixture_is_no_parameter_of_the_model(routed: Any) -> None:
    _, delta, model = routed(random_library("a", "b"), ArrowConfig())
    assert not [key for key in model.state_dict() if "routed" in key or "router" in key]
    with raises("target/name-taken"):
        attach(model, LoraConfig(), name=delta)
