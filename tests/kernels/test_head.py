"""The output head against log softmax of whole logits, gradients included."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graftlm.kernels import head
from graftlm.kernels.head import Comparison, Readings, head_log_probs, head_readings, linear_log_probs, linear_readings
from tests.kernels.equations import normal, same
from tests.peers import relative_error


def chunked(monkeypatch: pytest.MonkeyPatch, rows: int | None, vocabulary: int) -> None:
    """Let `rows` rows be one chunk of logits."""
    for name in ("LOGITS_AT_ONCE", "SOFTMAX_AT_ONCE"):
        if rows is not None and hasattr(head, name):
            monkeypatch.setattr(head, name, rows * vocabulary)


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
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", 7)
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
        monkeypatch.setattr(head, "SOFTMAX_AT_ONCE", 3 * 50)  # which divides neither the chunk nor the rows
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
    targets, chunk_sizes, saved = torch.zeros(40, dtype=torch.long), [], []

    def other(rows: slice) -> Tensor:
        chunk_sizes.append(rows.stop - rows.start)
        return normal(len(hidden[rows]), 50, seed=5)

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if linear:
            made = linear_readings(hidden, W, None, targets, None, [Comparison(other, apart)])
        else:
            made = head_readings(lambda h: h @ W.T, hidden, targets, 50, [Comparison(other, apart)])
    assert set(chunk_sizes) == {4}
    assert saved
    assert all(tensor.shape[-1:] != (50,) for tensor in saved)
    made.distances[0].sum().backward()
