"""Routers of steps: each token is that of whole passes with the weights of its step."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from graftlm.data.sources.formats import Message
from graftlm.generation.answer import answer
from graftlm.generation.engine import Engine
from graftlm.generation.requests import Request
from graftlm.generation.sampling import Sampling
from graftlm.model.registry import attachment
from graftlm.routing.base import RouterConfig
from graftlm.routing.embedding import embedding
from graftlm.routing.routers.centroids import CentroidsConfig
from graftlm.routing.routers.elrea import ElreaConfig
from graftlm.routing.routers.in_turn import InTurnConfig
from graftlm.routing.routers.mean_logits import MeanLogitsConfig
from graftlm.routing.routing import Routing
from graftlm.serve.limits import Limits
from graftlm.serve.server import Options, make_service
from tests.errors import raises
from tests.generation.adapters import base
from tests.routing.libraries import TOKENIZER, in_another_gauge, logits, pool_of, random_library

IDS = [5, 17, 44, 90, 8, 201, 33]
NAMES = ("a", "b", "c")


@pytest.fixture
def rows(tmp_path: Path) -> dict[str, str]:
    found = {}
    for name in NAMES:
        file = tmp_path / f"{name}.jsonl"
        lines = [json.dumps({"prompt": f"{name * 9} {n}", "completion": "yes"}) for n in range(3)]
        file.write_text("\n".join(lines) + "\n")
        found[name] = str(file)
    return found


def config_of(kind: str, rows: dict[str, str], names: Sequence[str] = NAMES) -> RouterConfig:
    given = {name: rows[name] for name in names}
    return {
        "in-turn": InTurnConfig(),
        "in-turn-of-2": InTurnConfig(every=2),
        "mean-logits": MeanLogitsConfig(),
        "centroids": CentroidsConfig(rows=given, temperature=1.0),
        "elrea": ElreaConfig(rows=given, columns=2),
        "centroids-each": CentroidsConfig(rows=given, every=1),
    }[kind]


SLOW = ("in-turn-of-2", "centroids-each", "elrea")
KINDS = ["in-turn", "mean-logits", "centroids", *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW)]


def gradient(router: Any, ids: Sequence[int]) -> torch.Tensor:
    """The gradient of each weight of a plain base, multiplied by A^T."""
    model, parts = base(), []
    for site in router.gradients.A:
        model.get_submodule(site).weight.requires_grad_()
    lp = model(torch.tensor([list(ids)])).logits[0, :-1].log_softmax(1)
    (-lp[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].mean()).backward()
    for site, A in router.gradients.A.items():
        parts.append((model.get_submodule(site).weight.grad @ A.T).flatten())
    return torch.cat(parts) / torch.cat(parts).norm()


def by_hand(routing: Routing, kind: str, count: int) -> list[int]:
    """Greedy, each token by whole passes of the model without a cache."""
    pool, ids = routing.pool, list(IDS)

    def under(weights: dict[str, float], text: Sequence[int]) -> torch.Tensor:
        with pool.acquire(weights) as lease:
            return logits(pool.model, text, lease.adapters)[-1]

    for step in range(count):
        if kind.startswith("in-turn"):
            found = under({NAMES[step // (2 if kind == "in-turn-of-2" else 1) % 3]: 1.0}, ids)
        elif kind == "elrea":
            elrea: Any = routing._now().router
            u = gradient(elrea, IDS)
            cosines = torch.nn.functional.cosine_similarity(u[None], elrea.means).double()
            shares = ((cosines - cosines.mean()) / cosines.std(correction=0)).softmax(0).tolist()
            found = torch.stack([w * under({name: 1.0}, ids) for name, w in zip(NAMES, shares, strict=True)]).sum(0)
        elif kind == "mean-logits":
            found = torch.stack([under({name: 1.0}, ids) for name in NAMES]).mean(0)
        else:
            config: Any = routing.config
            router: Any = routing._now().router
            centroids = router.near
            known = embedding(pool.model, ids[: len(ids) - step % config.every], {}) - centroids.center
            cosines = torch.nn.functional.cosine_similarity(known[None], centroids.centroids)
            shares = (cosines / config.temperature).softmax(0).tolist()
            found = under(dict(zip(NAMES, shares, strict=True)), ids)
        ids.append(int(found.argmax()))
    return ids[len(IDS) :]


def answered(routing: Routing, count: int = 7, **more: Any) -> list[int]:
    ((_, generation),) = routing.step_engine().run([Request(IDS, count, **more)])
    assert generation.error is None
    return generation.ids


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_is_that_of_whole_passes(tmp_path: Path, rows: dict[str, str], kind: str) -> None:
    routing = Routing(pool_of(random_library(*NAMES), tmp_path), TOKENIZER, config_of(kind, rows))
    assert routing.grain == "step"
    found = answered(routing)
    assert found == by_hand(routing, kind, 7)
    assert routing.pool.counts().leased == 0
    same = {"order": {name: random_library(*NAMES)[name] for name in ("c", "a", "b")}}
    same["gauge"] = in_another_gauge(random_library(*NAMES))  # type: ignore[assignment]
    for folder, library in same.items():
        other = Routing(pool_of(library, tmp_path / folder), TOKENIZER, config_of(kind, rows))
        assert answered(other) == found


@pytest.mark.parametrize("kind", KINDS)
def test_one_adapter_is_that_adapter(tmp_path: Path, rows: dict[str, str], kind: str) -> None:
    routing = Routing(pool_of(random_library("b"), tmp_path), TOKENIZER, config_of(kind, rows, "b"))
    engine, sampling = Engine(routing.pool.model), Sampling(temperature=1.0, seed=4)
    with routing.pool.acquire("b") as lease:
        for how in ({}, {"sampling": sampling}, {"stop_ids": (answered(routing)[3],)}):
            alone = engine.wait(engine.submit(Request(IDS, 7, adapters=lease.adapters, **how)))
            assert answered(routing, **how) == alone.ids
    ((_, generation),) = routing.step_engine().run([Request(IDS, 3, logprobs=1)])
    assert [each.likeliest[0][0] for each in generation.logprobs] == generation.ids


def test_gradients_are_those_of_the_weights_in_a_projection(tmp_path: Path, rows: dict[str, str]) -> None:
    routing = Routing(pool_of(random_library(*NAMES), tmp_path), TOKENIZER, config_of("elrea", rows))
    router: Any = routing._now().router
    assert torch.allclose(router.gradients.of(IDS), gradient(router, IDS), atol=1e-5)
    assert not attachment(routing.pool.model).factors
    ids = routing.library.renderer.prompt([Message("user", "bbbbbbbbb 7")]).tolist()
    assert NAMES[int(router.shares(ids).argmax())] == "b"


def test_answers_of_text_and_what_no_request_can_name(tmp_path: Path) -> None:
    pool = pool_of(random_library(*NAMES), tmp_path)
    routing = Routing(pool, TOKENIZER, InTurnConfig())
    text = answer(
        pool.model, TOKENIZER, "hello", lease=routing.before(), engine=routing.step_engine(), max_new_tokens=6
    )
    assert isinstance(text, str)
    with raises("recipe/router-of-steps", "in-turn"):
        routing.route(IDS)
    with raises("recipe/router-of-steps", "mean-logits"):
        make_service(base(), TOKENIZER, None, Options(router=MeanLogitsConfig()), Limits())
    with raises("request/no-prompt-logprobs"):
        answered(routing, prompt_logprobs=0)
