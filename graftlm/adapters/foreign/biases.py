"""Biases that were trained, and those of lora_B: the delta `bitfit` that they are."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from graftlm.adapters.foreign.contents import Contents
from graftlm.adapters.foreign.reading import Member, Reading
from graftlm.adapters.tensors import PREFIX, widened
from graftlm.deltas import METHODS
from graftlm.deltas.base import DeltaConfig
from graftlm.deltas.bitfit import BitFitConfig
from graftlm.model.sites import config_at


def changed_biases(
    reading: Reading, modules: Collection[str], shifts: Mapping[str, Tensor], contents: Contents, config: DeltaConfig
) -> Member | None:
    """The delta `bitfit` of the shifts [d_out] of the `modules` and of the scaled biases of lora_B."""
    deltas = {module: shifts[module] for module in modules}
    for module in contents.sites if reading.where.lora_bias else ():
        base, one = reading.view(module), contents.shifts.get(module)
        assert base is not None
        if one is None:
            reading.problems.append(f"missing: {PREFIX}{contents.sites[module]}.lora_B.bias, which lora_bias names")
        elif list(one.tensor.shape) != [base.d_out]:
            shape = f"has shape {list(one.tensor.shape)}, this model needs {[base.d_out]}"
            reading.problems.append(f"{one.file_key}: {shape}")
        else:
            at: Any = config_at(config, module)
            scale = at.alpha / (at.r**0.5 if at.rslora else at.r)
            deltas[module] = deltas.get(module, 0) + scale * widened(one.tensor).float()
    sites = [module for module in reading.places if module in deltas]
    if not sites:
        return None
    biases = BitFitConfig(targets=reading.targets(sites, METHODS["bitfit"].delta.kinds))
    return Member("biases", biases, None, {f"{PREFIX}{module}.delta": deltas[module] for module in sites})
