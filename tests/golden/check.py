"""Comparison of whole tensors, outputs and gradients, with an independent implementation.

`against_peft` for every method that PEFT has too: both ways through the disk. `against_reference` for the others: a
plain function of the test that computes the layer by another reading of the paper.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from graftlm.adapters.load import load_adapter
from graftlm.adapters.peft import why_not_peft
from graftlm.adapters.save import save_adapter
from graftlm.adapters.tensors import stored_tensors
from graftlm.deltas import METHODS
from graftlm.model.hosts import LayerHost
from graftlm.model.registry import attachment, hosts, trainable
from graftlm.testing import tiny_model
from graftlm.testing.deltas import close, ids, logits, perturbed

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def against_peft(
    name: str, peft_config: Any, folder: Path, *, base: Callable[[], Any] = tiny_model, scale: float = 0.1
) -> Any:
    """PEFT's adapter in ours and ours in PEFT: logits and every gradient; returns our model with PEFT's adapter.

    Logits are weighted at random: a regular pattern can cancel a gradient down to its rounding.
    """
    theirs = get_peft_model(base(), peft_config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainable(theirs).values():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(folder / "theirs")
    ours = base()
    load_adapter(ours, folder / "theirs")
    assert attachment(ours).configs["default"].method == name
    close(logits(ours), _rows(theirs), f"{name}: PEFT's adapter here against PEFT")
    for model in (ours, theirs):
        out = model(ids()).logits[:, -ids().shape[1] :]  # PEFT also returns the positions of a prompt
        (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    layout = METHODS[name].delta.peft
    mine = {k: t for k, t in stored_tensors(ours, "default", layout).items() if isinstance(t, nn.Parameter)}
    wanted = {key.replace(".default", ""): p for key, p in trainable(theirs).items()}
    wanted = {("prompt_embeddings" if "prompt_encoder" in key else key): p for key, p in wanted.items()}
    wanted = {key.replace("magnitude_vector.weight", "magnitude_vector"): p for key, p in wanted.items()}  # as on disk
    assert mine.keys() == wanted.keys()
    single: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for key, parameter in mine.items():
        grad, wanted_grad = parameter.grad, wanted[key].grad
        assert grad is not None
        assert wanted_grad is not None
        if parameter.numel() == 1:
            single.setdefault(key.rpartition(".")[2], []).append((grad, wanted_grad))
        else:
            close(grad, wanted_grad, f"{name}: gradient of {key}")
    _close_together(name, single)
    save_adapter(ours, folder / "ours")
    again = PeftModel.from_pretrained(base(), folder / "ours")
    close(_rows(again), _rows(theirs), f"{name}: our adapter in PEFT")
    return ours


def pattern_comes_and_is_not_written(peft_config: Any, key: str, folder: Path) -> None:
    """A pattern of PEFT's config loads, and what has it is written in our format: PEFT would not find our names."""
    theirs = get_peft_model(tiny_model(), peft_config).eval()
    theirs.save_pretrained(folder / "theirs")
    ours = tiny_model()
    load_adapter(ours, folder / "theirs")
    close(logits(ours), logits(theirs), key)
    assert key in why_not_peft(ours)
    save_adapter(ours, folder / "ours")
    again = tiny_model()
    load_adapter(again, folder / "ours")
    assert torch.equal(logits(again), logits(ours))


def _rows(model: Any) -> Tensor:
    return logits(model)[:, -ids().shape[1] :]


Reference = Callable[[Mapping[str, Tensor], Tensor, Tensor | None, Tensor, Any], Tensor]
"""(the delta's tensors by name, W, b, x, the delta) -> the layer's output"""


def against_reference(name: str, reference: Reference, *, base: Callable[[], Any] = tiny_model, **changes: Any) -> None:
    """At every site of the tiny model: the layer's output and every gradient, ours against the reference's in float64.

    Outputs are weighted at random.
    """
    model = perturbed(name, base(), **changes)
    single: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for site, host in hosts(model).items():
        assert isinstance(host, LayerHost)
        (delta,) = host.on()
        if host.view.kind == "embedding":
            x = torch.randint(0, delta.site.d_in, (7,), generator=torch.Generator().manual_seed(2))
        else:
            x = torch.randn(7, delta.site.d_in, generator=torch.Generator().manual_seed(2))
        tensors = {**dict(delta.named_parameters()), **dict(delta.named_buffers())}
        weights = {key: p for key, p in tensors.items() if p.requires_grad}
        if delta.site.shared is not None:
            tensors |= {f"shared.{k}": t for k, t in delta.site.shared.named_buffers()}
            shared = {f"shared.{k}": p for k, p in delta.site.shared.named_parameters()}
            tensors, weights = tensors | shared, weights | shared
        exact = {key: _float64(t) for key, t in tensors.items()}
        W, b = host.view.weight.double(), None if host.view.bias is None else host.view.bias.double()
        y, wanted_y = host(x), reference(exact, W, b, _float64(x), delta)
        close(y, wanted_y, f"{name} at {site}: output")
        direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
        grads = _gradients(y, direction, weights)
        wanted = _gradients(wanted_y, direction.double(), {key: exact[key] for key in weights})
        for key in weights:
            mine, exactly = grads[key], wanted[key]
            assert (mine is None) == (exactly is None), f"{name} at {site}: {key} has a gradient in one only"
            if mine is not None and exactly is not None and mine.numel() == 1:
                single.setdefault(key, []).append((mine, exactly))
            elif mine is not None and exactly is not None:
                close(mine, exactly, f"{name} at {site}: gradient of {key}")
    _close_together(name, single)


def _close_together(name: str, single: Mapping[str, list[tuple[Tensor, Tensor]]]) -> None:
    """Gradients of tensors of one number, of all sites as one: at a single site the number may be a sum that cancels,
    and then has no digits of its own."""
    for key, pairs in single.items():
        mine, wanted = (torch.stack([pair[side].flatten() for pair in pairs]) for side in (0, 1))
        close(mine, wanted, f"{name}: gradient of every {key}")


def _float64(t: Tensor) -> Tensor:
    """A leaf in float64 with the same values; integers as they are."""
    return t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t


def _gradients(y: Tensor, direction: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    found = torch.autograd.grad((y * direction).sum(), list(weights.values()), allow_unused=True)
    return dict(zip(weights, found, strict=True))
