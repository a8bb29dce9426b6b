"""LoraHub: 16 task adapters, a 17th task with five examples. Held-out loss in nats a token, and the search's seconds.

    taskset -c 1 python benchmarks/lorahub/run.py           all seeds, then result.json; resumes
    python benchmarks/lorahub/run.py --quick                two adapters, one seed, few evaluations, without a result

    base          all weights 0
    uniform       1 / n each, in product space and in the paper's space of factors (there w = 1 / sqrt n, whose w^2 is)
    random        one adapter, drawn: the mean loss over all of them is its expectation
    best single   the adapter with the lowest loss on the examples
    lorahub       weights by search on the examples, in both spaces
    cat           a weight for each adapter and layer, by gradient, on the same examples

An adapter that is not in $GRAFT_CACHE/task-adapters/ is trained first.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from machine import write_result  # noqa: E402
from task_adapters import few, packs_of, record, recorded, rows_of, trained  # noqa: E402

from graftlm import load_base  # noqa: E402
from graftlm.adapters.adapter import Adapter  # noqa: E402
from graftlm.combine.few_shot import SumSpace, few_shot_loss  # noqa: E402
from graftlm.combine.layer_weights import layer_loss, learn_layer_weights  # noqa: E402
from graftlm.combine.search import search_weights  # noqa: E402

CONFIG: dict[str, Any] = yaml.safe_load((HERE / "config.yaml").read_text())
SPACES: tuple[SumSpace, ...] = ("product", "factors")


def measured(names: Sequence[str], seed: int) -> dict[str, Any]:
    """{held_out: what -> loss, seconds: of each search, weights: of each search, single: the adapter chosen}"""
    adapters, n = [Adapter.read(trained(name)) for name in names], len(names)
    model, tokenizer = load_base(CONFIG["base"])
    train, held_out = rows_of(CONFIG["target"])
    examples = packs_of(model, tokenizer, few(train, CONFIG["examples"], seed))
    unseen = packs_of(model, tokenizer, held_out[: CONFIG["rows"]])
    loss, seconds, weights = dict[str, float](), dict[str, float](), dict[str, Any]()
    single = ""
    for space in SPACES:
        with few_shot_loss(model, adapters, examples, space=space) as score:
            started = time.perf_counter()
            found = search_weights(n, score, budget=CONFIG["evaluations"], seed=seed)
            seconds[f"lorahub, {space}"] = time.perf_counter() - started
            weights[f"lorahub, {space}"] = found.weights
            if space == "product":
                ones = [[float(i == k) for k in range(n)] for i in range(n)]
                losses = [score(one) for one in ones]
                chosen = losses.index(min(losses))
                single = names[chosen]
        with few_shot_loss(model, adapters, unseen, space=space) as score:
            each = 1 / n if space == "product" else n**-0.5
            loss[f"uniform, {space}"] = score([each] * n)
            loss[f"lorahub, {space}"] = score(found.weights)
            if space == "product":
                loss["base"] = score([0.0] * n)
                alone = [score(one) for one in ones]
                loss["random"], loss["best single"] = sum(alone) / n, alone[chosen]
                loss["best single, chosen on the held-out rows"] = min(alone)
    started = time.perf_counter()
    learned = learn_layer_weights(model, adapters, examples, evaluations=CONFIG["cat_evaluations"], learning_rate=0.05)
    seconds["cat"] = time.perf_counter() - started
    with layer_loss(model, adapters, unseen) as on:
        loss["cat"] = on.loss(torch.tensor([learned.weights[site] for site in on.sites]))
    return {"held_out": loss, "seconds": seconds, "weights": weights, "single": single, "by": found.by}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    names, seeds, runs = CONFIG["adapters"], CONFIG["seeds"], HERE / "runs"
    if asked.quick:
        names, seeds, runs = names[:2], seeds[:1], HERE / "quick"
        CONFIG.update(target=CONFIG["adapters"][2], examples=3, rows=4, evaluations=4, cat_evaluations=3)
    found = []
    for seed in seeds:
        file = runs / f"{seed}.json"
        if (run := recorded(file)) is None:
            record(file, run := measured(names, seed))
        found.append(run)
        print(seed, json.dumps(run["held_out"]), json.dumps(run["seconds"]), flush=True)
    table = {
        what: {
            "mean": round(sum(run["held_out"][what] for run in found) / len(found), 4),
            "by_seed": [round(run["held_out"][what], 4) for run in found],
        }
        for what in found[0]["held_out"]
    }
    seconds = {what: round(max(run["seconds"][what] for run in found), 1) for what in found[0]["seconds"]}
    for what, row in sorted(table.items(), key=lambda each: each[1]["mean"]):
        print(what, row)
    if not asked.quick:
        by = {"optimizer": found[0]["by"], "single": [run["single"] for run in found]}
        write_result(__file__, {"config": CONFIG, "loss_nats": table, "search_seconds": seconds, **by})


if __name__ == "__main__":
    main()
