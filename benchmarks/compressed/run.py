"""Trained adapters over shared bases: bytes, errors, and each adapter's score on its own task before and after.

    python benchmarks/compressed/run.py            all of them, then result.json; resumes
    python benchmarks/compressed/run.py --quick    two adapters, four rows, one variant, without a result

An adapter that is not in $GRAFT_CACHE/task-adapters/ is trained first. The compressed ones stay in
$GRAFT_CACHE/compressed/. Nothing is timed: other work may run beside it.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from machine import write_result  # noqa: E402
from task_adapters import own_scores, record, recorded, rows_of, scores_of, trained  # noqa: E402

from graftlm import load_base  # noqa: E402
from graftlm.adapters.adapter import Adapter  # noqa: E402
from graftlm.combine.changes import changes_of  # noqa: E402
from graftlm.combine.compress import compress  # noqa: E402
from graftlm.data.sources.tasks.table import TASKS  # noqa: E402
from graftlm.evaluation.statistics.intervals import difference_interval, mean_interval  # noqa: E402
from graftlm.files import cache_folder  # noqa: E402

CONFIG: dict[str, Any] = yaml.safe_load((HERE / "config.yaml").read_text())
Member = tuple[str, int]
"""Task and seed."""


def members(count: int) -> list[Member]:
    seeds = -(-count // len(TASKS))
    return [(task, seed) for seed in range(seeds) for task in TASKS][:count]


def shapes(model: Any, adapter: Adapter) -> list[tuple[int, int, int]]:
    """(d_out, d_in, r) of each site of an adapter; all have the same."""
    with changes_of(model, adapter, "shapes", needs_rank=True) as changes:
        made = [change() for change in changes.values()]
    return [(len(each.B), each.A.shape[1], len(each.A)) for each in made]


def largest_rank(sites: list[tuple[int, int, int]], n: int, share: float, *, diagonal: bool, clusters: int) -> int:
    """The largest k at which U and V of each cluster and n S_i take at most a share of what the A_i and B_i take."""
    before = sum(n * r * (d_out + d_in) for d_out, d_in, r in sites)

    def after(k: int) -> int:
        core = k if diagonal else k * k
        return sum(clusters * k * (d_out + d_in) + n * core for d_out, d_in, _ in sites)

    k = 1
    while after(k + 1) <= share * before:
        k += 1
    return k


def compressed(name: str, options: dict[str, Any], some: list[Member], out: Path, share: float) -> dict[str, Any]:
    """{rank, bytes, bytes_before, errors: of each adapter, over its sites}; the adapters are written to `out`."""
    model, _ = load_base(CONFIG["base"])
    adapters = [Adapter.read(trained(task, seed)) for task, seed in some]
    rank = largest_rank(shapes(model, adapters[0]), len(some), share, **options)
    print(f"{name}: rank {rank} ...", flush=True)
    made = compress(model, adapters, rank=rank, **options)
    errors = []
    for number, (member, adapter) in enumerate(zip(some, made.adapters, strict=True)):
        if not (folder := out / "-".join(map(str, member))).exists():
            adapter.write(folder)
        own = [site.errors[number] for site in made.sites.values() if number in site.errors]
        errors.append({"mean": sum(own) / len(own), "largest": max(own)})
    return {
        "rank": rank,
        "bytes": sum(site.bytes for site in made.sites.values()),
        "bytes_before": sum(site.bytes_before for site in made.sites.values()),
        "errors": errors,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    count, rows, share, variants = (CONFIG[key] for key in ("adapters", "rows", "share", "variants"))
    runs = HERE / "runs"
    kept = cache_folder() / "compressed"
    if asked.quick:  # two adapters have no room for a shared basis at a quarter
        count, rows, share, variants, runs = 2, 4, 0.6, {"full": variants["full"]}, HERE / "quick"
        kept = runs / "adapters"
    some = members(count)
    own = {member: own_scores(*member, rows)._asdict() for member in some}
    base = load_base(CONFIG["base"])
    table: dict[str, dict[str, Any]] = {}
    for name, options in variants.items():
        slug = name.replace(", ", "-").replace(" ", "-")
        out = kept / f"{slug}-{count}"
        if (made := recorded(runs / f"{slug}.json")) is None:
            record(runs / f"{slug}.json", made := compressed(name, options, some, out, share))
        before, after, groups, by_adapter = list[float](), list[float](), list[str](), {}
        for member in some:
            task, seed = member
            file = runs / f"{slug}.{task}-{seed}.json"
            if (run := recorded(file)) is None:
                adapter = Adapter.read(out / f"{task}-{seed}")
                run = scores_of(base.model, base.tokenizer, adapter, {task: rows_of(task, seed)[1][:rows]})[task]
                record(file, run)
            before += own[member]["scores"]
            after += run["scores"]
            groups += run["groups"]
            by_adapter[f"{task}-{seed}"] = [
                int(sum(own[member]["scores"])),
                int(sum(run["scores"])),
                len(run["scores"]),
            ]
            print(name, task, seed, by_adapter[f"{task}-{seed}"], flush=True)
        gap = difference_interval(after, before, groups)
        means = [mean_interval(each, groups) for each in (before, after)]
        table[name] = {
            "rank": made["rank"],
            "share_of_bytes": round(made["bytes"] / made["bytes_before"], 4),
            "error": round(sum(each["mean"] for each in made["errors"]) / len(some), 4),
            "largest_error": round(max(each["largest"] for each in made["errors"]), 4),
            "score": {
                side: [round(number, 3) for number in (mean.value, mean.low, mean.high)]
                for side, mean in zip(("own", "compressed"), means, strict=True)
            },
            "difference": [round(number, 3) for number in (gap.value, gap.low, gap.high)],
            "of_own": round(sum(after) / max(1.0, sum(before)), 3),
            "own, compressed, rows": by_adapter,
        }
        print(name, json.dumps(table[name]), flush=True)
    if not asked.quick:
        write_result(__file__, {"config": CONFIG, "table": table})


if __name__ == "__main__":
    main()
