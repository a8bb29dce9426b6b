"""`graft verify`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graftlm.cli.options import DtypeOption, JsonOption, NetworkOption, QuantizationOption
from graftlm.cli.terminal import note, prepare_libraries, print_json, print_table

if TYPE_CHECKING:
    from graftlm.verification.compare import RouteFinding
    from graftlm.verification.verify import Verification


def verify(
    url: Annotated[str, typer.Argument(metavar="URL", help="Server, up to /v1: http://localhost:8000/v1.")],
    adapter: Annotated[Path, typer.Option("--adapter", help="Adapter folder, graftlm's or PEFT's.")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="Name by which the server knows the adapter. Default: the name of the folder, or the server's only "
            "adapter.",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", help="Base model, as in graft generate. Default: the one that the adapter names."),
    ] = None,
    other: Annotated[
        list[Path] | None,
        typer.Option("--other", help="Adapter that may be served in its place. Repeat the option for several."),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="Text file with questions, one a line. Default: built-in ones.")
    ] = None,
    key_from: Annotated[
        str | None,
        typer.Option(
            "--key-from",
            help="Environment variable with the server's key. Default: OPENAI_API_KEY for another machine, none for "
            "this one.",
        ),
    ] = None,
    timeout: Annotated[float, typer.Option("--timeout", min=1.0, help="Seconds to wait for each reply.")] = 120.0,
    dtype: DtypeOption = None,
    quantization: QuantizationOption = None,
    as_json: JsonOption = False,
    network: NetworkOption = False,
) -> None:
    """Prove that a server applies an adapter, at its scale and with its chat template.

    Works with OpenAI-compatible servers such as vLLM, SGLang and llama-server. It compares the server's answers with
    those computed here for the base, the adapter at any scale, other adapters and other chat templates.

    Exit codes: 0 applied, 1 error, 2 wrong usage, 3 not applied, 4 undecided.
    """
    # Over 60 lines: its signature is the list of options, with the help of each.
    from rich.console import Console

    from graftlm.display.terminal import progress
    from graftlm.verification.prompts import PROMPTS
    from graftlm.verification.verify import verify

    prepare_libraries()
    questions = PROMPTS if prompts is None else _lines(prompts)
    with progress(Console(stderr=True)) as bars:
        tasks: dict[str, int] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, now="")
            bars.update(tasks[what], completed=done, total=total)  # type: ignore[arg-type]

        found = verify(
            url,
            adapter,
            model=model,
            base=base,
            others=other or [],
            prompts=questions,
            key_from=key_from,
            timeout=timeout,
            dtype=dtype,
            quantization=quantization,
            network=network,
            on_progress=show,
        )
    if as_json:
        print_json(found.to_json())
    else:
        _show(found)
    raise typer.Exit(found.exit_code)


def _lines(file: Path) -> list[str]:
    from graftlm.errors import DataError

    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--prompts: {file} cannot be read: {error}", code="unreadable-file") from None


def _show(found: "Verification") -> None:
    for route in found.routes:
        print_table(["hypothesis", "distance", "behind"], _rows(route), title=_title(route))
    print(f"{found.verdict}: {found.model} at {found.url}: {found.why}")
    for text in found.notes:
        note(text)


def _title(route: "RouteFinding") -> str:
    unit = "nats" if route.evidence == "log-probabilities" else "share of tokens"
    counted = f"{route.numbers} {'values' if unit == 'nats' else 'tokens'} of {route.prompts} prompts"
    scale = ""
    if route.factor is not None and route.factor_range is not None:
        low, high = route.factor_range
        scale = f"; scale {route.factor:.2f} ({low:.2f} to {high:.2f})"
    return f"{route.route}, {route.evidence}: {counted}; {route.verdict}{scale} (distance in {unit})"


def _rows(route: "RouteFinding") -> list[list[str]]:
    return [[each.name, f"{each.distance:.4f}", f"{each.behind:.1f}"] for each in route.hypotheses]
