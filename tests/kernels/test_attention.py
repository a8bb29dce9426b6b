"""Tiled attention against one full matrix with a mask, gradients included."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graftlm.kernels import attention
from graftlm.kernels.attention import SegmentLayout
from graftlm.passes.packed_attention import segment_attention
from tests.kernels.equations import attention_by_mask, normal, same, seen_in_a_tree


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
        lambda q, k, v: segment_attention(nn.Module(), q, k, v, layout=SegmentLayout(lengths), **settings)[0],
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
    monkeypatch.setattr(attention, "QUERIES_AT_ONCE", limits[0])
    monkeypatch.setattr(attention, "KEPT_KEYS", limits[1])
    if kernel == "stock":
        monkeypatch.setattr(attention._TiledAttention, "apply", attention._stock_attention)
    seen = seen_in_a_tree(*TREE, settings.get("sliding_window"))
    same(
        lambda q, k, v: segment_attention(nn.Module(), q, k, v, layout=SegmentLayout(*TREE), **settings)[0],
        lambda q, k, v: attention_by_mask(
            q, k, v, seen, scale=settings.get("scaling", 8**-0.5), softcap=settings.get("softcap")
        ),
        [normal(1, h, sum(TREE[0]), 8, seed=s) for s, h in enumerate((4, 2, 2))],
    )


def test_values_may_be_narrower_than_keys() -> None:
    lengths = [3, 6]
    same(
        lambda q, k, v: segment_attention(nn.Module(), q, k, v, layout=SegmentLayout(lengths))[0],
        lambda q, k, v: plain_attention(q, k, v, lengths, scale=8**-0.5, window=None, softcap=None),
        [normal(1, 4, 9, 8, seed=0), normal(1, 2, 9, 8, seed=1), normal(1, 2, 9, 5, seed=2)],
    )


@pytest.mark.parametrize("keys", [1, 60, 64, 95, 256, 257])
def test_bf16_probabilities_of_any_number_of_keys_are_rounded_once(keys: int) -> None:
    scores = (4 * normal(2, 6, keys, seed=0)).bfloat16()
    found, wanted = attention._softmax(scores), scores.double().softmax(-1)
    assert found.dtype == torch.bfloat16
    assert float(((found.double() - wanted).abs() / wanted).max()) <= 0.501 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("saves_probabilities", [True, False], ids=["kept", "recomputed"])
def test_short_attention_passes_gradcheck_in_float64(
    saves_probabilities: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not saves_probabilities:
        monkeypatch.setattr(attention, "KEPT_KEYS", 0)
    inputs = [normal(1, h, 6, 4, seed=s, dtype=torch.float64).requires_grad_() for s, h in enumerate((4, 2, 2))]
    assert torch.autograd.gradcheck(
        lambda q, k, v: segment_attention(nn.Module(), q, k, v, layout=SegmentLayout([3, 1, 2], [-1, 0, 1]))[0], inputs
    )
