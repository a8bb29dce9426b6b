"""What a recipe needs, before a weight is loaded: `graft estimate`.

The base is known by its config alone (`hub/sketch.py`). Of each kind of layer a few are filled with random
numbers, get the recipe's deltas, and run the recipe's own packs here and now, first one of them, then all: what one
more layer costs, in bytes and in seconds, times the layers of that kind, is what the model costs. So no method and no
architecture needs a formula, and what is predicted is what this machine does.
"""

from collections.abc import Mapping
from typing import Any

import torch

from graftlm.hub.config import base_config
from graftlm.hub.dtypes import multiplies_bf16_fast
from graftlm.hub.sketch import Sketch
from graftlm.kernels.backend import Backend
from graftlm.model.coverage import coverage
from graftlm.model.registry import hosts, parameters_of
from graftlm.passes.autotune import KernelChoice
from graftlm.planning.generation import Load, generation_bytes, held_out_load, rollouts_load, why_not_counted
from graftlm.planning.layers import kernels_of, over_layers, with_deltas, with_teacher
from graftlm.planning.memory import (
    GIB,
    HEAP,
    HEAP_CHECKPOINTED,
    HEAP_WITH_KERNELS,
    KERNEL_GIB,
    LIBRARIES_GIB,
    Product,
    free_gib,
    kernel_count,
    live_bytes,
    update_bytes,
)
from graftlm.planning.packs import Shape, shape_of, with_answers
from graftlm.planning.step_time import time_of, update_s
from graftlm.prepare import Prepared, prepare_data
from graftlm.recipe import Recipe
from graftlm.system import peak_rss_gib, preserve_global_state


@preserve_global_state()
def estimate(recipe: Recipe) -> dict[str, Any]:
    """Predict peak memory and time of a step: {"peak_gib", "step_s", "tokens_per_s", "parts", "advice", ...}.

    Nothing is loaded but config, tokenizer and rows. Raises what `train` would raise for them.
    """
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    data = prepare_data(recipe, recipe.tokenizer())
    loads = _loads(recipe, data)
    recipe, examples = with_answers(recipe, data.examples)
    shape = shape_of(recipe, examples, data.draws)
    process = peak_rss_gib()
    model_sketch, groups = with_deltas(recipe)
    teacher = with_teacher(recipe, model_sketch)
    choice = kernels_of(recipe, model_sketch, groups, shape)
    device = model_sketch.model.device
    backend = choice.backend(device, model_sketch.dtype)
    parameters = sum(p.numel() for name in recipe.all_deltas() for p in parameters_of(model_sketch.model, name))
    reached = coverage(model_sketch.model)
    memory = {"process": process + LIBRARIES_GIB} | _memory_gib(recipe, model_sketch, groups, shape, choice, backend)
    # transformers reads the file through a mapping, whose pages count while it converts them
    loading = process + (model_sketch.base_bytes + model_sketch.file_bytes) / GIB
    if teacher:
        memory["teacher"] = teacher.sketch.base_bytes / GIB
        more = model_sketch.base_bytes + teacher.sketch.base_bytes + teacher.sketch.file_bytes
        loading = max(loading, process + more / GIB)
    answering, uncounted = _answering_gib(model_sketch, groups, loads, memory)
    seconds, parts = time_of(recipe, model_sketch, groups, shape, teacher, backend)
    parts["optimizer"] = update_s(parameters, device)
    seconds += parts["optimizer"]
    found = {
        "peak_gib": round(max(sum(memory.values()), loading, *answering.values()), 3),
        "step_s": round(seconds, 3),
        "tokens_per_s": round(shape.row_tokens_a_step / seconds, 1),
        "parts": {
            "memory_gib": {
                name: round(value, 3) for name, value in (memory | {"loading": loading} | answering).items()
            },
            "time_s": {name: round(value, 4 if name == "optimizer" else 3) for name, value in parts.items()},
        },
        "trainable_parameters": parameters,
        "coverage": reached.to_json(),
        "largest_pack": {
            "tokens": shape.largest.ids.numel(),
            "rows": len(shape.largest.rows),
            "supervised": len(shape.largest.targets),
        },
        "tokens_a_step": round(shape.tokens_a_step, 1),
        "packs_a_step": round(shape.packs_a_step, 2),
        "memory_free_gib": round(free_gib(device), 2),
    }
    return found | {"reach": reached.lines(), "advice": advice(recipe, found, model_sketch, shape) + uncounted}


def _loads(recipe: Recipe, data: Prepared) -> dict[str, Load]:
    """What the model answers during and after training."""
    loads = {} if recipe.rl is None else {"generating": rollouts_load(recipe, data)}
    held_out = held_out_load(recipe, data)
    return loads if held_out is None else loads | {"held_out_answers": held_out}


def _answering_gib(
    model_sketch: Sketch, groups: list[list[int]], loads: Mapping[str, Load], memory: dict[str, float]
) -> tuple[dict[str, float], list[str]]:
    """GiB of the process while it answers, and what is not counted. A second copy of weights that stays during
    training is added to `memory`.

    Between two steps of `rl` there are no activations of training. Held-out rows are answered when the optimizer and
    the engine of `rl` are gone.
    """
    if not loads:
        return {}, []
    if why := why_not_counted(model_sketch, groups):
        return {}, [f"memory of answers is not counted, since transformers' own generate gives them: {why}"]
    needed = {name: generation_bytes(model_sketch, groups, load) for name, load in loads.items()}
    training_only = {"generating": ("activations",), "held_out_answers": ("activations", "gradients_and_optimizer")}
    answering = {
        name: sum(gib for part, gib in memory.items() if part not in training_only[name]) + each.total / GIB
        for name, each in needed.items()
    }
    if "generating" in needed and needed["generating"].prepacked_weights:
        memory["prepacked_weights"] = needed["generating"].prepacked_weights / GIB
    return answering, []


def _memory_gib(
    recipe: Recipe, model_sketch: Sketch, groups: list[list[int]], shape: Shape, choice: KernelChoice, backend: Backend
) -> dict[str, float]:
    """GiB of the base, of what is trained, and of a step over the largest pack."""
    device = model_sketch.model.device
    trainable_bytes = sum(
        4 * p.numel() for name in recipe.all_deltas() for p in parameters_of(model_sketch.model, name)
    )
    buffers = sum(
        p.numel() * p.element_size() for host in hosts(model_sketch.model).values() for p in host.deltas.buffers()
    )
    largest = shape.largest.to(device)
    products: set[Product] = set()
    live = over_layers(model_sketch, groups, lambda model: live_bytes(recipe, model, largest, products, backend))
    by_kernels = recipe.data.pack and (choice.kernels == "ours" or "ours" in choice.fastest.values())
    heap = HEAP_CHECKPOINTED if recipe.train.checkpointing else HEAP_WITH_KERNELS if by_kernels else HEAP
    on_cpu = device.type == "cpu"
    return {
        "base": model_sketch.base_bytes / GIB,
        "deltas": (trainable_bytes + buffers) / GIB,
        "gradients_and_optimizer": sum(update_bytes(recipe, model_sketch.model, shape.packs_a_step > 1)) / GIB,
        "activations": live * (heap if on_cpu else 1.0) / GIB,
        "kernels": kernel_count(products, shape) * KERNEL_GIB if on_cpu else 0.0,
    }


FULL_PACK = 512
"""Below so many tokens a pack the weights are read too often for what they are multiplied with."""


def advice(recipe: Recipe, found: dict[str, Any], model_sketch: Sketch, shape: Shape) -> list[str]:
    """Which knob to turn: where the recipe does not fit, and where it wastes what is there."""
    train, memory = recipe.train, found["parts"]["memory_gib"]
    texts = []
    free, peak = found["memory_free_gib"] + memory["process"], found["peak_gib"]
    wide = model_sketch.dtype == torch.float32 and base_config(recipe.base).quantization == "none"
    halves = wide and multiplies_bf16_fast(model_sketch.model.device.type)
    if peak > free:
        texts.append(f"{peak:.1f} GiB are needed and {free:.1f} are there")
        if len(shape.largest.rows) > 1:
            texts.append(f"train.pack_tokens={train.pack_tokens // 2} would halve the activations' share")
        elif recipe.data.max_tokens > 256:
            texts.append(f"data.max_tokens: the largest pack is one row of {shape.largest.ids.numel()} tokens")
        if not train.checkpointing:
            texts.append("train.checkpointing=true would keep one hidden state a layer instead of all that it computes")
        if wide:
            texts.append(f"base.dtype=bfloat16 would save {memory['base'] / 2:.2f} GiB")
    if halves:
        texts.append("base.dtype=bfloat16: this machine multiplies bf16 fast, and the base would take half the memory")
    if train.checkpointing and peak < free / 2:
        texts.append("train.checkpointing=false: there is room for the activations, and a step would be shorter")
    if recipe.data.pack and shape.tokens_a_pack < FULL_PACK and peak < free / 2:
        knob = "train.pack_tokens" if found["packs_a_step"] > 1.5 else "train.batch_rows"
        texts.append(
            f"{knob}: a pack has {shape.tokens_a_pack:.0f} tokens on average, and larger ones run faster for each token"
        )
    return texts
