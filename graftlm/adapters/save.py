"""A delta on a model as an adapter, and as its folder: PEFT's layout wherever PEFT has a word for it.

Writing is all or nothing: into a temporary folder beside the target, then one rename.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from graftlm.adapters.adapter import Adapter, ChatRecord
from graftlm.adapters.folder import new_folder, sha256_of_text, tokenizer_files
from graftlm.adapters.model_card import model_card
from graftlm.adapters.peft import OWN_TYPE, peft_config, task, why_not_peft
from graftlm.adapters.tensors import stored_tensors, sums_of_rebuilt
from graftlm.deltas import METHODS
from graftlm.errors import AdapterError, nearest
from graftlm.hub.dtypes import dtype_name
from graftlm.hub.fingerprint import fingerprint, public_name
from graftlm.hub.quantize_base import quantization_of
from graftlm.model.registry import attachment


def save_adapter(
    model: nn.Module, folder: str | Path, *, name: str | None = None, tokenizer: Any = None, overwrite: bool = False
) -> Path:
    """Write one delta of the model as an adapter folder; with a tokenizer, its files and chat template too.

    `name` may be left out where there is only one delta. Returns the folder. Raises AdapterError for a name that no
    delta has and for an adapter that is several deltas, OutputError where the folder exists and `overwrite` is not set.
    """
    configs = attachment(model).configs
    name = next(iter(configs)) if name is None and len(configs) == 1 else name or "default"
    with new_folder(folder, overwrite=overwrite) as partial:
        adapter_of(model, name, tokenizer=tokenizer).write_into(partial)
        (partial / "README.md").write_text(model_card(model, name), encoding="utf-8")
    return Path(folder)


def adapter_of(model: nn.Module, name: str = "default", *, tokenizer: Any = None) -> Adapter:
    """One delta of the model as an Adapter; its tensors are the model's own, no copies.

    Raises AdapterError for a name that no delta has, and for an adapter that is several deltas.
    """
    record = attachment(model)
    if name not in record.configs:
        raise AdapterError(f"no delta {name!r} on this model. {nearest(name, record.configs)}", code="no-such-delta")
    if name in record.members:
        raise AdapterError(
            f"{name!r} is {len(record.members[name])} deltas on this model ({', '.join(record.members[name])}), and a "
            "folder holds one. Save each by its name into a folder of its own, or merge it (`graft merge`)",
            code="several-deltas",
        )
    config, chat = record.configs[name], record.chats.get(name)
    layout = None if why_not_peft(model, name) else METHODS[config.method].delta.peft
    where = {"base_model_name_or_path": public_name(model), **task(model)}
    if layout is None:
        config_json = {"peft_type": OWN_TYPE, "method": config.method, **where}
    else:
        config_json = peft_config(model, config, layout, list(record.sites[name])) | where
    template = tokenizer.chat_template if tokenizer is not None else None
    today, turn_order = (chat.today, chat.turn_order) if chat is not None else (None, None)
    return Adapter(
        stored_tensors(model, name, layout),
        as_json(config_json),
        config,
        base_facts(model),
        seed=record.seeds[name],
        position=list(record.configs).index(name),
        rebuilt=sums_of_rebuilt(model, name),
        chat=ChatRecord(template or None, sha256_of_text(template), today, turn_order),
        tokenizer_files={} if tokenizer is None else _files_of(tokenizer),
        heads=record.heads.get(name, {}),
    )


def base_facts(model: nn.Module) -> dict[str, Any]:
    """The record of a base in graftlm.json: its name, how it is kept, and its fingerprint."""
    facts = {
        "name": public_name(model),
        "dtype": dtype_name(model),
        "quantization": quantization_of(model),
        **fingerprint(model).to_json(),
    }
    return as_json(facts)


def as_json(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree as it is read again from a JSON file: tuples are lists."""
    found: dict[str, Any] = json.loads(json.dumps(tree))
    return found


def _files_of(tokenizer: Any) -> dict[str, bytes]:
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return tokenizer_files(Path(folder))
