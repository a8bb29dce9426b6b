"""The deltas of ours that an adapter of another tool is."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from graftlm.adapters.folder import CONFIG
from graftlm.adapters.foreign.biases import changed_biases
from graftlm.adapters.foreign.config import check_keys, method_fields, method_of, site_patterns
from graftlm.adapters.foreign.contents import Contents, check_experts, named_tensors, sort_tensors
from graftlm.adapters.foreign.reading import ConvertedAdapter, Member, Reading
from graftlm.adapters.foreign.replaced import changes_of_base, replaced_modules
from graftlm.adapters.foreign.token_rows import token_ids, token_rows
from graftlm.adapters.tensors import PREFIX, check_numbers, widened
from graftlm.config.schema import build
from graftlm.deltas.base import DeltaConfig
from graftlm.errors import AdapterError, nearest, numbered


def convert_adapter(
    model: nn.Module, config_json: dict[str, Any], tensors: Mapping[str, Tensor], file: Path
) -> ConvertedAdapter:
    """The deltas that PEFT's (config, tensors) are on this model; AdapterError for what cannot be them.

    `file` holds the tensors and is named in messages; the config lies beside it. Nothing is attached.
    """
    name, method = method_of(config_json, file.with_name(CONFIG))
    layout = method.delta.peft
    assert layout is not None
    check_keys(model, config_json, method, file.with_name(CONFIG))
    if "model" not in method.delta.kinds:
        return _read(Reading(model, config_json, name, method, layout, file), tensors)
    check_numbers(tensors, file)  # a prompt or a prefix: one tensor, and no layer
    tree = {"method": name, **method_fields(config_json, method, file.with_name(CONFIG))}
    config = build(method.config, tree, source=str(file.with_name(CONFIG)))
    return ConvertedAdapter([Member("", config, layout, dict(tensors))], [])


def _read(reading: Reading, tensors: Mapping[str, Tensor]) -> ConvertedAdapter:
    tensors_by_names = named_tensors(reading, tensors)
    check_experts(reading, tensors_by_names)
    contents = sort_tensors(reading, tensors_by_names)
    copies = {one.file_key for one in contents.copies.values()}
    check_numbers({key: t for key, t in tensors.items() if key not in copies}, reading.file)
    for one in (
        *contents.weights.values(),
        *contents.copies.values(),
        *contents.rows.values(),
        *contents.shifts.values(),
    ):
        if not one.tensor.is_floating_point():
            raise AdapterError(
                f"{reading.file}: {one.file_key}: dtype {one.tensor.dtype}, which no weight has", code="not-weights"
            )
    sites = _sites(reading, contents)
    config = _main_config(reading, sites)
    ids = token_ids(reading, contents)
    changes, shifts = changes_of_base(reading, contents)
    members = [
        replaced_modules(reading, changes, shifts, ids),
        token_rows(reading, contents, ids),
        Member("", config, reading.layout, {key: widened(tensor) for key, tensor in contents.main.items()}),
        changed_biases(reading, shifts.keys() - changes.keys(), shifts, contents, config),
    ]
    if reading.problems:
        raise AdapterError(
            f"{reading.file}: does not fit this model:\n{numbered(sorted(reading.problems))}", code="does-not-fit-model"
        )
    return ConvertedAdapter([member for member in members if member is not None], reading.remarks)


def _sites(reading: Reading, contents: Contents) -> dict[str, str]:
    """Where the method sits, in the model's order: where it has tensors, and where it lacks some by mistake.

    An entry of `target_modules` for which there is no tensor at all counts for nothing: lists of names are often
    used for models that have only some of them. One that has tensors has them wherever PEFT takes it.
    """
    there = {name: reading.there(name) for name in reading.places if reading.kind(name) in reading.method.delta.kinds}
    trained = {name: there[name] for name in there if reading.was_there(name)}
    linear = [trained[name] for name in trained if reading.kind(name) == "linear" and name not in reading.ends]
    with_tensors = set(contents.sites.values())
    sites, nowhere = set(contents.sites), []
    for entry, modules in reading.where.modules_by_entry(list(trained.values()), linear).items():
        targets = {module for module in modules if reading.where.takes(module)}
        if with_tensors & targets:
            sites |= {name for name in trained if trained[name] in targets}
        elif targets or not modules:
            nowhere.append(entry)
    if not sites:
        such = next(iter(contents.main), "none")
        raise AdapterError(
            f"{reading.file}: does not fit this model: none of its tensors belongs to a layer of it that "
            f"{reading.method_name} can sit on; the first is {such}. {nearest(such.removeprefix(PREFIX), there)}",
            code="does-not-fit-model",
        )
    if nowhere:
        reading.remarks.append(f"target_modules also names {', '.join(nowhere)}, for which it has no tensors")
    return {name: there[name] for name in there if name in sites}


def _main_config(reading: Reading, sites: Mapping[str, str]) -> DeltaConfig:
    tree = method_fields(reading.config_json, reading.method, reading.config_file)
    if all(reading.kind(site) == "embedding" for site in sites):
        tree.pop("dropout", None)  # ids have no elements that could be dropped
    kinds = reading.method.delta.kinds
    tree["method"] = reading.method_name
    tree["targets"] = reading.targets(list(sites), kinds, reading.where.target_modules)
    config = build(reading.method.config, tree, source=str(reading.config_file))
    return replace(config, patterns=site_patterns(reading.config_json, reading.layout, sites, reading.config_file))
