"""What a recipe will need, before a weight is loaded: `graft estimate`.

The base is known by its config alone (`model/hub/sketch.py`). Of each kind of layer a few are filled with random
numbers, get the recipe's deltas, and run the recipe's own packs here and now, first one of them, then all: what one
more layer costs, in bytes and in seconds, times the layers of that kind, is what the model costs. So no method and no
architecture needs a formula, and what is predicted is what this machine does.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from graftlm.callbacks import make_policies
from graftlm.data.batches.pack import Example, Group, Pack
from graftlm.data.sources.template_draws import Draws
from graftlm.errors import TrainingError
from graftlm.kernels.backend import TORCH, Backend, pinned
from graftlm.losses.base import ComparedConfig
from graftlm.losses.distillation import DistillationConfig
from graftlm.model.hub.load import multiplies_bf16_fast
from graftlm.model.hub.sketch import Sketch, kinds_of_layer, only, shorten, sketch
from graftlm.model.layers.attach import attach, hosts, parameters_of, trainable
from graftlm.model.layers.coverage import coverage
from graftlm.model.passes.autotune import Choice, choose
from graftlm.model.passes.forward import hidden_states
from graftlm.planning.bench import best_s, one_pass, parts_of_time
from graftlm.recipe import Recipe
from graftlm.run import peak_rss_gib, prepare_data
from graftlm.system import kernel_cache_capacity, memory, preserve_global_state
from graftlm.training.adamw import adamw
from graftlm.training.callback import Training
from graftlm.training.loop import training_pass
from graftlm.training.objective import Objective
from graftlm.training.phases import packs_of, plan_batches
from graftlm.training.regularizers import tie
from graftlm.training.teacher import TEACHER, teacher_base
from graftlm.training.tokenizer import recipe_tokenizer

GIB = 2**30

STEPS_SEEN = 64
"""Of a longer run this many steps, evenly spread, stand for all; its largest batch is the first, and always seen."""

MORE_LAYERS = 3
"""Layers of a kind beside its first, by which the cost of one is measured: it must stand out from what surrounds it."""

TRIES = 2
PACKS_TIMED = 3

HEAP = 1.2
"""Resident memory of activations over the bytes in use. The heap is full of holes: tensors of a step are freed in
another order and with other shapes than they come. Measured: 1.05 in a first step, 1.1 to 1.25 after some more."""

HEAP_WITH_KERNELS = 1.0
"""The same where our kernels compute: tensors are fewer, and of few sizes. Measured: 0.9 to 1.1."""

HEAP_CHECKPOINTED = 2.3
"""The same with checkpointing, where what is kept is small and lies strewn among what is not: 2.1 to 2.7."""

KERNEL_GIB = 1.0 / 1024
"""Memory of a compiled kernel. torch keeps one for every shape of a half-precision product on a CPU, up to
`kernel_cache_capacity`. Packs of ever new lengths fill the cache. One is 0.63 MiB by itself, and 1.0 with the holes
that it pins: see docs/log.md."""

LIBRARIES_GIB = 0.15
"""What is imported, mapped and cached after this moment, on the way through a run."""


@dataclass(frozen=True)
class Shape:
    """A recipe's packs: those of a step of middling size, and the one that needs the most memory."""

    step: list[Pack]
    largest: Pack
    lengths: tuple[int, int]
    """How many different lengths the packs of the run have, and how many their segments."""
    packs_a_step: float
    tokens_a_step: float
    """Computed ones; those of the rows are more where beginnings are shared."""
    row_tokens_a_step: float
    tokens_a_pack: float


@preserve_global_state()
def estimate(recipe: Recipe) -> dict[str, Any]:
    """Predict peak memory and time of a step: {"peak_gib", "step_s", "tokens_per_s", "parts", "advice", ...}.

    Nothing is loaded but config, tokenizer and rows. Raises what `train` would raise for them.
    """
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    if recipe.online:
        raise TrainingError(
            "graft estimate measures rows that are there, and with `online` the model writes them as it goes. Estimate "
            "the same recipe without `online`, on rows with answers as long as online.max_new_tokens"
        )
    tokenizer = recipe_tokenizer(recipe)
    data = prepare_data(recipe, tokenizer)
    shape = shape_of(recipe, data.examples, data.draws)
    process = peak_rss_gib()
    made, groups = with_deltas(recipe)
    teacher = with_teacher(recipe, made)
    device = made.model.device
    choice = kernels_of(recipe, made, groups, shape)
    backend = choice.backend(device, made.dtype)
    parameters = sum(p.numel() for name in recipe.all_deltas() for p in parameters_of(made.model, name))
    reached = coverage(made.model)
    held = sum(p.numel() * p.element_size() for host in hosts(made.model).values() for p in host.deltas.buffers())
    largest = shape.largest.to(device)
    products: set[Product] = set()
    live = _over_layers(made, groups, lambda model: live_bytes(recipe, model, largest, products, backend))
    by_kernels = recipe.data.pack and (choice.kernels == "ours" or "ours" in choice.fastest.values())
    heap = HEAP_CHECKPOINTED if recipe.train.checkpointing else HEAP_WITH_KERNELS if by_kernels else HEAP
    memory = {
        "process": process + LIBRARIES_GIB,
        "base": made.base_bytes / GIB,
        "deltas": (4 * parameters + held) / GIB,
        "gradients_and_optimiser": sum(update_bytes(recipe, made.model, shape.packs_a_step > 1)) / GIB,
        "activations": live * (heap if device.type == "cpu" else 1.0) / GIB,
        "kernels": kernels(products, shape) * KERNEL_GIB if device.type == "cpu" else 0.0,
    } | ({"teacher": teacher.sketch.base_bytes / GIB} if teacher else {})
    # transformers reads the file through a mapping, whose pages count while it converts them
    loading = process + (made.base_bytes + made.file_bytes) / GIB
    if teacher:
        loading = max(
            loading, process + (made.base_bytes + teacher.sketch.base_bytes + teacher.sketch.file_bytes) / GIB
        )
    peak = max(sum(memory.values()), loading)
    seconds, parts = time_of(recipe, made, groups, shape, teacher, backend)
    seconds += (updating := update_s(parameters, device))
    found = {
        "peak_gib": round(peak, 3),
        "step_s": round(seconds, 3),
        "tokens_per_s": round(shape.row_tokens_a_step / seconds, 1),
        "parts": {
            "memory_gib": {name: round(value, 3) for name, value in memory.items()} | {"loading": round(loading, 3)},
            "time_s": {name: round(value, 3) for name, value in parts.items()} | {"optimiser": round(updating, 4)},
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
    return found | {"reach": reached.lines(), "advice": advice(recipe, found, made, shape)}


def shape_of(recipe: Recipe, examples: Sequence[Example | Group], draws: Draws | None = None) -> Shape:
    steps = plan_batches(recipe.train, examples, draws=draws)
    seen = steps[:: max(1, len(steps) // STEPS_SEEN)]
    share = recipe.train.prefix_sharing
    made = sorted((packs_of(recipe, [examples[i] for i in step], share=share) for step in seen), key=_tokens)
    largest = max(
        (pack for packs in made for pack in packs), key=lambda p: (p.ids.numel(), sum(n**2 for n in p.lengths))
    )
    packs = [pack for packs in made for pack in packs]
    more = len(steps) / len(seen)  # a guess for those that were not looked at; full caches make an end of it
    lengths = len({p.ids.numel() for p in packs}), len({n for p in packs for n in p.lengths})
    count, tokens = sum(map(len, made)), sum(map(_tokens, made))
    middle = made[len(made) // 2]
    return Shape(
        middle,
        largest,
        (int(more * lengths[0]), int(more * lengths[1])),
        count / len(made),
        _tokens(middle),
        sum(pack.row_tokens for pack in middle),
        tokens / count,
    )


def _tokens(packs: Sequence[Pack]) -> int:
    return sum(pack.ids.numel() for pack in packs)


def with_deltas(recipe: Recipe) -> tuple[Sketch, list[list[int]]]:
    """The base of a recipe, sketched, with its deltas on it and one layer of each kind real; and the kinds."""
    return _some_layers(lambda real: _attached(recipe, sketch(recipe.base, real, network=recipe.network)))


def _some_layers(make: Callable[[Sequence[int]], Sketch]) -> tuple[Sketch, list[list[int]]]:
    """A sketch with a few layers of each kind real, and the kinds."""
    made = make([0])
    groups = kinds_of_layer(made)
    real = sorted(number for numbers in groups for number in numbers[: 1 + MORE_LAYERS])
    return (made if real == [0] else make(real)), groups


class Teacher(NamedTuple):
    """Another base that teaches, beside the sketch of the recipe's own with a layer of each kind."""

    sketch: Sketch
    groups: list[list[int]]


def with_teacher(recipe: Recipe, made: Sketch) -> Teacher | None:
    """Put the sketch of a teacher that is another base beside that of the recipe's base.

    It has one layer of each kind there: it keeps nothing for a backward pass, so more of them need no more memory.
    """
    if (base := teacher_base(recipe.loss)) is None:
        return None
    teacher = Teacher(*_some_layers(lambda real: sketch(base, real, network=recipe.network)))
    shorten(teacher.sketch, sorted(numbers[0] for numbers in teacher.groups))
    made.model.__dict__[TEACHER] = teacher.sketch.model
    return teacher


def _attached(recipe: Recipe, made: Sketch) -> Sketch:
    for name, config in recipe.all_deltas().items():
        attach(made.model, config, name=name, seed=recipe.train.seed, start=False)
    for host in hosts(made.model).values():
        host.deltas.train()
    return made


def kernels_of(recipe: Recipe, made: Sketch, groups: list[list[int]], shape: Shape) -> Choice:
    """What would compute a run, measured on one layer of each kind."""
    device, wanted = made.model.device, recipe.train.kernels
    if wanted != "auto":
        pinned(wanted, device, made.dtype)
    if not recipe.data.pack:
        return Choice(wanted)
    packs = [pack.to(device) for pack in (*shape.step, shape.largest)]
    with only(made, sorted(numbers[0] for numbers in groups)) as model:
        return choose(model, packs, wanted)


def _over_layers(made: Sketch, groups: list[list[int]], measure: Callable[[Any], float]) -> float:
    """What the whole model costs, from a model with one layer of each kind and others with more of one kind."""
    one_each = [numbers[0] for numbers in groups]
    with only(made, sorted(one_each)) as model:
        total = once = measure(model)
    for numbers in groups:
        if more := numbers[1 : 1 + MORE_LAYERS]:
            with only(made, sorted(one_each + more)) as model:
                total += (len(numbers) - 1) * max(0.0, measure(model) - once) / len(more)
    return total


# Memory ----------------------------------------------------------------------------------------------------------


Product = tuple[str, tuple[tuple[int, ...], ...]]
"""A matrix product by its name and the shapes of its factors."""

PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_, torch.ops.aten.bmm, torch.ops.aten.baddbmm}


class LiveBytes(TorchDispatchMode):
    """Inside, `peak` is the most bytes that tensors made inside held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now: int = 0
        self.peak: int = 0
        self.seen: set[int] = set()
        self.products: set[Product] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                memory = tensor.untyped_storage()
                if memory._cdata not in self.seen | given:
                    self.seen.add(memory._cdata)
                    self.now += memory.nbytes()
                    weakref.finalize(memory, self._freed, memory._cdata, memory.nbytes())
        self.peak = max(self.peak, self.now)
        if func.overloadpacket in PRODUCTS and out.dtype != torch.float32:
            self.products.add((str(func), tuple(tuple(t.shape) for t in args if isinstance(t, Tensor))))
        return out

    def _freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def live_bytes(
    recipe: Recipe, model: Any, pack: Pack, products: set[Product] | None = None, backend: Backend = TORCH
) -> int:
    """The most bytes in use at one time of a forward and backward pass; gradients of parameters were there before.

    The half-precision products that ran are added to `products`.
    """
    for parameter in trainable(model).values():
        parameter.grad = torch.zeros_like(parameter)
    live = LiveBytes()
    with training_pass(model, **recipe.passes(), backend=backend), live:
        one_pass(model, pack, _objective(recipe))
    if products is not None:
        products |= live.products
    return live.peak


def update_bytes(recipe: Recipe, model: Any, several_packs: bool) -> tuple[int, int]:
    """Bytes of gradients and of the optimiser's state, as the policies say; AdamW keeps two float32 moments."""
    policies = make_policies(recipe.policies)
    parameters = [p for name in recipe.all_deltas() for p in parameters_of(model, name)]
    unmade = torch.optim.SGD([torch.zeros(1)], lr=0.0)
    training = Training(model, recipe.all_deltas(), unmade, total=recipe.train.steps or 1, seed=recipe.train.seed)
    waiting = {id(p) for policy in policies for p in policy.waiting(training)}
    learning = [p for p in parameters if id(p) not in waiting]
    gradients = [4 * p.numel() for p in learning]
    own = [sizes for policy in policies if None not in (sizes := [policy.state_bytes(p) for p in learning])]
    kept = own[0] if own and learning else [8 * p.numel() for p in learning]
    one_alive = any(policy.fused for policy in policies) and not several_packs
    return (max if one_alive else sum)(gradients), sum(size or 0 for size in kept)


def _objective(recipe: Recipe) -> Objective:
    """The objective of the recipe. Where an adapter is its reference or teacher, the base stands for it."""
    loss = recipe.loss
    if isinstance(loss, DistillationConfig) and teacher_base(loss) is None:
        loss = replace(loss, teacher=None)
    elif isinstance(loss, ComparedConfig):
        loss = replace(loss, reference=None)
    return Objective(loss, tie(recipe.regularisers))


def kernels(products: set[Product], shape: Shape) -> int:
    """How many kernels a run will have compiled: those of the largest pack, for every length that there is.

    The shapes of attention's products, which are batched, follow from the pack's segments, those of all others from
    the pack.
    """
    of_segments = sum("bmm" in name for name, _ in products)
    of_packs = len(products) - of_segments
    segments = len(set(shape.largest.lengths))
    return min(kernel_cache_capacity(), int(of_packs * shape.lengths[0] + of_segments / segments * shape.lengths[1]))


def free_gib(device: torch.device) -> float:
    """What this process could take: of the machine's memory (or the container's), or of the GPU's."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0]) / GIB
    return memory().free_gib


# Time ------------------------------------------------------------------------------------------------------------


def time_of(
    recipe: Recipe,
    made: Sketch,
    groups: list[list[int]],
    shape: Shape,
    teacher: Teacher | None = None,
    backend: Backend = TORCH,
) -> tuple[float, dict[str, float]]:
    """Seconds of a step without its update, and which part of them is what."""
    ordered = sorted(shape.step, key=lambda pack: pack.ids.numel())
    chosen = ordered if len(ordered) <= PACKS_TIMED else [ordered[0], ordered[len(ordered) // 2], ordered[-1]]
    packs = [pack.to(made.model.device) for pack in chosen]
    scale = _tokens(ordered) / _tokens(chosen)
    shares: list[dict[str, float]] = []

    def seconds(model: Any) -> float:
        def passes() -> None:
            for pack in packs:
                one_pass(model, pack, _objective(recipe))

        with training_pass(model, **recipe.passes(), backend=backend):
            found = best_s(passes, TRIES)
            shares.append({name: share * found for name, share in parts_of_time(passes).items()})
        return found

    total = _over_layers(made, groups, seconds)
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
        with training_pass(model, packed=recipe.data.pack):
            return best_s(lambda: [hidden_states(model, pack) for pack in packs], TRIES)

    return max(0.0, _over_layers(*teacher, seconds) - seconds(teacher.sketch.model))


MEASURED_PARAMETERS = 2**20


def update_s(parameters: int, device: torch.device) -> float:
    """Seconds of clipping and one AdamW step."""
    count = min(parameters, MEASURED_PARAMETERS)
    tensors = [torch.nn.Parameter(torch.zeros(2**14, device=device)) for _ in range(max(1, count // 2**14))]
    optimiser = adamw([(tensors, 1e-4)], weight_decay=0.0)
    for tensor in tensors:
        tensor.grad = torch.zeros_like(tensor)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(tensors, 1.0)
        optimiser.step()

    return best_s(update, TRIES) * parameters / sum(tensor.numel() for tensor in tensors)


# Advice ----------------------------------------------------------------------------------------------------------

FULL_PACK = 512
"""Below so many tokens a pack the weights are read too often for what they are multiplied with."""


def advice(recipe: Recipe, found: dict[str, Any], made: Sketch, shape: Shape) -> list[str]:
    """Which knob to turn: where the recipe does not fit, and where it wastes what is there."""
    train, memory = recipe.train, found["parts"]["memory_gib"]
    said = []
    free, peak = found["memory_free_gib"] + memory["process"], found["peak_gib"]
    halves = made.dtype == torch.float32 and multiplies_bf16_fast(made.model.device.type)
    if peak > free:
        said.append(f"{peak:.1f} GiB are needed and {free:.1f} are there")
        if len(shape.largest.rows) > 1:
            said.append(f"train.pack_tokens={train.pack_tokens // 2} would halve the activations' share")
        elif recipe.data.max_tokens > 256:
            said.append(f"data.max_tokens: the largest pack is one row of {shape.largest.ids.numel()} tokens")
        if not train.checkpointing:
            said.append("train.checkpointing=true would keep one hidden state a layer in place of all that it computes")
        if made.dtype == torch.float32:
            said.append(f"base.store=bf16 would save {memory['base'] / 2:.2f} GiB")
    if halves:
        said.append("base.store=bf16: this machine multiplies bf16 fast, and the base would take half the memory")
    if train.checkpointing and peak < free / 2:
        said.append("train.checkpointing=false: there is room for the activations, and a step would be shorter")
    if recipe.data.pack and shape.tokens_a_pack < FULL_PACK and peak < free / 2:
        knob = "train.pack_tokens" if found["packs_a_step"] > 1.5 else "train.batch_rows"
        said.append(
            f"{knob}: a pack has {shape.tokens_a_pack:.0f} tokens on average, and larger ones run faster for each token"
        )
    return said
