"""The trainer: a run in rounds, each with a new trainer on a new model, is the run without a stop, byte for byte."""

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from graftlm.hub.load import load_base
from graftlm.kernels.backend import TORCH
from graftlm.prepare import prepare_data
from graftlm.recipe import Recipe
from graftlm.training.loop import Step, TrainStep
from graftlm.training.objective import Objective
from graftlm.training.phases import attach_deltas, make_batches
from graftlm.training.snapshot import Snapshot
from graftlm.training.trainer import Trainer
from tests.errors import raises
from tests.training.test_preferences import written
from tests.training.test_resume import recipe, rows

__all__ = ["rows"]

STEPS = 21
WORDS = ["red", "green", "blue", "seven", "eleven", "one", "two", "apple", "pear", "sky", "sea"]
FULL = {"method": "full", "targets": ["q_proj", "v_proj"]}
CASES: dict[str, dict[str, Any]] = {
    "lora": {"callbacks": ["ema"], "train__schedule": "linear", "train__warmup": 0.3},
    "adalora": {"delta": {"method": "adalora", "r": 4}, "callbacks": [{"name": "adalora", "target_r": 2, "every": 3}]},
    "sora": {"delta": {"method": "gated-lora", "r": 4}, "callbacks": [{"name": "sora", "sparsity": 0.1}]},
    "bilora, which has inner rows": {"delta": {"method": "adalora", "r": 4}, "callbacks": ["bilora"]},
    "periodic-lora": {"callbacks": [{"name": "periodic-lora", "every": 4}]},
    "lisa": {"delta": {"method": "full"}, "callbacks": [{"name": "lisa", "layers": 1, "every": 2}]},
    "galore": {"delta": FULL, "optimizer": {"name": "galore", "rank": 2, "every": 3}},
    "lomo, which is fused": {"delta": FULL, "optimizer": "lomo"},
    "in turn": {
        "delta": None,
        "deltas": {"a": {"method": "lora", "r": 2, "dropout": 0.1}, "b": {"method": "vera", "r": 4}},
        "train__in_turn": True,
    },
    "a curriculum": {"data__order": {"by": "length"}},
    "kl": {"regularisers": [{"name": "kl", "weight": 0.1}, {"name": "l2", "weight": 0.01}]},
    "dpo": {"loss": "dpo", "data__train": "pairs.jsonl"},
    "kto": {"loss": "kto", "data__train": "pairs.jsonl"},
    "dro, whose value head learns too": {"loss": "dro", "data__train": "feedback.jsonl"},
    "rl": {"loss": {"name": "policy-gradient"}, "rl": {"steps_per_round": 1}, "data__train": "prompts.jsonl"},
    "rl in rounds of its own": {
        "loss": {"name": "policy-gradient"},
        "rl": {"steps_per_round": 4},
        "data__train": "prompts.jsonl",
    },
}


class Run:
    """A recipe's rows and batches, and trainers for them on new models."""

    def __init__(self, made: Recipe) -> None:
        self.base, tokenizer = load_base(made.base)
        self.data = prepare_data(made, tokenizer)
        self.setup = made.setup()
        self.batches = make_batches(made.train, self.data.examples, self.data.curriculum, self.data.draws)

    def trainer(self, *, start: bool = True) -> Trainer:
        """Without `start`, the deltas have no values of their own: a state must bring them."""
        model, examples = deepcopy(self.base), self.data.examples
        attach_deltas(self.setup, model, examples, self.batches, start=start)
        return Trainer(self.setup, model, examples, self.batches, self.data.inner_rows, backend=TORCH)

    def in_rounds(self, length: int) -> tuple[list[Step], Trainer]:
        """All steps, and the last trainer."""
        trainer, done = self.trainer(), []
        while True:
            done += list(trainer.steps(length))
            if trainer.finished:
                return done, trainer
            state = plain(trainer.state())
            trainer = self.trainer(start=False)
            trainer.load(state)


def plain(state: Snapshot) -> Snapshot:
    """The state as it comes through bytes and JSON to another process."""
    return Snapshot(load(save(dict(state.tensors))), json.loads(json.dumps(state.facts)))


def known(steps: list[Step]) -> list[Any]:
    """What must be the same in every run: all but the clock."""
    found = [replace(step, wall_s=0.0, metrics={**step.metrics, "generate_s": 0.0}) for step in steps]
    return [repr(step) for step in found]  # nan is not equal to itself


def without_clock(facts: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(facts), object_hook=lambda tree: {k: v for k, v in tree.items() if k != "generate_s"})


def same(state: Snapshot, other: Snapshot) -> None:
    assert without_clock(state.facts) == without_clock(other.facts)
    assert state.tensors.keys() == other.tensors.keys()
    for name, tensor in other.tensors.items():
        assert torch.equal(state.tensors[name], tensor), name


def made_of(base: Path, rows: Path, folder: Path, **changes: Any) -> Recipe:
    """A recipe of 21 steps; rows are those of the name."""
    triples = [(f"say {WORDS[n % 11]}", " ".join(WORDS[n % 11 :][: 1 + n % 4]), WORDS[(n + 3) % 11]) for n in range(24)]
    written(folder / "pairs.jsonl", [{"prompt": p, "chosen": a, "rejected": b} for p, a, b in triples])
    written(folder / "feedback.jsonl", [{"prompt": p, "completion": a, "label": len(a) > 9} for p, a, _ in triples])
    written(folder / "prompts.jsonl", [{"prompt": p} for p, _, _ in triples])
    (folder / "letters.py").write_text(
        "def score(completion):\n    return sum(c.islower() for c in completion.answer)\n"
    )
    if name := changes.get("data__train"):
        changes["data__train"] = str(folder / name)
    if "rl" in changes:
        scorer = {"by": "python", "function": f"{folder / 'letters.py'}:score"}
        changes["rl"] = {"scorer": scorer, "samples": 3, "max_new_tokens": 4} | changes["rl"]
    return recipe(base, rows, **{"train__steps": STEPS, "train__batch_rows": 3} | changes)


@pytest.fixture(params=CASES)
def run(request: pytest.FixtureRequest, base_folder: Path, rows: Path, tmp_path: Path) -> Run:
    return Run(made_of(base_folder, rows, tmp_path, **CASES[request.param]))


@pytest.mark.sampled
def test_rounds_of_1_3_and_7_steps_are_one_of_21(run: Run) -> None:
    whole, trainer = run.in_rounds(STEPS)
    assert len(whole) == STEPS
    assert sum(not step.skipped for step in whole) > STEPS / 2
    wanted = trainer.state()
    trainer.end()
    for length in (1, 3, 7):
        done, again = run.in_rounds(length)
        assert known(done) == known(whole)
        same(again.state(), wanted)
        again.end()
        same(again.state(), trainer.state())
        learning = {name: p.requires_grad for name, p in again.model.named_parameters()}
        assert learning == {name: p.requires_grad for name, p in trainer.model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("case", ["adalora", "lisa", "periodic-lora"])
def test_a_state_is_a_copy_and_loads_into_a_trainer_that_went_on(
    case: str, base_folder: Path, rows: Path, tmp_path: Path
) -> None:
    """As on a client whose later steps do not count: the same trainer goes back, with all that it knows. Restarts add
    tensors to a delta, and `lisa` lets other layers learn."""
    run = Run(made_of(base_folder, rows, tmp_path, **CASES[case]))
    whole, wanted = run.in_rounds(STEPS)
    trainer = run.trainer()
    done = list(trainer.steps(3))
    state = trainer.state()
    before = plain(state)
    for _ in trainer.steps(6):
        pass
    same(state, before)
    for _ in range(2):
        trainer.load(state)
        assert trainer.seen == 3
        again = list(trainer.steps(3))
        same(state, before)
    assert known([*done, *again, *trainer.steps()]) == known(whole)
    same(trainer.state(), wanted.state())


def test_tensors_of_a_state_may_be_replaced(base_folder: Path, rows: Path, tmp_path: Path) -> None:
    """A round of federated averaging: two clients begin alike, and go on from the mean of their deltas."""
    run = Run(made_of(base_folder, rows, tmp_path))
    clients = [run.trainer(), run.trainer()]
    clients[1].load(replace(clients[1].state(), facts={**clients[1].state().facts, "seen": 9}))  # other rows
    states = []
    for client in clients:
        for _ in client.steps(2):
            pass
        states.append(client.state())
    deltas = [key for key in states[0].tensors if key.startswith("delta/")]
    assert any(not torch.equal(*(state.tensors[key] for state in states)) for key in deltas)
    mean = {key: (states[0].tensors[key] + states[1].tensors[key]) / 2 for key in deltas}
    for client, state in zip(clients, states, strict=True):
        client.load(replace(state, tensors={**state.tensors, **mean}))
        loaded = client.state()
        assert all(torch.equal(loaded.tensors[key], mean[key]) for key in deltas)
        assert client.step().done == 3


def broken(monkeypatch: pytest.MonkeyPatch, numbers: set[int]) -> None:
    """Let the loss of these steps be no number."""
    part, step = Objective.part, TrainStep.step
    now: list[int] = []

    def stepping(self: TrainStep, packs: Any) -> Step:
        now[:] = [self.training.seen + 1]
        return step(self, packs)

    def parts(self: Objective, *arguments: Any) -> Any:
        made, log_probs = part(self, *arguments)
        factor = float("nan") if now[0] in numbers else 1.0
        return replace(made, sum=made.sum * factor), log_probs * factor

    monkeypatch.setattr(TrainStep, "step", stepping)
    monkeypatch.setattr(Objective, "part", parts)


def test_rounds_skip_what_an_unbroken_run_skips(
    base_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(made_of(base_folder, rows, tmp_path, train__on_nonfinite="skip", callbacks=["ema"]))
    broken(monkeypatch, {3, 4, 8, 21})
    whole, trainer = run.in_rounds(STEPS)
    assert [step.number for step in whole if step.skipped] == [3, 4, 8, 21]
    for length in (1, 3, 7):
        done, again = run.in_rounds(length)
        assert known(done) == known(whole)
        same(again.state(), trainer.state())


@pytest.mark.parametrize("length", [1, 2, STEPS])
def test_the_third_step_in_a_row_that_is_not_finite_stops_in_rounds_too(
    length: int, base_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(made_of(base_folder, rows, tmp_path, train__on_nonfinite="skip"))
    broken(monkeypatch, {4, 5, 6})
    with raises("training/not-finite", match="3 such steps in a row"):
        run.in_rounds(length)


def test_the_state_after_three_steps_that_are_not_finite_goes_on_and_stops_again(
    base_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(made_of(base_folder, rows, tmp_path, train__on_nonfinite="skip"))
    broken(monkeypatch, set(range(4, 12)))
    trainer = run.trainer()
    for _ in range(3):  # steps 4, 5 and 6; 6, 7 and 8; 8, 9 and 10
        with raises("training/not-finite", match="3 such steps in a row"):
            list(trainer.steps())
        trainer.load(plain(trainer.state()))
    assert [step.number for step in trainer.steps() if step.skipped] == [10, 11]


def test_a_tensor_that_does_not_learn_is_found_in_rounds_too(
    base_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A has a zero gradient at the first step of LoRA; here at the second one too."""
    run = Run(made_of(base_folder, rows, tmp_path, delta={"method": "lora", "r": 2}))
    monkeypatch.setattr("graftlm.training.loop.nn.utils.clip_grads_with_norm_", lambda *_: None)
    for length in (1, 2):
        trainer = run.trainer()
        trainer.training.optimizer.step = lambda: None  # type: ignore[method-assign]  # so B stays 0
        next(trainer.steps())
        if length == 1:
            state = plain(trainer.state())
            trainer = run.trainer(start=False)
            trainer.load(state)
        with raises("training/zero-gradient"):
            trainer.step()


def test_what_cannot_go_on_is_refused(base_folder: Path, rows: Path, tmp_path: Path) -> None:
    run = Run(made_of(base_folder, rows, tmp_path, train__steps=2))
    trainer = run.trainer()
    state = trainer.state()
    assert len(list(trainer.steps(5))) == 2
    assert trainer.finished
    with raises("training/no-step-left", match="2 of 2"):
        trainer.step()
    assert not list(trainer.steps())
    trainer.load(state)
    trainer.step()
    trainer.end()
    with raises("training/no-step-left", match="load a state"):
        trainer.step()
    with raises("training/checkpoint-mismatch", match="begins with batch 1"):
        trainer.load(replace(state, facts={**state.facts, "phase": 1}))
    other = Run(made_of(base_folder, rows, tmp_path, optimizer="sm3")).trainer()
    with raises("training/checkpoint-mismatch", match="optimizer AdamW"):
        other.load(state)
