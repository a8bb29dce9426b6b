"""Products with prepacked weights in our panels and in oneDNN's layout, and low-rank changes of adapters, in turns.

taskset -c 1 python benchmarks/prepacked/run.py        all claims, then result.json
"""

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from machine import write_result  # noqa: E402

from graftlm.kernels.many_low_rank import Bounds, Change, Changes, ManyLowRank  # noqa: E402
from graftlm.kernels.prepacked import _OneDNN, _Panels  # noqa: E402

CONFIG: dict[str, Any] = yaml.safe_load((HERE / "config.yaml").read_text())
SHAPES: list[list[int]] = CONFIG["layers"] * CONFIG["shapes"]


def milliseconds(runs: Mapping[str, Callable[[], None]]) -> dict[str, float]:
    """The median of each, the runs in turns; the first round is a warm-up."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(CONFIG["rounds"] + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if number:
                found[name].append(1e3 * (time.perf_counter() - started))
    return {name: round(statistics.median(each), 2) for name, each in found.items()}


def products(dtype: torch.dtype) -> dict[int, dict[str, float]]:
    """Rows -> layout -> milliseconds of all products of a step."""
    weights = [torch.randn(d_out, d_in).to(dtype) for d_in, d_out in [*SHAPES, CONFIG["head"]]]
    layouts = {"panels": [_Panels(W) for W in weights], "oneDNN": [_OneDNN(W) for W in weights]}
    found = {}
    for rows in CONFIG["rows"]:
        xs = {W.shape[1]: torch.randn(rows, W.shape[1]).to(dtype) for W in weights}

        def all_of(name: str, xs: dict[int, torch.Tensor] = xs) -> None:
            for W, layout in zip(weights, layouts[name], strict=True):
                layout.product(xs[W.shape[1]], None, None)

        found[rows] = milliseconds({name: lambda name=name: all_of(name) for name in layouts})  # type: ignore[misc]
        print(dtype, rows, found[rows], flush=True)
    return found


def low_rank() -> dict[str, float]:
    """Rank -> milliseconds of the changes of a step, one token for each adapter."""
    count = CONFIG["adapters"]
    bounds = Bounds([(n, n + 1) for n in range(count)])
    xs = {d_in: torch.randn(count, d_in) for d_in, _ in SHAPES}

    def changes(r: int, d_in: int, d_out: int) -> Changes:
        return Changes([Change(torch.randn(r, d_in).bfloat16(), torch.randn(r, d_out).bfloat16().T)])

    layers = {
        r: [(d_in, ManyLowRank([changes(r, d_in, d_out) for _ in range(count)], d_out)) for d_in, d_out in SHAPES]
        for r in CONFIG["ranks"]
    }

    def all_of(r: int) -> None:
        for d_in, many in layers[r]:
            many(xs[d_in], bounds)

    found = milliseconds({str(r): lambda r=r: all_of(r) for r in layers})  # type: ignore[misc]
    print("low rank", found, flush=True)
    return found


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.inference_mode():
        found = {name: products(getattr(torch, name)) for name in CONFIG["dtypes"]}
        write_result(__file__, {"config": CONFIG, "milliseconds": found, "low_rank_milliseconds": low_rank()})


if __name__ == "__main__":
    main()
