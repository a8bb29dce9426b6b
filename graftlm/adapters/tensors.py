"""The tensors of a delta under their keys on disk: which are stored, which are made again, how they are filled in."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from graftlm.deltas.base import Delta, InputDelta, PeftLayout
from graftlm.errors import AdapterError, nearest, numbered
from graftlm.model.parts import expanded
from graftlm.model.registry import deltas_by_site, shared_of

PREFIX = "base_model.model."


def tensors_of_delta(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Every tensor of a delta that is not made again from the seed or the base, by name; the model's own, no copies."""
    return stored_tensors(model, name, None)


def fill_delta(model: nn.Module, name: str, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Copy tensors of `tensors_of_delta` into a delta of the same config; AdapterError where names or shapes differ.

    Offsets that the delta has got since then are removed.
    """
    for site, module in modules_of(model, name).items():
        for key in ("offset_A", "offset_B"):
            if getattr(module, key, None) is not None and f"{PREFIX}{site}.{key}" not in tensors:
                setattr(module, key, None)
    make_room(model, name, None, tensors)
    fill(tensors_of_delta(model, name), tensors, source)


def modules_of(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """Site -> delta, and "" -> what the sites share."""
    found: dict[str, nn.Module] = {site: delta for other, site, delta in deltas_by_site(model) if other == name}
    shared = shared_of(model, name)
    return found if shared is None else {"": shared, **found}


def modules_in(deltas: Mapping[str, nn.Module], shared: nn.Module | None) -> dict[str, nn.Module]:
    """The same for deltas that are not attached: layer -> delta, and what the sites share."""
    found: dict[str, nn.Module] = {
        site: part for layer, delta in deltas.items() for site, part in expanded(layer, delta)
    }
    return found if shared is None else {"": shared, **found}


def stored_tensors(model: nn.Module, name: str, layout: PeftLayout | None) -> dict[str, Tensor]:
    """Key on disk -> tensor in the model: every parameter, and every buffer that is not rebuilt from the seed."""
    return stored_in(modules_of(model, name), layout)


def stored_in(modules: Mapping[str, nn.Module], layout: PeftLayout | None) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for site, module in modules.items():
        for key, tensor in module.state_dict(keep_vars=True).items():
            if layout is not None and key not in (layout.tensors if site else layout.shared):
                raise AdapterError(
                    f"PEFT's {layout.type} has no tensor for {key} of {type(module).__name__}", code="no-peft-layout"
                )
            if layout is None:
                file_key = f"{PREFIX}{site}.{key}" if site else f"base_model.graft_shared.{key}"
            elif not site:
                file_key = f"base_model.{layout.shared[key]}"
            elif isinstance(module, InputDelta):
                file_key = layout.tensors[key]
            else:
                at_embedding = isinstance(module, Delta) and module.site.kind == "embedding"
                names = layout.embedding if at_embedding and layout.embedding else layout.tensors
                file_key = f"{PREFIX}{site}.{names[key]}"
            if file_key in found:
                raise AdapterError(
                    f"two tensors of {type(module).__name__} have the one name {file_key}", code="no-peft-layout"
                )
            found[file_key] = tensor
    return found


def sums_of_rebuilt(model: nn.Module, name: str) -> dict[str, list[float]]:
    """What is not stored but made again from the seed or the base, by its sum and sum of squares, to notice if not."""
    return sums_in(modules_of(model, name))


def sums_in(modules: Mapping[str, nn.Module]) -> dict[str, list[float]]:
    marks = {}
    for site, module in modules.items():
        persistent = module.state_dict().keys()
        for key, buffer in module.named_buffers():
            if key not in persistent:
                numbers = buffer.detach().double()
                marks[f"{site}.{key}"] = [float(numbers.sum()), float(numbers.square().sum())]
    return marks


def check_rebuilt(here: Mapping[str, list[float]], there: Mapping[str, list[float]], folder: Path) -> None:
    wrong = [
        key
        for key in here.keys() | there.keys()
        if key not in here
        or key not in there
        or any(abs(a - b) > 1e-4 * (1 + abs(b)) for a, b in zip(here[key], there[key], strict=True))
    ]
    if wrong:
        raise AdapterError(
            f"{folder}: {len(wrong)} frozen tensors are made again from the seed, and came out other than they were: "
            f"{sorted(wrong)[0]}. Another version of torch? Load it with the one that wrote it, and merge or export it",
            code="rebuilt-tensors-differ",
        )


def make_room(model: nn.Module, name: str, layout: PeftLayout | None, tensors: Mapping[str, Tensor]) -> None:
    """Offsets are there or not there: take their place, where the file has them, so that they are filled."""
    make_room_in(modules_of(model, name), layout, tensors, next(model.parameters()).device)


def make_room_in(
    modules: Mapping[str, nn.Module], layout: PeftLayout | None, tensors: Mapping[str, Tensor], device: torch.device
) -> None:
    if layout is not None:
        return
    for site, module in modules.items():
        for key in ("offset_A", "offset_B"):
            if site and (offset := tensors.get(f"{PREFIX}{site}.{key}")) is not None:
                setattr(module, key, torch.empty_like(offset, device=device))


def fill(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], file: Path) -> None:
    problems = [f"missing: {key}. {nearest(key, tensors)}" for key in expected.keys() - tensors.keys()]
    problems += [f"unexpected: {key}. {nearest(key, expected)}" for key in tensors.keys() - expected.keys()]
    for key in expected.keys() & tensors.keys():
        ours, theirs = expected[key], tensors[key]
        if ours.shape != theirs.shape:
            problems.append(f"{key}: has shape {list(theirs.shape)}, this model needs {list(ours.shape)}")
        elif ours.is_floating_point() != theirs.is_floating_point():
            problems.append(f"{key}: has dtype {theirs.dtype}, this model needs {ours.dtype}")
    if problems:
        raise AdapterError(f"{file}: does not fit this model:\n{numbered(sorted(problems))}", code="does-not-fit-model")
    with torch.no_grad():
        for key, tensor in expected.items():
            tensor.copy_(tensors[key])


def check_numbers(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Raise AdapterError for tensors that are neither finite floating-point numbers nor indices."""
    problems = []
    for key, t in tensors.items():
        if not t.is_floating_point() and t.dtype not in (torch.int32, torch.int64):
            problems.append(f"{key}: dtype {t.dtype}")
        elif t.is_floating_point() and not _finite(widened(t)):
            problems.append(f"{key}: holds NaN or infinity")
    if problems:
        raise AdapterError(
            f"{file}: {len(problems)} tensors cannot be weights:\n{numbered(problems)}", code="not-weights"
        )


def _finite(t: Tensor) -> bool:
    """Whether all elements are finite. A finite sum proves it; another sum may be overflow, so each is checked."""
    return bool(t.sum().isfinite()) or bool(t.isfinite().all())


def widened(t: Tensor) -> Tensor:
    """The tensor in float32 if its numbers have 8 bits, for which torch has few operations."""
    return t.float() if t.is_floating_point() and t.itemsize == 1 else t
