"""`graft estimate`."""

from graftlm.cli.options import JsonOption, OverridesArgument, RecipeArgument
from graftlm.cli.terminal import prepare_libraries, print_json


def estimate(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    as_json: JsonOption = False,
) -> None:
    """Estimate peak memory and step time of a recipe without loading weights."""
    from graftlm.planning.estimate import estimate
    from graftlm.recipe import read_recipe

    prepare_libraries()
    found = estimate(read_recipe(recipe, overrides or []))
    if as_json:
        print_json(found)
        return
    print(f"peak memory  {found['peak_gib']:.2f} GiB of {found['memory_free_gib']:.1f} that are free")
    for name, gib in found["parts"]["memory_gib"].items():
        print(f"  {name.replace('_', ' '):25} {gib:8.2f} GiB")
    print(f"a step       {found['step_s']:.2f} s, {found['tokens_per_s']:,.0f} tokens/s")
    for name, seconds in found["parts"]["time_s"].items():
        print(f"  {name.replace('_', ' '):25} {seconds:8.2f} s")
    for line in found["reach"]:
        print(line)
    for line in found["advice"]:
        print(f"advice: {line}")
