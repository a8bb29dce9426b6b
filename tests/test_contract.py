"""The contract of a method, over the whole table; and proof that it catches what it is there for.

The second half plants mistakes in LoRA, one at a time, and asks for the clause that must notice it. A contract cannot
see an equation that is wrong in all its faces: that is what the comparisons with other implementations are for.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftlm.testing.contract
from graftlm.deltas import METHODS, Method
from graftlm.deltas.base import Base, PeftLayout, Site
from graftlm.deltas.bitfit import BitFit
from graftlm.deltas.dora import Dora
from graftlm.deltas.houlsby import Houlsby
from graftlm.deltas.ia3 import Ia3
from graftlm.deltas.lora import Lora, LoraConfig
from graftlm.deltas.reslora import ResLora
from graftlm.deltas.vera import Vera
from graftlm.model.registry import hosts
from graftlm.testing import tiny_model
from graftlm.testing.contract import CONTRACT, check_method, pairs_with, sort_of, two_deltas_compose_as
from graftlm.testing.deltas import attach_tiny, close, logits

SAMPLE = ("lora", "dora", "ia3", "houlsby", "prefix", "prompt", "norm-tuning", "trainable-tokens")
"""One method for each kind of place in a model: these run with every set of library versions too."""


@pytest.mark.sampled
@pytest.mark.parametrize("clause", CONTRACT)
@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=[pytest.mark.versions] if m in SAMPLE else []) for m in METHODS]
)
def test_method_keeps(method: str, clause: str) -> None:
    CONTRACT[clause](method)


@pytest.mark.long(group="compose")
@pytest.mark.parametrize("method", METHODS)
def test_method_composes_with_every_other(method: str) -> None:
    for other in pairs_with(method):
        two_deltas_compose_as(method, other)


def test_pairs_of_deltas_meet_every_sort_and_every_method(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs: set[tuple[str, str]] = set()
    monkeypatch.setattr(graftlm.testing.contract, "two_deltas_compose_as", lambda name, other: pairs.add((name, other)))
    for method in METHODS:
        CONTRACT["two_deltas_compose"](method)
    able = pairs_with("lora")
    assert {name for name, _ in pairs} == {other for _, other in pairs} == set(able)
    for method in able:
        met = [sort_of(other) for name, other in pairs if name == method]
        assert sorted(met) == sorted({sort_of(other) for other in able})


def test_check_method_runs_every_clause(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    for title in CONTRACT:
        monkeypatch.setitem(CONTRACT, title, lambda name, title=title: seen.append(f"{name} {title}"))
    check_method("lora")
    assert seen == [f"lora {title}" for title in CONTRACT]


# Planted mistakes ------------------------------------------------------------------------------------------------


class StartsAwayFromZero(Lora):
    def __init__(self, site: Site, config: LoraConfig) -> None:
        super().__init__(site, config)
        nn.init.ones_(self.B)


class MatrixForgetsTheScale(Lora):
    def matrix(self) -> Tensor:
        return self.B @ self.A


class MatrixIsTransposedWhereItIsSquare(Lora):
    def matrix(self) -> Tensor:
        made = super().matrix()
        return made.T if made.shape[0] == made.shape[1] else made


class IncrementIsHalf(Lora):
    def increment(self, x: Tensor, base: Base) -> Tensor:
        return super().increment(x, base) / 2


class FrozenA(Lora):
    def __init__(self, site: Site, config: LoraConfig) -> None:
        super().__init__(site, config)
        self.A.requires_grad_(False)


class GradientOfAIsCut(Lora):
    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A.detach(), self.scale * self.B


class GradientOfBIsZero(Lora):
    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A, self.scale * self.B.detach() + 0 * self.B


class MatrixHasAnotherGradient(Lora):
    """The right numbers on every path, but the equation says that the scale is learnt twice."""

    def matrix(self) -> Tensor:
        A, B = self.factors()
        return B @ A + (B - B.detach()) @ A.detach()


class ChangesTheBaseInPlace(Lora):
    """By so little that no tolerance notices: only the demand for the same bits does."""

    def factors(self) -> tuple[Tensor, Tensor]:
        weight = self.site.weight()
        assert weight is not None
        weight.mul_(1 + 2**-22)
        return super().factors()


class MergingChangesTheBaseInPlace(Lora):
    def matrix(self) -> Tensor:
        weight = self.site.weight()
        assert weight is not None
        weight.mul_(1 + 2**-22)
        return super().matrix()


class FormulaIsWrong(Lora):
    formula = "r * d_in + d_out"


class OneTensorIsNotSaved(Lora):
    peft = PeftLayout(type="LORA", tensors={"A": "lora_A.weight"}, fields={"r": "r", "alpha": "lora_alpha"})


class TwoTensorsUnderOneName(Lora):
    peft = PeftLayout(
        type="LORA", tensors={"A": "lora_A.weight", "B": "lora_A.weight"}, fields={"r": "r", "alpha": "lora_alpha"}
    )


class SavesATensorThatItHasNot(Lora):
    peft = PeftLayout(
        type="LORA", tensors={"A": "lora_A.weight", "C": "lora_B.weight"}, fields={"r": "r", "alpha": "lora_alpha"}
    )


class StartComesFromTheGlobalGenerator(Lora):
    def __init__(self, site: Site, config: LoraConfig) -> None:
        super().__init__(site, config)
        nn.init.uniform_(self.A, -0.1, 0.1)


class StartIgnoresTheSeed(Lora):
    def __init__(self, site: Site, config: LoraConfig) -> None:
        super().__init__(Site(site.name, site.d_in, site.d_out, site.weight, seed=0), config)


class HalfPrecisionParameters(Lora):
    def __init__(self, site: Site, config: LoraConfig) -> None:
        super().__init__(site, config)
        self.bfloat16()


class ForwardsAreCounted(Lora):
    """A hidden state that the equation does not have: what comes out depends on how often it was asked."""

    forwards = 0

    def factors(self) -> tuple[Tensor, Tensor]:
        self.forwards += 1
        A, B = super().factors()
        return A, B * (1 + 0.1 * self.forwards)


MISTAKES: dict[type[Lora], str] = {
    StartsAwayFromZero: "identity_at_start",
    MatrixForgetsTheScale: "fast_path_is_the_equation",
    MatrixIsTransposedWhereItIsSquare: "fast_path_is_the_equation",
    IncrementIsHalf: "fast_path_is_the_equation",
    FrozenA: "parameters_are_as_declared",
    GradientOfAIsCut: "only_the_delta_learns",
    GradientOfBIsZero: "only_the_delta_learns",
    MatrixHasAnotherGradient: "fast_path_is_the_equation",
    ChangesTheBaseInPlace: "off_is_the_base",
    MergingChangesTheBaseInPlace: "merged_is_the_model",
    FormulaIsWrong: "parameters_are_as_declared",
    OneTensorIsNotSaved: "save_load_save_is_stable",
    TwoTensorsUnderOneName: "save_load_save_is_stable",
    SavesATensorThatItHasNot: "save_load_save_is_stable",
    StartComesFromTheGlobalGenerator: "same_seed_same_start",
    StartIgnoresTheSeed: "same_seed_same_start",
    HalfPrecisionParameters: "fast_path_is_the_equation",
    ForwardsAreCounted: "merged_is_the_model",
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: m.__name__)
def test_a_planted_mistake_is_caught_by_the_clause_that_is_there_for_it(
    mistake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "lora", Method(LoraConfig, mistake))
    with pytest.raises(AssertionError) as raised:
        check_method("lora")
    assert str(raised.value).startswith(f"lora: {MISTAKES[mistake]}: ")


class BitFitScalesTheBias(BitFit):
    """PEFT's mistake with biases: what is added is not what is there."""

    def effective(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return W, 2 * self.delta if b is None else b + 2 * self.delta


class DoraScalesTheBias(Dora):
    def forward(self, x: Tensor, y: Tensor, base: Base) -> Tensor:
        y = super().forward(x, y, base)
        return y if base.bias is None else y + 0.5 * base.bias


class DoraForgetsTheCrossTerm(Dora):
    def forward(self, x: Tensor, y: Tensor, base: Base) -> Tensor:
        assert self.V is not None
        A, B = self.V.factors()
        norms = (base.row_norms().square() + ((B @ (A @ A.T)) * B).sum(1)).sqrt()
        return base.low_rank(x, A, B, gain=self.m / norms.detach())


class DoraLearnsThroughTheNorm(Dora):
    """The same numbers, another gradient than the paper's section 4.3."""

    def effective(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert self.V is not None
        V = W + self.V.matrix()
        return (self.m / V.norm(dim=1))[:, None] * V, b


class VeraIsTransposed(Vera):
    def matrix(self) -> Tensor:
        made = super().matrix()
        return made.flip(0)


class VeraKeepsItsProjectionsInEachSite(Vera):
    formula = "d_out + r + r * (d_in + d_out)"

    def __init__(self, site: Site, config: Any) -> None:
        super().__init__(site, config)
        self.shared = site.shared  # registered, and so saved once a site


class Ia3ScalesOutputsByInputs(Ia3):
    def forward(self, x: Tensor, y: Tensor, base: Base) -> Tensor:
        return base(x * self.l) if self.inner else base(x) * self.l[:, 0].flip(0)


class HoulsbyForgetsTheResidual(Houlsby):
    def forward(self, x: Tensor, y: Tensor, base: Base) -> Tensor:
        return super().forward(x, y, base) - y


class ResLoraMixesUpRows(ResLora):
    """A tape that does not keep rows with different deltas apart."""

    def forward(self, x: Tensor, y: Tensor, base: Base) -> Tensor:
        self.site.shared.group = ()  # type: ignore[union-attr]
        return super().forward(x, y, base)


OTHERS: dict[type[Any], tuple[str, str]] = {
    BitFitScalesTheBias: ("bitfit", "fast_path_is_the_equation"),
    DoraScalesTheBias: ("dora", "two_deltas_compose"),
    DoraForgetsTheCrossTerm: ("dora", "fast_path_is_the_equation"),
    DoraLearnsThroughTheNorm: ("dora", "fast_path_is_the_equation"),
    VeraIsTransposed: ("vera", "fast_path_is_the_equation"),
    VeraKeepsItsProjectionsInEachSite: ("vera", "save_load_save_is_stable"),
    Ia3ScalesOutputsByInputs: ("ia3", "fast_path_is_the_equation"),
    HoulsbyForgetsTheResidual: ("houlsby", "identity_at_start"),
    ResLoraMixesUpRows: ("reslora", "rows_of_a_batch"),
}


@pytest.mark.parametrize("mistake", OTHERS, ids=lambda m: m.__name__)
def test_a_mistake_in_another_method_is_caught_too(mistake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name, clause = OTHERS[mistake]
    monkeypatch.setitem(METHODS, name, Method(METHODS[name].config, mistake))
    with pytest.raises(AssertionError) as raised:
        check_method(name)
    assert str(raised.value).startswith(f"{name}: {clause}: ")


def test_a_wrong_offset_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """An init that takes another part out of W than it puts into the factors is no identity."""
    model = tiny_model()
    attach_tiny("lora", model, init="pissa")
    before = logits(tiny_model())
    close(logits(model), before, "a fresh PiSSA is the base")
    for host in hosts(model).values():
        (delta,) = host.on()
        assert delta.offset_B is not None
        delta.offset_B.mul_(1.01)
    with pytest.raises(AssertionError, match="differs by"):
        close(logits(model), before, "a wrong offset")


def test_what_a_method_breaks_by_another_exception_is_told_with_its_clause(monkeypatch: pytest.MonkeyPatch) -> None:
    class Explodes(Lora):
        def factors(self) -> tuple[Tensor, Tensor]:
            raise ZeroDivisionError("no such scale")

    monkeypatch.setitem(METHODS, "lora", Method(LoraConfig, Explodes))
    with pytest.raises(AssertionError, match="lora: identity_at_start: ZeroDivisionError: no such scale"):
        check_method("lora")


def test_the_contract_is_run_on_the_method_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(Lora):
        formula = "0"

    monkeypatch.setitem(METHODS, "other", Method(LoraConfig, Other))
    check_method("lora")  # a bad neighbour in the table does not fail a good method


def test_checkpointing_is_really_on_in_its_clause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the clause would compare a run with itself."""
    calls: list[int] = []

    class Counts(Lora):
        def factors(self) -> tuple[Tensor, Tensor]:
            calls.append(torch.is_grad_enabled())
            return super().factors()

    monkeypatch.setitem(METHODS, "lora", Method(LoraConfig, Counts))
    CONTRACT["checkpointing_changes_nothing"]("lora")
    sites = 14  # seven linear layers in each of two blocks
    assert len(calls) == 5 * sites, "once without checkpointing, twice with ours, twice with that of transformers"
