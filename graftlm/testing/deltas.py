"""Deltas on tiny models: attached, moved away from their start, compared."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.deltas import METHODS
from graftlm.deltas.base import DeltaConfig
from graftlm.model.attach import attach
from graftlm.model.initialize import needed_statistics
from graftlm.model.registry import trainable
from graftlm.passes.statistics import collect
from graftlm.plugins import load_plugins
from graftlm.testing.tiny import tiny_model

SMALL: dict[str, Any] = {
    "alpha": 6.0,
    "bases": 6,
    "block": 8,
    "components": 6,
    "density": 0.2,
    "dimension": 50,
    "gate": 0.5,
    "gate_speed": 1.0,
    "group": 12,
    "inner": 3,
    "last": 1,
    "minis": 4,
    "n_frequency": 50,
    "new_bias": False,
    "num_vectors": 12,
    "p": 5,
    "r": 4,
    "tokens": (3, 11, 40),
    "vector_length": 8,
}
"""Values for fields of these names at which every method fits the tiny model."""


def tiny_config(name: str, **changes: Any) -> DeltaConfig:
    """The config of a method with sizes that fit the tiny model."""
    load_plugins("graftlm.methods")
    config: Any = METHODS[name].config
    names = {f.name for f in fields(config)}
    small: DeltaConfig = config(**{key: value for key, value in SMALL.items() if key in names} | changes)
    return small


def attach_tiny(name: str, model: Any, *, seed: int = 0, delta: str = "default", **changes: Any) -> Any:
    """Attach the method with its small config, statistics included where it wants them."""
    config = tiny_config(name, **changes)
    needs = needed_statistics(config)
    statistics = collect(model, config, needs, [lambda: model(ids(), labels=ids()).loss]) if needs else None
    return attach(model, config, name=delta, seed=seed, statistics=statistics)


def ids(seed: int = 0, rows: int = 2, length: int = 12) -> Tensor:
    """Random token ids [rows, length], none of them special."""
    return torch.randint(3, 300, (rows, length), generator=torch.Generator().manual_seed(seed))


def perturbed(name: str, model: Any, *, scale: float = 0.1, seed: int = 1, **changes: Any) -> Any:
    """The model with the method on it, and every trainable tensor moved away from its start, so that no-ops show."""
    return move(attach_tiny(name, model, **changes), scale=scale, seed=seed)


def move(model: Any, *, scale: float = 0.1, seed: int = 1) -> Any:
    """Move every trainable tensor of the model by noise."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """The logits [2, 12, vocabulary] of `ids()`."""
    out: Tensor = model(ids()).logits
    return out


def close(ours: Tensor, reference: Tensor, what: str, tolerance: float = 1e-5) -> None:
    """Assert that the largest difference is at most `tolerance` of the largest value."""
    ours, reference = ours.detach(), reference.detach()
    error = float((ours - reference).abs().max() / reference.abs().max().clamp_min(1e-12))
    assert error <= tolerance, f"{what}: differs by {error:.3g} of the largest value, {tolerance:g} is allowed"


def plain_with(state: Mapping[str, Tensor]) -> Any:
    """A model without deltas that has a merged state for its weights, new biases included."""
    return load_merged_state(state, tiny_model(seed=5))


def load_merged_state(state: Mapping[str, Tensor], plain: Any) -> Any:
    """`plain`, a model without deltas, with a merged state: new biases and an untied output head included."""
    for key, tensor in state.items():
        layer, _, kind = key.rpartition(".")
        if kind == "bias" and plain.get_submodule(layer).bias is None:
            plain.get_submodule(layer).bias = nn.Parameter(torch.empty_like(tensor), requires_grad=False)
    if "lm_head.weight" in state and not torch.equal(state["lm_head.weight"], _embeddings(state)):
        plain.lm_head.weight = nn.Parameter(torch.empty_like(state["lm_head.weight"]), requires_grad=False)  # untied
    missing, unexpected = plain.load_state_dict(state, strict=False)
    assert not missing, f"merged state lacks {missing}"
    assert not unexpected, f"merged state has {unexpected}, which the base has not"
    return plain


def _embeddings(state: Mapping[str, Tensor]) -> Tensor:
    return next(tensor for key, tensor in state.items() if key.endswith(("embed_tokens.weight", "wte.weight")))
