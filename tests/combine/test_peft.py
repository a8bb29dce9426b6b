"""Against PEFT's `add_weighted_adapter`, whole matrices: its combinations in its convention."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraModel, PeftModel
from torch import Tensor

from graftlm.adapters.adapter import Adapter
from graftlm.combine.compose import Composition, compose
from graftlm.combine.rules import COMPOSERS
from graftlm.model.sites import site_seed
from graftlm.testing import tiny_model
from graftlm.testing.deltas import close
from tests.combine.test_compose import matrices, trained

SITE = "model.layers.0.self_attn.q_proj"
ONE = SITE.replace(".", r"\.")


def seeded(method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*given: Any, **named: Any) -> Any:
        torch.manual_seed(site_seed(0, SITE))
        return method(*given, **named)

    return call


@pytest.fixture(autouse=True)
def _one_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT draws what DARE drops right after the factors of the new adapter, from one generator: seed it in between."""
    for method in (
        "_generalized_task_arithmetic_weighted_adapter",
        "_svd_generalized_task_arithmetic_weighted_adapter",
    ):
        monkeypatch.setattr(LoraModel, method, seeded(getattr(LoraModel, method)))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Adapter, Adapter]:
    """Of one layer: PEFT draws the random numbers of all layers in a row, and we those of each by itself. The first is
    the larger one, so that both draw for it first."""
    folder = tmp_path_factory.mktemp("adapters")
    first = trained("lora", seed=1, targets=ONE, alpha=14.0)
    second = trained("lora", seed=2, targets=ONE, alpha=3.0)
    return Adapter.read(first.write(folder / "first")), Adapter.read(second.write(folder / "second"))


def of_peft(adapters: tuple[Adapter, Adapter], weights: list[float], kind: str, **options: Any) -> Tensor:
    first, second = (str(each.source) for each in adapters)
    model = PeftModel.from_pretrained(tiny_model(), first, adapter_name="first")
    model.load_adapter(second, adapter_name="second")
    model.add_weighted_adapter(["first", "second"], weights, "made", combination_type=kind, **options)
    found: Tensor = model.get_submodule(f"base_model.model.{SITE}").get_delta_weight("made").detach()
    return found


def ours(adapters: tuple[Adapter, Adapter], weights: list[float], name: str, **options: Any) -> Composition:
    own = {key: options.pop(key) for key in list(options) if key in ("density", "combine", "majority")}
    by = COMPOSERS[name].config(name=name, **own)
    return compose(tiny_model(), adapters, by=by, weights=weights, **options)


PEFT: dict[str, Any] = {"convention": "peft"}
FACTORS: dict[str, Any] = {"space": "factors"}
PRODUCT: dict[str, Any] = {"space": "product", "rank": 8}
CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "linear": ({}, "peft-linear", {}),
    "cat": ({}, "linear", {}),
    "svd": ({"svd_rank": 3}, "svd", {"rank": 3}),
    "ties": ({"density": 0.6}, "ties", FACTORS | PEFT),
    "ties frequency": ({"density": 0.6, "majority_sign_method": "frequency"}, "ties", FACTORS | PEFT),
    "ties_svd": ({"density": 0.6, "svd_rank": 8}, "ties", PRODUCT | PEFT),
    "magnitude_prune": ({"density": 0.6}, "magnitude", FACTORS),
    "magnitude_prune_svd": ({"density": 0.6, "svd_rank": 8}, "magnitude", PRODUCT),
    "dare_linear": ({"density": 0.6}, "dare", FACTORS | PEFT),
    "dare_ties": ({"density": 0.6}, "dare", FACTORS | PEFT | {"combine": "ties"}),
    "dare_linear_svd": ({"density": 0.6, "svd_rank": 8}, "dare", PRODUCT | PEFT),
    "dare_ties_svd": ({"density": 0.6, "svd_rank": 8}, "dare", PRODUCT | PEFT | {"combine": "ties"}),
}


@pytest.mark.parametrize("weights", [[0.5, 0.5], [1.0, 0.25], [0.7, -0.4], [1.0, 0.0]])
@pytest.mark.parametrize("case", CASES)
def test_in_its_convention_the_result_is_pefts(
    adapters: tuple[Adapter, Adapter], case: str, weights: list[float]
) -> None:
    theirs, name, options = CASES[case]
    own = dict(options)
    if "density" in theirs:
        own["density"] = theirs["density"]
    if "majority_sign_method" in theirs:
        own["majority"] = theirs["majority_sign_method"]
    wanted = of_peft(adapters, weights, case.partition(" ")[0], **theirs)
    made = ours(adapters, weights, name, **own)
    close(matrices(made)[SITE], wanted.double(), case)


def test_pefts_sum_of_factors_has_cross_terms_and_ours_has_none(adapters: tuple[Adapter, Adapter]) -> None:
    made = ours(adapters, [0.5, 0.5], "peft-linear")
    wanted, theirs = matrices(ours(adapters, [0.5, 0.5], "linear"))[SITE], of_peft(adapters, [0.5, 0.5], "linear")
    apart = float((theirs - wanted).norm() / theirs.norm())
    assert made.sites[SITE].cross_share == pytest.approx(apart, rel=1e-4)
    assert apart > 0.2


def test_cat_of_rslora_is_scaled_too_high_in_peft_and_not_here(tmp_path: Path) -> None:
    pair = [trained("lora", seed=s, targets=ONE, rslora=True) for s in (1, 2)]
    read: Callable[[Adapter, str], Adapter] = lambda a, name: Adapter.read(a.write(tmp_path / name))  # noqa: E731
    both = read(pair[0], "first"), read(pair[1], "second")
    found = matrices(ours(both, [1.0, 1.0], "linear"))[SITE]
    close(8**0.5 * found, of_peft(both, [1.0, 1.0], "cat").double(), "PEFT keeps use_rslora: x sqrt(4 + 4)")
