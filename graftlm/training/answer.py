"""Messages -> answer: the render function of training and the generator of the model, joined."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from graftlm.data.formats import Message
from graftlm.data.render import Renderer
from graftlm.model.generate import generate
from graftlm.model.store import template_of

_renderer = lru_cache(maxsize=4)(Renderer)


def answer(
    model: Any,
    tokenizer: Any,
    conversation: str | Sequence[Message],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """The model's answer to a prompt, or to a conversation that ends with a user's turn; greedy at temperature 0.

    The chat template is that of the adapters on the model, where they have one. `on_text` is called with each new
    piece of text as it comes.
    """
    messages = [Message("user", conversation)] if isinstance(conversation, str) else list(conversation)
    renderer = _renderer(tokenizer, template_of(model) or tokenizer.chat_template)
    new: list[int] = []
    shown = ""

    def on_token(token: int) -> None:
        nonlocal shown
        if token in renderer.stop_ids:
            return
        new.append(token)
        text = renderer.decode(new)
        if on_text is not None and not text.endswith("\ufffd"):  # half of a character: wait for the rest
            on_text(text[len(shown) :])
            shown = text

    results = generate(
        model,
        [renderer.prompt(messages)],
        stop_ids=renderer.stop_ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        on_token=on_token if on_text is not None else None,
    )
    said = renderer.decode(next(iter(results))[1])
    if on_text is not None and len(said) > len(shown):
        on_text(said[len(shown) :])
    return said
