"""Attention of a packed row: what segments see of each other, sinks, and what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graftlm.kernels import attention
from graftlm.kernels.attention import SegmentLayout
from graftlm.passes.packed_attention import segment_attention
from tests.errors import raises
from tests.kernels.equations import normal, same, seen_in_a_tree


def test_nothing_of_one_segment_reaches_another() -> None:
    q, k, v = (normal(1, 2, 10, 8, seed=s) for s in range(3))
    before = segment_attention(nn.Module(), q, k, v, layout=SegmentLayout([4, 6]))[0]
    for tensor in (q, k, v):
        tensor[:, :, 4:] = 100.0
    after = segment_attention(nn.Module(), q, k, v, layout=SegmentLayout([4, 6]))[0]
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.equal(before[:, 4:], after[:, 4:])


@pytest.mark.parametrize("kernel", ["tiles", "stock"])
@pytest.mark.parametrize("settings", [{}, {"sliding_window": 3}, {"scaling": 0.3}], ids=str)
@pytest.mark.parametrize("lengths", [[9], [5, 1, 7]], ids=str)
def test_a_sink_takes_a_share_of_each_querys_probability_and_gives_nothing(
    lengths: list[int], settings: dict[str, Any], kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """softmax over the scores and one more of each head, of which the last column is left out; gradients of all."""
    if kernel == "stock":
        monkeypatch.setattr(attention._TiledAttention, "apply", attention._stock_attention)
    total, scale = sum(lengths), settings.get("scaling", 8**-0.5)
    seen = seen_in_a_tree(lengths, [-1] * len(lengths), settings.get("sliding_window"))

    def plain(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
        scores = (q @ k.transpose(2, 3) * scale).masked_fill(~seen, float("-inf"))
        scores = torch.cat([scores, sinks.view(1, 4, 1, 1).expand(1, 4, total, 1)], -1)
        return (scores.softmax(-1)[..., :-1] @ v).transpose(1, 2)

    same(
        lambda q, k, v, sinks: segment_attention(
            nn.Module(), q, k, v, layout=SegmentLayout(lengths), s_aux=sinks, **settings
        )[0],
        plain,
        [*(normal(1, h, total, 8, seed=s) for s, h in enumerate((4, 2, 2))), normal(4, seed=9)],
    )


def test_attention_without_a_layout_says_how_to_call_the_model() -> None:
    q, k, v = (normal(1, 2, 4, 8, seed=s) for s in range(3))
    with raises("training/recomputation-loses-segments", match="Linear"):
        segment_attention(nn.Linear(1, 1), q, k, v)


@pytest.mark.parametrize("extra", [{"s_aux": torch.zeros(2), "softcap": 2.0}, {"position_bias": torch.zeros(1)}])
def test_attention_that_is_not_computed_here_is_refused(extra: dict[str, Any]) -> None:
    q, k, v = (normal(1, 2, 4, 8, seed=s) for s in range(3))
    with pytest.raises(NotImplementedError, match="Linear"):
        segment_attention(nn.Linear(1, 1), q, k, v, layout=SegmentLayout([4]), **extra)
