"""VeLoRA: gradients from what the paper says is kept, all others exact, and the bytes that are kept."""

from typing import Any

import pytest
import torch

from graftlm.callbacks.lora_fa import LoraFa, LoraFaConfig
from graftlm.callbacks.velora import Velora, VeloraConfig
from graftlm.data.batches.pack import collate, pack
from graftlm.model.registry import attachment, hosts, trainable
from graftlm.passes.forward import log_probs
from graftlm.passes.packed_attention import packed_attention
from graftlm.planning.memory import LiveBytes
from graftlm.testing import tiny_model
from graftlm.testing.deltas import perturbed
from graftlm.training.callback import Callback
from graftlm.training.passes import Passes
from graftlm.training.state import TrainingState
from tests.callbacks.test_callbacks import run, training
from tests.errors import raises
from tests.training.test_loop import examples

PACK = collate(examples())
SITES = 14


def held(model: Any) -> TrainingState:
    return TrainingState(model, attachment(model).configs, torch.optim.SGD(trainable(model).values(), lr=0.1), 4, 3)


def forward(model: Any) -> torch.Tensor:
    with packed_attention(model):
        return -(log_probs(model, PACK) * PACK.weights).sum() / PACK.weights.sum()


def gradients(model: Any, callback: Callback | None) -> dict[str, torch.Tensor]:
    if callback is None:
        forward(model).backward()
    else:
        with callback.during(held(model)):
            forward(model).backward()
    return {name: p.grad for name, p in trainable(model).items() if p.grad is not None}


def seen(model: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What goes into every linear site [T, d_in], and the gradient of what comes out [T, d_out]."""
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}
    for site, host in hosts(model).items():

        def note(host: Any, args: Any, y: torch.Tensor, site: str = site) -> None:
            y.retain_grad()
            inputs[site], outputs[site] = args[0].detach(), y

        if host.on()[0].site.kind == "linear":
            host.register_forward_hook(note)
    forward(model).backward()
    return {site: (x.flatten(0, -2), outputs[site].grad.flatten(0, -2)) for site, x in inputs.items()}  # type: ignore[union-attr]


def wanted(x: torch.Tensor, groups: int) -> torch.Tensor:
    """x as the paper makes it again, token by token and group by group."""
    m = x.shape[1] // groups
    v = torch.stack([x[t, i * m : (i + 1) * m] for t in range(len(x)) for i in range(groups)]).mean(0)
    v = v / v.norm()
    again = torch.zeros_like(x)
    for i in range(groups):
        part = x[:, i * m : (i + 1) * m]
        again[:, i * m : (i + 1) * m] = (part @ v)[:, None] * v
    return again


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_the_gradient_of_what_multiplies_x_is_that_of_x_made_again(method: str) -> None:
    exact = gradients(perturbed(method, tiny_model()), None)
    found = gradients(perturbed(method, tiny_model()), Velora(VeloraConfig(groups=8)))
    own = "D" if method == "full" else "A"
    for name, gradient in exact.items():
        if name.rpartition(".")[2] == own and gradient.dim() == 2 and "embed" not in name:
            assert not torch.allclose(found[name], gradient)
        else:
            torch.testing.assert_close(found[name], gradient)
    if method == "dora":
        return
    model = perturbed(method, tiny_model())
    for site, (x, g) in seen(model).items():
        (delta,) = hosts(model)[site].on()
        again = wanted(x, 8)
        if method == "full":
            torch.testing.assert_close(_of(found, site), g.T @ again, rtol=1e-4, atol=1e-6)
        else:
            _, sB = delta.factors()
            torch.testing.assert_close(_of(found, site), (g @ sB).T @ again, rtol=1e-4, atol=1e-6)


def _of(found: dict[str, torch.Tensor], site: str) -> torch.Tensor:
    (name,) = (n for n in found if n.startswith(f"{site}.") and n.rpartition(".")[2] in "AD")
    return found[name]


def test_what_is_kept_of_inputs_is_a_number_a_group() -> None:
    """q, k and v share an input, gate and up too: four inputs a layer for its seven sites."""
    T, d, f = PACK.ids.numel(), 32, 48
    without, within = (_waiting(callback) for callback in (None, Velora(VeloraConfig(groups=8))))
    assert without - within == 4 * T * (2 * (d + d + d + f) - SITES * 8)


def _waiting(callback: Callback | None) -> int:
    model, live = perturbed("lora", tiny_model()), LiveBytes()
    acting = callback or Callback(None)
    with acting.during(held(model)):
        forward(model).backward()  # v is there from now on
        with live:
            loss = forward(model)
            found = live.now
    del loss
    return found


def test_v_stays_that_of_the_first_pack() -> None:
    model, callback = perturbed("lora", tiny_model()), Velora(VeloraConfig(groups=8))
    state = training(model, [callback])
    run(state, [callback], [pack(examples(seed=0), 60)])
    first = {site: v.clone() for site, v in callback.tensors.items()}
    run(state, [callback], [pack(examples(seed=1), 60)])
    assert len(first) == SITES
    assert all(torch.equal(callback.tensors[site], v) for site, v in first.items())
    assert all(float(v.norm()) == pytest.approx(1) for v in first.values())


def test_with_a_frozen_nothing_is_left_to_save() -> None:
    model, callback = perturbed("lora", tiny_model()), Velora(VeloraConfig(groups=8))
    both: list[Callback] = [LoraFa(LoraFaConfig()), callback]
    run(training(model, both), both, [[PACK]])
    assert not callback.tensors


def test_what_has_no_meaning_is_refused() -> None:
    for model, config, says in (
        (perturbed("lora", tiny_model()), VeloraConfig(groups=5), "no 5 groups"),
        (perturbed("lora", tiny_model(), dropout=0.1), VeloraConfig(groups=8), "dropout"),
        (perturbed("mora", tiny_model()), VeloraConfig(groups=8), "of mora not"),
    ):
        callback = Velora(config)
        with raises("training/callback-unsupported", match=says):
            run(training(model, [callback]), [callback], [[PACK]])
    callback = Velora(VeloraConfig(groups=8))
    with raises("training/conflicting-settings", match="checkpointing"):
        run(
            training(perturbed("lora", tiny_model()), [callback]),
            [callback],
            [[PACK]],
            passes=Passes(checkpointing=True),
        )
