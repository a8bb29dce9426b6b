"""What a recipe adds to its objective, whatever that is: penalties on the delta's tensors, and a tie to the base.

    l1             sum |t|                            over the elements t of the tensors
    l2             sum t^2                            through AdamW's moments, which train.weight_decay goes around
    orthogonality  sum ||M M^T - I||_F^2              over matrices M, lying: A A^T and B^T B of LoRA (as AdaLoRA has it
                                                      of its factors, arXiv:2303.10512, equation 4)
    group-lasso    sum sqrt(n_g) ||g||_2              over groups g of n_g elements (Yuan and Lin 2006): rank-one
                                                      components of a product, or whole sites
    kl             mean KL(pi || pi_base)             over supervised tokens, of whole distributions

The first four are functions of the delta alone: added once a step, whatever its packs and ranks, after the backward
pass. kl is a second pass without deltas over each pack and is divided by the supervised tokens of the step.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from graftlm.config.schema import Pattern, PositiveRate, config
from graftlm.errors import TrainingError, numbered
from graftlm.losses.distillation import divergence
from graftlm.model.registry import deltas_by_site, shared_of
from graftlm.model.sites import pattern_matches
from graftlm.training.teacher import REFERENCE, Distance


@config
class RegularizerConfig:
    """The base of all configs of regularisers; each adds `name`, its key in REGULARISERS, and its options."""

    name: str
    weight: PositiveRate
    """What it is multiplied with in the loss; `metrics.jsonl` has it without."""

    @property
    def makes_passes(self) -> bool:
        """Whether the model goes through the packs of a step once more without its deltas."""
        return False


@config
class OfTensorsConfig(RegularizerConfig):
    """Of those that are functions of the delta's tensors."""

    tensors: Pattern = ".*"
    """Regular expression for the end of a tensor's name, which is SITE.DELTA.TENSOR: `B`, or `q_proj.default.A`."""


@config
class L1Config(OfTensorsConfig):
    name: Literal["l1"] = "l1"


@config
class L2Config(OfTensorsConfig):
    name: Literal["l2"] = "l2"


@config
class OrthogonalityConfig(OfTensorsConfig):
    name: Literal["orthogonality"] = "orthogonality"


@config
class GroupLassoConfig(OfTensorsConfig):
    name: Literal["group-lasso"] = "group-lasso"
    by: Literal["component", "site"] = "component"
    """What is pushed to zero together: a row of A with its column of B, or all tensors of a site."""


@config
class KlConfig(RegularizerConfig):
    name: Literal["kl"] = "kl"
    divergence: Literal["forward", "reverse"] = "reverse"
    """reverse weighs log-ratios by the policy's probabilities, forward by those of the base."""

    @property
    def makes_passes(self) -> bool:
        return True

    def distance(self) -> Distance:
        return partial(divergence, self.divergence, 0.5)


@dataclass(frozen=True)
class DeltaTensor:
    site: str
    delta: str
    name: str
    value: Tensor

    def __str__(self) -> str:
        return f"{self.site}.{self.delta}.{self.name}"


# The functions ---------------------------------------------------------------------------------------------------


def l1(config: L1Config, tensors: Sequence[DeltaTensor]) -> Tensor:
    return torch.stack([t.value.abs().sum() for t in tensors]).sum()


def l2(config: L2Config, tensors: Sequence[DeltaTensor]) -> Tensor:
    return torch.stack([t.value.square().sum() for t in tensors]).sum()


def orthogonality(config: OrthogonalityConfig, tensors: Sequence[DeltaTensor]) -> Tensor:
    def of(M: Tensor) -> Tensor:
        M = M if M.shape[0] <= M.shape[1] else M.T
        return (M @ M.T - torch.eye(len(M), device=M.device, dtype=M.dtype)).square().sum()

    return torch.stack([of(t.value) for t in tensors if _is_matrix(t.value)]).sum()


def group_lasso(config: GroupLassoConfig, tensors: Sequence[DeltaTensor]) -> Tensor:
    groups: dict[tuple[str, str], list[Tensor]] = {}
    for t in tensors:
        rows = t.value.reshape(1, -1) if config.by == "site" else t.value.movedim(COMPONENTS[t.name], 0).flatten(1)
        groups.setdefault((t.site, t.delta), []).append(rows)
    norms = []
    for parts in groups.values():
        whole = torch.cat(parts, dim=1)  # [groups, n_g]
        norms.append(whole.shape[1] ** 0.5 * torch.linalg.vector_norm(whole, dim=1).sum())  # no gradient where it is 0
    return torch.stack(norms).sum()


COMPONENTS = {"A": 0, "B": 1, "P": 1, "E": 0, "Q": 0}
"""Which dimension of a factor counts the rank-one components of its product."""


def _is_matrix(t: Tensor) -> bool:
    return t.dim() == 2 and min(t.shape) > 1


REGULARIZERS: dict[str, tuple[type[RegularizerConfig], Callable[[Any, Sequence[DeltaTensor]], Tensor] | None]] = {
    "group-lasso": (GroupLassoConfig, group_lasso),
    "kl": (KlConfig, None),  # a function of distributions: `Objective`
    "l1": (L1Config, l1),
    "l2": (L2Config, l2),
    "orthogonality": (OrthogonalityConfig, orthogonality),
}


# On a model ------------------------------------------------------------------------------------------------------


def tensors_of(model: nn.Module) -> list[DeltaTensor]:
    """Every tensor of every delta that is there to be trained, in this turn or in another."""
    found = [
        DeltaTensor(site, delta, name, p)
        for delta, site, module in deltas_by_site(model)
        for name, p in module.named_parameters()
    ]
    names = dict.fromkeys(t.delta for t in found)
    for delta in names:
        if (shared := shared_of(model, delta)) is not None:
            found += [DeltaTensor("shared", delta, name, p) for name, p in shared.named_parameters()]
    return [t for t in found if t.delta != REFERENCE]


def check_regularizers(configs: Sequence[RegularizerConfig], model: nn.Module) -> None:
    """Raise TrainingError for a regulariser that has nothing to act on, or that its tensors give no meaning."""
    tensors = tensors_of(model)
    for each in configs:
        if not isinstance(each, OfTensorsConfig):
            continue
        own_tensors, where = _meant(each, tensors), f"regularisers: {each.name}"
        if not own_tensors:
            kinds = list(dict.fromkeys(f"{t.delta}.{t.name}" for t in tensors))
            raise TrainingError(
                f"{where}: {each.tensors!r} is the end of no tensor's name. There are:\n{numbered(kinds)}",
                code="no-such-tensor",
            )
        if isinstance(each, OrthogonalityConfig) and not any(_is_matrix(t.value) for t in own_tensors):
            raise TrainingError(
                f"{where}: no tensor that {each.tensors!r} means is a matrix, such as {own_tensors[0]}",
                code="not-a-matrix",
            )
        if isinstance(each, GroupLassoConfig) and each.by == "component":
            _check_components(own_tensors, where)


def _check_components(tensors: Sequence[DeltaTensor], where: str) -> None:
    ranks: dict[tuple[str, str], int] = {}
    for t in tensors:
        known = t.name in COMPONENTS and t.value.dim() == 2
        size = t.value.shape[COMPONENTS[t.name]] if known else 0
        if not known or ranks.setdefault((t.site, t.delta), size) != size:
            raise TrainingError(
                f"{where}: {t} is no factor with rank-one components. Name those that are (tensors: 'A|B'), or take "
                "whole sites (by: site)",
                code="no-rank-one-components",
            )


def _meant(config: OfTensorsConfig, tensors: Sequence[DeltaTensor]) -> list[DeltaTensor]:
    return [t for t in tensors if pattern_matches(config.tensors, str(t))]


def terms(configs: Sequence[RegularizerConfig], model: nn.Module) -> dict[str, tuple[float, Tensor]]:
    """What is a function of the delta's tensors, of those that learn now: name -> (weight, value with a gradient)."""
    found: dict[str, tuple[float, Tensor]] = {}
    tensors = [t for t in tensors_of(model) if t.value.requires_grad] if configs else []
    for each in configs:
        _, function = REGULARIZERS[each.name]
        if function is not None and isinstance(each, OfTensorsConfig) and (own_tensors := _meant(each, tensors)):
            found[each.name.replace("-", "_")] = each.weight, function(each, own_tensors)
    return found


def weighted(found: Mapping[str, tuple[float, Tensor]]) -> list[Tensor]:
    return [weight * value for weight, value in found.values()]


def kl_to_base(configs: Sequence[RegularizerConfig]) -> KlConfig | None:
    """The one that is a function of distributions, if it is there."""
    return next((each for each in configs if isinstance(each, KlConfig)), None)
