"""Seconds of a step and of its parts, measured on a few layers."""

from collections.abc import Sequence
from typing import Any

import torch

from graftlm.data.batches.pack import Pack
from graftlm.hub.sketch import Sketch
from graftlm.kernels.backend import TORCH, Backend
from graftlm.optim.adamw import adamw
from graftlm.passes.forward import hidden_states
from graftlm.planning.bench import best_s, one_pass, parts_of_time
from graftlm.planning.layers import Teacher, objective_of, over_layers
from graftlm.planning.packs import Shape, token_count
from graftlm.recipe import Recipe
from graftlm.training.passes import Passes

TRIES = 2
PACKS_TIMED = 3


def time_of(
    recipe: Recipe,
    model_sketch: Sketch,
    groups: list[list[int]],
    shape: Shape,
    teacher: Teacher | None = None,
    backend: Backend = TORCH,
) -> tuple[float, dict[str, float]]:
    """Seconds of a step without its update, and which part of them is what."""
    by_size = sorted(shape.step, key=lambda pack: pack.ids.numel())
    timed = by_size if len(by_size) <= PACKS_TIMED else [by_size[0], by_size[len(by_size) // 2], by_size[-1]]
    packs = [pack.to(model_sketch.model.device) for pack in timed]
    scale = token_count(by_size) / token_count(timed)
    shares: list[dict[str, float]] = []

    def seconds(model: Any) -> float:
        def passes() -> None:
            for pack in packs:
                one_pass(model, pack, objective_of(recipe))

        with recipe.setup().passes(backend).through(model):
            found = best_s(passes, TRIES)
            shares.append({name: share * found for name, share in parts_of_time(passes).items()})
        return found

    total = over_layers(model_sketch, groups, seconds)
    head = shares[0].pop("head and loss")  # as long whatever the number of layers
    layers = {name: sum(found[name] for found in shares) for name in shares[0]}
    rest = (total - head) / sum(layers.values())
    parts = {name: value * rest for name, value in layers.items()} | {"head and loss": head}
    if teacher is not None:
        parts["other layers of the teacher"] = (found := deeper_s(recipe, teacher, packs))
        total += found
    return total * scale, {name: value * scale for name, value in parts.items()}


def deeper_s(recipe: Recipe, teacher: Teacher, packs: Sequence[Pack]) -> float:
    """Seconds that the teacher's layers take beside the first of each kind, which are a part of every pass already."""

    @torch.no_grad()
    def seconds(model: Any) -> float:
        with Passes(packed=recipe.data.pack).through(model):
            return best_s(lambda: [hidden_states(model, pack) for pack in packs], TRIES)

    return max(0.0, over_layers(*teacher, seconds) - seconds(teacher.sketch.model))


MEASURED_PARAMETERS = 2**20


def update_s(parameters: int, device: torch.device) -> float:
    """Seconds of clipping and one AdamW step."""
    count = min(parameters, MEASURED_PARAMETERS)
    tensors = [torch.nn.Parameter(torch.zeros(2**14, device=device)) for _ in range(max(1, count // 2**14))]
    optimizer = adamw([(tensors, 1e-4)], weight_decay=0.0)
    for tensor in tensors:
        tensor.grad = torch.zeros_like(tensor)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(tensors, 1.0)
        optimizer.step()

    return best_s(update, TRIES) * parameters / sum(tensor.numel() for tensor in tensors)
