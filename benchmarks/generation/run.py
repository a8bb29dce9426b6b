"""Answers of the engine against those of `model.generate`, in turns in one process.

python benchmarks/generation/run.py                 both claims in every dtype, then result.json
python benchmarks/generation/run.py --rounds 1      a look, without a result
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from machine import write_result  # noqa: E402

from graftlm import load_base  # noqa: E402
from graftlm.generation.engine import Engine  # noqa: E402
from graftlm.generation.requests import Request  # noqa: E402
from graftlm.generation.sampling import GREEDY, Sampling  # noqa: E402

CONFIG: dict[str, Any] = yaml.safe_load((HERE / "config.yaml").read_text())
NEW: int = CONFIG["new_tokens"]


def prompts() -> list[list[int]]:
    """Random ids; the lengths lie evenly between the shortest and the longest, in a random order."""
    random, wanted = np.random.default_rng(0), CONFIG["prompts"]
    lengths = np.linspace(wanted["shortest"], wanted["longest"], wanted["count"]).round().astype(int)
    return [random.integers(20, 40_000, int(length)).tolist() for length in random.permutation(lengths)]


def seconds(function: Callable[[], int]) -> tuple[float, int]:
    started = time.perf_counter()
    tokens = function()
    return time.perf_counter() - started, tokens


def by_engine(model: Any, prompts: list[list[int]], sampling: Sampling = GREEDY) -> int:
    """With a new engine each time: what it prepares is counted."""
    requests = [Request(ids, NEW, sampling) for ids in prompts]
    return sum(len(generation.ids) for _, generation in Engine(model).run(requests))


def settings(**more: Any) -> dict[str, Any]:
    return {"max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0, "do_sample": False} | more


@torch.no_grad()
def in_one_batch(model: Any, prompts: list[list[int]]) -> int:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(one)) + one for one in prompts])
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts])
    out = model.generate(ids, attention_mask=mask, **settings())
    return int(out[:, width:].numel())


@torch.no_grad()
def in_sequences(model: Any, prompt: list[int], count: int) -> int:
    drawn = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    out = model.generate(torch.tensor([prompt]), num_return_sequences=count, **settings(**drawn))
    return int(out[:, len(prompt) :].numel())


def compare(ours: Callable[[], int], theirs: Callable[[], int], rounds: int) -> dict[str, Any]:
    times: dict[str, list[float]] = {"engine": [], "transformers": []}
    for number in range(rounds + 1):  # the first is a warm-up
        for name, function in (("engine", ours), ("transformers", theirs)):
            took, tokens = seconds(function)
            if number:
                times[name].append(took)
    ratios = [b / a for a, b in zip(times["engine"], times["transformers"], strict=True)]
    return {
        "tokens": tokens,
        "seconds": {name: [round(each, 3) for each in took] for name, took in times.items()},
        "ratios": [round(ratio, 2) for ratio in ratios],
        "ratio": round(statistics.median(ratios), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=CONFIG["rounds"])
    rounds = parser.parse_args().rounds
    torch.set_num_threads(CONFIG["threads"])
    asked, samples = prompts(), CONFIG["samples"]
    long = np.random.default_rng(1).integers(20, 40_000, samples["prompt"]).tolist()
    found: dict[str, Any] = {}
    for dtype in CONFIG["dtypes"]:
        model, _ = load_base(CONFIG["base"], dtype=dtype)
        model.generation_config.eos_token_id = None
        several = [long] * samples["count"]
        found[dtype] = {
            "prompts": compare(partial(by_engine, model, asked), partial(in_one_batch, model, asked), rounds),
            "samples": compare(
                partial(by_engine, model, several, Sampling(temperature=1.0)),
                partial(in_sequences, model, long, samples["count"]),
                rounds,
            ),
        }
        print(dtype, {name: one["ratio"] for name, one in found[dtype].items()}, flush=True)
    if rounds == CONFIG["rounds"]:
        write_result(__file__, {"config": CONFIG, "found": found})
    else:
        print(found)


if __name__ == "__main__":
    main()
