"""CAT: the loss as a function of a weight for each layer, its gradient, and what Adam makes of it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from graftlm.adapters.adapter import Adapter
from graftlm.adapters.load import attach_adapter
from graftlm.combine.changes import changes_of
from graftlm.combine.compose import compose
from graftlm.combine.few_shot import NAME
from graftlm.combine.layer_weights import layer_loss, learn_layer_weights
from graftlm.data.batches.pack import Example, lay_out
from graftlm.model.registry import hosts, known_hosts
from graftlm.testing import tiny_model
from graftlm.testing.deltas import close, logits
from tests.combine.test_search import naive_loss, rows, sampled, several, telling, trained
from tests.errors import raises

LAST = "model.layers.1.mlp.down_proj"


def packs(examples: Sequence[Example] | None = None, *, packed: bool = False) -> Any:
    return lay_out(rows() if examples is None else examples, 2000, packed=packed)


def dense_loss(sites: list[str], adapters: Sequence[Adapter], a: Tensor) -> Tensor:
    """The loss on `rows` by the model's own forward pass with whole weights W + sum_i a_i D_i, in float64."""
    model = tiny_model().double()
    weights = {f"{site}.weight": model.get_parameter(f"{site}.weight").detach() for site in sites}
    for number, adapter in enumerate(adapters):
        with changes_of(tiny_model(), adapter, "unused", needs_rank=True) as changes:
            for site, change in changes.items():
                key = f"{site}.weight"
                weights[key] = weights[key] + a[sites.index(site), number] * change().matrix()
    total, count = torch.zeros((), dtype=torch.float64), 0.0
    for example in rows():
        ids = torch.from_numpy(example.ids.astype(np.int64))
        out = functional_call(model, weights, (ids[None],)).logits[0].log_softmax(1)
        w = torch.from_numpy(example.weights).double()[1:]
        total = total - (w * out[:-1].gather(1, ids[1:, None])[:, 0]).sum()
        count += float(w.sum())
    return total / count


def random_weights(sites: list[str], n: int) -> Tensor:
    return torch.randn(len(sites), n, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("packed", [False, True])
def test_loss_and_gradient_are_those_of_the_dense_sum(packed: bool) -> None:
    adapters = several()
    with layer_loss(tiny_model(), adapters, packs(packed=packed)) as (sites, present, loss):
        a = random_weights(sites, len(adapters)).requires_grad_()
        found = loss(a)
    dense = a.detach().double().requires_grad_()
    wanted = dense_loss(sites, adapters, dense)
    wanted.backward()
    assert found == pytest.approx(float(wanted.detach()), abs=1e-5)
    assert dense.grad is not None
    assert a.grad is not None
    assert float(dense.grad.abs().max()) > 0.01
    close(a.grad.double(), dense.grad, "gradient", 1e-5)
    assert not a.grad[~present].any(), "an adapter that does not change a layer has no say there"
    assert bool((~present).any())


def test_the_gradient_is_that_of_finite_differences() -> None:
    with layer_loss(tiny_model(), several(), packs()) as (sites, _, loss):
        a = random_weights(sites, 3).requires_grad_()
        loss(a)
        assert a.grad is not None
        direction = a.grad / a.grad.norm()
        ahead, behind = (loss(a.detach() + step * direction) for step in (1e-2, -1e-2))
        assert (ahead - behind) / 2e-2 == pytest.approx(float(a.grad.norm()), rel=1e-2)


def test_the_inputs_meet_the_factors_of_all_adapters_in_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    with layer_loss(model := tiny_model(), several(), packs(rows(1))) as (sites, _, loss):
        host, seen = known_hosts(model)[sites[0]], list[tuple[int, ...]]()
        low_rank = host.view.low_rank  # type: ignore[union-attr]
        monkeypatch.setattr(host.view, "low_rank", lambda x, A, B: seen.append(tuple(A.shape)) or low_rank(x, A, B))  # type: ignore[union-attr]
        loss(random_weights(sites, 3))
        A = host.factors[NAME].A
    assert seen == [tuple(A.shape)]
    assert len(A) == 4 + 2 + 4, "the ranks of all"


def test_weights_of_one_adapter_alone_are_that_adapter() -> None:
    adapters = several()
    for one, adapter in enumerate(adapters):
        attach_adapter(model := tiny_model(), adapter)
        with layer_loss(tiny_model(), adapters, packs()) as (sites, present, loss):
            a = torch.zeros(present.shape)
            a[:, one] = 1
            assert loss(a) == pytest.approx(naive_loss(model, rows()), abs=1e-5)
        weights = {site: [float(i == one) for i in range(3)] for site in sites}
        made = compose(tiny_model(), adapters, by="cat", weights=weights)
        attach_adapter(found := tiny_model(), made.adapter)
        close(logits(found), logits(model), "one-hot")
        assert made.sites.keys() == {site for site, has in zip(sites, present[:, one].tolist(), strict=True) if has}


def test_the_composed_adapter_has_the_loss_that_was_found_and_it_is_no_larger_than_at_the_start() -> None:
    adapters = several()
    for evaluations in (1, 2, 9):
        found = learn_layer_weights(tiny_model(), adapters, packs(), evaluations=evaluations, learning_rate=0.1)
        assert found.evaluations == evaluations
        assert found.value <= found.start
        uniform = compose(tiny_model(), adapters, weights=[1 / 3] * 3).adapter
        learned = compose(tiny_model(), adapters, by="cat", weights=found.weights).adapter
        for adapter, loss in ((uniform, found.start), (learned, found.value)):
            attach_adapter(model := tiny_model(), adapter)
            assert naive_loss(model, rows()) == pytest.approx(loss, abs=1e-5)
    assert found.value < found.start - 1e-3


def test_a_weight_for_each_layer_that_wrote_the_rows_is_found() -> None:
    """One adapter was used in the first layer, another in the second: no weight for a whole adapter does this."""
    adapters = [trained(seed=seed, base=telling(), targets=("q_proj", "down_proj", "up_proj")) for seed in (1, 2)]
    with layer_loss(telling(), adapters, packs()) as (sites, _, _):
        truth = {site: [1.0, 0.0] if ".layers.0." in site else [0.0, 1.0] for site in sites}
    attach_adapter(target := telling(), compose(telling(), adapters, by="cat", weights=truth).adapter)
    examples = sampled(target, 24, 40)
    found = learn_layer_weights(telling(), adapters, packs(examples, packed=True), evaluations=40, learning_rate=0.1)
    assert found.value == pytest.approx(naive_loss(target, examples), abs=0.02)
    assert found.value < found.start - 0.05
    assert abs(found.weights[LAST][1] - 1) < 0.2
    assert abs(found.weights[LAST][0]) < 0.2


def test_the_model_is_left_as_it_was_and_a_loss_that_is_not_finite_is_refused() -> None:
    model = tiny_model()
    before = logits(model)
    learn_layer_weights(model, several(), packs(), evaluations=2, learning_rate=0.1)
    assert not hosts(model)
    assert torch.equal(logits(model), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    nn.init.constant_(model.model.norm.weight, float("nan"))
    with raises("recipe/unusable-score"):
        learn_layer_weights(model, several(), packs(), evaluations=2, learning_rate=0.1)


def test_weights_of_layers_must_be_those_of_the_layers() -> None:
    adapters = [trained(targets=("q_proj",)), trained(targets=("q_proj",), seed=2)]
    site = "model.layers.{}.self_attn.q_proj"
    good = {site.format(0): [1.0, 0.5], site.format(1): [0.3, -1.0]}
    for by in ("cat", "ties"):
        compose(tiny_model(), adapters, by=by, weights=good)
    for wrong, match in (
        ({site.format(0): [1.0, 0.5]}, "layers.1.self_attn.q_proj has no weights"),
        (good | {"model.layers.1.self_attn.k_proj": [1.0, 1.0]}, "no adapter changes.*q_proj"),
        (good | {site.format(1): [1.0]}, "1 weights for 2 adapters"),
    ):
        with raises("recipe/unusable-weights", match=match):
            compose(tiny_model(), adapters, by="cat", weights=wrong)
    elsewhere = trained(targets=("k_proj",))
    with raises("recipe/unusable-weights", match="change a layer are 0"):
        everywhere = [*good, *(key.replace("q_proj", "k_proj") for key in good)]
        absent = {key: [float("k_proj" in key), float("q_proj" in key)] for key in everywhere}
        compose(tiny_model(), [adapters[0], elsewhere], by="cat", weights=absent)
