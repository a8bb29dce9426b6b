"""Answers that the model gives itself: what is trained of them, and that a run of them is as exact as any other."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import graftlm
import graftlm.rl.rollouts as sampler_module
from graftlm.config.schema import build
from graftlm.data.batches.pack import Example, Group, collate
from graftlm.data.batches.prompts import PromptExample
from graftlm.generation import sampling
from graftlm.generation.engine import Engine
from graftlm.generation.requests import Request
from graftlm.hub.load import load_base
from graftlm.kernels.backend import TORCH
from graftlm.kernels.prepacked import packed_bytes
from graftlm.losses import LOSSES
from graftlm.model.registry import trainable
from graftlm.passes.forward import log_probs
from graftlm.prepare import prepare_data
from graftlm.recipe import Recipe
from graftlm.rl.config import FEEDBACK, score, training_group
from graftlm.rl.rewards import Completion
from graftlm.rl.rollouts import Sampler
from graftlm.testing import save_tiny_base
from graftlm.training.passes import Passes
from graftlm.training.phases import attach_deltas
from graftlm.training.trainer import Trainer
from tests.errors import raises
from tests.training.test_preferences import count_steps, written
from tests.training.test_resume import same, stopping_after
from tests.training.together import together

pytestmark = pytest.mark.usefixtures("without_pictures")

GRPO = {"name": "policy-gradient"}
RLOO = {"name": "policy-gradient", "ratio": "answer", "baseline": "leave-one-out"}

LETTERS = """
def score(completion):
    return sum(c.islower() for c in completion.answer)
"""


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return written(tmp_path / "prompts.jsonl", [{"prompt": f"say a word for {n}"} for n in range(13)])


def scorer(file: Path, source: str = LETTERS) -> dict[str, str]:
    file.write_text(source)
    return {"by": "python", "function": f"{file}:score"}


def recipe(base: Path, rows: Path, loss: Any = "policy-gradient", **sections: dict[str, Any]) -> Recipe:
    tree: dict[str, Any] = {
        "base": {"name": str(base), "dtype": "float32"},
        "data": {"train": str(rows), "held_out": 3},
        "delta": {"method": "lora", "r": 4},
        "loss": loss,
        "rl": {"scorer": scorer(rows.parent / "letters.py"), "samples": 4, "max_new_tokens": 6, "at_once": 6},
        "train": {"steps": 6, "batch_rows": 3, "seed": 3, "learning_rate": 0.01, "save_every": 2},
        "report": {"samples": 1, "answers": 2, "max_new_tokens": 4},
    }
    for name, changes in sections.items():
        tree[name] = {**tree.get(name, {}), **changes} if isinstance(changes, dict) else changes
    return build(Recipe, tree, source="test")


def prepared(made: Recipe) -> Trainer:
    """A trainer of three steps; the deltas are moved from where they start."""
    model, tokenizer = load_base(made.base)
    examples = prepare_data(made, tokenizer).examples
    plan = [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    attach_deltas(made.setup(), model, examples, plan)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return Trainer(made.setup(), model, examples, plan, backend=TORCH)


def sampled(made: Recipe) -> tuple[Any, Trainer, list[Example | Group]]:
    """(model, trainer, the rows of the first step)"""
    trainer = prepared(made)
    (sampler,) = (p for p in trainer.callbacks if isinstance(p, Sampler))
    examples, plan = trainer.examples, trainer.batches
    rows = sampler.rows(trainer.training, 0, lambda n: [examples[i] for i in plan[n]], len(plan))
    return trainer.model, trainer, rows


# What is trained -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [GRPO, "dpo", "supervised", "kto"])
def test_the_very_ids_that_were_generated_are_trained_and_nothing_else(
    base_folder: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch, loss: Any
) -> None:
    """Ids that no tokenizer would make of their text; one answer ends, and one is cut."""
    made = recipe(base_folder, prompts, loss, rl={"samples": 2})
    tokenizer = load_base(made.base).tokenizer
    letters = [tokenizer.convert_tokens_to_ids(c) for c in "the"]
    assert tokenizer("the")["input_ids"] != letters, "the tokenizer would write it otherwise"
    stop = tokenizer.eos_token_id
    answers = [[*letters, stop], [letters[0]] * 6]
    seen: list[list[int]] = []

    class FakeEngine:
        def __init__(self, model: Any, **options: Any) -> None: ...

        def run(self, requests: Sequence[Request]) -> Iterator[tuple[int, Any]]:
            for number, request in enumerate(requests):
                assert stop in request.stop_ids
                seen.append(list(request.ids))
                yield number, SimpleNamespace(ids=answers[len(seen) % 2])

    monkeypatch.setattr(sampler_module, "Engine", FakeEngine)
    _, trainer, rows = sampled(made)
    found = [answer for row in rows for answer in row.answers]
    assert found
    for example in found:
        trained = np.flatnonzero(example.weights)
        begin = int(trained[0])
        assert list(example.ids[:begin]) in seen, "the prompt is what generation saw"
        assert trained.tolist() == list(range(begin, len(example.ids))), "every token of the answer, and no other"
        assert example.ids[begin:].tolist() in answers
        assert set(example.weights[begin:].tolist()) == {1.0}
    assert trainer.training.metrics["cut"] == 0.5
    assert trainer.training.metrics["answer_tokens"] == 5.0
    text = tokenizer.decode(seen[0])
    assert text.endswith("<|im_start|>assistant\n")
    assert text.count("<|im_start|>user") == 1


def test_what_scorers_see(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = written(tmp_path / "rows.jsonl", [{"prompt": f"ask {n}", "completion": f"b{n}"} for n in range(9)])
    made = recipe(base_folder, rows, data={"held_out": 0})
    completions: list[Completion] = []
    monkeypatch.setattr(
        "graftlm.recipe.make_scorer",
        lambda *_, **__: lambda some: completions.extend(some) or [float(len(completions))] * len(some),
    )
    sampled(made)
    assert len(completions) == 12
    for completion in completions:
        number = int(completion.where.rpartition(":")[2]) - 1
        assert (completion.question, completion.reference) == (f"ask {number}", f"b{number}")
        assert completion.answer == completion.answer.strip()
        assert "<|im_end|>" not in completion.answer


def test_the_answers_know_how_likely_they_were(base_folder: Path, prompts: Path) -> None:
    """Against plain logits; and the ratio at the first step of a round is 1."""
    made = recipe(base_folder, prompts, rl={"steps_per_round": 2})
    model, trainer, rows = sampled(made)
    for host in model.modules():
        host.eval()
    for group in rows:
        assert isinstance(group, Group)
        for answer in group.answers:
            ids = torch.from_numpy(answer.ids.astype(np.int64))
            with torch.no_grad():
                plain = model(ids[None]).logits[0].log_softmax(-1)
            trained = torch.from_numpy(np.flatnonzero(answer.weights))
            wanted = plain[trained - 1, ids[trained]]
            assert answer.old_log_probs is not None
            assert (torch.from_numpy(answer.old_log_probs)[trained] - wanted).abs().max() < 1e-5
        pack = collate([group], share=True)
        with Passes().through(model), torch.no_grad():
            assert ((log_probs(model, pack) - pack.old_log_probs).exp() - 1).abs().max() < 1e-5


def test_generation_draws_from_the_distribution_that_is_trained(
    base_folder: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the engine itself computed for each token that it drew is what the training pass computes."""
    made = recipe(base_folder, prompts, rl={"steps_per_round": 2})
    drawn: list[Tensor] = []
    draw = sampling._drawn

    def watched(logits: Tensor, settings: Any, points: Sequence[float]) -> list[int]:
        chosen = draw(logits, settings, points)
        drawn.append(logits.log_softmax(1).gather(1, torch.tensor(chosen)[:, None])[:, 0])
        return chosen

    with monkeypatch.context() as patch:
        patch.setattr(sampling, "_drawn", watched)
        _, _, rows = sampled(made)
    by_generation = torch.cat(drawn)
    for group in rows:
        for answer in group.answers:
            for value in answer.old_log_probs[answer.weights > 0]:  # type: ignore[index]
                assert (by_generation - value).abs().min() < 1e-5


def test_the_gradient_of_a_step_is_that_of_a_plain_loss(base_folder: Path, prompts: Path) -> None:
    made = recipe(base_folder, prompts, train={"clip": 1e9})
    trainer = prepared(made)
    model = trainer.model
    own_gradients: dict[str, Tensor] = {}
    answered: list[Any] = []
    (sampler,) = (p for p in trainer.callbacks if isinstance(p, Sampler))
    rows_of = sampler.rows
    sampler.rows = lambda *a: answered.append(rows_of(*a)) or answered[-1]  # type: ignore[method-assign]

    def keep(*_: Any, **__: Any) -> None:
        own_gradients.update({name: p.grad.clone() for name, p in trainable(model).items() if p.grad is not None})

    trainer.training.optimizer.step = keep  # type: ignore[method-assign]
    trainer.step()
    renderer, wanted = sampler.renderer, torch.tensor(0.0)
    count = sum(len(group.answers) for group in answered[0])
    assert count > 4
    for group in answered[0]:
        rewards = []
        for answer in group.answers:
            ids = answer.ids[answer.weights > 0]
            rewards.append(float(sum(c.islower() for c in renderer.decode(ids.tolist()))))
        mean = sum(rewards) / len(rewards)
        deviation = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
        for answer, reward in zip(group.answers, rewards, strict=True):
            ids = torch.from_numpy(answer.ids.astype(np.int64))
            trained = torch.from_numpy(np.flatnonzero(answer.weights))
            chance = model(ids[None]).logits[0].log_softmax(-1)[trained - 1, ids[trained]]
            wanted = wanted - (reward - mean) / (deviation + 1e-4) * chance.mean() / count
    parameters = trainable(model)
    gradients = torch.autograd.grad(wanted, list(parameters.values()))
    for name, gradient in zip(parameters, gradients, strict=True):
        assert (own_gradients[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max() + 1e-8, name


# Rewards become rows ---------------------------------------------------------------------------------------------


def example(*ids: int) -> Example:
    weights = np.array([0.0] + [1.0] * (len(ids) - 1), np.float32)
    return Example(np.array(ids, np.int32), weights, "f:1")


FOUR = [example(5, n) for n in (10, 11, 12, 13)]


def of(name: str, rewards: Sequence[float | None], **options: Any) -> Any:
    return training_group(LOSSES[name].config(**options), FOUR, rewards)


def test_what_becomes_of_rewards() -> None:
    assert of("supervised", [1.0, 3.0, 3.0, 2.0]) is FOUR[1]
    pair = of("dpo", [1.0, 3.0, 0.5, 2.0])
    assert (pair.answers, pair.pairs) == ((FOUR[1], FOUR[2]), ((0, 1),))
    assert of("kto", [1.0, 3.0, 2.0, 2.0]).scores == (0.0, 1.0)
    assert of("kto", [1.0, 3.0, 2.0, 2.0]).answers == (FOUR[0], FOUR[1])
    assert of("sppo", [1.0, 3.0, 3.0, 0.0]).scores == pytest.approx((1 / 3, 2.5 / 3, 2.5 / 3, 0.0))
    assert of("dro", [1.0, 1.0, 1.0, 1.0]).scores == (1.0, 1.0, 1.0, 1.0)
    found = of("policy-gradient", [1.0, 3.0, 2.0, 6.0], baseline="leave-one-out").scores
    assert found == pytest.approx((1 - 11 / 3, 3 - 3, 2 - 10 / 3, 6 - 2))
    assert of("policy-gradient", [1.0, 3.0, 2.0, 6.0], baseline="mean").scores == pytest.approx((-2, 0, -1, 3))
    large = of("policy-gradient", [1e6 + 1, 1e6 + 3, 1e6 + 2, 1e6 + 6], baseline="mean").scores
    assert large == pytest.approx((-2, 0, -1, 3))


def test_answers_that_nobody_can_judge_are_left_out() -> None:
    assert of("policy-gradient", [None, 3.0, 1.0, None], baseline="mean").scores == (1.0, -1.0)
    assert of("policy-gradient", [None, 3.0, 1.0, None]).answers == (FOUR[1], FOUR[2])
    assert of("supervised", [None, None, 1.0, None]) is None
    assert of("dpo", [None] * 4) is None
    assert of("dro", [None] * 4) is None


def test_equal_rewards_say_nothing() -> None:
    for name in ("policy-gradient", "dpo", "supervised", "kto", "sppo"):
        assert of(name, [2.0] * 4) is None


def test_every_loss_that_needs_feedback_says_what_it_makes_of_rewards() -> None:
    assert set(FEEDBACK) == {name for name, loss in LOSSES.items() if loss.rows == "feedback"}


def test_a_reward_that_is_not_finite_is_an_error_that_names_the_row() -> None:
    completions = [Completion([], "a", None, False, "f:1"), Completion([], "b", None, False, "f:2")]
    with raises("training/non-finite-rewards", match=r"f:2: nan for 'b'"):
        score(lambda some: [1.0, float("nan")], completions)
    with raises("training/wrong-reward-count", match="1 rewards for 2 answers"):
        score(lambda some: [1.0], completions)
    assert score(lambda some: [1.0, None], completions) == [1.0, None]


# Whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lively(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that has opinions: its logits are spread as those of trained ones are, so a delta can move them."""
    return save_tiny_base(tmp_path_factory.mktemp("lively") / "base", initializer_range=0.2)


@pytest.mark.sampled
@pytest.mark.parametrize("loss", [GRPO, RLOO, {"name": "dpo", "beta": 0.05}, "supervised"], ids=str)
def test_a_tiny_model_learns_what_is_rewarded(lively: Path, prompts: Path, tmp_path: Path, loss: Any) -> None:
    made = recipe(
        lively, prompts, loss,
        rl={"samples": 8, "at_once": 48}, train={"steps": 25, "batch_rows": 6, "learning_rate": 0.01},
    )  # fmt: skip
    result = graftlm.train(made, tmp_path / "out")
    rewards = [step["reward"] for step in count_steps(tmp_path / "out") if "reward" in step]
    assert len(rewards) == 25
    assert sum(rewards[-5:]) > 1.5 * sum(rewards[:5])
    found = result.summary["held_out"]["objective"]
    assert found["tuned"]["reward"] > found["base"]["reward"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == (4 if LOSSES[made.loss.name].rows == "pairs" else 3)


RUNS = [(GRPO, 1), (RLOO, 3), ("dpo", 2), ("supervised", 4)]


@pytest.mark.sampled
@pytest.mark.parametrize(("loss", "length"), RUNS, ids=str)
def test_a_run_that_is_stopped_at_every_step_ends_in_the_same_bytes(
    base_folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: Any, length: int
) -> None:
    """In the middle of rounds too, where the model that answered is gone."""
    made = recipe(
        base_folder,
        prompts,
        loss,
        delta={"dropout": 0.2},
        rl={"steps_per_round": length},
        data={"held_out": 0},
        train={"steps": 4},
    )
    graftlm.train(made, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stopping_after(1, patch)
        for step in range(1, 4):
            graftlm.train(made, tmp_path / "out", resume=True)
            assert (tmp_path / "out" / "checkpoints" / f"step-{step:08}").is_dir()
    graftlm.train(made, tmp_path / "out", resume=True)
    same(tmp_path / "out", tmp_path / "whole")
    first, second = (
        [{k: v for k, v in line.items() if k not in ("wall_s", "generate_s")} for line in count_steps(tmp_path / name)]
        for name in ("out", "whole")
    )
    assert first == second


@pytest.mark.slow
def test_a_killed_run_goes_back_to_its_checkpoint_and_to_the_same_bytes(
    base_folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After step 3 of a round of 3 + 3, with checkpoints at 2 and 4: nothing is saved at the end."""
    made = recipe(base_folder, prompts, rl={"steps_per_round": 3}, data={"held_out": 0})
    graftlm.train(made, tmp_path / "whole")
    for dies_at in (2, 4):
        out, count, rows_of = tmp_path / f"out-{dies_at}", [0], Sampler.rows

        def dying(self: Sampler, *arguments: Any, at: int = dies_at, seen: list[int] = count, go: Any = rows_of) -> Any:
            seen[0] += 1
            if seen[0] > at + 1:
                raise KeyboardInterrupt
            return go(self, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(Sampler, "rows", dying)
            with pytest.raises(KeyboardInterrupt):
                graftlm.train(made, out)
        graftlm.train(made, out, resume=True)
        same(out, tmp_path / "whole")


def test_two_runs_are_the_same_and_another_seed_is_not(base_folder: Path, prompts: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        made = recipe(base_folder, prompts, train={"steps": 2, "seed": seed}, data={"held_out": 0})
        graftlm.train(made, tmp_path / name)
    one, other, third = ((tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("a", "b", "c"))
    assert one == other != third


def test_answers_differ_from_step_to_step_though_the_prompts_come_again(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = written(tmp_path / "rows.jsonl", [{"prompt": "say a word"}, {"prompt": "say two"}])
    made = recipe(
        base_folder, rows, rl={"steps_per_round": 2}, data={"held_out": 0},
        train={"batch_rows": 2, "steps": 4, "learning_rate": 1e-9},
    )  # fmt: skip
    found: list[list[list[int]]] = []
    rows_of = Sampler.rows

    def watched(self: Sampler, *arguments: Any) -> Any:
        made = rows_of(self, *arguments)
        found.append(sorted(answer.ids.tolist() for row in made for answer in row.answers))
        return made

    monkeypatch.setattr(Sampler, "rows", watched)
    graftlm.train(made, tmp_path / "out")
    assert len({str(answers) for answers in found}) == 4


@pytest.mark.slow
@pytest.mark.parametrize("loss", [GRPO, "dpo", "kto"], ids=str)
def test_how_a_step_is_packed_changes_nothing(base_folder: Path, prompts: Path, tmp_path: Path, loss: Any) -> None:
    results = []
    for number, train in enumerate(({}, {"pack_tokens": 30}, {"prefix_sharing": False})):
        made = recipe(
            base_folder, prompts, loss, train={"steps": 3, "learning_rate": 1e-3, **train}, data={"held_out": 0}
        )
        graftlm.train(made, tmp_path / str(number))
        results.append(
            (load_file(tmp_path / str(number) / "adapter_model.safetensors"), count_steps(tmp_path / str(number)))
        )
    for adapter, steps in results[1:]:
        for key, tensor in results[0][0].items():
            assert torch.allclose(adapter[key], tensor, rtol=1e-3, atol=5e-5), key
        for mine, wanted in zip(steps, results[0][1], strict=True):
            assert mine["reward"] == wanted["reward"], "the same answers were drawn"
            assert mine["loss"] == pytest.approx(wanted["loss"], rel=1e-5, abs=1e-6)


def test_steps_without_a_signal_change_nothing_and_are_told(base_folder: Path, prompts: Path, tmp_path: Path) -> None:
    """The first steps too, where a gradient of zero would else be a mistake."""
    source = (
        "n = [0]\ndef score(completion):\n    n[0] += 1\n    return 0.0 if n[0] <= 24 else len(completion.answer)\n"
    )
    made = recipe(
        base_folder,
        prompts,
        rl={"scorer": scorer(tmp_path / "late.py", source)},
        data={"held_out": 0},
        train={"steps": 5},
    )
    graftlm.train(made, tmp_path / "out")
    lines = count_steps(tmp_path / "out")
    skipped = [line for line in lines if line.get("event") == "skipped"]
    assert [line["step"] for line in skipped] == [1, 2]
    assert all(line["why"] == f"step {line['step']} has nothing to learn from" for line in skipped)
    assert all((line["reward"], line["no_signal"]) == (0.0, 1.0) for line in skipped)
    silent = [line for line in lines if line.get("event") == "no signal"]
    assert all(len(line["prompts"]) == 3 for line in silent[:2])
    assert all("prompts.jsonl:" in where for line in silent for where in line["prompts"])
    assert [line["step"] for line in lines if "loss" in line] == [3, 4, 5]


def test_a_run_in_which_nothing_is_ever_better_ends_as_it_began(
    base_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    pattern = {"by": "pattern", "pattern": "this will never be said"}
    made = recipe(base_folder, prompts, train={"steps": 4}, rl={"scorer": pattern})
    result = graftlm.train(made, tmp_path / "out")
    assert result.summary["train"]["steps"] == 0
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert not any(tensor.any() for key, tensor in adapter.items() if "lora_B" in key)


def test_references_are_part_of_what_a_run_is(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f"ask {n}", "completion": f"b{n}"} for n in range(9)]
    file = written(tmp_path / "rows.jsonl", rows)
    made = recipe(base_folder, file, data={"held_out": 0})
    with monkeypatch.context() as patch:
        stopping_after(2, patch)
        graftlm.train(made, tmp_path / "out")
    written(file, [{**rows[0], "completion": "another"}, *rows[1:]])
    with raises("training/dependencies-changed", match="training rows: "):
        graftlm.train(made, tmp_path / "out", resume=True)


def test_rows_with_answers_are_held_out_as_ever(base_folder: Path, tmp_path: Path) -> None:
    rows = written(tmp_path / "rows.jsonl", [{"prompt": f"ask {n}", "completion": f"word {n}"} for n in range(9)])
    found = graftlm.train(recipe(base_folder, rows), tmp_path / "out").summary["held_out"]
    assert found["loss_nats"]["base"] > 0
    assert found["rouge_l"]["base"] is not None
    assert found["objective"]["base"].keys() == {"reward"}


# Several ranks ---------------------------------------------------------------------------------------------------


def a_run(base: Path, rows: Path, loss: Any, length: int, out: Path, shard: str) -> float:
    made = recipe(
        base, rows, loss,
        rl={"steps_per_round": length}, train={"shard": shard, "steps": 4, "learning_rate": 1e-3},
    )  # fmt: skip
    reward: float = graftlm.train(made, out).summary["held_out"]["objective"]["tuned"]["reward"]
    return reward


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "length", "shard"), [(GRPO, 1, "none"), ("dpo", 1, "none"), (RLOO, 2, "fsdp")], ids=str
)
def test_two_ranks_are_one(
    base_folder: Path, prompts: Path, tmp_path: Path, loss: Any, length: int, shard: str
) -> None:
    one = a_run(base_folder, prompts, loss, length, tmp_path / "one", "none")
    two = together(2, a_run, base_folder, prompts, loss, length, tmp_path / "two", shard)
    assert two == [one, one]
    for mine, wanted in zip(count_steps(tmp_path / "two"), count_steps(tmp_path / "one"), strict=True):
        for key in ("reward", "reward_spread", "cut", "no_signal", "answer_tokens", "tokens", "prompts"):
            assert mine.get(key) == wanted.get(key), "the same answers were drawn"
        if "loss" in mine:
            assert mine["loss"] == pytest.approx(wanted["loss"], rel=1e-5, abs=1e-5)
    for key, tensor in load_file(tmp_path / "one" / "adapter_model.safetensors").items():
        there = load_file(tmp_path / "two" / "adapter_model.safetensors")[key]
        assert torch.allclose(there, tensor, rtol=1e-3, atol=5e-5), key


# Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "sections", "message"),
    [
        ("pretraining", {}, "trains raw text, and rl gives answers"),
        (GRPO, {"rl": {"temperature": 0.7}}, "needs rl.temperature and top_p at 1"),
        (GRPO, {"rl": {"top_p": 0.9}}, "needs rl.temperature and top_p at 1"),
        (GRPO, {"data": {"pack": False}}, "sees several answers in one pass"),
        ("supervised", {"data": {"mask": "everything"}}, "use data.mask response"),
        (GRPO, {"data": {"over_length": "truncate"}}, "a question that was cut"),
        (GRPO, {"data": {"max_tokens": 6}}, "must hold a prompt and rl.max_new_tokens 6"),
        ("supervised", {"select": [{"by": "length", "keep": 5}]}, "select chooses rows by their answers"),
        (GRPO, {"data": {"desirable_share": 0.5}}, "desirable_share chooses rows by their answers"),
        (GRPO, {"train": {"early_stopping": {"every": 2}}}, "early_stopping looks at the loss"),
        (GRPO, {"train": {"on_spike": "return"}}, "on_spike: return looks at the loss"),
        (GRPO, {"delta": {"init": "lora-ga"}}, "starts from what it sees of training rows"),
        (GRPO, {"callbacks": ["autolora"]}, "callback autolora: it learns from an inner validation split"),
        (GRPO, {"rl": {"samples": 1}}, "rl.samples"),
        (GRPO, {"rl": {"scorer": {"by": "exat"}}}, "'exact'"),
    ],
)
def test_what_cannot_be_is_refused_with_its_reason(
    base_folder: Path, prompts: Path, loss: Any, sections: dict[str, Any], message: str
) -> None:
    with raises("recipe/invalid-value", match=message):
        recipe(base_folder, prompts, loss, **sections)


def test_an_engine_holds_what_is_estimated(base_folder: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graftlm.planning.generation import generation_bytes, rollouts_load
    from graftlm.planning.layers import with_deltas

    held: list[int] = []
    compute = Engine._compute

    def spied(self: Engine, parts: Any) -> None:
        compute(self, parts)
        held.append(sum(t.nbytes for one in self._running for layer in one.cache.layers for t in layer))

    monkeypatch.setattr(Engine, "_compute", spied)
    made = recipe(base_folder, prompts)
    load = rollouts_load(made, prepare_data(made, load_base(made.base).tokenizer))
    found = generation_bytes(*with_deltas(made), load)
    _, trainer, _ = sampled(made)
    assert load.requests == 6
    one_token = found.cache // load.requests // (load.prompt_tokens + load.new_tokens - 1)
    assert found.cache - load.requests * one_token <= max(held) <= found.cache, "numbers have one digit or two"
    (sampler,) = (p for p in trainer.callbacks if isinstance(p, Sampler))
    assert sampler.engine is not None
    assert sampler.engine.products
    assert found.prepacked_weights == sum(packed_bytes(each.source) for each in sampler.engine.products.values())


def test_range_tests_say_that_they_cannot(base_folder: Path, prompts: Path) -> None:
    from graftlm.planning.lr_range import lr_range_test

    with raises("training/unsupported-with-rl"):
        lr_range_test(recipe(base_folder, prompts))


def test_a_prompt_is_an_example_of_which_nothing_is_trained(base_folder: Path, prompts: Path) -> None:
    made = recipe(base_folder, prompts)
    data = prepare_data(made, load_base(made.base).tokenizer)
    assert all(isinstance(one, PromptExample) and not one.weights.any() for one in data.examples)
    assert data.report.rows == 10
    assert "supervised" not in dict(data.report.lines())
    packs = made.setup().make_packs(data.examples, share=True)
    assert sum(len(pack.targets) for pack in packs) == 0
    assert json.dumps(data.report.to_json())
