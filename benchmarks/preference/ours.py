"""Our side of the preference benchmark: the library's own loop over the pairs, order and schedule of the peer.

The clock runs over the optimizer steps alone, as on the peer's side; the reference is computed in them.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from machine import peak_rss_gib
from sides import arguments, peers_schedule, rows_of, use_threads, versions, write


def main() -> None:
    parser = arguments(__doc__, "batch-pairs", beta=0.1, **{"pack-tokens": 2048})
    parser.add_argument("--apart", action="store_true", help="compute the prompt of every answer")
    args = parser.parse_args()
    use_threads(args.threads)

    import numpy as np
    import torch

    import graftlm
    from graftlm.adapters.load import load_adapter
    from graftlm.data.batches.pack import Example, Group, pack
    from graftlm.losses.dpo import DpoConfig
    from graftlm.model.registry import trainable
    from graftlm.optim.adamw import adamw
    from graftlm.passes.autotune import fastest_backend
    from graftlm.system import tune_process
    from graftlm.training.loop import TrainStep
    from graftlm.training.passes import Passes
    from graftlm.training.state import TrainingState

    tune_process()
    torch.set_num_threads(args.threads)

    def answer(row: dict[str, list[int]], kind: str) -> Example:
        weights = [0.0] * len(row["prompt_ids"]) + [1.0] * len(row[f"{kind}_ids"])
        return Example(np.array(row["prompt_ids"] + row[f"{kind}_ids"], np.int32), np.array(weights, np.float32), kind)

    groups = [
        Group((answer(row, "chosen"), answer(row, "rejected")), (1.0, 0.0), ((0, 1),))
        for row in rows_of(args.rows, args.steps * args.batch_pairs)
    ]
    batches = [groups[i : i + args.batch_pairs] for i in range(0, len(groups), args.batch_pairs)]
    model, _ = graftlm.load_base(args.base, dtype="bfloat16")
    load_adapter(model, args.start)
    for parameter in trainable(model).values():
        assert parameter.dtype == torch.float32
    packs = [pack(batch, args.pack_tokens, share=not args.apart) for batch in batches]
    backend = fastest_backend(model, [each for some in packs for each in some])
    training = TrainingState(model, {}, adamw([(trainable(model).values(), args.learning_rate)], weight_decay=0.0))
    schedule = partial(peers_schedule, steps=args.steps, warmup_steps=args.warmup_steps)
    train_step = TrainStep(training, DpoConfig(beta=args.beta), schedule, clip=1.0, passes=Passes(backend=backend))
    done = list(train_step.over(packs))
    wall = sum(step.wall_s for step in done)
    result = {
        "threads": args.threads,
        "pairs": len(groups),
        "tokens": sum(step.tokens for step in done),
        "computed_tokens": sum(step.computed_tokens for step in done),
        "steps": len(done),
        "train_wall_s": wall,
        "pairs_per_s": len(groups) / wall,
        "step_wall_s": [step.wall_s for step in done],
        "losses": [step.loss for step in done],
        "margins": [step.metrics["margin"] for step in done],
        "beforehand_s": 0.0,
        "peak_rss_gib": peak_rss_gib(),
        "versions": versions(graftlm, torch),
    }
    write(args.out, result)


if __name__ == "__main__":
    main()
