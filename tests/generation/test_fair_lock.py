"""The lock of a model goes to whoever has waited longest, and a thread may take it again."""

import threading
import time

import pytest

from graftlm.generation.fair_lock import FairLock


def test_a_thread_that_takes_it_again_and_again_lets_another_in() -> None:
    lock, order, started = FairLock(), list[str](), threading.Event()

    def wait(name: str) -> None:
        started.set()
        with lock:
            order.append(name)

    threads = []
    with lock, lock:  # reentrant
        for name in ("first", "second", "third"):
            started.clear()
            threads.append(threading.Thread(target=wait, args=(name,)))
            threads[-1].start()
            started.wait()
            while len(lock._waiting) < len(threads):
                time.sleep(0.001)
    with lock:
        order.append("again")
    for thread in threads:
        thread.join()
    assert order == ["first", "second", "third", "again"]


def test_it_excludes() -> None:
    lock, inside, most = FairLock(), [0], [0]

    def work() -> None:
        for _ in range(300):
            with lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0)
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert lock._owner is None


def test_only_its_holder_may_release() -> None:
    with pytest.raises(RuntimeError):
        FairLock().release()
