"""A service on a socket, and how it ends: what runs may finish, nothing new begins."""

import logging
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import uvicorn

from graftlm.adapters.folder import named_adapters
from graftlm.errors import AdapterError
from graftlm.generation.adapter_pool import AdapterPool
from graftlm.generation.engine import Engine
from graftlm.recipe import Recipe
from graftlm.routing.base import RouterConfig
from graftlm.routing.routing import Routing
from graftlm.serve.app import make_app
from graftlm.serve.catalog import AUTO, Catalog
from graftlm.serve.limits import Limits
from graftlm.serve.metrics import Metrics
from graftlm.serve.runs import Service
from graftlm.serve.security import is_loopback
from graftlm.serve.worker import Worker

log = logging.getLogger("graftlm.serve")

LINGER = 5
"""Seconds that responses have to reach their clients after their answers are complete."""

PREFIX_TOKENS = 8192
"""Tokens of requests that ended which stay in memory: the beginning of the next turn of a conversation."""


@dataclass(frozen=True)
class Options:
    """How a server is run."""

    host: str = "127.0.0.1"
    keys: Sequence[str] = ()
    allow_adapter_changes: bool = False
    slots: int = 16
    max_requests: int = 32
    base: str = ""
    """How the user named the base, by which it may be asked too."""
    runs: Path | None = None
    """Folder of the runs that the page shows."""
    data: Recipe | None = None
    """Recipe of the rows that the page shows."""
    router: RouterConfig | None = None
    """Who answers requests with the model `auto`."""


def make_service(model: Any, tokenizer: Any, adapters: Path | None, options: Options, limits: Limits) -> Service:
    """The service of a base and of the adapters in a folder. Raises what `AdapterPool.register` does for the first
    adapter that cannot be served, and `Routing` for one that cannot be routed to."""
    # The products of a bfloat16 base round as much as factors in bfloat16 do, and these are half as much to read.
    pool = AdapterPool(model, slots=options.slots, dtype=torch.bfloat16 if model.dtype == torch.bfloat16 else None)
    named = named_adapters(adapters) if adapters is not None else {}
    if options.router is not None and AUTO in named:
        raise AdapterError(
            f"an adapter {AUTO!r} cannot be served beside a router: requests with this model are those that it routes. "
            "Rename the folder",
            code="name-registered",
        )
    for name, folder in named.items():
        pool.register(name, folder)
    metrics = Metrics()
    engine = Engine(model, max_requests=options.max_requests, prefix_tokens=PREFIX_TOKENS)
    routing = None if options.router is None else Routing(pool, tokenizer, options.router)
    catalog = Catalog(model, tokenizer, pool, alias=options.base, folder=adapters, routing=routing)
    return Service(catalog, Worker(engine, metrics), limits, metrics)


class DrainingServer(uvicorn.Server):
    """A uvicorn server that ends after the answers that it has begun.

    The first SIGTERM or SIGINT: new requests are refused with 503, running ones have `limits.drain` seconds, then they
    are cancelled. The second one ends it at once.
    """

    def __init__(self, config: uvicorn.Config, service: Service, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.service, self.on_ready = service, on_ready
        self.ends = 0.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.service.draining:
            super().handle_exit(sig, frame)
            return
        self.ends = time.monotonic() + self.service.limits.drain
        self.service.draining = True

    async def on_tick(self, counter: int) -> bool:
        if self.service.draining and (not self.service.open_answers or time.monotonic() >= self.ends):
            self.service.cancel()
            return True
        return await super().on_tick(counter)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. OSError where it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        found.listen(2048)
    except OSError:
        found.close()
        raise
    return found


def run(service: Service, options: Options, listening: socket.socket, on_ready: Callable[[], None]) -> None:
    """Serve until a signal ends it; closes the service."""
    app = make_app(
        service,
        keys=options.keys,
        allow_adapter_changes=options.allow_adapter_changes,
        loopback_only=is_loopback(options.host),
        runs=options.runs,
        data=options.data,
    )
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=LINGER,
    )
    try:
        DrainingServer(config, service, on_ready).run([listening])
    finally:
        service.close()
