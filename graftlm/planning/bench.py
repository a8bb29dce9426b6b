"""How fast this machine could train, and how fast it does: `graft bench`, and what `graft estimate` measures with.

The floor of a training token over a frozen base is 4 FLOP for each parameter of the linear layers (2 forward, 2 for
the gradient of x; none for weights), and 4 for each of the output head where the token is supervised. Divided by the
machine's rate of matrix products that is a time that no step can be below.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from graftlm.data.batches.pack import Example, Group, Pack, pack
from graftlm.data.sources.source import DataConfig
from graftlm.deltas.lora import LoraConfig
from graftlm.hub.dtypes import multiplies_bf16_fast
from graftlm.hub.load import load_base
from graftlm.hub.tokenizer import load_tokenizer
from graftlm.kernels.backend import Kernels
from graftlm.model.attach import attach
from graftlm.model.bases import view
from graftlm.model.registry import hosts, trainable
from graftlm.model.sites import output_head, transformer_layers
from graftlm.optim.adamw import adamw
from graftlm.passes.autotune import KernelChoice, choose
from graftlm.prepare import prepare_data
from graftlm.recipe import Recipe
from graftlm.system import preserve_global_state
from graftlm.training.config import TrainConfig
from graftlm.training.loop import Step, TrainStep
from graftlm.training.objective import Objective
from graftlm.training.passes import Passes
from graftlm.training.phases import make_batches
from graftlm.training.schedule import warmup_cosine
from graftlm.training.state import TrainingState

TOKENS = 2048
"""Rows of x in the products that are timed, and tokens of a pack in the steps: enough for a rate that grows no more."""

SQUARE = 2048
"""Side of the square product: large enough to be bound by arithmetic alone."""

STEPS = 4
ROWS = 16
"""Rows of builtin:docstrings that fill a pack of TOKENS, nearly."""


@preserve_global_state()
def bench(
    base: str = "smollm2", *, threads: int | None = None, kernels: Kernels = "auto", network: bool = False
) -> dict[str, Any]:
    """Measure the machine's matrix rate and a few training steps on it, and set them against each other."""
    if threads:
        torch.set_num_threads(threads)
    recipe = Recipe(base=base, data=DataConfig(train="builtin:docstrings", max_tokens=TOKENS), network=network)
    examples = prepare_data(recipe, load_tokenizer(recipe.base, network=network)).examples
    model: Any = load_base(base, network=network).model
    dtype, device = next(model.parameters()).dtype, model.device
    shapes = linear_shapes(model)
    head = output_head(model)
    assert head is not None
    flop = 4 * sum(count * d_in * d_out for (d_in, d_out), count in shapes.items())
    head_flop = 4 * head.weight.numel()  # type: ignore[operator]
    rates = matrix_rates(shapes, device)
    rate = max(rates[_name(dtype)].values())

    choice, steps, parts = _train_lora(model, examples, kernels)
    tokens_per_s = statistics.median(step.tokens / step.wall_s for step in steps[1:])
    supervised = sum(step.supervised_tokens for step in steps) / sum(step.tokens for step in steps)
    needed = flop + supervised * head_flop
    floor = rate * 1e9 / needed
    return {
        "base": base,
        "dtype": _name(dtype),
        "threads": torch.get_num_threads(),
        "kernels": choice.to_json(),
        "kernels_by_operation": choice.lines(),
        "device": str(device),
        "matrix_gflops": round(rate, 1),
        "matrix_gflops_by_dtype": {name: {k: round(v, 1) for k, v in found.items()} for name, found in rates.items()},
        "linear_parameters": flop // 4,
        "supervised_share": round(supervised, 4),
        "mflop_per_token": round(needed / 1e6, 1),
        "floor_tokens_per_s": round(floor, 1),
        "tokens_per_s": round(tokens_per_s, 1),
        "share_of_floor": round(tokens_per_s / floor, 3),
        "parts": {name: round(share, 3) for name, share in parts.items()},
    }


def _train_lora(
    model: Any, examples: Sequence[Example | Group], kernels: Kernels
) -> tuple[KernelChoice, list[Step], dict[str, float]]:
    """STEPS steps of LoRA: the kernels that computed them, the steps, and the shares of a pass (`parts_of_time`)."""
    dtype, device = next(model.parameters()).dtype, model.device
    attach(model, LoraConfig(r=16, alpha=32))
    for host in hosts(model).values():
        host.deltas.train()
    batches = make_batches(TrainConfig(steps=STEPS, batch_rows=ROWS), examples)
    steps_packs = [pack([examples[i] for i in rows], TOKENS) for rows in batches]
    choice = choose(model, [each.to(device) for packs in steps_packs for each in packs], kernels)
    backend = choice.backend(device, dtype)
    training = TrainingState(model, {}, adamw([(trainable(model).values(), 5e-4)], weight_decay=0.0))
    schedule, passes = warmup_cosine(steps=STEPS, warmup_steps=1), Passes(backend=backend)
    train_step = TrainStep(training, "supervised", schedule, clip=1.0, passes=passes)
    steps = list(train_step.over([each.to(device) for each in packs] for packs in steps_packs))
    with passes.through(model):
        first = steps_packs[0][0].to(device)
        one_pass(model, first)
        return choice, steps, parts_of_time(lambda: one_pass(model, first))


def linear_shapes(model: Any) -> dict[tuple[int, int], int]:
    """(d_in, d_out) of the linear layers of the decoder -> how many there are; the output head is left out."""
    found: dict[tuple[int, int], int] = {}
    for layer in transformer_layers(model).values():
        for name, module in layer.named_modules():
            base = view(module)
            if base is not None and base.kind == "linear" and ".deltas." not in name:
                found[base.d_in, base.d_out] = found.get((base.d_in, base.d_out), 0) + 1
    return found


def matrix_rates(shapes: Mapping[tuple[int, int], int], device: Any) -> dict[str, dict[str, float]]:
    """GFLOP/s by dtype: of the base's own products over TOKENS rows, as often as it has them, and of a large square.

    The best of several tries counts: what else the machine does can only make one slower. The machine's rate is the
    larger of the two: a floor must not be above what the machine can do.
    """
    dtypes = [torch.float32, *([torch.bfloat16] if multiplies_bf16_fast(torch.device(device).type) else [])]
    rates = {}
    for dtype in dtypes:
        flop = seconds = 0.0
        for (d_in, d_out), count in shapes.items():
            flop += 2 * TOKENS * d_in * d_out * count
            seconds += count * _product_s(TOKENS, d_in, d_out, dtype, device)
        square = 2 * SQUARE**3 / _product_s(SQUARE, SQUARE, SQUARE, dtype, device)
        rates[_name(dtype)] = {"own_shapes": flop / seconds / 1e9, "square": square / 1e9}
    return rates


def _product_s(rows: int, d_in: int, d_out: int, dtype: torch.dtype, device: Any, tries: int = 6) -> float:
    x, W = torch.randn(rows, d_in, dtype=dtype, device=device), torch.randn(d_out, d_in, dtype=dtype, device=device)
    return best_s(lambda: torch.nn.functional.linear(x, W), tries)


def best_s(work: Callable[[], Any], tries: int) -> float:
    """Seconds of the fastest of several tries, after one that does not count."""
    seconds = []
    for _ in range(tries + 1):
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def one_pass(model: Any, batch: Pack, objective: Objective | None = None) -> None:
    """Forward and backward pass over one pack, as in a step, supervised by default; inside `Passes.through`."""
    part, _ = (objective or Objective("supervised")).part(model, batch)
    part.mean(1.0, 1.0).backward()


# Where the time goes ---------------------------------------------------------------------------------------------

PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::linear")

OF_KERNELS = {"_LowRank": "matrix products"} | dict.fromkeys(("_RmsNorm", "_SiluGate", "_Rotate"), "element-wise")
"""What the functions of `kernels.py` do, which torch sees from outside; the name of attention's speaks for itself."""


def parts_of_time(work: Callable[[], Any]) -> dict[str, float]:
    """The shares of matrix products, attention, head and loss, element-wise work and the rest in one call of `work`.

    Attention and head are whatever runs inside of operations with such names; products and element-wise work are
    what is left of torch's operations, the rest is Python's. Call `work` once before: first calls take longer.
    """
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        started = time.perf_counter()
        work()
        wall = time.perf_counter() - started
    seconds = dict.fromkeys(("matrix products", "attention", "head and loss", "element-wise", "rest"), 0.0)
    for event in profiler.events() or ():
        if event.name.startswith("aten::") or _part_by_name(event) is not None:
            seconds[_part(event)] += event.self_cpu_time_total / 1e6
    seconds["rest"] = max(0.0, wall - sum(seconds.values()))
    total = sum(seconds.values())
    return {name: each / total for name, each in seconds.items()}


def _part(event: Any) -> str:
    inside = event
    while inside is not None:
        if (part := _part_by_name(inside)) is not None:
            return part
        inside = inside.cpu_parent
    return "matrix products" if event.name in PRODUCTS else "element-wise"


def _part_by_name(event: Any) -> str | None:
    name = event.name.lower()
    if "attention" in name:
        return "attention"
    if any(part in name for part in ("logprobs", "readings", "cross_entropy")):
        return "head and loss"
    return OF_KERNELS.get(event.name.removesuffix("Backward"))
