"""Who answers a request: a router over the adapters of a pool, whatever its grain.

    routing = Routing(pool, tokenizer, ArrowConfig())
    with routing.route(ids) as chosen:
        engine.wait(engine.submit(Request(ids, 64, adapters=chosen.lease.adapters)))

Adapters may come and go: what is known of them is made anew when the pool has others.
"""

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

from graftlm.adapters.folder import sha256_of_bytes
from graftlm.config.schema import to_tree
from graftlm.generation.adapter_pool import AdapterPool, Lease
from graftlm.routing.base import RequestRouter, RouterConfig, TokenRouter
from graftlm.routing.fusion import Fusion, fused
from graftlm.routing.library import Library, Rows, Score
from graftlm.routing.mixture import Mixture
from graftlm.routing.routers import ADAPTER_ROUTERS


@dataclass
class Chosen:
    """What a router chose for a request. A context manager that releases the adapters at its end."""

    lease: Lease
    shown: str
    """In one line: `sql`, `sql:0.7+add:0.3`, or `arrow(add+sql)` where every token has weights of its own."""
    weights: Mapping[str, float] | None
    """Adapter -> its weight; None where every token has its own."""

    def __enter__(self) -> "Chosen":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.lease.release()


class _OwnLease(Lease):
    """What the router put on the model, until `release`."""

    def __init__(self, library: Library, delta: str, names: Sequence[str], facts: Any, end: Callable[[], None]) -> None:
        """`facts`: what tells it from others beside the adapters of these names. `end` is called once."""
        super().__init__(library.pool, [])
        self.adapters = {delta: 1.0}
        self.registered = tuple(library.pool.get(name) for name in names)
        prints = dict(zip(library.names, library.fingerprints, strict=True))
        digest = json.dumps([facts, *((name, prints[name]) for name in names)])
        self.fingerprint = "sha256:" + sha256_of_bytes(digest.encode())
        self.chat, self.tokenizer = library.chat, library.tokenizer
        self._end: Callable[[], None] | None = end

    def release(self) -> None:
        end, self._end = self._end, None
        if end is not None:
            end()


@dataclass(eq=False)
class _Known:
    """What follows from the adapters of a pool."""

    library: Library
    router: TokenRouter | RequestRouter
    mixture: Mixture | None = None
    leases: int = 0
    is_old: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


class Routing:
    """A router over the adapters of a pool. All methods may be called from any thread."""

    def __init__(
        self,
        pool: AdapterPool,
        tokenizer: Any,
        config: RouterConfig,
        *,
        rows: Mapping[str, Rows] | None = None,
        score: Score | None = None,
    ) -> None:
        """`tokenizer` is the base's. `rows`: adapter or task -> rows, in place of files that the config names. `score`
        says how good an adapter is on some rows (`Library.score`), in place of their loss.

        Learns what the router needs at once, if there are adapters. Raises AdapterError for adapters that this router
        cannot mix, RecipeError and DataError for rows that it lacks or cannot use.
        """
        self.pool, self.config = pool, config
        self.grain = ADAPTER_ROUTERS[config.name].router.grain
        self._tokenizer, self._rows, self._score = tokenizer, rows, score
        self._lock = threading.Lock()
        self._known: _Known | None = None
        self._now()

    @property
    def library(self) -> Library:
        """The adapters that may be chosen now."""
        return self._now().library

    @property
    def mixture(self) -> Mixture | None:
        """Of a router of tokens: what it mixes on the model now."""
        return self._now().mixture

    def route(self, ids: Sequence[int], *, timeout: float | None = None) -> Chosen:
        """Choose for a prompt; the adapters then stay on the model until they are released.

        Without an adapter it is the base that answers. Raises what the constructor and `AdapterPool.acquire` do.
        """
        known = self._now(take=True)
        try:
            chosen = self._chosen(known, ids, timeout)
        except BaseException:
            self._end(known)
            raise
        if known.mixture is None:
            self._end(known)
        return chosen

    def _chosen(self, known: _Known, ids: Sequence[int], timeout: float | None) -> Chosen:
        """The lease of a mixture ends what `_now` took."""
        library, router = known.library, known.router
        if known.mixture is not None:
            end = partial(self._end, known)
            lease: Lease = _OwnLease(library, known.mixture.delta, library.names, to_tree(self.config), end)
            return Chosen(lease, f"{self.config.name}({'+'.join(library.names)})", None)
        weights: Mapping[str, float] = {}
        if library.names:
            assert isinstance(router, RequestRouter)
            weights = {name: weight for name, weight in router.weights(ids).items() if weight != 0}
            if router.fuses and len(weights) > 1:
                fusion = Fusion(self.pool.model, fused({name: library.factors(name) for name in weights}, weights))
                lease = _OwnLease(library, fusion.delta, tuple(weights), ["fusion", weights], fusion.close)
                return Chosen(lease, f"fusion({shown(weights)})", weights)
        return Chosen(self.pool.acquire(weights, timeout=timeout), shown(weights), weights)

    def before(self) -> Lease:
        """The base, with the template and tokenizer by which prompts are rendered for the router."""
        library, lease = self._now().library, self.pool.acquire({})
        lease.chat, lease.tokenizer = library.chat, library.tokenizer
        return lease

    def close(self) -> None:
        """Take off the model what is there for routing, when the requests that hold it have ended."""
        with self._lock:
            known, self._known = self._known, None
        if known is not None:
            self._retire(known)

    def _now(self, take: bool = False) -> _Known:
        """What is known of the adapters that the pool has now; with `take` it has one more lease."""
        with self._lock:
            before = self._known
            if before is None or self._state(before) != (before.library.names, before.library.fingerprints):
                self._known = self._learn()
            known = self._known
            assert known is not None
            if take:
                with known.lock:
                    known.leases += 1
        if before is not None and before is not known:
            self._retire(before)
        return known

    def _state(self, known: _Known) -> tuple[tuple[str, ...], tuple[str, ...]]:
        registered = {one.name: one.fingerprint for one in self.pool.registered()}
        names = tuple(sorted(self.config.among or registered))
        return names, tuple(registered.get(name, "") for name in names)

    def _learn(self) -> _Known:
        library = Library(self.pool, self._tokenizer, self.config.among, self._rows, self._score)
        router = ADAPTER_ROUTERS[self.config.name].router(self.config)
        known = _Known(library, router)
        if library.names:
            router.prepare(library)
            known.mixture = Mixture(library, router) if isinstance(router, TokenRouter) else None
        return known

    def _retire(self, known: _Known) -> None:
        with known.lock:
            known.is_old = True
            close = known.leases == 0
        if close and known.mixture is not None:
            known.mixture.close()

    def _end(self, known: _Known) -> None:
        with known.lock:
            known.leases -= 1
            close = known.is_old and known.leases == 0
        if close and known.mixture is not None:
            known.mixture.close()


def shown(weights: Mapping[str, float]) -> str:
    """Weights in one line, the largest first; `base` for none."""
    if len(weights) == 1 and next(iter(weights.values())) == 1:
        return next(iter(weights))
    ordered = sorted(weights.items(), key=lambda each: (-each[1], each[0]))
    return "+".join(f"{name}:{weight:.3g}" for name, weight in ordered) or "base"
