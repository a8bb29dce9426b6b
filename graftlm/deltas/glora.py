"""GLoRA: One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning. Chavan et al. 2023, arXiv:2306.07967.

    W' = W + W * A + B            A, B [d_out, d_in]: low-rank, a column (vector), a number (scalar) or none
    b' = b + D * b + E + W C      C [d_in]: low-rank, vector or none;  D, E [d_out]: vector, scalar or none

All start at zero: low-rank is left @ right with left [.., r] zero and right [r, ..] Xavier-uniform, as in the authors'
code. Where the base has no bias, b is zero, E + W C become one and D is left out; with `new_bias` off such a layer gets
none of the three. The paper picks the forms of each layer by an evolutionary search over one net that holds them all;
here they are fields, and `patterns` sets them by layer. Nothing stands in front of B. PEFT's GLORA has one form for A
and B, one for D and E, and no new biases: only what is within these limits is written in its layout.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from graftlm.config.schema import Flag, PositiveCount, config
from graftlm.deltas.base import DeltaConfig, PeftLayout, Site, WeightDelta


@config
class GloraConfig(DeltaConfig):
    method: Literal["glora"] = "glora"
    r: PositiveCount = 8
    A: Literal["low-rank", "vector", "scalar", "none"] = "low-rank"
    B: Literal["low-rank", "vector", "scalar", "none"] = "low-rank"
    C: Literal["low-rank", "vector", "none"] = "vector"
    D: Literal["vector", "scalar", "none"] = "vector"
    E: Literal["vector", "scalar", "none"] = "vector"
    new_bias: Flag = True
    """Whether a layer without a bias gets one, E + W C."""


class Support(nn.Module):
    """One of A .. E: [rows, columns] or [rows], as a product, as a column or as a number."""

    def __init__(self, form: str, shape: tuple[int, ...], r: int, generator: torch.Generator) -> None:
        super().__init__()
        if form == "low-rank":
            rows, columns = shape
            self.left = nn.Parameter(torch.zeros(rows, r))
            right = (2 * torch.rand(r, columns, generator=generator) - 1) * (6 / (r + columns)) ** 0.5
            self.right = nn.Parameter(right)
        else:
            column = (shape[0], 1) if len(shape) == 2 else shape
            self.whole = nn.Parameter(torch.zeros(1 if form == "scalar" else column))

    def value(self) -> Tensor:
        return self.left @ self.right if hasattr(self, "left") else self.whole


FORMS = {"low-rank": "lora", "vector": "vector", "scalar": "constant", "none": "none"}  # ours -> PEFT's
KEYS = {"config_A_B": ("AB", "lora"), "config_C": ("C", "lora"), "config_D_E": ("DE", "constant")}
"""PEFT's key -> what it is about, PEFT's default."""
NAMES = {"left": "Xd", "right": "Xu", "whole": "X"}


def peft_forms(site: Site, config: GloraConfig) -> dict[str, Any]:
    return {key: FORMS[getattr(config, names[0])] for key, (names, _) in KEYS.items()}


def our_forms(config_json: dict[str, Any]) -> dict[str, Any]:
    ours = {theirs: form for form, theirs in FORMS.items()}
    forms = {name: config_json.get(key, default) for key, (names, default) in KEYS.items() for name in names}
    return {name: ours.get(form, form) for name, form in forms.items()} | {"new_bias": False}


def why_not(config: GloraConfig) -> str:
    if config.A != config.B or config.D != config.E:
        return "PEFT has one form for A and B, and one for D and E"
    makes_bias = config.new_bias and (config.C != "none" or config.E != "none")
    return "PEFT gives no layer a new bias: set new_bias to false" if makes_bias else ""


class Glora(WeightDelta):
    family = "reparameterisation"
    paper = "Chavan et al. 2023, arXiv:2306.07967"
    formula = (
        "sum({'low-rank': r * (d_out + d_in), 'vector': d_out, 'scalar': 1, 'none': 0}[form] for form in (A, B)) "
        "+ (has_bias or new_bias) * ({'low-rank': r * (d_in + 1), 'vector': d_in, 'none': 0}[C] "
        "+ {'vector': d_out, 'scalar': 1, 'none': 0}[E]) + has_bias * {'vector': d_out, 'scalar': 1, 'none': 0}[D]"
    )
    peft = PeftLayout(
        type="GLORA",
        tensors={f"{one}.{ours}": f"glora_{one}.{theirs}" for one in "ABCDE" for ours, theirs in NAMES.items()},
        fields={"r": "r"},
        constants={"bias": "none"},
        facts=peft_forms,
        translate=our_forms,
        # PEFT stores zeros for what a layer lacks
        read=lambda stored, tensors: {key: t for key, t in tensors.items() if not key.endswith(".zeros") or t.any()},
        why_not=why_not,
    )

    def __init__(self, site: Site, config: GloraConfig) -> None:
        super().__init__(site, config)
        d_in, d_out, generator = site.d_in, site.d_out, site.generator()

        def support(form: str, *shape: int) -> Support | None:
            return None if form == "none" else Support(form, shape, config.r, generator)

        shifts = site.has_bias or config.new_bias
        self.A, self.B = support(config.A, d_out, d_in), support(config.B, d_out, d_in)
        self.C = support(config.C, d_in, 1) if shifts else None
        self.E = support(config.E, d_out) if shifts else None
        self.D = support(config.D, d_out) if site.has_bias else None

    def effective(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        changed = W if self.A is None else W + W * self.A.value()
        if self.B is not None:
            changed = changed + self.B.value()
        parts = [] if b is None else [b]
        if self.D is not None and b is not None:
            parts.append(self.D.value() * b)
        if self.E is not None:
            parts.append(self.E.value().expand(self.site.d_out))
        if self.C is not None:
            parts.append((W @ self.C.value())[:, 0])
        return changed, torch.stack(parts).sum(0) if parts else None
