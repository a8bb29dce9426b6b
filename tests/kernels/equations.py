"""What several tests of the kernels compare with: plain equations, by autograd."""

from collections.abc import Callable

import torch
from torch import Tensor

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
    share = float((found * added).sum() / added.square().sum())
    assert abs(share - 1) <= 0.1, f"{share:.2f} of what was added is there"


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
