"""I-LoRA: one step worked out by autograd over the loss as the paper writes it, and what runs and ends with what."""

from typing import Any

import pytest
import torch

from graftlm.callbacks.i_lora import ILora, ILoraConfig
from graftlm.data.batches.pack import collate
from graftlm.model.registry import trainable
from graftlm.passes.forward import log_probs
from graftlm.passes.packed_attention import packed_attention
from graftlm.testing import tiny_model
from graftlm.testing.deltas import perturbed
from graftlm.training.callback import Callback
from graftlm.training.passes import Passes
from graftlm.training.state import TrainingState
from tests.callbacks.test_callbacks import run, training
from tests.callbacks.test_inner_split import with_inner_loss
from tests.errors import raises
from tests.training.test_loop import examples

NOW, BEFORE = collate(examples(seed=1)), collate(examples(seed=50))


def passed(model: Any, pack: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean loss, [layers, T, d] what each layer puts out)."""
    out: list[torch.Tensor] = []
    hooks = [layer.register_forward_hook(lambda m, a, y: out.append(y)) for layer in model.model.layers]
    with packed_attention(model):
        loss = -(log_probs(model, pack) * pack.weights).sum() / pack.weights.sum()
    for hook in hooks:
        hook.remove()
    return loss, torch.cat([y if isinstance(y, torch.Tensor) else y[0] for y in out])


class Gradients(Callback):
    """What the optimizer is about to see, step by step."""

    def __init__(self) -> None:
        super().__init__(None)
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_grads(self, training: TrainingState) -> None:
        self.seen.append({name: p.grad.clone() for name, p in training.parameters().items() if p.grad is not None})


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_is_that_of_the_loss_of_the_paper(checkpointing: bool) -> None:
    model, gamma = perturbed("lora", tiny_model()), 7.0
    callback, watching = ILora(ILoraConfig(decay=0.6, tie=gamma)), Gradients()
    state = with_inner_loss(training(model, [], rate=0.05))
    slow = perturbed("lora", tiny_model())
    starts = [{name: p.detach().clone() for name, p in trainable(model).items()}]
    for number in range(2):
        run(state, [callback, watching], [[NOW]], passes=Passes(checkpointing=checkpointing))
        starts.append({name: p.detach().clone() for name, p in trainable(model).items()})
        t = number + 1
        a = min(0.6, t / (t + 9))
        fast = perturbed("lora", tiny_model())
        fast.load_state_dict(starts[number], strict=False)
        with torch.no_grad():
            _, h_slow = passed(slow, BEFORE)
        before, h_fast = passed(fast, BEFORE)
        ((passed(fast, NOW)[0] + before) / 2 + gamma * (h_fast - h_slow).square().mean()).backward()
        for name, p in trainable(fast).items():
            torch.testing.assert_close(watching.seen[number][name], p.grad, rtol=1e-4, atol=1e-6)
        with torch.no_grad():
            for name, p in trainable(slow).items():
                p.copy_(a * p + (1 - a) * starts[-1][name])
    assert not torch.allclose(h_fast, h_slow), "the second step has something to tie"
    with callback.evaluating(state):
        for name, p in trainable(slow).items():
            torch.testing.assert_close(trainable(model)[name].detach(), p.detach())


def test_without_an_inner_split_it_is_refused() -> None:
    with raises("training/callback-unsupported", match="inner validation split"):
        run(training(perturbed("lora", tiny_model()), []), [ILora(ILoraConfig())], [[NOW]])
