"""The contract of a method, over the whole table; and proof that it catches what it is there for.

The second half plants mistakes in LoRA, one at a time, and asks for the clause that must notice it. A contract cannot
see an equation that is wrong in all its faces: that is what the comparisons with other implementations are for.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graftlm.deltas import METHODS, Method
from graftlm.deltas.base import Base, PeftLayout, Site
from graftlm.deltas.lora import Lora, LoraConfig
from graftlm.testing import CONTRACT, check_method


@pytest.mark.parametrize("clause", CONTRACT)
@pytest.mark.parametrize("method", METHODS)
def test_method_keeps(method: str, clause: str) -> None:
    CONTRACT[clause](method)


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

    asked = 0

    def factors(self) -> tuple[Tensor, Tensor]:
        self.asked += 1
        A, B = super().factors()
        return A, B * (1 + 0.1 * self.asked)


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
    assert len(calls) == 3 * sites, "once without checkpointing, twice with it"
