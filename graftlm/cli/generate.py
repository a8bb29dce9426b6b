"""`graft generate`."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
)
from graftlm.cli.routing import chosen_for
from graftlm.cli.sampling import parse_day, sampling_options
from graftlm.cli.terminal import warn

if TYPE_CHECKING:
    from graftlm.generation.grammar import Grammar


def generate(
    question: Annotated[str | None, typer.Argument(metavar="QUESTION", help="The question.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="The question, as an option.")] = None,
    base: BaseOption = "smollm2",
    adapter: AdapterOption = None,
    max_new_tokens: TokensOption = 128,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    min_p: MinPOption = 0.0,
    repetition_penalty: PenaltyOption = 1.0,
    presence_penalty: PresenceOption = 0.0,
    frequency_penalty: FrequencyOption = 0.0,
    json_schema: Annotated[
        Path | None,
        typer.Option("--json-schema", help="File with a JSON schema: the answer is JSON that is valid by it."),
    ] = None,
    route: Annotated[
        str | None,
        typer.Option(
            "--route",
            metavar="NAME_OR_FILE",
            help="Router that chooses among the --adapter folders: its name, or a YAML file with options.",
        ),
    ] = None,
    stop: StopOption = None,
    seed: SeedOption = 0,
    today: TodayOption = None,
    dtype: DtypeOption = None,
    quantization: QuantizationOption = None,
    network: NetworkOption = False,
) -> None:
    """Answer one question and print the answer."""
    # Over 60 lines: its signature is the list of options, with the help of each.
    from graftlm.generation.answer import answer
    from graftlm.generation.engine import Engine

    if (question is None) == (prompt is None):
        raise typer.BadParameter('give one question: graft generate "How are you?"', param_hint="QUESTION")
    penalties = (repetition_penalty, presence_penalty, frequency_penalty)
    options = sampling_options(temperature, top_k, top_p, min_p, penalties, stop) | {"today": parse_day(today)}
    if json_schema is not None:
        options["grammar"] = _grammar(json_schema)
    folders = adapter or []
    model, tokenizer = load_model(base, [] if route is not None else folders, network, dtype, quantization)
    asked = (question if question is not None else prompt) or ""
    engine = Engine(model, prepack=False)  # for a single answer it does not pay
    show_reason(engine)
    with nullcontext() if route is None else chosen_for(model, tokenizer, folders, route, asked) as lease:
        options |= {"max_new_tokens": max_new_tokens, "seed": seed, "engine": engine, "lease": lease}
        text = answer(model, tokenizer, asked, **options)
    print(text)
    if json_schema is not None and not _is_json(text):
        warn("the answer is cut off, so it is no whole JSON: give it more tokens (--max-new-tokens)")


def _grammar(file: Path) -> "Grammar":
    """The grammar of the JSON schema in a file."""
    from graftlm.generation.grammar import Grammar

    try:
        return Grammar.json_schema(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{file}: no JSON can be read from it: {error}", param_hint="--json-schema") from None


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
