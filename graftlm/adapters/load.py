"""Adapters from their folders onto a base.

Reading is strict: an adapter that does not fit exactly is refused, and the model is left as it was.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from graftlm.adapters.adapter import Adapter
from graftlm.adapters.chat import template_of, tokenizer_of, use_chat
from graftlm.adapters.folder import WEIGHTS, adapters_in
from graftlm.adapters.foreign.read import convert_adapter
from graftlm.adapters.foreign.reading import ConvertedAdapter, Member
from graftlm.adapters.peft import OWN_TYPE
from graftlm.adapters.tensors import check_rebuilt, fill, make_room, stored_tensors, sums_of_rebuilt
from graftlm.deltas import METHODS
from graftlm.errors import AdapterError, BaseModelError, GraftError, TargetError
from graftlm.hub.fingerprint import base_record, difference, fingerprint
from graftlm.hub.load import Loaded, load_base
from graftlm.hub.locate import PACKAGED_FROM
from graftlm.hub.quantize_base import quantization_of
from graftlm.hub.tokenizer import read_tokenizer
from graftlm.model.attach import attach, detach
from graftlm.model.quantize import CODECS
from graftlm.model.registry import attachment


def load_adapter(model: nn.Module, folder: str | Path, *, name: str = "default", trust_base: bool = False) -> str:
    """Attach the adapter in `folder` to its base, active at once; returns a sentence about what was checked.

    This is `Adapter.read` and `attach_adapter`, and raises what they raise; the model is then as it was.
    """
    return attach_adapter(model, Adapter.read(folder), name=name, trust_base=trust_base)


def attach_adapter(model: nn.Module, adapter: Adapter, *, name: str = "default", trust_base: bool = False) -> str:
    """Attach an adapter to its base, active at once; returns a sentence about what was checked.

    Raises AdapterError for an adapter that does not fit and BaseModelError for one of another base (with both names);
    the model is then as it was. An adapter of another tool has no fingerprint: its keys, shapes, dtypes and finiteness
    are checked, and the sentence says so. It may be several deltas here, such as `default` and `default-modules`, which
    `name` switches together (`graftlm/adapters/foreign/read.py`). `trust_base` loads in spite of another base.
    Tokenizer and chat template of the adapter are what `answer` asks with, whatever it is given; a template that writes
    the date writes that of training.
    """
    if adapter.config is not None:
        check_base(model, adapter, trust_base)
    tokenizer = read_tokenizer(model, adapter.tokenizer_files, adapter.where)
    names, remarks = attach_tensors(model, adapter, name)
    if adapter.config is not None and not trust_base:
        try:
            check_rebuilt(sums_of_rebuilt(model, name), adapter.rebuilt, adapter.where)
        except GraftError:
            detach(model, name)
            raise
    record, chat = attachment(model), adapter.chat
    if len(names) > 1:
        remarks = [*remarks, f"it is {len(names)} deltas here, switched together: {', '.join(names)}"]
    if tokenizer is not None:
        record.tokenizers[name] = tokenizer
    if adapter.heads:
        record.heads[name] = adapter.heads
    chat_note = use_chat(model, name, chat.settings, chat.digest)
    return (
        _checked(adapter) + _another_quantization(model, adapter) + "".join(f"; {each}" for each in remarks) + chat_note
    )


def attach_tensors(model: nn.Module, adapter: Adapter, name: str) -> tuple[list[str], list[str]]:
    """Attach the deltas of an adapter and fill them with its tensors; the base is not read, nor compared.

    Returns the names of the deltas and remarks about them. Raises AdapterError for tensors that do not fit; the model
    is then as it was.
    """
    where = adapter.where
    members, remarks = members_of(model, adapter)
    names = [f"{name}-{member.name}" if member.name else name for member in members]
    attached: list[str] = []
    try:
        for this, member in zip(names, members, strict=True):
            try:
                attach(model, member.config, name=this, seed=adapter.seed, start=False)
            except TargetError as error:
                raise AdapterError(f"{where}: does not fit this model: {error}", code="does-not-fit-model") from None
            attached.append(this)
            make_room(model, this, member.layout, member.tensors)
            expected = stored_tensors(model, this, member.layout)
            fill(expected, _named_as_now(member, expected), where / WEIGHTS)
    except GraftError:
        for this in attached:
            detach(model, this)
        raise
    if len(names) > 1:
        attachment(model).members[name] = tuple(names)
    return names, remarks


def members_of(model: nn.Module, adapter: Adapter) -> ConvertedAdapter:
    """The deltas of ours that an adapter is on this model, and remarks about them; AdapterError for what is none."""
    if adapter.config is None:
        return convert_adapter(model, dict(adapter.peft_config), adapter.tensors, adapter.where / WEIGHTS)
    layout = None if adapter.layout == OWN_TYPE else METHODS[adapter.config.method].delta.peft
    return ConvertedAdapter([Member("", adapter.config, layout, dict(adapter.tensors))], [])


def _named_as_now(member: Member, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a member; those of earlier versions under the names, and in the shapes, that they have now."""
    found = dict(member.tensors)
    for old, now in METHODS[member.config.method].delta.renamed.items():
        for key in [key for key in found if key.endswith(f".{old}") and key not in expected]:
            new = f"{key.removesuffix(old)}{now}"
            if new in expected and found[key].numel() == expected[new].numel():
                found[new] = found.pop(key).reshape(expected[new].shape)
    return found


def _checked(adapter: Adapter) -> str:
    if adapter.config is not None:
        matches = "checksums and base fingerprint match" if adapter.source else "the base fingerprint matches"
        return f"{adapter.where}: {len(adapter.tensors)} tensors, {matches}"
    return (
        f"{adapter.where}: written by another tool, without a fingerprint of its base: keys, shapes, dtypes and "
        f"finiteness of {len(adapter.tensors)} tensors were checked, that the base is the right one was not"
    )


def check_base(model: nn.Module, adapter: Adapter, trust_base: bool = False) -> None:
    """Refuse another base: one with other weights, or with the same weights used otherwise."""
    theirs, here = adapter.base, fingerprint(model)
    assert theirs is not None, "an adapter of ours has the record of its base"
    if (what := difference(theirs, here)) and not trust_base:
        raise BaseModelError(
            f"{adapter.where} was trained on {theirs['name']!r} ({theirs['digest'][:19]}), this model is "
            f"{base_record(model).name!r} ({here.digest[:19]}): {what}. Load that base, or train again",
            code="other-base",
        )


def _another_quantization(model: nn.Module, adapter: Adapter) -> str:
    """The note for a base that is the same but is quantized otherwise than in training: its weights are others."""
    then, now = _quantization_in(adapter.base or {}), quantization_of(model)
    if then is None or then == now:
        return ""
    return f" (it was trained on quantization {then}, this base has {now}: the same weights up to what quantizing lost)"


def _quantization_in(base: Mapping[str, Any]) -> str | None:
    """The quantization in a record of a base; before it had that key, `store` had either it or the dtype."""
    before: str | None = base.get("store")
    found: str | None = base.get("quantization", before if before is None or before in CODECS else "none")
    return found


def load_named_base(
    named: str, where: str, *, dtype: str | None = None, quantization: str | None = None, network: bool = False
) -> Loaded:
    """The base of a name that the adapter, or the folder of adapters, `where` has for it; of the packaged bases that
    may be the hub's. BaseModelError where it cannot be loaded."""
    packaged = [name for name, hub_id in PACKAGED_FROM.items() if hub_id == named]
    try:
        name = packaged[0] if packaged else named
        return load_base(name, dtype=dtype, quantization=quantization, network=network)
    except BaseModelError as error:
        raise BaseModelError(
            f"{error}\nThis is the base that {where} names: say where it is (--base)", code="no-such-base"
        ) from None


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
