"""What a pool of adapters costs: a thousand registered, few of them on the model; cold loads; methods without factors.

taskset -c 1 python benchmarks/adapter_pool/run.py          all claims, then result.json
taskset -c 1 python benchmarks/adapter_pool/run.py --quick  a look, with a tenth of the adapters and of the requests

Each part is a process of its own, so that memory is that of one.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from machine import write_result  # noqa: E402

from graftlm import attach, load_base  # noqa: E402
from graftlm.adapters.adapter import Adapter  # noqa: E402
from graftlm.adapters.save import save_adapter  # noqa: E402
from graftlm.deltas.lora import LoraConfig  # noqa: E402
from graftlm.generation.adapter_pool import AdapterPool, Lease  # noqa: E402
from graftlm.generation.engine import Engine  # noqa: E402
from graftlm.generation.requests import Generation, Request  # noqa: E402
from graftlm.testing.deltas import move, tiny_config  # noqa: E402

CONFIG: dict[str, Any] = yaml.safe_load((HERE / "config.yaml").read_text())
NEW: int = CONFIG["new_tokens"]


def loaded() -> Any:
    torch.set_num_threads(CONFIG["threads"])
    model, _ = load_base(CONFIG["base"], dtype="float32")
    model.generation_config.eos_token_id = None
    return model


def prompt(seed: int) -> list[int]:
    random = torch.Generator().manual_seed(seed)
    found: list[int] = torch.randint(20, 40_000, (CONFIG["prompt_tokens"],), generator=random).tolist()
    return found


def write_adapters(folder: Path, count: int, rank: int, dtype: torch.dtype) -> None:
    """`count` adapters with different numbers, 0 .. count - 1."""
    model = loaded()
    attach(model, LoraConfig(r=rank, alpha=rank))
    move(model, scale=0.02, seed=0)
    first = Adapter.read(save_adapter(model, folder / "first"))
    for number in range(count):
        tensors = {key: (t * (1 - number / 10_000)).to(dtype) for key, t in first.tensors.items()}
        replace(first, tensors=tensors).write(folder / str(number))


def zipf(requests: int, registered: int) -> list[int]:
    """Adapters by Zipf's law: the n-th most wanted is asked for 1 / n times as often as the first."""
    chances = 1 / torch.arange(1, registered + 1)
    found: list[int] = torch.multinomial(chances, requests, True, generator=torch.Generator().manual_seed(3)).tolist()
    return found


def rss_anon() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def pool_of(model: Any, folder: Path, count: int, slots: int, host_bytes: int) -> AdapterPool:
    pool = AdapterPool(model, slots=slots, host_bytes=host_bytes, dtype=torch.bfloat16)
    for number in range(count):
        pool.register(str(number), folder / str(number))
    return pool


def throughput(folder: Path, registered: int, requests: int, all_resident: int) -> dict[str, float]:
    """Tokens a second, where the next request comes when one has its answer."""
    model = loaded()
    engine = Engine(model, max_requests=CONFIG["clients"])
    list(engine.run([Request(prompt(0), 2)]))
    before = rss_anon()
    host = 0 if all_resident else CONFIG["host_mib"] * 2**20
    pool = pool_of(model, folder, registered, registered if all_resident else CONFIG["slots"], host)
    requested = zipf(requests, registered)
    if all_resident:
        for number in range(registered):
            pool.acquire(str(number)).release()

    def served(indices: Sequence[int]) -> int:
        """Tokens of the answers: as in a server, one thread steps and others put adapters on the model."""
        waiting, loading, running, tokens = deque(indices), list[Any](), list[tuple[Lease, Generation]](), 0
        while waiting or loading or running:
            while waiting and len(loading) + len(running) < CONFIG["clients"]:
                index = waiting.popleft()
                loading.append((index, loaders.submit(pool.acquire, str(requested[index]))))
            for index, future in [each for each in loading if each[1].done() or not running]:
                loading.remove((index, future))
                lease = future.result()
                running.append((lease, engine.submit(Request(prompt(index), NEW, adapters=lease.adapters))))
            engine.step()
            for lease, generation in [each for each in running if each[1].finish is not None]:
                running.remove((lease, generation))
                lease.release()
                tokens += len(generation.ids)
        return tokens

    with ThreadPoolExecutor(4) as loaders:
        served(range(CONFIG["clients"]))
        started = time.perf_counter()
        tokens = served(range(requests))
        seconds = time.perf_counter() - started
    one = sum(t.nbytes for t in Adapter.read(folder / "0").tensors.values())
    counts = pool.counts()
    return {
        "tokens_per_second": round(tokens / seconds, 1),
        "loads": counts.loads,
        "grown_mib": round((rss_anon() - before) / 2**20),
        "allowed_mib": round((CONFIG["slots"] * one + host) / 2**20),
        "base_mib": round(before / 2**20),
    }


def base_only(folder: Path, registered: int) -> dict[str, float]:
    """Requests for the base with `registered` adapters, of which `slots` are on the model, and without any."""
    plain, model = loaded(), loaded()
    pool = pool_of(model, folder, registered, CONFIG["slots"], 0)
    for number in range(CONFIG["slots"]):
        pool.acquire(str(number)).release()
    engines = {"plain": Engine(plain, max_requests=8), "with adapters": Engine(model, max_requests=8)}
    return in_turns({name: partial(answers, engine, [()] * 8) for name, engine in engines.items()}, "plain")


def answers(engine: Engine, rows: list[tuple[str, ...]]) -> int:
    requests = [Request(prompt(n), NEW, adapters=row) for n, row in enumerate(rows)]
    return sum(len(generation.ids) for _, generation in engine.run(requests))


def in_turns(runs: dict[str, Callable[[], int]], reference: str) -> dict[str, float]:
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(CONFIG["rounds"] + 1):
        for name, run in runs.items():
            started = time.process_time()
            tokens = run()
            if number:
                found[name].append(tokens / (time.process_time() - started))
    (other,) = set(runs) - {reference}
    ratio = statistics.median(a / b for a, b in zip(found[other], found[reference], strict=True))
    return {name: round(statistics.median(all_), 1) for name, all_ in found.items()} | {"ratio": round(ratio, 3)}


def cold(folder: Path, registered: int) -> dict[str, float]:
    """Milliseconds from a name to an adapter on the model, its file in the page cache and no tensor in memory."""
    model = loaded()
    pool = AdapterPool(model, slots=1, host_bytes=0)
    started = time.perf_counter()
    for number in range(registered):
        pool.register(f"small-{number}", folder / "small" / str(number))
    each = (time.perf_counter() - started) / registered
    for number in range(2):
        pool.register(f"large-{number}", folder / "large" / str(number))
    times = []
    for load in range(CONFIG["cold"]["loads"] + 4):
        started = time.perf_counter()
        pool.acquire(f"large-{load % 2}").release()
        times.append(1e3 * (time.perf_counter() - started))
    found = {"median_ms": statistics.median(times[4:]), "most_ms": max(times[4:]), "registering_ms": 1e3 * each}
    size = (folder / "large" / "0" / "adapter_model.safetensors").stat().st_size
    return {name: round(ms, 1) for name, ms in found.items()} | {"file_mb": round(size / 1e6, 1)}


def without_factors() -> dict[str, float]:
    plain, model = loaded(), loaded()
    for number, method in enumerate(CONFIG["methods"]):
        attach(model, tiny_config(method), name=method, seed=number)
    move(model, scale=0.02, seed=0)
    rows = [(method,) for method in CONFIG["methods"]]
    engines = {"base": Engine(plain, max_requests=len(rows)), "methods": Engine(model, max_requests=len(rows))}
    runs = {"base": [()] * len(rows), "methods": rows}
    return in_turns({name: partial(answers, engines[name], all_) for name, all_ in runs.items()}, "base")


def in_a_process(name: str, *arguments: Any) -> Any:
    print(name, *arguments[1:], "...", flush=True)
    command = [sys.executable, __file__, "--part", json.dumps([name, *map(str, arguments)])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(found, flush=True)
    return found


def part(name: str, *arguments: str) -> None:
    folder = Path(arguments[0]) if arguments else Path()
    numbers = [int(each) for each in arguments[1:]]
    if name == "write":
        write_adapters(folder / "small", numbers[0], CONFIG["rank"], torch.bfloat16)
        write_adapters(folder / "large", 2, CONFIG["cold"]["rank"], torch.float32)
        found: Any = None
    elif name == "throughput":
        found = throughput(folder / "small", *numbers)
    elif name == "base only":
        found = base_only(folder / "small", *numbers)
    elif name == "cold":
        found = cold(folder, *numbers)
    else:
        found = without_factors()
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        part(*json.loads(arguments.part))
        return
    registered, requests = CONFIG["registered"], CONFIG["requests"]
    if arguments.quick:
        registered, requests = registered // 10, requests // 10
    found: dict[str, Any] = {"methods without factors": in_a_process("methods without factors")}
    with tempfile.TemporaryDirectory() as temporary:
        in_a_process("write", temporary, registered)
        for all_resident in (0, 1):
            key = "all resident" if all_resident else f"{CONFIG['slots']} slots"
            found[key] = in_a_process("throughput", temporary, registered, requests, all_resident)
        found["base only"] = in_a_process("base only", temporary, registered)
        found["cold"] = {n: in_a_process("cold", temporary, n) for n in (CONFIG["cold"]["few"], registered)}
    speeds = [found[key]["tokens_per_second"] for key in (f"{CONFIG['slots']} slots", "all resident")]
    found["slots over all resident"] = round(speeds[0] / speeds[1], 3)
    if not arguments.quick:
        write_result(__file__, {"config": CONFIG, "found": found})


if __name__ == "__main__":
    main()
