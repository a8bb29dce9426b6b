"""Beginnings of requests that ended are used again, and never by a request that would compute other ones."""

from typing import Any

import pytest
import torch

from graftlm.deltas.lora import LoraConfig
from graftlm.deltas.prefix import PrefixConfig
from graftlm.generation import engine as engine_module
from graftlm.generation.attention import Cache
from graftlm.generation.engine import Engine
from graftlm.generation.prefix_store import PrefixStore
from graftlm.generation.requests import Request
from graftlm.model.attach import attach, detach
from graftlm.model.registry import parameters_of
from graftlm.testing.deltas import move
from tests.generation.adapters import base

START = [(7 * n * n + 5 * n + 11) % 300 for n in range(60)]
ASKED = [[*START, 9, 14], [*START, 9, 200, 31], [*START[:40], 77, 78]]


def with_adapters(*seeds: int, config: Any = None) -> Any:
    model = base()
    for seed in seeds:
        attach(model, config or LoraConfig(r=4, alpha=8), name=f"a{seed}", seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in parameters_of(model, f"a{seed}"):
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model


def answer(engine: Engine, ids: list[int], adapters: Any = ("a1",), count: int = 5) -> list[int]:
    return engine.wait(engine.submit(Request(ids, count, adapters=adapters))).ids


def fresh(model: Any, ids: list[int], adapters: Any = ("a1",), count: int = 5) -> list[int]:
    return answer(Engine(model, prepack=False), ids, adapters, count)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each piece of each pass."""
    counts: list[int] = []
    inner = engine_module.pass_over

    def counted(copy: Any, pieces: Any) -> Any:
        counts.extend(len(piece.ids) for piece in pieces)
        return inner(copy, pieces)

    monkeypatch.setattr(engine_module, "pass_over", counted)
    return counts


@pytest.mark.parametrize("config", [None, PrefixConfig()], ids=["lora", "prefix"])
def test_what_was_computed_before_is_not_computed_again(computed: list[int], config: Any) -> None:
    model = with_adapters(1, config=config)
    expected = [fresh(model, ids) for ids in ASKED]
    assert len({str(each) for each in expected}) == 3
    engine = Engine(model, prefix_tokens=1000, prepack=False)
    for ids, wanted, new in zip([ASKED[0], *ASKED], [expected[0], *expected], [62, 1, 2, 2], strict=True):
        computed.clear()
        assert answer(engine, ids) == wanted
        assert computed == [new, 1, 1, 1, 1]
    computed.clear()
    turn = [*ASKED[0], *expected[0], 5, 6]
    found = answer(engine, turn)
    assert computed[0] == 3, "an answer, too, is the beginning of the next turn: all but its last token was computed"
    assert found == fresh(model, turn)


@pytest.mark.parametrize("other", ["replaced", "weight", "adapter", "order", "base", "learnt", "base changed"])
def test_nothing_stale_is_used(computed: list[int], other: str) -> None:
    """The same tokens with other deltas, weights of deltas, or weights."""
    model = with_adapters(1, 2)
    engine = Engine(model, prefix_tokens=1000, prepack=False)
    adapters: Any = {"a1": 1.0, "a2": 1.0} if other == "order" else ("a1",)
    before = answer(engine, ASKED[0], adapters)
    if other == "replaced":
        detach(model, "a1")
        attach(model, LoraConfig(r=4, alpha=8), name="a1", seed=1)
        move(model, scale=0.5, seed=3)
    elif other in ("learnt", "base changed"):
        with torch.no_grad():
            for parameter in parameters_of(model, "a1") if other == "learnt" else [model.model.layers[0].mlp.up_proj]:
                getattr(parameter, "weight", parameter).mul_(-1.5)
    else:
        adapters = {"weight": {"a1": 0.4}, "adapter": ("a2",), "order": {"a2": 1.0, "a1": 1.0}, "base": ()}[other]
    computed.clear()
    found = answer(engine, ASKED[0], adapters)
    assert computed[0] == len(ASKED[0])
    assert found == fresh(model, ASKED[0], adapters)
    assert found != before or other == "order"


def test_an_adapter_that_comes_leaves_what_others_have(computed: list[int]) -> None:
    model = with_adapters(1)
    engine = Engine(model, prefix_tokens=1000, prepack=False)
    first = answer(engine, ASKED[0])
    attach(model, LoraConfig(r=2), name="new")
    computed.clear()
    assert answer(engine, ASKED[0]) == first
    assert computed[0] == 1
    detach(model, "a1")
    answer(engine, [1, 2, 3], ())
    assert engine._prefixes.held == 0, "of a delta that is gone nothing is kept"


def test_a_request_that_wants_its_prompt_s_log_probabilities_computes_them(computed: list[int]) -> None:
    model = with_adapters(1)
    engine = Engine(model, prefix_tokens=1000, prepack=False)
    answer(engine, ASKED[0])
    computed.clear()
    one = engine.wait(engine.submit(Request(ASKED[0], 2, adapters=("a1",), prompt_logprobs=0)))
    assert computed[0] == len(ASKED[0])
    assert len(one.prompt_logprobs) >= len(ASKED[0]) - 1


def test_an_engine_keeps_nothing_unless_it_is_said(computed: list[int]) -> None:
    engine = Engine(with_adapters(1), prepack=False)
    answer(engine, ASKED[0])
    computed.clear()
    answer(engine, ASKED[0])
    assert computed[0] == len(ASKED[0])
    assert engine._prefixes.held == 0


def test_what_is_kept_gives_way_to_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    model = base()
    engine = Engine(model, prefix_tokens=200, cache_tokens=240, prepack=False)
    inner, most = engine_module.pass_over, [0]

    def counted(copy: Any, pieces: Any) -> Any:
        used = engine._prefixes.held + sum(one.cache.capacity for one in engine._running)
        held = sum(layer[0].shape[1] for one in engine._prefixes._kept for layer in one.cache.layers[:1])
        assert held == engine._prefixes.held
        most[0] = max(most[0], used)
        assert used <= 240 or len(engine._running) == 1
        assert engine._prefixes.held <= 200
        return inner(copy, pieces)

    monkeypatch.setattr(engine_module, "pass_over", counted)
    rows = [[(n * 31 + 7 * k) % 300 for k in range(40 + n)] for n in range(12)]
    for _, generation in engine.run([Request(ids, 30, stop_when=lambda ids: len(ids) == 3) for ids in rows]):
        assert len(generation.ids) == 3
    assert most[0] > 200
    assert 0 < engine._prefixes.held <= 200
    answer(engine, rows[0] * 6, ())
    assert engine._prefixes.held <= 240


def cache(tokens: int) -> Cache:
    made = Cache(tokens)
    made.layer(0, torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))
    return made


def test_the_store_keeps_what_was_used_last_and_of_nested_beginnings_the_longer() -> None:
    store, key = PrefixStore(100), (("a", 1.0, 1),)
    for first in (1, 2, 3):
        store.keep(key, [first] * 30, cache(30), None)
    assert store.longest(key, [1, 1, 5])[1] == 2
    store.keep(key, [4] * 30, cache(30), None)
    assert store.held == 90
    assert [one.tokens[0] for one in store._kept] == [3, 1, 4]
    store.keep(key, [4] * 40, cache(40), None)
    store.keep(key, [4] * 20, cache(20), None)
    assert [(one.tokens[0], len(one.tokens)) for one in store._kept] == [(3, 30), (1, 30), (4, 40)]
    store.keep(key, [5] * 50, cache(50), 60)
    assert [one.tokens[0] for one in store._kept] == [5], "what others leave room for"
    store.keep(key, [6] * 50, cache(90), None)
    assert store.held == 100, "a cache that is mostly empty is copied into one that fits"
    assert store.longest((("a", 0.5, 1),), [5] * 50) == (None, 0)
    store.keep(key, [7] * 101, cache(101), None)
    assert store.held == 100
