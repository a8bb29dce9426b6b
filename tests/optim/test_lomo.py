"""LOMO is SGD with the same clipping, however a step is cut into packs; only the gradient's life is shorter."""

import math
from typing import Any

import pytest
import torch

from graftlm.callbacks.riemannian import Riemannian, RiemannianConfig
from graftlm.data.batches.pack import Pack, collate, pack
from graftlm.model.registry import attachment, trainable
from graftlm.optim.lomo import Lomo, LomoConfig
from graftlm.testing import tiny_model
from graftlm.testing.deltas import perturbed
from graftlm.training.callback import Callback
from graftlm.training.passes import Passes
from graftlm.training.state import TrainingState
from tests.callbacks.test_callbacks import run, training
from tests.errors import raises
from tests.training.test_loop import examples

ROWS = [examples(seed=n) for n in range(2)]
CUTS: dict[str, list[list[Pack]]] = {
    "one pack": [[collate(rows)] for rows in ROWS],
    "several": [pack(rows, 40) for rows in ROWS],
    "a row at a time": [[collate([row]) for row in rows] for rows in ROWS],
}


def by_sgd(batches: list[list[Pack]], clip: float) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The same steps by torch.optim.SGD, its gradient cut at `clip` here."""
    model = perturbed("full", tiny_model())
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1, weight_decay=0.0)
    state = TrainingState(model, attachment(model).configs, optimizer, total=4, seed=3)
    norms = []

    class Clipping(Callback):
        def on_grads(self, training: TrainingState) -> None:
            found = [p.grad for p in trainable(model).values() if p.grad is not None]
            norms.append(math.sqrt(sum(float(g.square().sum()) for g in found)))
            for g in found:
                g *= min(1.0, clip / norms[-1])

    run(state, [Clipping(None)], batches)
    return {name: p.detach() for name, p in trainable(model).items()}, norms


def by_lomo(batches: list[list[Pack]], clip: float, **options: Any) -> tuple[dict[str, torch.Tensor], list[float]]:
    model = perturbed("full", tiny_model())
    chosen: list[Callback] = [Lomo(LomoConfig(**options))]
    done = run(training(model, chosen, rate=0.1), chosen, batches, clip=clip)
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in trainable(model).values())
    return {name: p.detach() for name, p in trainable(model).items()}, [step.grad_norm for step in done]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("clip", [1e9, 0.05])
def test_it_is_sgd_with_the_same_clipping(cut: str, clip: float) -> None:
    wanted, norms = by_sgd(CUTS["one pack"], clip)
    found, norms_by_lomo = by_lomo(CUTS[cut], clip)
    assert norms_by_lomo == pytest.approx(norms, rel=1e-4)
    for name, p in wanted.items():
        torch.testing.assert_close(found[name], p, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("method", ["full", "dora", "vera"])
def test_layers_that_are_computed_again_give_the_same_steps(method: str) -> None:
    found = []
    for again in (False, True):
        model = perturbed(method, tiny_model())
        chosen: list[Callback] = [Lomo(LomoConfig())]
        run(training(model, chosen, rate=0.1), chosen, CUTS["several"], passes=Passes(checkpointing=again))
        found.append([p.detach() for p in trainable(model).values()])
    assert all(torch.allclose(p, q, rtol=1e-5, atol=1e-7) for p, q in zip(*found, strict=True))


def test_one_gradient_is_alive_at_a_time() -> None:
    model, most = perturbed("full", tiny_model()), 0

    class Counting(Lomo):
        def act(self, training: TrainingState, group: Any, p: Any, g: torch.Tensor) -> None:
            nonlocal most
            most = max(most, 1 + sum(q.grad is not None for q in trainable(model).values()))
            super().act(training, group, p, g)

    chosen: list[Callback] = [Counting(LomoConfig())]
    run(training(model, chosen), chosen, CUTS["one pack"])
    assert most == 1


def test_dropout_is_the_same_in_both_passes() -> None:
    found = []
    for options in ({}, {"largest": 1e9}):  # two passes, one pass
        model = perturbed("lora", tiny_model(), dropout=0.3)
        for module in model.modules():
            if hasattr(module, "deltas"):
                module.deltas.train()
        chosen: list[Callback] = [Lomo(LomoConfig(**options))]
        run(training(model, chosen, rate=0.1), chosen, CUTS["several"])
        found.append([p.detach() for p in trainable(model).values()])
    assert all(torch.allclose(p, q, rtol=1e-5, atol=1e-7) for p, q in zip(*found, strict=True))


def test_elements_are_cut_where_largest_is_given() -> None:
    model = perturbed("lora", tiny_model())
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    chosen: list[Callback] = [Lomo(LomoConfig(largest=1e-4))]
    run(training(model, chosen, rate=1.0), chosen, CUTS["several"][:1])
    moves = torch.cat([(p.detach() - before[name]).flatten() for name, p in trainable(model).items()])
    assert float(moves.abs().max()) == pytest.approx(1e-4, rel=1e-2)


@pytest.mark.parametrize("where", ["first", "last"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(what: str, where: str) -> None:
    model = perturbed("full", tiny_model())
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    packs = pack(examples(), 60)
    if what == "loss":
        packs[0 if where == "first" else -1].weights[0] = math.inf
    else:
        victim = list(trainable(model).values())[0 if where == "first" else -1]
        victim.register_hook(lambda g: g * math.nan)
    chosen: list[Callback] = [Lomo(LomoConfig())]
    (step,) = run(training(model, chosen), chosen, [packs], on_nonfinite="skip")
    assert step.skipped == f"the {what} of step 1 is not finite"
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in trainable(model).items())


def test_in_a_single_pass_such_a_step_stops_the_run() -> None:
    model = perturbed("full", tiny_model())
    next(iter(trainable(model).values())).register_hook(lambda g: g * math.nan)
    chosen: list[Callback] = [Lomo(LomoConfig(largest=1.0))]
    with raises("training/not-finite", match="last checkpoint"):
        run(training(model, chosen), chosen, CUTS["one pack"], on_nonfinite="skip")


def test_callbacks_that_want_a_whole_gradient_are_refused_beside_it() -> None:
    model = perturbed("lora", tiny_model())
    chosen: list[Callback] = [Lomo(LomoConfig()), Riemannian(RiemannianConfig())]
    with raises("training/conflicting-settings", match="riemannian .* lomo"):
        run(training(model, chosen), chosen, CUTS["one pack"])


def test_methods_with_a_penalty_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from graftlm.deltas.lora import Lora

    monkeypatch.setattr(Lora, "penalty", lambda self: self.B.square().sum())
    model = perturbed("lora", tiny_model())
    chosen: list[Callback] = [Lomo(LomoConfig())]
    with raises("training/callback-unsupported", match="lomo with lora: the penalty"):
        run(training(model, chosen), chosen, CUTS["one pack"])
