"""Which backend computes which calls, found by timing them: `train.kernels: auto`.

No kernel is the fastest on every processor: with AMX, torch's products run at several times the rate of ours; without
it, ours need no code compiled for each new length of a pack. So the calls of the run's own packs are recorded once, in
a forward pass over the model at hand. Then every candidate computes some of them, forward and backward, and for each
class of calls the fastest is chosen. A class is an operation, its widths, and its number of rows to a power of two.

The choice is a part of the run. It is stored for the machine, the libraries and the model in the cache folder, saved
in OUT and in every checkpoint, and used again by --resume.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from graftlm.errors import OutputError
from graftlm.files import cache_folder, whole
from graftlm.kernels import cpu
from graftlm.kernels.backend import OURS, TORCH, Backend, Kernels, compiled, pinned, rotates_halves
from graftlm.model.registry import trainable
from graftlm.passes.forward import Packed, hidden_states
from graftlm.passes.packed_attention import packed_attention
from graftlm.system import processor

CALLS = 4
"""Calls of a class that are timed: of different layers, so that weights come from memory as they do in a step."""

ROUNDS = (2, 5)
BUDGET_S = 0.6
"""Each candidate computes these calls at least and at most so many times, less often where a class took this long."""

COMPILING_S = 20.0
"""What torch.compile costs at the start of a run, about. It is a candidate where a run spends several times as much on
norms, gates and rotary embeddings, and is chosen where it saves more."""

EQUAL = 1.03
"""Candidates within this factor of the fastest count as equal: of those the first is chosen."""

GRADIENTS = {
    "low_rank_linear": (0, 3, 4),
    "attention": (0, 1, 2),
    "rms_norm": (0,),
    "silu_gate": (0, 1),
    "rotary": (0, 1),
}
"""The operations that have several candidates, and which of their arguments get a gradient in training."""

ELEMENTWISE = ("rms_norm", "silu_gate", "rotary")


@dataclass(frozen=True, order=True)
class ShapeClass:
    """Calls that are alike enough for one candidate to be the fastest for all of them."""

    operation: str
    """The field of `Backend`."""
    widths: tuple[int, ...]
    """(d_in, d_out) of a layer, (d) of a norm or gate; of the others (query heads, key heads, width of a head)."""
    size: int
    """Bits of the number of rows of x; of attention, of tokens in a segment of mean length."""

    def __str__(self) -> str:
        first, unit = 1 << self.size >> 1, "tokens a segment" if self.operation == "attention" else "rows"
        return f"{self.operation} {' x '.join(map(str, self.widths))}, {first} to {2 * first - 1} {unit}"


def class_of(operation: str, arguments: Sequence[Any]) -> ShapeClass:
    """The class of a call of this function of a `Backend` with these arguments."""
    x = arguments[0]
    if operation == "attention":
        (H, T, D), G = x.shape, arguments[1].shape[0]
        return ShapeClass(operation, (H, G, D), (T // len(arguments[3].layout.lengths)).bit_length())
    if operation == "rotary":
        return ShapeClass(operation, (x.shape[1], arguments[1].shape[1], x.shape[-1]), x.shape[-2].bit_length())
    rows = (x.numel() // x.shape[-1]).bit_length()
    if operation == "low_rank_linear":
        return ShapeClass(operation, (arguments[3].shape[1], arguments[4].shape[0]), rows)
    return ShapeClass(operation, (x.shape[-1],), rows)


@dataclass(frozen=True)
class Timing:
    """What was measured of a class."""

    calls: int
    """How many of them the recorded passes made."""
    microseconds: Mapping[str, float]
    """Microseconds of one call, forward and backward, by candidate."""

    def fastest(self, leave_out: str = "") -> str:
        times = {name: us for name, us in self.microseconds.items() if name != leave_out}
        return next(name for name, us in times.items() if us <= EQUAL * min(times.values()))


@dataclass(frozen=True)
class KernelChoice:
    """What computes a run, and why."""

    kernels: Kernels
    """The recipe's `train.kernels`."""
    reason: str = ""
    """Under auto: why our kernels are no candidate, where they are not."""
    fastest: Mapping[ShapeClass, str] = field(default_factory=dict)
    """Under auto: the candidate for every class that the packs have. Empty where there is torch alone."""
    timings: Mapping[ShapeClass, Timing] = field(default_factory=dict)

    def backend(self, device: torch.device, dtype: torch.dtype) -> Backend:
        """The backend for a model on `device` in `dtype`; TrainingError where it cannot compute there."""
        if self.kernels != "auto":
            return pinned(self.kernels, device, dtype)
        names: list[Any] = list(dict.fromkeys(self.fastest.values()))
        return _dispatching({name: pinned(name, device, dtype) for name in names}, self.fastest) if names else TORCH

    def lines(self) -> list[str]:
        """Which candidate computes each operation, for people."""
        if not self.fastest:
            return [("torch" if self.kernels == "auto" else self.kernels) + (f": {self.reason}" if self.reason else "")]
        by_operation: dict[str, Counter[str]] = {}
        for each, name in sorted(self.fastest.items()):
            by_operation.setdefault(each.operation, Counter())[name] += 1
        return [
            f"{operation.replace('_', ' ')}: " + ", ".join(_counted(name, counts) for name in counts)
            for operation, counts in by_operation.items()
        ]

    def to_json(self) -> dict[str, Any]:
        classes = [
            {
                "calls": str(each),
                "by": name,
                "microseconds": {name: round(us, 1) for name, us in self.timings[each].microseconds.items()},
                "operation": each.operation,
                "widths": list(each.widths),
                "size": each.size,
                "count": self.timings[each].calls,
            }
            for each, name in sorted(self.fastest.items())
        ]
        return {"kernels": self.kernels, "reason": self.reason, "classes": classes}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> "KernelChoice":
        classes = {ShapeClass(c["operation"], tuple(c["widths"]), c["size"]): c for c in tree["classes"]}
        fastest = {each: str(c["by"]) for each, c in classes.items()}
        return cls(
            tree["kernels"],
            tree["reason"],
            fastest,
            {each: Timing(c["count"], c["microseconds"]) for each, c in classes.items()},
        )


def _counted(name: str, counts: Counter[str]) -> str:
    return name if len(counts) == 1 else f"{name} ({counts[name]} of {counts.total()} shapes)"


def choose(model: Any, packs: Sequence[Packed], kernels: Kernels = "auto", *, passes: int = 1) -> KernelChoice:
    """What computes a run over `passes` packs like these, on a model that has its deltas.

    Raises TrainingError where `kernels` names a backend that cannot compute here. Under auto the first run of a model
    on a machine times the candidates; later ones read what was measured from the cache folder.
    """
    device, dtype = model.device, model.dtype
    if kernels != "auto":
        pinned(kernels, device, dtype)
        return KernelChoice(kernels)
    reason = cpu.unavailable(device, dtype)
    candidates = {"torch": TORCH} if reason else {"ours": OURS, "torch": TORCH}
    may_compile = passes >= 50 and (device.type != "cpu" or cpu.compiler() is not None)
    if not packs or (len(candidates) == 1 and not may_compile):
        return KernelChoice("auto", reason)
    packs = representative(packs)
    file = cache_folder() / "kernels" / f"timings-{_identity(model, packs)}.json"
    try:
        timings = dict(KernelChoice.from_json(json.loads(file.read_text(encoding="utf-8"))).timings)
    except (OSError, ValueError, KeyError):
        timings = {}
    recorded: dict[ShapeClass, _Calls] = {}
    if not timings:
        recorded = _record(model, packs, next(iter(candidates.values())))
        timings = {
            each: Timing(calls.count, _times(each.operation, calls, candidates)) for each, calls in recorded.items()
        }
    share = passes / len(packs)
    if may_compile and share * _seconds(timings, "compiled") > 3 * COMPILING_S:
        if not any("compiled" in timing.microseconds for timing in timings.values()):
            recorded = recorded or _record(model, packs, next(iter(candidates.values())))
            for each, calls in recorded.items():
                if each.operation in ELEMENTWISE:
                    more = _times(each.operation, calls, {"compiled": compiled()})
                    timings[each] = Timing(calls.count, {**timings[each].microseconds, **more})
        seconds_saved = _seconds(timings, "compiled") - _seconds(timings)
        leave_out = "" if share * seconds_saved > COMPILING_S else "compiled"
    else:
        leave_out = "compiled"
    found = KernelChoice("auto", reason, {each: t.fastest(leave_out) for each, t in timings.items()}, timings)
    if recorded:
        with suppress(OutputError), whole(file) as draft:  # a cache that cannot be written costs time, nothing else
            tree = {"measured_on": _measured_on(model)} | found.to_json()
            draft.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    return found


def fastest_backend(model: Any, packs: Sequence[Packed], kernels: Kernels = "auto", *, passes: int = 1) -> Backend:
    """The backend of `choose`, for a training loop of your own: pass it to `steps` or `packed_attention`."""
    return choose(model, packs, kernels, passes=passes).backend(model.device, model.dtype)


def _seconds(timings: Mapping[ShapeClass, Timing], leave_out: str = "") -> float:
    """What the recorded passes spend on norms, gates and rotary embeddings, by their fastest candidates."""
    found = [t for each, t in timings.items() if each.operation in ELEMENTWISE]
    return sum(t.calls * t.microseconds[t.fastest(leave_out)] for t in found) / 1e6


def representative(packs: Sequence[Packed]) -> list[Packed]:
    """The pack of middling size for each number of tokens to a power of 2."""
    by_size: dict[int, list[Packed]] = {}
    for pack in packs:
        by_size.setdefault(pack.ids.numel().bit_length(), []).append(pack)
    middle = [sorted(some, key=lambda p: p.ids.numel())[len(some) // 2] for some in by_size.values()]
    return sorted(middle, key=lambda p: -p.ids.numel())


def _measured_on(model: Any) -> dict[str, Any]:
    return {
        "model": getattr(getattr(model, "config", None), "model_type", type(model).__name__),
        "type": model.device.type,
        "device": _device(model.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _identity(model: Any, packs: Sequence[Packed]) -> str:
    """What timings depend on: processor and threads, libraries, the model and its deltas, the sizes of packs."""
    parts = _measured_on(model) | {
        "library": cpu.library_digest() if model.device.type == "cpu" else "",
        "dtype": str(model.dtype),
        "config": model.config.to_dict() if hasattr(model, "config") else {},
        "deltas": sorted({tuple(parameter.shape) for parameter in trainable(model).values()}),
        "packs": sorted({(p.ids.numel().bit_length(), (p.ids.numel() // len(p.lengths)).bit_length()) for p in packs}),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def stored_choices() -> list[dict[str, Any]]:
    """What was measured on this machine with these libraries: for each base its type, threads and lines for people."""
    found = []
    for path in sorted((cache_folder() / "kernels").glob("timings-*.json")):
        with suppress(OSError, ValueError, KeyError):
            tree = json.loads(path.read_text(encoding="utf-8"))
            about = tree["measured_on"]
            if (about["device"], about["torch"]) == (_device(torch.device(about["type"])), torch.__version__):
                choice = KernelChoice.from_json(tree)
                found.append({"model": about["model"], "threads": about["threads"], "operations": choice.lines()})
    return found


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    here = processor()
    return " ".join((here.name, *here.flags))


# Recording and timing ------------------------------------------------------------------------------------------------


@dataclass
class _Calls:
    """Calls of one class: how many there were, and the arguments of the first of them."""

    function_of: Callable[[Backend], Callable[..., Any]]
    """The function that they call, of any candidate."""
    count: int = 0
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)


@torch.no_grad()
def _record(model: Any, packs: Sequence[Packed], by: Backend) -> dict[ShapeClass, _Calls]:
    """The calls of a forward pass over each pack."""
    found: dict[ShapeClass, _Calls] = {}

    def recording(operation: str, function_of: Callable[[Backend], Callable[..., Any]]) -> Callable[..., Any]:
        function = function_of(by)

        def call(*arguments: Any, **options: Any) -> Any:
            calls = found.setdefault(class_of(operation, arguments), _Calls(function_of))
            calls.count += 1
            if len(calls.arguments) < CALLS:
                calls.arguments.append((arguments, options))
            return function(*arguments, **options)

        return call

    with packed_attention(model, _each(recording, by)), torch.random.fork_rng(devices=[]):  # for dropout
        for pack in packs:
            hidden_states(model, pack)
    return found


def _each(make: Callable[[str, Callable[[Backend], Callable[..., Any]]], Callable[..., Any]], by: Backend) -> Backend:
    """A backend whose operations are `make(operation, how to get its function from a backend)`; the rest as in `by`."""
    return Backend(
        low_rank_linear=make("low_rank_linear", lambda backend: backend.low_rank_linear),
        attention=make("attention", lambda backend: backend.attention),
        rms_norm=make("rms_norm", lambda backend: backend.rms_norm),
        silu_gate=make("silu_gate", lambda backend: backend.silu_gate),
        rotary=lambda function: (
            make("rotary", lambda backend: backend.rotary(function))
            if rotates_halves(function)  # others have no candidate but the model's own code
            else by.rotary(function)
        ),
        head=by.head,
    )


def _times(operation: str, calls: _Calls, candidates: Mapping[str, Backend]) -> dict[str, float]:
    """Microseconds of one call by each candidate: of all calls of a pass, the first of which may compile code."""
    functions = {name: calls.function_of(backend) for name, backend in candidates.items()}
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    started = time.perf_counter()
    least, most = ROUNDS
    for number in range(most):
        if number >= least and time.perf_counter() - started > BUDGET_S:
            break
        for name, function in list(functions.items())[:: -1 if number % 2 else 1]:
            seconds[name] += [_once(function, GRADIENTS[operation], *call) for call in calls.arguments]
    found = {}
    for name, (first, *others) in seconds.items():
        usual = min(others, default=first)  # what else the machine does can only make a call slower
        compiling = 0.0 if name == "compiled" else max(0.0, first - usual)  # COMPILING_S counts that of torch.compile
        found[name] = 1e6 * (usual + compiling / calls.count)
    return found


def _once(
    function: Callable[..., Any], gradients: Sequence[int], arguments: Sequence[Any], options: Mapping[str, Any]
) -> float:
    """Seconds of one call forward and backward; `gradients` says for which arguments."""
    leaves = [
        argument.detach().requires_grad_(number in gradients) if isinstance(argument, Tensor) else argument
        for number, argument in enumerate(arguments)
    ]
    with torch.enable_grad():
        started = _now(arguments[0])
        out = function(*leaves, **options)
        outputs = out if isinstance(out, tuple) else (out,)
        torch.autograd.backward(outputs, [output.detach() for output in outputs])
        return _now(arguments[0]) - started


def _now(x: Tensor) -> float:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    return time.perf_counter()


def _dispatching(candidates: Mapping[str, Backend], fastest: Mapping[ShapeClass, str]) -> Backend:
    """A backend that gives each call to the candidate of its class, or of the class that is nearest to it."""

    def dispatching(operation: str, function_of: Callable[[Backend], Callable[..., Any]]) -> Callable[..., Any]:
        of_operation = {each: name for each, name in fastest.items() if each.operation == operation}
        names = Counter(of_operation.values() or fastest.values())
        usual = names.most_common(1)[0][0]
        if len(names) == 1 or not of_operation:
            return function_of(candidates[usual])
        functions: dict[ShapeClass, Callable[..., Any]] = {}

        def call(*arguments: Any, **options: Any) -> Any:
            each = class_of(operation, arguments)
            if each not in functions:
                near = [other for other in of_operation if other.widths == each.widths]
                name = of_operation[min(near, key=lambda o: abs(o.size - each.size))] if near else usual
                functions[each] = function_of(candidates[name])
            return functions[each](*arguments, **options)

        return call

    return _each(dispatching, next(iter(candidates.values())))
