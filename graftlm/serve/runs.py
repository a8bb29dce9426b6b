"""One request on its way: admitted, prepared in a thread, answered by the worker, read by its handler.

A run holds the adapters of its request until the last of its answers is complete, whoever reads them.
"""

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple, TypeVar

from graftlm.errors import GraftError, RequestError
from graftlm.generation.grammar import CompiledGrammar, Grammar
from graftlm.generation.logprobs import TokenLogprob
from graftlm.generation.requests import Finish, Generation, Ids, Request
from graftlm.generation.sampling import Sampling
from graftlm.generation.text_stream import TextStream
from graftlm.serve.catalog import Catalog, Opened
from graftlm.serve.errors import ApiError, from_graft, internal, invalid
from graftlm.serve.limits import Limits
from graftlm.serve.metrics import Metrics
from graftlm.serve.worker import Job, Worker

log = logging.getLogger("graftlm.serve")

T = TypeVar("T")

DEFAULT_TOKENS = 1024
"""Length of an answer where a request names none; less where the context of the model ends before."""


@dataclass(frozen=True)
class Wanted:
    """What a request wants of every one of its answers."""

    model: str
    max_tokens: int | None
    sampling: Sampling
    """Without its seed."""
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Callable[[Opened], Grammar] | None = None
    """What the answer must be, for a model."""
    tools: bool = False
    """Whether the answer may call tools."""


class Update(NamedTuple):
    """What a step brought to one answer."""

    number: int
    """Of the answer, from 0."""
    tokens: list[int]
    logprobs: list[TokenLogprob]
    """Of these tokens, where they are wanted."""
    text: str
    finish: Finish | None
    stopped: str | None
    """The text of `stop` that ended the answer."""


@dataclass(eq=False)
class _Choice:
    """One answer: its text while its tokens come."""

    stream: TextStream
    skipped: frozenset[int]
    """Tokens that are no part of the text: those that end it, and special ones."""
    job: Job | None = None
    texts: list[str] = field(default_factory=list)
    given: int = 0
    """Log-probabilities that were given."""

    def take(self, token: int) -> None:
        """In the worker's thread."""
        if token not in self.skipped and (piece := self.stream.add(token)):
            self.texts.append(piece.text)

    def rest(self) -> str:
        """The text that no token follows."""
        piece = self.stream.close()
        return piece.text if piece else ""


class Run:
    """Answers to one request. `updates` yields what comes; `close` ends what is left, and is always called."""

    def __init__(self, service: "Service", wanted: Wanted, count: int) -> None:
        self.service, self.wanted, self.count = service, wanted, count
        self.deadline = time.monotonic() + service.limits.timeout
        self.loop = asyncio.get_running_loop()
        self.prompts: list[list[int]] = []
        self._opened: Opened | None = None
        self._updates: asyncio.Queue[Update] = asyncio.Queue()
        self._choices: list[_Choice] = []
        self._lock = threading.Lock()
        self._left = count
        """Answers that the engine may still be computing, those that were never submitted included."""
        self._closed = False

    # In a thread of preparation --------------------------------------------------------------------------------------

    def prepare(self, render: Callable[[Opened], Sequence[Ids]]) -> None:
        """Take the adapters, render the prompts, submit. Raises ApiError; then everything is released."""
        submitted = 0
        try:
            opened = self.service.catalog.open_for(self.wanted.model, self.deadline - time.monotonic(), render)
            self._opened = opened
            self.prompts = [list(map(int, ids)) for ids in render(opened)]
            lengths = [self._length(len(ids)) for ids in self.prompts]
            wanted = self.wanted
            grammar = None if wanted.grammar is None else opened.rendering.compile(wanted.grammar(opened))
            seed = secrets.randbits(31) if self.wanted.seed is None else self.wanted.seed
            assert len(self.prompts) * self.wanted.n == self.count, "as many as were admitted"
            for ids, length in zip(self.prompts, lengths, strict=True):
                for _ in range(self.wanted.n):
                    self._submit(ids, length, (seed + submitted) % 2**63, opened, grammar)
                    submitted += 1
            self.service.metrics.prompt_tokens.inc(sum(map(len, self.prompts)))
        except GraftError as error:
            raise from_graft(error) from None
        finally:
            if submitted < self.count:
                self.close()
                for _ in range(self.count - submitted):
                    self._end_one()
            elif self._closed:  # while it was prepared
                self.close()

    def _length(self, prompt: int) -> int:
        context, wanted = self.service.catalog.context, self.wanted.max_tokens
        if prompt == 0:
            raise invalid("the prompt is empty, and an answer needs a token to follow", "prompt")
        if context is None:
            return wanted or DEFAULT_TOKENS
        if prompt + (wanted or 1) > context:
            asked = f" and {wanted:,} for the answer" if wanted else ""
            raise invalid(
                f"the prompt has {prompt:,} tokens{asked}, and the context of this model is {context:,} tokens",
                "max_tokens" if prompt < context else "messages",
                "context_length_exceeded",
            )
        return wanted or min(DEFAULT_TOKENS, context - prompt)

    def _submit(self, ids: list[int], length: int, seed: int, opened: Opened, grammar: CompiledGrammar | None) -> None:
        index, wanted, rendering = len(self._choices), self.wanted, opened.rendering
        kept = rendering.dialect.kept_ids(rendering.renderer, tools=wanted.tools)
        special = rendering.renderer.tokenization.special_ids - kept
        stream = TextStream(rendering.renderer.tokenizer, wanted.stop, keep_special=bool(kept))
        choice = _Choice(stream, special | set(rendering.stop_ids))
        request = Request(
            ids,
            length,
            replace(wanted.sampling, seed=seed),
            stop_ids=rendering.stop_ids,
            stop_when=(lambda _: stream.stopped_by is not None) if wanted.stop else None,
            adapters=opened.lease.adapters,
            deadline=self.deadline,
            on_token=choice.take,
            logprobs=wanted.logprobs,
            prompt_logprobs=wanted.prompt_logprobs,
            grammar=grammar,
        )
        choice.job = Job(self.loop, partial(self._collect, index), self._updates.put_nowait, self._end_one)
        self._choices.append(choice)
        try:
            self.service.worker.submit(request, choice.job)
        except BaseException:
            self._choices.pop()
            raise

    # In the worker's thread ------------------------------------------------------------------------------------------

    def _collect(self, index: int, tokens: list[int], finish: Finish | None) -> Update:
        choice = self._choices[index]
        text = "".join(choice.texts) + (choice.rest() if finish is not None else "")
        choice.texts.clear()
        logprobs = self.generation(index).logprobs[choice.given :][: len(tokens)]
        choice.given += len(logprobs)
        return Update(index, tokens, logprobs, text, finish, choice.stream.stopped_by)

    def _end_one(self) -> None:
        with self._lock:
            self._left -= 1
            last = self._left == 0
        self.service.leave(1)
        if last and self._opened is not None:
            self._opened.lease.release()

    # In the event loop -----------------------------------------------------------------------------------------------

    @property
    def opened(self) -> Opened:
        """The model that answers; its adapters may be gone when its answers are complete."""
        assert self._opened is not None, "a run is read after it was prepared"
        return self._opened

    @property
    def tag(self) -> str:
        return self.opened.tag

    def generation(self, index: int) -> Generation:
        """The answer of this number as the engine has it."""
        job = self._choices[index].job
        assert job is not None, "a choice is in the list when its job is made"
        assert job.generation is not None, "it is read after it was submitted"
        return job.generation

    async def updates(self) -> AsyncIterator[Update]:
        """Updates until every answer is complete. ApiError for an answer that failed or took too long."""
        left = self.count
        while left:
            update = await self._updates.get()
            if update.finish in ("error", "deadline", "cancelled"):
                raise self._failure(update)
            left -= update.finish is not None
            yield update

    def _failure(self, update: Update) -> ApiError:
        error = self.generation(update.number).error
        if update.finish == "deadline":
            return ApiError(
                504,
                f"the answer was not complete after {self.service.limits.timeout:g} seconds, the server's --timeout. "
                "Ask for fewer tokens",
                code="timeout",
            )
        if update.finish == "cancelled":
            return ApiError(503, "the server is shutting down", code="shutting_down", retry_after=10)
        if isinstance(error, GraftError):
            return ApiError(400 if isinstance(error, RequestError) else 500, str(error), code=error.code)
        log.error("an answer failed", exc_info=error)
        return internal()

    def close(self) -> None:
        """End what is not complete, at once. From any thread, again and again."""
        self._closed = True
        for choice in list(self._choices):
            if choice.job is not None and choice.job.generation is not None:
                choice.job.generation.cancel()


class Service:
    """What all routes share."""

    def __init__(self, catalog: Catalog, worker: Worker, limits: Limits, metrics: Metrics) -> None:
        self.catalog, self.worker, self.limits, self.metrics = catalog, worker, limits, metrics
        self.draining = False
        self._open = 0
        self._lock = threading.Lock()
        # as many as requests may be: each may wait for a place for its adapter
        self._threads = ThreadPoolExecutor(limits.queue + worker.engine.max_requests, "graft-serve-prepare")
        metrics.watch(self.state)

    @property
    def open_answers(self) -> int:
        """Answers that were admitted and are not complete."""
        return self._open

    def state(self) -> dict[str, float]:
        """The gauges of /metrics."""
        counts, running = self.catalog.pool.counts(), self.worker.engine.running
        return {
            "graft_requests_running": running,
            "graft_requests_waiting": max(0, self._open - running),
            "graft_adapters_registered": counts.registered,
            "graft_adapters_resident": counts.resident,
            "graft_adapters_leased": counts.leased,
            "graft_adapter_loads_total": counts.loads,
            "graft_adapter_evictions_total": counts.evictions,
        }

    def enter(self, count: int) -> None:
        """Admit so many answers, or refuse them: ApiError (429)."""
        most = self.limits.queue + self.worker.engine.max_requests
        with self._lock:
            if self._open + count > most:
                raise ApiError(
                    429,
                    f"{self._open} answers are on their way, and with {count} more there would be over {most}, the "
                    "most that run and wait. Try again later",
                    code="queue_full",
                    retry_after=2,
                )
            self._open += count

    def leave(self, count: int) -> None:
        with self._lock:
            self._open -= count

    async def run(self, wanted: Wanted, render: Callable[[Opened], Sequence[Ids]], prompts: int = 1) -> Run:
        """Begin to answer. `render` runs in a thread, and returns as many prompts. ApiError where that fails."""
        count = wanted.n * prompts
        if count > self.limits.choices:
            raise invalid(f"{count} answers to one request are more than {self.limits.choices}", "n")
        self.enter(count)
        run = Run(self, wanted, count)
        prepared = self._threads.submit(run.prepare, render)
        try:
            await asyncio.wrap_future(prepared)
        except asyncio.CancelledError:
            run.close()
            if prepared.cancel():  # no thread has begun, so none will release anything
                self.leave(count)
            raise
        return run

    async def in_thread(self, work: Callable[[], T], *, leave: int = 0) -> T:
        """What `work` returns, or raises, in a thread of preparation; so many answers have left when it ends.

        ApiError (400) for what the library refuses.
        """

        def done() -> T:
            try:
                return work()
            except GraftError as error:
                raise from_graft(error) from None
            finally:
                self.leave(leave)

        future = self._threads.submit(done)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if future.cancel():  # no thread has begun
                self.leave(leave)
            raise

    def cancel(self) -> None:
        """End every answer as it is."""
        self.worker.cancel()

    def close(self) -> None:
        """End everything: running requests are cancelled."""
        self.worker.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
