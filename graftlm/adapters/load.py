"""Adapters from their folders onto a base.

Reading is strict: an adapter that does not fit exactly is refused, and the model is left as it was.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from graftlm.adapters.chat import template_in, template_of, tokenizer_of, use_chat
from graftlm.adapters.folder import (
    CONFIG,
    RECORD,
    WEIGHTS,
    adapters_in,
    check_folder,
    read_json,
    read_record,
    read_tensors,
)
from graftlm.adapters.foreign.read import read_adapter
from graftlm.adapters.foreign.reading import Member
from graftlm.adapters.peft import OWN_TYPE
from graftlm.adapters.tensors import check_numbers, check_rebuilt, fill, make_room, stored_tensors, sums_of_rebuilt
from graftlm.config.schema import build
from graftlm.deltas import METHODS
from graftlm.errors import AdapterError, BaseModelError, GraftError, TargetError, nearest
from graftlm.model.hub.fingerprint import base_record, difference, fingerprint
from graftlm.model.hub.load import load_base
from graftlm.model.hub.quantize_base import quantization_of
from graftlm.model.hub.tokenizer import read_tokenizer
from graftlm.model.layers.attach import attach, detach
from graftlm.model.layers.quantize import CODECS
from graftlm.model.layers.registry import attachment
from graftlm.plugins import load_plugins, why_broken


def load_adapter(model: nn.Module, folder: str | Path, *, name: str = "default", trust_base: bool = False) -> str:
    """Attach the adapter in `folder` to its base, active at once; returns a sentence about what was checked.

    Raises AdapterError for an adapter that is damaged, does not fit or belongs to another base (with both names);
    the model is then as it was. An adapter of another tool has no fingerprint: its keys, shapes, dtypes and
    finiteness are checked, and the sentence says so. It may be several deltas here, such as `default` and
    `default-modules`, which `name` switches together (`graftlm/adapters/foreign/read.py`). `trust_base` loads in
    spite of another base. Tokenizer and chat template in the folder are what `answer` asks with, whatever it is given;
    a template that writes the date writes that of training.
    """
    load_plugins("graftlm.methods")
    folder = Path(folder)
    check_folder(folder)
    ours = read_record(folder)  # checksums first: of a damaged file they say more than a parser does
    stored = read_json(folder / CONFIG)
    tensors = read_tensors(folder)
    remarks: list[str] = []
    if ours is not None:
        check_numbers(tensors, folder / WEIGHTS)
        _check_base(model, ours, folder, trust_base)
        method_name = str(ours["config"].get("method"))
        if method_name not in METHODS:
            why = why_broken("graftlm.methods", method_name) or nearest(method_name, METHODS)
            raise AdapterError(f"{folder}: method {method_name!r} is none of ours. {why}", code="unknown-method")
        method = METHODS[method_name]
        config = build(method.config, ours["config"], source=str(folder / RECORD))
        members = [Member("", config, None if ours["layout"] == OWN_TYPE else method.delta.peft, tensors)]
    else:
        members, remarks = read_adapter(model, stored, tensors, folder / WEIGHTS)
    template, tokenizer = template_in(folder), read_tokenizer(model, folder)
    names = [f"{name}-{member.name}" if member.name else name for member in members]
    attached: list[str] = []
    try:
        for this, member in zip(names, members, strict=True):
            try:
                attach(model, member.config, name=this, seed=ours["seed"] if ours else 0, start=False)
            except TargetError as error:
                raise AdapterError(f"{folder}: does not fit this model: {error}", code="does-not-fit-model") from None
            attached.append(this)
            make_room(model, this, member.layout, member.tensors)
            fill(stored_tensors(model, this, member.layout), member.tensors, folder / WEIGHTS)
        if ours is not None and not trust_base:
            check_rebuilt(sums_of_rebuilt(model, name), ours["rebuilt"], folder)
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
        return said + _another_quantization(model, ours) + use_chat(model, name, template, ours, folder)
    said = (
        f"{folder}: written by another tool, without a fingerprint of its base: keys, shapes, dtypes and finiteness of "
        f"{len(tensors)} tensors were checked, that the base is the right one was not"
    )
    return "; ".join([said, *remarks]) + use_chat(model, name, template, {}, folder)


def _check_base(model: nn.Module, ours: dict[str, Any], folder: Path, trust_base: bool) -> None:
    """Refuse another base: one with other weights, or with the same weights used otherwise."""
    theirs, here = ours["base"], fingerprint(model)
    if (what := difference(theirs, here)) and not trust_base:
        raise BaseModelError(
            f"{folder} was trained on {theirs['name']!r} ({theirs['digest'][:19]}), this model is "
            f"{base_record(model).name!r} ({here.digest[:19]}): {what}. Load that base, or train again",
            code="other-base",
        )


def _another_quantization(model: nn.Module, ours: dict[str, Any]) -> str:
    """What to say where the base is the same, and quantized otherwise than in training: its weights are others."""
    then, now = _quantization_in(ours["base"]), quantization_of(model)
    if then is None or then == now:
        return ""
    return f" (it was trained on quantization {then}, this base has {now}: the same weights up to what quantizing lost)"


def _quantization_in(base: Mapping[str, Any]) -> str | None:
    """The quantization in a record of a base; before it had that key, `store` had either it or the dtype."""
    before: str | None = base.get("store")
    found: str | None = base.get("quantization", before if before is None or before in CODECS else "none")
    return found


class LoadedAdapters(NamedTuple):
    model: Any
    tokenizer: Any
    """With the tokens and the chat template of the adapters."""
    messages: list[str]
    """What `load_adapter` checked of each adapter."""


def load_with_adapters(
    base: str,
    folders: Sequence[Path],
    *,
    dtype: str | None = None,
    quantization: str | None = None,
    network: bool = False,
) -> LoadedAdapters:
    """Load a base and the adapters of these folders, all active, applied in this order.

    A folder may be an adapter or hold several. An only adapter keeps its name; of several, the name begins with the
    number of the folder.
    """
    model, tokenizer = load_base(base, dtype=dtype, quantization=quantization, network=network)
    paths = [(number, name, path) for number, each in enumerate(folders, 1) for name, path in adapters_in(each).items()]
    messages = [
        load_adapter(model, path, name=f"{number}-{name}" if len(paths) > 1 else name) for number, name, path in paths
    ]
    tokenizer = tokenizer_of(model, tokenizer)
    tokenizer.chat_template = template_of(model) or tokenizer.chat_template
    return LoadedAdapters(model, tokenizer, messages)
