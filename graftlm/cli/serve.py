"""`graft serve`."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graftlm.cli.data import recipe_for
from graftlm.cli.models import load_model, show_reason
from graftlm.cli.options import BaseOption, DtypeOption, NetworkOption, QuantizationOption
from graftlm.cli.terminal import warn

if TYPE_CHECKING:
    import socket

    from graftlm.serve.runs import Service

KEY_VARIABLE = "GRAFT_API_KEY"


def serve(
    base: BaseOption = "smollm2",
    adapters: Annotated[
        Path | None,
        typer.Option("--adapters", help="Folder of adapters, or one adapter; graftlm's or PEFT's. Named by folder."),
    ] = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on. Default: this machine alone.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key",
            metavar="KEY",
            help=f"A key that clients must send; @FILE reads keys from a file, one a line. Repeat the option for "
            f"several. Default: ${KEY_VARIABLE}.",
        ),
    ] = None,
    allow_adapter_changes: Annotated[
        bool,
        typer.Option("--allow-adapter-changes", help="Let clients load and unload adapters of the --adapters folder."),
    ] = False,
    runs: Annotated[
        Path | None,
        typer.Option("--runs", help="Folder of training runs that the page at / shows."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="RECIPE_OR_FILE",
            help="Recipe or file of training rows whose check (graft data check) the page at / shows.",
        ),
    ] = None,
    router: Annotated[
        str | None,
        typer.Option(
            "--router",
            metavar="NAME_OR_FILE",
            help="Router that chooses the adapters of requests with the model auto: its name, or a YAML file with "
            "options.",
        ),
    ] = None,
    slots: Annotated[int, typer.Option("--slots", min=1, help="Adapters that are on the model at a time.")] = 16,
    max_requests: Annotated[
        int, typer.Option("--max-requests", min=1, help="Answers that are computed at a time.")
    ] = 32,
    queue: Annotated[
        int, typer.Option("--queue", min=0, help="Answers that may wait; others are refused (429).")
    ] = 256,
    timeout: Annotated[float, typer.Option("--timeout", min=1, help="Most seconds for one request.")] = 600,
    drain_seconds: Annotated[
        float, typer.Option("--drain-seconds", min=0, help="Seconds for running requests after SIGTERM.")
    ] = 30,
    dtype: DtypeOption = None,
    quantization: QuantizationOption = None,
    network: NetworkOption = False,
) -> None:
    """Serve a base and its adapters over HTTP, as OpenAI's and Anthropic's clients expect it."""
    # Over 60 lines: its signature is the list of options, with the help of each.
    require_extra()
    from graftlm.routing.config import read_router
    from graftlm.serve.limits import Limits
    from graftlm.serve.security import is_loopback
    from graftlm.serve.server import Options, make_service, run

    if runs is not None and not runs.is_dir():
        raise typer.BadParameter(f"{runs}: there is no such folder", param_hint="--runs")
    recipe = recipe_for(data, base, None, None, network, []) if data is not None else None
    keys, routed = read_keys(api_key), None if router is None else read_router(router)
    if allow_adapter_changes and (adapters is None or (adapters / "adapter_config.json").is_file()):
        raise typer.BadParameter(
            "clients can load adapters only from a folder of adapters: name one with --adapters",
            param_hint="--allow-adapter-changes",
        )
    listening = listening_socket(host, port)
    with listening:
        if not keys and not is_loopback(host):
            warn(f"warning: {host} can be reached from other machines, and no --api-key is asked for: anybody may ask")
        model, tokenizer = load_model(base, [], network, dtype, quantization)
        options = Options(host, keys, allow_adapter_changes, slots, max_requests, base, runs, recipe, routed)
        limits = Limits(queue=queue, timeout=timeout, drain=drain_seconds)
        service = make_service(model, tokenizer, adapters, options, limits)
        show_reason(service.worker.engine)
        run(service, options, listening, lambda: show_served(service, host, listening.getsockname()[1]))


def require_extra() -> None:
    """Wrong usage where the packages of the extra `serve` are missing."""
    from importlib.util import find_spec

    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise typer.BadParameter(f"graft serve needs {', '.join(missing)}: pip install 'graftlm[serve]'")


def read_keys(given: list[str] | None) -> list[str]:
    """The keys of --api-key, those in files that it names, or those of the environment."""
    found: list[str] = []
    for key in given or [os.environ[KEY_VARIABLE]] if given or KEY_VARIABLE in os.environ else []:
        if key.startswith("@"):
            try:
                text = Path(key[1:]).expanduser().read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise typer.BadParameter(f"{key[1:]}: {error}", param_hint="--api-key") from None
            found += [line.strip() for line in text.splitlines() if line.strip()]
        else:
            found.append(key.strip())
    if (given or KEY_VARIABLE in os.environ) and not all(found or [""]):
        raise typer.BadParameter("a key is empty, so anybody would have it", param_hint="--api-key")
    return found


def listening_socket(host: str, port: int) -> "socket.socket":
    """Bound before the model is read, so that a port that is taken is known at once."""
    from graftlm.serve.server import listen

    try:
        return listen(host, port)
    except OSError as error:
        raise typer.BadParameter(
            f"{host}:{port}: {error.strerror or error}. Choose another port, or 0 for a free one", param_hint="--port"
        ) from None


def show_served(service: "Service", host: str, port: int) -> None:
    """Say what is served, and where."""
    names = service.catalog.names
    shown = ", ".join(names[1:9]) + (f" and {len(names) - 9} more" if len(names) > 9 else "")
    auto = "" if service.catalog.routing is None else f", auto: {service.catalog.routing.config.name}"
    print(f"base {names[0]}" + (f", adapters {shown}" if names[1:] else "") + auto, flush=True)
    where = f"[{host}]" if ":" in host else host
    print(f"ready on http://{where}:{port}/v1, with a page at http://{where}:{port}/", flush=True)
