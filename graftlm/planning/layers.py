"""A sketch of the base with a few real layers of each kind, and what the whole model costs by them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from graftlm.hub.sketch import Sketch, kinds_of_layer, only, shorten, sketch
from graftlm.kernels.backend import pinned
from graftlm.losses.base import ComparedConfig
from graftlm.losses.distillation import DistillationConfig
from graftlm.model.attach import attach
from graftlm.model.registry import hosts
from graftlm.passes.autotune import KernelChoice, choose
from graftlm.planning.packs import Shape
from graftlm.recipe import Recipe
from graftlm.training.objective import Objective
from graftlm.training.regularizers import kl_to_base
from graftlm.training.teacher import TEACHER, teacher_base

MORE_LAYERS = 3
"""Layers of a kind beside its first, by which the cost of one is measured: it must stand out from what surrounds it."""


def with_deltas(recipe: Recipe) -> tuple[Sketch, list[list[int]]]:
    """The base of a recipe, sketched, with its deltas on it and one layer of each kind real; and the kinds."""
    return some_layers(lambda real: _attach_all(recipe, sketch(recipe.base, real, network=recipe.network)))


def some_layers(make: Callable[[Sequence[int]], Sketch]) -> tuple[Sketch, list[list[int]]]:
    """A sketch with a few layers of each kind real, and the kinds."""
    first = make([0])
    groups = kinds_of_layer(first)
    real = sorted(number for numbers in groups for number in numbers[: 1 + MORE_LAYERS])
    return (first if real == [0] else make(real)), groups


class Teacher(NamedTuple):
    """Another base that teaches, beside the sketch of the recipe's own with a layer of each kind."""

    sketch: Sketch
    groups: list[list[int]]


def with_teacher(recipe: Recipe, model_sketch: Sketch) -> Teacher | None:
    """Put the sketch of a teacher that is another base beside that of the recipe's base.

    It has one layer of each kind there: it keeps nothing for a backward pass, so more of them need no more memory.
    """
    if (base := teacher_base(recipe.loss)) is None:
        return None
    teacher = Teacher(*some_layers(lambda real: sketch(base, real, network=recipe.network)))
    shorten(teacher.sketch, sorted(numbers[0] for numbers in teacher.groups))
    model_sketch.model.__dict__[TEACHER] = teacher.sketch.model
    return teacher


def _attach_all(recipe: Recipe, model_sketch: Sketch) -> Sketch:
    for name, config in recipe.all_deltas().items():
        attach(model_sketch.model, config, name=name, seed=recipe.train.seed, start=False)
    for host in hosts(model_sketch.model).values():
        host.deltas.train()
    return model_sketch


def kernels_of(recipe: Recipe, model_sketch: Sketch, groups: list[list[int]], shape: Shape) -> KernelChoice:
    """What would compute a run, measured on one layer of each kind."""
    device, kernels = model_sketch.model.device, recipe.train.kernels
    if kernels != "auto":
        pinned(kernels, device, model_sketch.dtype)
    if not recipe.data.pack:
        return KernelChoice(kernels)
    packs = [pack.to(device) for pack in (*shape.step, shape.largest)]
    with only(model_sketch, sorted(numbers[0] for numbers in groups)) as model:
        return choose(model, packs, kernels)


def over_layers(model_sketch: Sketch, groups: list[list[int]], measure: Callable[[Any], float]) -> float:
    """What the whole model costs, from a model with one layer of each kind and others with more of one kind."""
    one_each = [numbers[0] for numbers in groups]
    with only(model_sketch, sorted(one_each)) as model:
        total = once = measure(model)
    for numbers in groups:
        if more := numbers[1 : 1 + MORE_LAYERS]:
            with only(model_sketch, sorted(one_each + more)) as model:
                total += (len(numbers) - 1) * max(0.0, measure(model) - once) / len(more)
    return total


def objective_of(recipe: Recipe) -> Objective:
    """The objective of the recipe. Where an adapter is its reference or teacher, the base stands for it."""
    loss = recipe.loss
    if isinstance(loss, DistillationConfig) and teacher_base(loss) is None:
        loss = replace(loss, teacher=None)
    elif isinstance(loss, ComparedConfig):
        loss = replace(loss, reference=None)
    return Objective(loss, kl_to_base(recipe.regularisers))
