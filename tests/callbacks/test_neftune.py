"""NEFTune's noise: its size by the row's own length, the same however rows are packed, and none outside of training."""

from typing import Any

import pytest
import torch

from graftlm.callbacks.neftune import Neftune, NeftuneConfig
from graftlm.data.batches.pack import Pack, collate, pack
from graftlm.testing import tiny_model
from graftlm.testing.deltas import perturbed
from graftlm.training.callback import Callback
from tests.callbacks.test_callbacks import run, training
from tests.errors import raises
from tests.training.test_loop import examples

ROWS = examples(6)


def seen(batch: list[Pack], alpha: float, method: str = "lora", steps: int = 1) -> list[dict[str, torch.Tensor]]:
    """The noise on each row, by its place, at each step: what the first layer sees, less the embeddings."""
    model = perturbed(method, tiny_model())
    table, found = model.get_input_embeddings(), []
    chosen: list[Callback] = [Neftune(NeftuneConfig(alpha=alpha))]
    state = training(model, chosen, rate=0.0)
    noises: dict[str, torch.Tensor] = {}

    def look(layer: Any, args: Any, kwargs: Any) -> None:
        assert state.pack is not None
        X = args[0] if args else kwargs["hidden_states"]
        noise = (X - table.weight[state.pack.ids] if method == "lora" else X)[0]
        for (row,), part in zip(state.pack.where, noise.split(state.pack.lengths), strict=True):
            noises[row] = part.detach()

    model.model.layers[0].register_forward_pre_hook(look, with_kwargs=True)
    for _ in range(steps):
        run(state, chosen, [batch])
        found.append(dict(noises))
    return found


def test_it_is_uniform_and_as_large_as_the_row_is_short() -> None:
    (noises,) = seen([collate(ROWS)], 5.0)
    for row in ROWS:
        noise = noises[row.where]
        L, d = noise.shape
        assert len(row.needed) == L
        largest = 5.0 / (L * d) ** 0.5
        assert float(noise.abs().max()) <= largest * (1 + 1e-5)
        assert float(noise.abs().max()) > 0.9 * largest
        assert float(noise.square().mean()) == pytest.approx(largest**2 / 3, rel=0.25)
        assert abs(float(noise.mean())) < 4 * largest / (3 * L * d) ** 0.5


def test_packing_changes_nothing() -> None:
    (whole,) = seen([collate(ROWS)], 5.0)
    for batch in (pack(ROWS, 40), [collate([row]) for row in reversed(ROWS)]):
        (found,) = seen(batch, 5.0)
        assert found.keys() == whole.keys()
        for row, noise in whole.items():
            torch.testing.assert_close(found[row], noise, rtol=0, atol=1e-6)


def test_every_step_and_row_has_its_own() -> None:
    first, second = seen([collate(ROWS)], 5.0, steps=2)
    a, b = (first[row.where] for row in ROWS[:2])
    assert not torch.equal(first[ROWS[0].where], second[ROWS[0].where])
    n = min(len(a), len(b))
    assert not torch.allclose(a[:n] / a.abs().max(), b[:n] / b.abs().max(), atol=0.1)


def test_a_delta_on_the_embeddings_gets_it_too() -> None:
    little, much = (seen([collate(ROWS)], alpha, "full")[0] for alpha in (1e-6, 5.0))
    for row in ROWS:
        largest = 5.0 / (len(row.needed) * 32) ** 0.5
        assert float((much[row.where] - little[row.where]).abs().max()) == pytest.approx(largest, rel=0.1)


def test_outside_of_training_there_is_none() -> None:
    model = perturbed("lora", tiny_model())
    chosen: list[Callback] = [Neftune(NeftuneConfig())]
    ids = torch.arange(3, 9)[None]
    before = model(ids).logits
    run(training(model, chosen, rate=0.0), chosen, [[collate(ROWS)]])
    assert torch.equal(model(ids).logits, before)


def test_the_reference_sees_none() -> None:
    """A pass without gradients inside of a step, as a preference's reference is one."""
    model = perturbed("lora", tiny_model())
    callback = Neftune(NeftuneConfig())
    state = training(model, [callback])
    state.pack = collate(ROWS[:1])
    plain = model(state.pack.ids).logits
    with callback.during(state):
        assert not torch.equal(model(state.pack.ids).logits, plain)
        with torch.no_grad():
            assert torch.equal(model(state.pack.ids).logits, plain)


def test_shared_beginnings_are_refused() -> None:
    twice = [ROWS[0], type(ROWS[0])(ROWS[0].ids, ROWS[0].weights, "other.jsonl:1")]
    model = perturbed("lora", tiny_model())
    chosen: list[Callback] = [Neftune(NeftuneConfig())]
    with raises("training/conflicting-settings", match="prefix_sharing: false"):
        run(training(model, chosen), chosen, [[collate(twice, share=True)]])
