"""`graft estimate`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from graftlm.cli.options import (
    AdapterOption,
    DtypeOption,
    JsonOption,
    NetworkOption,
    OverridesArgument,
    QuantizationOption,
)
from graftlm.cli.terminal import prepare_libraries, print_json

REQUESTS, PROMPT_TOKENS, NEW_TOKENS = 1, 512, 128


def estimate(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="RECIPE", help="Recipe, a YAML file: see docs/recipe.md.")
    ] = None,
    overrides: OverridesArgument = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Estimate answering with this base, in place of a recipe.")
    ] = None,
    adapter: AdapterOption = None,
    requests: Annotated[
        int | None, typer.Option("--requests", min=1, help=f"Requests at a time. Default: {REQUESTS}.")
    ] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option("--prompt-tokens", min=1, help=f"Tokens of each prompt. Default: {PROMPT_TOKENS}."),
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option("--new-tokens", min=1, help=f"Tokens of each answer. Default: {NEW_TOKENS}.")
    ] = None,
    dtype: DtypeOption = None,
    quantization: QuantizationOption = None,
    network: NetworkOption = False,
    as_json: JsonOption = False,
) -> None:
    """Estimate peak memory and step time of a recipe, or the memory of answering, without loading weights.

    With --base in place of a recipe: the memory of the engine that answers requests, sampled at temperature 1.
    """
    if (recipe is None) == (base is None):
        raise typer.BadParameter("give a recipe, or --base with what is answered, not both", param_hint="RECIPE")
    if base is None:
        _refuse_without_base(
            {
                "--adapter": adapter,
                "--requests": requests,
                "--prompt-tokens": prompt_tokens,
                "--new-tokens": new_tokens,
                "--dtype": dtype,
                "--quantization": quantization,
                "--network": network,
            }
        )
        assert recipe is not None
        found = _of_recipe(recipe, overrides or [])
    else:
        lengths = prompt_tokens or PROMPT_TOKENS, new_tokens or NEW_TOKENS
        found = _of_answering(base, adapter or [], requests or REQUESTS, lengths, dtype, quantization, network)
    if as_json:
        print_json(found)
    else:
        _show(found)


def _refuse_without_base(options: dict[str, Any]) -> None:
    if options_set := [option for option, value in options.items() if value]:
        raise typer.BadParameter("it goes with --base; a recipe says it itself", param_hint=options_set[0])


def _of_recipe(recipe: Path, overrides: list[str]) -> dict[str, Any]:
    from graftlm.planning.estimate import estimate
    from graftlm.recipe import read_recipe

    prepare_libraries()
    return estimate(read_recipe(recipe, overrides))


def _of_answering(
    base: str,
    adapters: list[Path],
    requests: int,
    lengths: tuple[int, int],
    dtype: str | None,
    quantization: str | None,
    network: bool,
) -> dict[str, Any]:
    from graftlm.generation.sampling import Sampling
    from graftlm.hub.config import BaseConfig
    from graftlm.planning.generation import Load, estimate_generation

    prepare_libraries()
    config = BaseConfig(name=base, dtype=dtype or "auto", quantization=quantization or "none")  # type: ignore[arg-type]
    load = Load(requests, *lengths, sampling=Sampling(temperature=1.0))
    return estimate_generation(config, adapters, load, network=network)


def _show(found: dict[str, Any]) -> None:
    print(f"peak memory  {found['peak_gib']:.2f} GiB of {found['memory_free_gib']:.1f} that are free")
    for name, gib in found["parts"]["memory_gib"].items():
        print(f"  {name.replace('_', ' '):25} {gib:8.2f} GiB")
    if "step_s" in found:
        print(f"a step       {found['step_s']:.2f} s, {found['tokens_per_s']:,.0f} tokens/s")
        for name, seconds in found["parts"]["time_s"].items():
            print(f"  {name.replace('_', ' '):25} {seconds:8.2f} s")
    else:
        print(f"cache        {found['cache_bytes_per_token']:,} bytes for each token of a request")
    for line in found.get("reach", ()):
        print(line)
    for line in found["advice"]:
        print(f"advice: {line}")
