"""Adapters come, go and are replaced under one name while threads ask: each answer is that of the adapter whose
fingerprint its lease has."""

import shutil
import threading
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest

from graftlm.errors import AdapterError
from graftlm.generation.adapter_pool import AdapterPool
from graftlm.generation.engine import Engine
from graftlm.generation.requests import Request
from graftlm.model.registry import attachment
from tests.generation.adapters import alone, base, write_adapter

START = [(7 * n * n + 5 * n + 11) % 300 for n in range(40)]
PROMPTS = [[*START, 9, 14], [*START, 9, 200, 31], [*START[:36], 77, 78], [5, 6]]
COUNT = 4


class Churn:
    """8 adapters; three names mean some of them, now this one and now that one."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.folders = [write_adapter(place / f"v{number}", number) for number in range(8)]
        self.pool = AdapterPool(base(), slots=3, host_bytes=10**6)
        self.answers: dict[str, list[list[int]]] = {"": alone(None, PROMPTS, COUNT)}
        for folder in self.folders:
            record = self.pool.register("some", folder, replace=True)
            self.answers[record.fingerprint] = alone(folder, PROMPTS, COUNT)
        for number in range(len(PROMPTS)):
            assert len({str(found[number]) for found in self.answers.values()}) == 9, "each has answers of its own"
        self.engine = Engine(self.pool.model, max_requests=6, prefix_tokens=2000, prepack=False)
        self.failures: list[str] = []
        self.seen: Counter[str] = Counter()
        self.reused = self.refused = 0
        self.stop = threading.Event()

    def ask(self, seed: int, count: int) -> None:
        random = Random(seed)
        for _ in range(count):
            name = random.choice(["some", "other", "third", ""])
            number = random.randrange(len(PROMPTS))
            try:
                lease = self.pool.acquire(name or {}, timeout=60)
            except AdapterError as error:
                if error.slug == "changing-files":  # replaced again at each attempt to read it
                    self.refused += 1
                elif error.slug != "not-registered":
                    self.failures.append(repr(error))
                continue
            with lease:
                request = Request(PROMPTS[number], COUNT, adapters=lease.adapters)
                generation = self.engine.submit(request)
                if random.random() < 0.1:
                    generation.cancel()
                    continue
                try:
                    found = self.engine.wait(generation).ids
                except Exception as error:
                    self.failures.append(repr(error))
                    continue
            self.seen[lease.fingerprint] += 1
            if found != self.answers[lease.fingerprint][number]:
                whose = [key for key, answers in self.answers.items() if answers[number] == found]
                self.failures.append(f"{name} {lease.fingerprint}: {found} is the answer of {whose}")

    def change(self) -> None:
        random = Random(99)
        while not self.stop.is_set():
            name, folder = random.choice(["some", "other", "third"]), random.choice(self.folders)
            kind = random.randrange(4)
            try:
                if kind == 0:
                    self.pool.unregister(name)
                elif kind == 1:  # in place: the same folder becomes another adapter
                    moving, new = self.place / f"moving-{name}", self.place / "new"
                    shutil.copytree(folder, new)
                    if moving.exists():
                        moving.rename(self.place / "old")
                    new.rename(moving)
                    shutil.rmtree(self.place / "old", ignore_errors=True)
                    self.pool.register(name, moving, replace=True)
                else:
                    self.pool.register(name, folder, replace=True)
            except AdapterError as error:
                if error.slug not in ("not-registered", "changing-files"):
                    self.failures.append(repr(error))
            self.stop.wait(0.002)

    def run(self, threads: int, count: int) -> None:
        askers = [threading.Thread(target=self.ask, args=(seed, count // threads)) for seed in range(threads)]
        changer = threading.Thread(target=self.change)
        for thread in (changer, *askers):
            thread.start()
        for thread in askers:
            thread.join()
        self.stop.set()
        changer.join()


def passes(churn: Churn, count: int) -> None:
    hits = [0]
    inner = churn.engine._prefixes.longest

    def counted(*args: Any) -> Any:
        found = inner(*args)
        hits[0] += found[1] >= 32
        return found

    churn.engine._prefixes.longest = counted  # type: ignore[method-assign]
    churn.run(6, count)
    assert churn.refused <= count // 100
    assert not churn.failures, f"{len(churn.failures)} wrong of {sum(churn.seen.values())}: {churn.failures[0]}"
    assert sum(churn.seen.values()) > count / 3
    assert len(churn.seen) >= 5
    assert hits[0] > count / 50, "beginnings were used again"
    record = attachment(churn.pool.model)
    assert 0 < len(record.configs) + len(record.factors) <= 3
    assert not any(one.leases for one in [*churn.pool._residents.values(), *churn.pool._leaving])


def test_no_answer_is_that_of_another_adapter(tmp_path: Path) -> None:
    passes(Churn(tmp_path), 300)


@pytest.mark.slow
def test_no_answer_of_ten_thousand_is_that_of_another_adapter(tmp_path: Path) -> None:
    passes(Churn(tmp_path), 10_000)
