"""AdaLomo: three steps of every kind of tensor against its equations, written out."""

from typing import Any

import pytest
import torch

from graftlm.data.batches.pack import pack
from graftlm.model.registry import attachment, hosts, trainable
from graftlm.optim.adalomo import AdaLomo, AdaLomoConfig
from graftlm.testing import tiny_model
from graftlm.testing.deltas import perturbed
from graftlm.training.callback import Callback
from graftlm.training.state import TrainingState
from tests.callbacks.test_callbacks import run, training
from tests.training.test_loop import examples

BATCHES = [pack(examples(seed=n), 60) for n in range(3)]
RATE = 0.01


class ByTheEquations(Callback):
    """The same on gradients that wait for the end of the backward pass."""

    def __init__(self, sizes: dict[str, float]) -> None:
        super().__init__(None)
        self.sizes, self.kept = sizes, dict[str, Any]()

    @torch.no_grad()
    def on_step(self, training: TrainingState) -> None:
        t = training.done
        beta = 1 - t**-0.8
        for name, p in trainable(training.model).items():
            g = p.grad
            assert g is not None
            s = g**2 + 1e-30
            if g.dim() == 2:
                row, column = self.kept.get(name, (0, 0))
                row = beta * row + (1 - beta) * s.mean(dim=1, keepdim=True)
                column = beta * column + (1 - beta) * s.mean(dim=0, keepdim=True)
                self.kept[name] = row, column
                v = row @ column / row.mean()
            else:
                v = self.kept[name] = beta * self.kept.get(name, 0) + (1 - beta) * s
            u = g / v.sqrt()
            rms = float((u**2).mean()) ** 0.5
            u = u / max(1.0, rms)
            size = self.sizes.get(name, float((p**2).mean()) ** 0.5)
            p -= RATE * max(1e-3, size) * u


@pytest.mark.parametrize("method", ["full", "dora", "vera"])
def test_its_steps_are_those_of_the_paper(method: str) -> None:
    model, chosen = perturbed(method, tiny_model()), [AdaLomo(AdaLomoConfig())]
    run(training(model, list(chosen), rate=RATE), list(chosen), BATCHES)

    other, sizes = perturbed(method, tiny_model()), {}
    if method == "full":
        for site, host in hosts(other).items():
            weight = host.get_submodule("base").weight
            sizes[f"{site}.deltas.default.D"] = float((weight.detach() ** 2).mean()) ** 0.5
    nothing = torch.optim.SGD(trainable(other).values(), lr=0.0)
    state = TrainingState(other, attachment(other).configs, nothing, total=4, seed=3)
    run(state, [ByTheEquations(sizes)], BATCHES)
    for (name, p), q in zip(trainable(model).items(), trainable(other).values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6, msg=name)
