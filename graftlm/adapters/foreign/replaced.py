"""Weights and biases in place of the base's own: what they change, and the delta `full` that they are."""

from collections.abc import Mapping

import torch
from torch import Tensor

from graftlm.adapters.foreign.contents import Contents, NamedTensor
from graftlm.adapters.foreign.copies import copied_rows
from graftlm.adapters.foreign.reading import Member, Reading
from graftlm.adapters.tensors import PREFIX
from graftlm.deltas import METHODS
from graftlm.deltas.full import FullConfig


def changes_of_base(reading: Reading, contents: Contents) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Module -> W' - W, float32 [d_out, d_in], and b' - b [d_out], for what is not the base's own."""
    changes: dict[str, Tensor] = {}
    shifts: dict[str, Tensor] = {}
    copied: set[str] = set()
    for (module, parameter), one, is_copy in [
        *((place, one, False) for place, one in contents.weights.items()),
        *((place, one, True) for place, one in contents.copies.items()),
    ]:
        own = _own(reading, module, parameter)
        if own is None or own.shape != one.tensor.shape:
            reading.problems.append(_does_not_fit(reading, one, own))
            continue
        rows = copied_rows(own, one.tensor.to(own.device)) if is_copy else torch.zeros(len(own), dtype=torch.bool)
        if rows.all():
            continue
        change = one.tensor.to(own.device, torch.float32) - own.float()
        if is_copy:
            change[rows] = 0
            first = int(rows.long().argmin())  # of those that are not the same
            if parameter == "bias" or 2 * first < len(rows) or not change.isfinite().all():
                reading.problems.append(f"{one.file_key}: is another base's: this adapter does not belong to it")
                continue
            if (module, parameter) in contents.weights:
                continue
            remark = f"from row {first} on, {module} is the adapter's: its vocabulary had been resized"
            reading.remarks.append(remark)
            copied.add(module)
        base = reading.view(module)
        if not change.any():
            continue
        if base is None:
            what = type(reading.model.get_submodule(module)).__name__
            can = "weights can be replaced in linear layers, embeddings and norms"
            reading.problems.append(f"{one.file_key}: {module} is a {what}; {can}")
        elif parameter == "weight":
            changes[module] = change.T if base.transposed else change
        else:
            shifts[module] = change
    _tie(reading, changes, copied)
    _check_complete(reading, contents)
    return changes, shifts


def _own(reading: Reading, module: str, parameter: str) -> Tensor | None:
    """A parameter of the base, as its state dict lays it out."""
    base = reading.view(module)
    if base is not None and parameter in ("weight", "bias"):
        return base.stored_bias if parameter == "bias" else base.store(base.stored_weight)
    found = getattr(reading.model.get_submodule(module), parameter, None)
    return found if isinstance(found, Tensor) else None


def _does_not_fit(reading: Reading, one: NamedTensor, own: Tensor | None) -> str:
    if own is None:
        return f"unexpected: {one.file_key}. This model's {one.here} has no {one.rest}"
    problem = f"{one.file_key}: has shape {list(one.tensor.shape)}, this model needs {list(own.shape)}"
    if one.here in reading.ends and one.tensor.dim() == 2 and one.tensor.shape[1:] == own.shape[1:]:
        rows = one.tensor.shape[0]
        problem += (
            f". The vocabulary was resized to {rows} when it was trained: resize the base's embeddings too "
            f"(model.resize_token_embeddings({rows}) in transformers), save it with the tokenizer of the adapter, "
            "and use that as the base"
        )
    return problem


def _tie(reading: Reading, changes: dict[str, Tensor], copied: set[str]) -> None:
    """A weight that embeddings and head share was resized for both, also where the file has it once."""
    if len(reading.ends) == 2 and reading.tied():
        for one, other in (reading.ends, reading.ends[::-1]):
            if one in copied and other not in changes:
                changes[other] = changes[one].T


def _check_complete(reading: Reading, contents: Contents) -> None:
    """Note what is missing of the modules to save, and of the biases where there are some."""
    for module in reading.places:
        base, there = reading.view(module), reading.there(module)
        if base is None or not reading.was_there(module):
            continue
        saved = reading.where.saves(there)
        if saved and (module, "weight") not in contents.weights:
            reading.problems.append(f"missing: {PREFIX}{there}.weight, which modules_to_save names")
        has_bias = base.stored_bias is not None and (module, "bias") not in contents.weights
        some = any(parameter == "bias" for _, parameter in contents.weights)
        trained = reading.where.bias == "all" or (reading.where.bias == "lora_only" and module in contents.sites)
        if has_bias and (saved or (trained and some)):
            reading.problems.append(
                f"missing: {PREFIX}{there}.bias, which {'modules_to_save' if saved else 'bias'} names"
            )


def replaced_modules(
    reading: Reading, changes: Mapping[str, Tensor], shifts: Mapping[str, Tensor], ids: Mapping[str, Tensor]
) -> Member | None:
    """The delta `full` of the changes and, beside a changed weight, of the shifts; without the rows of `ids`."""
    tensors: dict[str, Tensor] = {}
    sites = [module for module in reading.places if module in changes]
    for module in sites:
        base, change = reading.view(module), changes[module].clone()
        assert base is not None
        if module in ids:  # tokens come on top, whole
            (change if base.kind == "linear" else change.T)[ids[module]] = 0
        tensors[f"{PREFIX}{module}.D"] = change
        if base.stored_bias is not None:
            tensors[f"{PREFIX}{module}.d"] = shifts.get(module, torch.zeros(base.d_out))
    if not sites:
        return None
    config = FullConfig(targets=reading.targets(sites, METHODS["full"].delta.kinds))
    return Member("modules", config, None, tensors)
