"""Where answers end: at the ids that the chat template ends an answer with, and at those of the base's own settings.

A base may be trained on turns that end with a token its generation_config.json does not list. Whatever reads that file
and nothing else (transformers, vLLM) then generates past the end of the answer.
"""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple


def base_stop_ids(model: Any) -> tuple[int, ...]:
    """`eos_token_id` of the base's generation_config.json, else of its config.json: none, one or several ids."""
    settings = (getattr(model, "generation_config", None), model.config)
    found = next((ids for s in settings if (ids := getattr(s, "eos_token_id", None)) is not None), ())
    return (found,) if isinstance(found, int) else tuple(found)


def all_stop_ids(model: Any, template_ids: Sequence[int]) -> tuple[int, ...]:
    """Where generation stops: at `template_ids` (`Renderer.stop_ids`, the trained end first) and at the base's own."""
    return tuple(dict.fromkeys((*template_ids, *base_stop_ids(model))))


class MissingEnd(NamedTuple):
    """The token that ends a trained answer, of a base whose generation settings do not list it."""

    id: int
    token: str

    def __str__(self) -> str:
        return (
            f"answers end with {self.token} (id {self.id}), and the base's generation_config.json does not list it as "
            "eos_token_id"
        )


def missing_end(model: Any, tokenizer: Any, template_ids: Sequence[int]) -> MissingEnd | None:
    """The trained end, where a server that reads the base's own settings would not stop at it."""
    if not template_ids or template_ids[0] in base_stop_ids(model):
        return None
    return MissingEnd(template_ids[0], str(tokenizer.convert_ids_to_tokens(template_ids[0])))


def generation_settings(model: Any, template_ids: Sequence[int]) -> Any:
    """A copy of the base's generation settings that ends where `all_stop_ids` says."""
    settings, ids = copy.deepcopy(model.generation_config), all_stop_ids(model, template_ids)
    if ids:
        settings.eos_token_id = ids[0] if len(ids) == 1 else list(ids)
    return settings


def tokenizer_that_ends(tokenizer: Any, template_ids: Sequence[int]) -> Any:
    """A copy of the tokenizer whose eos token is the trained end.

    A template that writes `eos_token` itself would render otherwise with another one: such a tokenizer stays as it is,
    and generation_config.json alone names the end.
    """
    tokenizer = copy.deepcopy(tokenizer)
    if template_ids and "eos_token" not in str(tokenizer.chat_template):
        tokenizer.eos_token = str(tokenizer.convert_ids_to_tokens(template_ids[0]))
    return tokenizer
