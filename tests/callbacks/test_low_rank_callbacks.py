"""LoRA-FA, Riemannian preconditioning and ALLoRA: what each makes of a gradient or of a step, worked out here."""

from typing import Any

import pytest
import torch

from graftlm.callbacks.allora import Allora, AlloraConfig
from graftlm.callbacks.lora_fa import LoraFa, LoraFaConfig
from graftlm.callbacks.riemannian import Riemannian, RiemannianConfig
from graftlm.data.batches.pack import collate
from graftlm.deltas.lora import Lora
from graftlm.model.registry import trainable
from graftlm.testing import tiny_model
from graftlm.testing.deltas import perturbed
from graftlm.training.callback import Callback
from graftlm.training.state import TrainingState
from tests.callbacks.test_callbacks import run, training
from tests.training.test_loop import examples


class Reading(Callback):
    """What the gradients are where it stands in the list of callbacks."""

    def __init__(self) -> None:
        super().__init__(None)
        self.found: dict[str, torch.Tensor] = {}

    def on_grads(self, training: TrainingState) -> None:
        self.found = {n: p.grad.clone() for n, p in training.parameters().items() if p.grad is not None}


def around(callback: Callback, method: str = "lora") -> tuple[Any, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A model whose tensors have not moved, and its gradients before and after the callback."""
    model = perturbed(method, tiny_model())
    before, after = Reading(), Reading()
    state = training(model, [], rate=0.0)
    run(state, [before, callback, after], [[collate(examples())]])
    return model, before.found, after.found


def products(model: Any) -> dict[str, Lora]:
    return {name: part for name, part in model.named_modules() if isinstance(part, Lora)}


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_lora_fa_takes_the_step_nearest_to_full_fine_tuning(method: str) -> None:
    model, before, after = around(LoraFa(LoraFaConfig()), method)
    assert products(model)
    for name, part in products(model).items():
        assert f"{name}.A" not in after
        A, s, G_B = part.A.detach().double(), part.scale, before[f"{name}.B"].double()
        # Any G with s G A^T = G_B is a gradient of W that fits; the nearest s D A to it is found by least squares.
        G = torch.linalg.lstsq(s * A, G_B.T).solution.T
        torch.testing.assert_close(s * G @ A.T, G_B)
        D = torch.linalg.lstsq(s * A.T, G.T).solution.T
        torch.testing.assert_close(after[f"{name}.B"].double(), D, rtol=1e-4, atol=1e-7)


def test_lora_fa_leaves_A_alone() -> None:
    model, chosen = perturbed("lora", tiny_model()), [LoraFa(LoraFaConfig())]
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    state = training(model, list(chosen))
    run(state, list(chosen), [[collate(examples())]] * 2)
    for name, p in state.parameters().items():
        assert torch.equal(p, before[name]) == name.endswith(".A")
        assert p.requires_grad != name.endswith(".A")
        assert (p in state.optimizer.state) != name.endswith(".A")
    chosen[0].on_end(state)
    assert set(trainable(model)) == set(before)


def test_riemannian_steps_do_not_depend_on_how_a_product_is_split() -> None:
    """Without damping, (B / c, c A) moves the product B A as (B, A) does; the plain gradient does not."""
    moves = []
    for c in (1.0, 5.0):
        model = perturbed("lora", tiny_model())
        for part in products(model).values():
            part.A.data *= c
            part.B.data /= c
        reading = Reading()
        run(
            training(model, [], rate=0.0),
            [Riemannian(RiemannianConfig(damping=1e-9)), reading],
            [[collate(examples())]],
        )
        moves.append(
            {
                name: part.B.detach() @ reading.found[f"{name}.A"] + reading.found[f"{name}.B"] @ part.A.detach()
                for name, part in products(model).items()
            }
        )
    for name, move in moves[0].items():
        torch.testing.assert_close(moves[1][name], move, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_riemannian_gradients_solve_the_damped_equations(method: str) -> None:
    model, before, after = around(Riemannian(RiemannianConfig(damping=0.3)), method)
    for name, part in products(model).items():
        A, B, damping = part.A.detach(), part.B.detach(), 0.3 * torch.eye(len(part.A))
        torch.testing.assert_close((B.T @ B + damping) @ after[f"{name}.A"], before[f"{name}.A"], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(after[f"{name}.B"] @ (A @ A.T + damping), before[f"{name}.B"], rtol=1e-4, atol=1e-6)
    for name in before:
        if not name.endswith((".A", ".B")):
            assert torch.equal(before[name], after[name])


def test_allora_scales_the_step_of_each_row() -> None:
    moved = []
    for chosen in ([], [Allora(AlloraConfig(escape=3.0))]):
        model = perturbed("lora", tiny_model())
        for part in products(model).values():
            part.B.data[0] = 0
        start = {name: p.detach().clone() for name, p in trainable(model).items()}
        run(training(model, list(chosen)), list(chosen), [[collate(examples())]])
        moved.append({name: p.detach() - start[name] for name, p in trainable(model).items()})
    plain, scaled = moved
    for name, step in plain.items():
        if not name.endswith(".B"):
            assert torch.equal(scaled[name], step)
            continue
        for row in range(len(step)):
            factor = 1 / (float(start[name][row].norm()) + 1 / 9) ** 0.5
            torch.testing.assert_close(scaled[name][row], factor * step[row], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(scaled[name][0], 3 * step[0], rtol=1e-4, atol=1e-6)
