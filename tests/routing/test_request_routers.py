"""Routers of requests: nearest adapters and tasks by the base's own vectors, and what is answered then."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from graftlm.data.chat.render import Renderer
from graftlm.data.sources.formats import Message
from graftlm.data.sources.load import load_rows
from graftlm.deltas.dora import DoraConfig
from graftlm.generation.engine import Engine
from graftlm.generation.requests import Request
from graftlm.model.registry import attachment
from graftlm.routing.config import read_router
from graftlm.routing.embedding import embedding
from graftlm.routing.fusion import fused
from graftlm.routing.routers.arrow import ArrowConfig
from graftlm.routing.routers.retriever import RetrieverConfig
from graftlm.routing.routers.tasks import Tasks, TasksConfig
from graftlm.routing.routing import Routing, shown
from tests.errors import raises
from tests.generation.adapters import base, write_adapter
from tests.routing.libraries import TOKENIZER, in_another_gauge, logits, pool_of, random_library

WORDS = {"a": "apple banana cherry", "b": "1 + 2 = 3, 4 * 5", "c": "SELECT name FROM t"}
NAMES = tuple(WORDS)


def file_of(folder: Path, name: str, count: int = 6) -> str:
    """Rows whose prompts have the words of an adapter."""
    file = folder / f"{name}.jsonl"
    rows = [{"prompt": f"{WORDS[name]} {n} {WORDS[name]}", "completion": f"{name}{n}"} for n in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def files(folder: Path, names: Sequence[str] = NAMES) -> dict[str, str]:
    return {name: file_of(folder, name) for name in names}


def ids_of(text: str) -> list[int]:
    found: list[int] = Renderer(TOKENIZER).prompt([Message("user", text)]).tolist()
    return found


def asking(name: str) -> list[int]:
    return ids_of(f"{WORDS[name]} 77 {WORDS[name]}")


# Vectors -------------------------------------------------------------------------------------------------------------


def test_a_vector_is_the_mean_of_the_last_hidden_states() -> None:
    model, ids = base(), asking("a")
    states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0].mean(0)
    assert torch.allclose(embedding(model, ids, {}), states / states.norm(), atol=1e-6)


# Retriever -----------------------------------------------------------------------------------------------------------


def test_a_request_goes_to_the_adapter_whose_rows_are_like_it(tmp_path: Path) -> None:
    routing = Routing(
        pool_of(random_library(*NAMES), tmp_path), TOKENIZER, RetrieverConfig(rows=files(tmp_path), top_k=1)
    )
    for name in NAMES:
        with routing.route(asking(name)) as chosen:
            assert (chosen.shown, chosen.weights) == (name, {name: 1.0})
            assert [one.name for one in chosen.lease.registered] == [name]


def test_the_similarities_are_cosines_with_mean_vectors_less_what_they_have_in_common(tmp_path: Path) -> None:
    routing = Routing(
        pool_of(random_library(*NAMES), tmp_path), TOKENIZER, RetrieverConfig(rows=files(tmp_path), examples=9)
    )
    router: Any = routing._now().router
    means = []
    for name in NAMES:
        rows = load_rows(file_of(tmp_path, name))[0]
        vectors = [embedding(base(), ids_of(row.messages[0].content), {}) for row in rows]
        means.append(torch.stack(vectors).mean(0))
    center = torch.stack(means).mean(0)
    mine = embedding(base(), asking("b"), {}) - center
    wanted = [float(mine @ (mean - center) / mine.norm() / (mean - center).norm()) for mean in means]
    assert router.centroids.similarities(asking("b")).tolist() == pytest.approx(wanted, abs=1e-4)


def test_of_several_adapters_the_outputs_are_averaged(tmp_path: Path) -> None:
    pool = pool_of(random_library(*NAMES), tmp_path)
    routing = Routing(pool, TOKENIZER, RetrieverConfig(rows=files(tmp_path), top_k=2))
    with routing.route(asking("b")) as chosen:
        assert chosen.weights is not None
        assert "b" in chosen.weights
        assert list(chosen.weights.values()) == [0.5, 0.5]
        with pool.acquire(chosen.weights) as lease:
            assert lease.adapters == chosen.lease.adapters
    assert pool.counts().leased == 0


def test_or_the_parameters(tmp_path: Path) -> None:
    library = random_library("a", "b")
    pool = pool_of(library, tmp_path)
    routing = Routing(pool, TOKENIZER, RetrieverConfig(rows=files(tmp_path, "ab"), by="fusion"))
    with routing.route(asking("a")) as chosen:
        assert chosen.shown == "fusion(a:0.5+b:0.5)"
        model = base()
        with torch.no_grad():
            for site in library["a"]:
                A, B = (sum(library[name][site][at] for name in "ab") / 2 for at in (0, 1))
                model.get_submodule(site).weight.add_(B @ A)
        ids = asking("a")
        assert torch.allclose(logits(pool.model, ids, chosen.lease.adapters), logits(model, ids, {}), atol=1e-4)
    assert not attachment(pool.model).factors
    with routing.route(asking("a")) as again:
        assert again.lease.fingerprint == chosen.lease.fingerprint
    other = Routing(
        pool_of(in_another_gauge(library), tmp_path / "gauge"),
        TOKENIZER,
        RetrieverConfig(rows=files(tmp_path, "ab"), by="fusion"),
    )
    with other.route(asking("a")) as moved:
        there = logits(other.pool.model, ids, moved.lease.adapters)
        assert not torch.allclose(there, logits(model, ids, {}), atol=0.1), "a fusion is no function of the changes"


def test_a_fusion_needs_equal_ranks(tmp_path: Path) -> None:
    pool = pool_of(random_library("a", "b", ranks=(2, 3)), tmp_path)
    routing = Routing(pool, TOKENIZER, RetrieverConfig(rows=files(tmp_path, "ab"), by="fusion"))
    with raises("adapter/ranks-differ", "2, 3|3, 2"):
        routing.route(asking("a"))
    assert not attachment(pool.model).factors
    one = random_library("a")
    found = fused(one, {"a": 1.0})
    assert all(torch.equal(found[site][0], A) and torch.equal(found[site][1], B) for site, (A, B) in one["a"].items())


# Tasks ---------------------------------------------------------------------------------------------------------------


def loss_by_hand(model: Any, example: Any, row: Any) -> float:
    """-log p of the answer in nats a token, by one pass of the model's own."""
    ids = example.ids.astype("int64")
    lp = logits(model, ids.tolist(), row).log_softmax(1)
    w = torch.from_numpy(example.weights[1:]).double()
    own = lp[torch.arange(len(ids) - 1), torch.from_numpy(ids[1:])].double()
    return float(-(w * own).sum() / w.sum())


def test_a_task_has_the_adapter_with_the_least_loss_on_its_rows(tmp_path: Path) -> None:
    pool = pool_of(random_library(*NAMES, scale=0.4), tmp_path)
    tasks = {task: file_of(tmp_path, name) for task, name in zip(("fruit", "sums", "queries"), NAMES, strict=True)}
    routing = Routing(pool, TOKENIZER, TasksConfig(tasks=tasks))
    router = routing._now().router
    assert isinstance(router, Tasks)
    best = {}
    for task in tasks:
        examples, losses = routing.library.examples(task, tasks, 20, 0), {}
        for name in (*NAMES, None):
            with pool.acquire({} if name is None else name) as lease:
                losses[name] = sum(loss_by_hand(pool.model, one, lease.adapters) for one in examples) / len(examples)
            assert router.scores[task][name] == pytest.approx(-losses[name], abs=1e-4)
        best[task] = min(losses, key=lambda name: losses[name])
    assert router.best == best
    for task, name in zip(tasks, NAMES, strict=True):
        with routing.route(asking(name)) as chosen:
            assert chosen.shown == (best[task] or "base")
    assert routing.grain == "task"


def test_the_losses_are_those_of_whole_passes(tmp_path: Path) -> None:
    pool = pool_of(random_library("a"), tmp_path)
    routing = Routing(pool, TOKENIZER, TasksConfig(tasks={"t": file_of(tmp_path, "a")}))
    library = routing.library
    examples = library.examples("t", {"t": file_of(tmp_path, "a")}, 3, 0)
    assert len(examples) == 3
    found = library.losses(examples, {"a": 0.5})
    with pool.acquire({"a": 0.5}) as lease:
        wanted = [loss_by_hand(pool.model, one, lease.adapters) for one in examples]
    assert found == pytest.approx(wanted, abs=1e-4)


def test_the_base_may_be_the_best_and_a_score_may_be_anybody_s(tmp_path: Path) -> None:
    asked: list[tuple[str | None, int]] = []

    def score(adapter: str | None, examples: Sequence[Any]) -> float:
        asked.append((adapter, len(examples)))
        return {None: 2.0, "a": 1.0, "b": 0.0}[adapter]

    pool, tasks = pool_of(random_library("a", "b"), tmp_path), {"t": file_of(tmp_path, "a")}
    with Routing(pool, TOKENIZER, TasksConfig(tasks=tasks, examples=4), score=score).route(asking("a")) as chosen:
        assert (chosen.shown, chosen.weights, dict(chosen.lease.adapters)) == ("base", {}, {})
    assert asked == [("a", 4), ("b", 4), (None, 4)]
    with Routing(pool, TOKENIZER, TasksConfig(tasks=tasks, base=False), score=score).route(asking("a")) as chosen:
        assert chosen.shown == "a"


def test_several_tasks_of_one_adapter_add_up(tmp_path: Path) -> None:
    pool, tasks = pool_of(random_library("a", "b"), tmp_path), files(tmp_path)
    config = TasksConfig(tasks=tasks, top_k=3, temperature=0.5)
    best = {"a": "b", "b": "b", "c": "a"}

    def score(adapter: str | None, examples: Sequence[Any]) -> float:
        task = Path(examples[0].where.rpartition(":")[0]).stem
        return float(best[task] == adapter)

    routing = Routing(pool, TOKENIZER, config, score=score)
    router: Any = routing._now().router
    shares = dict(zip(tasks, (router.centroids.similarities(asking("a")) / 0.5).softmax(0).tolist(), strict=True))
    with routing.route(asking("a")) as chosen:
        assert chosen.weights == pytest.approx({"b": shares["a"] + shares["b"], "a": shares["c"]}, abs=1e-5)
        assert chosen.shown.startswith("b:0.")


# Of any router of requests -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["retriever", "tasks"])
def test_one_adapter_is_that_adapter_and_order_and_gauge_change_nothing(kind: str, tmp_path: Path) -> None:
    rows = files(tmp_path)

    def config(names: Sequence[str]) -> Any:
        given = {name: rows[name] for name in names}
        if kind == "retriever":
            return RetrieverConfig(rows=given, top_k=2)
        return TasksConfig(tasks=rows, base=False, top_k=2)

    with Routing(pool_of(random_library("b"), tmp_path / "one"), TOKENIZER, config("b")).route(asking("a")) as chosen:
        assert chosen.weights == pytest.approx({"b": 1.0})
    library = random_library(*NAMES)
    others = {
        "same": library,
        "order": {name: library[name] for name in ("c", "a", "b")},
        "gauge": in_another_gauge(library),
    }
    found = []
    for folder, each in others.items():
        with Routing(pool_of(each, tmp_path / folder), TOKENIZER, config(NAMES)).route(asking("b")) as chosen:
            found.append(chosen.weights)
    assert found[1] == pytest.approx(found[0], abs=1e-6)
    assert found[2] == pytest.approx(found[0], abs=1e-6)


def test_adapters_without_factors_are_chosen_as_any_other(tmp_path: Path) -> None:
    pool = pool_of(random_library("a"), tmp_path)
    pool.register("b", write_adapter(tmp_path / "dora", 3, DoraConfig(r=2)))
    routing = Routing(pool, TOKENIZER, RetrieverConfig(rows=files(tmp_path, "ab"), top_k=1))
    with routing.route(asking("b")) as chosen:
        engine = Engine(pool.model)
        said = engine.wait(engine.submit(Request(asking("b"), 4, adapters=chosen.lease.adapters))).ids
        with pool.acquire("b") as lease:
            assert said == engine.wait(engine.submit(Request(asking("b"), 4, adapters=lease.adapters))).ids


def test_rows_that_are_missing_are_named(tmp_path: Path) -> None:
    pool = pool_of(random_library("a", "b"), tmp_path)
    with raises("recipe/no-rows-for-router", "'b'"):
        Routing(pool, TOKENIZER, RetrieverConfig(rows=files(tmp_path, "a")))
    with raises("recipe/no-rows-for-router", "tasks"):
        Routing(pool, TOKENIZER, TasksConfig())


def test_a_router_is_a_name_or_a_file(tmp_path: Path) -> None:
    assert read_router("arrow") == ArrowConfig()
    file = tmp_path / "router.yaml"
    file.write_text("name: retriever\ntop_k: 2\nrows: {a: a.jsonl}\n")
    assert read_router(str(file)) == RetrieverConfig(top_k=2, rows={"a": "a.jsonl"})
    file.write_text("name: arrow\ntop-k: 2\n")
    with raises("recipe/unknown-key", "top_k"):
        read_router(str(file))
    with raises("recipe/unknown-router", "'arrow'"):
        read_router("arow")


def test_weights_in_one_line() -> None:
    assert shown({}) == "base"
    assert shown({"a": 1.0}) == "a"
    assert shown({"a": 0.5}) == "a:0.5"
    assert shown({"a": 0.25, "c": 0.5, "b": 0.25}) == "c:0.5+a:0.25+b:0.25"
