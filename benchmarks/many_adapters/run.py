"""Requests with adapters of their own in one batch, against the base alone and against PEFT, in turns in one process.

taskset -c 1 python benchmarks/many_adapters/run.py                 all claims, then result.json
taskset -c 1 python benchmarks/many_adapters/run.py --rounds 1      a look, without a result
"""

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from machine import write_result  # noqa: E402

from graftlm import load_base  # noqa: E402
from graftlm.adapters.folder import read_tensors  # noqa: E402
from graftlm.generation.engine import Engine  # noqa: E402
from graftlm.generation.requests import Request  # noqa: E402
from graftlm.kernels import many_low_rank, prepacked  # noqa: E402
from graftlm.model.factors import attach_factors, detach_factors  # noqa: E402

CONFIG: dict[str, Any] = yaml.safe_load((HERE / "config.yaml").read_text())
NEW: int = CONFIG["new_tokens"]
Factors = dict[str, tuple[Tensor, Tensor]]


def linear_layers(model: Any) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}


def random_factors(layers: Mapping[str, nn.Linear], seed: int) -> Factors:
    """Of a trained size: B is not 0."""
    random, r = torch.Generator().manual_seed(seed), CONFIG["rank"]
    return {
        name: (
            torch.randn(r, layer.in_features, generator=random) / layer.in_features**0.5,
            0.02 * torch.randn(layer.out_features, r, generator=random),
        )
        for name, layer in layers.items()
    }


def prompts(count: int) -> list[list[int]]:
    random = torch.Generator().manual_seed(1)
    return torch.randint(20, 40_000, (count, CONFIG["prompt_tokens"]), generator=random).tolist()


def by_engine(engine: Engine, rows: list[tuple[str, ...]]) -> int:
    requests = [Request(ids, NEW, adapters=row) for ids, row in zip(prompts(len(rows)), rows, strict=True)]
    return sum(len(generation.ids) for _, generation in engine.run(requests))


@contextmanager
def plain_torch() -> Iterator[None]:
    """Without our kernels for products: oneDNN's prepacked weights, and stacked factors."""
    serves, many_low_rank.serves = many_low_rank.serves, lambda x: False
    panels, prepacked._panels_serve = prepacked._panels_serve, lambda dtype: False
    try:
        yield
    finally:
        many_low_rank.serves, prepacked._panels_serve = serves, panels


def by_plain_torch(engine: Engine, rows: list[tuple[str, ...]]) -> int:
    with plain_torch():
        return by_engine(engine, rows)


def rates(runs: Mapping[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    """Tokens a second of the process's own time, the runs in turns; the first round is a warm-up."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            gc.collect()
            started = time.process_time()
            tokens = run()
            if number:
                found[name].append(tokens / (time.process_time() - started))
    return found


def over(found: Mapping[str, list[float]], name: str, other: str) -> float:
    return round(statistics.median(a / b for a, b in zip(found[name], found[other], strict=True)), 3)


def many(plain: Any, model: Any, count: int, rounds: int) -> dict[str, Any]:
    """`count` rows with `count` adapters against the base, which has none on it. `model` has all adapters."""
    base, engine = Engine(plain, max_requests=count), Engine(model, max_requests=count)
    with plain_torch():  # weights are prepacked at the first answer
        base_in_torch, in_torch = Engine(plain, max_requests=count), Engine(model, max_requests=count)
        for one in (base_in_torch, in_torch):
            by_engine(one, [()])
    none: list[tuple[str, ...]] = [()] * count
    found = rates(
        {
            "base": partial(by_engine, base, none),
            "base, adapters on": partial(by_engine, engine, none),
            "bfloat16": partial(by_engine, engine, [(f"bfloat16-{n}",) for n in range(count)]),
            "float32": partial(by_engine, engine, [(f"float32-{n}",) for n in range(count)]),
            "base, plain torch": partial(by_plain_torch, base_in_torch, none),
            "bfloat16, plain torch": partial(by_plain_torch, in_torch, [(f"bfloat16-{n}",) for n in range(count)]),
        },
        rounds,
    )
    ratios = {name: over(found, name, "base") for name in found if name != "base"}
    ratios["plain torch over its own base"] = over(found, "bfloat16, plain torch", "base, plain torch")
    return {"tokens_per_second": {name: [round(each, 1) for each in all_] for name, all_ in found.items()}} | {
        "over_base": ratios
    }


class Peft:
    """PEFT with the same adapters, in one padded-free batch of `model.generate`."""

    def __init__(self, plain: Any, count: int) -> None:
        config = partial(PeftLoraConfig, r=CONFIG["rank"], lora_alpha=CONFIG["rank"], target_modules="all-linear")
        self.names = [f"a{n}" for n in range(count)]
        self.model = get_peft_model(plain, config(), adapter_name=self.names[0])
        for name in self.names[1:]:
            self.model.add_adapter(name, config())
        for number, name in enumerate(self.names):
            given = random_factors(linear_layers_of_peft(self.model), number)
            for site, (A, B) in given.items():
                layer = self.model.base_model.model.get_submodule(site)
                layer.lora_A[name].weight.data.copy_(A)
                layer.lora_B[name].weight.data.copy_(B)
        self.model.eval()

    @torch.no_grad()
    def generate(self, rows: list[str]) -> int:
        ids = torch.tensor(prompts(len(rows)))
        settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0, "do_sample": False}
        out = self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=rows, **settings)
        return int(out[:, ids.shape[1] :].numel())


def linear_layers_of_peft(model: Any) -> dict[str, nn.Linear]:
    inside = model.base_model.model.named_modules()
    return {name.removesuffix(".base_layer"): m for name, m in inside if name.endswith(".base_layer")}


def attaching(model: Any, layers: Mapping[str, nn.Linear], rounds: int) -> dict[str, Any]:
    """Milliseconds from a file of PEFT's keys to an adapter that requests can name, and off again."""
    times: dict[str, list[float]] = {"attach": [], "detach": []}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "adapter_model.safetensors"
        given = random_factors(layers, 7)
        save_file({f"{name}.{key}": t for name, pair in given.items() for key, t in zip("AB", pair, strict=True)}, file)
        for number in range(rounds + 1):
            started = time.perf_counter()
            tensors = read_tensors(file)
            factors = {name: (tensors[f"{name}.A"], tensors[f"{name}.B"]) for name in layers}
            attach_factors(model, "new", factors, dtype=torch.bfloat16)
            attached = time.perf_counter()
            detach_factors(model, "new")
            if number:
                times["attach"].append(1e3 * (attached - started))
                times["detach"].append(1e3 * (time.perf_counter() - attached))
        size = os.path.getsize(file)
    return {f"{name}_ms": round(statistics.median(each), 2) for name, each in times.items()} | {
        "file_mb": round(size / 1e6, 1)
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=CONFIG["rounds"])
    rounds = parser.parse_args().rounds
    torch.set_num_threads(CONFIG["threads"])
    plain, _ = load_base(CONFIG["base"], dtype=CONFIG["dtype"])
    model, _ = load_base(CONFIG["base"], dtype=CONFIG["dtype"])
    for one in (plain, model):
        one.generation_config.eos_token_id = None
    layers, counts = linear_layers(plain), (CONFIG["rows"], CONFIG["more_rows"])
    for number in range(max(counts)):
        factors = random_factors(layers, number)
        attach_factors(model, f"bfloat16-{number}", factors, dtype=torch.bfloat16)
        if number < counts[0] or rounds == CONFIG["rounds"]:
            attach_factors(model, f"float32-{number}", factors)
    for number in range(max(counts), CONFIG["attached"]):
        attach_factors(model, f"idle-{number}", factors)  # the tensors of the last one
    found: dict[str, Any] = {"attaching": attaching(model, layers, 10)}
    for count in counts if rounds == CONFIG["rounds"] else counts[:1]:
        found[f"{count} adapters"] = many(plain, model, count, rounds)
        print(count, found[f"{count} adapters"]["over_base"], flush=True)
    found["peft"] = against_peft(plain, model, counts[0], min(rounds, CONFIG["peft_rounds"]))
    print(found["attaching"], found["peft"], flush=True)
    if rounds == CONFIG["rounds"]:
        write_result(__file__, {"config": CONFIG, "found": found})


def against_peft(plain: Any, model: Any, count: int, rounds: int) -> dict[str, Any]:
    """It comes last: PEFT changes the base that it is put on."""
    engine, peft = Engine(model, max_requests=count), Peft(plain, count)
    runs = {
        "engine": partial(by_engine, engine, [(f"bfloat16-{n}",) for n in range(count)]),
        "peft": partial(peft.generate, peft.names),
    }
    found = rates(runs, rounds)
    return {
        "tokens_per_second": {name: [round(each, 1) for each in all_] for name, all_ in found.items()},
        "engine_over_peft": over(found, "engine", "peft"),
    }


if __name__ == "__main__":
    main()
