"""The pool: an adapter is what its name meant when it was acquired, no more of them are on the model than slots, and
what is refused leaves nothing."""

import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from graftlm.adapters.adapter import Adapter
from graftlm.adapters.folder import RECORD, WEIGHTS
from graftlm.adapters.load import load_adapter
from graftlm.deltas.lora import LoraConfig
from graftlm.deltas.prefix import PrefixConfig
from graftlm.generation import adapter_pool, checked_adapter
from graftlm.generation.adapter_pool import AdapterPool, Lease
from graftlm.generation.engine import Engine
from graftlm.generation.requests import Request
from graftlm.model.attach import attach
from graftlm.model.modes import active_row
from graftlm.model.registry import attachment
from graftlm.testing import tiny_model, tiny_tokenizer
from tests.errors import raises
from tests.generation.adapters import alone, base, write_adapter

PROMPTS = [[5, 9, 200, 31], [17, 4, 4, 250, 99, 3], [77] * 5]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("adapters")
    return [write_adapter(place / f"a{seed}", seed) for seed in range(6)]


@pytest.fixture(scope="module")
def answers(folders: list[Path]) -> list[list[list[int]]]:
    found = [alone(folder, PROMPTS) for folder in folders]
    assert len({str(one) for one in [*found, alone(None, PROMPTS)]}) == len(folders) + 1, "all of them differ"
    return found


def pool_of(folders: list[Path], **settings: Any) -> AdapterPool:
    pool = AdapterPool(base(), **settings)
    for number, folder in enumerate(folders):
        pool.register(f"a{number}", folder)
    return pool


def asked(engine: Engine, lease: Lease) -> list[list[int]]:
    found = dict(engine.run([Request(ids, 6, adapters=lease.adapters) for ids in PROMPTS]))
    return [found[number].ids for number in range(len(PROMPTS))]


def on_model(pool: AdapterPool) -> int:
    record = attachment(pool.model)
    return len(record.configs) + len(record.factors)


def test_each_answers_as_on_a_model_of_its_own(folders: list[Path], answers: Any) -> None:
    """In two slots and without memory beside them, in an order in which most have to be loaded again."""
    pool = pool_of(folders, slots=2, host_bytes=0)
    engine = Engine(pool.model, prepack=False)
    assert on_model(pool) == 0, "registering attaches nothing"
    for number in [0, 1, 0, 2, 3, 4, 5, 5, 1, 0]:
        with pool.acquire(f"a{number}") as lease:
            assert asked(engine, lease) == answers[number]
            assert lease.fingerprint == pool.get(f"a{number}").fingerprint
        assert on_model(pool) <= 2
        assert active_row(pool.model) == {}, "an adapter acts where it is asked for"
    counts = pool.counts()
    assert (counts.hits, counts.loads, counts.evictions) == (2, 8, 6)
    assert (counts.resident, counts.registered, counts.host_bytes) == (2, 6, 0)
    with pool.acquire({}) as lease:
        assert (lease.adapters, lease.fingerprint, lease.chat, lease.tokenizer) == ({}, "", None, None)
        assert asked(engine, lease) == alone(None, PROMPTS)


def test_several_act_with_their_weights(folders: list[Path]) -> None:
    pool = pool_of(folders, slots=2)
    engine = Engine(pool.model, prepack=False)
    model = base()
    for number in (3, 1):
        load_adapter(model, folders[number], name=f"a{number}")
    expected = Engine(model, prepack=False)
    with pool.acquire({"a3": 0.5, "a1": 1.0}) as lease, pool.acquire({"a3": 1.0, "a1": 0.5}) as other:
        rows = [Request(ids, 6, adapters={"a3": 0.5, "a1": 1.0}) for ids in PROMPTS]
        found = dict(expected.run(rows))
        assert asked(engine, lease) == [found[number].ids for number in range(len(PROMPTS))]
        assert [each.name for each in lease.registered] == ["a3", "a1"]
        assert len({lease.fingerprint, other.fingerprint, pool.get("a3").fingerprint}) == 3
    with raises("adapter/too-many-adapters"):
        pool.acquire({"a0": 1, "a1": 1, "a2": 1})
    with pytest.raises(ValueError, match="finite"):
        pool.acquire({"a0": float("nan")})


def test_the_one_that_was_not_used_for_longest_goes_and_the_pinned_stay(folders: list[Path]) -> None:
    pool = pool_of(folders[:4], slots=2)
    pool.register("pinned", folders[4], pinned=True)
    assert pool.counts().resident == 1, "it is on the model at once"
    for number in (0, 1, 2, 3):
        pool.acquire(f"a{number}").release()
    before = pool.counts()
    pool.acquire("pinned").release()
    pool.acquire("a3").release()
    assert pool.counts().hits == before.hits + 2
    with raises("adapter/no-slot-to-pin"):
        pool.register("another", folders[5], pinned=True)
    assert [each.name for each in pool.registered()] == ["a0", "a1", "a2", "a3", "pinned"]


def test_who_waits_for_a_slot_gets_it_when_a_lease_ends_and_not_forever(folders: list[Path]) -> None:
    pool = pool_of(folders, slots=1)
    lease = pool.acquire("a0")
    with raises("adapter/no-free-slot"):
        pool.acquire("a1", timeout=0.01)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(pool.acquire, "a1", timeout=60)
        lease.release()
        lease.release()  # a second time is nothing
        assert waiting.result().registered[0].name == "a1"
    assert on_model(pool) == 1


def test_adapters_that_are_always_in_use_keep_nobody_out(folders: list[Path]) -> None:
    """Two threads hold an adapter without a gap, each taking the next lease before it gives back the last."""
    pool, stop = pool_of(folders, slots=2), threading.Event()

    def hold(name: str) -> int:
        count, lease = 0, pool.acquire(name, timeout=60)
        while not stop.is_set():
            with ThreadPoolExecutor(1) as own:
                following = own.submit(pool.acquire, name, timeout=60)
                if not following.done():
                    stop.wait(0.001)
                lease.release()
                lease = following.result()
            count += 1
        lease.release()
        return count

    with ThreadPoolExecutor(2) as threads:
        holders = [threads.submit(hold, name) for name in ("a0", "a1")]
        try:
            for number in (2, 3, 4):
                pool.acquire(f"a{number}", timeout=60).release()
        finally:
            stop.set()
        assert all(holder.result() > 0 for holder in holders)


def test_pairs_do_not_wait_for_each_other(folders: list[Path]) -> None:
    pool, failures = pool_of(folders[:4], slots=2), list[BaseException]()

    def take(first: int, second: int) -> None:
        try:
            for _ in range(5):
                pool.acquire({f"a{first}": 1.0, f"a{second}": 0.5}, timeout=60).release()
                pool.acquire(f"a{second}", timeout=60).release()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=take, args=pair) for pair in ((0, 1), (1, 0), (2, 3), (3, 1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert all(one.leases == one.partial == 0 for one in pool._residents.values())


def test_threads_that_want_the_same_adapter_load_it_once(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pool_of(folders)
    ready = threading.Barrier(6)

    def take() -> str:
        ready.wait()
        with pool.acquire("a0", timeout=60) as lease:
            return next(iter(lease.adapters))

    with ThreadPoolExecutor(6) as threads:
        names = {future.result() for future in [threads.submit(take) for _ in range(6)]}
    assert len(names) == 1
    assert (pool.counts().loads, pool.counts().hits) == (1, 5)


def test_requests_that_hold_what_was_replaced_end_with_it(folders: list[Path], answers: Any) -> None:
    pool = pool_of(folders[:1])
    engine = Engine(pool.model, prepack=False)
    old = pool.acquire("a0")
    running = [engine.submit(Request(ids, 6, adapters=old.adapters)) for ids in PROMPTS]
    engine._take_turn(running[0])
    with raises("adapter/name-registered"):
        pool.register("a0", folders[1])
    pool.register("a0", folders[1], replace=True)
    with pool.acquire("a0") as new:
        assert new.fingerprint != old.fingerprint
        assert asked(engine, new) == answers[1]
        assert [engine.wait(each).ids for each in running] == answers[0]
        pool.register("a0", folders[1], replace=True)  # the very same files
        loads = pool.counts().loads
        with pool.acquire("a0") as same:
            assert same.adapters == new.adapters
            assert pool.counts().loads == loads
        pool.unregister("a0")
        assert asked(engine, new) == answers[1]
        assert asked(engine, old) == answers[0]
    with raises("adapter/not-registered"):
        pool.acquire("a0")
    old.release()


def test_no_name_on_the_model_is_used_twice(folders: list[Path]) -> None:
    pool = pool_of(folders, slots=1)
    seen = set[str]()
    for _ in range(3):
        for number in (0, 1):
            with pool.acquire(f"a{number}") as lease:
                seen |= lease.adapters.keys()
    assert len(seen) == 6


def test_what_failed_to_load_leaves_the_others(
    folders: list[Path], answers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = pool_of(folders, slots=1)
    engine = Engine(pool.model, prepack=False)
    pool.acquire("a0").release()

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError("no room")

    for place in (checked_adapter.CheckedAdapter, "read"), (adapter_pool, "attach_factors"):
        with monkeypatch.context() as patch:
            patch.setattr(*place, fail)
            with pytest.raises(MemoryError):
                pool.acquire("a1")
        with pool.acquire("a1", timeout=60) as lease:
            assert asked(engine, lease) == answers[1]
        with pool.acquire("a0", timeout=60) as lease:
            assert asked(engine, lease) == answers[0]


def test_files_that_change_are_checked_again(folders: list[Path], answers: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(folders[0], tmp_path / "a")
    pool = AdapterPool(base(), slots=1)
    pool.register("a", folder)
    pool.register("b", folders[3])
    engine = Engine(pool.model, prepack=False)
    first = pool.get("a").fingerprint
    for number in (1, 2):
        write_adapter(folder, number)
        pool.acquire("b").release()
        with pool.acquire("a") as lease:
            assert lease.fingerprint == pool.get("a").fingerprint != first
            assert asked(engine, lease) == answers[number]
    pool.acquire("b").release()
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    times = (folder / WEIGHTS).stat()
    (folder / WEIGHTS).write_bytes(data)
    os.utime(folder / WEIGHTS, ns=(times.st_atime_ns, times.st_mtime_ns))
    with raises("adapter/checksum-mismatch"):
        pool.acquire("a")
    shutil.rmtree(folder)
    with raises("adapter/no-such-folder"):
        pool.acquire("a")
    assert pool.counts().registered == 2
    write_adapter(folder, 1)
    with pool.acquire("a") as lease:
        assert asked(engine, lease) == answers[1]


def test_files_are_summed_once(folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(folders[0], tmp_path / "a")
    pool = AdapterPool(base(), slots=1, host_bytes=0)
    monkeypatch.setattr(checked_adapter, "SETTLED_NS", -1)  # the folder is older than this test
    pool.register("a", folder)
    pool.register("b", folders[1])
    for module in (checked_adapter, Adapter):
        monkeypatch.setattr(module, "check_folder" if module is checked_adapter else "read", never)
    monkeypatch.setattr(checked_adapter, "check_folder", lambda _: None)
    for _ in range(2):
        pool.acquire("a").release()
        pool.acquire("b").release()
    assert pool.counts().loads == 4


@pytest.mark.parametrize("at", ["gone", "half read"])
def test_a_folder_that_is_replaced_while_it_is_read_is_read_again(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """A new version takes its place by renaming: for a moment there is none, or files are of the one and the other."""
    folder, new = shutil.copytree(folders[0], tmp_path / "a"), shutil.copytree(folders[1], tmp_path / "new")
    pool, inner = AdapterPool(base()), Adapter.read

    def replace(*_: Any) -> None:
        if new.exists():
            shutil.rmtree(folder, ignore_errors=True)
            new.rename(folder)

    def half(path: Path) -> Any:
        if new.exists():
            replace()
            (path / RECORD).write_bytes((folders[0] / RECORD).read_bytes())
            try:
                return inner(path)
            finally:
                (path / RECORD).write_bytes((folders[1] / RECORD).read_bytes())
        return inner(path)

    if at == "gone":
        shutil.rmtree(folder)
        monkeypatch.setattr(checked_adapter.time, "sleep", replace)
    else:
        monkeypatch.setattr(Adapter, "read", half)
    found = pool.register("a", folder)
    assert found.fingerprint == pool.register("b", folders[1]).fingerprint
    monkeypatch.setattr(checked_adapter.time, "sleep", lambda _: None)
    with raises("adapter/no-such-folder"):
        pool.register("c", tmp_path / "nowhere")


def test_a_file_that_was_only_just_written_is_checked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be written again under the same time stamp."""
    pool = AdapterPool(base(), slots=1)
    monkeypatch.setattr(checked_adapter, "SETTLED_NS", 10**15)
    pool.register("a", write_adapter(tmp_path / "a", 1))
    monkeypatch.setattr(Adapter, "read", never)
    with raises("adapter/unusable-adapter"):
        pool.acquire("a")


def never(*_: Any) -> None:
    raise AssertionError("the folder is read again")


def test_memory_beside_the_model_is_bounded(folders: list[Path]) -> None:
    size = sum(tensor.nbytes for tensor in load_file(folders[0] / WEIGHTS).values())
    pool = pool_of(folders, slots=1, host_bytes=2 * size + 1)
    for number in (0, 1, 2, 3, 2, 3):
        pool.acquire(f"a{number}").release()
        assert pool.counts().host_bytes <= 2 * size
    assert list(pool._host._kept) == ["a2", "a3"]
    assert all(entry.checked.adapter.tensors == {} for entry in pool._entries.values())
    pool.unregister("a2")
    assert pool.counts().host_bytes == size


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "a\\b", "a:b", "a@b", "a b", "a\n", "\x00", "é", "-a", "a" * 129, "tiny-base"]
)
def test_names_that_no_request_can_give(folders: list[Path], name: str) -> None:
    model = base()
    model.config._name_or_path = "tiny-base"
    pool = AdapterPool(model)
    with raises("adapter/invalid-adapter-name"):
        pool.register(name, folders[0])
    assert pool.registered() == []


def test_the_chat_and_the_tokenizer_of_an_adapter_come_with_it(tmp_path: Path, folders: list[Path]) -> None:
    tokenizer = tiny_tokenizer()
    pool = AdapterPool(base())
    for number in range(2):
        pool.register(f"a{number}", write_adapter(tmp_path / f"a{number}", number, tokenizer=tokenizer))
    pool.register("plain", folders[0])
    with pool.acquire("a0") as lease, pool.acquire("a1") as other, pool.acquire("plain") as plain:
        assert lease.chat is not None
        assert lease.chat.template == tokenizer.chat_template
        assert lease.tokenizer.get_vocab() == tokenizer.get_vocab()
        assert lease.tokenizer is other.tokenizer, "read once for all that have the same"
        assert plain.chat is None
        assert plain.tokenizer is None
    assert attachment(pool.model).chats == {}, "another adapter's template is no default"


@pytest.mark.parametrize("kind", ["prefix", "foreign"])
def test_other_kinds_of_adapters_are_served(kind: str, tmp_path: Path, folders: list[Path]) -> None:
    if kind == "prefix":
        folder = write_adapter(tmp_path / "a", 1, PrefixConfig())
    else:
        folder = shutil.copytree(folders[1], tmp_path / "a")
        (folder / RECORD).unlink()
    pool = AdapterPool(base(), slots=1)
    record = pool.register("a", folder)
    pool.register("b", folders[0])
    assert record.method == ("prefix" if kind == "prefix" else "lora")
    engine = Engine(pool.model, prepack=False)
    for _ in range(2):
        with pool.acquire("a") as lease:
            assert asked(engine, lease) == alone(folder, PROMPTS)
        pool.acquire("b").release()


def test_registering_leaves_the_model_as_it_is(folders: list[Path]) -> None:
    model = base().requires_grad_(True)
    attach(model, LoraConfig(r=2), name="own")
    learning = {name: p.requires_grad for name, p in model.named_parameters()}
    modules, tensors = dict(model.named_modules()), {n: p.clone() for n, p in model.named_parameters()}
    pool = AdapterPool(model)
    pool.register("a", folders[0])
    with raises("adapter/does-not-fit-model"):
        pool.register("b", other_shape(folders[0].parent / "other-shape"))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == learning
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(p, tensors[name]) for name, p in model.named_parameters())
    assert list(attachment(model).configs) == ["own"]
    with pool.acquire("a"):
        assert active_row(model) == {"own": 1.0}


def other_shape(folder: Path) -> Path:
    """Of another tool, with one factor of another rank."""
    write_adapter(folder, 1)
    (folder / RECORD).unlink()
    tensors = load_file(folder / WEIGHTS)
    key = next(key for key in tensors if "lora_B" in key)
    tensors[key] = torch.cat([tensors[key], tensors[key]], dim=1)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def test_another_base_is_refused(tmp_path: Path, folders: list[Path]) -> None:
    pool = AdapterPool(tiny_model())
    with raises("base/other-base"):
        pool.register("a", folders[0])
    assert pool.counts() == (0, 0, 0, 0, 0, 0, 0)
