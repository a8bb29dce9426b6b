"""A lock that goes to whoever has waited for it longest."""

import threading
from collections import deque
from types import TracebackType


class FairLock:
    """A reentrant lock in order of arrival.

    A thread that runs one step after the other takes a `threading.RLock` again before a thread that waits for it has
    woken up. Here the one that releases hands over.
    """

    def __init__(self) -> None:
        self._inner = threading.Lock()
        self._owner: int | None = None
        self._depth = 0
        self._waiting: deque[tuple[int, threading.Lock]] = deque()

    def acquire(self) -> None:
        me = threading.get_ident()
        with self._inner:
            if self._owner in (None, me):
                self._owner, self._depth = me, self._depth + 1
                return
            turn = me, threading.Lock()
            turn[1].acquire()
            self._waiting.append(turn)
        try:
            turn[1].acquire()  # until `release` hands over
        except BaseException:  # KeyboardInterrupt
            with self._inner:
                ours = turn not in self._waiting
                if not ours:
                    self._waiting.remove(turn)
            if ours:
                self.release()
            raise

    def release(self) -> None:
        with self._inner:
            if self._owner != threading.get_ident():
                raise RuntimeError("this thread does not hold the lock")
            self._depth -= 1
            if self._depth:
                return
            if not self._waiting:
                self._owner = None
                return
            self._owner, gate = self._waiting.popleft()
            self._depth = 1
            gate.release()

    def __enter__(self) -> "FairLock":
        self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()
