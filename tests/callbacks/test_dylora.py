"""DyLoRA draws a rank a step and trains that slice as LoRA; afterwards any rank can be had, saved and exported."""

from pathlib import Path
from typing import Any

import pytest
import torch

from graftlm.adapters.export.export import plain_lora
from graftlm.adapters.load import load_adapter
from graftlm.adapters.save import save_adapter
from graftlm.callbacks.dylora import DyLoraCallback, DyLoraCallbackConfig, use_rank
from graftlm.data.batches.pack import collate
from graftlm.model.registry import attachment, hosts, trainable
from graftlm.testing import tiny_model
from graftlm.testing.deltas import attach_tiny, logits, perturbed
from graftlm.training.callback import Callback
from tests.callbacks.test_callbacks import run, training
from tests.errors import raises
from tests.golden.check import against_reference
from tests.training.test_loop import examples


def slices(tensors: Any, W: Any, b: Any, x: Any, delta: Any) -> Any:
    """One rank after the other, up to `rank`."""
    y = x @ W.T if b is None else x @ W.T + b
    for i in range(3):
        y = y + 6 / 3 * torch.outer(x @ tensors["A"][i], tensors["B"][:, i])
    return y


def test_a_slice_is_lora_of_that_rank_with_its_scale() -> None:
    against_reference("dylora", slices, rank=3)


class Drawn(Callback):
    """Notes which part of every A and B had a gradient."""

    def __init__(self) -> None:
        super().__init__(None)
        self.found: list[tuple[set[int], set[int]]] = []

    def on_grads(self, training: Any) -> None:
        rows, columns = set(), set()
        for _, _, delta in training.sites():
            rows |= set(delta.A.grad.abs().sum(1).nonzero()[:, 0].tolist())
            columns |= set(delta.B.grad.abs().sum(0).nonzero()[:, 0].tolist())
        self.found.append((rows, columns))


@pytest.mark.parametrize("frozen", [False, True])
def test_only_what_was_drawn_learns(frozen: bool) -> None:
    callback, seen = DyLoraCallback(DyLoraCallbackConfig(least=2, frozen=frozen)), Drawn()
    state = training(perturbed("dylora", tiny_model()), [])
    rank_of_step = []
    for number in range(12):
        rank_of_step.append(callback.rank_of_step(state))
        run(state, [callback, seen], [[collate(examples(seed=number))]])
    assert set(rank_of_step) == {2, 3, 4}
    for number, (b, (rows, columns)) in enumerate(zip(rank_of_step, seen.found, strict=True)):
        assert rows == columns == ({b - 1} if frozen and number >= 2 else set(range(b)))
    assert all(delta.rank == 4 for _, _, delta in state.sites())


def test_a_step_is_adamw_on_lora_of_the_rank_drawn() -> None:
    """The same batch through a LoRA of rank b with the scale alpha / b, by torch's own AdamW."""
    callback = DyLoraCallback(DyLoraCallbackConfig())
    state = training(perturbed("dylora", tiny_model()), [])
    b = callback.rank_of_step(state)
    assert b < 4
    lora = perturbed("lora", tiny_model(), r=b, alpha=6.0)
    for ours, theirs in zip(state.sites(), hosts(lora).values(), strict=True):
        theirs.deltas["default"].A.data = ours[2].A.data[:b].clone()
        theirs.deltas["default"].B.data = ours[2].B.data[:, :b].clone()
    run(training(lora, []), [], [[collate(examples())]])
    run(state, [callback], [[collate(examples())]])
    for ours, theirs in zip(state.sites(), hosts(lora).values(), strict=True):
        torch.testing.assert_close(ours[2].A.data[:b], theirs.deltas["default"].A.data)
        torch.testing.assert_close(ours[2].B.data[:, :b], theirs.deltas["default"].B.data)


def test_any_rank_can_be_had_saved_and_exported(tmp_path: Path) -> None:
    model = perturbed("dylora", tiny_model())
    whole = logits(model)
    use_rank(model, 2)
    cut = logits(model)
    assert not torch.allclose(cut, whole)
    assert plain_lora(model).rank == 2
    save_adapter(model, tmp_path / "two")
    other = tiny_model()
    load_adapter(other, tmp_path / "two")
    assert torch.equal(logits(other), cut)
    use_rank(other, None)
    assert torch.equal(logits(other), whole), "what was cut off is still there"
    assert attachment(other).configs["default"] == attachment(perturbed("dylora", tiny_model())).configs["default"]


def test_ranks_that_are_not_there_are_refused() -> None:
    model = perturbed("dylora", tiny_model())
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    with raises("target/rank-out-of-range", match="1 to 4"):
        use_rank(model, 5)
    with raises("target/not-a-dylora"):
        use_rank(perturbed("lora", tiny_model()), 2)
    with raises("target/rank-out-of-range", match="1 to 4"):
        attach_tiny("dylora", tiny_model(), rank=9)
    assert all(torch.equal(p, before[name]) for name, p in trainable(model).items())
    for method, least, says in (("dylora", 5, "more than r 4"), ("lora", 1, "method: dylora")):
        state = training(perturbed(method, tiny_model()), [])
        with raises("training/callback-unsupported", match=says):
            run(state, [DyLoraCallback(DyLoraCallbackConfig(least=least))], [[collate(examples())]])
