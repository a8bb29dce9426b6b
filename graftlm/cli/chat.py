"""`graft chat`."""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftlm.cli.models import load_model, show_reason
from graftlm.cli.options import (
    AdapterOption,
    BaseOption,
    DtypeOption,
    FrequencyOption,
    MinPOption,
    NetworkOption,
    PenaltyOption,
    PresenceOption,
    QuantizationOption,
    SeedOption,
    StopOption,
    TemperatureOption,
    TodayOption,
    TokensOption,
    TopKOption,
    TopPOption,
    check_choice,
)
from graftlm.cli.sampling import parse_day, sampling_options
from graftlm.cli.terminal import warn
from graftlm.errors import nearest

if TYPE_CHECKING:
    from graftlm.data.sources.formats import Message


CHAT_HELP = "/base turns the adapter off, /tuned on again, /new starts a new conversation, /quit quits"


def chat(
    base: BaseOption = "smollm2",
    adapter: AdapterOption = None,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    turn_order: Annotated[
        str | None,
        typer.Option(
            "--turn-order",
            help="If the chat template takes no system message: refuse, merge (into the first question) or drop. "
            "Default: as the adapter was trained.",
        ),
    ] = None,
    max_new_tokens: TokensOption = 512,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    min_p: MinPOption = 0.0,
    repetition_penalty: PenaltyOption = 1.0,
    presence_penalty: PresenceOption = 0.0,
    frequency_penalty: FrequencyOption = 0.0,
    stop: StopOption = None,
    seed: SeedOption = 0,
    today: TodayOption = None,
    dtype: DtypeOption = None,
    quantization: QuantizationOption = None,
    network: NetworkOption = False,
) -> None:
    """Chat with the model; answers are streamed.

    /base turns the adapter off in the middle of a conversation, /tuned turns it on again.
    """
    # Over 60 lines: its signature is the list of options, with the help of each.
    from graftlm.data.sources.formats import Message
    from graftlm.generation.answer import answer, chat_renderer
    from graftlm.generation.engine import Engine

    penalties = (repetition_penalty, presence_penalty, frequency_penalty)
    options = sampling_options(temperature, top_k, top_p, min_p, penalties, stop)
    rendering: dict[str, Any] = {"today": parse_day(today), "turn_order": _turn_order(turn_order)}
    model, tokenizer = load_model(base, adapter or [], network, dtype, quantization)
    engine = Engine(model)
    show_reason(engine)
    start = [Message("system", system)] if system else []
    history = list(start)

    def ask(messages: list[Message]) -> str:
        say = partial(answer, model, tokenizer, messages, on_text=_write, engine=engine, **rendering)
        return say(max_new_tokens=max_new_tokens, seed=seed, **options)

    if system:  # what the template does not take is an error before anybody types
        chat_renderer(model, tokenizer, **rendering).prompt([*start, Message("user", "?")])
    typer.secho(CHAT_HELP, dim=True, err=True)
    for line in _lines():
        if line in ("/quit", "/exit"):
            break
        if line == "/new":
            history = list(start)
        elif line in ("/base", "/tuned"):
            _switch(model, line, adapter)
        elif line.startswith("/"):
            warn(f"{line}: no such command. {nearest(line, ['/base', '/tuned', '/new', '/quit'])}")
        elif line:
            history = _turn(history, line, ask)


def _switch(model: Any, command: str, adapter: list[Path] | None) -> None:
    """Turn the adapters on (/tuned) or off (/base)."""
    from graftlm.model.modes import activate
    from graftlm.model.registry import attachment

    if not adapter:
        warn("there is no adapter: start with --adapter FOLDER")
        return
    activate(model, *(attachment(model).configs if command == "/tuned" else ()))


def _turn_order(how: str | None) -> str | None:
    from typing import get_args

    from graftlm.data.chat.turn_order import TurnOrder

    return how and check_choice(how, get_args(TurnOrder), "--turn-order")


def _turn(history: "list[Message]", line: str, ask: "Callable[[list[Message]], str]") -> "list[Message]":
    """One question and its answer, added to the history; an answer that Ctrl-C cuts off is forgotten."""
    from graftlm.data.sources.formats import Message

    messages = [*history, Message("user", line)]
    try:
        text = ask(messages)
    except KeyboardInterrupt:
        typer.secho("\n(stopped; this turn is discarded)", dim=True, err=True)
        return history
    print()
    return [*messages, Message("assistant", text)]


def _lines() -> Iterator[str]:
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()
