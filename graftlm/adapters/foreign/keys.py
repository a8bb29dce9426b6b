"""Keys of an adapter's file in parts, and how the names of modules differ between models."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from graftlm.adapters.tensors import PREFIX
from graftlm.deltas.base import PeftLayout

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of names that torch.compile, FSDP and recomputation put in when they wrap a module."""

TOKENS = "trainable_tokens_delta"


@dataclass(frozen=True)
class Key:
    """A key of a file in parts."""

    file_key: str
    module: str
    """The module that it is about, by its name in the model that was trained; empty for what all sites share."""
    rest: str
    """`lora_A.weight`, `weight`, `base_layer.weight` ..."""
    adapter: str = ""
    """The name of the adapter, where the key has one."""

    @property
    def plain(self) -> str:
        """The key as PEFT writes it."""
        return f"{PREFIX}{self.module}.{self.rest}" if self.module else self.rest


def parse_key(file_key: str, layout: PeftLayout) -> Key:
    """Take a key apart: wrappers, the prefix and the adapter's name are left out."""
    key = ".".join(part for part in file_key.split(".") if part not in WRAPPERS).removeprefix("module.")
    for shared in layout.shared.values():
        if found := re.fullmatch(rf"base_model\.{shared}(?:\.([^.]+))?", key):
            return Key(file_key, "", f"base_model.{shared}", found[1] or "")
    key = key.removeprefix(PREFIX)
    for suffix in (*layout.tensors.values(), *layout.embedding.values(), "lora_B.bias", TOKENS):
        stem, _, rest = suffix.partition(".")
        # PEFT leaves `.weight` behind a magnitude out of its files, and has it in its modules.
        end = rf"\.{rest}" if rest else r"(?:\.weight)?"
        if found := re.fullmatch(rf"(.+?)(?:\.token_adapter)?\.{stem}(?:\.((?!weight$)[^.]+))?{end}", key):
            return Key(file_key, found[1], suffix, found[2] or "")
    if found := re.fullmatch(r"(.+?)(?:\.token_adapter)?\.(?:base_layer|original_module)\.([^.]+)", key):
        return Key(file_key, found[1], f"base_layer.{found[2]}")
    if found := re.fullmatch(r"(.+)\.modules_to_save(?:\.([^.]+))?\.(.+)", key):
        module, _, rest = f"{found[1]}.{found[3]}".rpartition(".")
        return Key(file_key, module, rest, found[2] or "")
    module, _, rest = key.rpartition(".")
    return Key(file_key, module, rest)


Renaming = Sequence[tuple[str, str]]
"""(beginning of a name in the file, the same in the model): the first that fits a name is put in its place."""


def renamings(model: Any) -> list[Renaming]:
    """How the names of a language model differ where it is alone, inside of a vision-language model (from transformers
    4.52 on, and before), and without its head."""
    alone, inside, before, head = "model.", "model.language_model.", "language_model.model.", "language_model.lm_head"
    body = f"{getattr(model, 'base_model_prefix', '') or 'model'}."
    return [
        [(inside, alone)],
        [(alone, inside)],
        [("language_model.", "")],
        [(alone, before), ("lm_head", head)],
        [(before, inside), (head, "lm_head")],
        [(inside, before), ("lm_head", head)],
        [(body, "")],
        [("", body)],
    ]


def renamed(name: str, by: Renaming) -> str:
    """The name in the model of what a file calls `name`."""
    return next((new + name.removeprefix(old) for old, new in by if name.startswith(old)), name)
