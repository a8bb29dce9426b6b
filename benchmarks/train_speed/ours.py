"""Our side of the training-speed benchmark: the library's own loop over the rows, order and schedule of the peer.

The clock runs over the optimiser steps alone, as on the peer's side.
"""

import argparse
import json
import math
import os
import platform
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from machine import peak_rss_gib


def peers_schedule(step: int, *, steps: int, warmup_steps: int) -> float:
    """transformers' cosine schedule, whose first rate is 0: losses are to be compared step by step.

    (Not quite 0 here: the loop checks that after the first step A learns, and for that B must have moved.)
    """
    if step < warmup_steps:
        return max(step, 1e-4) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, kind in {"--base": str, "--rows": Path, "--start": Path, "--out": Path, "--steps": int}.items():
        parser.add_argument(name, type=kind, required=True)
    numbers = {"--batch-rows": 8, "--threads": 1, "--seed": 0, "--warmup-steps": 3, "--r": 16, "--alpha": 32.0}
    for name, default in (numbers | {"--learning-rate": 5e-4, "--pack-tokens": 2048}).items():
        parser.add_argument(name, type=type(default), default=default)
    parser.add_argument("--share", action="store_true", help="compute shared beginnings once")
    parser.add_argument("--compile", action="store_true", help="train.compile")
    parser.add_argument("--checkpointing", action="store_true", help="train.checkpointing")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": str(args.threads), "MKL_NUM_THREADS": str(args.threads)}

    import numpy as np
    import torch
    import transformers

    import graftlm
    from graftlm.data.pack import Example, pack
    from graftlm.model.attach import trainable
    from graftlm.model.store import load_adapter
    from graftlm.training.loop import steps
    from graftlm.training.optim import adamw

    torch.set_num_threads(args.threads)
    rows = [json.loads(line) for line in args.rows.read_text(encoding="utf-8").splitlines()]
    examples = [
        Example(np.array(row["input_ids"], np.int32), np.array(row["completion_mask"], np.float32), str(number))
        for number, row in enumerate(rows[: args.steps * args.batch_rows])
    ]
    batches = [examples[i : i + args.batch_rows] for i in range(0, len(examples), args.batch_rows)]
    model, _ = graftlm.load_base(args.base, store="bf16")
    load_adapter(model, args.start)
    for parameter in trainable(model).values():
        assert parameter.dtype == torch.float32
    done = list(
        steps(
            model,
            (pack(batch, args.pack_tokens, share=args.share) for batch in batches),
            loss="supervised",
            optimiser=adamw([(trainable(model).values(), args.learning_rate)], weight_decay=0.0),
            schedule=partial(peers_schedule, steps=args.steps, warmup_steps=args.warmup_steps),
            clip=1.0,
            compiled=args.compile,
            checkpointing=args.checkpointing,
        )
    )
    wall, tokens = sum(step.wall_s for step in done), sum(step.tokens for step in done)
    result = {
        "shape": "ours",
        "threads": args.threads,
        "tokens": tokens,
        "computed_tokens": sum(step.computed_tokens for step in done),
        "supervised_tokens": sum(step.supervised_tokens for step in done),
        "steps": len(done),
        "train_wall_s": wall,
        "tokens_per_s": tokens / wall,
        "step_wall_s": [step.wall_s for step in done],
        "losses": [step.loss for step in done],
        "peak_rss_gib": peak_rss_gib(),
        "versions": {
            "graftlm": graftlm.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
