"""LoRA.rar: what the network sees and says, its file, and what it learns from a library of adapters."""

from itertools import combinations
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from graftlm.adapters.load import attach_adapter
from graftlm.combine.compose import compose
from graftlm.combine.core import Change
from graftlm.combine.rules.lora_rar import LoraRarConfig, Merger
from graftlm.combine.train_merger import TrainedMerger, backward, objective, train_merger, train_on
from graftlm.model.registry import hosts
from graftlm.testing import tiny_model
from graftlm.testing.deltas import close, logits
from tests.combine.sites import D_IN, D_OUT, changes, composed, in_other_factors, rule_of
from tests.combine.test_search import trained
from tests.errors import raises


def random_merger(*widths: int) -> Merger:
    merger = Merger.new(widths or (D_OUT,), seed=0, hidden=8)
    merger.tensors["output.weight"] = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    return merger


@pytest.fixture
def network(tmp_path: Path) -> str:
    return str(random_merger().save(tmp_path / "network.safetensors"))


def by_hand(merger: Merger, M1: Tensor, M2: Tensor) -> Tensor:
    """m [2, d_in], a column at a time."""
    t = {key: tensor.double() for key, tensor in merger.tensors.items()}
    size = ((M1.square().sum() + M2.square().sum()) / (2 * M1.shape[1])).sqrt()
    columns = []
    for j in range(M1.shape[1]):
        c = torch.cat([M1[:, j], M2[:, j]]) / size
        hidden = torch.relu(t[f"input.{len(M1)}.weight"] @ c + t[f"input.{len(M1)}.bias"])
        columns.append(t["output.weight"] @ hidden + t["output.bias"])
    return torch.stack(columns, 1)


def test_the_rule_is_its_equation_with_the_larger_adapter_first(network: str) -> None:
    given, weights = changes(3, 2), [1.0, -0.7]
    scaled = [w * one.matrix() for one, w in zip(given, weights, strict=True)]
    first, second = sorted(scaled, key=lambda M: -float(M.norm()))
    m = by_hand(random_merger(), first, second)
    assert float((m - 1).abs().mean()) > 0.3
    wanted = first @ m[0].diag() + second @ m[1].diag()
    for order in ([0, 1], [1, 0]):
        found = composed(
            [given[i] for i in order], [weights[i] for i in order], rule_of("lora-rar", network=network), rank=5
        )
        close(found, wanted, "exact at the sum of the ranks", 1e-9)
    other = [in_other_factors(one, seed) for seed, one in enumerate(given)]
    close(composed(other, weights, rule_of("lora-rar", network=network), rank=5), wanted, "other factors", 1e-8)


def test_columns_in_another_order_have_their_weights_in_that_order() -> None:
    M1, M2 = (one.matrix() for one in changes(3, 2))
    order = torch.randperm(D_IN, generator=torch.Generator().manual_seed(0))
    merger = random_merger()
    close(merger.weights([M1[:, order]], [M2[:, order]]), merger.weights([M1], [M2])[:, order], "permuted", 1e-12)


def test_factors_and_whole_matrices_have_the_same_weights_and_their_common_size_does_not_matter() -> None:
    one, other = changes(3, 2)
    merger = random_merger()
    wanted = merger.weights([one.matrix()], [other.matrix()])
    factors = [[each.scale * each.B, each.A] for each in (one, other)]
    close(merger.weights(*factors), wanted, "factors", 1e-10)
    close(merger.weights([7 * one.matrix()], [7 * other.matrix()]), wanted, "size", 1e-10)


def test_one_adapter_is_itself_and_a_new_network_is_the_sum(tmp_path: Path, network: str) -> None:
    given = changes(3, 2)
    rule = rule_of("lora-rar", network=network)
    close(composed(given[:1], [1.0], rule, rank=3), given[0].matrix(), "one", 1e-9)
    fresh = str(Merger.new([D_OUT], seed=0).save(tmp_path / "new.safetensors"))
    summed = given[0].matrix() + 0.5 * given[1].matrix()
    close(composed(given, [1.0, 0.5], rule_of("lora-rar", network=fresh), rank=5), summed, "the sum", 1e-9)


def test_a_network_reads_as_it_was_written_and_other_files_are_refused(tmp_path: Path) -> None:
    merger = random_merger(5, 7)
    again = Merger.read(merger.save(tmp_path / "folder" / "network.safetensors"))
    assert again.widths == [5, 7]
    assert again.tensors.keys() == merger.tensors.keys()
    assert all(torch.equal(again.tensors[key], tensor) for key, tensor in merger.tensors.items())
    with raises("recipe/no-such-file"):
        Merger.read(tmp_path / "absent")
    save_file({"output.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    (tmp_path / "text").write_text("no tensors")
    for name in ("other.safetensors", "text"):
        with raises("recipe/unusable-network", match="train_merger"):
            Merger.read(tmp_path / name)
    with raises("recipe/missing-option", match="--set network=FILE"):
        rule_of("lora-rar")
    known = str(tmp_path / "folder" / "network.safetensors")
    with raises("recipe/unusable-network", match="5, 7 outputs, and this one has 13"):
        composed(changes(3, 2), [1.0, 1.0], rule_of("lora-rar", network=known), rank=5)


# Training -----------------------------------------------------------------------------------------------------------


def owner(seed: int) -> dict[str, Change]:
    """An adapter whose changes are large at the inputs that it reads, a third of them, and small noise elsewhere."""
    random = torch.Generator().manual_seed(seed)
    found = {}
    for site in ("one", "two"):
        own = torch.rand(D_IN, generator=random) < 1 / 3
        A = torch.randn(3, D_IN, generator=random) * torch.where(own, 1.0, 0.3)
        found[site] = Change(A, torch.randn(D_OUT, 3, generator=random), 1.0)
    return found


def learned(count: int, steps: int = 400) -> TrainedMerger:
    library = [owner(seed) for seed in range(count)]
    return train_on(library, steps, learning_rate=0.003, balance=0.01, hidden=16, seed=0)


def test_on_pairs_that_it_never_saw_a_network_is_better_than_the_sum_and_the_mean() -> None:
    made = learned(40)
    unseen = [owner(seed) for seed in range(100, 106)]
    half = Merger.new([D_OUT], seed=0)
    half.tensors["output.bias"] = torch.full((2,), 0.5)
    pairs = [(first[site], second[site]) for first, second in combinations(unseen, 2) for site in first]
    network, summed, mean = ([objective(merger, *pair, 0.01) for pair in pairs] for merger in (made.merger, None, half))
    assert sum(network) < 0.9 * sum(summed) < 0.9 * sum(mean)
    better = sum(found < uniform for found, uniform in zip(network, summed, strict=True))
    assert better >= 0.8 * len(pairs)


def test_the_seed_determines_the_network() -> None:
    first, again = learned(3, steps=5), learned(3, steps=5)
    assert first.losses == again.losses
    assert all(torch.equal(again.merger.tensors[key], tensor) for key, tensor in first.merger.tensors.items())


def test_the_gradient_of_a_step_is_that_of_the_definition() -> None:
    first, second = owner(1)["one"], owner(2)["one"]
    merger = random_merger()
    parameters = {key: tensor.double().requires_grad_() for key, tensor in merger.tensors.items()}
    M1, M2 = sorted((first.matrix(), second.matrix()), key=lambda M: -float(M.norm()))
    m = Merger(parameters).weights([M1], [M2])
    M = M1 * m[0] + M2 * m[1]
    loss = 0.01 * (m[0] * m[1]).abs().mean()
    for own in (M1, M2):
        loss = loss + ((M - own) @ own.T).square().sum() / (own @ own.T).square().sum()
    loss.backward()
    assert objective(merger, first, second, 0.01) == pytest.approx(float(loss.detach()), rel=1e-4)
    trained_tensors = {key: tensor.clone().requires_grad_() for key, tensor in merger.tensors.items()}
    backward(Merger(trained_tensors), first, second, 0.01, 1)
    for key, tensor in trained_tensors.items():
        wanted = parameters[key].grad
        assert tensor.grad is not None
        assert wanted is not None
        close(tensor.grad.double(), wanted, key, 1e-4)


def test_a_library_of_adapters_makes_a_network_that_composes_them(tmp_path: Path) -> None:
    adapters = [trained(seed=seed) for seed in (1, 2, 3)]
    model = tiny_model()
    made = train_merger(model, adapters, steps=20, hidden=16)
    assert not hosts(model)
    file = str(made.merger.save(tmp_path / "network.safetensors"))
    by = LoraRarConfig(network=file)
    found = compose(tiny_model(), adapters[:2], by=by, rank=8)
    assert max(site.error for site in found.sites.values()) < 1e-6
    attach_adapter(model, found.adapter)
    assert bool(logits(model).isfinite().all())
    alone = compose(tiny_model(), adapters[:2], by=by, weights=[1.0, 0.0], rank=8)
    attach_adapter(itself := tiny_model(), alone.adapter)
    attach_adapter(wanted := tiny_model(), adapters[0])
    close(logits(itself), logits(wanted), "weights 1 and 0")
    with raises("recipe/too-many-adapters"):
        compose(tiny_model(), adapters, by=by, rank=8)
    with raises("recipe/unusable-settings", match="two adapters or more"):
        train_merger(tiny_model(), adapters[:1])
