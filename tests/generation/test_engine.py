"""The engine: each request in any company is as if it were alone, and nothing of it stays behind."""

import gc
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from graftlm.deltas import METHODS
from graftlm.generation import engine as engine_module
from graftlm.generation.attention import Cache
from graftlm.generation.engine import Engine
from graftlm.generation.forward_pass import Piece
from graftlm.generation.requests import Generation, Request
from graftlm.generation.sampling import Sampling
from graftlm.model.attach import attach, detach
from graftlm.model.modes import activate, by_row
from graftlm.model.registry import trainable
from graftlm.testing.deltas import move, tiny_config
from tests.architectures import build
from tests.errors import raises
from tests.generation.adapters import spread
from tests.generation.test_generate import by_hand, prompts, varied

pytestmark = pytest.mark.versions

FAMILIES = {
    "llama": {"head_dim": 16},  # whose attention our kernel computes
    "gpt2": {},
    "gemma2": {"sliding_window": 6},
    "gemma3_text": {"sliding_window": 6},
    "gpt_oss": {"sliding_window": 6},
    "mistral": {"sliding_window": 6, "head_dim": 16},
    "mixtral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "olmo2": {},
    "gptj": {},
    "deepseek_v3": {},
}

OWN_ATTENTION = "none of its layers calls attention through transformers' interface"


def greedy(engine: Engine, asked: Sequence[Sequence[int]], count: int = 10, **more: Any) -> list[list[int]]:
    found = dict(engine.run([Request(ids, count, **more) for ids in asked]))
    assert sorted(found) == list(range(len(asked))), "each request is answered once"
    return [found[number].ids for number in range(len(asked))]


def long_prompts(count: int) -> list[list[int]]:
    torch.manual_seed(5)
    return [torch.randint(3, 300, (int(torch.randint(1, 45, ())),)).tolist() for _ in range(count)]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_transformers(family: str) -> None:
    """Equal up to the first position where the two best logits are within 1e-4, and such positions are rare."""
    model = spread(build(family, **FAMILIES[family]))
    asked, close, compared = long_prompts(50), 0, 0
    engine = Engine(model, max_requests=7, step_tokens=48)
    # GPT-J's attention came to transformers' interface after the oldest version that we support
    own_attention = "GPTJ_ATTENTION_CLASSES" in vars(sys.modules[type(model).__module__])
    assert engine.reason == (OWN_ATTENTION if own_attention else "")
    for ids, found in zip(asked, greedy(engine, asked, 8), strict=True):
        out = model.generate(
            torch.tensor([ids]), max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        wanted = out.sequences[0, len(ids) :].tolist()
        for at, (mine, theirs) in enumerate(zip(found, wanted, strict=True)):
            first, second = out.logits[at][0].topk(2).values.tolist()
            compared += 1
            if first - second < 1e-4:
                close += 1
                break
            assert mine == theirs, (ids, at)
    assert compared > 350
    assert close <= 0.005 * compared


@pytest.mark.parametrize("step_tokens", [1, 5, 16])
def test_a_prompt_may_be_read_in_parts(step_tokens: int) -> None:
    model, asked = varied(), long_prompts(6)
    assert greedy(Engine(model, step_tokens=step_tokens), asked) == greedy(Engine(model), asked)


def test_a_beginning_that_several_requests_share_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, computed = varied(head_dim=16), list[Piece]()
    pass_over = engine_module.pass_over
    monkeypatch.setattr(
        engine_module, "pass_over", lambda copy, pieces: computed.extend(pieces) or pass_over(copy, pieces)
    )
    root = long_prompts(9)[3] * 4
    asked = [root, root, [*root, 5, 6], [*root[:40], 7], root]
    assert len(root) > 60
    assert greedy(Engine(model, step_tokens=50), asked, 4) == [by_hand(model, ids, [], 4) for ids in asked]
    own = len(root) + 1 + 2 + 1 + 1  # of the others what is their own: the last token at least
    assert sum(len(piece.ids) for piece in computed) == own + 3 * len(asked)


def test_a_request_goes_on_alone_when_the_one_with_its_beginning_is_cancelled() -> None:
    model = varied()
    root = list(range(3, 103))
    engine = Engine(model, step_tokens=20)
    first, second = (engine.submit(Request(ids, 5)) for ids in (root, [*root, 9]))
    next(iter(engine.stream(Request([5], 1))))  # one step: a part of the root is computed
    first.cancel()
    assert engine.wait(second).ids == by_hand(model, [*root, 9], [], 5)
    assert first.finish == "cancelled"


# Adapters ------------------------------------------------------------------------------------------------------------

SEVERAL = ("lora", "ia3", "prefix", "prompt", "houlsby", "full", "dora")


def with_deltas(methods: Sequence[str] = SEVERAL) -> Any:
    model = varied(head_dim=16)
    for name in methods:
        config = METHODS[name].config
        attach(model, config(method=name), name=f"the-{name}", seed=1)
    return move(model, scale=0.3)


def test_requests_have_deltas_of_their_own() -> None:
    model, asked = with_deltas(), long_prompts(3)
    names = [f"the-{method}" for method in SEVERAL]
    rows: list[Any] = [(), *((name,) for name in names), ("the-lora", "the-ia3"), {"the-lora": 0.5}, tuple(names)]
    requests, wanted = [], []
    for row in rows:
        with by_row(model, [row]):
            wanted += [by_hand(model, ids, [], 6) for ids in asked]
        requests += [Request(ids, 6, adapters=row) for ids in asked]
    assert len({tuple(answer) for answer in wanted}) > len(rows), "answers must differ, or this proves little"
    found = dict(Engine(model, max_requests=8, step_tokens=40).run(requests))
    assert [found[number].ids for number in range(len(requests))] == wanted


def test_without_a_choice_the_active_deltas_act() -> None:
    model, ids = with_deltas(("lora", "ia3")), long_prompts(1)[0]
    engine = Engine(model)
    for active in ((), ("the-ia3",), ("the-lora", "the-ia3")):
        activate(model, *active)
        assert greedy(engine, [ids]) == [by_hand(model, ids, [], 10)]


@pytest.mark.parametrize("prefix_tokens", [0, 100])
@pytest.mark.parametrize("method", ["lora", "dora", "oft", "boft", "hra", "shira"])
def test_deltas_may_come_go_and_learn_between_requests(method: str, prefix_tokens: int) -> None:
    model, asked = varied(), long_prompts(3)
    engine = Engine(model, prefix_tokens=prefix_tokens)
    base = greedy(engine, asked)
    attach(model, tiny_config(method))
    answers = [base]
    for seed in (1, 2):
        move(model, scale=0.3, seed=seed)
        answers.append(greedy(engine, asked))
        assert answers[-1] == [by_hand(model, ids, [], 10) for ids in asked]
        assert answers[-1] not in answers[:-1]
    detach(model)
    assert greedy(engine, asked) == base
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    assert greedy(engine, asked) == [by_hand(model, ids, [], 10) for ids in asked] != base


@pytest.mark.parametrize("method", ["lora", "loha", "shira", "norm-tuning"])
def test_what_deltas_make_of_weights_is_computed_once_a_run(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = with_deltas((method,)), long_prompts(3)
    wanted = [by_hand(model, ids, [], 6) for ids in asked]
    delta = METHODS[method].delta
    name = next(name for name in ("matrix", "factors", "effective") if name in vars(delta))
    calls: list[Any] = []
    function = getattr(delta, name)
    monkeypatch.setattr(delta, name, lambda self, *args: calls.append(self) or function(self, *args))
    engine = Engine(model)
    for _ in range(2):
        calls.clear()
        assert greedy(engine, asked, 6) == wanted
        assert 0 < len(calls) <= 3 * len(set(map(id, calls))), "not at every step"


def test_dropout_is_off_and_nothing_gets_a_gradient() -> None:
    model = varied()
    attach(model, METHODS["lora"].config(method="lora", dropout=0.9))
    move(model, scale=0.3).train()
    asked = long_prompts(2)
    found = greedy(Engine(model), asked)
    assert all(module.training for module in model.modules())
    model.eval()
    assert found == [by_hand(model, ids, [], 10) for ids in asked]
    assert all(parameter.grad is None for parameter in trainable(model).values())


def test_a_request_whose_adapter_goes_or_is_replaced_fails_and_the_others_go_on() -> None:
    """The cache of a request was computed with the old one: an answer of both would belong to neither."""
    for replace_it in (False, True):
        model = with_deltas(("lora", "ia3"))
        engine = Engine(model)
        ids = list(range(3, 60))
        mine, waiting, other = (
            engine.submit(Request(ids, 20, adapters=(name,))) for name in ("the-lora", "the-lora", "the-ia3")
        )
        next(iter(engine.stream(Request([5], 1, adapters=()))))  # one step
        detach(model, "the-lora")
        if replace_it:
            attach(model, METHODS["lora"].config(method="lora"), name="the-lora")
            move(model, scale=0.3, seed=9)
        for generation in (mine, waiting):
            with raises("target/delta-changed"):
                engine.wait(generation)
        if not replace_it:
            activate(model, "the-ia3")
            assert engine.wait(other).ids == by_hand(model, ids, [], 20)
            continue
        activate(model, "the-lora")
        assert greedy(engine, [ids]) == [by_hand(model, ids, [], 10)], "nothing of the old one is shared"


def test_an_adapter_that_is_not_there_is_refused_at_once() -> None:
    engine = Engine(with_deltas(("lora", "prefix")))
    with raises("target/no-such-delta"):
        engine.submit(Request([5], 1, adapters=("the-lore",)))
    with raises("target/invalid-weight"):
        engine.submit(Request([5], 1, adapters={"the-prefix": 0.5}))
    with pytest.raises(ValueError, match="one id at least"):
        engine.submit(Request([], 1))


# Company -------------------------------------------------------------------------------------------------------------


def requests_of_many_kinds(count: int) -> list[Request]:
    asked = long_prompts(count)
    kinds = [
        {"sampling": Sampling()},
        {"sampling": Sampling(temperature=1.0)},
        {"sampling": Sampling(temperature=1.5, top_k=20)},
        {"sampling": Sampling(temperature=0.8, top_p=0.9, min_p=0.01)},
        {"sampling": Sampling(repetition_penalty=1.3)},
        {"stop_ids": tuple(range(3, 40))},
        {"stop_when": lambda ids: sum(ids) % 7 == 0},
    ]
    found = []
    for number, ids in enumerate(asked):
        kind: dict[str, Any] = dict(kinds[number % len(kinds)])
        if "sampling" in kind and kind["sampling"].temperature:
            settings = kind["sampling"]
            kind["sampling"] = Sampling(
                settings.temperature, settings.top_k, settings.top_p, settings.min_p, 1.0, number
            )
        adapters = ((), ("the-lora",), ("the-ia3", "the-lora"))[number % 3]
        found.append(Request(ids, 1 + number % 9, adapters=adapters, **kind))
    return found


def test_every_request_in_company_is_itself_alone() -> None:
    """In float64: what is drawn must not depend on how products are rounded."""
    model = with_deltas(("lora", "ia3")).double()
    requests = requests_of_many_kinds(42)
    together = dict(Engine(model, max_requests=6, step_tokens=30).run(requests))
    for number, request in enumerate(requests):
        engine = Engine(model)
        alone = engine.wait(engine.submit(request))
        assert (together[number].ids, together[number].finish) == (alone.ids, alone.finish)


def hammer(model: Any, count: int, threads: int = 8) -> tuple[list[Request], list[Generation], Engine]:
    """Requests by several threads, a part of them cancelled in the middle."""
    requests = requests_of_many_kinds(count)
    engine = Engine(model, max_requests=6, step_tokens=30)
    done: list[Any] = [None] * count
    failures: list[BaseException] = []

    def work(own: range) -> None:
        try:
            for number in own:
                if number % 5 == 4:
                    stream = engine.stream(requests[number])
                    next(stream)
                    stream.close()
                elif number % 5 == 3:
                    done[number] = engine.submit(requests[number])
                    done[number].cancel()
                else:
                    done[number] = engine.wait(engine.submit(requests[number]))
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(range(n, count, threads),)) for n in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures
    return requests, done, engine


def check_hammered(model: Any, requests: Sequence[Request], done: Sequence[Any], engine: Engine) -> None:
    alone = Engine(model)
    for number, (request, generation) in enumerate(zip(requests, done, strict=True)):
        if number % 5 < 3:
            assert generation.ids == alone.wait(alone.submit(request)).ids, number
        elif generation is not None:
            assert generation.finish in ("cancelled", "stop", "length")
    assert not engine._running
    assert not engine._queue


def test_threads_share_an_engine() -> None:
    model = with_deltas(("lora", "ia3")).double()
    check_hammered(model, *hammer(model, 80))
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) is Cache], "caches are gone with their requests"


@pytest.mark.slow
def test_a_thousand_requests_leave_nothing_behind() -> None:
    model = with_deltas(("lora", "ia3")).double()
    hammer(model, 200)
    gc.collect()
    before = resident()
    requests, done, engine = hammer(model, 1000)
    gc.collect()
    assert resident() - before < 30 * 2**20
    check_hammered(model, requests, done, engine)


def resident() -> int:
    """Bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_two_engines_of_one_model_in_two_threads_while_it_is_called_directly() -> None:
    model = with_deltas(("lora", "prefix")).double()
    activate(model, "the-lora")
    ids = torch.tensor([long_prompts(4)[2]])
    before, implementation = model(ids).logits, model.config._attn_implementation
    asked = long_prompts(4)  # by the random numbers of all threads
    wanted = greedy(Engine(model), asked)
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(greedy(Engine(model), asked))) for _ in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert torch.equal(model(ids).logits, before), "the model itself is not touched"
        assert model.config._attn_implementation == implementation
    for thread in threads:
        thread.join()
    assert found == [wanted, wanted]


def test_two_models_in_two_threads() -> None:
    models = [varied("llama"), varied("gemma2")]
    asked = long_prompts(5)  # by the random numbers of all threads
    wanted = [greedy(Engine(model), asked) for model in models]
    found: dict[int, Any] = {}

    def work(number: int) -> None:
        found[number] = greedy(Engine(models[number]), asked)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[0], found[1]] == wanted


# Ends ----------------------------------------------------------------------------------------------------------------


def test_a_deadline_ends_an_answer_as_it_is() -> None:
    engine = Engine(varied())
    late = engine.submit(Request([5, 6], 10_000, deadline=time.monotonic() + 0.3))
    never = engine.submit(Request([5, 6], 5, deadline=time.monotonic() - 1))
    assert engine.wait(late).finish == "deadline"
    assert 0 < len(late.ids) < 10_000
    assert engine.wait(never).finish == "deadline"
    assert never.ids == []


def test_what_is_cancelled_is_free_at_once() -> None:
    engine = Engine(varied())
    stream = engine.stream(Request([5, 6], 1000))
    next(stream)
    cache = weakref.ref(engine._running[0].cache)
    stream.close()
    gc.collect()
    assert cache() is None
    assert not engine._running


def test_a_run_that_is_left_early_is_cancelled() -> None:
    engine = Engine(varied())
    for _ in engine.run([Request(ids, 50 * (1 + n)) for n, ids in enumerate(long_prompts(4))]):
        break
    gc.collect()
    assert not engine._running
    assert not engine._queue


def test_a_pass_that_fails_reaches_everybody_in_it_and_the_engine_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = varied(), long_prompts(3)
    engine = Engine(model)

    def fails(*_: Any) -> Any:
        raise RuntimeError("out of memory, say")

    generations = [engine.submit(Request(ids, 4)) for ids in asked]
    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "pass_over", fails)
        for generation in generations:
            with pytest.raises(RuntimeError, match="out of memory, say"):
                engine.wait(generation)
    assert greedy(engine, asked) == [by_hand(model, ids, [], 10) for ids in asked]


def test_a_request_that_cannot_begin_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = varied()
    engine = Engine(model)
    before = engine_module.keys_before

    def fails(model: Any, row: Any) -> Any:
        if engine._running:
            raise RuntimeError("no place for it")
        return before(model, row)

    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "keys_before", fails)
        good, bad = engine.submit(Request([6], 4)), engine.submit(Request([5], 4))
        assert engine.wait(good).ids == by_hand(model, [6], [], 4)
        with pytest.raises(RuntimeError, match="no place"):
            engine.wait(bad)


def test_a_function_of_a_caller_that_fails_ends_its_own_request_alone() -> None:
    def fails(_: Any) -> bool:
        raise KeyError("of the caller")

    model = varied()
    engine = Engine(model)
    bad, good = engine.submit(Request([5], 4, stop_when=fails)), engine.submit(Request([6], 4))
    assert engine.wait(good).ids == by_hand(model, [6], [], 4)
    with pytest.raises(KeyError):
        engine.wait(bad)


def test_caches_hold_no_more_than_they_may() -> None:
    model, asked = varied(), long_prompts(12)
    engine = Engine(model, cache_tokens=60)
    generations = [engine.submit(Request(ids, 10)) for ids in asked]
    while any(generation.finish is None for generation in generations):
        engine.wait_any([generation for generation in generations if generation.finish is None])
        used = [one.cache.capacity for one in engine._running]
        assert sum(used) <= 60 or len(used) == 1
    assert [each.ids for each in generations] == [by_hand(model, ids, [], 10) for ids in asked]


# transformers' own generate ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mamba2", "gpt_neo", "bloom"])
def test_models_that_do_not_fit_are_run_by_transformers_and_it_is_said(kind: str) -> None:
    model = spread(build(kind))
    engine = Engine(model)
    assert engine.reason
    asked = long_prompts(5)
    assert greedy(engine, asked, 5) == [by_hand(model, ids, [], 5) for ids in asked]


def test_both_ways_draw_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_deltas(("lora", "ia3")).double()
    requests = requests_of_many_kinds(21)
    ours = dict(Engine(model).run(requests))
    other = Engine(model)
    other.reason = "a test"
    theirs = dict(other.run(requests))
    for number in range(len(requests)):
        assert (ours[number].ids, ours[number].finish) == (theirs[number].ids, theirs[number].finish)


def test_streaming_and_cancelling_work_by_transformers_too() -> None:
    model = spread(build("gpt_neo"))
    engine = Engine(model)
    assert list(engine.stream(Request([5, 6], 6))) == by_hand(model, [5, 6], [], 6)
    late = engine.submit(Request([5, 6], 400, deadline=time.monotonic() + 0.2))
    assert engine.wait(late).finish == "deadline"
    assert len(late.ids) < 400


def test_prompts_of_the_test_differ() -> None:
    assert len({tuple(ids) for ids in [*prompts(), *long_prompts(50)]}) == 57
