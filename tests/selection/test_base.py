"""What selectors need of a model, against the plain model, one row at a time."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from graftlm.data.chat.masks import weights
from graftlm.data.chat.roles import Role
from graftlm.selection.base import Pool, embeddings, from_order, last_answer, row_losses
from graftlm.testing import tiny_model
from tests.selection.conftest import qa, some_rows


def test_the_loss_of_a_row_is_the_plain_model_s(pool_of: Callable[..., Pool]) -> None:
    model, rows = tiny_model(), some_rows(9)
    pool = pool_of(rows, model)
    found = row_losses(pool, "test")
    for row, loss in zip(rows, found, strict=True):
        rendered = pool.renderer.conversation(row.messages)
        ids, weight = torch.from_numpy(rendered.ids.astype("int64")), weights(rendered, "response")
        with torch.no_grad():
            log_p = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0].numpy()
        assert loss == pytest.approx(-(log_p * weight[1:]).sum() / weight.sum(), rel=1e-5)


def test_embeddings_are_centred_means_of_hidden_states_one_row_at_a_time(pool_of: Callable[..., Pool]) -> None:
    model, rows = tiny_model(), some_rows(7)
    pool = pool_of(rows, model)
    means = []
    for row in rows:
        ids = torch.from_numpy(pool.examples[rows.index(row)][0].needed.astype("int64"))
        with torch.no_grad():
            means.append(model.get_decoder()(ids[None]).last_hidden_state[0].mean(0).numpy())
    wanted = np.stack(means) - np.mean(means, 0)
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    np.testing.assert_allclose(embeddings(pool), wanted, atol=2e-5)
    np.testing.assert_allclose(embeddings(pool_of(rows, model, pack=False)), wanted, atol=2e-5)


def test_rows_that_are_too_long_have_no_examples_and_no_direction(pool_of: Callable[..., Pool]) -> None:
    rows = [*some_rows(4), qa("the user asks " * 30, "one line", "long"), *some_rows(2)]
    pool = pool_of(rows, max_tokens=60)
    assert pool.usable.tolist() == [True] * 4 + [False] + [True] * 2
    found = embeddings(pool)
    assert not found[4].any()
    assert np.linalg.norm(np.delete(found, 4, axis=0), axis=1) == pytest.approx(1)
    assert np.isnan(row_losses(pool, "test")).tolist() == [False] * 4 + [True] + [False] * 2


def test_an_order_is_a_score() -> None:
    scores = from_order([3, 0, 2], 5)
    assert np.argsort(-scores, kind="stable")[:3].tolist() == [3, 0, 2]
    assert np.isneginf(scores[[1, 4]]).all()
    assert scores.dtype == np.float32


def test_the_last_answer_is_found_by_roles() -> None:
    class Rendered:
        roles = np.array([Role.USER, Role.ASSISTANT, Role.END_OF_TURN, Role.USER, *[Role.ASSISTANT] * 3, Role.SPECIAL])

    assert last_answer(Rendered()) == (4, 7)  # type: ignore[arg-type]
    Rendered.roles = np.array([Role.USER, Role.USER])
    assert last_answer(Rendered()) == (2, 2)  # type: ignore[arg-type]
