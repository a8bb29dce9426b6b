"""Peer side of the preference benchmark: TRL's DPOTrainer with a PEFT adapter, whose reference is the adapter off.

Trains on tokenised pairs in file order and writes the time, loss and margin of every step as JSON. Its fastest
configuration on a CPU is one pair at a time, accumulated, with eager attention and neither autocast nor
checkpointing; `--documented` leaves all that at its defaults. With `--precompute` the reference's log-probabilities
are computed before the first step, and their time is told apart.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from machine import peak_rss_gib
from sides import LORA, arguments, begin_at, clock, peers_settings, rows_of, timed, use_threads, versions, write


def parse_args() -> argparse.Namespace:
    parser = arguments(__doc__, "batch-pairs", beta=0.1)
    parser.add_argument("--precompute", action="store_true")
    parser.add_argument("--documented", action="store_true")
    parser.add_argument("--micro-pairs", type=int, help="default: the whole batch as documented, else 1")
    args = parser.parse_args()
    args.micro_pairs = args.micro_pairs or (args.batch_pairs if args.documented else 1)
    assert args.batch_pairs % args.micro_pairs == 0, "--micro-pairs must divide --batch-pairs"
    return args


def train(args: argparse.Namespace, rows: list[dict[str, list[int]]], output_dir: str) -> dict[str, Any]:
    import peft
    import torch
    import transformers
    import trl
    from datasets import Dataset

    torch.set_num_threads(args.threads)
    step_clock, marks = clock(args.threads)
    config = trl.DPOConfig(
        output_dir=output_dir, per_device_train_batch_size=args.micro_pairs, beta=args.beta, loss_type=["sigmoid"],
        gradient_accumulation_steps=args.batch_pairs // args.micro_pairs, precompute_ref_log_probs=args.precompute,
        **peers_settings(args, documented=args.documented),
    )  # fmt: skip
    lora = peft.LoraConfig(**LORA)
    beforehand = 0.0
    original = trl.DPOTrainer._precompute_ref_logps

    def measured(*positional: Any, **kwargs: Any) -> Any:
        nonlocal beforehand
        started = time.perf_counter()
        found = original(*positional, **kwargs)
        beforehand += time.perf_counter() - started
        return found

    trl.DPOTrainer._precompute_ref_logps = measured
    trl.DPOTrainer._prepare_dataset = lambda self, dataset, *_: dataset  # the rows are tokens already
    data, base = Dataset.from_list(rows), str(args.base)
    trainer = trl.DPOTrainer(base, args=config, train_dataset=data, peft_config=lora, callbacks=[step_clock])
    begin_at(trainer, args.start)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    prompts, answers = (sum(len(row[key]) for row in rows for key in keys) for keys in (("prompt_ids",), KINDS))
    return {
        "threads": args.threads, "micro_pairs": args.micro_pairs, "pairs": len(rows),
        "tokens": 2 * prompts + answers, "computed_tokens": 2 * prompts + answers,
        **timed(marks), "pairs_per_s": len(rows) / (marks[-1] - marks[0]),
        "losses": [entry["loss"] for entry in log], "margins": [entry["rewards/margins"] for entry in log],
        "beforehand_s": beforehand, "peak_rss_gib": peak_rss_gib(),
        "versions": versions(torch, transformers, trl, peft),
    }  # fmt: skip


KINDS = ("chosen_ids", "rejected_ids")


def main() -> None:
    args = parse_args()
    rows = rows_of(args.rows, args.steps * args.batch_pairs)
    use_threads(args.threads)
    with tempfile.TemporaryDirectory() as output_dir:
        write(args.out, train(args, rows, output_dir))


if __name__ == "__main__":
    main()
