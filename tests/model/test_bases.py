"""A kind of layer is one view, and every method works on it untouched: here on every quantization."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from graftlm.adapters.load import load_adapter
from graftlm.adapters.save import save_adapter
from graftlm.deltas import METHODS
from graftlm.hub.quantize_base import quantize
from graftlm.model.attach import detach
from graftlm.model.bases import Residual, view
from graftlm.model.hosts import LayerHost
from graftlm.model.modes import deltas_off
from graftlm.model.quantize import CODECS, QuantizedLinear
from graftlm.model.registry import hosts, trainable
from graftlm.testing import tiny_model
from graftlm.testing.deltas import attach_tiny, close, ids, logits, move

QUANTIZATIONS = sorted(CODECS)


def quantized_model(quantization: str, **changes: Any) -> Any:
    return quantize(tiny_model(**{"tie_word_embeddings": False} | changes), quantization)


@pytest.mark.sampled
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_works_on_quantized_layers(name: str, quantization: str, tmp_path: Path) -> None:
    model = quantized_model(quantization)
    modules, base = dict(model.named_modules()), logits(model)
    attach_tiny(name, model)
    if not METHODS[name].delta.starts_away:
        close(logits(model), base, "a fresh delta")
    move(model)
    on = logits(model)
    with deltas_off(model):
        assert torch.equal(logits(model), base)
    save_adapter(model, tmp_path / "a")
    again = quantized_model(quantization)
    load_adapter(again, tmp_path / "a")
    assert torch.equal(logits(again), on)
    model(ids()).logits.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in trainable(model).values())
    if METHODS[name].mergeable:
        plain = tiny_model(tie_word_embeddings=False)
        with torch.no_grad():
            for site, host in hosts(model).items():
                assert isinstance(host, LayerHost)
                layer, (W, b) = plain.get_submodule(site), host.effective()
                layer.weight.copy_(host.view.store(W))
                if b is not None and host.view.kind == "linear":
                    layer.bias = nn.Parameter(b)
            for site, module in modules.items():  # layers without a delta hold what was dequantized
                if isinstance(module, QuantizedLinear) and site not in hosts(model):
                    plain.get_submodule(site).weight.copy_(module.dequantized())
        close(logits(plain), on, "float weights against the delta on quantized ones")
    detach(model)
    assert dict(model.named_modules()) == modules
    assert torch.equal(logits(model), base)


def test_a_residual_answers_as_if_its_weight_were_stored() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 5)
    whole = view(layer)
    assert whole is not None
    A0, B0 = torch.randn(2, 6), torch.randn(5, 2)
    made = Residual(whole, A0, B0)
    plain = nn.Linear(6, 5)
    with torch.no_grad():
        plain.weight.copy_(layer.weight - B0 @ A0)
        plain.bias.copy_(layer.bias)
    wanted = view(plain)
    assert wanted is not None
    x, A, B, gain = torch.randn(3, 6), torch.randn(4, 6), torch.randn(5, 4), torch.rand(5)
    close(made.weight, wanted.weight, "weight")
    close(made(x), wanted(x), "the layer")
    close(made.low_rank(x, A, B), wanted.low_rank(x, A, B), "low_rank")
    close(made.low_rank(x, A, B, gain), wanted.low_rank(x, A, B, gain), "low_rank with a gain")
    close(made.product(A), wanted.weight @ A.T, "product")
    close(made.row_norms(), wanted.row_norms(), "row_norms")
    close(made.row_norms(A, B), (wanted.weight + B @ A).norm(dim=1), "row_norms of a sum")
    close(made.apply(x, wanted.weight, None), x @ wanted.weight.T, "apply")
    assert made.bias is not None
    assert torch.equal(made.bias, layer.bias)


def test_row_norms_are_those_of_the_numbers_that_are_there_now() -> None:
    layer = nn.Linear(6, 5)
    made = view(layer)
    assert made is not None
    close(made.row_norms(), layer.weight.norm(dim=1), "first")
    with torch.no_grad():
        layer.weight.mul_(2)
    close(made.row_norms(), layer.weight.norm(dim=1), "after the weight changed")


def test_the_gain_of_the_fused_operation_has_the_gradient_of_the_equation() -> None:
    torch.manual_seed(1)
    layer = nn.Linear(6, 5)
    made = view(layer)
    assert made is not None
    tensors = [torch.randn(s, requires_grad=True) for s in ((7, 6), (3, 6), (5, 3), (5,))]
    x, A, B, gain = tensors
    outputs = made.low_rank(x, A, B, gain), gain * (x @ (layer.weight.detach() + B @ A).T) + layer.bias.detach()
    grads = [torch.autograd.grad(y.sin().sum(), tensors) for y in outputs]
    close(outputs[0], outputs[1], "output")
    for ours, wanted in zip(*grads, strict=True):
        close(ours, wanted, "gradient")
