"""EMA: the mean worked out from the parameters of every step, and a run that it does not change."""

import pytest
import torch

from graftlm.callbacks.ema import Ema, EmaConfig
from graftlm.config.schema import build
from graftlm.data.batches.pack import pack
from graftlm.model.registry import trainable
from graftlm.testing import tiny_model
from graftlm.testing.deltas import perturbed
from graftlm.training.callback import Callback, check_callbacks
from graftlm.training.state import TrainingState
from tests.callbacks.tables import TABLE, make
from tests.callbacks.test_callbacks import run, training
from tests.errors import raises
from tests.training.test_loop import examples

BATCHES = [pack(examples(seed=n), 60) for n in range(5)]


class Following(Callback):
    def __init__(self) -> None:
        super().__init__(None)
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_start(self, training: TrainingState) -> None:
        self.on_step(training)

    def on_step(self, training: TrainingState) -> None:
        self.seen.append({name: p.detach().clone() for name, p in training.parameters().items()})


def test_what_is_kept_is_the_mean_and_the_run_goes_on_as_it_would() -> None:
    model, plain, following, ema = perturbed("lora", tiny_model()), Following(), Following(), Ema(EmaConfig(decay=0.25))
    run(training(perturbed("lora", tiny_model()), []), [plain], BATCHES)
    state = training(model, [])
    run(state, [following, ema], BATCHES)
    for one, other in zip(plain.seen, following.seen, strict=True):
        assert all(torch.equal(p, other[name]) for name, p in one.items())
    mean = following.seen[0]
    for t, seen in enumerate(following.seen[1:], start=1):
        a = min(0.25, t / (t + 9))
        mean = {name: a * mean[name] + (1 - a) * p for name, p in seen.items()}
    with ema.evaluating(state):
        for name, p in trainable(model).items():
            torch.testing.assert_close(p.detach(), mean[name])
    assert all(torch.equal(p, following.seen[-1][name]) for name, p in trainable(model).items())
    ema.on_end(state)
    for name, p in trainable(model).items():
        torch.testing.assert_close(p.detach(), mean[name])


@pytest.mark.parametrize("mean", ["ema", "i-lora"])
@pytest.mark.parametrize(
    ("other", "says"),
    [("cola", "factors begin again"), ("periodic-lora", "factors begin again"), ("lte", "take turns"),
     ("spiel", "another element"), ("schedule-free", "a mean of its own")],
)  # fmt: skip
def test_a_mean_of_what_is_not_the_same_is_refused(mean: str, other: str, says: str) -> None:
    state = training(perturbed("spiel" if other == "spiel" else "lora", tiny_model()), [], total=200)
    state.inner_loss = lambda gradient: torch.tensor(0.0)
    options = {"every": 2} if other != "schedule-free" else {}
    chosen = make(
        [
            build(TABLE[name].config, {"name": name} | more, source="test")
            for name, more in ((mean, {}), (other, options))
        ]
    )
    for both in (chosen, chosen[::-1]):
        with raises("training/conflicting-settings", match=f"{mean} beside {other}: .*{says}"):
            check_callbacks(both, state)
    check_callbacks(chosen[:1], state)


def test_two_means_are_refused() -> None:
    state = training(perturbed("lora", tiny_model()), [])
    state.inner_loss = lambda gradient: torch.tensor(0.0)
    with raises("training/conflicting-settings"):
        check_callbacks(make([TABLE[name].config() for name in ("ema", "i-lora")]), state)
