"""An adapter as a value: all that its folder holds, without a model.

    adapter_config.json         PEFT's keys; for a delta that PEFT cannot express, a type that PEFT refuses
    adapter_model.safetensors   PEFT's names: base_model.model.<site>.<suffix>; else <our tensor name> for the suffix
    heads.safetensors           what the objective trained beside the deltas, where it trains such a head
    graftlm.json                our config and seed, the base's fingerprint, SHA-256 of the files above and of itself

`Adapter.read` is strict: checksums come before parsers, and nothing is unpickled, run or fetched.
"""

import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from graftlm import __version__
from graftlm.adapters.chat import template_in
from graftlm.adapters.folder import (
    CONFIG,
    HEADS,
    RECIPE,
    RECORD,
    SUMMARY,
    TEMPLATE,
    WEIGHTS,
    check_folder,
    new_folder,
    read_json,
    read_record,
    read_tensors,
    sha256_of,
    sha256_of_bytes,
    sha256_of_record,
    tokenizer_files,
)
from graftlm.adapters.tensors import check_numbers
from graftlm.config.schema import build, to_tree
from graftlm.config.source import parse_yaml
from graftlm.deltas import METHODS
from graftlm.deltas.base import DeltaConfig
from graftlm.errors import AdapterError, nearest
from graftlm.model.registry import Chat
from graftlm.plugins import load_plugins, why_broken


class ChatRecord(NamedTuple):
    """How the conversations of an adapter's training were rendered; all None where nobody recorded it."""

    template: str | None = None
    """The source of the chat template in the folder."""
    digest: str | None = None
    """SHA-256 of the template of training: another one than that of `template` where the file was edited."""
    today: datetime.date | None = None
    """The day that the template wrote."""
    turn_order: Literal["refuse", "merge", "drop"] | None = None
    """`data.turn_order` of the run."""

    @property
    def settings(self) -> Chat | None:
        """How prompts are rendered; None where the folder has no chat template."""
        return None if self.template is None else Chat(self.template, self.today, self.turn_order or "refuse")


NO_CHAT = ChatRecord()


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter: tensors, config, and the record of its base and of its training. Raises nothing by itself.

    `Adapter.read(folder)` and `adapter.write(folder)` are inverses; `attach_adapter(model, adapter)` puts it on a
    model. Two adapters are equal if all but `source` is, tensors bit by bit.
    """

    tensors: Mapping[str, Tensor]
    """By their names in adapter_model.safetensors."""
    peft_config: Mapping[str, Any]
    """adapter_config.json."""
    config: DeltaConfig | None = None
    """The config of the delta; None for an adapter of another tool, of which `peft_config` has the settings."""
    base: Mapping[str, Any] | None = None
    """The base that it was trained on: name, dtype, quantization, digest, config and tensors, as in graftlm.json. None
    for an adapter of another tool."""
    seed: int = 0
    """From which frozen random tensors are made again."""
    position: int = 0
    """Its position in the order in which several deltas act, from 0."""
    rebuilt: Mapping[str, list[float]] = field(default_factory=dict)
    """Sum and sum of squares of each tensor that is made again and not stored."""
    chat: ChatRecord = NO_CHAT
    tokenizer_files: Mapping[str, bytes] = field(default_factory=dict)
    """File name -> contents."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """The recipe of the run as a tree; empty where the folder has none."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """summary.json of the run; empty where the folder has none."""
    heads: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors that the objective trains in addition to the deltas: HEAD.PARAMETER -> tensor."""
    source: Path | None = field(default=None, compare=False)
    """The folder that it was read from, for messages."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Adapter):
            return NotImplemented
        return all(_equal(getattr(self, f.name), getattr(other, f.name)) for f in fields(self) if f.compare)

    @property
    def layout(self) -> str:
        """The type that the tensors are named for: PEFT's, or GRAFTLM for names of ours."""
        return str(self.peft_config.get("peft_type"))

    @property
    def tokenizer_digest(self) -> str | None:
        """SHA-256 of tokenizer.json; None where there is none."""
        contents = self.tokenizer_files.get("tokenizer.json")
        return None if contents is None else sha256_of_bytes(contents)

    @property
    def where(self) -> Path:
        """Its name in messages: the folder that it was read from."""
        return self.source or Path("the adapter")

    @classmethod
    def read(cls, folder: str | Path) -> "Adapter":
        """The adapter in a folder, ours or another tool's. Returns the Adapter.

        Raises AdapterError for a folder that is none, is damaged (by the checksums of ours), or holds tensors that no
        weight can be; RecipeError for a config that the method does not admit.
        """
        load_plugins("graftlm.methods")
        folder = Path(folder)
        check_folder(folder)
        record = read_record(folder)  # checksums first: of a damaged file they say more than a parser does
        config_json, tensors = read_json(folder / CONFIG), read_tensors(folder / WEIGHTS)
        heads = read_tensors(folder / HEADS) if (folder / HEADS).is_file() else {}
        check_numbers(heads, folder / HEADS)
        template, files = template_in(folder), tokenizer_files(folder)
        if record is None:
            chat = ChatRecord(template)
            return cls(tensors, config_json, chat=chat, tokenizer_files=files, heads=heads, source=folder)
        check_numbers(tensors, folder / WEIGHTS)
        recipe = folder / RECIPE
        return cls(
            tensors,
            config_json,
            _config(record, folder),
            record["base"],
            record["seed"],
            record["position"],
            record["rebuilt"],
            ChatRecord(template, record["chat_template"], _day(record["today"], folder), record["turn_order"]),
            files,
            parse_yaml(recipe.read_text(encoding="utf-8"), str(recipe))[0] if recipe.is_file() else {},
            read_json(folder / SUMMARY) if (folder / SUMMARY).is_file() else {},
            heads,
            folder,
        )

    def write(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the folder, whole or not at all. Returns it.

        Raises OutputError if it exists (with `overwrite`: if it is anything but an adapter), or cannot be written.
        """
        with new_folder(folder, overwrite=overwrite) as partial:
            self.write_into(partial)
        return Path(folder)

    def write_into(self, folder: Path) -> None:
        """The adapter's files into a folder that exists."""
        (folder / CONFIG).write_text(json.dumps(self.peft_config, indent=2, sort_keys=True) + "\n")
        _save(self.tensors, folder / WEIGHTS)
        if self.heads:
            _save(self.heads, folder / HEADS)
        for name, contents in self.tokenizer_files.items():
            (folder / name).write_bytes(contents)
        if self.chat.template is not None:  # the exact one of training, whatever transformers chooses to write
            (folder / TEMPLATE).write_text(self.chat.template, encoding="utf-8")
        if self.recipe:
            text = yaml.safe_dump(dict(self.recipe), sort_keys=False, allow_unicode=True)
            (folder / RECIPE).write_text(text, encoding="utf-8")
        if self.metrics:
            (folder / SUMMARY).write_text(json.dumps(self.metrics, indent=2) + "\n")
        if self.config is not None:
            sums = {name: sha256_of(folder / name) for name in self._summed()}
            record = json.loads(json.dumps(self._record() | {"sha256": sums}))  # as it will be read
            sums[RECORD] = sha256_of_record(record)
            record["sha256"] = sums
            (folder / RECORD).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")

    def _summed(self) -> list[str]:
        return [CONFIG, WEIGHTS, *([HEADS] if self.heads else [])]

    def _record(self) -> dict[str, Any]:
        """graftlm.json without the checksums."""
        return {
            "graftlm": __version__,
            "base": self.base,
            "config": to_tree(self.config),
            "chat_template": self.chat.digest,
            "today": self.chat.today.isoformat() if self.chat.today is not None else None,
            "turn_order": self.chat.turn_order,
            "layout": self.layout,
            "position": self.position,
            "seed": self.seed,
            "rebuilt": self.rebuilt,
        }


def _config(record: Mapping[str, Any], folder: Path) -> DeltaConfig:
    name = str(record["config"].get("method"))
    if name not in METHODS:
        why = why_broken("graftlm.methods", name) or nearest(name, METHODS)
        raise AdapterError(f"{folder}: method {name!r} is none of ours. {why}", code="unknown-method")
    return build(METHODS[name].config, record["config"], source=str(folder / RECORD))


def _day(text: Any, folder: Path) -> datetime.date | None:
    try:
        return datetime.date.fromisoformat(text) if text else None
    except (TypeError, ValueError):
        raise AdapterError(f"{folder / RECORD}: today: {text!r} is no date (YYYY-MM-DD)", code="invalid-date") from None


def _save(tensors: Mapping[str, Tensor], file: Path) -> None:
    plain = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
    save_file(plain, file, metadata={"format": "pt"})


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape
        return same and torch.equal(one.detach().cpu(), other.detach().cpu())
    return bool(one == other)
