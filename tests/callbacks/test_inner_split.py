"""What learns from rows put aside: gradients of two batches in one step, searches made yes or no, ranks that move."""

from typing import Any

import pytest
import torch

from graftlm.callbacks.alora import Alora, AloraConfig
from graftlm.callbacks.autolora import AutoLora, AutoLoraConfig
from graftlm.callbacks.bilora import BiLora, BiLoraConfig
from graftlm.callbacks.diffora import DiffoRA, DiffoRAConfig
from graftlm.data.batches.pack import collate
from graftlm.model.registry import hosts, trainable
from graftlm.passes.forward import log_probs
from graftlm.passes.packed_attention import packed_attention
from graftlm.testing import tiny_model
from graftlm.testing.deltas import attach_tiny, perturbed
from graftlm.training.callback import Callback
from graftlm.training.state import TrainingState
from tests.callbacks.test_callbacks import run, training
from tests.errors import raises
from tests.training.test_loop import examples

ASIDE = collate(examples(seed=50))


def make_inner_loss(model: Any) -> torch.Tensor:
    with packed_attention(model):
        return -(log_probs(model, ASIDE) * ASIDE.weights).sum() / ASIDE.weights.sum()


def with_inner_loss(state: TrainingState) -> TrainingState:
    def inner_loss(gradient: bool) -> torch.Tensor:
        with torch.set_grad_enabled(gradient):
            loss = make_inner_loss(state.model)
        if gradient:
            loss.backward()
        return loss.detach()

    state.inner_loss = inner_loss
    return state


def step(state: TrainingState, chosen: list[Callback], number: int = 0) -> Any:
    return run(state, chosen, [[collate(examples(seed=number))]])[0]


def moved(method: str, chosen: list[Callback], batch: Any) -> dict[str, torch.Tensor]:
    state = with_inner_loss(training(perturbed(method, tiny_model()), []))
    run(state, chosen, [[batch]])
    return {name: p.detach() for name, p in trainable(state.model).items()}


def test_values_learn_from_the_inner_rows_and_vectors_from_the_others() -> None:
    batch = collate(examples())
    here, there = moved("adalora", [], batch), moved("adalora", [], ASIDE)
    for name, p in moved("adalora", [BiLora(BiLoraConfig())], batch).items():
        torch.testing.assert_close(p, there[name] if name.endswith(".E") else here[name])
        assert not torch.equal(here[name], there[name])


def gradients_of_gates(model: Any) -> list[torch.Tensor]:
    """dL/dg [r] of the inner validation split at every site, by autograd over the gates alone."""
    gates = [host.on()[0].g for host in hosts(model).values()]
    return list(torch.autograd.grad(make_inner_loss(model), gates))


def test_ranks_are_searched_by_softmax_variables() -> None:
    """One step of the search in closed form: Adam's first step is the rate times the sign, but for its epsilon."""
    model, batch = perturbed("gated-lora", tiny_model()), collate(examples())
    wanted = []
    with torch.no_grad():
        for host in hosts(model).values():
            host.on()[0].g.fill_(1.0)
    for dg in gradients_of_gates(model):
        dl = 4 * 0.25 * (dg - 0.25 * dg.sum())  # r p_i (dg_i - sum_j p_j dg_j), p = 1 / r
        variables = -0.3 * dl / (dl.abs() + 1e-8)
        wanted.append(4 * variables.exp() / variables.exp().sum())
    state, callback = with_inner_loss(training(model, [], total=10)), AutoLora(AutoLoraConfig(rate=0.3, search=0.5))
    run(state, [callback], [[batch]])
    for (_, _, delta), g in zip(state.sites(), wanted, strict=True):
        torch.testing.assert_close(delta.g.detach(), g)
    assert state.optimizer.state[next(state.sites())[2].A]
    assert next(state.sites())[2].g not in state.optimizer.state, "gates are no matter of the optimizer"


@pytest.mark.parametrize(
    "callback",
    [AutoLora(AutoLoraConfig(rate=0.3, search=0.5)), DiffoRA(DiffoRAConfig(rate=0.3, search=0.5, keep=0.4))],
    ids=["autolora", "diffora"],
)
def test_a_search_ends_with_yes_or_no_and_a_fresh_start(callback: Any) -> None:
    state = with_inner_loss(training(attach_tiny("gated-lora", tiny_model()), [], total=6))
    for number in range(2):
        assert not step(state, [callback], number).events
    before = [delta.g.detach().clone() for _, _, delta in state.sites()]
    (event,) = step(state, [callback], 2).events
    found = {site: delta.g.detach().clone() for _, site, delta in state.sites()}
    assert event["ranks"] == {site: int(g.sum()) for site, g in found.items()}
    assert {float(v) for g in found.values() for v in g} == {0.0, 1.0}
    if callback.config.name == "diffora":
        best = sorted(range(len(before)), key=lambda k: -float(before[k][0]))
        chosen = [k for k, g in enumerate(found.values()) if g.all()]
        assert len(chosen) == round(0.4 * len(before)) == sum(bool(g.any()) for g in found.values())
        assert set(chosen) <= set(best[: len(chosen) + 2]), "the greatest before the last step of the search, or nearly"
    else:
        assert all(g.any() for g in found.values())
    assert not any(delta.B.any() for _, _, delta in state.sites())
    assert not state.optimizer.state
    calls: list[bool] = []
    state.inner_loss = lambda gradient: calls.append(gradient)  # type: ignore[assignment, func-returns-value]
    for number in (3, 4, 5):
        step(state, [callback], number)
    assert not calls, "after the search the inner validation split are not asked any more"
    for (_, site, delta), g in zip(state.sites(), found.values(), strict=True):
        assert torch.equal(delta.g.detach(), g)
        assert bool(delta.B.any()) == bool(g.any()), site
        assert not delta.g.requires_grad


def test_what_leaving_a_rank_out_does_is_its_importance() -> None:
    state, callback = (
        with_inner_loss(training(perturbed("lora", tiny_model()), [], total=20)),
        Alora(AloraConfig(first=3)),
    )
    callback.on_start(state)
    scores = callback.importance(state)
    matrices = [(site, delta.A.detach(), delta.B.detach(), delta.scale) for _, site, delta in state.sites()]

    def loss(is_on: Any) -> float:
        """On a bare model with the ranks that `kept` names in its very weights."""
        model = tiny_model()
        with torch.no_grad():
            for site, A, B, s in matrices:
                for i in range(3):
                    if is_on(site, i):
                        model.get_submodule(site).weight.add_(s * torch.outer(B[:, i], A[i]))
            return float(make_inner_loss(model))

    whole = loss(lambda site, i: True)
    for number, i in ((0, 0), (0, 2), (5, 1), (13, 0)):
        site = matrices[number][0]
        without, alone = loss(lambda s, j: (s, j) != (site, i)), loss(lambda s, j: (s, j) == (site, i))  # noqa: B023
        assert float(scores[number][i]) == pytest.approx(-whole + without - alone, abs=1e-5)
    assert all(float(score[3]) == -torch.inf for score in scores)


def test_ranks_move_and_their_number_stays() -> None:
    state = with_inner_loss(training(attach_tiny("lora", tiny_model()), [], total=8))
    callback = Alora(AloraConfig(first=2, moves=3, every=4, until=0.6))
    for number in range(3):
        assert not step(state, [callback], number).events
    scores: list[Any] = []
    original = callback.importance
    callback.importance = lambda training: scores.append(original(training)) or scores[-1]  # type: ignore[method-assign]
    (event,) = step(state, [callback], 3).events
    sites = [site for _, site, _ in state.sites()]
    worst = sorted((float(s[i]), k, i) for k, s in enumerate(scores[0]) for i in range(2))[:3]
    lost = {k for _, k, _ in worst}
    gained = sorted((k for k in range(len(sites)) if k not in lost), key=lambda k: -float(scores[0][k][:2].mean()))[:3]
    wanted = {site: 2 - sum(k == w for _, w, _ in worst) + (k in gained) for k, site in enumerate(sites)}
    assert event["ranks"] == wanted
    assert event["total"] == 2 * len(sites)
    for number in range(4, 8):
        assert not step(state, [callback], number).events
    for _, site, delta in state.sites():
        assert int(delta.B.detach().any(0).sum()) == wanted[site]


@pytest.mark.parametrize(
    ("method", "callback", "says"),
    [("lora", BiLora(BiLoraConfig()), "method: adalora"), ("lora", AutoLora(AutoLoraConfig()), "method: gated-lora"),
     ("dora", Alora(AloraConfig()), "method: lora"), ("lora", Alora(AloraConfig(first=4)), "could gain a rank"),
     ("gated-lora", DiffoRA(DiffoRAConfig(search=0.1)), "no two steps"),
     ("lora", Alora(AloraConfig(first=2, every=90)), "no 90 steps")],
)  # fmt: skip
def test_what_has_no_meaning_is_refused(method: str, callback: Callback, says: str) -> None:
    with raises("training/callback-unsupported", match=says):
        step(with_inner_loss(training(perturbed(method, tiny_model()), [])), [callback])


def test_without_an_inner_split_it_is_refused() -> None:
    with raises("training/callback-unsupported", match="inner validation split"):
        step(training(perturbed("adalora", tiny_model()), []), [BiLora(BiLoraConfig())])
