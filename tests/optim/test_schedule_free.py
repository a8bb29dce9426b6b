"""Schedule-free AdamW by the three sequences of its paper, which its library never has at once."""

import pytest
import torch
from torch import nn

from graftlm.data.batches.pack import pack
from graftlm.model.registry import trainable
from graftlm.optim.schedule_free import ScheduleFree, ScheduleFreeConfig
from graftlm.testing import tiny_model
from graftlm.testing.deltas import perturbed
from graftlm.training.schedule import warmup_cosine
from graftlm.training.state import ParameterGroup
from tests.callbacks.test_callbacks import run, training
from tests.training.test_loop import examples

pytestmark = pytest.mark.versions

pytest.importorskip("schedulefree")


def test_its_steps_are_those_of_the_paper() -> None:
    torch.manual_seed(0)
    start, rates = torch.randn(4, 6).double(), [0.02, 0.05, 0.1, 0.1]
    target = torch.randn(4, 6).double()
    z = x = start.clone()
    v, total = torch.zeros_like(z), 0.0
    for t, rate in enumerate(rates, start=1):
        y = 0.1 * z + 0.9 * x
        g = 2 * (y - target)
        v = 0.999 * v + 0.001 * g**2
        z = z - rate * g / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        total += max(rates[:t]) ** 2
        c = max(rates[:t]) ** 2 / total
        x = (1 - c) * x + c * z
    p = nn.Parameter(start.clone())
    callback = ScheduleFree(ScheduleFreeConfig())
    optimizer = callback.make([ParameterGroup({"p": p}, 0.1)], weight_decay=0.0)
    optimizer.train()  # type: ignore[attr-defined]
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        p.grad = 2 * (p.detach() - target)
        optimizer.step()
    torch.testing.assert_close(p.detach(), 0.1 * z + 0.9 * x)
    optimizer.eval()  # type: ignore[attr-defined]
    torch.testing.assert_close(p.detach(), x)


def test_rates_rise_and_stay() -> None:
    plain = warmup_cosine(steps=20, warmup_steps=4)
    factor = ScheduleFree(ScheduleFreeConfig()).schedule(plain)
    assert [factor(step) for step in range(20)] == [*map(plain, range(4)), *[1.0] * 16]


def test_looking_at_the_mean_changes_no_bit_of_the_run() -> None:
    found = []
    for looks in (False, True):
        model, callback = perturbed("lora", tiny_model()), ScheduleFree(ScheduleFreeConfig())
        state = training(model, [callback])
        for n in range(3):
            run(state, [callback], [pack(examples(seed=n), 60)])
            if looks:
                training_at = [p.detach().clone() for p in trainable(model).values()]
                with callback.evaluating(state):
                    means = [p.detach().clone() for p in trainable(model).values()]
                assert n == 0 or not all(map(torch.equal, training_at, means))
        found.append([p.detach().clone() for p in trainable(model).values()])
    assert all(map(torch.equal, *found))
    callback.on_end(state)
    assert all(map(torch.equal, means, [p.detach() for p in trainable(model).values()]))
