"""Messages -> answer: the render function of training and the generator of the model, joined."""

import datetime
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from graftlm.adapters.chat import chat_of, tokenizer_of
from graftlm.data.chat.render import Renderer
from graftlm.data.chat.turn_order import TurnOrder
from graftlm.data.sources.formats import Message
from graftlm.generation.generate import generate
from graftlm.model.hub.stopping import all_stop_ids

_renderer = lru_cache(maxsize=4)(Renderer)


def chat_renderer(
    model: Any, tokenizer: Any, *, today: datetime.date | None = None, turn_order: TurnOrder | None = None
) -> Renderer:
    """What renders the prompts of a model: as its adapter's were rendered in training, where it has one with a chat
    template; else with the tokenizer's template on the present day, with `turn_order: refuse`."""
    chat, tokenizer = chat_of(model), tokenizer_of(model, tokenizer)
    today = today or (chat.today if chat else None) or datetime.date.today()
    turn_order = turn_order or (chat.turn_order if chat else "refuse")
    return _renderer(tokenizer, chat.template if chat else tokenizer.chat_template, today=today, turn_order=turn_order)


def answer(
    model: Any,
    tokenizer: Any,
    conversation: str | Sequence[Message],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: Sequence[str] = (),
    seed: int = 0,
    on_text: Callable[[str], None] | None = None,
    today: datetime.date | None = None,
    turn_order: TurnOrder | None = None,
) -> str:
    """The model's answer to a prompt, or to a conversation that ends with a user's turn; greedy at temperature 0.

    The answer ends before the first of the texts `stop`, wherever tokens begin and end. How the other options choose
    among tokens: `generation.generate.generate`, and its ValueError. `on_text` is called with each new piece of text
    as it comes.
    Tokenizer and chat template are those of the adapters on the model, where they have them. So are `today`, the day
    that templates write (of training; without an adapter the present day), and `turn_order`, what becomes of a system
    message that the template has no place for (`data.turn_order` of training; without an adapter it is refused).
    Returns the text of the answer. Raises ValueError for an empty text in `stop`, and DataError for a conversation that
    the template refuses.
    """
    messages = [Message("user", conversation)] if isinstance(conversation, str) else list(conversation)
    if "" in stop:
        raise ValueError("stop: an empty text is in every answer, before its first character")
    renderer = chat_renderer(model, tokenizer, today=today, turn_order=turn_order)
    stop_ids = all_stop_ids(model, renderer.stop_ids)
    stream = _Stream(renderer, stop_ids, stop, on_text)
    results = generate(
        model,
        [renderer.prompt(messages)],
        stop_ids=stop_ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop_when=(lambda ids: any(text in renderer.decode(ids) for text in stop)) if stop else None,
        on_token=stream.add if on_text is not None else None,
    )
    text = _before(renderer.decode(next(iter(results))[1]), stop)
    stream.show(text)
    return text


class _Stream:
    """The text of an answer while its tokens come: calls `on_text` with each new piece that is sure to stay."""

    def __init__(
        self,
        renderer: Renderer,
        stop_ids: Sequence[int],
        stop: Sequence[str],
        on_text: Callable[[str], None] | None,
    ) -> None:
        self.renderer, self.stop_ids, self.stop, self.on_text = renderer, stop_ids, stop, on_text
        self.ids: list[int] = []
        self.shown = ""

    def add(self, token: int) -> None:
        if token in self.stop_ids:
            return
        self.ids.append(token)
        text = _before(self.renderer.decode(self.ids), self.stop)
        if not text.endswith("\ufffd"):  # half of a character: wait for the rest
            self.show(text[: len(text) - _may_become(text, self.stop)])

    def show(self, text: str) -> None:
        if self.on_text is not None and len(text) > len(self.shown):
            self.on_text(text[len(self.shown) :])
            self.shown = text


def _before(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the texts that end an answer."""
    return text[: min((at for each in stop if (at := text.find(each)) >= 0), default=len(text))]


def _may_become(text: str, stop: Sequence[str]) -> int:
    """How many of the last characters may be the beginning of a text that ends the answer."""
    lengths = (n for each in stop for n in range(1, len(each)) if text.endswith(each[:n]))
    return max(lengths, default=0)
