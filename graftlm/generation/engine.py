"""The engine: requests in, tokens out, many at a time, each as if it were alone.

    engine = Engine(model)
    for number, generation in engine.run([Request(ids, max_new_tokens=64), ...]):
        ...                                   # in the order in which they end

A step is one pass of the model over the tokens of all running requests, end to end in one row: the next token of each
that is answering, and a part of the prompts of those that begin. When a request ends the next one takes its place in
the following step (continuous batching, Yu et al. 2022, Orca). Requests with the same beginning compute it once.
Requests of many adapters wait in one queue, in which no adapter keeps out the others (`fairness.py`).

An engine has no thread of its own. Whoever waits for an answer runs the steps for all; several threads take turns.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from graftlm.errors import TargetError
from graftlm.generation.attention import Cache
from graftlm.generation.by_transformers import answer_batch
from graftlm.generation.choose import add_next, chooser_of
from graftlm.generation.fair_lock import FairLock
from graftlm.generation.fairness import Client, FairQueue, client_of
from graftlm.generation.forward_pass import Piece, keys_before, pass_over
from graftlm.generation.inference_copy import InferenceCopy, Products, inference_copy
from graftlm.generation.logprobs import prompt_reader
from graftlm.generation.merged import Merging, check_merging
from graftlm.generation.prefix_store import PrefixStore, common
from graftlm.generation.requests import Generation, Request, RowKey
from graftlm.generation.sampling import Chooser
from graftlm.generation.support import why_not_ours
from graftlm.model.modes import active_row, can_mix_rows, check_weights, deltas_still, weighted_row
from graftlm.model.registry import attachment
from graftlm.model.routes import Row

SHARED_TOKENS = 32
"""A beginning of fewer tokens is computed again: waiting for another request costs more."""

MAX_REQUESTS = 32
"""Default of an engine: requests that run at a time."""

CACHE_TOKENS = 16384
"""Default of an engine: tokens that the caches of all running requests hold."""

STEP_TOKENS = 512
"""Default of an engine: tokens of prompts in a step."""

_LOCKS: "WeakKeyDictionary[Any, FairLock]" = WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


def model_lock(model: Any) -> FairLock:
    """Held over every pass of every engine of a model: what sites share knows one pass at a time. Who attaches a delta
    while an engine runs holds it, too."""
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(model, FairLock())


@dataclass(eq=False)
class _Running:
    """A request whose tokens are being computed."""

    generation: Generation
    tokens: list[int]
    """Prompt and answer."""
    chooser: Chooser
    cache: Cache
    computed: int = 0
    """Tokens that the cache holds."""
    source: "_Running | None" = None
    """The request that has the same first `shared` tokens and computes them."""
    shared: int = 0
    read: Callable[[int, Tensor], None] | None = None
    """What reads the logits of its prompt, where they are wanted."""

    @property
    def left(self) -> int:
        """Tokens that the next one depends on and that are not computed yet."""
        return len(self.tokens) - self.computed

    def take_shared(self) -> None:
        """Copy what another request has computed for both, as soon as it is there."""
        if self.source is None:
            return
        over = self.source.generation.finish is not None
        if over or self.source.computed >= self.shared:
            self.computed = min(self.shared, self.source.computed)
            self.cache.copy_from(self.source.cache, self.computed)
            self.source = None


class Engine:
    """Answers the requests of one model.

    `max_requests` run at a time, and their caches hold `cache_tokens` at most (a single larger request runs alone;
    None is no limit). A step takes `step_tokens` of prompts at most, so that answers go on while a long prompt is read.
    `prefix_tokens`: so many tokens of requests that ended stay in memory, within `cache_tokens`, and later requests
    with the same deltas and beginning do not compute them again (`prefix_store.py`); 0 keeps none.
    `prepack`: hold a second copy of the linear layers' weights, laid out for few rows (`kernels/prepacked.py`).
    `merge_after`: after so many passes in a row in which the same adapters act on every token, hold a third copy of the
    layers that they sit on, with their factors in it (`merged.py`); None never does. For float32 on a CPU.
    `reason` says why the model is run by transformers' own `generate` instead, and is empty where it is not.

    Weights, those of deltas too, may not change while requests run.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_requests: int = MAX_REQUESTS,
        cache_tokens: int | None = CACHE_TOKENS,
        step_tokens: int = STEP_TOKENS,
        prefix_tokens: int = 0,
        prepack: bool = True,
        merge_after: int | None = None,
    ) -> None:
        self.model = model
        self.max_requests, self.cache_tokens, self.step_tokens = max_requests, cache_tokens, step_tokens
        self.products: Products | None = {} if prepack else None
        with model_lock(model):
            self.reason = why_not_ours(model)
        if merge_after is not None:
            check_merging(model, prepack=prepack, reason=self.reason)
        self.merging = None if merge_after is None else Merging(merge_after)
        """What is merged at present, and why not; None where nothing is ever."""
        self._copy: tuple[int, InferenceCopy] | None = None
        self._version = attachment(model).version
        self._queue = FairQueue()
        self._prefixes = PrefixStore(prefix_tokens)
        self._running: list[_Running] = []
        self._turn = threading.Condition()
        self._stepping = False

    # What callers use ------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> Generation:
        """Queue a request. TargetError for an adapter that is not on the model, and what `Request.check` raises."""
        request.check(self.model)
        adapters = request.adapters
        row = active_row(self.model) if adapters is None else weighted_row(self.model, adapters)
        check_weights(self.model, row)
        generation = Generation(request, self, row, row_key(self.model, row))
        with self._turn:
            self._queue.append(generation)
        return generation

    def wait(self, generation: Generation) -> Generation:
        """Run steps, or wait for another thread that does, until the answer is complete.

        Raises what its pass raised.
        """
        self.wait_any([generation])
        if generation.error is not None:
            raise generation.error
        return generation

    def run(self, requests: Sequence[Request]) -> Iterator[tuple[int, Generation]]:
        """Answer all of them: yields (number of the request, its generation), in the order in which they end.

        Whoever stops before the end cancels the rest.
        """
        open_ = dict(enumerate(self.submit(request) for request in requests))
        try:
            while open_:
                self.wait_any(list(open_.values()))
                for number in [number for number, generation in open_.items() if generation.finish is not None]:
                    generation = open_.pop(number)
                    if generation.error is not None:
                        raise generation.error
                    yield number, generation
        finally:
            for generation in open_.values():
                self.cancel(generation)

    def wait_any(self, generations: Sequence[Generation]) -> None:
        """As `wait`, until one of the answers is complete; raises nothing."""
        while all(generation.finish is None for generation in generations):
            self._take_turn(*generations)

    def stream(self, request: Request) -> Iterator[int]:
        """The new ids as they come, with the one that ends the answer. Whoever stops before the end cancels it."""
        generation, shown = self.submit(request), 0
        try:
            while True:
                while shown < len(generation.ids):
                    shown += 1
                    yield generation.ids[shown - 1]
                if generation.finish is not None:
                    break
                self._take_turn(generation)
            if generation.error is not None:
                raise generation.error
        finally:
            self.cancel(generation)

    def cancel(self, generation: Generation) -> None:
        """End an answer as it is; nothing happens where it is complete."""
        with self._turn:
            if generation.finish is None:
                generation.finish = "cancelled"
            if not self._stepping:
                self._drop_finished()

    @property
    def running(self) -> int:
        """Requests whose tokens are being computed."""
        return len(self._running)

    def step(self) -> None:
        """Run one step for all, or wait for the one that another thread runs: for a thread that does nothing else."""
        self._take_turn()

    # Turns -----------------------------------------------------------------------------------------------------------

    def _take_turn(self, *generations: Generation) -> None:
        """Run one step, or wait for the end of the one that another thread runs."""
        with self._turn:
            if self._stepping:
                self._turn.wait()
                return
            if any(generation.finish is not None for generation in generations):
                return
            self._stepping = True
        try:
            self._step()
        finally:
            with self._turn:
                self._stepping = False
                self._drop_finished()
                self._turn.notify_all()

    def _drop_finished(self) -> None:
        for generation in [*self._queue, *(one.generation for one in self._running)]:
            generation.expire()
        ended = [one for one in self._running if one.generation.finish is not None]
        self._running = [one for one in self._running if one.generation.finish is None]
        for one in ended:
            if one.generation.finish != "error" and one.computed >= SHARED_TOKENS:
                self._prefixes.keep(one.generation.key, one.tokens[: one.computed], one.cache, self._room())
        self._queue.remove([generation for generation in self._queue if generation.finish is not None])

    def _room(self) -> int | None:
        """Tokens that the running requests leave of `cache_tokens`."""
        if self.cache_tokens is None:
            return None
        return self.cache_tokens - sum(one.cache.capacity for one in self._running)

    # A step ----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _step(self) -> None:
        with model_lock(self.model), ExitStack() as still:
            try:
                with self._turn:
                    self._fail_where_deltas_changed()
                    self._drop_finished()
                    asked = [*self._queue, *(one.generation for one in self._running)]
                    still.enter_context(deltas_still(self.model, {name for each in asked for name in each.row}))
                    if not self.reason:
                        self._admit()
                if self.reason:
                    self._answer_by_transformers()
                for some in self._passes():
                    self._compute(some)
            except Exception as error:  # of the model: memory that runs out, say
                for one in self._running:
                    one.generation.fail(error)

    def _fail_where_deltas_changed(self) -> None:
        """A cache belongs to the very deltas that it was computed with, not to their names."""
        version = attachment(self.model).version
        if version == self._version:
            return
        self._version = version
        self._give_up_merged()
        self._prefixes.drop_unless(lambda key: row_key(self.model, {name: weight for name, weight, _ in key}) == key)
        for generation in [*self._queue, *(one.generation for one in self._running)]:
            if row_key(self.model, generation.row) != generation.key:
                names = ", ".join(generation.row)
                generation.fail(
                    TargetError(
                        f"a delta of a request ({names}) was detached or replaced before the answer was complete. Let "
                        "requests end first, or attach the new delta by another name",
                        code="delta-changed",
                    )
                )

    def _admit(self) -> None:
        """Let queued requests begin, adapters in turn, as far as there is place."""
        if not self._running:
            self._read_weights()
        while self._queue and len(self._running) < self.max_requests:
            unread = Counter[Client]()
            for one in self._running:
                unread[client_of(one.generation)] += one.left
            generation, room = self._queue.first(unread), self._room()
            size = len(generation.request.ids) + generation.request.max_new_tokens
            if self._running and room is not None and size > room:
                break
            self._queue.pop(generation)
            tokens = list(map(int, generation.request.ids))
            try:
                cache = Cache(size - 1, keys_before(self.model, generation.row))  # of the last token nothing is kept
            except Exception as error:
                generation.fail(error)
                continue
            one = _Running(generation, tokens, chooser_of(generation), cache)
            request = generation.request
            if request.prompt_logprobs is not None:
                begin, found = request.prompt_logprobs_from, generation.prompt_logprobs
                one.read = prompt_reader(tokens[:], request.prompt_logprobs, begin, found)
            one.source, one.shared = self._same_beginning(one)
            self._running.append(one)
            if room is not None:
                self._prefixes.shrink(max(0, room - cache.capacity))

    def _same_beginning(self, one: _Running) -> tuple[_Running | None, int]:
        """A running request that has the same first tokens and deltas, and how many; at least one token is left, and
        all whose logits are wanted.

        Where one that ended has as many, they are copied at once.
        """
        found: tuple[_Running | None, int] = (None, SHARED_TOKENS - 1)
        last = len(one.tokens) - 1
        if one.read is not None:
            last = max(0, one.generation.request.prompt_logprobs_from - 1)
        for other in self._running:
            if other.generation.key == one.generation.key and other.source is None:
                same = common(one.tokens[:last], other.tokens)
                found = (other, same) if same > found[1] else found
        kept, same = self._prefixes.longest(one.generation.key, one.tokens[:last])
        if kept is not None and same >= max(found[1], SHARED_TOKENS):
            one.cache.copy_from(kept, same)
            one.computed = same
            return None, 0
        return found if found[0] is not None else (None, 0)

    def _passes(self) -> list[list[tuple[_Running, int]]]:
        """What the passes of this step compute: requests, and how many of their tokens."""
        for one in self._running:
            one.take_shared()
        ready = [one for one in self._running if one.source is None]
        parts = [(one, 1) for one in ready if one.left == 1]
        left = self.step_tokens
        for one in sorted(ready, key=lambda one: (self._queue.cost(client_of(one.generation)), one.left)):
            count = min(one.left, left)
            if one.left > 1 and (count == one.left or left == self.step_tokens):  # only what is too long is cut
                parts.append((one, count))
                left -= count
        parts.sort(key=lambda part: part[0].generation.key)
        if can_mix_rows(self.model, [one.generation.row for one, _ in parts]):
            return [parts] if parts else []
        return [list(some) for _, some in groupby(parts, key=lambda part: part[0].generation.key)]

    def _compute(self, parts: Sequence[tuple[_Running, int]]) -> None:
        """One pass, and the next token of each request that has been read to its end."""
        pieces = [
            Piece(
                one.tokens[one.computed : one.computed + count],
                one.computed,
                one.cache,
                one.generation.row,
                count == one.left,
                one.read if one.computed < len(one.generation.request.ids) else None,
                max(0, one.generation.request.prompt_logprobs_from - 1),
            )
            for one, count in parts
        ]
        copy = self._inference_copy()
        if self.merging is not None:
            self.merging.before_pass(copy, [piece.row for piece in pieces])
        logits = pass_over(copy.model, pieces)
        for one, count in parts:
            if one.computed < len(one.generation.request.ids):
                self._queue.charge(one.generation, prompt=count)
            one.computed += count
        ends = [one for one, _ in parts if not one.left]
        if ends:
            new = add_next(logits, [one.generation for one in ends], [one.chooser for one in ends])
            for one, token in zip(ends, new, strict=True):
                one.tokens.append(token)
                self._queue.charge(one.generation, answer=1)

    def _read_weights(self) -> None:
        """Nothing runs: from here on the weights are as they are now."""
        changed = self._prefixes.drop_if_changed(self.model)
        if self.products and any(product.is_stale for product in self.products.values()):
            self.products, self._copy = {}, None
        if self._copy is not None and changed:
            self._copy[1].forget()
            self._give_up_merged()

    def _inference_copy(self) -> InferenceCopy:
        """A copy with all hosts that are on the model now; their deltas and factors are the model's own."""
        structure = attachment(self.model).structure
        if self._copy is None or self._copy[0] != structure:
            self._give_up_merged()
            self._copy = structure, inference_copy(self.model, self.products)
        return self._copy[1]

    def _give_up_merged(self) -> None:
        if self.merging is not None:
            self.merging.drop()

    def _answer_by_transformers(self) -> None:
        """Answer the first request that waits, and those that can be in a batch with it."""
        with self._turn:
            first = _batch_key(self._queue.first()) if self._queue else None
            waiting = [each for each in self._queue if _batch_key(each) == first][: self.max_requests]
            self._queue.remove(waiting)
            for each in waiting:
                self._queue.charge(each, prompt=len(each.request.ids), answer=each.request.max_new_tokens)
        if waiting:
            try:
                answer_batch(self.model, waiting)
            except Exception as error:
                for generation in waiting:
                    generation.fail(error)
            finally:  # what was interrupted has no state to go on from
                for generation in waiting:
                    generation.finish = generation.finish or "cancelled"


def row_key(model: Any, row: Row) -> RowKey:
    """Which deltas, those of this name at present, with which weights: what requests with the same have in common."""
    attached = attachment(model).attached
    return tuple((name, weight, attached.get(name, 0)) for name, weight in row.items())


def _batch_key(generation: Generation) -> tuple[int, RowKey]:
    return len(generation.request.ids), generation.key
