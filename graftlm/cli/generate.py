"""`graft generate`."""

from typing import Annotated

import typer

from graftlm.cli.models import load_model
from graftlm.cli.options import (
    AdapterOption,
    BaseOption,
    DtypeOption,
    MinPOption,
    NetworkOption,
    PenaltyOption,
    QuantizationOption,
    SeedOption,
    StopOption,
    TemperatureOption,
    TodayOption,
    TokensOption,
    TopKOption,
    TopPOption,
)
from graftlm.cli.sampling import parse_day, sampling_options


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
    stop: StopOption = None,
    seed: SeedOption = 0,
    today: TodayOption = None,
    dtype: DtypeOption = None,
    quantization: QuantizationOption = None,
    network: NetworkOption = False,
) -> None:
    """Answer one question and print the answer."""
    from graftlm.generation.answer import answer

    if (question is None) == (prompt is None):
        raise typer.BadParameter('give one question: graft generate "How are you?"', param_hint="QUESTION")
    options = sampling_options(temperature, top_k, top_p, min_p, repetition_penalty, stop) | {"today": parse_day(today)}
    model, tokenizer = load_model(base, adapter or [], network, dtype, quantization)
    asked = question if question is not None else prompt
    print(answer(model, tokenizer, asked or "", max_new_tokens=max_new_tokens, seed=seed, **options))
