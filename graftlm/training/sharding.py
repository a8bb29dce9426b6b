"""A frozen base in parts: each rank holds some of every layer's matrices (FSDP2, `train.shard: fsdp`)."""

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from graftlm import distributed
from graftlm.deltas.base import InputDelta
from graftlm.errors import TrainingError
from graftlm.hub.fingerprint import fingerprint
from graftlm.model.registry import hosts
from graftlm.model.sites import decoder_of, transformer_layers


def shard(model: Any) -> None:
    """Cut the frozen matrices of the model's layers in as many parts as there are ranks (FSDP2), and move it there.

    Each layer is put together for its own forward and backward pass, on all ranks at once. What is trained stays
    whole, and so do vectors, which are small, and embeddings and head, which are needed through a whole pass.
    """
    if distributed.count() == 1:
        return
    decoder, layers = decoder_of(model) or model, transformer_layers(model)
    if not layers:
        raise TrainingError(
            f"train.shard: {type(model).__name__} has no list of decoder layers to cut", code="no-decoder-layers"
        )
    for host in hosts(model).values():
        for delta in host.on():
            if isinstance(delta, InputDelta) and delta.prompt() is not None:
                raise TrainingError(
                    f"train.shard: {delta.config.method!r} takes keys and values out of the middle of layers, where a "
                    "base in parts is put together only for whole passes. Use shard: none, or the method prefix",
                    code="conflicting-settings",
                )
    inside = {p: f"{at}.{name}" for at, layer in layers.items() for name, p in layer.named_parameters()}
    odd = [name for p, name in inside.items() if type(p) is not nn.Parameter or not p.is_floating_point()]
    if odd:
        raise TrainingError(
            f"train.shard cuts plain weights only, and {odd[0]} is packed. Use shard: none", code="conflicting-settings"
        )
    fingerprint(model)  # kept by the model: it cannot be made of parts
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (distributed.count(),))
    whole = {p for p in model.parameters() if p.requires_grad or p.dim() < 2 or p not in inside}
    for layer in layers.values():
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    fully_shard(decoder, mesh=mesh, ignored_params=whole | inside.keys())  # holds nothing: it lets layers fetch ahead
    for tensor in (*whole, *model.buffers()):
        tensor.data = tensor.data.to(device)
    model.graft_sharded = True
