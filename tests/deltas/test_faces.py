"""The faces of a method that LoRA has not: deltas made for these tests, alone and mixed with LoRA on one layer."""

from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from graftlm.config.schema import config
from graftlm.deltas import METHODS, Method
from graftlm.deltas.base import AdditiveDelta, AroundDelta, Base, Delta, DeltaConfig, Site, WeightDelta
from graftlm.deltas.lora import LoraConfig
from graftlm.model.attach import attach, detach
from graftlm.model.hosts import LayerHost
from graftlm.model.modes import activate, deltas_off
from graftlm.model.registry import hosts, trainable
from graftlm.model.state_dict import merged_state
from graftlm.testing import tiny_model
from graftlm.testing.contract import CONTRACT
from graftlm.testing.deltas import close, ids, logits, perturbed
from tests.errors import raises
from tests.peers import relative_error


@config
class GainConfig(DeltaConfig):
    method: Literal["gain"] = "gain"


class Gain(WeightDelta):
    """W' = diag(g) W, b' = g b: the rows of W, each times a number."""

    family, paper, formula = "specification", "arXiv: made for a test", "d_out"

    def __init__(self, site: Site, config: GainConfig) -> None:
        super().__init__(site, config)
        self.gain = nn.Parameter(torch.ones(site.d_out))

    def effective(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.gain[:, None] * W, None if b is None else self.gain * b


@config
class ShiftConfig(DeltaConfig):
    method: Literal["shift"] = "shift"


class Shift(WeightDelta):
    """b' = b + s, also where the base has no bias."""

    family, paper, formula = "specification", "arXiv: made for a test", "d_out"

    def __init__(self, site: Site, config: ShiftConfig) -> None:
        super().__init__(site, config)
        self.shift = nn.Parameter(torch.zeros(site.d_out))

    def effective(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return W, self.shift if b is None else b + self.shift


@config
class SparseConfig(DeltaConfig):
    method: Literal["sparse"] = "sparse"


class Sparse(AdditiveDelta):
    """dW: its first row alone. No factors, only a matrix."""

    family, paper, formula = "specification", "arXiv: made for a test", "d_in"

    def __init__(self, site: Site, config: SparseConfig) -> None:
        super().__init__(site, config)
        self.row = nn.Parameter(torch.zeros(site.d_in))

    def matrix(self) -> Tensor:
        first = torch.zeros(self.site.d_out, 1)
        first[0] = 1
        return first * self.row


@config
class BottleneckConfig(DeltaConfig):
    method: Literal["bottleneck"] = "bottleneck"


class Bottleneck(Delta):
    """y' = y + U tanh(D y): no change of weights. Its halves are layers, on which no other delta may sit."""

    family, paper, formula = "addition", "arXiv: made for a test", "4 * d_out + 4 + 4 * d_out + d_out"
    not_mergeable = "there is a tanh in it"

    def __init__(self, site: Site, config: BottleneckConfig) -> None:
        super().__init__(site, config)
        self.down, self.up = nn.Linear(site.d_out, 4), nn.Linear(4, site.d_out)
        for parameter in self.down.parameters():
            nn.init.uniform_(parameter, -0.3, 0.3, generator=site.generator())
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, y: Tensor, base: Base) -> Tensor:
        inner = y.float() if y.dtype != torch.float32 else y
        return y + self.up(torch.tanh(self.down(inner))).to(y.dtype)


FACES = {
    "gain": Method(GainConfig, Gain),
    "shift": Method(ShiftConfig, Shift),
    "sparse": Method(SparseConfig, Sparse),
    "bottleneck": Method(BottleneckConfig, Bottleneck),
}


@pytest.fixture(autouse=True)
def _faces(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, method in FACES.items():
        monkeypatch.setitem(METHODS, name, method)


def config_of(name: str, **changes: Any) -> DeltaConfig:
    made: Any = METHODS[name].config
    return made(**({"r": 4, "alpha": 6} if name == "lora" else {}) | changes)


def with_deltas(
    *names: str, targets: tuple[str, ...] = ("q_proj", "down_proj"), base: Any = None, **changes: Any
) -> Any:
    """A tiny model with these methods attached in this order, each moved away from its start."""
    model = tiny_model(attention_bias=True) if base is None else base
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(len(key)))
    for number, name in enumerate(names):
        attach(model, config_of(name, **changes), name=f"d{number}", targets=targets)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("name", [n for n, method in METHODS.items() if issubclass(method.delta, AroundDelta)])
def test_what_stands_around_the_base_is_the_equation(name: str) -> None:
    """Outputs and all gradients of output(base(input(x))) against x W'^T + b', at every layer."""
    model = perturbed(name, tiny_model(attention_bias=True))
    found = [host for host in hosts(model).values() if isinstance(host, LayerHost) and host.view.kind == "linear"]
    assert found
    for host in found:
        (delta,) = host.on()
        assert isinstance(delta, AroundDelta)
        x = torch.randn(5, host.view.d_in, generator=torch.Generator().manual_seed(9)).requires_grad_()
        learnt = [x, *delta.parameters()]
        inner, factors = delta.input(x), delta.inside()
        assert inner is not None
        assert factors is None or inner is x
        z = host.view(inner) if factors is None else host.view.low_rank(x, *factors)
        outputs = [
            delta.output(z, x, host.view),
            host.view.apply(x, *delta.effective(host.view.weight, host.view.bias)),
        ]
        assert relative_error(*outputs) <= 1e-6
        numbers = torch.linspace(-1, 1, outputs[0].numel()).view_as(outputs[0])
        gradients = [torch.autograd.grad((y * numbers).sum(), learnt) for y in outputs]
        for one, other in zip(*gradients, strict=True):
            close(one, other, f"gradient at {delta.site.name}")


NOT_SAVED = {"save_load_save_is_stable"}  # these have no place in PEFT's layout, and so none on disk


@pytest.mark.parametrize("clause", sorted(CONTRACT.keys() - NOT_SAVED))
@pytest.mark.parametrize("name", FACES)
def test_the_contract_holds_for_every_face(name: str, clause: str) -> None:
    CONTRACT[clause](name)


def test_the_table_tells_the_faces_apart() -> None:
    facts = {name: (METHODS[name].mergeable, METHODS[name].has_factors) for name in ("lora", *FACES)}
    assert facts == {
        "lora": (True, True),
        "gain": (True, False),
        "shift": (True, False),
        "sparse": (True, False),
        "bottleneck": (False, False),
    }


def site_parts(model: Any) -> tuple[Any, Tensor, Tensor, Tensor, dict[str, Any]]:
    """(host, x, W, b, deltas by method) of the first q_proj."""
    host = model.model.layers[0].self_attn.q_proj
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(9))
    return host, x, host.base.weight, host.base.bias, {d.config.method: d for d in host.deltas.values()}


def test_a_change_of_weights_is_folded_in_the_order_of_attaching() -> None:
    host, x, W, b, d = site_parts(with_deltas("lora", "gain"))
    A, B = d["lora"].A, 6 / 4 * d["lora"].B
    wanted = (x @ (W + B @ A).T + b) * d["gain"].gain
    assert relative_error(host(x), wanted) <= 1e-5
    host, x, W, b, d = site_parts(with_deltas("gain", "lora"))
    A, B = d["lora"].A, 6 / 4 * d["lora"].B
    wanted = (x @ W.T + b) * d["gain"].gain + x @ A.T @ B.T
    assert relative_error(host(x), wanted) <= 1e-5


def test_the_order_of_activating_is_the_order_of_folding() -> None:
    model = with_deltas("lora", "gain")
    host, x, W, b, d = site_parts(model)
    activate(model, "d1", "d0")
    wanted = (x @ W.T + b) * d["gain"].gain + x @ d["lora"].A.T @ (6 / 4 * d["lora"].B).T
    assert relative_error(host(x), wanted) <= 1e-5


def test_additive_deltas_with_and_without_factors_add() -> None:
    host, x, W, b, d = site_parts(with_deltas("sparse", "lora"))
    wanted = x @ W.T + b + x @ d["lora"].A.T @ (6 / 4 * d["lora"].B).T
    wanted[:, 0] += x @ d["sparse"].row
    assert relative_error(host(x), wanted) <= 1e-5


@pytest.mark.parametrize(
    "order", [("bottleneck", "lora"), ("lora", "bottleneck"), ("bottleneck", "gain"), ("gain", "bottleneck")]
)
def test_a_delta_on_the_output_acts_on_what_the_changed_weights_give_in_either_order(order: tuple[str, str]) -> None:
    host, x, W, b, d = site_parts(with_deltas(*order))
    if "lora" in d:
        y = x @ W.T + b + x @ d["lora"].A.T @ (6 / 4 * d["lora"].B).T
    else:
        y = (x @ W.T + b) * d["gain"].gain
    wanted = y + torch.tanh(y @ d["bottleneck"].down.weight.T + d["bottleneck"].down.bias) @ d["bottleneck"].up.weight.T
    assert relative_error(host(x), wanted + d["bottleneck"].up.bias) <= 1e-5


@pytest.mark.parametrize(
    "names", [("gain", "lora"), ("lora", "gain", "shift"), ("sparse", "shift", "lora"), ("shift",)]
)
def test_any_mix_of_weight_changes_merges_to_what_the_model_computes(names: tuple[str, ...]) -> None:
    model = with_deltas(*names)
    state = merged_state(model)
    plain = tiny_model(attention_bias=True)
    for name, _ in hosts(model).items():  # a layer that had no bias gets one where a delta made it
        if f"{name}.bias" in state:
            layer = plain.get_submodule(name)
            layer.bias = nn.Parameter(torch.zeros(layer.out_features))
    plain.load_state_dict(state)
    assert relative_error(logits(plain), logits(model)) <= 1e-5


def test_a_mix_with_a_delta_that_is_no_change_of_weights_refuses_to_merge_and_names_it() -> None:
    model = with_deltas("lora", "bottleneck")
    with raises("target/not-mergeable", match=r"'d1' \(Bottleneck\)"):
        merged_state(model)
    activate(model, "d0")
    assert merged_state(model).keys() == tiny_model(attention_bias=True).state_dict().keys()


def test_every_delta_of_a_mix_gets_a_gradient_and_off_is_the_base() -> None:
    base = tiny_model(attention_bias=True)
    model = with_deltas("gain", "bottleneck", "lora", "sparse", base=base)
    model(ids()).logits.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in trainable(model).values())
    on = logits(model)
    with deltas_off(model):
        off = logits(model)
    detach(model)
    assert torch.equal(off, logits(model))
    assert not torch.equal(off, on)


def test_no_delta_is_put_on_the_layers_of_another_delta() -> None:
    model = with_deltas("bottleneck")
    attach(model, LoraConfig(r=2), name="second", targets="all-linear")
    assert not [name for name, module in model.named_modules() if name.endswith(("down.base", "up.base"))]
    assert len([h for h in hosts(model).values() if "second" in h.deltas]) == 14


def test_what_a_merged_state_holds_shares_no_memory_with_the_model() -> None:
    model = with_deltas("shift", "lora")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for tensor in merged_state(model).values():
        tensor.add_(1)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key


@pytest.mark.parametrize(
    "names", [("gain",), ("lora", "gain"), ("shift", "gain"), ("bottleneck",), ("sparse", "bottleneck")]
)
def test_dropout_reaches_every_face_in_training_and_none_in_evaluation(names: tuple[str, ...]) -> None:
    plain, dropping = with_deltas(*names), with_deltas(*names, dropout=0.5)
    assert torch.equal(logits(dropping), logits(plain))
    _, x, *_ = site_parts(plain)
    host = dropping.model.layers[0].self_attn.q_proj
    host.deltas.train()
    torch.manual_seed(0)
    with torch.no_grad():
        different = [host(x) for _ in range(2)]
    if names == ("bottleneck",):  # which does not look at x
        assert torch.equal(*different)
    else:
        assert not torch.equal(*different)


def test_with_dropout_the_mean_over_many_draws_is_the_output_without() -> None:
    """Only what a delta adds is dropped, and it is scaled by 1 / (1 - p): the mean is exact for changes of weights."""
    dropping = with_deltas("lora", "gain", dropout=0.25)
    host, x, *_ = site_parts(dropping)
    with torch.no_grad():
        wanted = host(x)
        host.deltas.train()
        torch.manual_seed(0)
        draws = torch.stack([host(x) for _ in range(4000)])
    standard_error = draws.std(0) / len(draws) ** 0.5
    assert bool(((draws.mean(0) - wanted).abs() <= 5 * standard_error + 1e-5).all())
