"""Chat template and tokenizer of the adapters on a model: what they are asked with."""

from pathlib import Path
from typing import Any

from torch import nn

from graftlm.adapters.folder import TEMPLATE, read_json, sha256_of_text
from graftlm.errors import AdapterError
from graftlm.hub.tokenizer import embedding_rows, with_more_tokens
from graftlm.model.registry import Chat, attachment


def use_chat(model: nn.Module, name: str, chat: Chat | None, digest: str | None) -> str:
    """Record how the conversations of an adapter were rendered in training. Returns the note for the user.

    `digest` is the SHA-256 of the template of training, if it is known.
    """
    chats = attachment(model).chats
    if chat is None:
        return ""
    others = [other for other, settings in chats.items() if settings.template != chat.template]
    chats[name] = chat
    note = "; answers use its chat template"
    if chat.today is not None:
        note += f", which writes the day of training, {chat.today}"
    if digest is not None and sha256_of_text(chat.template) != digest:
        note += f", and {TEMPLATE} is not what it was trained with: it was edited"
    if others:
        note += f", in place of that of {', '.join(others)}, which is another one"
    return note


def chat_of(model: nn.Module) -> Chat | None:
    """How the conversations of the adapters on a model were rendered in training, the last one's; None where none has a
    chat template."""
    return next(reversed(attachment(model).chats.values()), None)


def template_of(model: nn.Module) -> str | None:
    """The chat template of `chat_of`."""
    chat = chat_of(model)
    return None if chat is None else chat.template


def template_in(folder: Path) -> str | None:
    """The chat template of an adapter folder: of its own file, or as older tokenizers have it."""
    if (folder / TEMPLATE).is_file():
        try:
            return (folder / TEMPLATE).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise AdapterError(f"{folder / TEMPLATE}: cannot be read: {error}", code="unreadable-file") from None
    file = folder / "tokenizer_config.json"
    found = read_json(file).get("chat_template") if file.is_file() else None
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
