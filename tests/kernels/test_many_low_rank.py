"""Low-rank changes of many adapters in one operation, against the equation in float64."""

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from graftlm.kernels import many_low_rank
from graftlm.kernels.many_low_rank import LONG, Bounds, Change, Changes, ManyLowRank, by_columns

TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 5e-3}


def exact(spans: Sequence[Sequence[Change]], x: Tensor, bounds: Bounds, d_out: int) -> Tensor:
    y = torch.zeros(len(x), d_out, dtype=torch.float64)
    for changes, (start, stop) in zip(spans, bounds.spans, strict=True):
        for A, B, share in changes:
            y[start:stop] += share * (x[start:stop].double() @ A.double().T @ B.double().T)
    return y


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-9))


def some_spans(chance: random.Random, d_in: int, d_out: int, dtype: torch.dtype) -> tuple[list[list[Change]], Bounds]:
    """Spans of 1 to LONG + 20 tokens with 0 to 3 changes of ranks 1 to 40 each; some changes stand in several."""

    def change() -> Change:
        r = chance.randint(1, 40)
        return Change(torch.randn(r, d_in).to(dtype), torch.randn(d_out, r).to(dtype), chance.choice([1.0, 0.5, -2.0]))

    known = [change() for _ in range(5)]
    spans = [chance.choices(known, k=chance.choice([0, 1, 1, 2, 3])) for _ in range(chance.randint(1, 8))]
    bounds, end = [], 0
    for _ in spans:
        bounds.append((end, end := end + chance.choice([1, 1, 1, 3, LONG, LONG + 20])))
    return spans, Bounds(bounds)


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("d_in", "d_out"), [(64, 48), (37, 51), (16, 5), (7, 160)])
def test_each_token_has_the_changes_of_its_span(
    kernel: bool, factors: torch.dtype, dtype: torch.dtype, d_in: int, d_out: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernel:
        monkeypatch.setattr(many_low_rank, "serves", lambda x: False)
    chance = random.Random(d_in)
    torch.manual_seed(d_in)
    for _ in range(10):
        spans, bounds = some_spans(chance, d_in, d_out, factors)
        many = ManyLowRank([*map(Changes, spans)], d_out)
        for _ in range(2):  # a second pass takes what the first one made
            x = torch.randn(bounds.spans[-1][1], d_in).to(dtype)
            found = many(x, bounds)
            assert found.dtype == dtype
            assert error(found, exact(spans, x, bounds, d_out)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(48, 16), (51, 3), (5, 40), (1, 7), (33, 1), (16, 16)])
def test_a_factor_by_columns_is_the_same_factor(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    B = torch.randn(shape).to(dtype)
    for factor in (B, B.T.contiguous().T, torch.cat([B, B])[::2]):
        for scale in (1.0, -0.375):
            found = by_columns(factor, scale)
            assert found.T.is_contiguous()
            assert torch.equal(found, (factor.double() * scale).to(dtype))
    columns = by_columns(B)
    assert by_columns(columns).data_ptr() == columns.data_ptr(), "no copy of what lies so"


def test_a_part_of_the_spans_is_moved_up() -> None:
    assert Bounds([(0, 2), (2, 3), (3, 9), (9, 10)]).of((1, 3)).spans == [(0, 1), (1, 2)]


def test_rows_of_x_need_not_lie_end_to_end_and_tensors_of_any_layout_count() -> None:
    torch.manual_seed(0)
    change = Change(torch.randn(24, 6).T, torch.randn(6, 20).T)
    x = torch.randn(24, 4).T
    for bounds in (Bounds([(0, 4)]), Bounds([(0, 1), (1, 4)])):
        spans = [[change]] * len(bounds.spans)
        assert error(ManyLowRank([*map(Changes, spans)], 20)(x, bounds), exact(spans, x, bounds, 20)) < 2e-6


def test_numbers_beside_a_factor_do_not_reach_the_sum() -> None:
    """Where a row is no multiple of sixteen, what lies behind it in memory is another one's."""
    memory = torch.full((3, 5, 7), float("nan"))
    memory[1] = 1.0
    change = Change(memory[1], torch.ones(3, 5))
    y = ManyLowRank([Changes([change])], 3)(torch.ones(1, 7), Bounds([(0, 1)]))
    assert y.tolist() == [[35.0] * 3]


def test_no_stack_is_made_where_the_kernel_serves_and_one_where_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    changes = [[Change(torch.ones(2, 8), torch.ones(8, 2))], []]
    bounds, x = Bounds([(0, 1), (1, 2)]), torch.ones(2, 8)
    many = ManyLowRank([*map(Changes, changes)], 8)
    if many_low_rank.serves(x):
        many(x, bounds)
        assert not many.stacked
    monkeypatch.setattr(many_low_rank, "serves", lambda x: False)
    many(x, bounds)
    stack = many.stacked[torch.float32]
    many(torch.ones(5, 8), Bounds([(0, 2), (2, 5)]))
    assert many.stacked[torch.float32] is stack
