"""What answering needs, before a weight is loaded: caches, adapters, the prepacked copy of weights, logits.

As in `estimate.py` no architecture needs a formula: the engine's own passes run over a few layers of a sketch, and the
tensors that they hold are counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from graftlm.adapters.adapter import Adapter
from graftlm.adapters.folder import adapters_in
from graftlm.adapters.load import attach_tensors
from graftlm.data.batches.prompts import asked_in
from graftlm.errors import BaseModelError
from graftlm.generation.attention import Cache
from graftlm.generation.engine import CACHE_TOKENS, MAX_REQUESTS, STEP_TOKENS
from graftlm.generation.forward_pass import Piece, keys_before, pass_over
from graftlm.generation.inference_copy import inference_copy
from graftlm.generation.sampling import GREEDY, Chooser, Sampling, next_tokens
from graftlm.generation.support import why_not_ours
from graftlm.hub.config import BaseConfig, base_config
from graftlm.hub.sketch import Sketch, only, positions, sketch
from graftlm.kernels.prepacked import can_prepack, packed_bytes
from graftlm.model.hosts import LayerHost
from graftlm.model.modes import active_row, deltas_off, deltas_still
from graftlm.model.registry import attachment, hosts, shared_of
from graftlm.planning.layers import over_layers, some_layers
from graftlm.planning.memory import GIB, LIBRARIES_GIB, LiveBytes, free_gib
from graftlm.prepare import Prepared
from graftlm.recipe import Recipe
from graftlm.results import questions_of
from graftlm.system import peak_rss_gib, preserve_global_state


@dataclass(frozen=True)
class Load:
    """What an engine answers at a time, and how."""

    requests: int
    """Requests that run at a time, each as long as the longest."""
    prompt_tokens: int
    new_tokens: int
    prepack: bool = True
    merge: bool = False
    """Whether the engine may merge adapters (`merge_after`)."""
    sampling: Sampling = GREEDY


PARTS = ("prepacked_weights", "merged_weights", "cache", "prefixes", "activations", "logits")


@dataclass(frozen=True)
class GenerationBytes:
    """What an engine holds beside the model."""

    prepacked_weights: int
    """The second copy of linear layers; it stays as long as the engine."""
    merged_weights: int
    """The third, of the layers that adapters sit on, with the factors of some of them in it."""
    cache: int
    """Keys and values of all requests."""
    prefixes: int
    """Keys and values of prefixes and prompts, once more for each request."""
    activations: int
    """Bytes of one pass over as many tokens of prompts as a step takes."""
    logits: int
    """Bytes of the logits at the last token of each request, and of choosing the next token."""
    cache_per_token: int

    def parts_gib(self) -> dict[str, float]:
        found = {name: getattr(self, name) / GIB for name in PARTS}
        return {name: gib for name, gib in found.items() if gib or name in ("cache", "logits")}

    @property
    def total(self) -> int:
        return sum(getattr(self, name) for name in PARTS)


def why_not_counted(model_sketch: Sketch, groups: list[list[int]]) -> str:
    """Why what answering needs is not known: transformers' own `generate` runs, with a cache of its own. Else empty."""
    with _one_of_each(model_sketch, groups) as model, deltas_off(model):
        return why_not_ours(model)


@torch.no_grad()
def generation_bytes(model_sketch: Sketch, groups: list[list[int]], load: Load) -> GenerationBytes:
    """What an engine under this load holds. `model_sketch` has the deltas that act on every request."""
    per_token = round(over_layers(model_sketch, groups, _cache_bytes))
    with _one_of_each(model_sketch, groups) as model, deltas_still(model):
        before = keys_before(model, active_row(model))
        activations, logits = _activation_bytes(model, load), _logits_bytes(model, load.sampling)
    always = 0 if before is None else before.shape[3]
    prefixes = 0 if before is None else always * per_token * before.element_size() // model_sketch.dtype.itemsize
    return GenerationBytes(
        prepacked_weights=round(over_layers(model_sketch, groups, _prepacked_bytes)) if load.prepack else 0,
        merged_weights=round(over_layers(model_sketch, groups, _merged_bytes)) if load.merge else 0,
        cache=load.requests * (load.prompt_tokens + load.new_tokens - 1 + always) * per_token,
        prefixes=load.requests * prefixes,
        activations=activations,
        logits=load.requests * logits,
        cache_per_token=per_token,
    )


def _one_of_each(model_sketch: Sketch, groups: list[list[int]]) -> Any:
    """A context of the model with one layer of each kind."""
    return only(model_sketch, sorted(numbers[0] for numbers in groups))


def _cache_bytes(model: Any) -> int:
    """Keys and values of one token, in all layers that the model has now."""
    cache = Cache(1)
    with torch.no_grad(), deltas_still(model):
        pass_over(inference_copy(model, None).model, [Piece([0], 0, cache, {}, False)])
    return sum(tensor.nbytes for layer in cache.layers for tensor in layer)


def _prepacked_bytes(model: Any) -> int:
    """Weights of which an engine makes a second copy; one that several layers have counts once."""
    layers: list[Any] = [module for module in _modules_of_base(model) if can_prepack(module)]
    sizes: dict[tuple[int, int], int] = {
        (id(layer.weight), id(layer.bias)): packed_bytes(layer.weight) for layer in layers
    }
    return sum(sizes.values())


def _merged_bytes(model: Any) -> int:
    """Weights of the layers that deltas sit on, as an engine lays them out when it merges."""
    found = [
        host.base for host in hosts(model).values() if isinstance(host, LayerHost) and (host.deltas or host.factors)
    ]
    layers: list[Any] = [layer for layer in found if can_prepack(layer) and layer.weight.dtype == torch.float32]
    return sum(packed_bytes(layer.weight) for layer in layers)


def _modules_of_base(module: Any) -> Any:
    """Modules without those of deltas."""
    deltas = {id(each) for host in hosts(module).values() for each in host.deltas.modules()}
    return [each for each in module.modules() if id(each) not in deltas]


def _activation_bytes(model: Any, load: Load) -> int:
    """The most bytes in use in a pass over the last part of a prompt, and over more prompts where they fit in."""
    count = min(load.prompt_tokens, STEP_TOKENS)
    prompts = min(load.requests, STEP_TOKENS // count)
    row = active_row(model)
    caches = [Cache(load.prompt_tokens, keys_before(model, row)) for _ in range(prompts)]
    pieces = [Piece([0] * count, load.prompt_tokens - count, cache, row, False) for cache in caches]
    copied = inference_copy(model, None).model
    pass_over(copied, pieces)  # it makes the caches, which are counted by themselves
    live = LiveBytes()
    with live:
        pass_over(copied, pieces)
    return live.peak


def _logits_bytes(model: Any, sampling: Sampling) -> int:
    """Bytes for the logits of one request."""
    row = active_row(model)
    piece = Piece([0], 0, Cache(1, keys_before(model, row)), row, True)
    logits = pass_over(inference_copy(model, None).model, [piece]).nan_to_num()  # a delta may be uninitialized
    live = LiveBytes()
    with live:
        next_tokens(logits, [Chooser(sampling, ())])
    return int(logits.nbytes) + live.peak


def adapter_bytes(model: Any) -> int:
    """All tensors of the deltas on a model, those made from a seed and those that sites share included."""
    modules = [delta for host in hosts(model).values() for delta in host.deltas.values()]
    modules += [shared for name in attachment(model).configs if (shared := shared_of(model, name)) is not None]
    tensors = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


# Of recipes ------------------------------------------------------------------------------------------------------


def rollouts_load(recipe: Recipe, data: Prepared) -> Load:
    """What the engine of `rl` answers while a recipe is trained."""
    rl = recipe.rl
    assert rl is not None
    requests = min(rl.at_once, recipe.train.batch_rows * rl.samples * rl.steps_per_round)
    longest = max(len(prompt.answers[0]) for prompt in data.examples)
    return Load(requests, longest, rl.max_new_tokens, sampling=Sampling(rl.temperature, top_p=rl.top_p))


def held_out_load(recipe: Recipe, data: Prepared) -> Load | None:
    """The load of the held-out answers of a run; None where no held-out row is answered."""
    rows = questions_of(recipe, data)
    if not rows:
        return None
    longest = max(len(data.renderer.prompt(asked_in(row)[0], row.tools, row.variables)) for row in rows)
    new = recipe.report.max_new_tokens
    requests = min(len(rows), MAX_REQUESTS, max(1, CACHE_TOKENS // (longest + new)))
    return Load(requests, longest, new, prepack=False)


# Without a recipe ------------------------------------------------------------------------------------------------


@preserve_global_state()
def estimate_generation(
    base: str | BaseConfig, folders: Sequence[str | Path], load: Load, *, network: bool = False
) -> dict[str, Any]:
    """Predict the memory of answering: {"peak_gib", "parts", "cache_bytes_per_token", "memory_free_gib", "advice"}.

    The adapters of all folders are in memory and act on every request. No weight of the base is loaded. Raises
    BaseModelError for a base that the engine cannot run or that has fewer positions, and AdapterError.
    """
    base = base_config(base)
    _check_positions(base, load, network)
    adapters = [Adapter.read(path) for folder in folders for path in adapters_in(Path(folder)).values()]

    def make(real: Sequence[int]) -> Sketch:
        model_sketch = sketch(base, real, network=network)
        for number, adapter in enumerate(adapters, 1):
            attach_tensors(model_sketch.model, adapter, f"adapter-{number}")
        return model_sketch

    process = peak_rss_gib()
    model_sketch, groups = some_layers(make)
    if why := why_not_counted(model_sketch, groups):
        raise BaseModelError(
            f"{base.name}: transformers' own generate answers for this base, and what its cache takes is not known "
            f"here: {why}",
            code="unknown-cache-size",
        )
    needed = generation_bytes(model_sketch, groups, load)
    memory = {"process": process + LIBRARIES_GIB, "base": model_sketch.base_bytes / GIB}
    memory |= {"adapters": adapter_bytes(model_sketch.model) / GIB} if adapters else {}
    memory |= needed.parts_gib()
    loading = process + (model_sketch.base_bytes + model_sketch.file_bytes) / GIB
    free = free_gib(model_sketch.model.device)
    peak = max(sum(memory.values()), loading)
    return {
        "peak_gib": round(peak, 3),
        "parts": {"memory_gib": {name: round(gib, 3) for name, gib in memory.items()} | {"loading": round(loading, 3)}},
        "cache_bytes_per_token": needed.cache_per_token,
        "memory_free_gib": round(free, 2),
        "advice": _advice(peak, free + memory["process"], model_sketch, needed),
    }


def _check_positions(base: BaseConfig, load: Load, network: bool) -> None:
    found, needed = positions(base, network=network), load.prompt_tokens + load.new_tokens
    if found.count is not None and needed > found.count and found.are_a_table():
        raise BaseModelError(
            f"{base.name} has {found.count} positions, and a prompt of {load.prompt_tokens} tokens with an answer of "
            f"{load.new_tokens} needs {needed}: give fewer",
            code="too-few-positions",
        )


def _advice(peak: float, free: float, model_sketch: Sketch, needed: GenerationBytes) -> list[str]:
    """Advice on what to change where it does not fit."""
    if peak <= free:
        return []
    texts = [f"{peak:.1f} GiB are needed and {free:.1f} are there"]
    if needed.cache > model_sketch.base_bytes:
        texts.append("fewer requests at a time, or shorter prompts and answers: the cache takes more than the base")
    if model_sketch.dtype == torch.float32:
        texts.append("--dtype bfloat16 would halve the base and the cache")
    if needed.merged_weights:
        texts.append("without merge_after there is no copy with adapters merged into it")
    if needed.prepacked_weights:
        texts.append("Engine(model, prepack=False) does without the second copy of the weights, and is slower")
    return texts
