"""Our side of the training-speed benchmark: the library's own loop over the rows, order and schedule of the peer.

The clock runs over the optimizer steps alone, as on the peer's side.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from machine import peak_rss_gib
from sides import arguments, peers_schedule, rows_of, use_threads, versions, write


def main() -> None:
    parser = arguments(__doc__, "batch-rows", **{"pack-tokens": 2048})
    parser.add_argument("--share", action="store_true", help="compute shared beginnings once")
    parser.add_argument("--kernels", default="auto", help="train.kernels: auto, ours, torch or compiled")
    parser.add_argument("--checkpointing", action="store_true", help="train.checkpointing")
    args = parser.parse_args()
    use_threads(args.threads)

    import numpy as np
    import torch
    import transformers

    import graftlm
    from graftlm.adapters.load import load_adapter
    from graftlm.data.batches.pack import Example, pack
    from graftlm.model.registry import trainable
    from graftlm.optim.adamw import adamw
    from graftlm.passes.autotune import choose
    from graftlm.system import tune_process
    from graftlm.training.loop import TrainStep
    from graftlm.training.passes import Passes
    from graftlm.training.state import TrainingState

    tune_process()
    torch.set_num_threads(args.threads)
    examples = [
        Example(np.array(row["input_ids"], np.int32), np.array(row["completion_mask"], np.float32), str(number))
        for number, row in enumerate(rows_of(args.rows, args.steps * args.batch_rows))
    ]
    batches = [examples[i : i + args.batch_rows] for i in range(0, len(examples), args.batch_rows)]
    model, _ = graftlm.load_base(args.base, dtype="bfloat16")
    load_adapter(model, args.start)
    for parameter in trainable(model).values():
        assert parameter.dtype == torch.float32
    packs = [pack(batch, args.pack_tokens, share=args.share) for batch in batches]
    choice = choose(model, [each for some in packs for each in some], args.kernels)
    optimizer = adamw([(trainable(model).values(), args.learning_rate)], weight_decay=0.0)
    schedule = partial(peers_schedule, steps=args.steps, warmup_steps=args.warmup_steps)
    passes = Passes(checkpointing=args.checkpointing, backend=choice.backend(model.device, model.dtype))
    train_step = TrainStep(TrainingState(model, {}, optimizer), "supervised", schedule, clip=1.0, passes=passes)
    done = list(train_step.over(packs))
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
        "kernels": choice.lines(),
        "versions": versions(graftlm, torch, transformers),
    }
    write(args.out, result)


if __name__ == "__main__":
    main()
