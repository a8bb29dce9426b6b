"""A few full-parameter steps in this process: peak memory, its parts, and step times, as JSON."""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from machine import peak_rss_gib  # noqa: E402


def resident_gib() -> float:
    """What this process has in memory now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", required=True)
    for name in ("--rows", "--out"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--settings", type=json.loads, required=True, help="the benchmark's config, as JSON")
    parser.add_argument("--sections", type=json.loads, required=True, help="optimizer and callbacks of a recipe")
    args = parser.parse_args()
    settings = args.settings

    import numpy as np
    import torch

    import graftlm
    from graftlm.config.schema import build
    from graftlm.data.batches.pack import Example, pack
    from graftlm.model.attach import attach
    from graftlm.model.registry import attachment, trainable
    from graftlm.recipe import Recipe
    from graftlm.system import tune_process
    from graftlm.training.callback import make_optimizer
    from graftlm.training.loop import TrainStep
    from graftlm.training.passes import Passes
    from graftlm.training.state import ParameterGroup, TrainingState

    tune_process()
    torch.set_num_threads(settings["threads"])
    torch.ones(64, 64) @ torch.ones(64, 64)
    rows = [json.loads(line) for line in args.rows.read_text(encoding="utf-8").splitlines()]
    size, count = settings["batch_rows"], settings["steps"]
    examples = [
        Example(np.array(row["ids"], np.int32), np.array(row["weights"], np.float32), str(number))
        for number, row in enumerate(rows[: size * count])
    ]
    before = resident_gib()
    model, _ = graftlm.load_base(args.base, dtype="bfloat16")
    tree = {"base": args.base, "data": {"train": str(args.rows)}, "delta": {"method": "full"}, **args.sections}
    setup = build(Recipe, tree, source="config.yaml").setup()
    attach(model, setup.deltas["default"], seed=settings["seed"])
    learning = trainable(model)
    callbacks = setup.make_callbacks()
    optimizer = make_optimizer(callbacks, [ParameterGroup(learning, settings["learning_rate"])], weight_decay=0.0)
    state = TrainingState(model, attachment(model).configs, optimizer, total=count, seed=settings["seed"])
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30
    held = resident_gib() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak of what follows, not of loading
    passes = Passes(checkpointing=True)
    train_step = TrainStep(state, "supervised", lambda step: 1.0, clip=1.0, callbacks=callbacks, passes=passes)
    batches = (pack(examples[n : n + size], settings["pack_tokens"]) for n in range(0, len(examples), size))
    done = list(train_step.over(batches))
    moments = [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
    result = {
        "peak_gib": peak_rss_gib() - before,
        "after_loading_gib": held,
        "weights_gib": weights,
        "moments_gib": sum(t.numel() * t.element_size() for t in moments) / 2**30,
        "parameters": sum(p.numel() for p in learning.values()),
        "step_wall_s": [step.wall_s for step in done],
        "losses": [step.loss for step in done],
        "tokens": [step.tokens for step in done],
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
