"""AdaLoRA's callback against Algorithm 1 in plain code, and its scores and choice against PEFT's RankAllocator."""

from typing import Any

import pytest
import torch
from peft import AdaLoraConfig as PeftConfig
from peft.tuners.adalora.layer import RankAllocator
from torch import nn

from graftlm.callbacks.adalora import AdaLoraCallback, AdaLoraCallbackConfig
from graftlm.data.batches.pack import collate
from graftlm.deltas import METHODS
from graftlm.deltas.adalora import AdaLora, AdaLoraConfig
from graftlm.deltas.base import Site
from graftlm.testing import tiny_model
from graftlm.testing.deltas import perturbed
from graftlm.training.callback import Callback
from graftlm.training.state import TrainingState
from tests.callbacks.tables import TABLE
from tests.callbacks.test_callbacks import run, training
from tests.errors import raises
from tests.training.test_loop import examples

TOTAL = 20
SETTINGS: dict[str, Any] = {"target_r": 2, "every": 3, "warmup": 0.1, "final": 0.2, "beta1": 0.7, "beta2": 0.8}


class Spy(Callback):
    """Keeps every tensor with its gradient before a step, and E after it, before any other callback has changed it."""

    def __init__(self) -> None:
        super().__init__(None)
        self.steps: list[dict[str, Any]] = []

    def on_grads(self, training: TrainingState) -> None:
        parameters = training.parameters()
        self.steps.append(
            {n: (p.detach().clone(), p.grad.clone()) for n, p in parameters.items() if p.grad is not None}
        )

    def on_step(self, training: TrainingState) -> None:
        self.steps[-1]["E"] = [delta.E.detach().clone()[:, 0] for _, _, delta in training.sites()]


def ran() -> tuple[TrainingState, Spy, AdaLoraCallback, list[Any], list[Any]]:
    model, spy, callback = perturbed("adalora", tiny_model()), Spy(), AdaLoraCallback(AdaLoraCallbackConfig(**SETTINGS))
    state, after, events = training(model, [], total=TOTAL), [], []
    for number in range(TOTAL):
        (step,) = run(state, [spy, callback], [[collate(examples(seed=number))]])
        after.append([delta.E.detach().clone()[:, 0] for _, _, delta in state.sites()])
        events.append(step.events)
    return state, spy, callback, after, events


def test_every_step_is_that_of_the_algorithm() -> None:
    state, spy, _, after, events = ran()
    sites = [f"{site}.deltas.{name}" for name, site, _ in state.sites()]
    smooth: dict[str, Any] = {}
    unsure: dict[str, Any] = {}
    lives: list[Any] = []
    full = 4 * len(sites)
    for t, seen in enumerate(spy.steps, start=1):
        for name, pair in seen.items():
            if name != "E" and t <= 16:
                here = (pair[0] * pair[1]).abs()
                smooth[name] = 0.7 * smooth.get(name, 0) + 0.3 * here
                unsure[name] = 0.8 * unsure.get(name, 0) + 0.2 * (here - smooth[name]).abs()
        budget = full if t <= 2 else round(full / 2) if t >= 16 else int(full / 2 + full / 2 * (1 - (t - 2) / 14) ** 3)
        if t == 16 or (2 < t < 16 and t % 3 == 0):
            scores = []
            for site in sites:
                score = {k: smooth[f"{site}.{k}"] * unsure[f"{site}.{k}"] for k in "PEQ"}
                for i in range(4):
                    value = score["E"][i, 0] + score["P"][:, i].mean() + score["Q"][i].mean()
                    scores.append((float(value), site, i))
            best = {(site, i) for _, site, i in sorted(scores, reverse=True)[:budget]}
            lives = [torch.tensor([(site, i) in best for i in range(4)]) for site in sites]
            assert events[t - 1][0]["total"] == sum(map(int, map(sum, lives))) == budget
        pruned = lives and (t >= 16 or t % 3 == 0)
        for number, E in enumerate(seen["E"]):
            wanted = E * lives[number] if pruned else E
            assert torch.equal(after[t - 1][number], wanted)
    assert int(sum((E != 0).sum() for E in after[-1])) == full // 2
    assert len({int((E != 0).sum()) for E in after[-1]}) > 1, "sites have ranks of their own"


def test_beside_an_optimizer_that_leaves_no_gradient_it_is_refused() -> None:
    lomo = TABLE["lomo"].callback(TABLE["lomo"].config())
    state = training(perturbed("adalora", tiny_model()), [lomo], total=TOTAL)
    chosen: list[Callback] = [AdaLoraCallback(AdaLoraCallbackConfig(**SETTINGS)), lomo]
    with raises("training/conflicting-settings", match="lomo"):
        run(state, chosen, [[collate(examples())]])


def test_scores_and_choice_are_those_of_peft() -> None:
    """What PEFT's allocator makes of the same weights and gradients."""
    state, spy, callback, _, _ = ran()
    theirs: Any = nn.Module()
    names = {"P": "lora_B", "E": "lora_E", "Q": "lora_A"}
    here = state.parameters()
    renamed = {n: n.rpartition(".")[0].replace(".", "_") + f"_{names[n[-1]]}" for n in here}
    modules: dict[str, Any] = {n: nn.ParameterDict({"default": nn.Parameter(p.detach())}) for n, p in here.items()}
    for n, module in modules.items():
        theirs.add_module(renamed[n], module)
    config = PeftConfig(target_r=2, beta1=0.7, beta2=0.8, total_step=100)
    peft = RankAllocator(theirs, config, "default")
    for seen in spy.steps[:16]:
        for n, module in modules.items():
            module["default"].data, module["default"].grad = seen[n][0].clone(), seen[n][1]
        peft.update_ipt(theirs)
    pattern = peft.mask_to_budget(theirs, 2 * len(list(state.sites())))
    for name, site, _ in state.sites():
        key = f"{site}.deltas.{name}.E"
        assert pattern[f"{renamed[key]}.default"] == callback.tensors[f"lives/{name}/{site}"].bool().tolist()
        for what, wanted in (("smooth", peft.exp_avg_ipt), ("unsure", peft.exp_avg_unc)):
            ours = callback.tensors[f"{what}/{name}/{site}.Q"]
            torch.testing.assert_close(ours, wanted[f"{renamed[f'{site}.deltas.{name}.Q']}.default"])


@pytest.mark.parametrize(
    ("method", "changes", "says"),
    [("lora", {}, "method: adalora"), ("adalora", {"target_r": 4}, "nothing to prune"),
     ("adalora", {"target_r": 2, "warmup": 0.6, "final": 0.5}, "no steps")],
)  # fmt: skip
def test_what_has_no_meaning_is_refused(method: str, changes: dict[str, Any], says: str) -> None:
    state = training(perturbed(method, tiny_model()), [])
    with raises("training/callback-unsupported", match=says):
        run(state, [AdaLoraCallback(AdaLoraCallbackConfig(**changes))], [[collate(examples())]])


@pytest.mark.parametrize(("rate", "holds"), [(METHODS["adalora"].delta.learning_rate, True), (0.128, False)])
def test_at_the_default_rate_p_and_q_stay_nearly_orthogonal(rate: float, holds: bool) -> None:
    """A layer of 576 x 576 that learns a random change for 8 steps: what the penalty says before and after."""
    W = torch.randn(576, 576, generator=torch.Generator().manual_seed(1)) / 24
    delta = AdaLora(Site("a.b", 576, 576, lambda: W, 0), AdaLoraConfig())
    optimizer = torch.optim.AdamW(delta.parameters(), lr=rate, weight_decay=0.0)
    draw, found = torch.Generator().manual_seed(2), []
    wanted = torch.randn(576, 576, generator=draw) / 24
    for step in range(8):
        penalty = delta.penalty()
        assert penalty is not None
        found.append(float(penalty.detach()))
        x = torch.randn(64, 576, generator=draw)
        loss = (x @ (delta.matrix() - wanted).T).square().mean() + penalty
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = rate * (1 - step / 8)
        optimizer.step()
    found.append(float(delta.penalty().detach()))  # type: ignore[union-attr]
    assert (found[-1] < 3 * found[0]) == holds, found
