"""The thread that runs the steps of an engine while there are requests.

Nothing waits in it: what a step computed is handed to the event loop of the request in one call, and the loop is free
to send it slowly. What a request holds is bounded by its `max_new_tokens`.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from graftlm.generation.engine import Engine
from graftlm.generation.requests import Finish, Generation, Request
from graftlm.serve.metrics import Metrics

log = logging.getLogger("graftlm.serve")


@dataclass(eq=False)
class Job:
    """One answer on its way."""

    loop: asyncio.AbstractEventLoop
    collect: Callable[[list[int], Finish | None], Any]
    """Called in the worker's thread after each step that brought tokens or completed the answer."""
    deliver: Callable[[Any], None]
    """Called in the loop with what `collect` returned."""
    on_end: Callable[[], None]
    """Called in the worker's thread when the engine has let go of it; before the last `deliver`."""
    began: float = field(default_factory=time.monotonic)
    generation: Generation | None = None
    handed: int = 0
    """Tokens that were delivered."""
    last_token: float = 0.0


class Worker:
    """Runs the steps of an engine in a thread of its own. `close` cancels what is left and ends the thread."""

    def __init__(self, engine: Engine, metrics: Metrics) -> None:
        self.engine, self.metrics = engine, metrics
        self._jobs: list[Job] = []
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="graft-serve-worker", daemon=True)
        self._thread.start()

    @property
    def open_jobs(self) -> int:
        """Answers that are not complete, those that wait included."""
        return len(self._jobs)

    def submit(self, request: Request, job: Job) -> Generation:
        """Queue a request. Raises what `Engine.submit` does."""
        with self._wake:
            if self._closed:
                raise RuntimeError("the worker is closed")
            job.generation = self.engine.submit(request)
            self._jobs.append(job)
            self._wake.notify()
        return job.generation

    def cancel(self) -> None:
        """End every answer as it is."""
        with self._wake:
            jobs = list(self._jobs)
        for job in jobs:
            if job.generation is not None:
                job.generation.cancel()

    def close(self, timeout: float = 10.0) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify()
        self.cancel()
        self._thread.join(timeout)

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._jobs and not self._closed:
                    self._wake.wait()
                if not self._jobs:
                    return
                jobs = list(self._jobs)
            try:
                self.engine.step()
            except Exception as error:  # of the engine's own, which the requests of this step cannot go on from
                log.exception("a step of the engine failed")
                for job in jobs:
                    if job.generation is not None:
                        job.generation.fail(error)
            for job in jobs:
                self._settle(job)

    def _settle(self, job: Job) -> None:
        """Hand over what the step brought to a request."""
        generation = job.generation
        assert generation is not None, "only what was submitted is in the list"
        finish = generation.finish  # first: after it comes no token
        tokens = generation.ids[job.handed :]
        job.handed += len(tokens)
        if tokens:
            self._observe(job, len(tokens))
        if finish is not None:
            with self._wake:
                self._jobs.remove(job)
            job.on_end()
        if tokens or finish is not None:
            try:
                job.loop.call_soon_threadsafe(job.deliver, job.collect(tokens, finish))
            except RuntimeError:  # the loop is closed: nobody reads it
                generation.cancel()

    def _observe(self, job: Job, count: int) -> None:
        now = time.monotonic()
        if job.last_token:
            self.metrics.between_tokens.observe((now - job.last_token) / count)
        else:
            self.metrics.first_token.observe(now - job.began)
        self.metrics.answer_tokens.inc(count)
        job.last_token = now
