"""A delta on disk: PEFT's folder wherever PEFT has a word for it, plus `graftlm.json`: which base it belongs to.

    adapter_config.json         PEFT's keys; for a delta that PEFT cannot express, a type that PEFT refuses
    adapter_model.safetensors   PEFT's names: base_model.model.<site>.<suffix>; else <our tensor name> for the suffix
    graftlm.json                our config and seed, the base's fingerprint, SHA-256 of the two files above

Writing is all or nothing: into a temporary folder beside the target, then one rename. Reading is strict: an adapter
that does not fit exactly is refused, and the model is left as it was.
"""

import datetime
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from graftlm import __version__
from graftlm.adapters.foreign import CONFIG as CONFIG
from graftlm.adapters.foreign import NEUTRAL, NEUTRAL_ANYWHERE, Member, check_numbers, read_adapter
from graftlm.adapters.foreign import PREFIX as PREFIX
from graftlm.adapters.peft import model_type, target_modules, task, why_not_read
from graftlm.config.schema import build, to_tree
from graftlm.deltas import METHODS
from graftlm.deltas.base import Delta, DeltaConfig, InputDelta, PeftLayout
from graftlm.errors import AdapterError, BaseModelError, GraftError, OutputError, TargetError, nearest, numbered
from graftlm.files import sync, writing
from graftlm.model.hub.load import (
    PACKAGED,
    base_record,
    difference,
    embedding_rows,
    fingerprint,
    public_name,
    read_tokenizer,
    store_of,
    with_more_tokens,
)
from graftlm.model.layers.attach import (
    Chat,
    attach,
    attachment,
    deltas_by_site,
    detach,
    hosts,
    parameters_of,
    shared_of,
)
from graftlm.model.layers.hosts import Host, LayerHost, ModelHost
from graftlm.model.layers.quantize import CODECS
from graftlm.model.layers.sites import config_at
from graftlm.plugins import load_plugins, why_broken

WEIGHTS = "adapter_model.safetensors"
RECORD = "graftlm.json"
TEMPLATE = "chat_template.jinja"


# Writing ---------------------------------------------------------------------------------------------------------


@contextmanager
def new_folder(out: str | Path, *, overwrite: bool = False, keep: Sequence[str] = ()) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its name when the block ends well, and is removed when it does not.

    Raises OutputError if `out` exists (with `overwrite`: if it is anything but an adapter or an empty folder), cannot
    be written, or the disk is full. What was there before stays until the new folder is complete; what lies there
    under the names in `keep` moves into the new one.
    """
    out = Path(out)
    check_new_folder(out, overwrite=overwrite, keep=keep)
    partial = _beside(out, "partial")
    try:
        with writing(out):
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed and had the same number
            partial.mkdir(parents=True)
            yield partial
            _swap(partial, out, keep)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_new_folder(out: Path, *, overwrite: bool = False, keep: Sequence[str] = ()) -> None:
    """Raise OutputError where `new_folder` would, before there is anything to write."""
    if out.exists() and not overwrite:
        raise OutputError(f"{out} exists and would be lost: choose another folder, or say --overwrite")
    ours = any((path / CONFIG).is_file() for path in (out, *adapters_in(out).values()))
    if out.exists() and not ours and not (out.is_dir() and all(path.name in keep for path in out.iterdir())):
        raise OutputError(f"{out} is no adapter folder, so even --overwrite does not replace it: choose another folder")


def mend_folder(out: Path, *, keep: Sequence[str] = ()) -> None:
    """Put right what a process left that was killed while it exchanged `out` for a new folder, and clear its drafts.

    The caller has the lock of `out` (`graftlm.lock`): on a shared file system nobody can tell from a process id in a
    name whether that process lives.
    """
    for other in sorted(out.absolute().parent.glob(f".{out.name}.*-*")):
        kind, _, process = other.name.removeprefix(f".{out.name}.").rpartition("-")
        if kind not in ("partial", "old") or not process.isdecimal():
            continue
        if kind == "old" and not out.exists():
            other.rename(out)
            continue
        if kind == "old":
            _carry_over(other, out, keep)
        shutil.rmtree(other) if other.is_dir() else other.unlink()


def _beside(out: Path, kind: str) -> Path:
    return Path(os.path.abspath(out)).with_name(f".{out.name}.{kind}-{os.getpid()}")


def _swap(partial: Path, out: Path, keep: Sequence[str]) -> None:
    for file in partial.rglob("*"):
        if file.is_file():
            sync(file)
    if out.exists():
        old = _beside(out, "old")
        out.rename(old)
        try:
            partial.rename(out)
        except OSError:
            old.rename(out)
            raise
        _carry_over(old, out, keep)
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    else:
        partial.rename(out)


def _carry_over(old: Path, out: Path, keep: Sequence[str]) -> None:
    for name in keep:
        if (old / name).exists() and not (out / name).exists():
            (old / name).rename(out / name)


def adapters_in(folder: Path) -> dict[str, Path]:
    """The adapter that a folder is, as `default`; or those that lie in it, as a run with several deltas leaves them."""
    if (folder / CONFIG).is_file():
        return {"default": folder}
    found = [file.parent for file in sorted(folder.glob(f"*/{CONFIG}"))]
    order = {path: (_read_record(path) or {}).get("position", 0) for path in found}  # in which they act
    inside = {path.name: path for path in sorted(found, key=lambda path: order[path])}
    return inside or {"default": folder}


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
        raise AdapterError(f"no delta {name!r} on this model. {nearest(name, record.configs)}")
    if name in record.members:
        raise AdapterError(
            f"{name!r} is {len(record.members[name])} deltas on this model ({', '.join(record.members[name])}), and a "
            "folder holds one. Save each by its name into a folder of its own, or merge it (`graft merge`)"
        )
    config, chat = record.configs[name], record.chats.get(name)
    layout = None if why_not_peft(model, name) else METHODS[config.method].delta.peft
    where = {"base_model_name_or_path": public_name(model), **task(model)}
    if layout is None:
        stored = {"peft_type": OWN_TYPE, "method": config.method, **where}
    else:
        stored = _to_peft(model, config, layout, list(record.sites[name])) | where
    facts = {
        "chat_template": _sha256(tokenizer.chat_template) if tokenizer is not None else None,
        "today": chat.today.isoformat() if chat is not None and chat.today is not None else None,
        "turn_order": chat.turn_order if chat is not None else None,
        "layout": OWN_TYPE if layout is None else layout.type,
        "position": list(record.configs).index(name),
        "seed": record.seeds[name],
        "rebuilt": _rebuilt(model, name),
    }
    write_files(model, folder, stored, _stored_tensors(model, name, layout), config, facts)
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
        "base": {"name": public_name(model), "store": store_of(model), **fingerprint(model).to_json()},
        "config": to_tree(config),
        "sha256": {file: sha256_of(folder / file) for file in (CONFIG, WEIGHTS)},
        **facts,
    }
    (folder / RECORD).write_text(json.dumps(ours, indent=1, sort_keys=True) + "\n")


def _sha256(text: Any) -> str | None:
    return None if text is None else hashlib.sha256(str(text).encode()).hexdigest()


OWN_TYPE = "GRAFTLM"
"""The `peft_type` of a delta that PEFT has no word for: PEFT refuses it, and so does not load it half."""


def _modules(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """Site -> delta, and "" -> what the sites share."""
    found: dict[str, nn.Module] = {site: delta for other, site, delta in deltas_by_site(model) if other == name}
    shared = shared_of(model, name)
    return found if shared is None else {"": shared, **found}


def why_not_peft(model: nn.Module, name: str = "default") -> str:
    """Why PEFT's format cannot hold this delta exactly, or an empty text where it can."""
    config = attachment(model).configs[name]
    method = METHODS[config.method].delta
    if method.peft is None:
        return f"PEFT has no method that computes what {config.method} does"
    if method.peft.why_not is not None and (reason := method.peft.why_not(config)):
        return reason
    for pattern, overrides in config.patterns.items():
        if lost := overrides.keys() - method.peft.patterns.keys():
            return f"PEFT has no pattern for {', '.join(sorted(lost))}, which {pattern!r} sets"
    for site, module in _modules(model, name).items():
        if isinstance(module, Delta) and module.site.rows is not None:
            return f"{site} is a part of a layer, and PEFT has no name for one"
        if isinstance(module, Delta) and method.peft.why_not_at and (reason := method.peft.why_not_at(module.site)):
            return f"{site}: {reason}"
        if getattr(module, "offset_A", None) is not None:
            return f"init {config.init!r} took a part of W out, and PEFT's format has no place for a fixed offset"
        known = method.peft.tensors if site else method.peft.shared
        for key in module.state_dict():
            if key not in known:
                return f"PEFT's {method.peft.type} has no tensor for {key}"
    parameters = not config.dropout and not method.peft.constants.get("use_dora")
    return why_not_read(model_type(model), method.peft.type, attachment(model).sites[name], parameters=parameters)


def tensors_of_delta(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Every tensor of a delta that is not made again from the seed or the base, by name; the model's own, no copies."""
    return _stored_tensors(model, name, None)


def fill_delta(model: nn.Module, name: str, tensors: Mapping[str, Tensor], source: Path) -> None:
    """What `tensors_of_delta` gave, back into a delta of the same config; AdapterError where they are others."""
    _make_room(model, name, None, tensors)
    _fill(tensors_of_delta(model, name), tensors, source)


def _stored_tensors(model: nn.Module, name: str, layout: PeftLayout | None) -> dict[str, Tensor]:
    """Key on disk -> tensor in the model: every parameter, and every buffer that is not rebuilt from the seed."""
    found: dict[str, Tensor] = {}
    for site, module in _modules(model, name).items():
        for key, tensor in module.state_dict(keep_vars=True).items():
            if layout is not None and key not in (layout.tensors if site else layout.shared):
                raise AdapterError(f"PEFT's {layout.type} has no tensor for {key} of {type(module).__name__}")
            if layout is None:
                stored = f"{PREFIX}{site}.{key}" if site else f"base_model.graft_shared.{key}"
            elif not site:
                stored = f"base_model.{layout.shared[key]}"
            elif isinstance(module, InputDelta):
                stored = layout.tensors[key]
            else:
                at_embedding = isinstance(module, Delta) and module.site.kind == "embedding"
                names = layout.embedding if at_embedding and layout.embedding else layout.tensors
                stored = f"{PREFIX}{site}.{names[key]}"
            if stored in found:
                raise AdapterError(f"two tensors of {type(module).__name__} have the one name {stored}")
            found[stored] = tensor
    return found


def _rebuilt(model: nn.Module, name: str) -> dict[str, list[float]]:
    """What is not stored but made again from the seed or the base, by its sum and sum of squares, to notice if not."""
    marks = {}
    for site, module in _modules(model, name).items():
        kept = module.state_dict().keys()
        for key, buffer in module.named_buffers():
            if key not in kept:
                numbers = buffer.detach().double()
                marks[f"{site}.{key}"] = [float(numbers.sum()), float(numbers.square().sum())]
    return marks


def _to_peft(model: nn.Module, config: DeltaConfig, layout: PeftLayout, sites: list[str]) -> dict[str, Any]:
    """PEFT's config: sites as suffixes where those mean the same, and what differs at a site under its full name."""
    on = hosts(model)
    stored: dict[str, Any] = {"inference_mode": True, "peft_type": layout.type, "revision": None}
    if layout.type == "LORA":
        stored |= {key: values[0] for key, values in NEUTRAL.items()} | {"init_lora_weights": True}
    if not isinstance(on[sites[0]], ModelHost):
        swapped = any(transposed(on[site]) for site in sites)
        stored |= {key: values[0] for key, values in NEUTRAL_ANYWHERE.items()}
        stored |= {"fan_in_fan_out": swapped, "target_modules": target_modules(model, sites)}
    patterns: dict[str, dict[str, Any]] = {key: {} for key in layout.patterns.values()}
    for site in sites:
        there = config_at(config, site)
        for ours, key in layout.patterns.items():
            if getattr(there, ours) != getattr(config, ours):
                patterns[key][re.escape(site)] = getattr(there, ours)
    fields = {key: getattr(config, ours) for ours, key in layout.fields.items()}
    first = next(m for m in _modules_on(on[sites[0]], config))
    facts = layout.facts(first.site, config) if layout.facts else {}
    return {**stored, **patterns, **layout.constants, **fields, **facts}


def transposed(host: Host) -> bool:
    """Whether a state dict of the base holds this linear layer's weight as [d_in, d_out]."""
    return isinstance(host, LayerHost) and host.view.kind == "linear" and host.view.transposed


def _modules_on(host: Host, config: DeltaConfig) -> Iterator[Delta]:
    return (d for d in host.deltas.values() if isinstance(d, Delta) and d.config.method == config.method)


def sha256_of(file: Path, length: int | None = None) -> str:
    """The SHA-256 of a file, or of its first bytes, in hexadecimal digits; empty if it is shorter than that."""
    digest = hashlib.sha256()
    left = file.stat().st_size if length is None else length
    with open(file, "rb") as handle:
        while left and (block := handle.read(min(left, 2**20))):
            digest.update(block)
            left -= len(block)
    return "" if left else digest.hexdigest()


# Reading ---------------------------------------------------------------------------------------------------------


def load_adapter(model: nn.Module, folder: str | Path, *, name: str = "default", trust_base: bool = False) -> str:
    """Attach the adapter in `folder` to its base, active at once; returns a sentence about what was checked.

    Raises AdapterError for an adapter that is damaged, does not fit or belongs to another base (with both names);
    the model is then as it was. An adapter of another tool has no fingerprint: its keys, shapes, dtypes and
    finiteness are checked, and the sentence says so. It may be several deltas here, such as `default` and
    `default-modules`, which `name` switches together (`graftlm/adapters/foreign.py`). `trust_base` loads in spite of
    another base. Tokenizer and chat template in the folder are what `answer` asks with, whatever it is given; a
    template that writes the date writes that of training.
    """
    load_plugins("graftlm.methods")
    folder = Path(folder)
    _check_folder(folder)
    ours = _read_record(folder)  # checksums first: of a damaged file they say more than a parser does
    stored = _read_json(folder / CONFIG)
    tensors = _read_tensors(folder)
    remarks: list[str] = []
    if ours is not None:
        check_numbers(tensors, folder / WEIGHTS)
        _check_base(model, ours, folder, trust_base)
        method_name = str(ours["config"].get("method"))
        if method_name not in METHODS:
            why = why_broken("graftlm.methods", method_name) or nearest(method_name, METHODS)
            raise AdapterError(f"{folder}: method {method_name!r} is none of ours. {why}")
        method = METHODS[method_name]
        config = build(method.config, ours["config"], source=str(folder / RECORD))
        members = [Member("", config, None if ours["layout"] == OWN_TYPE else method.delta.peft, tensors)]
    else:
        members, remarks = read_adapter(model, stored, tensors, folder / WEIGHTS)
    template, tokenizer = _template_in(folder), read_tokenizer(model, folder)
    names = [f"{name}-{member.name}" if member.name else name for member in members]
    attached: list[str] = []
    try:
        for this, member in zip(names, members, strict=True):
            try:
                attach(model, member.config, name=this, seed=ours["seed"] if ours else 0, start=False)
            except TargetError as error:
                raise AdapterError(f"{folder}: does not fit this model: {error}") from None
            attached.append(this)
            _make_room(model, this, member.layout, member.tensors)
            _fill(_stored_tensors(model, this, member.layout), member.tensors, folder / WEIGHTS)
        if ours is not None and not trust_base:
            _check_rebuilt(_rebuilt(model, name), ours["rebuilt"], folder)
    except GraftError:
        for this in attached:
            detach(model, this)
        raise
    if len(members) > 1:
        attachment(model).members[name] = tuple(names)
        remarks = [*remarks, f"it is {len(names)} deltas here, switched together: {', '.join(names)}"]
    if tokenizer is not None:
        attachment(model).tokenizers[name] = tokenizer
    if ours is not None:
        said = f"{folder}: {len(tensors)} tensors, checksums and base fingerprint match"
        return said + _another_store(model, ours) + _use_chat(model, name, template, ours, folder)
    said = (
        f"{folder}: written by another tool, without a fingerprint of its base: keys, shapes, dtypes and finiteness of "
        f"{len(tensors)} tensors were checked, that the base is the right one was not"
    )
    return "; ".join([said, *remarks]) + _use_chat(model, name, template, {}, folder)


def _use_chat(model: nn.Module, name: str, text: str | None, ours: Mapping[str, Any], folder: Path) -> str:
    """Remember how the conversations of an adapter were rendered in training; what is to be said of it."""
    chats = attachment(model).chats
    if text is None:
        return ""
    others = [other for other, known in chats.items() if known.template != text]
    try:
        today = datetime.date.fromisoformat(ours["today"]) if ours.get("today") else None
    except (TypeError, ValueError):
        raise AdapterError(f"{folder / RECORD}: today: {ours['today']!r} is no date (YYYY-MM-DD)") from None
    chats[name] = Chat(text, today, ours.get("turn_order") or "refuse")
    wanted = ours.get("chat_template")
    said = "; answers use its chat template" + (f", which writes the day of training, {today}" if today else "")
    if wanted is not None and _sha256(text) != wanted:
        said += f", and {TEMPLATE} is not what it was trained with: it was edited"
    if others:
        said += f", in place of that of {', '.join(others)}, which is another one"
    return said


def chat_of(model: nn.Module) -> Chat | None:
    """How the conversations of the adapters on a model were rendered in training, the last one's; None where none has a
    chat template."""
    return next(reversed(attachment(model).chats.values()), None)


def _template_in(folder: Path) -> str | None:
    """The chat template of an adapter folder: of its own file, or as older tokenizers have it."""
    if (folder / TEMPLATE).is_file():
        try:
            return (folder / TEMPLATE).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise AdapterError(f"{folder / TEMPLATE}: cannot be read: {error}") from None
    file = folder / "tokenizer_config.json"
    found = _read_json(file).get("chat_template") if file.is_file() else None
    if isinstance(found, list):  # several by name
        found = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}.get("default")
    return found if isinstance(found, str) else None


def tokenizer_of(model: nn.Module, tokenizer: Any) -> Any:
    """The tokenizer to ask a model with: the given one of the base, or that of an adapter on it.

    Tokenizer and embeddings belong together, so an adapter's has all tokens of the base's, under the same ids, and may
    have more. AdapterError where it is not so, or where several adapters add different tokens under one id.
    """
    rows = embedding_rows(model)
    for name, own in attachment(model).tokenizers.items():
        tokenizer = with_more_tokens(tokenizer, own, rows, name)
    return tokenizer


def template_of(model: nn.Module) -> str | None:
    """The chat template of `chat_of`."""
    chat = chat_of(model)
    return None if chat is None else chat.template


def _another_store(model: nn.Module, ours: dict[str, Any]) -> str:
    """What to say where the base is the same, and kept otherwise than in training: codes are other weights."""
    then, now = ours["base"].get("store"), store_of(model)
    if then is None or then == now or not {then, now} & CODECS.keys():
        return ""
    return f" (it was trained on {then}, this base is kept in {now}: the same weights up to what quantising lost)"


def _make_room(model: nn.Module, name: str, layout: PeftLayout | None, tensors: Mapping[str, Tensor]) -> None:
    """Offsets are there or not there: take their place, where the file has them, so that they are filled."""
    if layout is not None:
        return
    device = next(model.parameters()).device
    for site, module in _modules(model, name).items():
        for key in ("offset_A", "offset_B"):
            if site and (kept := tensors.get(f"{PREFIX}{site}.{key}")) is not None:
                setattr(module, key, torch.empty_like(kept, device=device))


def _check_rebuilt(here: Mapping[str, list[float]], there: Mapping[str, list[float]], folder: Path) -> None:
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
            f"{sorted(wrong)[0]}. Another version of torch? Load it with the one that wrote it, and merge or export it"
        )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{file}: cannot be read: {error}") from None
    if not isinstance(tree, dict):
        raise AdapterError(f"{file}: must hold a mapping, this holds a {type(tree).__name__}")
    return tree


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        near = [str(p) for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        raise AdapterError(f"{folder}: no such adapter folder. {nearest(str(folder), near)}")
    if not (folder / CONFIG).is_file():
        inside = [p.parent.name for p in folder.glob(f"*/{CONFIG}")]
        hint = f" There are adapters in its folders {inside}" if inside else ""
        raise AdapterError(f"{folder}: no {CONFIG}, so this is no adapter.{hint}")
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        why = "its weights are pickled (adapter_model.bin), which may run code: save them as safetensors with PEFT"
        raise AdapterError(f"{folder}: {why if pickled else f'no {WEIGHTS}'}")


def _read_record(folder: Path) -> dict[str, Any] | None:
    if not (folder / RECORD).is_file():
        return None
    ours = _read_json(folder / RECORD)
    ours = {"layout": "LORA", "seed": 0, "rebuilt": {}, **ours}  # what version 0.1.0 did not write
    whole = {"base": ("name", "digest", "config", "tensors"), "config": (), "sha256": (CONFIG, WEIGHTS)}
    for part, keys in whole.items():
        if not isinstance(ours.get(part), dict) or not ours[part].keys() >= set(keys):
            raise AdapterError(
                f"{folder / RECORD}: {part!r} is incomplete, so nothing can be checked by it. Restore the file, or "
                "delete it to load the folder as an adapter of another tool"
            )
    for file, expected in ours["sha256"].items():
        if file not in (CONFIG, WEIGHTS) or sha256_of(folder / file) != expected:
            raise AdapterError(
                f"{folder / file}: its checksum is not the one that was written. The file is damaged or was edited; "
                f"restore it, or delete {RECORD} to load it as an adapter of another tool"
            )
    return ours


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    file = folder / WEIGHTS
    try:
        with safe_open(file, framework="pt") as handle:
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{file}: not a complete safetensors file: {error}") from None
    return tensors


def _check_base(model: nn.Module, ours: dict[str, Any], folder: Path, trust_base: bool) -> None:
    """Refuse another base: one with other weights, or with the same weights used otherwise."""
    theirs, here = ours["base"], fingerprint(model)
    if (what := difference(theirs, here)) and not trust_base:
        raise BaseModelError(
            f"{folder} was trained on {theirs['name']!r} ({theirs['digest'][:19]}), this model is "
            f"{base_record(model).name!r} ({here.digest[:19]}): {what}. Load that base, or train again"
        )


def _fill(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], file: Path) -> None:
    problems = [f"missing: {key}. {nearest(key, tensors)}" for key in expected.keys() - tensors.keys()]
    problems += [f"unexpected: {key}. {nearest(key, expected)}" for key in tensors.keys() - expected.keys()]
    for key in expected.keys() & tensors.keys():
        ours, theirs = expected[key], tensors[key]
        if ours.shape != theirs.shape:
            problems.append(f"{key}: has shape {list(theirs.shape)}, this model needs {list(ours.shape)}")
        elif ours.is_floating_point() != theirs.is_floating_point():
            problems.append(f"{key}: has dtype {theirs.dtype}, this model needs {ours.dtype}")
    if problems:
        raise AdapterError(f"{file}: does not fit this model:\n{numbered(sorted(problems))}")
    with torch.no_grad():
        for key, tensor in expected.items():
            tensor.copy_(tensors[key])


# The model card --------------------------------------------------------------------------------------------------


def model_card(model: nn.Module, name: str = "default", facts: Mapping[str, str] | None = None) -> str:
    """A README.md in the hub's format, filled in: what it is, what it belongs to, how to use it, and given facts."""
    record, base, own = attachment(model), public_name(model), base_record(model).name
    config = record.configs[name]
    method = METHODS[config.method]
    count = sum(p.numel() for p in parameters_of(model, name))
    rows = {
        "base": base,
        "base fingerprint": fingerprint(model).digest,
        "method": f"{config.method} ({method.delta.paper})",
        "trainable parameters": f"{count:,} on {len(record.sites[name])} sites",
        **(facts or {}),
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    reason = why_not_peft(model, name)
    library = "graftlm" if reason else "peft"
    used = (
        f"PEFT does not load the folder: {reason}. `graft export` makes what other tools read."
        if reason
        else "The folder is in PEFT's layout: `PeftModel.from_pretrained(base, folder)` loads it too."
    )
    return f"""---
library_name: {library}
base_model: {base}
pipeline_tag: text-generation
tags: ["base_model:adapter:{base}", {config.method}, transformers, graftlm]
---

# Adapter for {base}

| | |
|---|---|
{table}

## Use

```
graft generate "..." --base {own if own in PACKAGED else base} --adapter .
```

{used}
Written by graftlm {__version__}.
"""
