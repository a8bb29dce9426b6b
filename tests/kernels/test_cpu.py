"""The kernels for a processor against the equations in their file, in float64: outputs and all gradients."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftlm.data.batches.pack import Example, collate
from graftlm.deltas.lora import LoraConfig
from graftlm.kernels import cpu, linear
from graftlm.kernels.attention import AttentionRule, SegmentLayout, tiled_attention
from graftlm.kernels.backend import OURS, TORCH
from graftlm.model.attach import attach
from graftlm.model.registry import trainable
from graftlm.passes.forward import log_probs
from graftlm.passes.packed_attention import packed_attention, segment_attention
from graftlm.passes.packing_check import check_packed_rows
from graftlm.testing import tiny_model
from tests.errors import raises
from tests.kernels.equations import assert_small_increments_stay, attention_by_mask, normal, seen_in_a_tree
from tests.peers import relative_error

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or sys.platform != "linux", reason="kernels are built by a C++ compiler, on Linux"
)

ROUNDING = 2 * torch.finfo(torch.bfloat16).eps


@pytest.fixture(params=["this processor", "any processor"])
def built(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels as they are built here, and as they would be without products of bfloat16 pairs."""
    if request.param == "any processor":
        monkeypatch.setattr(cpu, "FLAGS", tuple(flag for flag in cpu.FLAGS if flag != "-march=native"))


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def same(
    ours: Callable[..., Any], plain: Callable[..., Any], inputs: list[Tensor], tolerance: float = ROUNDING
) -> None:
    """Outputs and gradients of all inputs; `plain` is given the same numbers in float64."""
    results = []
    for function, dtype in ((ours, None), (plain, torch.float64)):
        leaves = [t.detach().to(dtype or t.dtype).clone().requires_grad_(t.requires_grad) for t in inputs]
        out = function(*leaves)
        outs = list(out) if isinstance(out, tuple) else [out]
        torch.autograd.backward(
            outs, [normal(*o.shape, seed=99 + n, dtype=torch.bfloat16).to(o.dtype) for n, o in enumerate(outs)]
        )
        results.append([*outs, *(leaf.grad for leaf in leaves if leaf.requires_grad)])
    for number, (a, b) in enumerate(zip(*results, strict=True)):
        assert a is not None
        if not b.any():
            assert float(a.abs().max()) <= 1e-6, number
        else:
            assert relative_error(a, b) <= tolerance, f"number {number} of outputs and gradients"


def half(*shape: int, seed: int, learns: bool = True) -> Tensor:
    return normal(*shape, seed=seed, dtype=torch.bfloat16).requires_grad_(learns)


# Attention -----------------------------------------------------------------------------------------------------------

TREES = {
    "rows": ([9, 1, 50, 17, 130], None),
    "a tree": ([60, 3, 49, 5, 64, 1], [-1, 0, 1, 0, -1, 4]),
    "one token": ([1], None),
}


@pytest.mark.parametrize("D", [16, 64, 80])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("tree", TREES)
def test_attention_is_its_equation(tree: str, heads: tuple[int, int], D: int, threads: int, built: None) -> None:
    lengths, parents = TREES[tree]
    (H, G), T = heads, sum(lengths)
    rule = AttentionRule(SegmentLayout(lengths, parents), 0.3, None, None, 0)
    seen = seen_in_a_tree(lengths, parents or [-1] * len(lengths), None)
    same(
        lambda q, k, v: cpu.attention(q, k, v, rule),
        lambda q, k, v: attention_by_mask(q[None], k[None], v[None], seen, scale=0.3, softcap=None)[0],
        [half(n, T, D, seed=s) for s, n in enumerate((H, G, G))],
    )


def test_keys_before_all_segments_are_seen_by_all() -> None:
    lengths, T = [20, 7], 27
    rule = AttentionRule(SegmentLayout(lengths), 0.3, None, None, 5)
    seen = F.pad(seen_in_a_tree(lengths, [-1, -1], None), (5, 0), value=True)
    same(
        lambda q, k, v: cpu.attention(q, k, v, rule),
        lambda q, k, v: attention_by_mask(q[None], k[None], v[None], seen, scale=0.3, softcap=None)[0],
        [half(4, T, 32, seed=0), half(2, T + 5, 32, seed=1), half(2, T + 5, 32, seed=2)],
    )


def test_heads_may_lie_in_memory_in_any_order() -> None:
    rule = AttentionRule(SegmentLayout([10, 6]), 0.3, None, None, 0)
    q, k, v = (normal(16, n, 32, seed=n, dtype=torch.bfloat16).transpose(0, 1) for n in (4, 2, 2))
    assert torch.equal(cpu.attention(q, k, v, rule), cpu.attention(*(t.contiguous() for t in (q, k, v)), rule))
    across = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    assert torch.equal(cpu.attention(q, k, v, rule), cpu.attention(across[0], across[1], across[2], rule))


def test_rows_may_lie_an_odd_number_apart() -> None:
    rule = AttentionRule(SegmentLayout([10, 6]), 0.3, None, None, 0)
    q, k, v = (normal(16, n, 32, seed=n, dtype=torch.bfloat16).transpose(0, 1) for n in (4, 2, 2))
    apart = [
        F.pad(t.transpose(0, 1).flatten(1), (0, 1))[:, :-1].unflatten(1, (-1, 32)).transpose(0, 1) for t in (q, k, v)
    ]
    assert all(t.stride(1) % 2 for t in apart)
    assert torch.equal(cpu.attention(apart[0], apart[1], apart[2], rule), cpu.attention(q, k, v, rule))


def test_keys_may_be_very_many() -> None:
    rule = AttentionRule(SegmentLayout([3]), 0.3, None, None, 40_000)
    seen = F.pad(torch.ones(3, 3).tril().bool(), (40_000, 0), value=True)
    same(
        lambda q, k, v: cpu.attention(q, k, v, rule),
        lambda q, k, v: attention_by_mask(q[None], k[None], v[None], seen, scale=0.3, softcap=None)[0],
        [half(1, 3, 16, seed=0), half(1, 40_003, 16, seed=1), half(1, 40_003, 16, seed=2)],
    )


FEWER_THREADS = """
import torch
from graftlm.kernels import cpu as kernels
from graftlm.kernels.attention import AttentionRule, SegmentLayout
torch.set_num_threads(2)
generator = torch.Generator().manual_seed(0)
def made(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()
x, A, B, W = made(50, 32), made(16, 32, dtype=torch.float32), made(48, 16, dtype=torch.float32), made(48, 32).detach()
kernels.low_rank_linear(x, W, None, A, B).sum().backward()
q, k, v = made(4, 30, 32), made(2, 30, 32), made(2, 30, 32)
kernels.attention(q, k, v, AttentionRule(SegmentLayout([20, 10]), 0.3, None, None, 0)).sum().backward()
print([float(t.grad.double().abs().sum()) for t in (x, A, B, q, k, v)])
"""


@pytest.mark.slow
def test_fewer_threads_than_were_asked_for_do_all_of_the_work() -> None:
    limited, free = (
        subprocess.run(
            [sys.executable, "-c", FEWER_THREADS], env=os.environ | more, capture_output=True, text=True, check=True
        )
        for more in ({"OMP_THREAD_LIMIT": "1"}, {})
    )
    assert json.loads(limited.stdout) == pytest.approx(json.loads(free.stdout), rel=1e-3)


@pytest.mark.parametrize("settings", [{"sliding_window": 4}, {"softcap": 2.0}, {}], ids=str)
@pytest.mark.parametrize("D", [8, 32])
def test_attention_of_another_kind_is_that_of_ops(settings: dict[str, Any], D: int) -> None:
    q, k, v = (normal(1, n, 20, D, seed=n, dtype=torch.bfloat16) for n in (4, 2, 2))
    found, wanted = (
        segment_attention(nn.Module(), q, k, v, layout=SegmentLayout([13, 7]), attend=attend, **settings)[0]
        for attend in (cpu.attention, tiled_attention)
    )
    assert relative_error(found, wanted) <= ROUNDING
    if settings or D == 8:
        assert torch.equal(found, wanted)


def test_large_scores_are_finite_and_what_is_not_stays_in_its_row() -> None:
    rule = AttentionRule(SegmentLayout([8, 8]), 1.0, None, None, 0)
    q, k, v = (normal(2, 16, 32, seed=n, dtype=torch.bfloat16) * 100 for n in range(3))
    assert cpu.attention(q, k, v, rule).isfinite().all()
    for hurt in (q, k, v):
        before = hurt[0, 3, 5].clone()
        hurt[0, 3, 5] = float("nan")
        out = cpu.attention(q, k, v, rule)
        assert out[:8, 0].isnan().any()
        assert out[8:].isfinite().all()
        hurt[0, 3, 5] = before


def test_the_same_threads_give_the_same_bits(threads: int) -> None:
    lengths, parents = TREES["a tree"]
    runs = []
    for _ in range(3):
        q, k, v = (half(n, sum(lengths), 64, seed=n) for n in (6, 3, 3))
        cpu.attention(q, k, v, AttentionRule(SegmentLayout(lengths, parents), 0.1, None, None, 0)).sum().backward()
        runs.append([q.grad, k.grad, v.grad])
    for run in runs[1:]:
        for a, b in zip(run, runs[0], strict=True):
            assert a is not None
            assert b is not None
            assert torch.equal(a, b)


# Frozen linear layers with factors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [1, 16, 24])
@pytest.mark.parametrize(("d_in", "d_out"), [(64, 64), (48, 208), (2080, 16)])
@pytest.mark.parametrize("tokens", [1, 7, 500])
def test_a_low_rank_layer_is_its_equation(
    tokens: int, d_in: int, d_out: int, r: int, threads: int, built: None
) -> None:
    W = half(d_out, d_in, seed=0, learns=False)
    x = half(1, tokens, d_in, seed=1)
    A, B = (normal(*s, seed=2).bfloat16().float().requires_grad_() for s in ((r, d_in), (d_out, r)))
    assert type(cpu.low_rank_linear(x[0], W, None, A, B).grad_fn).__name__ == "_LowRankBackward"
    same(
        lambda x, W, A, B: cpu.low_rank_linear(x, W, None, A, B),
        lambda x, W, A, B: x @ W.T + x @ A.T @ B.T,
        [x, W, A, B],
    )


@pytest.mark.parametrize("frozen", [0, 2, 3])
def test_only_the_gradients_that_are_wanted_are_computed(frozen: int) -> None:
    inputs = [half(5, 32, seed=0), half(48, 32, seed=1, learns=False), normal(16, 32, seed=2), normal(48, 16, seed=3)]
    inputs[2], inputs[3] = (t.bfloat16().float().requires_grad_() for t in inputs[2:])
    inputs[frozen].requires_grad_(False)
    same(
        lambda x, W, A, B: cpu.low_rank_linear(x, W, None, A, B),
        lambda x, W, A, B: x @ W.T + x @ A.T @ B.T,
        inputs,
    )


def test_layers_of_another_kind_are_those_of_ops() -> None:
    x, W = half(5, 32, seed=0), half(48, 32, seed=1, learns=False)
    A, B, b, gain = normal(4, 32, seed=2), normal(48, 4, seed=3), half(48, seed=4, learns=False), normal(48, seed=5)
    across = W.T.contiguous().T
    for arguments in (
        (x, W, b, A, B),
        (x, W, None, A, B, gain),
        (x, across, None, A, B),
        (x, lambda dtype: W, None, A, B),
    ):
        assert torch.equal(cpu.low_rank_linear(*arguments), linear.low_rank_linear(*arguments))  # type: ignore[arg-type]


def test_what_a_young_delta_adds_is_not_lost_beside_what_it_is_added_to() -> None:
    assert_small_increments_stay(cpu.low_rank_linear)


# Passes over memory --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_a_norm_is_its_equation(size: float, threads: int, built: None) -> None:
    gain = half(48, seed=1, learns=False)
    x = (normal(1, 7, 48, seed=0) * size).bfloat16().requires_grad_()
    same(
        lambda x, gain: cpu.rms_norm(x, gain, 1e-6),
        lambda x, gain: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * gain,
        [x, gain],
    )


def test_a_gated_unit_is_its_equation(threads: int, built: None) -> None:
    gate = torch.cat([normal(1, 6, 48, seed=0) * 4, torch.full((1, 1, 48), 1e4), torch.full((1, 1, 48), -1e4)], 1)
    same(
        cpu.silu_gate,
        lambda gate, up: F.silu(gate) * up,
        [gate.bfloat16().requires_grad_(), half(1, 8, 48, seed=1)],
    )


def test_a_rotary_embedding_is_its_equation(threads: int, built: None) -> None:
    cos, sin = (half(1, 9, 32, seed=s, learns=False) for s in (2, 3))
    same(cpu.rotary, linear.by_halves, [half(1, 4, 9, 32, seed=0), half(1, 2, 9, 32, seed=1), cos, sin])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_and_dtypes_without_a_kernel_are_computed_by_ops(dtype: torch.dtype) -> None:
    x, gain, up = (normal(*shape, seed=n, dtype=dtype) for n, shape in enumerate(((3, 20), (20,), (3, 20))))
    assert torch.equal(cpu.rms_norm(x, gain, 1e-6), linear.rms_norm(x, gain, 1e-6))
    assert torch.equal(cpu.silu_gate(x, up), linear.silu_gate(x, up))
    q, k, cos, sin = (normal(*shape, 20, seed=3, dtype=dtype) for shape in ((2, 4, 5), (2, 2, 5), (2, 5), (2, 5)))
    for found, wanted in zip(cpu.rotary(q, k, cos, sin), linear.by_halves(q, k, cos, sin), strict=True):
        assert torch.equal(found, wanted)


# A whole model -------------------------------------------------------------------------------------------------------


def model_in(dtype: torch.dtype, kind: str) -> Any:
    changes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "num_attention_heads": 4}
    model = tiny_model(kind, initializer_range=0.1, num_key_value_heads=2, **changes).to(dtype)
    attach(model, LoraConfig(r=4, alpha=8))
    for number, parameter in enumerate(trainable(model).values()):
        parameter.data.add_(0.1 * normal(*parameter.shape, seed=number))
    return model


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3"])
def test_a_model_in_bf16_is_as_near_to_float32_with_kernels_as_without(kind: str) -> None:
    rows = [torch.randint(3, 300, (n,), generator=torch.Generator().manual_seed(n)) for n in (70, 9, 33)]
    pack = collate([Example(row.int().numpy(), np.arange(len(row), dtype=np.float32), "") for row in rows])
    found = []
    for dtype, backend in ((torch.float32, TORCH), (torch.bfloat16, TORCH), (torch.bfloat16, OURS)):
        model = model_in(dtype, kind)
        with packed_attention(model, backend):
            made = log_probs(model, pack)
            made.mean().backward()
        gradient = torch.cat([p.grad.flatten() for p in trainable(model).values() if p.grad is not None])
        found.append((made.detach(), gradient))
        check_packed_rows(model, rows[1], rows[0], sharing=True, backend=backend)
    truth, plain, fast = found
    for right, without, with_kernels in zip(truth, plain, fast, strict=True):
        assert relative_error(with_kernels, right) <= 1.3 * relative_error(without, right)


# Building ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of an empty cache in which libraries are stored."""
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    cpu._library.cache_clear()
    yield tmp_path / "cache" / "kernels"
    cpu._library.cache_clear()


def built_again(folder: Path) -> list[Path]:
    """The stored libraries after this process has forgotten its own and asked for it again."""
    cpu._library.cache_clear()
    assert cpu.library().rms_norm is not None
    return sorted(folder.iterdir())


@pytest.mark.slow
def test_kernels_are_built_once_and_anew_where_the_source_is_another(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first,) = built_again(cache)
    stamp = first.stat().st_mtime_ns
    assert [path.stat().st_mtime_ns for path in built_again(cache)] == [stamp]
    changed = tmp_path / "changed.cpp"
    changed.write_text(cpu.SOURCE.read_text() + "// another\n")
    monkeypatch.setattr(cpu, "SOURCE", changed)
    assert len(built_again(cache)) == 2


@pytest.mark.slow
def test_a_library_with_other_content_than_its_name_says_is_not_loaded(cache: Path) -> None:
    (stored,) = built_again(cache)
    right = stored.read_bytes()
    for damaged in (right[:-100], b"", right.replace(b"rms_norm", b"rms_morn")):
        stored.write_bytes(damaged)
        assert [path.read_bytes() for path in built_again(cache)] == [right]


@pytest.mark.slow
@pytest.mark.parametrize("who", ["the group may write", "all may write", "another user"])
def test_a_library_that_another_user_can_have_written_is_not_loaded(who: str, cache: Path) -> None:
    (stored,) = built_again(cache)
    name = stored.name.partition(".")[0]
    theirs = b"not a library"
    planted = cache / f"{name}.{cpu._digest(theirs)}.so"
    planted.write_bytes(theirs)
    stored.unlink()
    if who == "another user":
        if os.geteuid() != 0:
            pytest.skip("only root can give a file to another user")
        os.chown(planted, 12345, 12345)
    else:
        planted.chmod(0o664 if who == "the group may write" else 0o646)
    assert stored in built_again(cache)


def test_a_library_is_loaded_where_the_cache_forbids_to_execute(cache: Path) -> None:
    cache.parent.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "noexec", "graftlm-test", cache.parent], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("this user cannot mount a folder")
    try:
        (stored,) = built_again(cache)
        assert stored.is_file()
    finally:
        subprocess.run(["umount", cache.parent], check=True)


@pytest.mark.slow
def test_where_nothing_can_be_stored_kernels_are_built_for_the_process_alone(cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    assert cpu.library().rms_norm is not None
    assert cache.is_file()


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


BROKEN = {
    "no compiler": ("", "no C++ compiler"),
    "a compiler that fails": (
        "echo 'fatal error: killed' >&2; exit 1",
        "cannot build cpu.cpp: fatal error: killed",
    ),
    "a compiler that writes nothing": ("exit 0", "cannot build cpu.cpp: exit code 0"),
    "no libgomp": (
        'case "$*" in *-fopenmp*-o*) echo "/usr/bin/ld: error: cannot find -lgomp" >&2; exit 1;; esac; exec g++ "$@"',
        "cannot find -lgomp",
    ),
    "clang without OpenMP": (
        'case "$*" in *-o*) echo "cpu.cpp:1:10: fatal error: \'omp.h\' file not found" >&2; exit 1;; esac',
        "'omp.h' file not found",
    ),
    "a library that cannot be loaded": (
        'for last; do :; done; case "$*" in *-o*) echo garbage > "$last";; esac',
        "cannot be loaded",
    ),
}
"""What CXX runs, and what is said of it."""


@pytest.mark.parametrize("name", BROKEN)
def test_a_build_that_fails_is_a_reason_and_leaves_nothing(
    name: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, reason = BROKEN[name]
    monkeypatch.setenv("CXX", script(tmp_path / "compiler", text) if text else "no-such-compiler")
    assert reason in cpu.unavailable(torch.device("cpu"), torch.bfloat16)
    with raises("training/kernels-unavailable", match=re.escape(reason)):
        cpu.library()
    assert not cache.is_dir() or not list(cache.iterdir())


@pytest.mark.slow
def test_a_compiler_may_be_several_words(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ccache = script(tmp_path / "ccache", f'echo "$@" >> {tmp_path}/calls; exec "$@"')
    monkeypatch.setenv("CXX", f"{ccache} g++")
    assert built_again(cache)
    assert "g++ -O3" in (tmp_path / "calls").read_text()


def test_the_first_compiler_that_is_installed_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for installed in ([], ["clang++"], ["clang++", "g++"]):
        for program in installed:
            script(tmp_path / program, "")
        wanted = str(tmp_path / installed[-1]) if installed else None
        monkeypatch.delenv("CXX", raising=False)
        assert cpu.compiler() == (None if wanted is None else (wanted,))
    monkeypatch.setenv("CXX", "clang++ -v")
    assert cpu.compiler() == (str(tmp_path / "clang++"), "-v")
    monkeypatch.setenv("CXX", "icpx")
    assert cpu.compiler() is None, "another one than was asked for is not taken"


@pytest.mark.slow
def test_torch_compile_is_imported_by_nobody_who_does_not_ask_for_it() -> None:
    code = (
        "import sys, torch\n"
        "from graftlm.passes.autotune import choose\n"
        "from graftlm.passes.packed_attention import packed_attention\n"
        "from graftlm.testing import tiny_model\n"
        "model = tiny_model('gpt_neox').bfloat16()\n"
        "with packed_attention(model, choose(model, []).backend(model.device, model.dtype)): pass\n"
        "print('torch._inductor.compile_fx' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
