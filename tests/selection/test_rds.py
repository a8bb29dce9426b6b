"""RDS+: the weighted mean against the model's own states, the turns against naive ones, and whom it prefers."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from graftlm.selection import rds
from graftlm.selection.base import Pool, hidden_means
from graftlm.selection.rds import RdsConfig
from graftlm.testing import tiny_model
from tests.selection.conftest import qa, some_rows


def test_later_tokens_weigh_more_in_the_mean(pool_of: Callable[..., Pool]) -> None:
    model = tiny_model()
    pool = pool_of(some_rows(7), model)
    found = hidden_means(pool, late=True)
    for row, (example,) in zip(found, pool.examples, strict=True):
        ids = torch.from_numpy(example.needed.astype(np.int64))[None]  # nothing comes from its last token
        with torch.no_grad():
            states = model.model(input_ids=ids).last_hidden_state[0]
        weights = torch.arange(1, len(states) + 1.0)
        np.testing.assert_allclose(row, (weights / weights.sum()) @ states, atol=1e-5)


def test_each_query_in_turn_has_the_nearest_row_that_is_left() -> None:
    similarity = np.random.default_rng(0).normal(size=(4, 23)).astype(np.float32)
    left, order = set(range(23)), []
    while left:
        for query in similarity:
            if left:
                order.append(max(left, key=lambda i, query=query: float(query[i])))  # type: ignore[misc]
                left.remove(order[-1])
    assert rds.turns(similarity) == order


def test_of_equals_the_first_is_taken_and_every_row_once() -> None:
    assert rds.turns(np.zeros((3, 5), np.float32)) == [0, 1, 2, 3, 4]


def test_rows_like_the_targets_come_first(pool_of: Callable[..., Pool], tmp_path: Path) -> None:
    """Half of the pool asks and answers as the target does."""
    wanted = [qa(f"the user asks {n}?", "one one one one", f"rows:{n}") for n in range(8)]
    others = [qa(f"in a system line {n}", "tells and answers the assistant", f"rows:{8 + n}") for n in range(8)]
    target = tmp_path / "target.jsonl"
    lines = [{"prompt": f"the user asks {n}?", "completion": "one one one one"} for n in (21, 22)]
    target.write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores = rds.score(RdsConfig(target=str(target)), pool_of([*others, *wanted]))
    first = np.argsort(-scores, kind="stable")[:8]
    assert set(first) == set(range(8, 16))
