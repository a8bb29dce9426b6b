"""AdamW in 8 bits: near AdamW in 32, at a quarter of its moments."""

import pytest
import torch
from torch import nn

from graftlm.optim.adamw_8bit import AdamW8bit, AdamW8bitConfig
from graftlm.training.state import ParameterGroup
from tests.errors import raises

pytest.importorskip("bitsandbytes")


def test_it_stays_near_adamw() -> None:
    torch.manual_seed(0)
    start = torch.randn(64, 128)
    p, q = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    ours = AdamW8bit(AdamW8bitConfig()).make([ParameterGroup({"p": p}, 0.01)], weight_decay=0.1)
    adamw = torch.optim.AdamW([q], lr=0.01, weight_decay=0.1)
    slope = torch.randn(64, 128)
    for _ in range(10):
        p.grad = slope + 0.3 * torch.randn(64, 128)
        q.grad = p.grad.clone()
        ours.step()
        adamw.step()
    moved, wanted = p.detach() - start, q.detach() - start
    assert float((moved - wanted).abs().mean()) < 0.05 * float(wanted.abs().mean())
    state_bytes = sum(t.numel() * t.element_size() for t in ours.state[p].values() if torch.is_tensor(t))
    assert state_bytes < 0.3 * 8 * p.numel()  # two codes of 256 numbers each are most of what is not moments here


def test_paged_moments_want_a_gpu() -> None:
    with raises("training/gpu-only-setting", match="paged"):
        AdamW8bit(AdamW8bitConfig(paged=True)).make(
            [ParameterGroup({"p": nn.Parameter(torch.ones(2))}, 0.1)], weight_decay=0
        )
