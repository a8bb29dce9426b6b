"""A delta on disk: PEFT's folder wherever PEFT has a word for it, plus `graftlm.json`: which base it belongs to.

    adapter_config.json         PEFT's keys; for a delta that PEFT cannot express, a type that PEFT refuses
    adapter_model.safetensors   PEFT's names: base_model.model.<site>.<suffix>; else <our tensor name> for the suffix
    graftlm.json                our config and seed, the base's fingerprint, SHA-256 of the two files above

Writing is all or nothing: into a temporary folder beside the target, then one rename.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from graftlm import __version__
from graftlm.adapters.folder import CONFIG, RECORD, TEMPLATE, WEIGHTS, new_folder, sha256_of, sha256_of_text
from graftlm.adapters.model_card import model_card
from graftlm.adapters.peft import OWN_TYPE, peft_config, task, why_not_peft
from graftlm.adapters.tensors import stored_tensors, sums_of_rebuilt
from graftlm.config.schema import to_tree
from graftlm.deltas import METHODS
from graftlm.deltas.base import DeltaConfig
from graftlm.errors import AdapterError, nearest
from graftlm.model.hub.dtypes import dtype_name
from graftlm.model.hub.fingerprint import fingerprint, public_name
from graftlm.model.hub.quantize_base import quantization_of
from graftlm.model.layers.registry import attachment


def save_adapter(
    model: nn.Module, folder: str | Path, *, name: str | None = None, tokenizer: Any = None, overwrite: bool = False
) -> Path:
    """Write one delta of the model as an adapter folder; with a tokenizer, its files and chat template too.

    `name` may be left out where there is only one delta. Returns the folder. Raises AdapterError for a name that no
    delta has and for an adapter that is several deltas, OutputError where the folder exists and `overwrite` is not set.
    """
    known = attachment(model).configs
    name = next(iter(known)) if name is None and len(known) == 1 else name or "default"
    with new_folder(folder, overwrite=overwrite) as partial:
        write_adapter(model, partial, name=name, tokenizer=tokenizer)
        (partial / "README.md").write_text(model_card(model, name), encoding="utf-8")
    return Path(folder)


def write_adapter(model: nn.Module, folder: Path, *, name: str = "default", tokenizer: Any = None) -> None:
    """The adapter's own files into a folder that exists; `save_adapter` is this, made atomic."""
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
        stored = {"peft_type": OWN_TYPE, "method": config.method, **where}
    else:
        stored = peft_config(model, config, layout, list(record.sites[name])) | where
    facts = {
        "chat_template": sha256_of_text(tokenizer.chat_template) if tokenizer is not None else None,
        "today": chat.today.isoformat() if chat is not None and chat.today is not None else None,
        "turn_order": chat.turn_order if chat is not None else None,
        "layout": OWN_TYPE if layout is None else layout.type,
        "position": list(record.configs).index(name),
        "seed": record.seeds[name],
        "rebuilt": sums_of_rebuilt(model, name),
    }
    write_files(model, folder, stored, stored_tensors(model, name, layout), config, facts)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        if tokenizer.chat_template:  # the exact template of training, whatever transformers chooses to write
            (folder / TEMPLATE).write_text(tokenizer.chat_template, encoding="utf-8")


def write_files(
    model: nn.Module,
    folder: Path,
    stored: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    config: DeltaConfig,
    facts: Mapping[str, Any],
) -> None:
    """adapter_config.json, the tensors, and graftlm.json with the config, the base and `facts`."""
    (folder / CONFIG).write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n")
    plain = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
    save_file(plain, folder / WEIGHTS, metadata={"format": "pt"})
    ours = {
        "graftlm": __version__,
        "base": {
            "name": public_name(model),
            "dtype": dtype_name(model),
            "quantization": quantization_of(model),
            **fingerprint(model).to_json(),
        },
        "config": to_tree(config),
        "sha256": {file: sha256_of(folder / file) for file in (CONFIG, WEIGHTS)},
        **facts,
    }
    (folder / RECORD).write_text(json.dumps(ours, indent=1, sort_keys=True) + "\n")
