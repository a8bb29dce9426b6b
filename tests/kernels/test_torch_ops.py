"""Each hand-written operation against the plain equation in its docstring: outputs and all gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from graftlm.errors import TrainingError
from graftlm.kernels import torch_ops
from graftlm.kernels.torch_ops import (
    Comparison,
    Plan,
    Readings,
    head_log_probs,
    head_readings,
    linear_log_probs,
    linear_readings,
    low_rank_linear,
    rms_norm,
    segment_attention,
    silu_gate,
)
from tests.peers import relative_error


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def same(
    ours: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: list[Tensor], *, tolerance: float = 1e-5
) -> None:
    """Outputs and the gradient of every input are equal; the upstream gradient is random, so nothing can cancel."""
    results = []
    for function in (ours, plain):
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        out = function(*leaves)
        out.backward(normal(*out.shape, seed=99, dtype=out.dtype))
        results.append([out, *(leaf.grad for leaf in leaves)])
    for number, (a, b) in enumerate(zip(*results, strict=True)):
        assert a is not None, f"input {number - 1} got no gradient"
        assert b is not None
        assert a.dtype == b.dtype
        if not b.any():  # where nothing can be learnt, nothing may be learnt
            assert not a.any(), f"gradient of input {number - 1}"
            continue
        assert relative_error(a, b) <= tolerance, "output" if number == 0 else f"gradient of input {number - 1}"


def assert_small_increments_stay(linear: Callable[..., Tensor]) -> None:
    """What is added is a tenth of the rounding of y: rounded one by one all outputs would stay where they were, but
    rounded together a tenth of them moves."""
    x, W, A = (normal(*shape, seed=n, dtype=torch.bfloat16) for n, shape in enumerate(((300, 64), (512, 64), (16, 64))))
    u = x.double() @ A.double().T
    B = normal(512, 16, seed=4).mul_(2e-4)
    y = x.double() @ W.double().T
    added = u @ B.bfloat16().double().T
    assert float((added.abs() / y.abs()).median()) <= 0.2 * torch.finfo(torch.bfloat16).eps
    found = linear(x, W, None, A.float(), B).double() - y
    kept = float((found * added).sum() / added.square().sum())
    assert abs(kept - 1) <= 0.1, f"{kept:.2f} of what was added is there"


# Low-rank linear -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (2, 5), (2, 3, 4), ()])
def test_low_rank_linear_is_its_equation(shape: tuple[int, ...], bias: bool) -> None:
    W, b = normal(10, 6, seed=0), normal(10, seed=1) if bias else None
    x, A, B = normal(*shape, 6, seed=2), normal(3, 6, seed=3), normal(10, 3, seed=4)
    same(
        lambda x, A, B: low_rank_linear(x, W, b, A, B),
        lambda x, A, B: F.linear(x, W, b) + x @ A.T @ B.T,
        [x, A, B],
    )


def test_low_rank_linear_takes_a_transposed_weight_and_rows_that_are_not_contiguous() -> None:
    W, A, B = normal(6, 10, seed=0).T, normal(3, 6, seed=3), normal(10, 3, seed=4)
    same(
        lambda x, A, B: low_rank_linear(x.transpose(0, 1), W, None, A, B),
        lambda x, A, B: x.transpose(0, 1) @ W.T + x.transpose(0, 1) @ A.T @ B.T,
        [normal(4, 5, 6, seed=2), A, B],
    )


def test_low_rank_linear_of_the_first_layer_needs_no_gradient_of_x() -> None:
    x, W = normal(5, 6, seed=2), normal(10, 6, seed=0)
    same(
        lambda A, B: low_rank_linear(x, W, None, A, B),
        lambda A, B: x @ W.T + x @ A.T @ B.T,
        [normal(3, 6, seed=3), normal(10, 3, seed=4)],
    )
    assert x.grad is None


def test_low_rank_linear_keeps_x_only_where_A_learns() -> None:
    W, A, B = normal(10, 6, seed=0), normal(3, 6, seed=3), normal(10, 3, seed=4)
    same(
        lambda x, B: low_rank_linear(x, W, None, A, B),
        lambda x, B: x @ W.T + x @ A.T @ B.T,
        [normal(5, 6, seed=2), B],
    )
    for learns in (True, False):
        y = low_rank_linear(normal(5, 6, seed=2), W, None, A.requires_grad_(learns), B.requires_grad_())
        node = y.grad_fn.next_functions[0][0] if not hasattr(y.grad_fn, "saved_tensors") else y.grad_fn
        assert any(t is not None and t.shape == (5, 6) for t in node.saved_tensors) is learns


def test_low_rank_linear_gives_no_gradient_to_the_frozen_weight_and_changes_no_argument() -> None:
    arguments = [
        normal(5, 6, seed=2),
        normal(10, 6, seed=0),
        normal(10, seed=1),
        normal(3, 6, seed=3),
        normal(10, 3, seed=4),
    ]
    before = [t.clone() for t in arguments]
    for number in (0, 3, 4):
        arguments[number].requires_grad_()
    low_rank_linear(*arguments).sum().backward()
    assert all(torch.equal(a.detach(), b) for a, b in zip(arguments, before, strict=True))
    assert arguments[1].grad is None
    assert arguments[2].grad is None


FROZEN = normal(10, 6, seed=0), normal(10, seed=1)


def with_gain(x: Tensor, A: Tensor, B: Tensor, gain: Tensor) -> Tensor:
    return low_rank_linear(x, *FROZEN, A, B, gain)


def plainly_with_gain(x: Tensor, A: Tensor, B: Tensor, gain: Tensor) -> Tensor:
    W, b = FROZEN
    return gain * (x @ W.T + x @ A.T @ B.T) + b


ARGUMENTS = [(4, 6), (3, 6), (10, 3), (10,)]


def test_low_rank_linear_is_the_same_when_it_is_computed_again_for_the_backward_pass() -> None:
    same(
        lambda *args: checkpoint(with_gain, *args, use_reentrant=False),
        plainly_with_gain,
        [normal(*shape, seed=n + 2) for n, shape in enumerate(ARGUMENTS)],
    )


def test_low_rank_linear_is_the_same_when_it_is_compiled() -> None:
    same(
        torch.compile(with_gain, backend="aot_eager", fullgraph=True),
        plainly_with_gain,
        [normal(*shape, seed=n + 2) for n, shape in enumerate(ARGUMENTS)],
    )


def test_low_rank_linear_under_autocast_has_the_dtype_asked_for_and_float32_gradients() -> None:
    inputs = [normal(*shape, seed=n + 2).requires_grad_() for n, shape in enumerate(ARGUMENTS)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = with_gain(*inputs)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    found = [t.grad.clone() for t in inputs if t.grad is not None]
    plain = [t.detach().requires_grad_() for t in inputs]
    wanted = plainly_with_gain(*plain)
    wanted.sum().backward()
    assert relative_error(out.float(), wanted) <= 2**-6
    for ours, t in zip(found, plain, strict=True):
        assert ours.dtype == torch.float32
        assert t.grad is not None
        assert relative_error(ours, t.grad) <= 2**-5


def test_low_rank_linear_in_bf16_keeps_float32_gradients_for_the_factors() -> None:
    x, W = normal(50, 6, seed=2), normal(10, 6, seed=0)
    factors = [normal(3, 6, seed=3).requires_grad_(), normal(10, 3, seed=4).requires_grad_()]
    out = low_rank_linear(x.bfloat16(), W.bfloat16(), None, *factors)
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    A, B = (f.detach() for f in factors)
    # bf16 has 8 bits of mantissa: one part in 2**8 for each of the few roundings on the way
    assert relative_error(out.float(), x @ W.T + x @ A.T @ B.T) <= 2**-6
    for factor, wanted in zip(factors, (B.sum(0)[:, None] * x.sum(0), (x @ A.T).sum(0).expand(10, 3)), strict=True):
        assert factor.grad is not None
        assert factor.grad.dtype == torch.float32
        assert relative_error(factor.grad, wanted) <= 2**-5


# Root-mean-square norm -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e3])
@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8), (1, 4, 3, 8)])
def test_rms_norm_is_its_equation(shape: tuple[int, ...], size: float) -> None:
    gain = normal(8, seed=1)
    same(
        lambda x: rms_norm(x, gain, 1e-6),
        lambda x: x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * gain,
        [size * normal(*shape, seed=0)],
    )


@pytest.mark.parametrize("at_once", [1, 40, 10_000])
@pytest.mark.parametrize("shape", [(3, 8), (2, 5, 8), (8,)])
def test_element_wise_work_in_pieces_is_its_equation(
    shape: tuple[int, ...], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_ops, "ELEMENTS_AT_ONCE", at_once)
    same(silu_gate, lambda gate, up: gate * gate.sigmoid() * up, [normal(*shape, seed=0), normal(*shape, seed=2)])


def test_rms_norm_of_zeros_is_zero_with_a_finite_gradient() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    rms_norm(x, torch.ones(8), 1e-6).sum().backward()
    assert x.grad is not None
    assert relative_error(x.grad, torch.full((2, 8), 1e3)) <= 1e-5  # 1 / sqrt(eps)


@pytest.mark.parametrize("gain", [None, torch.ones(512)])
def test_what_a_young_delta_adds_is_not_lost_beside_what_it_is_added_to(gain: Tensor | None) -> None:
    assert_small_increments_stay(lambda *given: low_rank_linear(*given, gain))


# Attention over segments -----------------------------------------------------------------------------------------


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], *, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """One full [T, T] matrix with a block-diagonal causal mask, by autograd."""
    total, groups = sum(lengths), q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position = torch.arange(total)
    distance = position[:, None] - position[None, :]
    seen = (segment[:, None] == segment[None, :]) & (distance >= 0)
    if window is not None:
        seen &= distance < window
    scores = q @ k.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v).transpose(1, 2)


SETTINGS: dict[str, dict[str, Any]] = {
    "stock": {},
    "own scale": {"scaling": 0.31},
    "window": {"sliding_window": 4},
    "window of one": {"sliding_window": 1},
    "window wider than all": {"sliding_window": 100},
    "softcap": {"softcap": 2.0},
    "window and softcap": {"sliding_window": 3, "softcap": 5.0, "scaling": 0.5},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("lengths", [[9], [5, 1, 7, 7, 1], [1], [1, 1, 1]], ids=str)
def test_segment_attention_is_a_block_diagonal_causal_mask(
    lengths: list[int], heads: tuple[int, int], settings: dict[str, Any]
) -> None:
    H, G = heads
    total, D = sum(lengths), 8
    inputs = [normal(1, h, total, D, seed=s) for s, h in enumerate((H, G, G))]
    same(
        lambda q, k, v: segment_attention(nn.Module(), q, k, v, plan=Plan(lengths), **settings)[0],
        lambda q, k, v: plain_attention(
            q,
            k,
            v,
            lengths,
            scale=settings.get("scaling", D**-0.5),
            window=settings.get("sliding_window"),
            softcap=settings.get("softcap"),
        ),
        inputs,
    )


TREE = ([6, 3, 2, 5, 4], [-1, 0, 1, 0, -1])
"""Segments and their parents: a row of 6, continued in three ways, and a row by itself."""


def seen_in_a_tree(lengths: list[int], parents: list[int], window: int | None) -> Tensor:
    """[T, T], by walking up from each query to the beginning of its row."""
    starts = [sum(lengths[:n]) for n in range(len(lengths))]
    seen = torch.zeros(sum(lengths), sum(lengths), dtype=torch.bool)
    for segment, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        for query in range(start, start + length):
            row, at = list(range(start, query + 1)), parents[segment]
            while at >= 0:
                row = [*range(starts[at], starts[at] + lengths[at]), *row]
                at = parents[at]
            seen[query, row[-(window or len(row)) :]] = True
    return seen


def attention_by_mask(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, *, scale: float, softcap: float | None) -> Tensor:
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = q @ k.transpose(2, 3) * scale
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    return (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v).transpose(1, 2)


KERNELS = [
    (kernel, name)
    for kernel in ("tiles", "stock")
    for name in SETTINGS
    if (kernel, name) != ("stock", "window of one")  # the query's gradient is zero: torch's kernel leaves rounding
]


@pytest.mark.parametrize("limits", [(128, 256), (3, 256), (3, 4), (100, 0)], ids=str)
@pytest.mark.parametrize(("kernel", "name"), KERNELS)
def test_a_segment_sees_itself_and_the_segments_that_it_continues(
    limits: tuple[int, int], kernel: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SETTINGS[name]
    monkeypatch.setattr(torch_ops, "QUERIES_AT_ONCE", limits[0])
    monkeypatch.setattr(torch_ops, "KEPT_KEYS", limits[1])
    if kernel == "stock":
        monkeypatch.setattr(torch_ops._TiledAttention, "apply", torch_ops._stock_attention)
    seen = seen_in_a_tree(*TREE, settings.get("sliding_window"))
    same(
        lambda q, k, v: segment_attention(nn.Module(), q, k, v, plan=Plan(*TREE), **settings)[0],
        lambda q, k, v: attention_by_mask(
            q, k, v, seen, scale=settings.get("scaling", 8**-0.5), softcap=settings.get("softcap")
        ),
        [normal(1, h, sum(TREE[0]), 8, seed=s) for s, h in enumerate((4, 2, 2))],
    )


def test_values_may_be_narrower_than_keys() -> None:
    lengths = [3, 6]
    same(
        lambda q, k, v: segment_attention(nn.Module(), q, k, v, plan=Plan(lengths))[0],
        lambda q, k, v: plain_attention(q, k, v, lengths, scale=8**-0.5, window=None, softcap=None),
        [normal(1, 4, 9, 8, seed=0), normal(1, 2, 9, 8, seed=1), normal(1, 2, 9, 5, seed=2)],
    )


def test_nothing_of_one_segment_reaches_another() -> None:
    q, k, v = (normal(1, 2, 10, 8, seed=s) for s in range(3))
    before = segment_attention(nn.Module(), q, k, v, plan=Plan([4, 6]))[0]
    for tensor in (q, k, v):
        tensor[:, :, 4:] = 100.0
    after = segment_attention(nn.Module(), q, k, v, plan=Plan([4, 6]))[0]
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.equal(before[:, 4:], after[:, 4:])


@pytest.mark.parametrize("keys", [1, 60, 64, 95, 256, 257])
def test_bf16_probabilities_of_any_number_of_keys_are_rounded_once(keys: int) -> None:
    scores = (4 * normal(2, 6, keys, seed=0)).bfloat16()
    found, wanted = torch_ops._softmax(scores), scores.double().softmax(-1)
    assert found.dtype == torch.bfloat16
    assert float(((found.double() - wanted).abs() / wanted).max()) <= 0.501 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("kernel", ["tiles", "stock"])
@pytest.mark.parametrize("settings", [{}, {"sliding_window": 3}, {"scaling": 0.3}], ids=str)
@pytest.mark.parametrize("lengths", [[9], [5, 1, 7]], ids=str)
def test_a_sink_takes_a_share_of_each_querys_probability_and_gives_nothing(
    lengths: list[int], settings: dict[str, Any], kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """softmax over the scores and one more of each head, of which the last column is left out; gradients of all."""
    if kernel == "stock":
        monkeypatch.setattr(torch_ops._TiledAttention, "apply", torch_ops._stock_attention)
    total, scale = sum(lengths), settings.get("scaling", 8**-0.5)
    seen = seen_in_a_tree(lengths, [-1] * len(lengths), settings.get("sliding_window"))

    def plain(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
        scores = (q @ k.transpose(2, 3) * scale).masked_fill(~seen, float("-inf"))
        scores = torch.cat([scores, sinks.view(1, 4, 1, 1).expand(1, 4, total, 1)], -1)
        return (scores.softmax(-1)[..., :-1] @ v).transpose(1, 2)

    same(
        lambda q, k, v, sinks: segment_attention(nn.Module(), q, k, v, plan=Plan(lengths), s_aux=sinks, **settings)[0],
        plain,
        [*(normal(1, h, total, 8, seed=s) for s, h in enumerate((4, 2, 2))), normal(4, seed=9)],
    )


def test_attention_without_a_plan_says_how_to_call_the_model() -> None:
    q, k, v = (normal(1, 2, 4, 8, seed=s) for s in range(3))
    with pytest.raises(TrainingError, match=r"Linear: inside packed_attention .*recomputed_layers"):
        segment_attention(nn.Linear(1, 1), q, k, v)


@pytest.mark.parametrize("extra", [{"s_aux": torch.zeros(2), "softcap": 2.0}, {"position_bias": torch.zeros(1)}])
def test_attention_that_is_not_computed_here_is_refused(extra: dict[str, Any]) -> None:
    q, k, v = (normal(1, 2, 4, 8, seed=s) for s in range(3))
    with pytest.raises(NotImplementedError, match="Linear"):
        segment_attention(nn.Linear(1, 1), q, k, v, plan=Plan([4]), **extra)


# The head --------------------------------------------------------------------------------------------------------


def chunked(monkeypatch: pytest.MonkeyPatch, rows: int | None, vocabulary: int) -> None:
    """Let `rows` rows be one chunk of logits."""
    for name in ("LOGITS_AT_ONCE", "SOFTMAX_AT_ONCE"):
        if rows is not None and hasattr(torch_ops, name):
            monkeypatch.setattr(torch_ops, name, rows * vocabulary)


def plain_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("rows", [None, 1, 3, 4, 11])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_log_probs_is_log_softmax_in_chunks_of_any_size(
    rows: int | None, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunked(monkeypatch, rows, 50)
    W, b = normal(50, 6, seed=0), normal(50, seed=1) if bias else None
    targets = torch.randint(50, (11,), generator=torch.Generator().manual_seed(2))
    same(
        lambda h: linear_log_probs(h, W, b, targets),
        lambda h: plain_log_probs(F.linear(h, W, b), targets),
        [normal(11, 6, seed=3)],
    )


@pytest.mark.parametrize("rows", [None, 1, 3])
def test_soft_capped_logits_are_capped_in_the_loss_and_in_its_gradient(
    rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunked(monkeypatch, rows, 50)
    W, targets = normal(50, 6, seed=0), torch.randint(50, (11,), generator=torch.Generator().manual_seed(2))
    same(
        lambda h: linear_log_probs(h, W, None, targets, 1.5),
        lambda h: plain_log_probs(1.5 * torch.tanh(h @ W.T / 1.5), targets),
        [normal(11, 6, seed=3)],
    )


def test_a_vocabulary_wider_than_a_chunk_still_goes_one_row_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_ops, "LOGITS_AT_ONCE", 7)
    W, targets = normal(50, 6, seed=0), torch.tensor([0, 49, 7])
    same(
        lambda h: linear_log_probs(h, W, None, targets),
        lambda h: plain_log_probs(h @ W.T, targets),
        [normal(3, 6, seed=3)],
    )


def test_log_probs_of_large_logits_are_finite_and_right() -> None:
    W, targets = 300 * normal(50, 6, seed=0), torch.tensor([0, 49, 7])
    hidden = normal(3, 6, seed=3)
    wanted = plain_log_probs(hidden.double() @ W.double().T, targets)
    assert relative_error(linear_log_probs(hidden, W, None, targets).double(), wanted) <= 1e-5


def test_linear_log_probs_in_bf16_are_float32_and_change_neither_hidden_nor_head() -> None:
    W, hidden = normal(50, 6, seed=0).bfloat16(), normal(9, 6, seed=3).bfloat16()
    before = W.clone(), hidden.clone()
    targets = torch.randint(50, (9,), generator=torch.Generator().manual_seed(2))
    found = linear_log_probs(hidden, W, None, targets)
    assert found.dtype == torch.float32
    wanted = plain_log_probs(hidden.float() @ W.float().T, targets)
    assert relative_error(found, wanted) <= 2**-6  # logits are rounded to bf16
    assert torch.equal(W, before[0])
    assert torch.equal(hidden, before[1])


def test_no_rows_at_all_give_no_log_probs() -> None:
    assert linear_log_probs(torch.zeros(0, 6), torch.zeros(50, 6), None, torch.zeros(0, dtype=torch.long)).shape == (0,)


@pytest.mark.parametrize("rows", [None, 1, 3, 11])
def test_head_log_probs_gives_gradients_to_the_hidden_states_and_to_what_the_head_learns(
    rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunked(monkeypatch, rows, 50)
    targets = torch.randint(50, (11,), generator=torch.Generator().manual_seed(2))

    def logits(h: Tensor, W: Tensor) -> Tensor:
        return 3 * torch.tanh(h @ W.T / 3)

    same(
        lambda h, W: head_log_probs(lambda x: logits(x, W), h, targets, 50),
        lambda h, W: plain_log_probs(logits(h, W), targets),
        [normal(11, 6, seed=3), normal(50, 6, seed=0)],
    )


def apart(z: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Half the squared distance of logits from others, and its gradient."""
    return (z - other).square().sum(-1) / 2, z - other


def others(count: int, *, seed: int) -> tuple[Tensor, Comparison]:
    z = normal(count, 50, seed=seed)
    return z, Comparison(lambda rows: z[rows], apart)


def stacked(read: Readings) -> Tensor:
    assert read.means is not None
    return torch.stack([read.log_probs, read.normalisers, *read.distances, read.means])


def plain_readings(z: Tensor, targets: Tensor, *compared: Tensor) -> Tensor:
    distances = [(z - other).square().sum(-1) / 2 for other in compared]
    return torch.stack([plain_log_probs(z, targets), z.logsumexp(-1), *distances, z.mean(-1)])


@pytest.mark.parametrize("rows", [None, 1, 3, 4, 11])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("bias", [True, False])
def test_readings_of_a_linear_head_are_those_of_its_whole_logits(
    rows: int | None, softcap: float | None, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunked(monkeypatch, rows, 50)
    if rows == 4:
        monkeypatch.setattr(torch_ops, "SOFTMAX_AT_ONCE", 3 * 50)  # which divides neither the chunk nor the rows
    W, b = normal(50, 6, seed=0), normal(50, seed=1) if bias else None
    targets = torch.randint(50, (11,), generator=torch.Generator().manual_seed(2))
    (one, first), (two, second) = others(11, seed=4), others(11, seed=5)

    def whole(h: Tensor) -> Tensor:
        z = F.linear(h, W, b)
        return plain_readings(z if softcap is None else softcap * torch.tanh(z / softcap), targets, one, two)

    same(
        lambda h: stacked(linear_readings(h, W, b, targets, softcap, [first, second], with_means=True)),
        whole,
        [normal(11, 6, seed=3)],
    )


@pytest.mark.parametrize("rows", [None, 1, 3, 11])
def test_readings_of_any_head_give_gradients_to_what_it_learns(
    rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunked(monkeypatch, rows, 50)
    targets = torch.randint(50, (11,), generator=torch.Generator().manual_seed(2))
    one, first = others(11, seed=4)

    def logits(h: Tensor, W: Tensor) -> Tensor:
        return 3 * torch.tanh(h @ W.T / 3)

    same(
        lambda h, W: stacked(head_readings(lambda x: logits(x, W), h, targets, 50, [first], with_means=True)),
        lambda h, W: plain_readings(logits(h, W), targets, one),
        [normal(11, 6, seed=3), normal(50, 6, seed=0)],
    )


def test_readings_of_no_rows_at_all_are_none() -> None:
    W, nothing = normal(50, 6, seed=0), torch.zeros(0, dtype=torch.long)
    _, none = others(0, seed=4)
    for made in (
        linear_readings(torch.zeros(0, 6, requires_grad=True), W, None, nothing, None, [none]),
        head_readings(lambda h: h @ W.T, torch.zeros(0, 6, requires_grad=True), nothing, 50, [none]),
    ):
        assert made.log_probs.shape == made.normalisers.shape == made.distances[0].shape == (0,)
        assert made.means is None
        (made.log_probs.sum() + made.distances[0].sum()).backward()


@pytest.mark.parametrize("linear", [True, False], ids=["linear", "any"])
def test_no_logits_of_all_rows_are_kept_for_the_backward_pass(linear: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor are there ever those of more than one chunk."""
    chunked(monkeypatch, 4, 50)
    W, hidden = normal(50, 6, seed=0), normal(40, 6, seed=3).requires_grad_()
    targets, asked, kept = torch.zeros(40, dtype=torch.long), [], []

    def other(rows: slice) -> Tensor:
        asked.append(rows.stop - rows.start)
        return normal(len(hidden[rows]), 50, seed=5)

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if linear:
            made = linear_readings(hidden, W, None, targets, None, [Comparison(other, apart)])
        else:
            made = head_readings(lambda h: h @ W.T, hidden, targets, 50, [Comparison(other, apart)])
    assert set(asked) == {4}
    assert kept
    assert all(tensor.shape[-1:] != (50,) for tensor in kept)
    made.distances[0].sum().backward()


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "recomputed"])
def test_short_attention_passes_gradcheck_in_float64(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kept:
        monkeypatch.setattr(torch_ops, "KEPT_KEYS", 0)
    inputs = [normal(1, h, 6, 4, seed=s, dtype=torch.float64).requires_grad_() for s, h in enumerate((4, 2, 2))]
    assert torch.autograd.gradcheck(
        lambda q, k, v: segment_attention(nn.Module(), q, k, v, plan=Plan([3, 1, 2], [-1, 0, 1]))[0], inputs
    )
