"""Checkpointing and offloading change what is kept, counted in bytes, and no number."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from graftlm.data.batches.pack import Example, Pack, collate
from graftlm.model.attach import attach
from graftlm.model.registry import hosts, trainable
from graftlm.passes.forward import log_probs
from graftlm.passes.packed_attention import packed_attention
from graftlm.passes.recompute import is_recomputed, offloaded, recomputed_layers
from graftlm.testing import tiny_model
from graftlm.testing.contract import OneLayer
from graftlm.testing.deltas import perturbed, tiny_config
from tests.errors import raises

pytestmark = pytest.mark.versions

METHODS = ("lora", "dora", "reslora", "prefix", "prompt", "houlsby", "vera")
Context = Callable[[Any], AbstractContextManager[None]]


def packed(lengths: tuple[int, ...] = (11, 7, 20), seed: int = 0) -> Pack:
    """Rows of random ids, of which every third is trained."""
    random = np.random.default_rng(seed)
    weights = [(np.arange(n) % 3 == 1).astype(np.float32) for n in lengths]
    return collate([Example(random.integers(3, 300, len(w)).astype(np.int32), w, "row") for w in weights])


def loss_of(model: Any, pack: Pack) -> Tensor:
    return -(pack.weights * log_probs(model, pack)).sum()


def trained(model: Any, context: Context, pack: Pack) -> tuple[float, dict[str, Tensor]]:
    """The loss and all gradients of two packs, one after the other."""
    for host in hosts(model).values():
        host.deltas.train()
    torch.manual_seed(7)
    total = 0.0
    with packed_attention(model), context(model):
        for each in (pack, packed((4, 9), seed=1)):
            loss = loss_of(model, each)
            loss.backward()
            total += float(loss.detach())
    found = {name: p.grad.clone() for name, p in trainable(model).items() if p.grad is not None}
    assert found.keys() == trainable(model).keys()
    return total, found


def assert_equal(ours: tuple[float, dict[str, Tensor]], wanted: tuple[float, dict[str, Tensor]]) -> None:
    assert ours[0] == pytest.approx(wanted[0], rel=1e-6)
    for name, tensor in wanted[1].items():
        assert (ours[1][name] - tensor).abs().max() <= 1e-6 * tensor.abs().max(), name


@pytest.mark.parametrize("kind", ["llama", "stablelm", "gpt2"])
def test_each_pack_is_recomputed_by_its_own_segments(kind: str) -> None:
    """Two forward passes before the backward passes, which run in a thread that has never seen a plan."""
    found = []
    for context in (nullcontext, lambda model: recomputed_layers(model)):
        model = perturbed("lora", tiny_model(kind))
        with packed_attention(model), context(model):
            total = loss_of(model, packed()) + loss_of(model, packed((4, 9), seed=1))
            thread = Thread(target=total.backward)
            thread.start()
            thread.join()
        found.append({name: p.grad for name, p in trainable(model).items()})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert gradient is not None, name
        assert (found[1][name] - gradient).abs().max() <= 1e-6 * gradient.abs().max(), name


def test_a_forward_that_was_set_on_a_layer_is_put_back() -> None:
    model = perturbed("lora", tiny_model())
    layer = model.model.layers[0]
    layer.forward = patched = partial(type(layer).forward, layer)
    assert not is_recomputed(model)
    with recomputed_layers(model):
        assert is_recomputed(model)
    assert layer.forward is patched
    assert not is_recomputed(model)
    with recomputed_layers(model):
        layer.forward = later = partial(type(layer).forward, layer)
    assert layer.forward is later
    assert "forward" not in vars(model.model.layers[1])


@pytest.mark.parametrize("context", [recomputed_layers, offloaded])
@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradients_are_the_same(method: str, context: Context) -> None:
    wanted = trained(perturbed(method, tiny_model()), lambda model: nullcontext(), packed())
    assert_equal(trained(perturbed(method, tiny_model()), context, packed()), wanted)


@pytest.mark.parametrize("method", ["lora", "dora", "vera"])
def test_what_dropout_drew_is_drawn_again(method: str) -> None:
    def model() -> Any:
        return perturbed(method, tiny_model(), dropout=0.4)

    wanted = trained(model(), lambda model: nullcontext(), packed())
    assert_equal(trained(model(), recomputed_layers, packed()), wanted)
    without = trained(perturbed(method, tiny_model()), recomputed_layers, packed())
    assert without[0] != pytest.approx(wanted[0], rel=1e-5), "dropout was on"


def saved_bytes(model: Any, context: Context, pack: Pack) -> int:
    """Bytes that autograd holds between the passes, weights left out; each piece of memory once."""
    weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    held: dict[int, tuple[int, Tensor]] = {}

    def note(tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in weights:
            held[memory.data_ptr()] = memory.nbytes(), tensor
        return tensor

    with packed_attention(model), ExitStack() as held_open:
        held_open.enter_context(torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor))
        held_open.enter_context(context(model))
        loss_of(model, pack)
    return sum(size for size, _ in held.values())


@pytest.mark.parametrize("method", ["lora", "dora", "vera"])
def test_less_is_kept(method: str) -> None:
    layers = 4

    def model() -> Any:
        return perturbed(method, tiny_model(num_hidden_layers=layers))

    everything = saved_bytes(model(), lambda model: nullcontext(), packed())
    less = saved_bytes(model(), recomputed_layers, packed())
    tokens, d, bytes_each = 38, 32, 4
    assert everything > layers * 10 * tokens * d * bytes_each
    assert less < layers * 4 * tokens * d * bytes_each, "about one hidden state for each layer"


def test_offloading_leaves_weights_where_they_are() -> None:
    model = perturbed("lora", tiny_model())
    weights = {p.data_ptr() for p in model.parameters()}
    copied: list[Tensor] = []
    original = Tensor.to

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args == ("cpu",):
            copied.append(tensor)
        return original(tensor, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, packed_attention(model):
        patch.setattr(Tensor, "to", counted)
        with offloaded(model):
            loss_of(model, packed())
    assert copied
    assert not weights & {tensor.data_ptr() for tensor in copied}


def test_the_model_is_as_it_was_afterwards() -> None:
    model = perturbed("lora", tiny_model())
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    with recomputed_layers(model):
        pass
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before


def test_a_model_without_decoder_layers_is_refused() -> None:
    with raises("training/no-decoder-layers", match="train.checkpointing: OneLayer"):
        recomputed_layers(OneLayer()).__enter__()


# Below the lowest site ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "dora", "bitfit"])
def test_nothing_is_kept_below_the_lowest_site(method: str) -> None:
    """With sites in the last layer only, as much is kept in a model of two layers as in one of six."""
    counts = []
    for layers in (2, 6):
        model = tiny_model(num_hidden_layers=layers)
        attach(model, tiny_config(method, targets=(f"layers.{layers - 1}.mlp.up_proj",)))
        counts.append(saved_bytes(model, lambda model: nullcontext(), packed()))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("method", ["lora", "dora", "bitfit", "vera"])
def test_no_gradient_is_computed_for_the_input_of_the_lowest_site(method: str) -> None:
    model = tiny_model()
    attach(model, tiny_config(method, targets=("layers.1.mlp.up_proj",)))
    (host,) = hosts(model).values()
    inputs: list[Tensor] = []
    host.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with packed_attention(model):
        loss_of(model, packed()).backward()
    assert inputs
    assert not any(x.requires_grad for x in inputs)
