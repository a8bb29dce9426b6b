"""What the guards say in real runs: of clean steps, of planted spikes, and what is left of batches that are not finite.

nice python benchmarks/guards/run.py     writes result.json
"""

import json
import math
import os
import random
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml

import graftlm
from graftlm.callbacks.adalora import AdaLoraCallback, AdaLoraCallbackConfig
from graftlm.callbacks.ema import Ema, EmaConfig
from graftlm.config.schema import build
from graftlm.data.batches.pack import collate
from graftlm.model.registry import attachment, trainable
from graftlm.optim.adamw import AdamW, AdamWConfig
from graftlm.prepare import prepare_data
from graftlm.recipe import Recipe
from graftlm.testing import save_tiny_base, tiny_model
from graftlm.testing.deltas import attach_tiny
from graftlm.training.callback import Callback, make_optimizer
from graftlm.training.guards import FEWEST
from graftlm.training.loop import TrainStep
from graftlm.training.objective import Sums
from graftlm.training.state import ParameterGroup, TrainingState

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from machine import write_result  # noqa: E402

from graftlm.system import tune_process  # noqa: E402


def recipe(config: dict[str, Any], base: Path, count: int, batch_rows: int, seed: int) -> Recipe:
    tree = {
        "base": {"name": str(base), "dtype": "float32"},
        "data": {"train": config["rows"], "held_out": 8, "max_tokens": config["max_tokens"]},
        "delta": {"method": "full"},
        "train": {
            "steps": count, "batch_rows": batch_rows, "learning_rate": config["learning_rate"], "seed": seed,
            "save_every": count,
        },
        "report": {"answers": 0, "samples": 0},
    }  # fmt: skip
    return build(Recipe, tree, source="benchmarks/guards")


def watched(wanted: Recipe, spikes: set[int], times: float) -> dict[str, Any]:
    """Losses of a run, the steps at which the guard spoke, and those at which it should have."""
    real, seen = Sums.totals, 0

    def totals(self: Sums) -> Any:
        nonlocal seen
        seen += 1
        loss, metrics = real(self)
        return loss * (times if seen in spikes else 1), metrics

    with tempfile.TemporaryDirectory() as out, patch.object(Sums, "totals", totals):
        graftlm.train(wanted, Path(out, "run"))
        lines = [json.loads(line) for line in Path(out, "run", "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line and "event" not in line]
    alarms = {line["step"] for line in lines if line.get("event") == "spike"}
    usual = [loss for step, loss in enumerate(losses, start=1) if step not in spikes]
    return {
        "batch_rows": wanted.train.batch_rows,
        "seed": wanted.train.seed,
        "steps": len(losses),
        "first_losses": round(sum(usual[:20]) / 20, 3),
        "last_losses": round(sum(usual[-20:]) / 20, 3),
        "largest_over_mean_of_the_last_half": round(
            max(usual[len(usual) // 2 :]) / (sum(usual[len(usual) // 2 :]) / len(usual[len(usual) // 2 :])), 2
        ),
        "planted": len(spikes),
        "found_in_the_same_step": len(spikes & alarms),
        "false_alarms": sorted(alarms - spikes),
    }


def trained(batches: list[Any], total: int, seed: int) -> tuple[list[torch.Tensor], list[bool]]:
    """Everything that a run leaves: parameters, optimizer state, what callbacks know; and which steps were skipped."""
    torch.manual_seed(seed)
    model = attach_tiny("adalora", tiny_model(), seed=seed, dropout=0.1)
    for module in model.modules():
        if hasattr(module, "deltas"):
            module.deltas.train()
    adalora = AdaLoraCallback(AdaLoraCallbackConfig(target_r=2, every=5))
    callbacks: list[Callback] = [AdamW(AdamWConfig()), adalora, Ema(EmaConfig())]
    optimizer = make_optimizer(callbacks, [ParameterGroup(trainable(model), 2e-3)], weight_decay=0.01)
    state = TrainingState(model, attachment(model).configs, optimizer, total=total, seed=seed)
    train_step = TrainStep(state, "supervised", lambda step: 1.0, clip=1.0, callbacks=callbacks, on_nonfinite="skip")
    skipped = [bool(step.skipped) for step in train_step.over(batches)]
    tensors = [*trainable(model).values(), *(t for each in callbacks for t in each.tensors.values())]
    tensors += [t for cached in optimizer.state.values() for t in cached.values() if torch.is_tensor(t)]
    return [t.detach().clone() for t in tensors], skipped


def not_finite(config: dict[str, Any], base: Path, seed: int) -> dict[str, Any]:
    count, bad = config["not_finite"]["steps"], config["not_finite"]["bad"]
    data = prepare_data(recipe(config, base, 1, 8, seed), graftlm.load_base(str(base)).tokenizer)
    clean = [[collate(data.examples[8 * n : 8 * n + 8])] for n in range(count)]
    places = set(random.Random(seed).sample(range(0, count, 2), bad))  # never three in a row
    with_bad: list[Any] = []
    for number, batch in enumerate(clean):
        if number in places:
            broken = collate(data.examples[8 * count : 8 * count + 8])
            broken.weights[0] = math.inf
            with_bad.append([broken])
        with_bad.append(batch)
    (wanted, _), (found, skipped) = trained(clean, count, seed), trained(with_bad, count, seed)
    same = len(found) == len(wanted) and all(map(torch.equal, found, wanted))
    return {"seed": seed, "bad": bad, "skipped": sum(skipped), "tensors": len(wanted), "bit_equal": same}


def cached(name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    file = HERE / "runs" / f"{name}.json"
    if not file.is_file():
        made = run()
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(made) + "\n")
    found: dict[str, Any] = json.loads(file.read_text())
    print(name, found, flush=True)
    return found


def main() -> None:
    tune_process()
    config = yaml.safe_load((HERE / "config.yaml").read_text())
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, Any]]] = {"clean": [], "planted": [], "not_finite": []}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as cache:
        os.environ["GRAFT_CACHE"] = cache
        base = save_tiny_base(Path(folder), **config["model"])
        for kind in ("clean", "planted"):
            part = config[kind]
            for rows, seeds in part["runs"].items():
                for seed in range(seeds):
                    draw = random.Random(1000 * rows + seed)
                    places = draw.sample(range(FEWEST + 1, part["steps"] + 1), part.get("spikes", 0))
                    wanted = recipe(config, base, part["steps"], rows, seed)
                    run = partial(watched, wanted, set(places), part.get("times", 1))
                    found[kind].append(cached(f"{kind}-{rows}-{seed}", run))
        for seed in range(config["not_finite"]["seeds"]):
            found["not_finite"].append(cached(f"not-finite-{seed}", partial(not_finite, config, base, seed)))
    bars = {
        "clean steps": sum(run["steps"] for run in found["clean"]),
        "false alarms": sum(len(run["false_alarms"]) for run in found["clean"] + found["planted"]),
        "planted": sum(run["planted"] for run in found["planted"]),
        "found in the same step": sum(run["found_in_the_same_step"] for run in found["planted"]),
        "bit-equal without the batches that are not finite": all(run["bit_equal"] for run in found["not_finite"]),
    }
    write_result(__file__, {"config": config, "bars": bars, **found})


if __name__ == "__main__":
    main()
