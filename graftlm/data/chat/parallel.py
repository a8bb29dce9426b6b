"""Rendering on all cores: chunks of rows go to processes of our own and come back as columns, in order.

The processes are neither forked nor started by multiprocessing. A fork takes over the locks of threads that it does not
take over (torch, tokenizers and whatever program we are part of have such threads), and multiprocessing's other ways
import the caller's main script once more, which runs it again where nothing guards it. A plain child that speaks
pickles through its pipes has neither trouble, works alike on every system, and imports neither torch nor a model.

The caller renders too: what no other process has begun yet is done here rather than waited for. So few rows cost no
start-up time, and one core means no process at all.
"""

import contextlib
import gc
import json
import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate, chain, islice
from queue import SimpleQueue
from typing import Any

from graftlm.data.chat.render import Renderer
from graftlm.data.chat.token_columns import Columns, render
from graftlm.data.sources.source import DataConfig, Row
from graftlm.errors import DataError

ROW_COST = 1_000
"""What a row costs beside its text, as characters: templates and calls take as long as the tokens of so much text."""

CHUNK = 300_000
"""Characters of rows in one request to a process."""

MANY = 3_000_000
"""From so many characters on, processes are worth their start, and columns their place on disk."""

AHEAD = 4
"""Chunks for each core that are under way or wait to be handed out: this bounds the memory."""

PROGRAM = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from graftlm.data.chat.parallel import work; work()"

Chunk = tuple[list[Row], Columns]


def cost(row: Row) -> int:
    """How long a row takes to render, in characters."""
    return ROW_COST + sum(len(message.content) for message in row.messages)


def many(rows: Iterable[Row]) -> bool:
    """Whether these rows are worth processes and a place on disk."""
    return any(total >= MANY for total in accumulate(map(cost, rows)))


@contextlib.contextmanager
def lasting() -> Iterator[None]:
    """Within, the collector of garbage looks at what is new alone. Rows by the ten thousand stay, and to go through all
    of them again and again, beside all that libraries hold, takes a third of a second each time."""
    own = gc.get_freeze_count() == 0  # else whoever froze what there was thaws it
    gc.freeze()
    try:
        yield
    finally:
        if own:
            gc.unfreeze()


def cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def rendered(rows: Iterable[Row], renderer: Renderer, data: DataConfig, workers: int | None = None) -> Iterator[Chunk]:
    """The rows in chunks with their columns, in order. At most `workers` processes (None: one for each core) render
    at a time, this one included; rows are taken only as they are needed."""
    workers = workers or cores()
    chunks = _chunks(rows)
    first = list(islice(chunks, MANY // CHUNK))
    if workers == 1 or len(first) < MANY // CHUNK:
        for chunk in chain(first, chunks):
            yield chunk, render(chunk, renderer, data)
    else:
        yield from _shared_out(chain(first, chunks), renderer, data, workers)


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    chunk: list[Row] = []
    size = 0
    for row in rows:
        chunk.append(row)
        size += cost(row)
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _shared_out(chunks: Iterator[list[Row]], renderer: Renderer, data: DataConfig, workers: int) -> Iterator[Chunk]:
    start = pickle.dumps((renderer.for_rows(), data))
    children = [_RenderingProcess(start) for _ in range(workers - 1)]
    free: SimpleQueue[_RenderingProcess] = SimpleQueue()
    for child in children:
        free.put(child)
    threads = ThreadPoolExecutor(len(children))  # a thread for each child waits for its answers

    def ask(chunk: list[Row]) -> Columns:
        child = free.get()
        try:
            return child.ask(chunk)
        finally:
            free.put(child)

    queue: deque[tuple[list[Row], Future[Columns]]] = deque()
    try:
        while True:
            for chunk in islice(chunks, AHEAD * workers - len(queue)):
                queue.append((chunk, threads.submit(ask, chunk)))
            if not queue:
                return
            chunk, future = queue[0]
            if not future.done():
                # A future that can be cancelled has not been begun: this process does it.
                mine = next((i for i, (_, other) in enumerate(queue) if other.cancel()), None)
                if mine is not None:
                    rendered_here: Future[Columns] = Future()
                    rendered_here.set_result(render(queue[mine][0], renderer, data))
                    queue[mine] = queue[mine][0], rendered_here
                    continue
            queue.popleft()
            yield chunk, future.result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for child in children:
            child.end()
        threads.shutdown()


class _RenderingProcess:
    """A process that renders chunks."""

    def __init__(self, start: bytes) -> None:
        command = [sys.executable, "-I", "-c", PROGRAM, json.dumps(sys.path)]
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(  # noqa: S603 (our own program)
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self._start = start

    def ask(self, chunk: list[Row]) -> Columns:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        answer: Any = None
        with contextlib.suppress(BrokenPipeError, EOFError, pickle.UnpicklingError):
            self._process.stdin.write(self._start)
            self._start = b""
            pickle.dump(chunk, self._process.stdin, protocol=5)
            self._process.stdin.flush()
            answer = pickle.load(self._process.stdout)  # noqa: S301 (from our own child)
        if isinstance(answer, Exception):
            raise answer
        if answer is None:
            raise DataError(
                f"a process that renders rows ended (exit code {self._process.wait()}), perhaps for want of memory: "
                "`train: {threads: 1}` renders in one process",
                code="rendering-process-ended",
            )
        columns: Columns = answer
        return columns

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()


def work() -> None:
    """The loop of a child process. It reads a renderer and a config, then chunks, and writes the columns of each."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, whose end closes our input
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get among the answers
    renderer, data = pickle.load(requests)  # noqa: S301 (from our own parent)
    while True:
        answer: Columns | Exception
        try:
            chunk = pickle.load(requests)  # noqa: S301
        except EOFError:
            return
        try:
            answer = render(chunk, renderer, data)
        except Exception as error:
            answer = error
        pickle.dump(answer, answers, protocol=5)
        answers.flush()
