"""check_packing (packing_check.py): the check is short, and still finds what packing or sharing would spoil."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from graftlm.data.batches.pack import Example
from graftlm.passes.packing_check import PROBE_TOKENS, check_packing
from graftlm.testing import tiny_model
from tests.errors import raises


def examples(*lengths: int) -> list[Example]:
    """Rows of which all but the last few tokens are alike."""
    ids = np.random.default_rng(0).integers(3, 60, 400).astype(np.int32)
    rows = [np.concatenate([ids[: n - 40], ids[n : n + 40]]) for n in lengths]
    return [Example(row, np.ones(len(row), np.float32), str(len(row))) for row in rows]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_computes_as_it_should_passes_on_a_few_tokens(kind: str, dtype: torch.dtype) -> None:
    """The whole model sees the ends of two rows; its first layers see all of them."""
    model, first, last = tiny_model(kind, num_hidden_layers=8).to(dtype), list[int](), list[int]()
    for layer, seen in ((model.model.layers[1], first), (model.model.layers[7], last)):
        layer.register_forward_hook(lambda module, inputs, out, seen=seen: seen.append(out.shape[1]))
    check_packing(model, examples(300, 60, 100), packed=True, sharing=True)
    assert max(first) >= 300 + 60
    assert max(last) <= 5 * PROBE_TOKENS
    assert len(last) <= 5


def leaking(model: Any) -> None:
    """A layer that adds up what stands before a token, of whatever row."""
    layer = model.model.layers[0].mlp
    original = layer.forward

    def forward(x: Tensor) -> Tensor:
        out: Tensor = original(x)
        return out + x.cumsum(1)

    layer.forward = forward


def counting(model: Any) -> None:
    """Positions by the place in the pack, not in the row."""
    decoder = model.get_decoder()
    decoder.register_forward_pre_hook(
        lambda module, inputs, kwargs: (
            inputs,
            {**kwargs, "position_ids": torch.arange(kwargs["input_ids"].numel())[None] ** 2},
        ),  # fmt: skip
        with_kwargs=True,
    )


@pytest.mark.parametrize("wrong", [leaking, counting])
def test_what_packing_would_spoil_is_refused(wrong: Any) -> None:
    model = tiny_model(initializer_range=0.5)
    wrong(model)
    with raises("training/cannot-pack", match="pack: false"):
        check_packing(model, examples(300, 60), packed=True, sharing=False)
    if wrong is leaking:
        check_packing(model, examples(300, 60), packed=False, sharing=False)


def test_what_sharing_alone_would_spoil_says_how_to_do_without() -> None:
    """Positions that rise by one throughout a row, but for the tail of a shared beginning."""
    model = tiny_model(initializer_range=0.5)

    def hook(_: Any, inputs: Any, kwargs: Any) -> Any:
        if kwargs.get("position_ids") is None:
            return None
        steps = kwargs["position_ids"][0].diff(prepend=torch.tensor([-1]))
        back = (steps != 1) & (kwargs["position_ids"][0] > 0)
        return inputs, {**kwargs, "position_ids": kwargs["position_ids"] + 7 * back.cumsum(0)}

    model.get_decoder().register_forward_pre_hook(hook, with_kwargs=True)
    check_packing(model, examples(300, 60), packed=True, sharing=False)
    with raises("training/cannot-pack", match="prefix_sharing: false"):
        check_packing(model, examples(300, 60), packed=True, sharing=True)


def test_rows_are_needed() -> None:
    with pytest.raises(ValueError, match="no row"):
        check_packing(tiny_model(), [])
