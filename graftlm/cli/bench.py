"""`graft bench`."""

from typing import Annotated

import typer

from graftlm.cli.options import BaseOption, JsonOption, NetworkOption
from graftlm.cli.terminal import prepare_libraries, print_json


def bench(
    base: BaseOption = "smollm2",
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Number of CPU threads. Default: torch's.")
    ] = None,
    kernels: Annotated[
        str, typer.Option("--kernels", help="Kernels, as train.kernels: auto, ours, torch or compiled.")
    ] = "auto",
    as_json: JsonOption = False,
    network: NetworkOption = False,
) -> None:
    """Measure the training speed of this machine and its upper bound.

    It trains LoRA on built-in rows for about half a minute.
    """
    from graftlm.planning.bench import bench
    from graftlm.training.config import TrainConfig

    prepare_libraries()
    config = TrainConfig(kernels=kernels)  # type: ignore[arg-type]  # it checks the name
    found = bench(base, threads=threads, kernels=config.kernels, network=network)
    if as_json:
        print_json(found)
        return
    for dtype, rates in found["matrix_gflops_by_dtype"].items():
        each = ", ".join(f"{rate:,.0f} {name.replace('_', ' ')}" for name, rate in rates.items())
        print(f"matrix products in {dtype}: {each} (GFLOP/s, {found['threads']} threads)")
    print(f"a token needs {found['mflop_per_token']:,.0f} MFLOP: at most {found['floor_tokens_per_s']:,.0f} tokens/s")
    print(f"LoRA does {found['tokens_per_s']:,.0f} tokens/s: {found['share_of_floor']:.0%} of it")
    for name, share in found["parts"].items():
        print(f"  {name:16} {share:5.0%}")
    print("kernels: " + "; ".join(found["kernels_by_operation"]))
    for each in found["kernels"]["classes"]:
        times = ", ".join(f"{name} {us:,.0f}" for name, us in each["microseconds"].items())
        print(f"  {each['calls']:55} {each['by']:8} (microseconds: {times})")
