"""The collector: what inits and methods may want to know of the data before they start, gathered once.

gradient        dL/dW [d_out, d_in], the mean over the passes
fisher          (dL/dW)^2 [d_out, d_in], the mean over the passes: the diagonal of the empirical Fisher information
second_moment   the mean of x x^T over all tokens [d_in, d_in]
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.deltas.base import DeltaConfig
from graftlm.errors import TargetError
from graftlm.model.bases import view
from graftlm.model.hosts import LayerHost
from graftlm.model.modes import deltas_off
from graftlm.model.parts import indices
from graftlm.model.sites import part_of, sites_of


def collect(
    model: Any, config: DeltaConfig, needs: Iterable[str], losses: Iterable[Callable[[], Tensor]]
) -> dict[str, dict[str, Tensor]]:
    """Gather statistics of the sites that `config` means, from passes over the bare base.

    Returns {site: {name: tensor}}, float32; `needs` are names among gradient, fisher and second_moment.
    Each entry of `losses` runs the model once and returns its loss. No weight gradient is kept but the running mean,
    and that layer by layer: memory is one matrix a site. Raises TargetError where `config` matches no layer.
    """
    needs = tuple(needs)
    backwards = bool({"gradient", "fisher"} & set(needs))
    sites = {site.name: site for site in sites_of(model, config)}
    sums: dict[str, dict[str, Tensor]] = {name: {} for name in sites}
    tokens = dict.fromkeys(sites, 0)
    passes = 0

    def watch(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
            if "second_moment" in needs:
                _add(sums[name], "second_moment", x.T @ x)
                tokens[name] += len(x)
            if backwards and y.requires_grad:
                y.register_hook(lambda g: back(g.reshape(-1, g.shape[-1]).float().T @ x))

        def back(gradient: Tensor) -> None:
            if sites[name].rows is not None:
                gradient = gradient[indices(sites[name], gradient)]
            if "fisher" in needs:
                _add(sums[name], "fisher", gradient.square())
            if "gradient" in needs:
                _add(sums[name], "gradient", gradient)

        return hook

    with ExitStack() as stack:
        for parameter in model.parameters():
            if parameter.requires_grad:  # of a base that nobody froze: its gradients are not wanted
                stack.callback(parameter.requires_grad_(False).requires_grad_, True)
        stack.enter_context(deltas_off(model))
        for name in sites:
            layer = _linear_layer(model, name, needs)
            stack.callback(layer.register_forward_hook(watch(name)).remove)
        embeddings = model.get_input_embeddings()
        stack.callback(embeddings.register_forward_hook(lambda _, __, y: y.requires_grad_()).remove)
        for loss in losses:
            passes += 1
            with torch.set_grad_enabled(backwards):
                loss_value = loss()
            if backwards:
                loss_value.backward()
    for name, found in sums.items():
        for key, tensor in found.items():
            tensor.div_(tokens[name] if key == "second_moment" else passes)
    return sums


def _linear_layer(model: nn.Module, site: str, needs: Iterable[str]) -> nn.Module:
    """The linear layer of a site, or that the site is a part of; TargetError for a layer of another kind."""
    at = part_of(model, site)
    module = model.get_submodule(at[0] if at else site)
    layer = module.base if isinstance(module, LayerHost) else module
    base = view(layer)
    assert base is not None
    if base.kind != "linear":
        raise TargetError(
            f"{site}: {' and '.join(needs)} are gathered at linear layers, this is of kind {base.kind}",
            code="not-a-linear-layer",
        )
    return layer


def _add(where: dict[str, Tensor], key: str, value: Tensor) -> None:
    where[key] = value if key not in where else where[key].add_(value)
