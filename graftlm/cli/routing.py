"""The router of a command, over the adapters that it names."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from graftlm.cli.terminal import note

if TYPE_CHECKING:
    from graftlm.generation.adapter_pool import Lease
    from graftlm.routing.routing import Routing


def open_routing(model: Any, tokenizer: Any, adapters: Sequence[Path], route: str) -> "Routing":
    """The router; adapters have the names of their folders. Wrong usage where there is none to route to."""
    from graftlm.adapters.folder import named_adapters
    from graftlm.generation.adapter_pool import AdapterPool
    from graftlm.routing.config import read_router
    from graftlm.routing.routing import Routing

    config = read_router(route)
    found = [(name, path) for folder in adapters for name, path in named_adapters(folder).items()]
    if not found:
        raise typer.BadParameter("a router chooses among adapters: name some with --adapter", param_hint="--route")
    pool = AdapterPool(model, slots=len(found))
    for name, path in found:
        pool.register(name, path)
    return Routing(pool, tokenizer, config)


@contextmanager
def chosen_for(model: Any, tokenizer: Any, adapters: Sequence[Path], route: str, question: str) -> "Iterator[Lease]":
    """Inside, the adapters that the router chose for a question; says on standard error which."""
    from graftlm.data.sources.formats import Message

    routing = open_routing(model, tokenizer, adapters, route)
    try:
        ids = routing.library.renderer.prompt([Message("user", question)])
        with routing.route(ids.tolist()) as chosen:
            note(f"routed to {chosen.shown}")
            yield chosen.lease
    finally:
        routing.close()
