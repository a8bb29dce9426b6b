"""Messages -> answer: the render function of training and the generator of the model, joined."""

import datetime
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from graftlm.adapters.chat import chat_of, tokenizer_of
from graftlm.data.chat.render import Renderer
from graftlm.data.chat.turn_order import TurnOrder
from graftlm.data.sources.formats import Message
from graftlm.generation.adapter_pool import Lease
from graftlm.generation.engine import Engine
from graftlm.generation.generate import generate
from graftlm.generation.grammar import Grammar, GrammarCompiler
from graftlm.generation.text_stream import TextPiece, TextStream
from graftlm.hub.stopping import all_stop_ids

_renderer = lru_cache(maxsize=4)(Renderer)


def chat_renderer(
    model: Any,
    tokenizer: Any,
    *,
    today: datetime.date | None = None,
    turn_order: TurnOrder | None = None,
    lease: Lease | None = None,
) -> Renderer:
    """What renders the prompts of a model: as its adapter's were rendered in training, where it has one with a chat
    template; else with the tokenizer's template on the present day, with `turn_order: refuse`. `lease`: of the adapters
    of a pool, in place of those that are attached."""
    if lease is None:
        chat, tokenizer = chat_of(model), tokenizer_of(model, tokenizer)
    else:
        chat, tokenizer = lease.chat, lease.tokenizer or tokenizer
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
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    grammar: Grammar | None = None,
    stop: Sequence[str] = (),
    seed: int = 0,
    on_text: Callable[[str], None] | None = None,
    today: datetime.date | None = None,
    turn_order: TurnOrder | None = None,
    engine: Engine | None = None,
    lease: Lease | None = None,
) -> str:
    """The model's answer to a prompt, or to a conversation that ends with a user's turn; greedy at temperature 0.

    The answer follows `grammar`, where there is one (it needs the extra `serve`), up to `max_new_tokens`. It ends
    before the first of the texts `stop`, wherever tokens begin and end. How the other options choose among tokens:
    `generation.sampling.Sampling`, and its ValueError. `on_text` is called with each new piece of text as it comes.
    Tokenizer and chat template are those of the adapters on the model, where they have them. So are `today`, the day
    that templates write (of training; without an adapter the present day), and `turn_order`, what becomes of a system
    message that the template has no place for (`data.turn_order` of training; without an adapter it is refused).
    Returns the text of the answer. Raises ValueError for an empty text in `stop`, DataError for a conversation that the
    template refuses, and RequestError for a grammar that is wrong or not supported. `engine`: one of this model that
    exists already, for a chat of many turns. `lease`: of the adapters of a pool that answer, in place of those that are
    active on the model.
    """
    # Over 60 lines: every option of sampling is named twice, in the signature and in the call.
    messages = [Message("user", conversation)] if isinstance(conversation, str) else list(conversation)
    renderer = chat_renderer(model, tokenizer, today=today, turn_order=turn_order, lease=lease)
    stop_ids = all_stop_ids(model, renderer.stop_ids)
    stream, texts = TextStream(renderer.tokenizer, stop), list[str]()

    def show(piece: TextPiece | None) -> None:
        if piece is not None and piece.text:
            texts.append(piece.text)
            if on_text is not None:
                on_text(piece.text)

    for _ in generate(
        model,
        [renderer.prompt(messages)],
        stop_ids=stop_ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        grammar=None if grammar is None else GrammarCompiler(renderer.tokenizer, stop_ids).compile(grammar),
        seed=seed,
        stop_when=(lambda _: stream.stopped_by is not None) if stop else None,
        on_token=lambda token: None if token in stop_ids else show(stream.add(token)),
        engine=engine,
        adapters=None if lease is None else lease.adapters,
    ):
        show(stream.close())
    return "".join(texts)
