"""The model that a command asks or writes: a base and adapters on it."""

from pathlib import Path
from typing import Any

import typer

from graftlm.cli.terminal import prepare_libraries, warn


def load_model(
    base: str, adapters: list[Path], network: bool, dtype: str | None = None, quantization: str | None = None
) -> tuple[Any, Any]:
    """(model, tokenizer); what was checked of each adapter goes to standard error."""
    from graftlm.adapters.load import load_with_adapters

    prepare_libraries()
    model, tokenizer, messages = load_with_adapters(
        base, adapters, dtype=dtype, quantization=quantization, network=network
    )
    for message in messages:
        typer.secho(message, dim=True, err=True)
    return model, tokenizer


def stop_ids(tokenizer: Any) -> tuple[int, ...]:
    """What ends an answer by the chat template; a template that cannot be used is no reason not to write weights."""
    from graftlm.data.chat.render import Renderer
    from graftlm.errors import BaseModelError

    try:
        return Renderer(tokenizer).stop_ids
    except BaseModelError as error:
        warn(f"warning: {error}. So the token that ends an answer is not known, and the stop tokens stay the base's")
        return ()
