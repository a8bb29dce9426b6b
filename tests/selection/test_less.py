"""LESS: the projection, Adam's step, and whom it prefers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graftlm.deltas.lora import LoraConfig
from graftlm.model.attach import attach
from graftlm.model.registry import hosts, parameters_of
from graftlm.optim.adamw import adamw
from graftlm.selection import less
from graftlm.selection.base import Pool
from graftlm.selection.less import LessConfig, Projection, adam_step, gradient
from graftlm.testing import tiny_model
from tests.errors import raises
from tests.selection.conftest import some_rows


def test_projections_preserve_inner_products_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(40, 7, generator=generator), torch.randn(90, generator=generator)]
    y = [a + torch.randn(a.shape, generator=generator) for a in x]
    wanted = sum(float((a * b).sum()) for a, b in zip(x, y, strict=True))
    norms = [sum(float(a.square().sum()) for a in v) for v in (x, y)]
    d = 64
    found = []
    for seed in range(600):
        project = Projection([280, 90], d, seed)
        found.append(float(project(x) @ project(y)))
    # The variance of one product, that of a dense matrix of signs, is at most (|x|^2 |y|^2 + (x.y)^2) / d.
    variance = (norms[0] * norms[1] + wanted**2) / d
    assert np.mean(found) == pytest.approx(wanted, abs=4 * (variance / 600) ** 0.5)
    assert np.var(found) < 1.3 * variance


def test_a_projection_is_linear_and_the_same_for_the_same_seed() -> None:
    x, y = torch.randn(50), torch.randn(50)
    project = Projection([50], 16, seed=3)
    torch.testing.assert_close(project([2 * x - y]), 2 * project([x]) - project([y]))
    assert torch.equal(Projection([50], 16, seed=3)([x]), project([x]))
    assert not torch.equal(Projection([50], 16, seed=4)([x]), project([x]))


def _with_lora(pool: Pool) -> list[Any]:
    attach(pool.model, LoraConfig(r=2), name="test")
    with torch.no_grad():
        for parameter in parameters_of(pool.model, "test"):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return parameters_of(pool.model, "test")


def test_a_row_s_gradient_is_that_of_the_plain_loss(pool_of: Callable[..., Pool]) -> None:
    pool = pool_of(some_rows(3), tiny_model())
    parameters = _with_lora(pool)
    (example,) = pool.examples[1]
    found = gradient(pool, parameters, [example])
    ids, weight = torch.from_numpy(example.ids.astype("int64")), torch.from_numpy(example.weights)
    log_p = pool.model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    (-(log_p * weight[1:]).sum() / weight.sum()).backward()
    for parameter, g in zip(parameters, found, strict=True):
        torch.testing.assert_close(g, parameter.grad, atol=1e-5, rtol=1e-3)


def test_the_preconditioned_gradient_is_the_step_that_torch_s_adamw_takes(pool_of: Callable[..., Pool]) -> None:
    pool = pool_of(some_rows(6), tiny_model())
    parameters = _with_lora(pool)
    rate = 1e-3
    optimizer = adamw([(parameters, rate)], weight_decay=0.0)
    for examples in pool.examples[:4]:  # so that both moments hold something
        for parameter, g in zip(parameters, gradient(pool, parameters, examples), strict=True):
            parameter.grad = g.contiguous()  # as backward() leaves it
        optimizer.step()
    wanted_by = gradient(pool, parameters, pool.examples[5])
    found = adam_step(optimizer, parameters, wanted_by)
    before = [p.detach().clone() for p in parameters]
    for parameter, g in zip(parameters, wanted_by, strict=True):
        parameter.grad = g.contiguous()
    optimizer.step()
    for old, new, step in zip(before, parameters, found, strict=True):
        torch.testing.assert_close((old - new.detach()) / rate, step, atol=2e-3, rtol=2e-3)


def test_the_row_that_is_the_target_ranks_first(pool_of: Callable[..., Pool], tmp_path: Path) -> None:
    rows = some_rows(20)
    target = tmp_path / "target.jsonl"
    target.write_text(json.dumps({"prompt": rows[13].messages[0].content, "completion": rows[13].messages[1].content}))
    pool = pool_of(rows)
    settings = {"target": str(target), "epochs": 2, "batch_rows": 4, "warmup_share": 0.4, "r": 4, "seed": 1}
    scores = less.score(LessConfig(**settings), pool)
    assert int(scores.argmax()) == 13
    assert not hosts(pool.model), "the model is left as it was"
    again = less.score(LessConfig(**settings), pool_of(rows))
    np.testing.assert_array_equal(scores, again)


def test_subtasks_score_by_the_one_that_is_helped_most(pool_of: Callable[..., Pool], tmp_path: Path) -> None:
    rows = some_rows(12)
    wanted = [
        {"prompt": rows[n].messages[0].content, "completion": rows[n].messages[1].content, "group": str(n)}
        for n in (2, 9)
    ]
    target = tmp_path / "target.jsonl"
    target.write_text("".join(json.dumps(row) + "\n" for row in wanted))
    settings = {"target": str(target), "epochs": 1, "batch_rows": 4, "warmup_share": 0.7, "r": 4}
    mean, most = (less.score(LessConfig(subtasks=s, **settings), pool_of(rows)) for s in (False, True))
    assert (most >= mean - 1e-6).all()
    assert set(np.argsort(-most)[:2]) == {2, 9}


def test_a_target_of_which_nothing_fits_is_refused(pool_of: Callable[..., Pool], tmp_path: Path) -> None:
    target = tmp_path / "target.jsonl"
    target.write_text(json.dumps({"prompt": "the user asks " * 60, "completion": "a"}))
    with raises("data/no-rows-left", match="max_tokens"):
        less.score(LessConfig(target=str(target)), pool_of(some_rows(4), max_tokens=64))
