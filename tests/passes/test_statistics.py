"""What is gathered before a start, against plain autograd and plain hooks; and that gathering leaves nothing behind."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from graftlm.deltas.lora import LoraConfig
from graftlm.model.attach import attach
from graftlm.model.registry import trainable
from graftlm.passes.statistics import collect
from graftlm.testing.deltas import close, ids, logits, move
from graftlm.testing.tiny import tiny_gpt2, tiny_model
from tests.errors import raises

BATCHES = [(1, 2, 12), (2, 3, 7), (3, 1, 20)]
"""(seed, rows, length): passes with different numbers of tokens."""


def losses(model: Any) -> list[Callable[[], Tensor]]:
    def loss(seed: int, rows: int, length: int) -> Tensor:
        batch = ids(seed, rows, length)
        made: Tensor = model(batch, labels=batch).loss
        return made

    return [lambda at=at: loss(*at) for at in BATCHES]  # type: ignore[misc]


def plain_fisher(model: Any, sites: Iterable[str]) -> dict[str, Tensor]:
    """The mean over the passes of the squared gradient of each of these layers, one pass after the other."""
    twin = copy.deepcopy(model).requires_grad_(True)
    sums: dict[str, Tensor] = {}
    for loss in losses(twin):
        twin.zero_grad()
        loss().backward()
        for site in sites:
            layer = twin.get_submodule(site)
            grad = layer.weight.grad.T if isinstance(layer, Conv1D) else layer.weight.grad
            sums[site] = sums.get(site, torch.zeros_like(grad)) + grad**2 / len(BATCHES)
    return sums


def plainly(model: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(mean gradient of W, mean of x x^T) of every linear layer, from a copy whose weights have gradients."""
    twin = copy.deepcopy(model).requires_grad_(True)
    inputs_by_layer: dict[str, list[Tensor]] = {}
    layers = {name: m for name, m in twin.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    for name, layer in layers.items():
        layer.register_forward_hook(
            lambda _, x, __, name=name: inputs_by_layer.setdefault(name, []).append(x[0].detach())
        )
    for loss in losses(twin):
        (loss() / len(BATCHES)).backward()
    gradients = {
        name: layer.weight.grad.T if isinstance(layer, Conv1D) else layer.weight.grad  # type: ignore[union-attr]
        for name, layer in layers.items()
    }
    moments = {}
    for name, seen in inputs_by_layer.items():
        tokens = [x for batch in seen for row in batch for x in row]
        moments[name] = sum(torch.outer(x, x).double() for x in tokens) / len(tokens)
    return gradients, moments  # type: ignore[return-value]


@pytest.mark.parametrize("make", [tiny_model, tiny_gpt2])
def test_the_gradient_is_autograds_and_the_moment_that_of_all_tokens(make: Callable[[], Any]) -> None:
    model = make()
    gathered = collect(model, LoraConfig(), ("fisher", "gradient", "second_moment"), losses(model))
    gradients, moments = plainly(model)
    squares = plain_fisher(model, gathered)
    assert len(gathered) == (14 if make is tiny_model else 8)
    for site, found in gathered.items():
        assert found.keys() == {"fisher", "gradient", "second_moment"}
        close(found["fisher"], squares[site], f"squared gradient of {site}")
        close(found["gradient"], gradients[site], f"gradient of {site}")
        close(found["second_moment"], moments[site], f"second moment of {site}")


def test_only_what_is_asked_for_is_gathered_and_only_where() -> None:
    model = tiny_model()
    config = LoraConfig(targets=("k_proj", "down_proj"))
    for needs in (("gradient",), ("fisher",), ("second_moment",), ()):
        gathered = collect(model, config, needs, losses(model))
        assert {site.rpartition(".")[2] for site in gathered} == {"k_proj", "down_proj"}
        assert len(gathered) == 4
        assert all(tuple(found) == needs for found in gathered.values())
        assert {site: found["gradient"].shape for site, found in gathered.items() if "gradient" in found} == {
            site: model.get_submodule(site).weight.shape for site in gathered if "gradient" in needs
        }


def test_no_graph_is_built_where_no_gradient_is_wanted() -> None:
    model = tiny_model()
    seen = []

    def loss() -> Tensor:
        made = losses(model)[0]()
        seen.append(made.requires_grad)
        return made

    collect(model, LoraConfig(), ("second_moment",), [loss])
    collect(model, LoraConfig(), ("gradient",), [loss])
    assert seen == [False, True]


def test_float32_comes_from_a_bfloat16_base_and_is_close_to_it() -> None:
    model = tiny_model().bfloat16()
    gathered = collect(model, LoraConfig(), ("gradient", "second_moment"), losses(model))
    gradients, moments = plainly(tiny_model())
    for site, found in gathered.items():
        assert {t.dtype for t in found.values()} == {torch.float32}
        close(found["gradient"], gradients[site], f"gradient of {site}", tolerance=0.05)
        close(found["second_moment"], moments[site], f"second moment of {site}", tolerance=0.05)


@pytest.mark.parametrize("frozen", [True, False])
def test_the_model_is_left_as_it_was(frozen: bool) -> None:
    model = tiny_model().requires_grad_(not frozen)
    before, state = logits(model), {key: t.clone() for key, t in model.state_dict().items()}
    collect(model, LoraConfig(), ("gradient", "second_moment"), losses(model))
    assert torch.equal(logits(model), before)
    assert all(torch.equal(t, state[key]) for key, t in model.state_dict().items())
    assert all(p.requires_grad is not frozen for p in model.parameters())
    assert all(p.grad is None for p in model.parameters()), "no gradient of a weight is kept"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()), "no hook is kept"
    assert not model(ids()).logits.requires_grad or not frozen


def test_it_is_the_bare_base_that_is_gathered_from_where_deltas_are_on_it() -> None:
    model = tiny_model()
    wanted = collect(model, LoraConfig(), ("gradient", "second_moment"), losses(model))
    move(attach(model, LoraConfig(r=4), name="other"))
    moved = logits(model)
    found = collect(model, LoraConfig(), ("gradient", "second_moment"), losses(model))
    assert found.keys() == wanted.keys()
    for site, statistics in wanted.items():
        for key, tensor in statistics.items():
            assert torch.equal(found[site][key], tensor), f"{key} at {site}"
    assert torch.equal(logits(model), moved), "the deltas must be on again"
    assert all(p.requires_grad and p.grad is None for p in trainable(model).values())
    assert len(trainable(model)) == 28


def test_hooks_are_taken_off_when_a_loss_fails() -> None:
    model = tiny_model()

    def broken() -> Tensor:
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        collect(model, LoraConfig(), ("gradient",), [broken])
    assert not any(m._forward_hooks for m in model.modules())


def test_targets_that_match_nothing_are_refused_as_in_attach() -> None:
    with raises("target/no-layer-matches", match="'nothing'"):
        collect(tiny_model(), LoraConfig(targets=("nothing",)), ("gradient",), [])


def test_layers_that_are_no_linear_ones_are_refused() -> None:
    with raises("target/not-a-linear-layer", match="embed_tokens"):
        collect(tiny_model(), LoraConfig(targets=("embed_tokens",)), ("gradient", "second_moment"), [])


def test_what_is_gathered_is_what_attach_takes() -> None:
    model = tiny_model()
    config = LoraConfig(r=4, init="lora-ga")
    gathered = collect(model, config, ("gradient",), losses(model))
    attach(model, config, statistics=gathered)
