"""What `cpu.cpp` computes, as functions with gradients: bfloat16 on a processor.

The machine's C++ compiler builds the file at its first use, in some two seconds. The library stays in the cache folder
under a name that says what it was built from, and the hash of its content. It is loaded from memory, after its content
was compared with that hash: a damaged file, or one that another user could have written, is built again instead.
"""

import ctypes
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from graftlm.errors import OutputError, TrainingError
from graftlm.files import cache_folder, whole
from graftlm.kernels import linear
from graftlm.kernels.attention import AttentionRule, SegmentLayout, tiled_attention

SOURCE = Path(__file__).with_name("cpu.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared")
LANES = 16


class _Heads(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("by_head", ctypes.c_long), ("by_token", ctypes.c_long)]


class _Shape(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("queries", "keys", "H", "G", "D")),
        ("scale", ctypes.c_float),
        ("threads", ctypes.c_int),
    ]


class _CSegment(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("start", "length", "keys", "ranges")),
        ("range", ctypes.POINTER(ctypes.c_int)),
    ]


class _Linear(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("tokens", "d_in", "d_out", "r", "threads")]


_POINTER, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_float
_ARGUMENTS = {
    "attend": [_Heads] * 4 + [_POINTER, _Shape, _POINTER, _INT],
    "attend_backward": [_Heads] * 4 + [_POINTER, _Heads, _POINTER, _POINTER, _Shape, _POINTER, _INT],
    "low_rank": [_POINTER] * 6 + [_Linear],
    "low_rank_backward": [_POINTER] * 9 + [_Linear],
    "rms_norm": [_POINTER] * 3 + [_LONG, _INT, _FLOAT, _INT],
    "rms_norm_backward": [_POINTER] * 4 + [_LONG, _INT, _FLOAT, _INT],
    "silu_gate": [_POINTER] * 3 + [_LONG, _INT],
    "silu_gate_backward": [_POINTER] * 5 + [_LONG, _INT],
    **dict.fromkeys(("attend_new_float32", "attend_new_bfloat16"), [_POINTER] * 6 + [_INT] * 5 + [_FLOAT, _INT]),
    **dict.fromkeys(
        ("many_low_rank_float32", "many_low_rank_bfloat16"), [_POINTER] * 3 + [_INT] + [_POINTER] * 2 + [_INT] * 4
    ),
    "scaled_transpose": [_POINTER, _INT, _INT, _INT, _FLOAT, _POINTER, _INT],
    **dict.fromkeys(("panels_float32", "panels_bfloat16"), [_POINTER] * 5 + [_INT] * 4),
    "panels_serve_float32": [],
    "panels_serve_bfloat16": [],
    "rotate": [_Heads, _POINTER, _POINTER, _Heads, _INT, _INT, _INT, ctypes.c_bool, _INT],
}


def serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there are kernels for tensors of a device and a dtype."""
    return device.type == "cpu" and dtype == torch.bfloat16 and sys.platform == "linux"


def unavailable(device: torch.device, dtype: torch.dtype) -> str:
    """Why our kernels cannot compute on a device in a dtype, as one line; empty where they can. Builds them."""
    if sys.platform != "linux":
        return f"our kernels are built on Linux, and this is {sys.platform}"
    if not serves(device, dtype):
        name = str(dtype).removeprefix("torch.")
        return f"our kernels compute in bfloat16 on a CPU, and the base is in {name} on {device.type}"
    found = _library(SOURCE, FLAGS)
    return found if isinstance(found, str) else ""


def compiler() -> tuple[str, ...] | None:
    """The command of the C++ compiler, $CXX or the first that is installed, its program as a full path; None without.

    $CXX may be several words, as in "ccache g++".
    """
    command = shlex.split(os.environ.get("CXX", ""))
    for program, *rest in [command] if command else [["g++"], ["c++"], ["clang++"]]:
        if (path := shutil.which(program)) is not None:
            return path, *rest
    return None


class _Library(NamedTuple):
    functions: ctypes.CDLL
    digest: str
    """The digest of its content."""


def library() -> ctypes.CDLL:
    """cpu.cpp as a library, built where there is none yet. Raises TrainingError with what went wrong."""
    found = _library(SOURCE, FLAGS)
    if isinstance(found, str):
        raise TrainingError(f"train.kernels: {found}", code="kernels-unavailable")
    return found.functions


def library_digest() -> str:
    """Which build of cpu.cpp this process computes with: the hash of its content; empty where there is none."""
    found = _library(SOURCE, FLAGS)
    return "" if isinstance(found, str) else found.digest


@cache
def _library(source: Path, flags: tuple[str, ...]) -> _Library | str:
    """The library, or why there is none. It is tried once in a process."""
    command = compiler()
    if command is None:
        cxx = os.environ.get("CXX")
        missing = f"$CXX, {cxx!r}, is not installed" if cxx else "there is no g++, c++ or clang++"
        return f"no C++ compiler: {missing} (apt-get install g++)"
    try:
        native = _output(*command, *flags, "-###", "-E", "-x", "c++", "-")
        inputs = (source.read_text(), flags, _output(*command, "--version"), native)
        name, folder = _digest(repr(inputs).encode()), cache_folder() / "kernels"
        content = _read(folder, name)
        if content is not None:
            return _Library(_load(content), _digest(content))
        content = _build((*command, *flags, str(source)))
        found = _Library(_load(content), _digest(content))
        with suppress(OutputError):  # a cache that cannot be written: built for this process alone
            _write(folder / f"{name}.{found.digest}.so", content)
        return found
    except _BuildError as error:
        return f"{shlex.join(command)} cannot build {source.name}: {error}"
    except (OSError, AttributeError) as error:  # of the loader, or of a library without our functions
        return f"{source.name} was built by {shlex.join(command)} and cannot be loaded: {error}"


class _BuildError(Exception):
    """What the compiler said."""


def _build(command: tuple[str, ...]) -> bytes:
    with TemporaryDirectory() as folder:
        built = Path(folder) / "kernels.so"
        process = subprocess.run([*command, "-o", str(built)], capture_output=True, text=True, check=False)  # noqa: S603
        if process.returncode or not built.is_file():
            lines = [
                line for line in process.stderr.splitlines() if "error" in line.lower()
            ] or process.stderr.splitlines()
            raise _BuildError((lines or [f"exit code {process.returncode}"])[0][:300])
        return built.read_bytes()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _read(folder: Path, name: str) -> bytes | None:
    """A library of this name whose content has the hash in its file name, and which no other user can have written."""
    for path in sorted(folder.glob(f"{name}.*.so")) if folder.is_dir() else []:
        with suppress(OSError), path.open("rb") as file:
            about, content = os.fstat(file.fileno()), file.read()
            others = about.st_uid not in (0, os.geteuid()) or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
            if not others and path.name == f"{name}.{_digest(content)}.so":
                return content
    return None


def _write(path: Path, content: bytes) -> None:
    with whole(path) as draft:
        draft.write_bytes(content)
        draft.chmod(0o644)


def _load(content: bytes) -> ctypes.CDLL:
    """The library with these bytes, from memory: a cache folder may forbid to execute, and a file may change."""
    file = os.memfd_create("graftlm-kernels")  # stays open: the loader knows a library by its path
    with open(file, "wb", closefd=False) as memory:
        memory.write(content)
    found = ctypes.CDLL(f"/proc/self/fd/{file}")
    for name, arguments in _ARGUMENTS.items():
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, None if arguments else _INT
    return found


def _output(*command: str) -> str:
    """What a compiler prints, with what `native` means on this machine: the folder may be shared by several."""
    process = subprocess.run(command, input="", capture_output=True, text=True, check=False)  # noqa: S603 (the compiler)
    return process.stdout + process.stderr


def _heads(t: Tensor) -> _Heads:
    assert t.stride(-1) == 1
    return _Heads(t.data_ptr(), t.stride(0), t.stride(1))


def _by_token(t: Tensor) -> Tensor:
    """t [heads, T, D] with the numbers of a head next to each other, and rows whole pairs apart."""
    return t if t.stride(-1) == 1 and t.stride(1) % 2 == 0 else t.contiguous()


def _like(t: Tensor) -> Tensor:
    """Room for [heads, T, D] that lies as [T, heads, D], as products want it."""
    return t.new_empty(t.shape[1], t.shape[0], t.shape[2]).transpose(0, 1)


# Attention -----------------------------------------------------------------------------------------------------------


class _Segments:
    """The segments of a layout as the kernels read them."""

    def __init__(self, layout: SegmentLayout, always: int) -> None:
        tiles = layout.tiles(always, None)
        ends = [[end for keys in tile.keys for end in (keys.start, keys.stop)] for tile in tiles]
        self.ranges = [(ctypes.c_int * len(each))(*each) for each in ends]
        self.array = (_CSegment * len(tiles))(
            *(
                _CSegment(tile.queries.start, *tile.shape, len(tile.keys), range_)
                for tile, range_ in zip(tiles, self.ranges, strict=True)
            )
        )


class _Attention(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: _Segments, scale: float) -> Tensor:
        q, k, v = _by_token(q), _by_token(k), _by_token(v)
        (H, T, D), (G, keys, _) = q.shape, k.shape
        out, log_sums = q.new_empty(T, H, D), torch.empty(H, T)
        ctx.shape = _Shape(T, keys, H, G, D, scale, torch.get_num_threads())
        rest = (log_sums.data_ptr(), ctx.shape, segments.array, len(segments.array))
        library().attend(_heads(q), _heads(k), _heads(v), _heads(out.transpose(0, 1)), *rest)
        ctx.segments = segments
        ctx.save_for_backward(q, k, v, log_sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_sums = ctx.saved_tensors
        grad, dq, dk, dv = _by_token(grad.transpose(0, 1)), _like(q), _like(k), _like(v)
        inputs = (_heads(grad), _heads(q), _heads(k), _heads(v), log_sums.data_ptr())
        outputs = (_heads(dq), dk.data_ptr(), dv.data_ptr(), ctx.shape)
        library().attend_backward(*inputs, *outputs, ctx.segments.array, len(ctx.segments.array))
        return dq, dk, dv, None, None


def attention(q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule) -> Tensor:
    """`tiled_attention`, for heads of one width, in sixteens; windows and capped scores are left to it."""
    D, tiles = q.shape[-1], rule.layout.tiles(rule.always, None)
    windowed = rule.window is not None and any(rule.window < tile.shape[1] for tile in tiles)
    if windowed or rule.softcap is not None or D % LANES or v.shape[-1] != D or not serves(q.device, q.dtype):
        return tiled_attention(q, k, v, rule)
    segments = rule.layout.for_cpu_kernels
    if rule.always not in segments:
        segments[rule.always] = _Segments(rule.layout, rule.always)
    out: Tensor = _Attention.apply(q, k, v, segments[rule.always], rule.scale)
    return out


# A frozen linear layer with low-rank factors on it -------------------------------------------------------------------


class _LowRank(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
        rows = rows.contiguous()
        spare = -len(A) % LANES
        A_, B_ = (F.pad(A.to(rows.dtype), (0, 0, 0, spare)), F.pad(B.to(rows.dtype), (0, spare)))
        ctx.shape = _Linear(len(rows), A.shape[1], len(B), len(A_), torch.get_num_threads())
        u, y = rows.new_empty(len(rows), len(A_)), rows.new_empty(len(rows), len(B))
        library().low_rank(*(t.data_ptr() for t in (rows, W, A_, B_, u, y)), ctx.shape)
        ctx.weight, ctx.r = W, len(A)
        ctx.save_for_backward(rows if ctx.needs_input_grad[2] else None, u, A_, B_)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, u, A_, B_ = ctx.saved_tensors
        needs_x, _, needs_A, needs_B = ctx.needs_input_grad
        grad = grad.contiguous()
        dx = grad.new_empty(len(grad), A_.shape[1]) if needs_x else None
        dA = torch.empty(A_.shape) if needs_A else None
        dB = torch.empty(len(A_), len(B_)) if needs_B else None
        pointers = [None if t is None else t.data_ptr() for t in (grad, rows, u, ctx.weight, A_, B_, dx, dA, dB)]
        library().low_rank_backward(*pointers, ctx.shape)
        return (
            dx,
            None,
            None if dA is None else dA[: ctx.r],
            None if dB is None else dB[: ctx.r].T,
        )


def low_rank_linear(
    x: Tensor, W: linear.Frozen, b: Tensor | None, A: Tensor, B: Tensor, gain: Tensor | None = None
) -> Tensor:
    """`linear.low_rank_linear` for weights that lie in rows; biases, gains and weights that are made are left to it."""
    if b is not None or gain is not None or not isinstance(W, Tensor) or not W.is_contiguous() or not _served(x, W):
        return linear.low_rank_linear(x, W, b, A, B, gain)
    if len(W) % LANES or A.dtype != torch.float32 or torch.is_autocast_enabled("cpu") or not x.numel():
        return linear.low_rank_linear(x, W, b, A, B, gain)
    return linear.by_rows(lambda rows: _LowRank.apply(rows, W, A, B), x)


# Passes over memory --------------------------------------------------------------------------------------------------


class _RmsNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        y, d = torch.empty_like(x), x.shape[-1]
        ctx.rest = (x.numel() // d, d, eps, torch.get_num_threads())
        library().rms_norm(x.data_ptr(), gain.data_ptr(), y.data_ptr(), *ctx.rest)
        ctx.save_for_backward(x, gain)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gain = ctx.saved_tensors
        grad, dx = grad.contiguous(), torch.empty_like(x)
        library().rms_norm_backward(grad.data_ptr(), x.data_ptr(), gain.data_ptr(), dx.data_ptr(), *ctx.rest)
        return dx, None, None


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """`linear.rms_norm`."""
    if not _served(x, gain) or not gain.is_contiguous():
        return linear.rms_norm(x, gain, eps)
    y: Tensor = _RmsNorm.apply(x, gain, eps)
    return y


class _SiluGateKernel(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        y = torch.empty_like(gate)
        ctx.rest = (gate.numel(), torch.get_num_threads())
        library().silu_gate(gate.data_ptr(), up.data_ptr(), y.data_ptr(), *ctx.rest)
        ctx.save_for_backward(gate, up)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad, dgate, dup = grad.contiguous(), torch.empty_like(gate), torch.empty_like(up)
        pointers = [t.data_ptr() for t in (grad, gate, up, dgate, dup)]
        library().silu_gate_backward(*pointers, *ctx.rest)
        return dgate, dup


def silu_gate(gate: Tensor, up: Tensor) -> Tensor:
    """`linear.silu_gate`."""
    if not _served(gate, up):
        return linear.silu_gate(gate, up)
    y: Tensor = _SiluGateKernel.apply(gate, up)
    return y


class _Rotate(Function):
    """x [heads, T, D] -> [T, heads, D]: a view made in here could not be edited in place (`linear.by_rows`)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _rotated(grad.transpose(0, 1), *ctx.saved_tensors, back=True).transpose(0, 1), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    """x [heads, T, D] -> [T, heads, D]"""
    x = _by_token(x)
    heads, T, D = x.shape
    y = x.new_empty(T, heads, D)
    rest = (heads, T, D, back, torch.get_num_threads())
    library().rotate(_heads(x), cos.data_ptr(), sin.data_ptr(), _heads(y.transpose(0, 1)), *rest)
    return y


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """`linear.by_halves` for q [1, H, T, D], k [1, G, T, D], cos and sin [1, T, D]."""
    one_row = unsqueeze_dim == 1 and q.dim() == 4 and len(q) == 1 and cos.dim() == 3 and len(cos) == 1
    if not one_row or q.shape[-1] % (2 * LANES) or cos.shape[-1] != q.shape[-1] or not _served(q, k, cos, sin):
        return linear.by_halves(q, k, cos, sin, unsqueeze_dim)
    cos, sin = cos[0].contiguous(), sin[0].contiguous()
    q, k = (_Rotate.apply(t[0], cos, sin).transpose(0, 1)[None] for t in (q, k))
    return q, k


def _served(*tensors: Tensor) -> bool:
    return all(serves(t.device, t.dtype) and t.shape[-1] % LANES == 0 for t in tensors)
