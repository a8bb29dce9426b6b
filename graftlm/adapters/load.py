"""A base with adapters on it, from their names and folders."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from graftlm.adapters.store import adapters_in, load_adapter, template_of, tokenizer_of
from graftlm.model.hub.load import load_base


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
