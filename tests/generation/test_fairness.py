"""Which request begins next, by simulation: time is counted in passes."""

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import pytest
import torch

from graftlm.deltas.lora import LoraConfig
from graftlm.generation import engine as engine_module
from graftlm.generation.engine import Engine
from graftlm.generation.fairness import ANSWER_COST, PROMPT_COST, FairQueue
from graftlm.generation.requests import Generation, Request
from graftlm.model.attach import attach
from graftlm.testing import tiny_model
from tests.generation.adapters import base


class Clock:
    """An engine whose passes compute nothing; it counts them, and when each request began and ended."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
        self.model = tiny_model()
        for name in ("a", "b", "c"):
            attach(self.model, LoraConfig(r=2, targets=("q_proj",)), name=name)
        self.engine, self.now = Engine(self.model, prepack=False, **settings), 0
        self.tokens = {"a": 0, "b": 0, "c": 0}

        def passed(copy: Any, pieces: Any) -> torch.Tensor:
            self.now += 1
            for piece in pieces:
                self.tokens[next(iter(piece.row))] += len(piece.ids)
            return torch.zeros(sum(piece.predicts for piece in pieces), 300)

        monkeypatch.setattr(engine_module, "pass_over", passed)

    def submit(self, name: str, prompt: int, answer: int) -> Generation:
        ids = [self.now % 300, *[3] * (prompt - 1)]
        return self.engine.submit(Request(ids, answer, adapters=(name,)))

    def latencies(self, name: str, sizes: Sequence[tuple[int, int]], meanwhile: Callable[[], Any]) -> list[int]:
        """Of requests one after the other, each submitted when the one before it ended."""
        found = []
        for prompt, answer in sizes:
            meanwhile()
            start = self.now
            self.engine.wait(self.submit(name, prompt, answer))
            found.append(self.now - start)
        return found


def p95(numbers: list[int]) -> int:
    return sorted(numbers)[int(0.95 * len(numbers))]


def sizes(seed: int, count: int, most_prompt: int = 100, most_answer: int = 20) -> list[tuple[int, int]]:
    random = Random(seed)
    return [(random.randint(1, most_prompt), random.randint(most_answer // 4, most_answer)) for _ in range(count)]


@pytest.mark.parametrize("flood", ["alike", "long prompts", "long answers"])
def test_an_adapter_that_floods_does_not_starve_another(monkeypatch: pytest.MonkeyPatch, flood: str) -> None:
    """The bar: p95 of the latency at most twice what it is alone. 200 requests are there at once, and 20 more each
    time that the other adapter asks."""
    most = {"alike": (100, 20), "long prompts": (600, 20), "long answers": (100, 40)}[flood]
    asked, settings = sizes(1, 40), {"cache_tokens": None, "max_requests": 8, "step_tokens": 128}
    alone = Clock(monkeypatch, **settings).latencies("b", asked, lambda: None)
    clock, numbers = Clock(monkeypatch, **settings), iter(range(10**6))

    def more(count: int) -> None:
        for size in sizes(100 + next(numbers), count, *most):
            clock.submit("a", *size)

    more(200)
    beside = clock.latencies("b", asked, lambda: more(20))
    assert len([one for one in clock.engine._queue if one.row == {"a": 1.0}]) > 100, "the flood did not end"
    print(p95(alone), p95(beside))
    assert p95(beside) <= 2 * p95(alone)


def test_adapters_that_always_wait_get_the_same_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many requests each has, and however large they are."""
    clock = Clock(monkeypatch, max_requests=4)
    for name, count, size in (("a", 400, (10, 20)), ("b", 100, (200, 20)), ("c", 100, (40, 40))):
        for _ in range(count):
            clock.submit(name, *size)
    last = clock.submit("b", 1, 1)
    while clock.now < 1200:
        clock.engine._take_turn(last)
    waiting = {name for each in clock.engine._queue for name in each.row}
    assert waiting == {"a", "b", "c"}
    costs = [clock.engine._queue.cost((name,)) for name in waiting]
    bound = 4 * (PROMPT_COST * 200 + ANSWER_COST * 20) * 2  # the paper's, of two backlogged clients: twice a batch
    assert max(costs) - min(costs) <= bound
    assert min(costs) > 2 * bound, "long enough to tell"


def test_a_large_request_is_not_passed_over_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    """It needs all of the memory, while small ones of two other adapters come without an end."""
    clock = Clock(monkeypatch, cache_tokens=600)
    for _ in range(20):
        clock.submit("a", 50, 20)
        clock.submit("b", 50, 20)
    large = clock.submit("c", 500, 90)
    for _ in range(400):
        clock.submit("a", 50, 20)
        clock.submit("b", 50, 20)
        clock.engine._take_turn(large)
        if large.ids:
            break
    assert large.ids


def test_long_prompts_that_are_being_read_let_a_short_one_of_another_adapter_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch, step_tokens=50)
    several = [clock.submit("a", 500, 5) for _ in range(4)]
    clock.engine._take_turn(several[0])
    start, one = clock.now, clock.submit("b", 20, 5)
    clock.engine.wait(one)
    assert clock.now - start == 5
    assert not several[0].ids


def test_idle_time_is_no_credit() -> None:
    """And nobody gets rid of a debt by being away."""
    queue = FairQueue()

    def ask(name: str) -> Generation:
        generation = Generation(Request([1], 1), None, {name: 1.0}, ((name, 1.0, 1),))  # type: ignore[arg-type]
        queue.append(generation)
        return generation

    def begin() -> Generation:
        first = queue.first()
        queue.pop(first)
        return first

    a = [ask("a") for _ in range(4)]
    assert begin() is a[0]
    queue.charge(a[0], prompt=100, answer=10)
    assert queue.cost(("a",)) == 100 * PROMPT_COST + 10 * ANSWER_COST
    b = [ask("b") for _ in range(2)]
    assert queue.cost(("b",)) == queue.cost(("a",)), "as much as the least of those that wait"
    assert queue.first() is a[1], "of equals the one that has waited longest"
    queue.charge(begin(), prompt=1)
    assert [begin(), begin()] == b, "within an adapter in order of arrival"
    queue.charge(b[0], prompt=1000)
    c = ask("c")
    assert queue.cost(("c",)) == queue.cost(("a",))
    assert [begin(), begin(), begin()] == [a[2], a[3], c]
    ask("b")
    assert queue.cost(("b",)) > 1000, "its own counter is the larger one"
    ask("d")
    queue.remove(list(queue))
    queue.charge(b[0], answer=500)
    ask("e")
    assert queue.cost(("e",)) in (queue.cost(("b",)), queue.cost(("d",))), "of an empty queue: who left it last"


def test_counters_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = FairQueue()
    for number in range(3000):
        name = f"a{number}"
        generation = Generation(Request([1], 1), None, {name: 1.0}, ((name, 1.0, 1),))  # type: ignore[arg-type]
        queue.append(generation)
        queue.pop(generation)
        queue.charge(generation, prompt=5)
    assert len(queue._costs) <= 1100


def test_turns_change_no_answer() -> None:
    model = base()
    for seed, name in enumerate(("a", "b")):
        attach(model, LoraConfig(r=2), name=name, seed=seed)
    random = Random(3)
    rows = [([random.randrange(300) for _ in range(random.randint(1, 30))], random.choice("ab")) for _ in range(24)]
    engine = Engine(model, max_requests=3, step_tokens=16, prepack=False)
    found = dict(engine.run([Request(ids, 6, adapters=(name,)) for ids, name in rows]))
    for number, (ids, name) in enumerate(rows):
        own = Engine(model, prepack=False)
        assert found[number].ids == own.wait(own.submit(Request(ids, 6, adapters=(name,)))).ids
    assert not len(engine._queue)
