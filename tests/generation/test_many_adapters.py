"""Requests with many adapters in one pass: each is as if it were alone, whatever company it has."""

import gc
import random
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftlm.deltas import METHODS
from graftlm.deltas.base import AroundDelta, InputDelta
from graftlm.generation import support
from graftlm.generation.attention import Cache
from graftlm.generation.engine import Engine, model_lock
from graftlm.generation.forward_pass import Piece, keys_before, pass_over
from graftlm.generation.inference_copy import inference_copy
from graftlm.generation.requests import Request
from graftlm.hub.quantize_base import quantize
from graftlm.kernels import many_low_rank
from graftlm.kernels.prepacked import PrepackedProduct
from graftlm.model import hosts as hosts_module
from graftlm.model.attach import attach, detach
from graftlm.model.bases import view
from graftlm.model.factors import attach_factors, detach_factors
from graftlm.model.modes import by_row
from graftlm.model.registry import hosts
from graftlm.model.routes import Route, Span, use_route
from graftlm.testing.deltas import attach_tiny, close, move
from graftlm.testing.tiny import tiny_gpt2
from tests.errors import raises
from tests.generation.test_generate import by_hand, varied

pytestmark = pytest.mark.versions

Row = Mapping[str, float]


def factors(model: Any, r: int, seed: int, only: str = "") -> dict[str, tuple[Tensor, Tensor]]:
    """Random (A, B) of rank r for the linear layers of the decoder whose name has `only` in it."""
    random = torch.Generator().manual_seed(seed)
    layers = {n.removesuffix(".base"): m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    sizes = {n: (m.in_features, m.out_features) for n, m in layers.items() if only in n and "lm_head" not in n}
    return {
        name: (torch.randn(r, d_in, generator=random) / d_in**0.5, torch.randn(d_out, r, generator=random) / r**0.5)
        for name, (d_in, d_out) in sizes.items()
    }


def with_factors(model: Any, **options: Any) -> Any:
    """Adapters a, b, c and d of different ranks; d sits on the feed-forward layers alone."""
    for seed, (name, r, only) in enumerate((("a", 4, ""), ("b", 1, ""), ("c", 17, ""), ("d", 8, "mlp"))):
        attach_factors(model, name, factors(model, r, seed, only), **options)
    return model


ROWS: list[Row] = [
    {},
    {"a": 1.0},
    {"b": 1.0},
    {"a": 0.5},
    {"c": 1.0, "a": -0.25},
    {},
    {"d": 1.0},
    {"a": 1.0, "b": 1.0, "c": 2.0, "d": 1.0},
    {"a": 0.0},
]


def ids_of(count: int, seed: int) -> list[int]:
    return torch.randint(3, 300, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def in_passes(model: Any, rows: Sequence[Row], prompts: Sequence[list[int]], parts: Sequence[int]) -> list[Tensor]:
    """For each request, the logits after each part of its prompt: passes over the k-th parts of all, side by side.

    `parts` are tokens; the rest of each prompt comes token by token.
    """
    copy = inference_copy(model, {}).model
    caches = [Cache(len(ids), keys_before(model, row)) for ids, row in zip(prompts, rows, strict=True)]
    found: list[list[Tensor]] = [[] for _ in rows]
    at = [0] * len(rows)
    steps = [*parts, *[1] * max(map(len, prompts))]
    for count in steps:
        going = [n for n, ids in enumerate(prompts) if at[n] < len(ids)]
        if not going:
            break
        pieces = [Piece(prompts[n][at[n] : at[n] + count], at[n], caches[n], rows[n], True) for n in going]
        for n, piece, logits in zip(going, pieces, pass_over(copy, pieces), strict=True):
            found[n].append(logits)
            at[n] += len(piece.ids)
    return [torch.stack(each) for each in found]


@torch.no_grad()
def alone(model: Any, row: Row, ids: list[int], parts: Sequence[int]) -> Tensor:
    """The same of one request by the model's own forward pass."""
    with by_row(model, [row]):
        logits: Tensor = model(torch.tensor([ids]), use_cache=False).logits[0]
    ends = [min(sum(parts[: n + 1]), len(ids)) - 1 for n in range(len(parts))]
    ends = [*dict.fromkeys(ends), *range(ends[-1] + 1, len(ids))]
    return logits[ends]


def check(
    model: Any, rows: Sequence[Row], prompts: Sequence[list[int]], parts: Sequence[int], tolerance: float
) -> None:
    found = in_passes(model, rows, prompts, parts)
    for row, ids, logits in zip(rows, prompts, found, strict=True):
        close(logits, alone(model, row, ids, parts), str(dict(row)), tolerance)


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_a_mixed_batch_is_each_alone(
    dtype: torch.dtype, tolerance: float, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixed ranks, weights, sums, the bare base; parts of prompts that are long, short, and single tokens."""
    if not kernel:
        monkeypatch.setattr(many_low_rank, "serves", lambda x: False)
    model = with_factors(varied(head_dim=16).to(dtype))
    prompts = [ids_of(length, seed) for seed, length in enumerate((50, 3, 41, 44, 39, 60, 1, 48, 45))]
    check(model, ROWS, prompts, [30, 7], tolerance)


def test_the_rows_of_this_batch_differ() -> None:
    model, ids = with_factors(varied(head_dim=16)), ids_of(9, 0)
    last = [alone(model, row, ids, [9])[0] for row in ROWS[:-1] if row]
    assert all(float((x - y).abs().max()) > 0.1 for n, x in enumerate(last) for y in last[:n])


WITHOUT_FACTORS = (
    "oft", "boft", "hra", "ia3", "houlsby", "parallel", "prefix", "prompt", "dora", "full", "bitfit", "norm-tuning",
    "trainable-tokens", "loha", "vera", "reslora", "shira", "lora",
)  # fmt: skip


@pytest.mark.parametrize("method", WITHOUT_FACTORS)
def test_methods_without_factors_stand_beside_adapters_that_have_them(method: str) -> None:
    model = varied(head_dim=16)
    attach_tiny(method, model, delta="other", seed=3)
    move(model, scale=0.2)
    with_factors(model)
    rows: list[Row] = [{"a": 1.0}, {"other": 1.0}, {}, {"other": 1.0}, {"c": 1.0}, {"other": 1.0, "a": 1.0}]
    if not issubclass(METHODS[method].delta, InputDelta):
        rows += [{"other": 0.5}, {"b": 2.0, "other": -0.5}]
    prompts = [ids_of(length, seed) for seed, length in enumerate((7, 28, 5, 9, 33, 4, 6, 3)[: len(rows)])]
    check(model, rows, prompts, [27], 5e-5)


def test_several_methods_without_factors_in_one_batch() -> None:
    model = varied(head_dim=16)
    names = ("oft", "ia3", "houlsby", "prefix", "lora", "loha")
    for name in names:
        attach_tiny(name, model, delta=f"the-{name}", seed=2)
    move(model, scale=0.2)
    with_factors(model)
    rows: list[Row] = [{f"the-{name}": 1.0} for name in names]
    rows += [{"a": 1.0}, {}, {"the-oft": 1.0, "the-ia3": 1.0, "a": 1.0}, {"the-loha": 0.5, "d": 1.0}]
    random.Random(0).shuffle(rows)
    check(model, rows, [ids_of(5 + n, n) for n in range(len(rows))], [4], 5e-5)


def test_any_spans_and_rows() -> None:
    model, chance = with_factors(varied(head_dim=16)), random.Random(1)
    attach(model, METHODS["ia3"].config(method="ia3"), name="e")
    move(model, scale=0.3)
    for seed in range(12):
        rows = [
            {name: chance.choice([1.0, 1.0, 0.5, -1.0]) for name in chance.sample("abcde", chance.choice([0, 1, 1, 2]))}
            for _ in range(chance.randint(1, 9))
        ]
        parts = [chance.choice([1, 2, 26]) for _ in range(2)]
        check(model, rows, [ids_of(chance.randint(1, 34), seed + n) for n in range(len(rows))], parts, 5e-5)


def test_factors_in_bfloat16_are_the_rounded_ones_and_products_are_summed_in_float32() -> None:
    model, rounded = with_factors(varied(head_dim=16), dtype=torch.bfloat16), varied(head_dim=16)
    for seed, (name, r, only) in enumerate((("a", 4, ""), ("b", 1, ""), ("c", 17, ""), ("d", 8, "mlp"))):
        given = factors(rounded, r, seed, only)
        attach_factors(rounded, name, {s: (A.bfloat16().float(), B.bfloat16().float()) for s, (A, B) in given.items()})
    prompts = [ids_of(5 + 6 * n, n) for n in range(len(ROWS))]
    for row, ids, logits in zip(ROWS, prompts, in_passes(model, ROWS, prompts, [30]), strict=True):
        close(logits, alone(rounded, row, ids, [30]), str(row), 2e-5)
    held = next(host.factors["a"] for host in hosts(model).values() if "a" in host.factors)
    assert held.A.dtype == held.B.dtype == torch.bfloat16


def test_in_bfloat16_a_young_adapter_survives_the_rounding_as_it_does_alone() -> None:
    """The sum of base and change is rounded once: a change far smaller than the rounding still shows in the mean."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 256, bias=False).bfloat16().requires_grad_(False)
    x = torch.randn(64, 64).bfloat16()
    base = view(layer)
    assert base is not None
    added = (1e-3 * torch.randn(64, 256)).bfloat16()
    exact = x.double() @ layer.weight.double().T + added.double()
    for found in (base.plus(x, added.clone()), PrepackedProduct(layer.weight, None).plus(x, added)):
        changed = found.double() - layer(x).double()
        assert float((changed * added.double()).sum() / added.double().square().sum()) == pytest.approx(1, abs=0.1)
        assert float((found.double() - exact).norm() / exact.norm()) < 3e-3


# The engine ----------------------------------------------------------------------------------------------------------


def answers(engine: Engine, asked: Sequence[tuple[list[int], Any]], count: int = 8) -> list[list[int]]:
    found = dict(engine.run([Request(ids, count, adapters=row) for ids, row in asked]))
    return [found[n].ids for n in range(len(asked))]


def by_itself(model: Any, ids: list[int], row: Row, count: int) -> list[int]:
    with by_row(model, [row]):
        return by_hand(model, ids, [], count)


@pytest.mark.parametrize("step_tokens", [5, 64, 512])
def test_answers_are_those_of_each_request_alone(step_tokens: int) -> None:
    model = with_factors(varied(head_dim=16))
    asked = [(ids_of(3 + 5 * n, n), row) for n, row in enumerate([*ROWS, *ROWS])]
    found = answers(Engine(model, max_requests=7, step_tokens=step_tokens), asked, 6)
    assert found == [by_itself(model, ids, row, 6) for ids, row in asked]


def test_the_base_is_multiplied_once_a_layer_and_plans_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_factors(varied(head_dim=16))
    engine = Engine(model)
    asked = [(ids_of(6, n), row) for n, row in enumerate(ROWS)]
    calls: list[str] = []
    for name in ("__call__", "plus", "low_rank"):
        function = getattr(PrepackedProduct, name)
        monkeypatch.setattr(
            PrepackedProduct, name, lambda *args, function=function: calls.append("product") or function(*args)
        )
    plan_of = hosts_module.plan_of
    monkeypatch.setattr(hosts_module, "plan_of", lambda *args: calls.append("plan") or plan_of(*args))
    answers(engine, asked[:1], 1)  # it makes its copy of the model
    calls.clear()
    answers(engine, asked, 10)
    layers = len(hosts(model))
    assert calls.count("product") == 10 * (layers + 1), "one for each layer and the head, ten passes"
    assert calls.count("plan") == layers


AROUND = tuple(name for name, method in METHODS.items() if issubclass(method.delta, AroundDelta))


def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each product with a weight of the base, from now on."""
    rows: list[int] = []

    def counted(name: str) -> None:
        function = getattr(PrepackedProduct, name)

        def call(self: PrepackedProduct, x: Tensor, *given: Any, **more: Any) -> Tensor:
            rows.append(x.numel() // x.shape[-1])
            found: Tensor = function(self, x, *given, **more)
            return found

        monkeypatch.setattr(PrepackedProduct, name, call)

    for name in ("__call__", "plus", "low_rank"):
        counted(name)
    return rows


def test_the_base_is_multiplied_once_a_layer_for_all_that_stands_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """And for what changes an output: Houlsby, Lin's adapter, prefix, SHiRA."""
    model = with_factors(varied(head_dim=16))
    names = [*AROUND, "houlsby", "lin-adapter", "prefix", "shira"]
    for name in names:
        attach_tiny(name, model, delta=f"the-{name}", seed=2)
    move(model, scale=0.1)
    engine, layers = Engine(model, max_requests=32), len([h for h in hosts(model).values() if is_linear(h)])
    rows: list[Row] = [{f"the-{name}": 1.0} for name in names] + [{}, {"a": 1.0}, {"c": 1.0, "a": 0.5}]
    asked = [(ids_of(2, n), row) for n, row in enumerate(rows)]
    wanted = [by_itself(model, ids, row, 6) for ids, row in asked]
    found = products(monkeypatch)
    answers(engine, asked[:1], 1)  # it makes its copy of the model
    found.clear()
    assert answers(engine, asked, 6) == wanted
    assert len(found) == 6 * (layers + 1), "one for each layer and the head, six passes"
    more = METHODS["flora"].config(method="flora", r=4).r - 1  # type: ignore[call-arg,attr-defined]
    assert max(found[layers + 1 :]) == len(rows) + more, "a token is a row; FLoRA has one for each rank"


@pytest.mark.parametrize("kind", ["conv1d", "nf4"])
def test_what_stands_around_other_layers_than_linear_ones_is_each_alone(kind: str) -> None:
    """GPT-2's layers keep W transposed and have biases; quantized ones make W anew for each product."""
    model = tiny_gpt2() if kind == "conv1d" else quantize(varied(head_dim=16), kind)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(len(key)))
    names = [name for name in AROUND if kind != "conv1d" or name != "beft"]  # GPT-2 has no layer for values alone
    for name in names:
        attach_tiny(name, model, delta=f"the-{name}", seed=2)
    move(model, scale=0.1)
    rows: list[Row] = [{f"the-{name}": 1.0} for name in names] + [{}]
    check(model, rows, [ids_of(5 + n % 3, n) for n in range(len(rows))], [4], 5e-5)


def is_linear(host: Any) -> bool:
    return isinstance(host, hosts_module.LayerHost) and host.view.kind == "linear"


def test_a_batch_of_all_methods_is_each_alone() -> None:
    model = with_factors(varied(head_dim=16))
    for name in METHODS:
        attach_tiny(name, model, delta=f"the-{name}", seed=2)
    move(model, scale=0.1)
    rows: list[Row] = [{f"the-{name}": 1.0} for name in METHODS]
    rows += [{}, {"a": 1.0}, {"the-oft": 0.5}, {"the-ia3": 1.0, "the-oft": 1.0}, {"the-road": 1.0, "the-reft": 1.0}]
    random.Random(3).shuffle(rows)
    asked = [(ids_of(3 + n % 5, n), row) for n, row in enumerate(rows)]
    found = answers(Engine(model, max_requests=len(rows)), asked, 4)
    assert found == [by_itself(model, ids, row, 4) for ids, row in asked]


@pytest.mark.parametrize("method", AROUND)
def test_in_bfloat16_a_layer_in_a_mixed_pass_is_the_equation(method: str) -> None:
    """What goes into the base has the base's dtype, whatever the delta made of it; in float32 parameters."""
    model = varied(head_dim=16).to(torch.bfloat16)
    attach_tiny(method, model, delta="other", seed=3)
    move(model, scale=0.2)
    copied = dict(inference_copy(model, {}).model.named_modules())
    deltas: list[Row] = [{"other": 1.0}, {}, {"other": 1.0}]
    for rows in (deltas, deltas[:1]):  # beside the base, and alone
        route = Route(tuple(Span(n, n + 1, row) for n, row in enumerate(rows)))
        for name, host in hosts(model).items():
            if not is_linear(host):
                continue
            x = torch.randn(len(rows), host.view.d_in, generator=torch.Generator().manual_seed(1)).bfloat16()
            with torch.no_grad(), use_route(route):
                found = copied[name](x[None])[0]
            for row, one, y in zip(rows, x, found, strict=True):
                W, b = host.effective(names=list(row))
                wanted = F.linear(one.double(), W.double(), None if b is None else b.double())
                close(y.double(), wanted, f"{name} with {dict(row)}", 2**-6)


def test_what_the_kernel_reads_of_factors_is_made_once_for_all_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_factors(varied(head_dim=16))
    engine, ids, layers = Engine(model), ids_of(6, 1), len(hosts(model))
    made: list[Any] = []
    parts_of = hosts_module.parts_of
    monkeypatch.setattr(hosts_module, "parts_of", lambda acting: made.append(acting) or parts_of(acting))
    for count in (layers, 0):
        made.clear()
        found = answers(engine, [(ids, ("a",)), (ids, ("c",))])
        assert found == [by_itself(model, ids, {name: 1.0}, 8) for name in "ac"]
        assert len(made) <= 2 * count, "a and c sit on some of the layers"
        assert bool(made) == bool(count)
    detach_factors(model, "a")
    attach_factors(model, "a", factors(model, 4, 77))
    made.clear()
    assert answers(engine, [(ids, ("a",)), (ids, ("c",))]) == [by_itself(model, ids, {n: 1.0}, 8) for n in "ac"]
    assert 0 < len(made) <= layers, "those of a"


def test_attaching_where_hosts_are_disturbs_no_one_and_makes_nothing_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_factors(varied(head_dim=16))
    probed: list[Any] = []
    numbers = support._numbers
    monkeypatch.setattr(support, "_numbers", lambda model: probed.append(model) or numbers(model))
    engine, ids = Engine(model), ids_of(9, 1)
    wanted = by_itself(model, ids, {"a": 1.0}, 12)
    running = engine.submit(Request(ids, 12, adapters=("a",)))
    next(iter(engine.stream(Request([5], 1, adapters=()))))  # one step
    assert engine._copy is not None
    copy, products = engine._copy[1].model, dict(engine.products or {})
    attach_factors(model, "late", factors(model, 6, 9))
    assert answers(engine, [(ids, ("late",))]) == [by_itself(model, ids, {"late": 1.0}, 8)]
    detach_factors(model, "b")
    assert engine.wait(running).ids == wanted
    assert engine._copy[1].model is copy
    assert engine.products == products
    Engine(model)
    assert len(probed) == 1


def test_detaching_fails_its_own_requests_alone() -> None:
    for replaced in (False, True):
        model = with_factors(varied(head_dim=16))
        engine, ids = Engine(model, max_requests=4), ids_of(30, 2)
        rows: list[Row] = [{"a": 1.0}, {"c": 1.0, "a": 0.5}, {"c": 1.0}, {}, {"a": 1.0}]
        wanted = [by_itself(model, ids, row, 9) for row in rows]
        asked = [engine.submit(Request(ids, 9, adapters=row)) for row in rows]
        engine._take_turn(asked[0])  # one step; the last of them waits
        detach_factors(model, "a")
        if replaced:
            attach_factors(model, "a", factors(model, 4, 77))
        for generation, row, answer in zip(asked, rows, wanted, strict=True):
            if "a" in row:
                with raises("target/delta-changed"):
                    engine.wait(generation)
            else:
                assert engine.wait(generation).ids == answer
        if replaced:
            assert answers(engine, [(ids, ("a",))]) == [by_itself(model, ids, {"a": 1.0}, 8)]


@pytest.mark.parametrize("kernel", [True, False])
def test_nothing_of_an_adapter_stays_after_it_is_detached(kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernel:
        monkeypatch.setattr(many_low_rank, "serves", lambda x: False)
    model = with_factors(varied(head_dim=16))
    attach(model, METHODS["lora"].config(method="lora"), name="module")
    move(model, scale=0.3)
    given = factors(model, 5, 3)
    attach_factors(model, "gone", given)
    kept = [weakref.ref(t) for host in hosts(model).values() if "gone" in host.factors for t in host.factors["gone"]]
    kept += [weakref.ref(p) for host in hosts(model).values() for p in host.deltas.parameters()]
    del given
    engines = [Engine(model), Engine(model, prepack=False)]
    for engine in engines:
        asked = [({"gone": 1.0}), ({"module": 1.0}), ({"a": 1.0, "gone": 0.5, "module": 1.0}), {}]
        answers(engine, [(ids_of(30, 4), row) for row in asked])
    assert all(ref() is not None for ref in kept)
    detach_factors(model, "gone")
    detach(model, "module")
    gc.collect()
    assert [ref for ref in kept if ref() is not None] == []


def test_adapters_come_and_go_while_another_thread_generates() -> None:
    model = with_factors(varied(head_dim=16))
    engine = Engine(model)
    asked = [(ids_of(8, n), row) for n, row in enumerate(ROWS)]
    wanted = [by_itself(model, ids, row, 8) for ids, row in asked]
    more = [factors(model, 3, seed) for seed in range(3)]
    over, found = threading.Event(), list[list[int]]()

    def generate() -> None:
        while not over.is_set():
            found[:] = answers(engine, asked)
            if found != wanted:
                return

    thread = threading.Thread(target=generate)
    thread.start()
    try:
        for _ in range(5):
            for seed, given in enumerate(more):
                with model_lock(model):
                    attach_factors(model, f"new{seed}", given)
                own = engine.wait(engine.submit(Request([5, 6], 3, adapters=(f"new{seed}", "a"))))
                assert len(own.ids) == 3
                with model_lock(model):
                    detach_factors(model, f"new{seed}")
    finally:
        over.set()
        thread.join()
    assert found == wanted


def test_a_base_request_on_a_model_with_adapters_is_the_base_bit_for_bit() -> None:
    plain, model = varied(head_dim=16), with_factors(varied(head_dim=16))
    prompts = [ids_of(20, 1), ids_of(3, 2)]
    bare = in_passes(plain, [{}, {}], prompts, [15])
    assert all(torch.equal(a, b) for a, b in zip(in_passes(model, [{}, {}], prompts, [15]), bare, strict=True))
